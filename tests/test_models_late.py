"""晚交互：和作者的 Processor、forward 相等；补齐、分块、次序不改变什么；存取相等；坏输入有一句话。"""
import micro_late
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item
from vembed_nb.models.files import Source
from vembed_nb.models.late import VERSIONS, LateEncoder
from vembed_nb.vectors import Embeddings, maxsim

KINDS = ["colqwen2", "colqwen2.5", "colpali", "colmodernvbert", "colsmol"]
ENGINE = {"ColIdefics3": "colsmol", "ColQwen2": "colqwen2", "ColQwen2_5": "colqwen2.5"}  # colpali-engine 的类 → 微型模型
QUERIES = ["红色的杯子", "a red cup on the table and a dog"]


def noise(width, height, seed):
    pixels = torch.randint(0, 255, (width * height * 3,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return Image.frombytes("RGB", (width, height), pixels.numpy().tobytes())


PAGES = [noise(40, 64, 0), noise(64, 33, 1), noise(30, 30, 2)]
MIXED = [Item(QUERIES[0]), Item(image=PAGES[1]), Item(QUERIES[1]), Item(image=PAGES[0])]
MADE = {}


@pytest.fixture(params=KINDS)
def made(request):
    if request.param not in MADE: MADE[request.param] = micro_late.make(request.param)
    return MADE[request.param]


def rows(e): return [v[m] for v, m in zip(e.vectors, e.mask)]


def close(a, b, atol=1e-5):
    return len(a) == len(b) and all(x.shape == y.shape and torch.allclose(x, y, atol=atol) for x, y in zip(a, b))


def opened(folder): return LateEncoder.open(Source("model", str(folder))).eval()


def test_micro_covers_every_version(): assert {ENGINE.get(v, v) for v in VERSIONS} <= set(KINDS)


def asked(model, processor, texts):
    "作者的库怎样编码查询：(输入, 向量)。ColSmol 没有自己的 Processor，照 colpali-engine 0.3.18 的那几行手写。"
    if model.config.model_type != "idefics3":
        x = processor.process_queries(text=texts)
        return x, model(**x).embeddings
    x = processor(text=[t + "<end_of_utterance>" * 10 for t in texts], padding="longest", padding_side="right", return_tensors="pt")
    return x, by_hand(model, x)


def shown(model, processor, images):
    "作者的库怎样准备页面。"
    if model.config.model_type != "idefics3": return dict(processor.process_images(images=images))
    return dict(processor(text=["<|im_start|>User:<image>Describe the image.<end_of_utterance>\nAssistant:"] * len(images), images=[[i] for i in images], padding="longest", padding_side="right", return_tensors="pt"))


def vectors(model, x): return by_hand(model, x) if model.config.model_type == "idefics3" else model(**x).embeddings


def by_hand(model, x):
    hidden = model.model(**x).last_hidden_state
    return torch.nn.functional.normalize(model.linear(hidden), dim=-1) * x["attention_mask"][..., None]


@torch.inference_mode()
def test_queries_equal_the_authors(made):
    model, processor = made
    theirs, wanted = asked(model, processor, QUERIES)
    enc = LateEncoder(model, processor).eval()
    inputs = enc.preprocess([Item(q) for q in QUERIES], role="query")
    out = enc(inputs)
    assert torch.equal(theirs["input_ids"], inputs["input_ids"]) and torch.equal(theirs["attention_mask"].bool(), out.mask)
    assert torch.allclose(wanted, out.vectors, atol=1e-5)
    assert [int(m.sum()) for m in out.mask] == [len(enc.tokenizer(enc.text_line(q, "query"))["input_ids"]) for q in QUERIES]  # 扩充 token 在掩码里


@torch.inference_mode()
def test_pages_equal_the_authors(made):
    model, processor = made
    theirs = shown(model, processor, PAGES)
    enc = LateEncoder(model, processor).eval()
    inputs = enc.preprocess([Item(image=p) for p in PAGES])
    out = enc(inputs)
    assert torch.equal(theirs["input_ids"], inputs["input_ids"]) and torch.equal(theirs["attention_mask"].bool(), out.mask)
    if model.config.model_type == "colqwen2":  # transformers 5.23 的 forward 不传行列位置；给它，就与 colpali-engine 相同
        flat = LateEncoder(model, processor, positions="flat").eval()(inputs).vectors
        assert torch.allclose(model(**theirs).embeddings, flat, atol=1e-5) and not torch.allclose(flat, out.vectors, atol=.1)
        theirs["position_ids"] = model.vlm.get_rope_index(inputs["input_ids"], (inputs["input_ids"] == enc.image_id).int(), inputs["image_grid_thw"], attention_mask=inputs["attention_mask"])[0]
    assert torch.allclose(vectors(model, theirs), out.vectors, atol=1e-5)


@torch.inference_mode()
def test_padding_batch_order_chunk(made):
    enc, left = LateEncoder(*made).eval(), LateEncoder(*made, padding_side="left").eval()
    inputs = enc.preprocess(MIXED)
    whole = rows(enc(inputs))
    assert close([rows(enc(enc.preprocess([i])))[0] for i in MIXED], whole)
    assert close(rows(left(left.preprocess(MIXED))), whole)
    assert left.preprocess(MIXED)["attention_mask"][0, 0] == 0
    for n in (1, 3): assert close([r for c in inputs.chunk(n) for r in rows(enc(c))], whole)
    assert close(rows(enc(inputs.select(torch.tensor([3, 0, 2, 1])))), [whole[i] for i in (3, 0, 2, 1)])
    assert enc(inputs.span(0, 1)).vectors.shape[1] == whole[0].shape[0]  # 裁到最长的一行
    assert all(torch.allclose(r.norm(dim=-1), torch.ones(len(r)), atol=1e-5) for r in whole)


def test_encode(made):
    enc = LateEncoder(*made).eval()
    out = enc.encode([*MIXED, MIXED[0], PAGES[1].copy()], batch_size=3)
    assert isinstance(out, Embeddings) and close(rows(out)[4:], [rows(out)[0], rows(out)[1]])
    assert close(rows(out)[:4], [rows(enc.encode([i]))[0] for i in MIXED])
    short = enc.encode(MIXED, dim=4)
    assert short.dim == 4 and close(rows(short), [torch.nn.functional.normalize(r[:, :4], dim=-1) for r in rows(out)[:4]])
    assert enc.encode([]).vectors.shape == (0, 0, 8)
    q, d = enc.encode(QUERIES, role="query"), enc.encode(PAGES)
    by_hand = torch.tensor([[sum((a @ b.T).amax(1)) for b in rows(d)] for a in rows(q)])
    assert torch.allclose(maxsim(q, d), by_hand, atol=1e-4)


def test_reload(made, tmp_path):
    enc = LateEncoder(*made, document_tokens="image", augment=3, padding_side="left").eval()
    enc.save(tmp_path / "m")
    again = opened(tmp_path / "m")
    a, b = enc.encode(MIXED, role="query"), again.encode(MIXED, role="query")
    assert close(rows(a), rows(b), 1e-6) and again.card == enc.card
    import transformers

    if enc.card.model_type == "idefics3": return  # 见 test_colsmol_is_in_the_engine_format
    plain, info = getattr(transformers, VERSIONS[enc.card.model_type]["cls"]).from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = type(made[1]).from_pretrained(tmp_path / "m").process_queries(text=QUERIES)
    with torch.inference_mode():
        assert torch.allclose(plain.eval()(**theirs).embeddings, made[0](**made[1].process_queries(text=QUERIES)).embeddings, atol=1e-5)


@pytest.mark.parametrize("change", [lambda w: [w.pop(k) for k in list(w) if "proj_layer" in k], lambda w: w.update(extra=torch.zeros(1)), lambda w: w.update({"embedding_proj_layer.weight": torch.zeros(2, 2)})])
def test_a_changed_checkpoint_fails(tmp_path, change):
    folder = micro_late.build(tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VembedError, match="权重"): opened(folder)


def test_micro_is_small(tmp_path):
    for kind in KINDS:
        folder = micro_late.build(tmp_path / kind, kind=kind)
        assert (folder / "model.safetensors").stat().st_size < 1_000_000


@torch.inference_mode()
def test_grid(made):
    "改一格，恰好那一格的 token 变（注意力的输出关掉，每个 token 只看自己）。"
    from copy import deepcopy

    model = deepcopy(made[0])
    for name, w in model.named_parameters():
        if any(s in name for s in ("o_proj", "out_proj", "attn.Wo", "attn.proj")): w.zero_()
    enc = LateEncoder(model, made[1]).eval()
    base = Image.new("RGB", {"colqwen2": (32, 48), "colpali": (32, 32)}.get(model.config.model_type, (64, 64)), (120, 130, 140))
    nr, nc, at = enc.grid(base)
    assert nr * nc == len(at) == len(set(at.tolist()))
    h, w = base.size[1] // nr, base.size[0] // nc
    before = enc(enc.preprocess([Item(image=base)])).vectors[0][at]
    for cell in range(nr * nc):
        changed = base.copy()
        changed.paste((250, 10, 10), (cell % nc * w, cell // nc * h, cell % nc * w + w, cell // nc * h + h))
        moved = (enc(enc.preprocess([Item(image=changed)])).vectors[0][at] - before).norm(dim=-1) > 1e-5
        assert moved.nonzero()[:, 0].tolist() == [cell]


FULL = {"colqwen2": (32, 23, 736), "colpali": (32, 32, 1024), "colmodernvbert": (32, 24, 13 * 64), "colsmol": (32, 24, 13 * 64)}


@pytest.mark.parametrize("kind", FULL)
@torch.inference_mode()
def test_full_size_layout(kind):
    "真实大小的图像处理器和小块，一张 A4（150 dpi）：token 的排列与作者的 Processor 相同，向量也相同。"
    model, processor = micro_late.make(kind, full=True)
    enc, a4 = LateEncoder(model, processor, **({"positions": "flat"} if kind == "colqwen2" else {})).eval(), noise(1240, 1754, 3)
    nr, nc, at = enc.grid(a4)
    assert (nr, nc, enc.image_tokens(a4)) == FULL[kind] and len(at) == nr * nc
    inputs, theirs = enc.preprocess([Item(image=a4)]), shown(model, processor, [a4])
    assert torch.equal(inputs["input_ids"], theirs["input_ids"]) and torch.allclose(enc(inputs).vectors, vectors(model, theirs), atol=1e-5)


def test_image_tokens(made):
    enc = LateEncoder(*made)
    for p in PAGES:
        nr, nc, _ = enc.grid(p)
        tiles = enc.card.model_type in ("colmodernvbert", "idefics3")
        assert enc.image_tokens(p) == nr * nc + (4 if tiles and nr * nc > 4 else 0)
    if enc.card.model_type == "colqwen2":
        tight = LateEncoder(*made, max_pixels=512)
        assert tight.image_tokens(noise(300, 200, 0)) <= 8 < enc.image_tokens(noise(300, 200, 0))
        assert made[1].image_processor.size["longest_edge"] == 2048  # 使用者的处理器没有被改


@torch.inference_mode()
def test_document_tokens(made):
    enc = LateEncoder(*made, document_tokens="image").eval()
    out = enc(enc.preprocess(MIXED))
    full = LateEncoder(*made).eval()(enc.preprocess(MIXED))
    assert [int(m.sum()) for m in out.mask] == [int(full.mask[0].sum()), enc.image_tokens(PAGES[1]), int(full.mask[2].sum()), enc.image_tokens(PAGES[0])]
    assert torch.allclose(out.vectors[out.mask], full.vectors[out.mask], atol=1e-6) and (out.vectors[~out.mask] == 0).all()


def test_long_text_keeps_the_augmentation(made):
    enc = LateEncoder(*made).eval()
    for text in ("杯子" * 300, "a red cup " * 200, "龘" * 200, "ﷺ" * 50):  # 字节兜底的字一个占几个 token
        enc.truncated = 0
        inputs = enc.preprocess([Item(text), Item("a")], role="query")
        length = int(inputs["attention_mask"][0].sum())
        assert enc.truncated == 1 and enc.card.max_length - 60 <= length <= enc.card.max_length
        tail = enc.tokenizer(enc.text_line("", "query"))["input_ids"][-10:]
        assert inputs["input_ids"][0, :length][-10:].tolist() == tail
    with pytest.warns(UserWarning, match="1 段文字超过"): enc.encode(["杯子" * 300, "a"], role="query")


def test_gradients_reach_everything(made):
    from copy import deepcopy

    enc = LateEncoder(deepcopy(made[0]), made[1]).train()
    d, q = enc(enc.preprocess([Item(image=p) for p in PAGES])), enc(enc.preprocess([Item(t) for t in QUERIES], role="query"))
    maxsim(q, d).logsumexp(1).sum().backward()
    assert all(p.requires_grad == (n.removeprefix("model.") not in enc.unused) for n, p in enc.named_parameters()) and bool(enc.unused) == (enc.card.model_type == "colmodernvbert")
    assert not [n for n, p in enc.named_parameters() if not p.requires_grad and p.grad is not None]
    dead = [n for n, p in enc.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not [n for n in dead if "embed_tokens" not in n and not n.endswith(("k_proj.bias", "qkv.bias"))], dead  # k 的偏置不影响 softmax


BAD = [
    (dict(items=[Item("a", PAGES[0])]), "图加文字"), (dict(items=[Item(image=[PAGES[0], PAGES[1]])]), "几张图"), (dict(items=[Item("a"), Item()]), "第 1 个样本既没有"),
    (dict(argument=3), "augment"), (dict(augment=-1), "augment"), (dict(document_tokens="some"), "all、image"), (dict(padding_side="up"), "right、left"), (dict(page="没有图"), "恰好出现一次"),
]


@pytest.mark.parametrize("case,words", BAD, ids=[w for _, w in BAD])
def test_bad_input(made, case, words):
    with pytest.raises(VembedError, match=words):
        enc = LateEncoder(*made, **{k: v for k, v in case.items() if k != "items"})
        enc.preprocess(case["items"])


def test_image_token_in_text(made):
    enc = LateEncoder(*made)
    with pytest.raises(VembedError, match="文字里不能写"): enc.preprocess([Item(f"a {enc.image_token} cup"), Item(image=PAGES[0])])


def test_page_over_the_context():
    enc = LateEncoder(*micro_late.make("colqwen2"), max_pixels=64 * 300)
    with pytest.raises(VembedError, match="max_pixels"): enc.preprocess([Item(image=noise(400, 400, 0))])
    with pytest.raises(VembedError, match="min_pixels"): LateEncoder(*micro_late.make("colqwen2"), max_pixels=10)
    with pytest.raises(VembedError, match="没有选项 'max_pixels'"): LateEncoder(*micro_late.make("colpali"), max_pixels=999)


def test_zero_padding_is_not_a_mask():
    "补零的打分随批改变（transformers 的 score_retrieval）；我们的不变。"
    model, processor = micro_late.make("colqwen2")
    enc = LateEncoder(model, processor).eval()
    docs, q = enc.encode(["a", PAGES[1]]), enc.encode([QUERIES[1]], role="query")
    short, long = rows(docs)
    zero = [processor.score_retrieval(list(q.vectors), d)[0, 0] for d in ([short], [short, long])]
    ours = [maxsim(q, d)[0, 0] for d in (enc.encode(["a"]), docs)]
    assert torch.isclose(ours[0], ours[1], atol=1e-5) and torch.isclose(ours[0], zero[0], atol=1e-4) and zero[1] > zero[0] + .1


def test_predictor(made, tmp_path):
    from vembed_nb.predict import Predictor

    enc = LateEncoder(*made).eval()
    p, query = Predictor(enc), "红色的杯子 a red cup"
    PAGES[0].save(tmp_path / "page.png")
    scores, words = p.heat(query, PAGES[0])
    nr, nc, at = enc.grid(PAGES[0])
    assert scores.shape == (nr, nc) and [w for w in words if w] == words and "".join(words).replace(" ", "") == query.replace(" ", "")
    each = [p.heat(query, tmp_path.joinpath("page.png").as_posix(), i)[0] for i in range(len(words))]
    assert torch.allclose(torch.tensor(sum(each) / len(each)), torch.tensor(scores), atol=1e-5)
    assert torch.allclose(torch.tensor(p.heat(query, PAGES[0], "红色")[0]), torch.tensor(each[0] + each[1]) / 2, atol=1e-5)
    q, d = p.encode_text(query), p.encode_image(PAGES[0])
    k = enc.text_tokens(query)[2][0]
    assert q.ndim == 2 and torch.allclose((d[at] @ q[k]).view(nr, nc), torch.tensor(each[2]), atol=1e-5)  # 与手算相同
    assert torch.allclose(p.similarity([query], PAGES), maxsim(enc.encode([query], role="query"), enc.encode(PAGES)), atol=1e-5)
    for token in (99, -1, "蓝", "", 1.5):
        with pytest.raises(VembedError, match="没有 token"): p.heat(query, PAGES[0], token)
    with pytest.raises(VembedError, match="没有 token"): p.heat(" ", PAGES[0])


def test_heat_needs_late_interaction():
    from vembed_nb.predict import Predictor

    with pytest.raises(VembedError, match="晚交互"): Predictor("tiny-clip").heat("a", PAGES[0])


def test_heat_figure(tmp_path):
    import numpy as np

    from vembed_nb.show.heat import heat

    fig = heat(PAGES[0], {"a": np.eye(3), "b": np.eye(3) * .5, "c": np.zeros((3, 3)) + .1}, columns=2, title="t", path=str(tmp_path / "h.png"))
    layers = [ax.images[1] for ax in fig.axes if len(ax.images) == 2]
    assert len(layers) == 3 and len({layer.get_clim() for layer in layers}) == 1 and (tmp_path / "h.png").stat().st_size > 1000  # 同一把尺子
    box = fig.axes[0].patches[0]
    assert (box.get_x(), box.get_y()) == (0, 0) and heat(PAGES[0], np.full((2, 2), .3))
    for bad in (np.zeros(3), np.full((2, 2), np.inf), {}):
        with pytest.raises(VembedError): heat(PAGES[0], bad)


def test_colsmol_is_in_the_engine_format(tmp_path):
    "ColSmol 存成 colpali-engine 的格式：名字、architectures 都是它的；transformers 打得开骨干，一个权重不少。"
    import json

    import transformers
    from vembed_nb.models.load import load_encoder

    folder = micro_late.build(tmp_path / "m", kind="colsmol", dim=128)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["ColIdefics3"] and config["model_type"] == "idefics3" and "embedding_dim" not in config
    names = {k.split(".")[0] for k in load_file(folder / "model.safetensors")}
    assert names == {"model", "linear"}
    bone, info = transformers.Idefics3Model.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and set(info["unexpected_keys"]) == {"linear.weight", "linear.bias"}
    assert type(transformers.AutoProcessor.from_pretrained(folder)).__name__ == "Idefics3Processor"
    (folder / "vembed.json").unlink()  # 像 colpali-engine 自己存的那样
    enc = load_encoder(folder)
    assert "ColIdefics3" in enc.why and enc.dim == 128 and enc.heads == ["linear"]


def test_plain_idefics3_is_not_late(tmp_path):
    "没有投影层的 Idefics3 和以前一样：不支持。改个 architectures 也骗不过去，投影层的权重不在。"
    import json

    from vembed_nb.models.load import load_encoder

    folder = micro_late.build(tmp_path / "m", kind="colsmol")
    (folder / "vembed.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Idefics3ForConditionalGeneration"]}))
    with pytest.raises(VembedError, match="'idefics3'，还不支持"): load_encoder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v for k, v in load_file(folder / "model.safetensors").items() if "linear" not in k}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VembedError, match="缺少权重"): load_encoder(folder)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("kind", ["colqwen2", "colqwen2.5"])
def test_engine_colqwen2(tmp_path, kind, old):
    "colpali-engine 格式的 ColQwen2：向量与 transformers 格式的同一个模型相同；存下去是 transformers 的格式，再打开还是一样。"
    import transformers
    from vembed_nb.models.load import load_encoder

    folder, model, processor = micro_late.engine(tmp_path / "e", kind, old=old)
    enc, same = load_encoder(folder), LateEncoder(model, processor).eval()
    assert enc.family == "late" and "architectures" in enc.why and enc.card.model_type == "colqwen2"
    assert close(rows(enc.encode(PAGES)), rows(same.encode(PAGES)), 1e-6)
    assert enc.text_line("red", "query") == "red" + "<|endoftext|>" * 10 and same.text_line("red", "query").startswith("Query: ")
    enc.save(tmp_path / "m")
    again = load_encoder(tmp_path / "m")
    assert again.card == enc.card and close(rows(again.encode(MIXED, role="query")), rows(enc.encode(MIXED, role="query")), 1e-6)
    plain, info = transformers.ColQwen2ForRetrieval.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "custom_text_proj" not in k}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VembedError, match="缺少权重"): load_encoder(folder)


def test_plain_qwen2_vl_is_still_a_vlm(tmp_path):
    "同一个 model_type，没有 ColQwen2 这个名字的，仍然交给 vlm。"
    import json

    from vembed_nb.models.load import family_of

    folder, _, _ = micro_late.engine(tmp_path / "e")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen2VLForConditionalGeneration"]}))
    assert family_of(Source("m", str(folder)))[0] == "vlm"


def test_adapter_of_colsmol(tmp_path):
    "发表的 ColSmol 是底座加 LoRA（也在 linear 上）：用 peft 存的适配器，文件夹里写着底座，打得开，与 peft 自己算的相同。"
    import peft
    from vembed_nb.models.load import load_encoder

    base = micro_late.build(tmp_path / "base", kind="colsmol")
    model, processor = load_encoder(base).model, load_encoder(base).processor
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, target_modules=r"(.*(model.text_model).*(down_proj|q_proj|v_proj).*$|.*(linear).*$)"))
    for n, p in wrapped.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=.2)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter")
    enc = load_encoder(tmp_path / "adapter")
    assert close(rows(enc.encode(MIXED)), rows(LateEncoder(wrapped.base_model.model, processor).eval().encode(MIXED)))
    assert not close(rows(enc.encode(MIXED)), rows(load_encoder(base).encode(MIXED)))


def test_adapter_of_engine_colqwen2_is_refused(tmp_path):
    "ColQwen2 的参数改了名字，colpali-engine 的适配器对不上，说得清楚，不会悄悄少加几层。"
    import peft
    from vembed_nb.models.load import load_encoder

    base, model, _ = micro_late.engine(tmp_path / "base")
    shell = torch.nn.Module()  # colpali-engine 的 ColQwen2：没有 vlm 这一层外壳
    shell.visual, shell.language_model, shell.custom_text_proj, shell.config = model.vlm.visual, model.vlm.language_model, model.embedding_proj_layer, model.config.vlm_config
    wrapped = peft.get_peft_model(shell, peft.LoraConfig(r=2, target_modules=r"(.*(model).*(down_proj|q_proj).*$|.*(custom_text_proj).*$)"))
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(VembedError, match="适配器 adapter (缺少|多出)权重"): load_encoder(tmp_path / "adapter")


def test_an_adapter_on_the_hub(monkeypatch):
    from vembed_nb.models.load import family_of

    def unreadable(self): raise VembedError("没有 config.json")
    monkeypatch.setattr(Source, "config", property(unreadable))
    monkeypatch.setattr(Source, "json", lambda self, name: {"base_model_name_or_path": "x"} if name == "adapter_config.json" else None)
    with pytest.raises(VembedError, match="是一个适配器.*hf download vidore/colSmol-256M"): family_of(Source("vidore/colSmol-256M", "vidore/colSmol-256M"))


@pytest.mark.parametrize("name", ENGINE)
def test_equals_colpali_engine(name, tmp_path, monkeypatch):
    "colpali-engine 自己的类存的文件夹，我们打开；向量与它相同；ColSmol 存回去，它也打得开。只在 benchmarks/peers.txt 的环境里跑。"
    import sys
    from importlib import import_module
    from importlib.util import find_spec
    from pathlib import Path
    from types import ModuleType

    import transformers.models.qwen2_vl.image_processing_pil_qwen2_vl as pil
    from vembed_nb.models.load import load_encoder

    found = find_spec("colpali_engine")
    if found is None: pytest.skip("没有 colpali-engine")
    package, root = {"ColIdefics3": "idefics3", "ColQwen2": "qwen2", "ColQwen2_5": "qwen2_5"}[name], Path(found.origin).parent
    for p in (".", "utils", "models", f"models/{package}"):  # 它们的 __init__ 要 torchvision，绕过去
        shell = ModuleType("colpali_engine")
        shell.__path__ = [str(root / p)]
        monkeypatch.setitem(sys.modules, ".".join(["colpali_engine", *Path(p).parts]), shell)
    monkeypatch.setitem(sys.modules, "transformers.models.qwen2_vl.image_processing_qwen2_vl", pil)
    theirs = import_module(f"colpali_engine.models.{package}.{name.lower()}")
    micro, processor = micro_late.make(ENGINE[name], dim=128)
    torch.manual_seed(1)
    model = getattr(theirs, name)(getattr(micro.config, "vlm_config", micro.config)).eval()
    for p in model.parameters():
        if p.ndim > 1: torch.nn.init.normal_(p, std=.3)
    model.save_pretrained(tmp_path / "e")
    if name == "ColIdefics3":
        prepare = theirs.ColIdefics3Processor(processor.image_processor, processor.tokenizer, image_seq_len=processor.image_seq_len)
        prepare.save_pretrained(tmp_path / "e")
    else:
        for part in (processor.image_processor, processor.tokenizer): part.save_pretrained(tmp_path / "e")
        prepare = getattr(theirs, "ColQwen2Processor" if name == "ColQwen2" else "ColQwen2_5_Processor")
        prepare = _qwen(prepare, processor)
    enc = load_encoder(tmp_path / "e")
    assert name in enc.why
    with torch.inference_mode():
        for batch, ours in ((prepare.process_queries(QUERIES), enc.encode(QUERIES, role="query")), (prepare.process_images(PAGES), enc.encode(PAGES))):
            out, keep = model(**batch), batch["attention_mask"].bool()
            assert close([v[m] for v, m in zip(out, keep)], rows(ours))
        enc.save(tmp_path / "m")
        assert close(rows(load_encoder(tmp_path / "m").encode(MIXED)), rows(enc.encode(MIXED)), 1e-6)
        if name == "ColIdefics3":
            back, info = theirs.ColIdefics3.from_pretrained(tmp_path / "m", output_loading_info=True)
            assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            batch = theirs.ColIdefics3Processor.from_pretrained(tmp_path / "m").process_images(PAGES)
            assert close([v[m] for v, m in zip(back.eval()(**batch), batch["attention_mask"].bool())], rows(enc.encode(PAGES)))


def _qwen(cls, processor):
    "没有 torchvision 就没有视频处理器，colpali-engine 的 Qwen 处理器造不出来；只借它的两个方法和那几句话。"
    from transformers import BatchFeature

    class Bare:
        query_prefix, query_augmentation_token = cls.query_prefix, cls.query_augmentation_token
        process_queries, process_images, process_texts, visual_prompt_prefix = cls.process_queries, cls.process_images, cls.process_texts, cls.visual_prompt_prefix
        def __call__(self, text, images=None, padding="longest", return_tensors="pt"):
            x = processor.image_processor(images=images, return_tensors="pt") if images else {}
            n = [int(g.prod()) // processor.image_processor.merge_size**2 for g in x.get("image_grid_thw", [])]
            text = [t.replace("<|image_pad|>", "<|image_pad|>" * k) for t, k in zip(text, n)] if images else text
            enc = processor.tokenizer(text, padding=padding, padding_side="left", return_tensors="pt")
            kinds = {"mm_token_type_ids": (enc["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()} if images else {}
            return BatchFeature({k: enc[k] for k in ("input_ids", "attention_mask")} | dict(x) | kinds)
    return Bare()
