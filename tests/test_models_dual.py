"""双塔：表里的每一行，好的输入和坏的输入。随机的微型权重。"""
import json
import sys
import warnings
from types import ModuleType, SimpleNamespace

import micro_dual
import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item
from vembed_nb.models import dual
from vembed_nb.models.base import ModelCard, quiet
from vembed_nb.models.dual import VERSIONS, DualEncoder, OpenClipEncoder, check_open_clip, open_clip_name, resize_and_crop, to_pixels
from vembed_nb.models.files import Source
from vembed_nb.vectors import normalize

KINDS = micro_dual.KINDS


def picture(seed=0, size=(40, 30)): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


TEXTS = ["red", "a red cup on it", "红色的杯子", "z"]
MIXED = [Item("red"), Item(image=picture(0)), Item("换成蓝", picture(1, (60, 20))), Item("a red cup and 2 dogs"), Item(image=picture(2, (20, 60))), Item("", picture(3))]


@pytest.fixture(scope="module", params=KINDS)
def enc(request): return micro_dual.encoder(request.param)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "每一行存好的文件夹。"
    return {k: str(micro_dual.build(tmp_path_factory.mktemp("dual") / k, kind=k)) for k in KINDS}


def vectors(enc, inputs):
    with torch.inference_mode(): return enc(inputs).vectors


def source(folder, **options): return Source("m", str(folder), **options)
def close(a, b, tol=2e-6): return float((a - b).abs().max()) <= tol


def test_every_row_has_a_micro(): assert set(KINDS) == set(VERSIONS)


def test_batch_chunk_order(enc):
    "一次一个 = 一批 = 切块 = 换个次序；图加文是两者之和归一化。"
    inputs = enc.preprocess(MIXED)
    whole = vectors(enc, inputs)
    assert whole.shape == (6, 16) and close(whole.norm(dim=1), torch.ones(6))
    assert close(whole, torch.cat([vectors(enc, enc.preprocess([i])) for i in MIXED]))
    for n in (1, 2, 4): assert close(whole, torch.cat([vectors(enc, c) for c in inputs.chunk(n)]))
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    assert close(whole[order], vectors(enc, enc.preprocess([MIXED[i] for i in order])))
    assert close(whole[order], vectors(enc, inputs.select(order)))
    text, image = enc.encode([Item("换成蓝")]), enc.encode([picture(1, (60, 20))])
    assert close(whole[2:3], normalize(text + image))
    assert close(whole, enc.encode(MIXED, batch_size=2))
    assert float((whole @ whole.T - torch.eye(6)).abs().max()) < 0.9999, "不同的样本要有不同的向量"


def test_text_equals_transformers(enc):
    "与直接调用 transformers 相同：补齐的办法、掩码都照各家的文档。"
    tok, kind = enc.processor.tokenizer, enc.card.model_type
    texts = [t.lower() for t in TEXTS]
    if "siglip" in kind: words = {"input_ids": tok(texts, padding="max_length", max_length=32, return_tensors="pt")["input_ids"]}
    else: words = tok(texts, padding=True, return_tensors="pt")
    with torch.inference_mode(): want = normalize(enc.model.get_text_features(**words).pooler_output)
    assert close(enc.encode([Item(t) for t in TEXTS]), want)


def test_image_equals_transformers(enc):
    images = [picture(i, s) for i, s in enumerate([(40, 30), (60, 20), (20, 60)])]
    with torch.inference_mode(): want = normalize(enc.model.get_image_features(**enc.processor.image_processor(images=images, return_tensors="pt")).pooler_output)
    assert close(enc.encode(images), want)


def test_padding(enc):
    "CLIP 类：多补几格不改变向量。SigLIP 类：补的长短是模型的一部分，只有补满才对，掩码会改变它。"
    tok, kind = enc.processor.tokenizer, enc.card.model_type
    want = enc.encode([Item(t) for t in TEXTS])
    with torch.inference_mode():
        if VERSIONS[kind].mask:
            words = tok(TEXTS, padding="max_length", max_length=30, return_tensors="pt")
            assert close(normalize(enc.model.get_text_features(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).pooler_output), want)
            if kind == "chinese_clip": assert not close(normalize(enc.model.get_text_features(input_ids=words["input_ids"]).pooler_output), want, 1e-3), "BERT 是双向的，没有掩码就会看见补齐"
        else:
            words = tok(TEXTS, padding="longest", return_tensors="pt", return_attention_mask=True)
            assert not close(normalize(enc.model.get_text_features(input_ids=words["input_ids"]).pooler_output), want, 1e-3)
            words = tok(TEXTS, padding="max_length", max_length=32, return_tensors="pt", return_attention_mask=True)
            masked = enc.model.get_text_features(input_ids=words["input_ids"], attention_mask=words["attention_mask"]).pooler_output
            assert not close(normalize(masked), want, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_always_pads_right(kind):
    "分词器写着补左边，也不影响。"
    a, b = micro_dual.encoder(kind), micro_dual.encoder(kind)
    b.processor.tokenizer.padding_side = "left"
    assert torch.equal(a.encode(TEXTS), b.encode(TEXTS))


@pytest.mark.parametrize("kind", KINDS)
def test_save_load(kind, saved):
    "读回来逐位相同；再存一次文件相同；plain transformers 打得开，向量相同。"
    made, again = micro_dual.encoder(kind), DualEncoder.open(source(saved[kind])).eval()
    assert torch.equal(made.encode(MIXED), again.encode(MIXED)) and again.card == made.card
    with quiet(): plain, tok, images = (c.from_pretrained(saved[kind]) for c in (tf.AutoModel, tf.AutoTokenizer, tf.AutoImageProcessor))
    row, pics = VERSIONS[kind], [picture(0), picture(1, (60, 20))]
    words = tok(["a red cup", "红色"], return_tensors="pt", padding=row.padding, max_length=32, return_attention_mask=row.mask)
    with torch.inference_mode():
        text = normalize(plain.eval().get_text_features(**{k: v for k, v in words.items() if k != "token_type_ids"}).pooler_output)
        image = normalize(plain.get_image_features(**images(images=pics, return_tensors="pt")).pooler_output)
    assert close(torch.cat([text, image]), again.encode([Item("a red cup"), Item("红色"), *pics]))
    assert json.loads(open(saved[kind] + "/vembed.json", encoding="utf-8").read())["family"] == "dual"
    with quiet(): assert isinstance(tf.AutoProcessor.from_pretrained(saved[kind]).tokenizer, type(made.processor.tokenizer))


@pytest.mark.parametrize("kind", KINDS)
def test_load_encoder_finds_it(kind, saved):
    from vembed_nb.models.load import load_encoder
    e = load_encoder(saved[kind])
    assert isinstance(e, DualEncoder) and e.card.model_type == kind and "dual" in e.why


def test_without_card(saved, tmp_path):
    "没有 vembed.json（Hub 上的文件夹）：维数和文字上限从配置推出。"
    import shutil
    for kind, length in (("clip", 32), ("chinese_clip", 52), ("siglip", 32)):
        folder = tmp_path / kind
        shutil.copytree(saved[kind], folder)
        (folder / "vembed.json").unlink()
        e = DualEncoder.open(source(folder)).eval()
        assert (e.card.dim, e.card.max_length, e.card.family) == (16, length, "dual")
        assert torch.equal(e.encode(TEXTS), DualEncoder.open(source(saved[kind])).eval().encode(TEXTS))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half(saved, dtype):
    for kind in KINDS:
        e = DualEncoder.open(source(saved[kind], dtype=dtype)).eval()
        v = e.encode(MIXED)
        assert v.dtype == torch.float32 and ((v * DualEncoder.open(source(saved[kind])).eval().encode(MIXED)).sum(1) > 0.98).all()


def test_towers(enc):
    "单独的塔与整个编码器相同，参数名与 Inputs 相同。"
    inputs = enc.preprocess([Item("a red cup"), Item("红")])
    with torch.inference_mode(): assert close(enc.towers()["text"](**inputs.tensors), enc(inputs).vectors)
    inputs = enc.preprocess([Item(image=picture(1)), Item(image=picture(2, (60, 20)))])
    assert ("image" in enc.towers()) == (enc.card.model_type != "siglip2")
    if "image" not in enc.towers(): return
    with torch.inference_mode(): assert close(enc.towers()["image"](**inputs.tensors), enc(inputs).vectors)


def test_gradients(enc):
    "每个参数都有梯度的路（不在两座塔里的温度除外）。"
    e = micro_dual.encoder(enc.card.model_type).train()
    e(e.preprocess(MIXED)).vectors.pow(3).sum().backward()
    idle = [n for n, p in e.named_parameters() if p.grad is None]
    assert not [n for n in idle if n not in ("model.logit_scale", "model.logit_bias")], idle


def test_cache(enc, tmp_path):
    "缓存逐位相同；超过预算就不再存；NaFlex 的三样都记得。"
    for n, size in enumerate([(40, 30), (60, 20), (20, 60)]): picture(n, size).save(tmp_path / f"{n}.png")
    items = [Item(image=f"{i}.png") for i in (0, 1, 2, 1)] + [Item(image=picture(9))]
    plain = enc.preprocess(items, tmp_path)
    enc.cache_pixels(4)
    try:
        for _ in range(2):
            got = enc.preprocess(items, tmp_path)
            assert got.tensors.keys() == plain.tensors.keys() and all(torch.equal(got[k], plain[k]) and got[k].dtype == plain[k].dtype for k in plain.tensors)
        assert len(enc.cache) == 3
        enc.cache_pixels(1)
        enc.cache.budget = 14_000  # 只够一张（3·32·32·4 = 12,288 字节）
        enc.preprocess(items, tmp_path)
        assert len(enc.cache) == 1
    finally: enc.cache_pixels(0)
    assert len(DualEncoder.cache) == 0 and len(enc.cache) == 0


def test_truncation_is_counted(enc):
    "太长的被截断并数出来，句尾还在；encode 说一次。"
    n = enc.card.max_length
    enc.truncated = 0
    ids = enc.preprocess([Item("红 " * 200), Item("red"), Item("a " * 100)])["input_ids"]
    assert enc.truncated == 2 and ids.shape[1] == n
    tok = enc.processor.tokenizer
    assert ids[0, -1] == (tok.eos_token_id if tok.eos_token_id is not None else tok.sep_token_id)
    with pytest.warns(UserWarning, match=f"1 段文字超过 {n} 个 token"): enc.encode([Item("红 " * 200), Item("red")])
    with warnings.catch_warnings(): warnings.simplefilter("error"); enc.encode(["red"])


def test_prompts(enc):
    e = micro_dual.encoder(enc.card.model_type)
    e.card.prompts = {"query": "红 "}
    assert torch.equal(e.encode(["red"], role="query"), enc.encode(["红 red"])) and torch.equal(e.encode(["red"]), enc.encode(["red"]))


def test_not_normalized(enc):
    e = micro_dual.encoder(enc.card.model_type)
    e.card.normalize = False
    v = e.encode(["red", picture(1)])
    assert not close(v.norm(dim=1), torch.ones(2), 1e-2) and close(normalize(v), enc.encode(["red", picture(1)]))


def test_scale(enc):
    e = micro_dual.encoder(enc.card.model_type)
    loss = torch.nn.Module()
    loss.logit_scale, loss.logit_bias = torch.nn.Parameter(torch.tensor(3.0)), torch.nn.Parameter(torch.tensor(-7.0))
    e.set_scale(loss)
    assert e.get_scale() == pytest.approx({"temperature": float(np.exp(-3)), "bias": -7.0 if "siglip" in e.card.model_type else None})


# ---- 各版本自己的规矩

def test_clip_pools_the_first_eos():
    "句尾后面的 token 不影响；pad 与 eos 是同一个 id 时（OpenAI 的分词器）也取第一个。"
    e = micro_dual.encoder("clip")
    e.processor.tokenizer.pad_token = e.processor.tokenizer.eos_token
    assert close(e.encode(TEXTS), micro_dual.encoder("clip").encode(TEXTS))


def words(eos_first):
    "eos 的 id 是 2（词表最前）或最大（OpenAI 的词表）。"
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    names = ["<pad>", "<bos>", *(["<eos>"] if eos_first else []), "<unk>", "a", "red", "cup", *([] if eos_first else ["<eos>"])]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    tok.pre_tokenizer, tok.post_processor = pre_tokenizers.Whitespace(), processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=[(w, names.index(w)) for w in ("<bos>", "<eos>")])
    return tf.PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", model_max_length=32)


def test_clip_legacy_eos():
    "旧配置 eos_token_id=2：eos 的 id 最大时照常；id 就是 2 时 transformers 会取错，打开就报错。"
    ok = micro_dual.encoder("clip", tok=words(False), eos_token_id=2)
    assert close(ok.encode(["a red cup", "a"]), micro_dual.encoder("clip", tok=words(False)).encode(["a red cup", "a"]))
    with pytest.raises(VembedError, match="id 最大的 token"): micro_dual.encoder("clip", tok=words(True))
    micro_dual.encoder("metaclip_2", tok=words(True))  # MetaCLIP 2 没有这段旧规矩


@pytest.mark.parametrize("kind", ("clip", "metaclip_2"))
def test_wrong_eos_is_refused(kind):
    "取不到句尾时，所有句子会是同一个向量；打开就报错。"
    good = micro_dual.encoder(kind)
    good.model.text_model.eos_token_id = 999_999
    v = good.encode(TEXTS)
    assert close(v, v[:1].expand_as(v))
    with pytest.raises(VembedError, match="eos_token_id=999999"): micro_dual.encoder(kind, eos_token_id=999_999)


def test_metaclip_eos_is_two():
    e = micro_dual.encoder("metaclip_2")
    assert e.processor.tokenizer.eos_token_id == 2 == e.model.config.text_config.eos_token_id
    ids = e.preprocess([Item("red"), Item("a red cup")])["input_ids"]
    with torch.inference_mode():
        hidden = e.model.text_model(input_ids=ids).last_hidden_state
        want = normalize(e.model.text_projection(hidden[torch.arange(2), [row.index(2) for row in ids.tolist()]]))
    assert close(e.encode(["red", "a red cup"]), want)


def test_chinese_clip_cls_and_case():
    e = micro_dual.encoder("chinese_clip")
    assert torch.equal(*e.encode(["Red 红色", "red 红色"]))
    words = e.processor.tokenizer(["a red cup", "红"], padding=True, return_tensors="pt")
    assert words["input_ids"][0, 0] == e.processor.tokenizer.cls_token_id
    with torch.inference_mode(): want = normalize(e.model.text_projection(e.model.text_model(**words).last_hidden_state[:, 0]))
    assert close(e.encode(["a red cup", "红"]), want)
    assert e.card.max_length == 52


def test_siglip_pools_the_last_position():
    e = micro_dual.encoder("siglip")
    inputs = e.preprocess([Item("red")])
    assert list(inputs.tensors) == ["input_ids"] and inputs["input_ids"].shape == (1, 32)
    with torch.inference_mode():
        hidden = e.model.text_model(**inputs.tensors).last_hidden_state
        assert close(e.encode(["red"]), normalize(e.model.text_model.head(hidden[:, -1])))


def test_siglip2_fixed_resolution(tmp_path):
    "SigLIP 2 的固定分辨率权重：model_type 是 siglip，Gemma 分词器不变小写，我们变。"
    e = micro_dual.encoder("siglip", tok=micro_dual.gemma(tf.GemmaTokenizer))
    tok = e.processor.tokenizer
    assert tok("Red")["input_ids"] != tok("red")["input_ids"]
    assert torch.equal(*e.encode(["A Red Cup", "a red cup"]))
    e.save(tmp_path)
    again = DualEncoder.open(source(tmp_path)).eval()
    assert isinstance(again.processor.tokenizer, tf.GemmaTokenizer) and torch.equal(e.encode(TEXTS), again.encode(TEXTS))


def test_naflex():
    "宽图切成宽的网格；掩码盖住的图块填什么都不改变向量；块数可以改，改了就存下去。"
    e = micro_dual.encoder("siglip2")
    inputs = e.preprocess([Item(image=picture(1, (60, 20))), Item(image=picture(2, (20, 60))), Item(image=picture(3, (30, 30)))])
    shapes, mask = inputs["spatial_shapes"], inputs["pixel_attention_mask"]
    assert shapes[0, 1] > shapes[0, 0] and shapes[1, 0] > shapes[1, 1] and shapes[2].tolist() == [4, 4]
    assert mask.sum(1).tolist() == shapes.prod(1).tolist() and (mask.sum(1) <= 16).all() and mask.sum(1).min() < 16
    before = vectors(e, inputs)
    inputs.tensors["pixel_values"] = inputs["pixel_values"].masked_fill(mask[..., None] == 0, 99.0)
    assert close(before, vectors(e, inputs))


def test_naflex_max_num_patches(saved, tmp_path):
    e = DualEncoder.open(source(saved["siglip2"]), max_num_patches=9).eval()
    assert e.preprocess([Item(image=picture(3, (30, 30)))])["pixel_values"].shape[1] == 9
    e.save(tmp_path)
    assert torch.equal(DualEncoder.open(source(tmp_path)).eval().encode([picture(1)]), e.encode([picture(1)]))
    with pytest.raises(VembedError, match="不是 NaFlex"): DualEncoder.open(source(saved["siglip"]), max_num_patches=9)


# ---- 坏的输入

def test_bad_items(enc, tmp_path):
    for items, word in (([Item("a"), Item(image=[picture(1), picture(2)])], "第 1 个样本"), ([Item()], "既没有文字也没有图片"), ([Item(image="missing.png")], "missing.png")):
        with pytest.raises(VembedError, match=word): enc.preprocess(items, tmp_path)
    (tmp_path / "text.jpg").write_text("我不是图片", encoding="utf-8")
    with pytest.raises(VembedError, match="text.jpg"): enc.encode([Item(image="text.jpg")], image_root=tmp_path)
    with pytest.raises(VembedError, match="dim=17"): enc.encode(["a"], dim=17)
    assert enc.encode([]).shape == (0, 16)


def test_odd_images(enc):
    "灰度、透明、一个像素宽的图都能编码。"
    odd = [picture(1).convert("L"), picture(2).convert("RGBA"), picture(3).convert("P"), picture(4, (1, 1)), picture(5, (200, 2))]
    v = enc.encode(odd)
    assert v.isfinite().all() and close(v, torch.cat([enc.encode([o]) for o in odd]))


def test_unknown_model_type():
    model = torch.nn.Linear(1, 1)
    model.config = SimpleNamespace(model_type="siglop")
    with pytest.raises(VembedError, match="siglop.*siglip"): DualEncoder(model, None)


def test_no_pad_token():
    e = micro_dual.encoder("clip")
    e.processor.tokenizer.pad_token = None
    with pytest.raises(VembedError, match="pad_token"): DualEncoder(e.model, e.processor)


def test_swapped_tokenizer_is_refused_when_saving(tmp_path):
    "siglip2 的文件夹，transformers 总用 Siglip2Tokenizer 打开；别的分词器存下去会变，存的时候就说。"
    e = micro_dual.encoder("siglip2", tok=micro_dual.tokenizer("clip"))
    with pytest.raises(VembedError, match="Siglip2Tokenizer"): e.save(tmp_path)


def test_broken_folders(saved, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def broken(change, kind="clip"):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved[kind], folder)
        change(folder)
        with pytest.raises(VembedError) as e: DualEncoder.open(source(folder))
        return str(e.value)

    def drop(folder):
        w = load_file(folder / "model.safetensors")
        w.pop("logit_scale")
        save_file(w, folder / "model.safetensors", metadata={"format": "pt"})

    assert "logit_scale" in broken(drop)
    assert "tokenizer" in broken(lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")])
    assert broken(lambda f: (f / "model.safetensors").unlink())
    assert "权重" in broken(lambda f: shutil.copy(saved["siglip"] + "/model.safetensors", f / "model.safetensors"))


def test_without_processor():
    "只有模型也能前向（证明 GradCache 的房间这样用）。"
    e = micro_dual.encoder("clip")
    bare = DualEncoder(e.model, None, ModelCard("dual", "clip", 16, 32)).eval()
    inputs = e.preprocess(MIXED)
    assert torch.equal(vectors(bare, inputs), vectors(e, inputs))


def test_lora():
    "peft 包住 encoder.model 之后照样用；合并后相同。"
    from peft import LoraConfig, get_peft_model
    for kind in KINDS:
        e = micro_dual.encoder(kind)
        before = e.encode(MIXED)
        e.model = get_peft_model(e.model, LoraConfig(r=2, target_modules=["query", "value"] if kind == "chinese_clip" else ["q_proj", "v_proj"], init_lora_weights=False)).eval()
        adapted = e.encode(MIXED)
        assert not close(before, adapted, 1e-3) and e.get_scale()["temperature"] > 0
        e.model = e.model.merge_and_unload()
        assert close(adapted, e.encode(MIXED), 1e-4)


# ---- open_clip：没有它也能验的部分

def test_open_clip_names():
    assert open_clip_name("open_clip:EVA02-B-16/merged2b_s8b_b131k") == ("EVA02-B-16", "merged2b_s8b_b131k")
    assert open_clip_name("open_clip:ViT-B/32/openai") == ("ViT-B-32", "openai")
    assert open_clip_name("open_clip:EVA02-B-16") == ("EVA02-B-16", "")
    assert open_clip_name("open_clip:hf-hub:timm/eva") == ("hf-hub:timm/eva", "")
    for bad in ("open_clip:", "open_clip:  "):
        with pytest.raises(VembedError, match="EVA02-B-16"): open_clip_name(bad)


def fake_open_clip(**more):
    m = ModuleType("open_clip")
    m.list_models = lambda: ["ViT-B-32", "ViT-B-32-quickgelu", "Bare"]
    m.list_pretrained_tags_by_model = lambda name: [] if name == "Bare" else ["openai", "laion2b"]
    m.get_pretrained_cfg = lambda name, tag: {"quick_gelu": tag == "openai"}
    m.get_model_config = lambda name: {"quick_gelu": name.endswith("quickgelu"), "embed_dim": 4, "text_cfg": {"context_length": 6}}
    for k, v in more.items(): setattr(m, k, v)
    return m


@pytest.mark.parametrize("name, word", [("ViT-B-23/openai", "ViT-B-32"), ("ViT-B-32", "openai、laion2b"), ("ViT-B-32/opanai", "没有权重 'opanai'.*openai"),
                                        ("ViT-B-32/openai", "ViT-B-32-quickgelu/openai"), ("ViT-B-32-quickgelu/laion2b", "用 open_clip:ViT-B-32/laion2b"), ("Bare", "没有发布过")])
def test_open_clip_bad_names(name, word):
    with pytest.raises(VembedError, match=word): check_open_clip(fake_open_clip(), *open_clip_name("open_clip:" + name))


def test_open_clip_good_names():
    for name in ("ViT-B-32/laion2b", "ViT-B-32-quickgelu/openai", "hf-hub:a/b"): check_open_clip(fake_open_clip(), *open_clip_name("open_clip:" + name))


def test_open_clip_missing(monkeypatch):
    "没装：说怎样装。装了但 torchvision 坏了：说怎样修。"
    from vembed_nb.models.load import load_encoder
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(VembedError, match=r"pip install 'vembed-nb\[open_clip\]'"): load_encoder("open_clip:EVA02-B-16/merged2b_s8b_b131k")
    def broken(*_): raise RuntimeError("operator torchvision::nms does not exist")
    monkeypatch.setattr(dual, "need", broken)
    with pytest.raises(VembedError, match="torchvision.*download.pytorch.org"): load_encoder("open_clip:EVA02-B-16/merged2b_s8b_b131k")


class Toy(torch.nn.Module):
    "样子像 open_clip 的模型。"
    def __init__(self):
        super().__init__()
        self.visual, self.text = torch.nn.Linear(3 * 8 * 8, 4), torch.nn.Embedding(50, 4)
        self.visual.preprocess_cfg = dict(size=8, mode="RGB", mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", resize_mode="shortest", fill_color=0)
        self.logit_scale, self.logit_bias = torch.nn.Parameter(torch.tensor([2.0])), None
    def encode_text(self, ids): return self.text(ids).cumsum(1)[:, -1]
    def encode_image(self, x): return self.visual(x.flatten(1))


def toy_tokenizer(texts, context_length=None):
    out = torch.zeros(len(texts), context_length or 6, dtype=torch.long)
    for r, t in enumerate(texts):
        ids = [1, *(3 + ord(c) % 40 for c in t)][:out.shape[1] - 1] + [2]
        out[r, :len(ids)] = torch.tensor(ids)
    return out


def toy(): torch.manual_seed(0); return OpenClipEncoder(Toy(), {"embed_dim": 4, "text_cfg": {"context_length": 6}}, toy_tokenizer).eval()


def test_open_clip_contract():
    "同样的约定：批、切块、图加文、截断计数、温度。"
    e = toy()
    whole = e.encode([Item("abc"), Item(image=picture(1)), Item("ab", picture(2))])
    assert close(whole[2:], normalize(e.encode(["ab"]) + e.encode([picture(2)]))) and e.dim == 4 and e.card.max_length == 6
    inputs = e.preprocess(MIXED)
    assert close(vectors(e, inputs), torch.cat([vectors(e, c) for c in inputs.chunk(1)]))
    for text, n in (("abc", 0), ("abcd", 0), ("abcde", 1), ("a" * 50, 1)):
        e.truncated = 0
        e.preprocess([Item(text), Item("a")])
        assert e.truncated == n, text
    assert e.get_scale() == pytest.approx({"temperature": float(np.exp(-2)), "bias": None})
    with torch.inference_mode(): assert close(e.towers()["image"](**e.preprocess([Item(image=picture(1))]).tensors), whole[1:2])
    with pytest.raises(VembedError, match="第 0 个样本"): e.encode([Item(image=[picture(1), picture(2)])])


def test_open_clip_save_and_open(monkeypatch, tmp_path):
    "存的文件夹：open_clip 的两个文件加 vembed.json；按文件夹打开时走 local-dir。"
    from vembed_nb.models.load import load_encoder
    e, asked = toy(), []
    e.save(tmp_path / "m")
    assert {p.name for p in (tmp_path / "m").iterdir()} == {"open_clip_config.json", "open_clip_model.safetensors", "vembed.json"}
    saved = json.loads((tmp_path / "m" / "open_clip_config.json").read_text())
    assert saved["model_cfg"]["embed_dim"] == 4 and saved["preprocess_cfg"]["size"] == 8

    def create_model(name, tag, precision, require_pretrained):
        from safetensors.torch import load_model
        asked.append((name, tag, precision))
        m = Toy()
        if name.startswith("local-dir:"): load_model(m, name.removeprefix("local-dir:") + "/open_clip_model.safetensors")
        return m
    monkeypatch.setitem(sys.modules, "open_clip", fake_open_clip(create_model=create_model, get_tokenizer=lambda name: toy_tokenizer))
    again = load_encoder(str(tmp_path / "m"))
    some = [Item("abc"), Item(image=picture(1)), Item("ab", picture(2))]
    assert isinstance(again, OpenClipEncoder) and torch.equal(again.encode(some), e.encode(some)) and again.card == e.card
    named = load_encoder("open_clip:ViT-B-32/laion2b")
    assert asked == [(f"local-dir:{tmp_path / 'm'}", None, "fp32"), ("ViT-B-32", "laion2b", "fp32")] and named.card.notes == {"open_clip": "ViT-B-32/laion2b"}


def test_open_clip_offline(monkeypatch):
    "下载不了：说这是 Hub 上的名字，要联网。"
    from vembed_nb.models.load import load_encoder
    def create_model(*a, **k): raise RuntimeError("Failed to download weights for tag 'laion2b'")
    monkeypatch.setitem(sys.modules, "open_clip", fake_open_clip(create_model=create_model))
    with pytest.raises(VembedError, match="Failed to download.*联网"): load_encoder("open_clip:ViT-B-32/laion2b")


def test_open_clip_pickle(tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(VembedError, match="trust_pickle"): OpenClipEncoder.open(source(tmp_path))


@pytest.mark.parametrize("how", ("shortest", "longest", "squash"))
@pytest.mark.parametrize("size", (8, (8, 12)))
def test_resize_and_crop(how, size):
    "大小总是对；方图不裁不补；补边的颜色对。"
    cfg = dict(size=size, mean=(0.0,) * 3, std=(1.0,) * 3, interpolation="bilinear", resize_mode=how, fill_color=7)
    h, w = (size, size) if isinstance(size, int) else size
    for s in ((8, 8), (40, 30), (30, 41), (3, 5), (100, 2)):
        out = to_pixels([picture(1, s)], cfg)
        assert out.shape == (1, 3, h, w) and 0 <= out.min() and out.max() <= 1
    assert np.array_equal(np.asarray(resize_and_crop(picture(1, (w, h)), cfg)), np.asarray(picture(1, (w, h))))
    if how == "longest": assert (to_pixels([picture(1, (100, 4))], cfg)[0, :, 0] * 255).round().unique().tolist() == [7]
    mean = to_pixels([picture(1)], cfg | dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)))
    want = (to_pixels([picture(1)], cfg) - torch.tensor([0.1, 0.2, 0.3])[:, None, None]) / torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    assert close(mean, want)
