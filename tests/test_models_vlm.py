"""VLM 这一间：补齐、次序、分块、预算、截断、位置、存取、坏输入。"""
import json

import micro_vlm
import numpy as np
import pytest
import torch
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item
from vembed_nb.losses.contrastive import InfoNCE
from vembed_nb.models.base import quiet
from vembed_nb.models.files import Source
from vembed_nb.models.vlm import GME, MARK, QWEN, VERSIONS, Chat, VLMEncoder, hidden_states, rope_positions
from vembed_nb.vectors import pool

TYPES = ("qwen3_vl", "qwen2_vl", "qwen2_5_vl")


def picture(w, h, seed=0): return Image.fromarray(np.random.default_rng([w, h, seed]).integers(0, 255, (h, w, 3), dtype=np.uint8))


ITEMS = [Item("红色的杯子"), Item(image=picture(30, 20)), Item("a red cup", (picture(20, 20), picture(40, 20))), Item(""), Item("a", picture(24, 40)), Item(image=(picture(9, 9), picture(50, 20), picture(20, 20)))]


@pytest.fixture(scope="module")
def tokenizer(): return micro_vlm.parts()[1]


@pytest.fixture(scope="module", params=TYPES)
def enc(request, tokenizer): return micro_vlm.encoder(request.param, tokenizer=tokenizer)


def vectors(enc, items, role="document"):
    with torch.inference_mode(): return enc(enc.preprocess(items, role=role)).vectors


def test_batch_order_chunks_padding(enc, tokenizer):
    "单独、换次序、切块、左边补齐、encode：同样的向量。"
    whole = vectors(enc, ITEMS)
    left = micro_vlm.encoder(enc.card.model_type, tokenizer=tokenizer, padding_side="left")
    x = enc.preprocess(ITEMS)
    with torch.inference_mode():
        for n in (1, 2, 4): assert torch.allclose(torch.cat([enc(c).vectors for c in x.chunk(n)]), whole, atol=1e-5)
        y = left.preprocess(ITEMS)
        assert torch.allclose(torch.cat([left(c).vectors for c in y.chunk(2)]), whole, atol=1e-5)
    for v in (torch.cat([vectors(enc, [i]) for i in ITEMS]), vectors(enc, ITEMS[::-1]).flip(0), vectors(left, ITEMS), enc.encode(ITEMS, batch_size=2)): assert torch.allclose(v, whole, atol=1e-5)
    assert torch.allclose(whole.norm(dim=1), torch.ones(len(ITEMS)), atol=1e-5) and whole.shape == (len(ITEMS), enc.dim)


@pytest.mark.parametrize("side", ["right", "left"])
def test_extra_padding_changes_nothing(enc, side):
    x = enc.preprocess(ITEMS[:3])
    with torch.inference_mode(): want = enc(x).vectors
    pad = (0, 9) if side == "right" else (9, 0)
    x.tensors["input_ids"] = torch.nn.functional.pad(x["input_ids"], pad, value=enc.chat.pad_id)
    x.tensors["attention_mask"] = torch.nn.functional.pad(x["attention_mask"], pad)
    with torch.inference_mode():
        h, mask, _ = hidden_states(enc.model, x)
        assert mask.any(0).all() and h.shape[1] == mask.shape[1]
        assert torch.allclose(enc(x).vectors, want, atol=1e-5)


def test_everything_matters(enc):
    "换图、换字、换指令、图的次序、多一张图：向量都变。"
    a, b = picture(20, 20), picture(20, 20, 1)
    base = vectors(enc, [Item("红", (a, b))])
    others = [Item("蓝", (a, b)), Item("红", (b, a)), Item("红", (a, a)), Item("红", a), Item("红"), Item(image=(a, b))]
    assert (vectors(enc, others) - base).abs().max(1).values.min() > 1e-4
    enc.card.prompts["query"] = "find"
    assert (vectors(enc, [ITEMS[0]], "query") - vectors(enc, [ITEMS[0]])).abs().max() > 1e-4
    enc.card.prompts["query"] = enc.card.prompts["document"]


@pytest.mark.parametrize("side", ["right", "left"])
def test_rope_equals_transformers(enc, side):
    chat = Chat(enc.chat.tokenizer, enc.chat.image_processor, enc.model.config, max_length=200, padding_side=side)
    images = [list(i.images) for i in ITEMS]
    x = chat.pack([chat.render(len(i.images), i.text) for i in ITEMS], images)
    kind = (x["input_ids"] == chat.image_id).int()
    want, _ = enc.model.get_rope_index(x["input_ids"], mm_token_type_ids=kind, image_grid_thw=x["image_grid_thw"], attention_mask=x["attention_mask"])
    assert torch.equal(rope_positions(x["input_ids"], x["attention_mask"].bool(), chat.image_id, x["image_grid_thw"]), want)


def test_equals_plain_transformers(enc):
    "自己算的位置和裁剪，与直接调用 transformers 的模型逐位相同。"
    x = enc.preprocess(ITEMS)
    with torch.inference_mode():
        plain = enc.model(**x.tensors, mm_token_type_ids=(x["input_ids"] == enc.chat.image_id).int()).last_hidden_state
        assert torch.allclose(torch.nn.functional.normalize(pool(plain, x["attention_mask"], "last"), dim=-1), enc(x).vectors, atol=1e-6)


def test_layers_equal_a_shallower_model(tokenizer):
    enc = micro_vlm.encoder(tokenizer=tokenizer, output_layers=(1, 2))
    x = enc.preprocess(ITEMS)
    with torch.inference_mode():
        out = enc(x)
        layers, enc.model.language_model.layers = enc.model.language_model.layers, enc.model.language_model.layers[:1]
        short = micro_vlm.encoder(tokenizer=tokenizer)
        short.model.language_model.layers = short.model.language_model.layers[:1]
        assert torch.allclose(out.layers[0], short(x).vectors, atol=1e-6)
        enc.model.language_model.layers = layers
    assert len(out.layers) == 2 and torch.allclose(out.layers[1], out.vectors, atol=1e-6)
    with pytest.raises(VembedError, match="2 层"): micro_vlm.encoder(tokenizer=tokenizer, output_layers=(3,))


def test_save_and_open(enc, tmp_path):
    enc.save(tmp_path)
    again = VLMEncoder.open(Source("m", str(tmp_path))).eval()
    assert again.card == enc.card and torch.equal(again.encode(ITEMS), enc.encode(ITEMS))
    import transformers as tf
    with quiet(): m, t, p = tf.AutoModel.from_pretrained(tmp_path), tf.AutoTokenizer.from_pretrained(tmp_path), tf.AutoImageProcessor.from_pretrained(tmp_path)
    size = dict(p.size)
    assert type(m) is type(enc.model) and t.chat_template and (size["shortest_edge"], size["longest_edge"]) == (enc.chat.min_pixels, enc.chat.max_pixels)
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 1_000_000


def test_full_checkpoint_and_foreign_weights(tmp_path, tokenizer):
    "ForConditionalGeneration 存的能打开，lm_head 是唯一允许多出来的；缺的、别的多的是错误。"
    import transformers as tf
    from safetensors.torch import load_file, save_file
    model, tok, images = micro_vlm.parts(tokenizer=tokenizer)
    with quiet():
        full = tf.Qwen3VLForConditionalGeneration(model.config)
        full.model.load_state_dict(model.state_dict())
        for part in (full, tok, images): part.save_pretrained(tmp_path)
    opened = VLMEncoder.open(Source("m", str(tmp_path)), min_pixels=256, max_pixels=1024, max_length=200).eval()
    assert torch.equal(opened.encode(ITEMS), micro_vlm.encoder(tokenizer=tokenizer).encode(ITEMS))
    weights = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" in weights
    for change in (lambda w: w.pop(next(k for k in w if "norm" in k)), lambda w: w.update({"model.extra.weight": torch.zeros(2)})):
        bad = dict(weights)
        change(bad)
        save_file(bad, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(VembedError, match="权重"): VLMEncoder.open(Source("m", str(tmp_path)), min_pixels=256, max_pixels=1024, max_length=200)


def test_old_chat_template_file(tmp_path, tokenizer):
    micro_vlm.build(tmp_path, tokenizer=tokenizer)
    text = (tmp_path / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(VembedError, match="chat_template"): VLMEncoder.open(Source("m", str(tmp_path)))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text}), encoding="utf-8")
    assert VLMEncoder.open(Source("m", str(tmp_path))).chat.tokenizer.chat_template == text


def test_prompts_as_the_authors_write_them(tokenizer):
    q, g = micro_vlm.encoder("qwen3_vl", tokenizer=tokenizer), micro_vlm.encoder("qwen2_vl", tokenizer=tokenizer)
    pic = "<|vision_start|><|image_pad|><|vision_end|>"
    assert q.chat.render(1, "a cup", q.instruction("query")) == f"<|im_start|>system\n{QWEN}<|im_end|>\n<|im_start|>user\n{pic}a cup<|im_end|>\n<|im_start|>assistant\n"
    assert g.chat.render(2, "a cup", g.instruction("document")) == f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{pic * 2}a cup<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    assert "NULL" in q.chat.render(0, "", "") and "system" not in q.chat.render(0, "x", "") and MARK not in q.chat.render(0, "x", "")
    for text, want in (("Find it", "Find it."), (" Find it! ", "Find it!"), ("找。", "找。"), ("", "")):
        q.card.prompts["query"] = text
        assert q.instruction("query") == want
    g.card.prompts["query"] = "Find it"
    assert g.instruction("query") == "Find it"
    side = {"qwen3_vl": 32, "qwen2_vl": 28}  # 全尺寸的小块：16、14 像素，2×2 合并
    assert [n * side["qwen3_vl"]**2 for n in VERSIONS["qwen3_vl"]["tokens"]] == [4096, 1843200] and VERSIONS["qwen2_vl"]["tokens"] == (256, 1280)


def test_defaults_of_the_row(tokenizer):
    "没有卡片时照表里那一行：像素上下限、长度、补齐。"
    model, tok, images = micro_vlm.parts(tokenizer=tokenizer)
    model.config.text_config.max_position_embeddings = 9000
    enc = VLMEncoder(model, tok, images)
    assert enc.card.options == dict(min_pixels=4 * 64, max_pixels=1800 * 64, padding_side="right", template=None) and enc.card.max_length == 8192
    assert dict(enc.chat.image_processor.size)["longest_edge"] == 1800 * 64 and enc.card.pooling == "last" and enc.card.prompts == {"query": QWEN, "document": QWEN}


def test_truncation_keeps_images_and_ending(tokenizer):
    enc = micro_vlm.encoder(tokenizer=tokenizer, max_length=64)
    x = enc.preprocess([Item("红色的杯子" * 50, picture(20, 20)), Item("短"), Item("a red cup " * 50)])
    assert enc.truncated == 2 and x["input_ids"].shape[1] == 64
    end = tokenizer("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    for i, n in ((0, enc.image_tokens(20, 20)), (2, 0)):
        row = x["input_ids"][i][x["attention_mask"][i].bool()].tolist()
        assert len(row) == 64 and row[-len(end):] == end and row.count(enc.chat.image_id) == n
    with pytest.warns(UserWarning, match="2 段"): enc.encode([Item("红" * 200), Item("蓝" * 200), Item("短")])
    plain = enc.chat.render(0, "红" * 200)
    with pytest.raises(VembedError, match="max_length"): enc.chat.pack([str(plain)], [[]])  # 普通字符串没有说哪里可以截


def test_image_tokens_and_cost(tmp_path, tokenizer):
    enc = micro_vlm.encoder(tokenizer=tokenizer)
    for w, h in ((8, 8), (20, 30), (500, 100), (1000, 1000)):
        n = enc.image_tokens(w, h)
        x = enc.preprocess([Item(image=picture(w, h))])
        assert 4 <= n <= 16 and int((x["input_ids"] == enc.chat.image_id).sum()) == n == int(x["image_grid_thw"].prod()) // 4
    picture(20, 30).save(tmp_path / "a.png")
    assert enc.cost(Item(image="a.png"), tmp_path) == enc.cost(Item(image=picture(20, 30))) == enc.image_tokens(20, 30)
    assert enc.cost(Item("红色的", "a.png"), tmp_path) == enc.image_tokens(20, 30) + 3 and enc.cost(Item(image="missing.png")) == 16 and enc.cost(Item("")) == 0


def test_pixel_cache(tmp_path, tokenizer):
    enc = micro_vlm.encoder(tokenizer=tokenizer)
    for name, size in (("a.png", (20, 30)), ("b.png", (40, 20))): picture(*size).save(tmp_path / name)
    items = [Item(image="a.png"), Item("红", ("b.png", "a.png")), Item("字"), Item(image=picture(9, 9))]
    want = enc.preprocess(items, tmp_path)
    enc.cache_pixels(1)
    for _ in range(2): assert all(torch.equal(enc.preprocess(items, tmp_path)[k], v) for k, v in want.tensors.items())
    assert len(enc.cache) == 2
    enc.cache_pixels(0)
    assert not enc.cache


def test_gradients(enc):
    "梯度到达每个参数；没有图的一批，语言部分也都有。"
    enc.zero_grad()
    q, d = enc(enc.preprocess([Item("红色"), Item("a cup")])), enc(enc.preprocess([Item(image=picture(20, 20)), Item(image=picture(30, 20))]))
    from vembed_nb.losses.targets import make_targets
    InfoNCE(0.1)(q, d, make_targets(["0", "1"], ["a", "b"], [["a"], ["b"]])).backward()
    assert not [n for n, p in enc.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0 and "bias" not in n]
    enc.zero_grad()


def test_towers(tokenizer):
    for kind in TYPES:
        enc = micro_vlm.encoder(kind, tokenizer=tokenizer)
        towers = enc.towers()
        with torch.inference_mode():
            x = enc.preprocess([Item("红色的杯子"), Item("a")])
            assert torch.allclose(towers["text"](**x.tensors), enc(x).vectors, atol=1e-6)
            y = enc.preprocess([Item(image=picture(32, 32))])
            assert torch.equal(towers["vision"](y["pixel_values"]), torch.cat(enc.model.get_image_features(y["pixel_values"], y["image_grid_thw"]).pooler_output))


def test_vision_tower_in_onnx(tmp_path, tokenizer):
    "视觉塔用旧的导出器，在 ONNX Runtime 里相同。"
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    import warnings
    enc = micro_vlm.encoder(tokenizer=tokenizer)
    tower, (pixels, _) = enc.vision_tower(24, 32), enc.chat.pixels([picture(24, 32)])[0]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(tower, (pixels,), str(tmp_path / "v.onnx"), input_names=["pixel_values"], output_names=["tokens"], dynamo=False, opset_version=17)
    got = ort.InferenceSession(str(tmp_path / "v.onnx")).run(None, {"pixel_values": pixels.numpy()})[0]
    assert np.abs(got - tower(pixels).detach().numpy()).max() < 1e-5


def test_temperature_in_the_card(tokenizer):
    enc = micro_vlm.encoder(tokenizer=tokenizer)
    assert enc.get_scale() == {"temperature": None, "bias": None}
    enc.set_scale(InfoNCE(0.05))
    assert enc.get_scale()["temperature"] == pytest.approx(0.05, rel=1e-4)


def test_llava(tmp_path, tokenizer):
    "一张图的 token 数固定的模型：同样的性质；没有像素的选项。"
    enc, left = (micro_vlm.encoder("llava", tokenizer=tokenizer, padding_side=s) for s in ("right", "left"))
    whole = vectors(enc, ITEMS)
    for v in (torch.cat([vectors(enc, [i]) for i in ITEMS]), vectors(left, ITEMS), enc.encode(ITEMS, batch_size=2)): assert torch.allclose(v, whole, atol=1e-5)
    assert enc.image_tokens(500, 20) == 16 == enc.cost(ITEMS[1]) and enc.towers() == {}
    enc.save(tmp_path)
    assert torch.equal(VLMEncoder.open(Source("m", str(tmp_path))).eval().encode(ITEMS), enc.encode(ITEMS))
    with pytest.raises(VembedError, match="固定"): micro_vlm.encoder("llava", tokenizer=tokenizer, max_pixels=100)


@pytest.mark.parametrize("options, said", [
    (dict(max_pixels=300 * 64), "300 个 token"), (dict(min_pixels=2000), "min_pixels"), (dict(max_pixels=60, min_pixels=10), "连一个 token"), (dict(padding_side="both"), "padding_side"),
    (dict(max_pixel=9), "max_pixels"), (dict(template="{text}"), "{instruction}"), (dict(max_length=5000), "512")])
def test_bad_options(tokenizer, options, said):
    with pytest.raises(VembedError) as e: micro_vlm.encoder(tokenizer=tokenizer, **options)
    assert said in str(e.value)


def test_bad_items(tokenizer):
    enc = micro_vlm.encoder(tokenizer=tokenizer, max_length=64)
    for item, said in ((Item(), "既没有文字也没有图片"), (Item(image=[picture(40, 40)] * 5), "max_length=64"), (Item("看 <|image_pad|>", picture(9, 9)), "<|image_pad|>"),
                       (Item("看 <|image_pad|>"), "<|image_pad|>"), (Item(image=Image.new("RGB", (2000, 2))), "狭长"), (Item(image="missing.png"), "missing.png")):
        with pytest.raises(VembedError) as e: enc.preprocess([Item("好"), item])
        assert said in str(e.value) and "\n" not in str(e.value)


def test_parts_that_do_not_belong_together(tokenizer):
    import transformers as tf
    from vembed_nb.pretrain import build_tokenizer
    model, tok, images = micro_vlm.parts(tokenizer=tokenizer)
    kw = dict(max_length=200, max_pixels=1024)
    with pytest.raises(VembedError, match="patch_size"): Chat(tok, tf.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2), model.config, **kw)
    with pytest.raises(VembedError, match="占位 token"): Chat(build_tokenizer(["a"], vocab_size=4200), images, model.config, template=GME, **kw)
    with pytest.raises(VembedError, match="chat_template"): Chat(build_tokenizer(["a"], vocab_size=4200), images, model.config, **kw)
