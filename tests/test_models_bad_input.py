"""打开模型时的坏输入：每一种都得到一句话，说清什么错了、怎么办，而不是一个随机的投影层。"""
import json
import shutil

import pytest
import torch
from PIL import Image

import micro_composed
import micro_dual
import micro_late
import micro_vlm
from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item
from vembed_nb.models.load import family_of, load_encoder, load_reranker, resolve_model
from vembed_nb.tiny import tiny_path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "各家族一个随机的微型模型。"
    root = tmp_path_factory.mktemp("models")
    build = dict(clip=lambda f: micro_dual.build(f), siglip=lambda f: micro_dual.build(f, kind="siglip"), vlm=lambda f: micro_vlm.build(f), late=lambda f: micro_late.build(f),
                 bert=lambda f: micro_composed.build_text(f), both=lambda f: micro_composed.build(f))
    return {name: str(make(root/name)) for name, make in build.items()}


def refused(match, fn):
    "抛 VembedError，一句话，没有换行。"
    with pytest.raises(VembedError, match=match) as e: fn()
    assert "\n" not in str(e.value) and len(str(e.value)) < 800, str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name, words", [
    ("tiny-clop", ["tiny-clip"]),
    ("tiny-quen3vl", ["tiny-qwen3vl"]),
    ("clip-vit-base-patch32", ["openai/clip-vit-base-patch32"]),
    ("./nowhere", ["nowhere"]),
    ("", ["没有模型名"]),
    ("openai/clip-vit-base-patch23", ["要能联网", "tiny-clip"]),
    ("vidore/colpali-v9", ["要能联网"]),
    ("open_clip:EVA02-B-61", ["open_clip"]),
], ids=lambda v: v if isinstance(v, str) else "")
def test_unknown_names(name, words):
    message = refused("", lambda: load_encoder(name))
    for w in words: assert w in message, message


def test_folders(models, tmp_path):
    (tmp_path/"empty").mkdir()
    refused("config.json", lambda: load_encoder(tmp_path/"empty"))
    (tmp_path/"odd").mkdir(); (tmp_path/"odd"/"config.json").write_text('{"model_type": "bart"}')
    assert "bert" in refused("还不支持", lambda: load_encoder(tmp_path/"odd"))
    (tmp_path/"broken").mkdir(); (tmp_path/"broken"/"config.json").write_text("{")
    refused("config.json", lambda: load_encoder(tmp_path/"broken"))
    (tmp_path/"card").mkdir(); (tmp_path/"card"/"vembed.json").write_text("{")
    refused("不是 JSON", lambda: load_encoder(tmp_path/"card"))
    for change, match in ((dict(family="vlmm"), "没有这个家族"), (dict(colour=1), "不认得键"), (dict(options={"max_pixel": 3}), "max_pixel")):
        shutil.rmtree(tmp_path/"m", ignore_errors=True); shutil.copytree(models["vlm"], tmp_path/"m")
        raw = json.loads((tmp_path/"m"/"vembed.json").read_text())
        (tmp_path/"m"/"vembed.json").write_text(json.dumps(raw | change))
        refused(match, lambda: load_encoder(tmp_path/"m"))
    file = tmp_path/"file.bin"; file.write_bytes(b"x")
    refused("是文件", lambda: load_encoder(file))


@pytest.mark.parametrize("mine, theirs", [("clip", "siglip"), ("siglip", "clip"), ("vlm", "late"), ("late", "vlm"), ("bert", "clip"), ("clip", "bert")])
def test_weights_of_another_family(models, tmp_path, mine, theirs):
    shutil.copytree(models[mine], tmp_path/"m")
    shutil.copy(f"{models[theirs]}/model.safetensors", tmp_path/"m"/"model.safetensors")
    refused("权重", lambda: load_encoder(tmp_path/"m"))


def test_weights_gone_or_cut(models, tmp_path):
    for name in ("clip", "vlm", "late", "bert"):
        shutil.copytree(models[name], tmp_path/name)
        w = tmp_path/name/"model.safetensors"
        data = w.read_bytes()
        w.write_bytes(data[:len(data) // 2])
        refused("权重", lambda: load_encoder(tmp_path/name))
        w.unlink()
        refused("", lambda: load_encoder(tmp_path/name))


def test_pickle_needs_trust(models, tmp_path):
    "只有 pickle 的权重要明说信任；说了就打得开，向量相同。"
    from safetensors.torch import load_file

    shutil.copytree(models["clip"], tmp_path/"m")
    w = tmp_path/"m"/"model.safetensors"
    torch.save(load_file(w), tmp_path/"m"/"pytorch_model.bin"); w.unlink()
    assert "trust_pickle" in refused("pickle", lambda: load_encoder(tmp_path/"m"))
    assert torch.equal(load_encoder(tmp_path/"m", trust_pickle=True).encode(["红"]), load_encoder(models["clip"]).encode(["红"]))


def test_remote_code_is_off(models, tmp_path):
    "模型自带的代码默认不运行。"
    shutil.copytree(models["bert"], tmp_path/"m")
    c = json.loads((tmp_path/"m"/"config.json").read_text())
    c |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}}
    (tmp_path/"m"/"config.json").write_text(json.dumps(c))
    (tmp_path/"m"/"evil.py").write_text(f"open({str(tmp_path/'ran')!r}, 'w')\n")
    (tmp_path/"m"/"vembed.json").unlink()
    refused("trust_remote_code", lambda: load_encoder(tmp_path/"m"))
    assert not (tmp_path/"ran").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="有 GPU")
@pytest.mark.parametrize("how", ["4bit", "8bit"])
def test_quantize_without_gpu(models, how): assert "GPU" in refused("bitsandbytes", lambda: load_encoder(models["vlm"], quantize=how))


def test_quantize_wrong_word(models): refused("可选 4bit", lambda: load_encoder(models["vlm"], quantize="3bit"))


def test_family_of_says_why(models):
    from vembed_nb.models.files import Source

    for name, family in (("clip", "dual"), ("vlm", "vlm"), ("late", "late"), ("bert", "composed"), ("both", "composed")):
        got, why = family_of(Source(name, models[name]))
        assert got == family and "vembed.json" in why
    import pathlib
    for name, family in (("clip", "dual"), ("vlm", "vlm"), ("late", "late"), ("bert", "composed")):
        (pathlib.Path(models[name])/"vembed.json").rename(pathlib.Path(models[name])/"hidden.json")
        try:
            got, why = family_of(Source(name, models[name]))
            assert got == family and "model_type" in why
            options = dict(min_pixels=256, max_pixels=1024) if name == "vlm" else {}  # 表里的像素上限是给真模型的
            assert load_encoder(models[name], **options).family == family  # 没有 vembed.json 也打得开
        finally: (pathlib.Path(models[name])/"hidden.json").rename(pathlib.Path(models[name])/"vembed.json")


def test_options(models):
    refused("max_pixel", lambda: load_encoder(models["vlm"], max_pixel=100))
    refused("min_pixels", lambda: load_encoder(models["vlm"], min_pixels=5000, max_pixels=100))


def test_image_beyond_the_budget(models, tmp_path):
    "图的 token 比上下文还多：打开时、编码时各有一句话。"
    refused("max_length", lambda: load_encoder(models["vlm"], max_pixels=10**7))
    Image.new("RGB", (64, 64), "red").save(tmp_path/"a.png")
    enc = load_encoder(models["vlm"])
    many = Item("看", ["a.png"] * 40)
    refused("max_length|token", lambda: enc.encode([many], image_root=tmp_path))


def test_special_tokens_in_text(models):
    "文字里写着图的占位 token：拒绝，而不是当成一张图。"
    refused("image_pad", lambda: load_encoder(models["vlm"]).encode(["看 <|image_pad|> 这里"]))


def test_reranker_is_not_an_encoder():
    import pathlib
    if not (tiny := pathlib.Path(tiny_path("tiny-clip")).parent/"tiny-reranker").exists(): pytest.skip("没有 tiny-reranker")
    refused("load_reranker", lambda: load_encoder(tiny))
    refused("", lambda: load_reranker("tiny-clip"))


def test_resolve():
    assert resolve_model("tiny-clip") == str(tiny_path("tiny-clip"))
    assert resolve_model("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"


# ---- encode 的坏输入，和不许悄悄出错的几件事 ----

@pytest.fixture(scope="module")
def encoders(models): return {name: load_encoder(folder) for name, folder in models.items()}


@pytest.mark.parametrize("items, match", [("红色的杯子", "一列"), (Item("红"), "一列"), (7, "一列"), ({"text": "红"}, "一列"), (["\ud800x"], "半个字符"), ([Item(3)], "字符串"), ([Item(image=3.5)], "PIL.Image")],
                         ids=["bare string", "bare Item", "number", "dict", "surrogate", "text is a number", "image is a number"])
def test_encode_refuses(encoders, items, match):
    for enc in encoders.values():
        if "image" in enc.can or match != "PIL.Image": refused(match, lambda: enc.encode(items))


def test_role_is_checked(encoders):
    for enc in encoders.values(): refused("role", lambda: enc.encode(["红"], role="qurey"))


def test_paths_and_arrays(encoders, tmp_path):
    "pathlib 的路径可以用；数组要先变成图。"
    import numpy as np

    Image.new("RGB", (40, 30), "red").save(tmp_path/"a.png")
    for name, enc in encoders.items():
        if "image" not in enc.can: continue
        same = lambda a, b: torch.equal(getattr(a, "vectors", a), getattr(b, "vectors", b))
        assert same(enc.encode([tmp_path/"a.png"], image_root=tmp_path), enc.encode([Item(image="a.png")], image_root=tmp_path))
        assert same(enc.encode([Item(image=tmp_path/"a.png")], image_root=tmp_path), enc.encode([Item(image="a.png")], image_root=tmp_path))
        refused("fromarray", lambda: enc.encode([Item(image=np.zeros((8, 8, 3), np.uint8))]))


def test_pictures_that_only_look_equal(encoders):
    "调色板、方向、透明不写在像素里：两张像素相同、样子不同的图，不许当成一张。"
    first = Image.effect_noise((32, 32), 90).convert("P")
    second = first.copy()
    second.putpalette([255 - x for x in first.getpalette()])
    upright, turned = Image.effect_noise((32, 24), 90).convert("RGB"), None
    turned = upright.copy()
    turned.getexif()[0x0112] = 6
    for name, enc in encoders.items():
        if "image" not in enc.can: continue
        for a, b in ((first, second), (upright, turned)):
            together, alone = (enc.encode([Item(image=a), Item(image=b)]), [enc.encode([Item(image=i)]) for i in (a, b)])
            v = lambda x, k: (x.vectors[k][x.mask[k]] if hasattr(x, "mask") else x[k])
            for k in (0, 1): assert v(together, k).shape == v(alone[k], 0).shape and float((v(together, k) - v(alone[k], 0)).abs().max()) < 2e-5, name
            assert v(together, 0).shape != v(together, 1).shape or float((v(together, 0) - v(together, 1)).abs().max()) > 1e-3, name


def test_equal_pictures_once(encoders):
    "像素相同的两张图只算一次。"
    enc, im = encoders["clip"], Image.effect_noise((32, 32), 90).convert("RGB")
    seen, real = [], enc.preprocess
    enc.__dict__["preprocess"] = lambda items, *a: seen.extend(items) or real(items, *a)
    try: enc.encode([Item(image=im), Item(image=im.copy()), Item(image=im.rotate(90))])
    finally: del enc.__dict__["preprocess"]
    assert len(seen) == 2


def test_thin_pictures(encoders):
    for enc in encoders.values():
        if "image" in enc.can: refused("狭长", lambda: enc.encode([Item(image=Image.new("RGB", (1, 3000)))]))


def test_empty_text_of_a_late_model(encoders): refused("空的", lambda: encoders["late"].encode(["杯子", ""]))


def test_special_tokens_are_just_letters(encoders):
    "文字里写着 <eos>：后面的字照样算数。"
    for name in ("clip", "bert"):
        a, b = encoders[name].encode(["红<eos>杯子", "红<eos>两个蓝色的瓶子"])
        assert float((a - b).abs().max()) > 1e-4, name


@pytest.mark.parametrize("name", ["clip", "vlm", "late", "bert", "both"])
def test_without_normalising(models, tmp_path, name):
    "card.normalize=False：整批、单独、塔、存取，都是同样的没有归一化的向量。"
    enc = load_encoder(models[name])
    enc.card.normalize = False
    texts = ["红", "两个蓝色的杯子"]
    v = lambda e: [r for x in [e.encode(texts)] for r in ([a[m] for a, m in zip(x.vectors, x.mask)] if hasattr(x, "mask") else x)]
    before = v(enc)
    assert any(abs(float(x.norm(dim=-1).max()) - 1) > 1e-3 for x in before)
    enc.save(tmp_path/"m")
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(before, v(load_encoder(tmp_path/"m"))))
    if tower := enc.towers().get("text"):
        inputs = enc.preprocess([Item(t) for t in texts])
        with torch.inference_mode(): out = tower(**{k: t for k, t in inputs.tensors.items()})
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, out))


def test_saving_over_another_model(models, tmp_path):
    "文件夹里是另一种模型：拒绝，旧的完好；同一种模型：换掉，不留旧文件。"
    shutil.copytree(models["both"], tmp_path/"m")
    refused("另一种模型", lambda: load_encoder(models["bert"]).save(tmp_path/"m"))
    refused("另一种模型", lambda: load_encoder(models["clip"]).save(tmp_path/"m"))
    assert load_encoder(tmp_path/"m").family == "composed"
    (tmp_path/"hub").mkdir(); shutil.copy(f"{models['clip']}/config.json", tmp_path/"hub")
    refused("不是本工具存的", lambda: load_encoder(models["clip"]).save(tmp_path/"hub"))
    other = load_encoder(str(micro_composed.build(tmp_path/"other", seed=5)))
    other.save(tmp_path/"m")
    assert torch.equal(load_encoder(tmp_path/"m").encode(["红"]), other.encode(["红"]))


@pytest.mark.parametrize("change", [dict(dim=64), dict(dim="16"), dict(normalize="false"), dict(prompts={"qeury": "x"}), dict(prompts={"query": 3}), dict(options=None), dict(max_length="32"), dict(pooling="middle"), dict(model_type="bert"), dict(multi_vector=1)],
                         ids=lambda c: next(iter(c)) + "=" + str(next(iter(c.values()))))
def test_card_edited_by_hand(models, tmp_path, change):
    for name in ("clip", "vlm", "late"):
        shutil.rmtree(tmp_path/"m", ignore_errors=True); shutil.copytree(models[name], tmp_path/"m")
        card = json.loads((tmp_path/"m"/"vembed.json").read_text())
        (tmp_path/"m"/"vembed.json").write_text(json.dumps(card | change))
        refused("vembed.json", lambda: load_encoder(tmp_path/"m"))


# ---- 适配器 ----

def test_adapter_switches(models, tmp_path):
    from vembed_nb.models import adapt

    enc = adapt.lora(load_encoder(models["both"]), r=2, verbose=False)
    base = load_encoder(models["both"]).encode(["红"])
    adapt.use_adapter(enc, None)
    refused("只用底座", lambda: enc.save(tmp_path/"off"))
    refused("只用底座", lambda: adapt.merge(enc))
    adapt.add_adapter(enc, "c", r=2)
    for n, p in enc.named_parameters():
        if "lora_B.c" in n: p.data.normal_()
    assert float((enc.encode(["红"]) - base).abs().max()) > 1e-3, "新加的适配器没有起作用"


def test_adapter_never_inside_its_base(models, tmp_path):
    from vembed_nb.models import adapt

    shutil.copytree(models["both"], tmp_path/"base")
    before = load_encoder(tmp_path/"base").encode(["红"])
    enc = adapt.lora(load_encoder(tmp_path/"base"), r=2, verbose=False)
    refused("适配器不能存在里面", lambda: enc.save(tmp_path/"base"))
    assert torch.equal(load_encoder(tmp_path/"base").encode(["红"]), before)


def test_adapter_of_a_changed_base(models, tmp_path):
    "打开之后又训练过的底座：存适配器的时候就说，不等到打不开。"
    from vembed_nb.models import adapt

    enc = load_encoder(models["clip"])
    with torch.no_grad(): next(p for p in enc.parameters() if p.ndim == 2).add_(.1)
    adapt.lora(enc, r=2, verbose=False)
    refused("变过", lambda: enc.save(tmp_path/"a"))


def test_adapter_and_relative_paths(models, tmp_path, monkeypatch):
    import os
    import pickle

    from vembed_nb.models import adapt

    shutil.copytree(models["clip"], tmp_path/"base")
    monkeypatch.chdir(tmp_path)
    enc = adapt.lora(load_encoder("base"), r=2, verbose=False)
    os.chdir("/")
    enc.save(tmp_path/"deep"/"adapter")
    assert torch.equal(load_encoder(tmp_path/"deep"/"adapter").encode(["红"]), enc.encode(["红"]))
    assert torch.equal(pickle.loads(pickle.dumps(enc)).encode(["红"]), enc.encode(["红"]))
    adapt.freeze(frozen := load_encoder(models["clip"]), "text")
    assert torch.equal(pickle.loads(pickle.dumps(frozen)).train().encode(["红"]), frozen.encode(["红"]))


# ---- 几个线程同时 encode ----

def in_turn(enc, first, second):
    "两个线程：first 先进 encode，停在预处理里；second 也进来了，first 才走完；second 等 first 走完再算。返回两个结果。"
    import threading

    entered, done, real, results = {n: threading.Event() for n in "ab"}, threading.Event(), enc.preprocess, {}

    def preprocess(items, *rest):
        me = threading.current_thread().name
        inputs = real(items, *rest)
        if not entered[me].is_set():
            entered[me].set()
            assert (entered["b"] if me == "a" else done).wait(20)
        return inputs

    def work(me, items):
        try: results[me] = enc.encode(items), enc.truncated
        except BaseException as e: results[me] = e
        finally: entered[me].set(); (done if me == "a" else threading.Event()).set()

    enc.__dict__["preprocess"] = preprocess
    threads = [threading.Thread(target=work, args=x, name=x[0]) for x in (("a", first), ("b", second))]
    try:
        threads[0].start(); assert entered["a"].wait(20)
        threads[1].start()
        for t in threads: t.join(30)
    finally: del enc.__dict__["preprocess"]
    for r in results.values():
        if isinstance(r, BaseException): raise r
    return results["a"], results["b"]


def test_threads_and_dropout(models):
    "训练状态的编码器，两个线程同时 encode：先走完的不许替另一个打开 dropout；都走完才恢复训练状态。"
    enc = load_encoder(models["both"])
    want = enc.encode(["红色的杯子", "蓝"])
    for m in enc.modules():
        if isinstance(m, torch.nn.Dropout): m.p = .5
    enc.train()
    (a, _), (b, _) = in_turn(enc, ["红色的杯子"], ["蓝"])
    assert enc.training and all(m.training for m in enc.modules()), "没有恢复训练状态"
    assert torch.allclose(torch.cat([a, b]), want, atol=1e-6), "向量里有 dropout"
    enc.eval()
    in_turn(enc, ["红色的杯子"], ["蓝"])
    assert not any(m.training for m in enc.modules())
    enc.train()
    refused("不存在", lambda: enc.encode([Item(image="没有.png")]))
    assert enc.training, "出错之后没有恢复"


@pytest.mark.filterwarnings("ignore:.*截掉了")
@pytest.mark.parametrize("name", ["clip", "vlm", "bert"])
def test_threads_and_truncation(models, name):
    "截断的段数，各个线程各数各的。"
    enc = load_encoder(models[name])
    long = "杯" * (enc.card.max_length + 40)
    (_, a), (_, b) = in_turn(enc, [long, long + "红", "短"], [long + "蓝", "红"])
    assert (a, b) == (2, 1)
    enc.encode(["短"])
    assert enc.truncated == 0
