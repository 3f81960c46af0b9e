"""models.adapt：每个家族的 LoRA 存取、合并、梯度的去处，冻结、检查点，以及坏的输入。"""
import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, build_micro
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item
from vembed_nb.models import adapt
from vembed_nb.models.files import Source
from vembed_nb.models.load import load_encoder, load_reranker

RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (30, 40), "blue")
FAMILIES = {"clip": lambda d: build_micro(d), **{name: lambda d, m=m, kw=kw: importlib.import_module(m).build(d, **kw) for name, m, kw in (
    ("siglip", "micro_dual", dict(kind="siglip")), ("chinese_clip", "micro_dual", dict(kind="chinese_clip")), ("qwen3_vl", "micro_vlm", {}), ("qwen2_vl", "micro_vlm", dict(model_type="qwen2_vl")),
    ("colqwen2", "micro_late", {}), ("colpali", "micro_late", dict(kind="colpali")), ("composed", "micro_composed", {}), ("reranker", "micro_reranker", {}))}}


def opened(folder):
    "编码器或重排模型。"
    card = Path(folder, "vembed.json")
    if not card.exists() or json.loads(card.read_text())["family"] != "reranker": return load_encoder(folder)
    if (Path(folder) / "adapter_config.json").exists(): return adapt.open_adapter(Source(str(folder), str(folder)), load_reranker).eval()
    return load_reranker(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "家族 → 微型模型的文件夹，用到才造。"
    made = {}
    def get(name):
        if name not in made: made[name] = str(FAMILIES[name](tmp_path_factory.mktemp(name) / "model"))
        return made[name]

    return get


def inputs_of(enc):
    if enc.card.family == "reranker": return enc.preprocess([(Item("红色的杯子"), Item("a red cup", RED)), (Item("a red cup"), Item("杯子"))])
    return enc.preprocess([Item("红色的杯子"), Item("a red cup"), *([Item(image=RED), Item(image=BLUE)] if "image" in enc.can else [])])


def out(enc):
    "eval 状态的输出，一个张量。"
    enc.eval()
    with torch.no_grad(): got = enc(inputs_of(enc))
    return got if isinstance(got, torch.Tensor) else got.vectors


def shake(enc, seed=0, scale=0.1):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in enc.model.parameters():
            if p.requires_grad: p.add_(torch.randn(p.shape, generator=g), alpha=scale)
    return enc


def small(enc, **kw):
    torch.manual_seed(0)  # A 是随机的
    return adapt.lora(enc, **{"r": 2, "alpha": 4, "verbose": False, **kw})
def params(enc): return dict(enc.model.named_parameters())
def refused(match): return pytest.raises(VembedError, match=match)


@pytest.fixture(params=sorted(FAMILIES))
def family(request, folders):
    return folders(request.param)


def test_family(family, tmp_path):
    "刚加上不变；梯度到每一个要训练的、不到任何冻住的；读回来相同；合并后相同；合并后存取相同；底座原样。"
    enc = opened(family)
    before, weights, grads = out(enc), {k: v.clone() for k, v in enc.model.state_dict().items()}, {n for n, p in params(enc).items() if p.requires_grad}
    small(enc, base=family)
    assert torch.equal(out(enc), before)
    shake(enc)
    enc.train()
    got = enc(inputs_of(enc))
    got = got if isinstance(got, torch.Tensor) else got.vectors
    (got * torch.randn(got.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    want = {n for n, p in params(enc).items() if p.requires_grad}
    assert want and {n for n, p in params(enc).items() if p.grad is not None} == want
    assert all(params(enc)[n].grad.abs().sum() > 0 for n in want if "lora_" in n), "有 LoRA 的层没有梯度"
    after = out(enc)
    assert (after - before).abs().max() > 1e-4
    enc.save(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*")) and (tmp_path / "adapter" / "vembed.json").exists()
    again = opened(tmp_path / "adapter")
    assert (out(again) - after).abs().max() <= 1e-6
    assert {n for n, p in params(again).items() if p.requires_grad} == want
    adapt.save_merged(enc, tmp_path / "merged")
    assert (out(opened(tmp_path / "merged")) - after).abs().max() <= 1e-4 and torch.equal(out(enc), after)
    adapt.use_adapter(enc, None)
    assert torch.equal(out(enc), before)
    adapt.use_adapter(enc, "default")
    adapt.merge(enc)
    assert (out(enc) - after).abs().max() <= 1e-4 and set(enc.model.state_dict()) == set(weights) and {n for n, p in params(enc).items() if p.requires_grad} == grads


def test_checkpointing_family(family):
    "底座冻住、打开检查点：梯度和不打开时一样。"
    grads = []
    for on in (False, True):
        enc = shake(small(opened(family), dropout=0.0, base=family))
        if on: adapt.checkpointing(enc)
        enc.train()
        got = enc(inputs_of(enc))
        got = got if isinstance(got, torch.Tensor) else got.vectors
        (got * torch.randn(got.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        grads.append({n: p.grad for n, p in params(enc).items() if p.requires_grad})
    assert all(grads[1][n] is not None and torch.allclose(g, grads[1][n], atol=1e-5) for n, g in grads[0].items())


@pytest.mark.parametrize("kind", ["dora", "rslora", "text", "vision", "all-linear", "bias", "no heads"])
def test_variants_reload(micro, tmp_path, kind):
    options = {"dora": dict(dora=True), "rslora": dict(rslora=True), "bias": dict(bias="all"), "no heads": dict(heads=[])}.get(kind, dict(targets=kind))
    enc = shake(small(load_encoder(micro), **options))
    enc.save(tmp_path / "a")
    assert (out(load_encoder(tmp_path / "a")) - out(enc)).abs().max() <= 1e-6
    after = out(enc)
    assert (out(adapt.merge(enc)) - after).abs().max() <= 1e-4


def test_plain_peft_opens_it(micro, tmp_path):
    "存下的是标准的 peft 文件夹。"
    from peft import PeftModel
    from transformers import CLIPModel

    enc = shake(small(load_encoder(micro)))
    enc.save(tmp_path / "a")
    theirs = PeftModel.from_pretrained(CLIPModel.from_pretrained(micro), str(tmp_path / "a")).eval()
    x = inputs_of(enc)
    with torch.no_grad(): got = theirs.get_image_features(pixel_values=x["pixel_values"]).pooler_output
    assert torch.allclose(torch.nn.functional.normalize(got, dim=-1), out(enc)[2:], atol=1e-6)


def test_moved_together(tmp_path):
    "底座和适配器一起搬走，仍然找得到；底座不见了，说出应当在哪里。"
    base = build_micro(tmp_path / "one" / "base")
    enc = shake(small(load_encoder(str(base))))
    enc.save(tmp_path / "one" / "runs" / "adapter")
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert torch.equal(out(load_encoder(tmp_path / "two/runs/adapter")), out(enc))
    note = json.loads((tmp_path / "two/runs/adapter/vembed.json").read_text())["notes"]["adapter"]
    assert note["base"] == "./../../base" and str(tmp_path) not in (tmp_path / "two/runs/adapter/adapter_config.json").read_text()
    shutil.rmtree(tmp_path / "two" / "base")
    with refused("应当在"): load_encoder(tmp_path / "two/runs/adapter")


def test_temperature_travels(micro, tmp_path):
    "训练学到的温度写在底座里，也随适配器走。"
    enc = small(load_encoder(micro))
    with torch.no_grad(): enc.model.logit_scale.fill_(3.21)
    enc.save(tmp_path / "a")
    assert load_encoder(tmp_path / "a").model.logit_scale.item() == enc.model.logit_scale.item()


def test_another_base(micro, tmp_path):
    other = str(build_micro(tmp_path / "other", seed=7))
    shake(small(load_encoder(micro))).save(tmp_path / "a")
    with refused("不是在这个底座上训练的"): adapt.load_adapter(load_encoder(other), tmp_path / "a")
    with refused("不是在这个底座上训练的"): adapt.load_adapter(load_encoder("tiny-clip"), tmp_path / "a")
    enc = adapt.load_adapter(load_encoder(micro, dtype=torch.bfloat16), tmp_path / "a")
    assert enc.adapter.name == "default"


@pytest.mark.parametrize("harm, word", [("missing", "缺少"), ("extra", "多出"), ("shape", "形状"), ("truncated", "读不出来"), ("gone", "读不出来"), ("config", "JSON|读不出来")])
def test_damaged_adapter(micro, tmp_path, harm, word):
    shake(small(load_encoder(micro))).save(tmp_path / "a")
    f = tmp_path / "a" / "adapter_model.safetensors"
    w = load_file(f)
    key = sorted(k for k in w if "lora_B" in k)[0]
    if harm == "missing": w.pop(key)
    if harm == "extra": w["base_model.model.extra.weight"] = torch.zeros(1)
    if harm == "shape": w[key] = torch.zeros(3, 3)
    save_file(w, f)
    if harm == "truncated": f.write_bytes(f.read_bytes()[:300])
    if harm == "gone": f.unlink()
    if harm == "config": (tmp_path / "a" / "adapter_config.json").write_text("{")
    with refused(word): load_encoder(tmp_path / "a")
    enc = load_encoder(micro)
    before = out(enc)
    with refused(word): adapt.load_adapter(enc, tmp_path / "a")
    assert torch.equal(out(enc), before) and not [n for n in params(enc) if "lora_" in n], "读坏了的适配器不该留在模型里"


def test_several_adapters(micro, tmp_path):
    enc = shake(small(load_encoder(micro)), 0)
    one = out(enc)
    adapt.add_adapter(enc, "two", r=3, alpha=3, targets="text")
    two = out(shake(enc, 1))
    assert not torch.equal(one, two) and enc.adapter.name == "two"
    enc.save(tmp_path / "two")
    adapt.use_adapter(enc, "default").save(tmp_path / "one")
    assert torch.equal(out(enc), one) and torch.equal(out(load_encoder(tmp_path / "two")), two) and torch.equal(out(load_encoder(tmp_path / "one")), one)
    both = adapt.load_adapter(adapt.load_adapter(load_encoder(micro), tmp_path / "one", "a"), tmp_path / "two", "b")
    assert torch.equal(out(adapt.use_adapter(both, "a")), one) and torch.equal(out(adapt.use_adapter(both, "b")), two)
    with refused("没有叫 'tow'.*two"): adapt.use_adapter(enc, "tow")
    with refused("已经有一个叫"): adapt.add_adapter(enc, "two")
    with refused("已经有一个叫"): small(enc)


def test_copies_are_independent(micro, tmp_path):
    "deepcopy 之后各存各的、各训各的。"
    enc = small(load_encoder(micro))
    twin = shake(copy.deepcopy(enc))
    assert not torch.equal(out(twin), out(enc))
    twin.save(tmp_path / "twin")
    assert torch.equal(out(load_encoder(tmp_path / "twin")), out(twin))
    adapt.merge(twin)
    assert enc.adapter.name == "default" and not hasattr(twin, "adapter")


def test_save_needs_a_base(micro, tmp_path):
    enc = small(load_encoder(micro))
    enc.adapter.base = ""
    with refused("不知道底座"): enc.save(tmp_path / "a")
    enc.adapter.base = micro
    with refused("完整的模型"): enc.save(micro)
    assert load_encoder(micro)


def test_fingerprint(micro, tmp_path):
    "与精度、有没有适配器无关；差一点点也看得出来；换一个进程也一样。"
    enc = load_encoder(micro)
    fp = adapt.fingerprint(enc.model)
    assert fp == adapt.fingerprint(load_encoder(micro, dtype=torch.bfloat16).model) == adapt.fingerprint(shake(small(load_encoder(micro))).model)
    for name, p in params(enc).items():
        if p.numel() == 1: continue
        old = p.detach().clone()
        with torch.no_grad(): p.add_(0.05)
        assert adapt.fingerprint(enc.model)["weights"] != fp["weights"], name
        with torch.no_grad(): p.copy_(old)
    code = f"from vembed_nb.models.load import load_encoder as l; from vembed_nb.models.adapt import fingerprint as f; print(f(l({micro!r}).model)['weights'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ).stdout.strip() == fp["weights"]


def test_targets(micro):
    enc = load_encoder(micro)
    assert adapt.find_targets(enc, "text, vision") == adapt.find_targets(enc)
    assert adapt.find_targets(enc, ["vision_model.encoder.layers.0.mlp.fc1"]) == ["vision_model.encoder.layers.0.mlp.fc1"]
    assert not set(adapt.head_modules(enc)) & set(adapt.find_targets(enc, "all-linear"))
    for bad, word in (("q_prj", "q_proj"), ("", "空的"), ([], "空的"), (["q_proj", "nothing"], "nothing"), ("lora", "q_proj")):
        with refused(word): small(load_encoder(micro), targets=bad)
    for bad in (dict(r=0), dict(r=2.5), dict(alpha=0), dict(dropout=1.0), dict(dropout=-.1)):
        with refused("lora 的参数不行"): small(load_encoder(micro), **bad)
    with refused("LoraConfig"): small(load_encoder(micro), not_an_option=1)


def test_no_dead_targets():
    "SigLIP 的 MultiheadAttention 里的 out_proj 从不被调用，不能当目标。"
    enc = load_encoder("tiny-siglip")
    names = {n for n, m in enc.model.named_modules() if isinstance(m, nn.Linear)}
    assert [n for n in names if "head.attention" in n] and not [n for n in adapt.linears(enc.model) if "head.attention" in n]


def test_needs_an_adapter(micro, tmp_path):
    enc = load_encoder(micro)
    for fn in (adapt.merge, lambda e: adapt.save_adapter(e, tmp_path / "x"), lambda e: adapt.use_adapter(e, "a"), lambda e: adapt.add_adapter(e, "a"), lambda e: adapt.save_merged(e, tmp_path / "x")):
        with refused("没有适配器"): fn(enc)


def test_freezing(micro):
    enc = adapt.freeze(load_encoder(micro), "vision")
    assert {adapt.tower_of(n) for n, p in params(enc).items() if p.requires_grad} == {"text", "共用"}
    assert not [n for n, p in params(adapt.bias_only(load_encoder(micro))).items() if p.requires_grad and not n.endswith("bias")]
    assert {n for n, p in params(adapt.head_only(load_encoder(micro))).items() if p.requires_grad} == {"text_projection.weight", "visual_projection.weight"}
    assert not [n for n, p in params(adapt.freeze(load_encoder(micro), until=1)).items() if p.requires_grad and (".layers.0." in n or "embeddings" in n)]
    for bad, word in ((("txet",), "没有对上"), (("text", "vision"), "不剩"), (("[",), "正则")):
        with refused(word): adapt.freeze(load_encoder(micro), *bad)


def test_frozen_parts_stay_in_eval(micro_dropout):
    "冻住的塔没有 dropout，`train()` 改不回去；没有冻的仍有。"
    enc = adapt.freeze(load_encoder(micro_dropout), "vision")
    enc.train()
    x = inputs_of(enc)
    a, b = enc(x).vectors, enc(x).vectors
    assert torch.equal(a[2:], b[2:]) and not torch.equal(a[:2], b[:2]) and enc.training
    with torch.no_grad(): enc.encode(["红色"])
    assert enc.training and not enc.model.vision_model.training and enc.model.text_model.training
    twin = copy.deepcopy(enc)
    assert twin.eval().train().model.vision_model.training is False


def test_frozen_batchnorm_keeps_its_statistics():
    "冻住的 BatchNorm 不改均值。"
    class Enc(nn.Module):
        def __init__(self): super().__init__(); self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5)); self.model(torch.zeros(1, 3, 8, 8))

    enc = Enc()
    adapt.freeze(enc, r"^[01]\.")
    enc.train()
    before = enc.model[1].running_mean.clone()
    enc.model(torch.randn(4, 3, 8, 8))
    assert torch.equal(enc.model[1].running_mean, before) and not enc.model[1].training and enc.model[3].training


def test_gradual_unfreezing(micro):
    enc = load_encoder(micro)
    total = sum(p.numel() for p in enc.model.parameters())
    schedule = adapt.GradualUnfreeze(enc)
    counts = [schedule(e) for e in range(4)]
    assert counts == sorted(counts) and counts[0] < counts[1] < total == counts[-1]
    with refused("layers=0"): adapt.GradualUnfreeze(enc, 0)


def test_table(micro):
    enc = load_encoder(micro)
    n = sum(p.numel() for p in enc.model.parameters())
    t = adapt.trainable_table(enc)
    assert (t.total("parameters"), t.total("trainable"), t.total("parameter_bytes"), t.total("optimizer_bytes")) == (n, n, 4 * n, 8 * n)
    small(enc)
    t = adapt.trainable_table(enc)
    assert t.total("trainable") == sum(p.numel() for p in enc.model.parameters() if p.requires_grad) and t.total("gradient_bytes") == 4 * t.total("trainable")
    opt = torch.optim.AdamW([p for p in enc.parameters() if p.requires_grad])
    enc.train()(inputs_of(enc)).vectors.square().sum().backward()
    opt.step()
    state = sum(v.nbytes for s in opt.state.values() for k, v in s.items() if k != "step")
    assert state == t.total("optimizer_bytes"), "AdamW 的状态要和表里一样"
    assert "合计" in t._repr_markdown_() and t.to_dict()["rows"]


def test_checkpointing_refused():
    class Enc(nn.Module):
        def __init__(self): super().__init__(); self.model = nn.Linear(2, 2)

    with refused("不支持梯度检查点"): adapt.checkpointing(Enc())


def test_quantized_base(micro, monkeypatch, tmp_path):
    enc = small(load_encoder(micro))
    monkeypatch.setattr(adapt, "quantized", lambda m: True)
    with refused("量化"): adapt.merge(enc)
    enc.adapter.fingerprint = adapt.fingerprint(enc.model)
    assert set(enc.adapter.fingerprint) == {"norms"}
    enc.save(tmp_path / "a")
    monkeypatch.undo()
    adapt.load_adapter(load_encoder(micro), tmp_path / "a")  # 在 4 位的底座上训的，也能加在没有量化的底座上
    with refused("不是在这个底座上"): adapt.load_adapter(load_encoder("tiny-clip"), tmp_path / "a")
    if not torch.cuda.is_available():
        with refused("GPU"): load_encoder(micro, quantize="4bit")


@pytest.mark.parametrize("kind", ["lora", "lora + gradcache + matryoshka", "freeze", "checkpointing"])
def test_resume_is_bit_equal(micro_dropout, shop, tmp_path, monkeypatch, kind):
    "从只存了适配器的检查点接着训，与没有断过逐位相等：适配器、优化器、历史。"
    from vembed_nb.train.trainer import Trainer

    low = dict(use_lora=True, lora_r=3, lora_dropout=0.2)
    kw = {"lora": low, "lora + gradcache + matryoshka": {**low, "gradient_cache_chunk_size": 3, "use_mrl": True, "mrl_dims": "16,8"}, "freeze": dict(freeze="text"), "checkpointing": {**low, "gradient_checkpointing": True}}[kind]
    kw = dict(data_path=str(shop / "train.jsonl"), epochs=2, batch_size=8, learning_rate=1e-2, logging_steps=1, **kw)
    whole = Trainer(micro_dropout, **kw, output_dir=str(tmp_path / "whole"))
    whole.train()
    real = Trainer._end_epoch
    with monkeypatch.context() as m:
        m.setattr(Trainer, "_end_epoch", lambda self: (real(self), 1 / 0) if self.epoch == 0 else real(self))
        with pytest.raises(ZeroDivisionError): Trainer(micro_dropout, **kw, output_dir=str(tmp_path / "cut")).train()
    again = Trainer(micro_dropout, **kw, output_dir=str(tmp_path / "cut"))
    again.train(resume=True)
    a, b = (tmp_path / n / "checkpoint-epoch-2" for n in ("whole", "cut"))
    name = "adapter_model.safetensors" if "use_lora" in kw else "model.safetensors"
    wa, wb = load_file(a / name), load_file(b / name)
    assert wa.keys() == wb.keys() and all(torch.equal(wa[k], wb[k]) for k in wa)
    assert json.loads((a / "vembed.json").read_text()) == json.loads((b / "vembed.json").read_text())
    sa, sb = (torch.load(f / "training_state.pt", weights_only=True)["optimizer"]["state"] for f in (a, b))
    assert sa.keys() == sb.keys() and all(torch.equal(v, sb[k][n]) for k, s in sa.items() for n, v in s.items())
    strip = lambda t: [{k: v for k, v in h.items() if k != "seconds"} for h in t.history]
    assert strip(whole) == strip(again)
    assert (out(load_encoder(tmp_path / "cut")) - out(again.encoder)).abs().max() <= 1e-6


def test_trainer_continues_an_adapter(micro, shop, tmp_path):
    "从一个适配器的检查点开始：接着训它；秩不同是错误；不知道底座的编码器在训练之前就被拒绝。"
    from vembed_nb.train.trainer import Trainer

    kw = dict(data_path=str(shop / "train.jsonl"), epochs=1, batch_size=8, learning_rate=1e-2)
    Trainer(micro, **kw, use_lora=True, lora_r=2, output_dir=str(tmp_path / "one")).train()
    t = Trainer(str(tmp_path / "one"), **kw, use_lora=True, lora_r=2, output_dir=str(tmp_path / "two"))
    t.train()
    assert torch.equal(out(load_encoder(tmp_path / "two")), out(t.encoder)) and os.path.realpath(t.encoder.adapter.base) == os.path.realpath(micro)
    with refused("lora_r=9"): Trainer(str(tmp_path / "one"), **kw, use_lora=True, lora_r=9, output_dir=str(tmp_path / "x")).train()
    given = load_encoder(micro)
    small(given).adapter.base = ""
    with refused("不知道底座"): Trainer(given, **kw, output_dir=str(tmp_path / "y")).train()


def test_trainer_says_it_trains_only_the_adapter(micro, shop, tmp_path):
    "从适配器的文件夹开始、没有写 use_lora：提醒一次，有百分比和出路；写了、从合并后的开始、续训、自己加的适配器，都不提醒。"
    from vembed_nb.train.trainer import Trainer

    kw = dict(data_path=str(shop / "train.jsonl"), epochs=1, batch_size=8, learning_rate=1e-2)
    Trainer(micro, **kw, use_lora=True, lora_r=2, output_dir=str(tmp_path / "one")).train()

    def said(trainer, **options):
        with warnings.catch_warnings(record=True) as got:
            warnings.simplefilter("always")
            trainer.train(**options)
        return [str(w.message) for w in got if "适配器" in str(w.message)]

    t = Trainer(str(tmp_path / "one"), **kw, output_dir=str(tmp_path / "two"))
    (line,) = said(t)
    table = adapt.trainable_table(t.encoder)
    assert f"{table.total('trainable') / table.total('parameters'):.2%}" in line and "合并" in line and "\n" not in line and table.total("trainable") < table.total("parameters") / 2
    adapt.use_adapter(t.encoder, None)
    assert torch.equal(out(t.encoder), out(load_encoder(micro)))  # 说的是实话：底座没有动
    adapt.save_merged(load_encoder(tmp_path / "one"), tmp_path / "merged")
    full = Trainer(str(tmp_path / "merged"), **kw, output_dir=str(tmp_path / "full"))
    assert said(full) == [] and all(p.requires_grad for p in full.encoder.parameters())
    assert said(Trainer(str(tmp_path / "one"), **kw, use_lora=True, lora_r=2, output_dir=str(tmp_path / "three"))) == []
    assert said(Trainer(str(tmp_path / "one"), **kw, output_dir=str(tmp_path / "two")), resume=True) == []
    assert said(Trainer(small(load_encoder(micro)), **kw, output_dir=str(tmp_path / "mine"))) == []


def test_trainer_refuses_a_changed_base(micro, shop, tmp_path):
    "编码器打开之后变过、加了适配器之后底座变过、合并过：第一步之前就拒绝，不占文件夹，编码器原样；存下再打开，就可以。"
    from vembed_nb.train.trainer import Trainer

    kw = dict(data_path=str(shop / "train.jsonl"), epochs=1, batch_size=8, use_lora=True, lora_r=2)
    def nudge(enc):
        with torch.no_grad(): next(p for n, p in enc.named_parameters() if p.ndim == 2 and "lora_" not in n and "modules_to_save" not in n).view(-1)[0].add_(.1)
        return enc

    changed, later, fused = nudge(load_encoder(micro)), nudge(small(load_encoder(micro))), adapt.merge(shake(small(load_encoder(micro))))
    for enc, word in ((changed, "打开之后"), (later, "加上适配器以后"), (fused, "打开之后")):
        steps = []
        enc.register_forward_pre_hook(lambda *a: steps.append(1))
        with refused(word) as e: Trainer(enc, **kw, output_dir=str(tmp_path / "x")).train()
        assert "\n" not in str(e.value) and not steps and not (tmp_path / "x").exists()
    assert not hasattr(changed, "adapter") and all(p.requires_grad for p in changed.parameters())
    changed.save(tmp_path / "base")
    t = Trainer(str(tmp_path / "base"), **kw, output_dir=str(tmp_path / "ok"))
    t.train()
    assert (out(load_encoder(tmp_path / "ok")) - out(t.encoder)).abs().max() <= 1e-6
    biased = small(load_encoder(micro), bias="all")  # 这样的适配器自己就改底座的偏置，可以接着训
    for n in "ab": Trainer(biased, **kw, output_dir=str(tmp_path / n)).train()
    assert (out(load_encoder(tmp_path / "b")) - out(biased)).abs().max() <= 1e-6
