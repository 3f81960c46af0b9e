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
