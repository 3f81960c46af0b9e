"""TrainConfig 的每一个键都真的起作用（REFERENCES R7）：一个键一个测试，漏掉一个就失败。"""
import json
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, write_jsonl

from vembed_nb.config import CHOICES, TrainConfig
from vembed_nb.core import VembedError
from vembed_nb.train.trainer import Trainer

TESTED = {}  # 键 → 测试


def covers(key):
    "登记一个测试管哪个键。"
    def mark(fn):
        assert key not in TESTED, key
        TESTED[key] = fn.__name__
        return fn

    return mark


@pytest.fixture
def fit(tmp_path, micro, shop):
    "跑一次很短的训练（默认 24 条、每批 8 条、一轮，共 3 步），返回 Trainer。"
    def run(name="out", **kw):
        kw = {"model_name_or_path": micro, "data_path": str(shop / "train.jsonl"), "output_dir": str(tmp_path / name), "epochs": 1, "batch_size": 8, "logging_steps": 1, "learning_rate": 1e-2, **kw}
        trainer = Trainer(kw["model_name_or_path"], TrainConfig(**kw))
        trainer.train()
        trainer.out = tmp_path / name
        return trainer

    return run


def losses(t): return [h["loss"] for h in t.history if "loss" in h]
def rates(t): return [h["lr"] for h in t.history if "lr" in h]
def temperatures(t): return [h["temperature"] for h in t.history if "temperature" in h]
def weights(t): return {k: v.clone() for k, v in t.encoder.model.state_dict().items()}
def moved(a, b): return {k for k in a if not torch.equal(a[k], b[k])}
def checkpoints(t): return sorted(p.name for p in t.out.glob("checkpoint-*") if p.is_dir())
def vals(t): return [h for h in t.history if "val_hit@1" in h]


@covers("model_name_or_path")
def test_model_name_or_path(fit, tmp_path):
    from conftest import build_micro

    other = str(build_micro(tmp_path / "other", seed=9))
    assert losses(fit("a")) != losses(fit("b", model_name_or_path=other))
    with pytest.raises(VembedError, match="tiny-clip"): fit("c", model_name_or_path="tiny-clap")


@covers("data_path")
def test_data_path(fit, shop):
    assert fit("a").step == 3
    assert fit("b", data_path=str(shop / "val.jsonl"), image_root=str(shop), batch_size=2).step == 3
    with pytest.raises(VembedError, match="nowhere.jsonl"): fit("c", data_path="nowhere.jsonl")
    with pytest.raises(VembedError, match="data_path"): fit("d", data_path="")


@covers("val_data_path")
def test_val_data_path(fit, shop):
    assert not vals(fit("a"))
    t = fit("b", val_data_path=str(shop / "val.jsonl"), epochs=2)
    assert len(vals(t)) == 2 and {"val_ndcg@10", "val_mean_cosine", "val_effective_rank"} <= set(vals(t)[0])
    index = json.loads((t.out / "checkpoint.json").read_text())
    assert index["best"] == max(index["scores"], key=index["scores"].get) and len(index["scores"]) == 2


@covers("corpus_path")
def test_corpus_path(fit, shop, tmp_path):
    "6 个验证查询：图库只有 6 张时名次不会超过 6，30 张时一个随机模型做不到。"
    a, b = (fit(n, val_data_path=str(shop / "val.jsonl"), learning_rate=0, **kw) for n, kw in (("a", {}), ("b", {"corpus_path": str(shop / "corpus.jsonl")})))
    assert vals(a)[0]["val_mean_rank"] <= 6 < vals(b)[0]["val_mean_rank"]


@covers("image_root")
def test_image_root(fit, shop, tmp_path):
    moved_away = tmp_path / "elsewhere" / "train.jsonl"
    moved_away.parent.mkdir()
    moved_away.write_bytes((shop / "train.jsonl").read_bytes())
    assert losses(fit("a", data_path=str(moved_away), image_root=str(shop))) == losses(fit("b"))
    with pytest.raises(VembedError, match="images/"): fit("c", data_path=str(moved_away))


@covers("columns")
def test_columns(fit, shop):
    rows = [json.loads(line) for line in open(shop / "train.jsonl", encoding="utf-8")]
    table = shop / "own.csv"
    table.write_text("标题,图,价格\n" + "".join(f"{r['query']},{r['positive']},9\n" for r in rows), encoding="utf-8")
    assert losses(fit("a", data_path=str(table), columns="query=标题,positive=图")) == losses(fit("b"))
    with pytest.raises(VembedError, match="own.csv 第 2 行"): fit("c", data_path=str(table))
    with pytest.raises(VembedError, match="没有列"): fit("d", data_path=str(table), columns="query=名字,positive=图片")


@covers("output_dir")
def test_output_dir(fit, tmp_path):
    t = fit("here/and/there")
    assert (tmp_path / "here/and/there/checkpoint-epoch-1/model.safetensors").exists() and t.config.output_dir.endswith("there")


@covers("epochs")
def test_epochs(fit):
    t = fit(epochs=3)
    assert t.step == 9 and checkpoints(t) == [f"checkpoint-epoch-{i}" for i in (1, 2, 3)] and {h["epoch"] for h in t.history} == {0, 1, 2}


@covers("max_steps")
def test_max_steps(fit):
    t = fit(max_steps=4, epochs=3)
    assert t.step == 4 and len(checkpoints(t)) == 2 and rates(t)[-1] == pytest.approx(0, abs=1e-9), "学习率要按 max_steps 退火到 0"
    assert fit("b", max_steps=100).step == 3


@covers("batch_size")
def test_batch_size(fit):
    assert [fit(str(b), batch_size=b).step for b in (2, 8, 12, 24)] == [12, 3, 2, 1]
    with pytest.raises(VembedError, match="最大 batch_size 是 24"): fit("x", batch_size=25)


@covers("gradient_accumulation_steps")
def test_gradient_accumulation_steps(fit):
    t = fit(gradient_accumulation_steps=3)
    assert [h["grad_norm"] is not None for h in t.history] == [False, False, True]
    assert moved(weights(t), weights(fit("b")))


@covers("learning_rate")
def test_learning_rate(fit, micro):
    from vembed_nb.models.load import load_encoder

    start, zero, one = load_encoder(micro).model.state_dict(), weights(fit("a", learning_rate=0, learn_temperature=False)), weights(fit("b", learning_rate=1e-3))
    assert moved(start, zero) <= {"logit_scale"} and len(moved(start, one)) > 10
    assert max(rates(fit("c", learning_rate=0.5, scheduler_type="constant"))) == 0.5


@covers("weight_decay")
def test_weight_decay(fit):
    a, b = (weights(fit(str(w), weight_decay=w, max_steps=1, scheduler_type="constant", warmup_ratio=0)) for w in (0.0, 0.5))
    changed = moved(a, b)
    assert changed and all(a[k].ndim >= 2 for k in changed), "偏置、归一化层和温度不衰减"


@covers("max_grad_norm")
def test_max_grad_norm(fit):
    none, huge, small = (fit(str(g), max_grad_norm=g) for g in (0.0, 1e9, 1e-7))
    assert not moved(weights(none), weights(huge)) and moved(weights(none), weights(small))
    assert none.history[0]["grad_norm"] == small.history[0]["grad_norm"] > 1e-7, "记录的是裁剪之前的范数"


@covers("scheduler_type")
def test_scheduler_type(fit):
    seen = {s: rates(fit(s, scheduler_type=s, epochs=4, warmup_ratio=0.25)) for s in CHOICES["scheduler_type"]}
    assert len({tuple(v) for v in seen.values()}) == 4
    assert set(seen["constant"]) == {1e-2} and seen["cosine"][-1] < 1e-9 and seen["linear"][-1] < 1e-9
    assert seen["constant_with_warmup"][0] < seen["constant_with_warmup"][-1] == 1e-2


@covers("warmup_ratio")
def test_warmup_ratio(fit):
    peak = {w: rates(fit(str(w), warmup_ratio=w, epochs=4)).index(max(rates(fit(f"{w}b", warmup_ratio=w, epochs=4)))) for w in (0.25, 0.75)}
    assert peak == {0.25: 2, 0.75: 8}, "12 步里预热 3 步和 9 步"


@covers("loss_type")
def test_loss_type(fit):
    auto, nce, sig = (fit(k, loss_type=k) for k in ("auto", "infonce", "sigmoid"))
    assert losses(auto) == losses(nce) != losses(sig)
    assert "bias" in sig.history[0] and "bias" not in nce.history[0]
    with pytest.raises(VembedError, match="colbert"): fit("colbert", loss_type="colbert")


def test_loss_type_of_a_late_model(shop, tmp_path):
    "每个 token 一个向量的模型：auto 就是 colbert，能训、能评、能存；infonce 在动输出文件夹之前就被拒绝。"
    import micro_late

    from vembed_nb.train.trainer import Trainer

    model, data = str(micro_late.build(tmp_path/"m")), dict(data_path=shop/"train.jsonl", val_data_path=str(shop/"val.jsonl"), output_dir=str(tmp_path/"out"), epochs=1, batch_size=4, max_steps=2, gradient_cache_chunk_size=2)
    t = Trainer(model)
    history = t.train(**data)
    assert type(t.loss).__name__ == "ColBERTLoss" and any("val_hit@1" in h for h in history)
    kept = sorted(p.name for p in (tmp_path/"out").iterdir())
    with pytest.raises(VembedError, match="colbert"): Trainer(model, loss_type="infonce").train(**data, overwrite=True)
    assert sorted(p.name for p in (tmp_path/"out").iterdir()) == kept


@covers("temperature")
def test_temperature(fit):
    assert temperatures(fit("a", temperature=0.5))[0] == pytest.approx(0.5)
    assert temperatures(fit("b"))[0] == pytest.approx(0.0693, abs=1e-3), "0 表示用模型自带的（CLIP 的初值 exp(-2.6592)）"


@covers("learn_temperature")
def test_learn_temperature(fit):
    assert len(set(temperatures(fit("a", learn_temperature=False, epochs=2)))) == 1
    assert len(set(temperatures(fit("b", learn_temperature=True, epochs=2)))) > 1


@covers("use_gradient_cache")
def test_use_gradient_cache(fit, monkeypatch):
    "开着而一批超过一块：走 GradCache，损失与普通的一步相同到舍入；关掉，或一块就够：不走。"
    import vembed_nb.train.trainer as room

    steps, real = [], room.GradCache.step
    monkeypatch.setattr(room.GradCache, "step", lambda self, *a, **kw: steps.append(self.chunk_size) or real(self, *a, **kw))
    count = lambda **kw: (steps.clear(), fit(str(kw), **kw), len(steps))[1:]
    (cached, n), (plain, none), (_, enough) = count(gradient_cache_chunk_size=3), count(gradient_cache_chunk_size=3, use_gradient_cache=False), count()
    assert (n, none, enough) == (3, 0, 0)
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4)


@covers("gradient_cache_chunk_size")
def test_gradient_cache_chunk_size(fit, monkeypatch):
    "编码器一次看到的样本不超过一块。"
    import vembed_nb.models.dual as dual

    sizes, real = [], dual.DualEncoder.forward
    monkeypatch.setattr(dual.DualEncoder, "forward", lambda self, x: sizes.append(len(x)) or real(self, x))
    for chunk in (8, 3): assert (sizes.clear(), fit(str(chunk), gradient_cache_chunk_size=chunk), max(sizes))[2] == chunk
    with pytest.raises(VembedError, match="gradient_cache_chunk_size"): fit("x", gradient_cache_chunk_size=0)


@covers("use_mrl")
def test_use_mrl(fit):
    "各个长度的损失都记下，短的截得更好。"
    t = fit("a", use_mrl=True)
    assert {"loss@16", "loss@8"} <= set(t.history[0]) and not [k for k in fit("b").history[0] if k.startswith("loss@")]
    assert t.encoder.get_scale()["temperature"] == pytest.approx(float(torch.exp(-t.loss.loss.logit_scale)), rel=1e-5)


@covers("mrl_dims")
def test_mrl_dims(fit):
    assert {k for k in fit("a", use_mrl=True, mrl_dims="12,4").history[0] if k.startswith("loss@")} == {"loss@12", "loss@4"}
    for bad, word in (("99", "16"), ("8,8", "重复"), ("a", "逗号")):
        with pytest.raises(VembedError, match=word): fit("x" + bad, use_mrl=True, mrl_dims=bad)


@covers("mrl_weights")
def test_mrl_weights(fit):
    run = lambda **kw: fit(str(kw), use_mrl=True, mrl_dims="16,4", **kw).history[0]
    one, two = run(), run(mrl_weights="1,0.5")
    assert one["loss"] == pytest.approx(one["loss@16"] + one["loss@4"], rel=1e-5) and two["loss"] == pytest.approx(two["loss@16"] + .5 * two["loss@4"], rel=1e-5)
    with pytest.raises(VembedError, match="weights"): fit("x", use_mrl=True, mrl_dims="16,4", mrl_weights="1")


def lora_layers(t): return {n for n, m in t.encoder.model.named_modules() if hasattr(m, "lora_A")}
def trained(t): return {n for n, p in t.encoder.model.named_parameters() if p.requires_grad}


@covers("use_lora")
def test_use_lora(fit, micro, capsys):
    "只有 LoRA、投影头动；检查点只有适配器，读回来向量相同；训练的比例印一次。"
    from vembed_nb.models.load import load_encoder

    t = fit(use_lora=True, epochs=2)
    assert capsys.readouterr().out.count("个参数（") == 1
    start, now = load_encoder(micro).model.state_dict(), weights(t)
    same = {k.replace(".base_layer", "").replace(".original_module", ""): v for k, v in now.items() if "lora_" not in k and "modules_to_save" not in k}
    assert moved(start, same) <= {"logit_scale"} and set(same) == set(start)
    folder = t.out / "checkpoint-epoch-2"
    assert (folder / "adapter_model.safetensors").exists() and not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    again = load_encoder(folder)
    assert torch.equal(again.encode(["红色的杯子"]), t.encoder.encode(["红色的杯子"])) and again.get_scale() == t.encoder.get_scale()
    fit("b")
    assert "个参数（" not in capsys.readouterr().out


@covers("lora_r")
def test_lora_r(fit):
    ranks = {r: {p.shape[0] for n, p in fit(str(r), use_lora=True, lora_r=r).encoder.model.named_parameters() if "lora_A" in n} for r in (2, 5)}
    assert ranks == {2: {2}, 5: {5}}
    with pytest.raises(VembedError, match="lora_r"): fit("x", use_lora=True, lora_r=0)


@covers("lora_alpha")
def test_lora_alpha(fit):
    t = fit("a", use_lora=True, lora_r=4, lora_alpha=12.0)
    assert t.encoder.adapter.peft.peft_config["default"].lora_alpha == 12
    assert losses(t)[0] == losses(fit("b", use_lora=True, lora_r=4))[0] and losses(t)[1:] != losses(fit("c", use_lora=True, lora_r=4))[1:], "B 从零开始，第一步还看不出来"
    with pytest.raises(VembedError, match="lora_alpha"): fit("x", use_lora=True, lora_alpha=0.0)


@covers("lora_dropout")
def test_lora_dropout(fit):
    a, b = (losses(fit(str(x), use_lora=True, lora_dropout=x)) for x in (0.0, 0.5))
    assert a[1:] != b[1:]
    with pytest.raises(VembedError, match="lora_dropout"): fit("x", use_lora=True, lora_dropout=1.0)


@covers("lora_target_modules")
def test_lora_target_modules(fit):
    where = {t: lora_layers(fit(t, use_lora=True, lora_target_modules=t)) for t in ("auto", "text", "vision", "all-linear", "q_proj,fc1")}
    assert where["auto"] == where["text"] | where["vision"] < where["all-linear"] and not where["text"] & where["vision"]
    assert {n.rpartition(".")[2] for n in where["q_proj,fc1"]} == {"q_proj", "fc1"}
    with pytest.raises(VembedError, match="q_proj"): fit("x", use_lora=True, lora_target_modules="q_prj")


@covers("freeze")
def test_freeze(fit, micro):
    "冻住的一个数也不动，其余的动；与 LoRA 一起用也行。"
    from vembed_nb.models.load import load_encoder

    start = load_encoder(micro).model.state_dict()
    change = lambda **kw: moved(start, weights(fit(str(kw), **kw)))
    assert not [k for k in change(freeze="vision") if k.startswith("vis")] and [k for k in change(freeze="text") if k.startswith("vis")]
    assert not [k for k in change(freeze="embeddings, layer_norm") if "embeddings" in k or "layer_norm" in k]
    t = fit("lora", use_lora=True, freeze="vision")
    assert trained(t) and not [n for n in trained(t) if n.startswith("vis")]
    for bad, word in (("layers.9", "layers.9"), ("text,vision", "不剩"), ("(", "正则")):
        with pytest.raises(VembedError, match=word): fit("x" + bad[:1], freeze=bad)


@covers("gradient_checkpointing")
def test_gradient_checkpointing(fit, monkeypatch):
    "每一层真的重算了；梯度和不重算时一样。"
    from transformers.models.clip.modeling_clip import CLIPMLP

    calls, real = [], CLIPMLP.forward
    def count(**kw):
        with monkeypatch.context() as m:
            m.setattr(CLIPMLP, "forward", lambda self, *a, **k: calls.append(1) or real(self, *a, **k))
            calls.clear()
            return fit(str(kw), **kw), len(calls)

    (plain, n), (again, m) = count(), count(gradient_checkpointing=True)
    assert m == 2 * n > 0 and losses(again) == pytest.approx(losses(plain), rel=1e-5)
    (a, n), (b, m) = count(use_lora=True), count(use_lora=True, gradient_checkpointing=True)
    assert m == 2 * n and losses(a) == pytest.approx(losses(b), rel=1e-4) and a.history[0]["grad_norm"] == pytest.approx(b.history[0]["grad_norm"], rel=1e-4)


@covers("mixed_precision")
def test_mixed_precision(fit):
    "同一个进程里可以换精度；bf16 的损失与 fp32 相近而不相等；CPU 上的 fp16 说清楚为什么不行。"
    runs, used = {}, {}
    for p in ("no", "bf16", "auto"):
        runs[p] = fit(p, mixed_precision=p)
        used[p] = runs[p].accelerator.mixed_precision  # accelerate 的状态是全局的，要当场看
    assert (used["no"], used["bf16"]) == ("no", "bf16")
    assert losses(runs["bf16"]) != losses(runs["no"]) and losses(runs["bf16"]) == pytest.approx(losses(runs["no"]), rel=0.05)
    if not torch.cuda.is_available():
        assert losses(runs["auto"]) == losses(runs["no"])
        with pytest.raises(VembedError, match="fp16"): fit("x", mixed_precision="fp16")


@covers("seed")
def test_seed(fit):
    a, b, c = fit("a", seed=1), fit("b", seed=1), fit("c", seed=2)
    assert losses(a) == losses(b) != losses(c) and not moved(weights(a), weights(b))


@covers("logging_steps")
def test_logging_steps(fit):
    steps = lambda **kw: [h["step"] for h in fit(str(kw), epochs=3, **kw).history]
    assert steps(logging_steps=1) == list(range(1, 10)) and steps(logging_steps=4) == [1, 4, 8]
    assert json.loads((fit("d").out / "history.json").read_text())["history"]


@covers("num_workers")
def test_num_workers(fit, monkeypatch):
    made, real = [], torch.utils.data.DataLoader.__init__
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", lambda self, *a, **kw: made.append(kw["num_workers"]) or real(self, *a, **kw))
    assert losses(fit("a", num_workers=2)) == losses(fit("b", num_workers=0))
    assert made == [2, 0]


@covers("image_cache_mb")
def test_image_cache_mb(fit, monkeypatch):
    import vembed_nb.models.base as base
    import vembed_nb.models.dual as dual

    opened, real = [], base.open_image
    monkeypatch.setattr(base, "open_image", lambda p, root="", *a, **k: opened.append(p) or real(p, root, *a, **k))
    count = lambda **kw: (opened.clear(), fit(str(kw), epochs=2, **kw), len(opened))[2]
    assert count(image_cache_mb=0) == 48 and count(image_cache_mb=64) == 24
    assert len(dual.DualEncoder.cache) == 0, "缓存不能挂在类上"


@covers("save_total_limit")
def test_save_total_limit(fit, shop):
    assert checkpoints(fit("a", epochs=4, save_total_limit=1)) == ["checkpoint-epoch-4"]
    t = fit("b", epochs=4, save_total_limit=1, val_data_path=str(shop / "val.jsonl"))
    best = json.loads((t.out / "checkpoint.json").read_text())["best"]
    assert set(checkpoints(t)) == {"checkpoint-epoch-4", best}
    assert len(checkpoints(fit("c", epochs=4))) == 4


@covers("strict")
def test_strict(fit, shop, tmp_path):
    rows = [json.loads(line) for line in open(shop / "train.jsonl", encoding="utf-8")]
    bad = write_jsonl(tmp_path / "bad.jsonl", rows + [{"query": "没有的图", "positive": "images/missing.png"}])
    t = fit("a", data_path=str(bad), image_root=str(shop))
    assert t.step == 3 and list(t.dropped) == ["images/missing.png"]
    assert json.loads((t.out / "history.json").read_text())["dropped_images"] == t.dropped
    with pytest.raises(VembedError, match="images/missing.png"): fit("b", data_path=str(bad), image_root=str(shop), strict=True)


def test_every_key_is_tested():
    assert set(TESTED) == {f.name for f in fields(TrainConfig)}
    assert all(callable(globals()[name]) for name in TESTED.values())


def test_effective_config_is_saved(fit):
    "生效的配置和检查点存在一起，读回来相同。"
    from vembed_nb.config import load_config

    t = fit(learning_rate=3e-4, columns="")
    assert load_config(t.out / "checkpoint-epoch-1" / "train_config.yaml") == t.config


def test_order_of_precedence(tmp_path):
    "默认值 < YAML < 命令行。"
    from vembed_nb.config import load_config

    path = tmp_path / "c.yaml"
    path.write_text("epochs: 7\nlearning_rate: 1e-5\n", encoding="utf-8")
    c = load_config(path, ["epochs=9"])
    assert (c.epochs, c.learning_rate, c.batch_size) == (9, 1e-5, 64)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_load(path):
    from vembed_nb.config import load_config

    load_config(path)


@covers("retrieval_mode")
def test_retrieval_mode(fit):
    assert losses(fit("a", retrieval_mode="t2i")) == losses(fit("b"))
    with pytest.raises(VembedError, match="train.jsonl 第 1 行"): fit("c", retrieval_mode="i2i")
    with pytest.raises(VembedError, match="t2i"): TrainConfig(retrieval_mode="t2p")


@pytest.fixture
def grouped(shop, tmp_path):
    "24 条，6 组各 4 条。"
    rows = [json.loads(line) for line in (shop / "train.jsonl").read_text(encoding="utf-8").splitlines()][:24]
    return str(write_jsonl(tmp_path / "grouped.jsonl", [{**r, "group": f"组 {n // 4}"} for n, r in enumerate(rows)]) or tmp_path / "grouped.jsonl")


def batches_of(t): return [[t.sampler.records[i].group for i, _ in b] for b in (t.sampler.set_epoch(0), list(t.sampler))[1]]


@covers("batch_sampler")
def test_batch_sampler(fit, shop, grouped):
    kw = dict(data_path=grouped, image_root=str(shop))
    kinds = {k: fit(k, batch_sampler=k, **({**kw, "batch_size": 4} if k != "grouped" else kw)) for k in ("no_duplicates", "length", "grouped")}
    assert [type(t.sampler).__name__ for t in kinds.values()] == ["NoDuplicateBatches", "LengthGroupedBatches", "GroupedBatches"]
    assert all(len(set(b)) == 4 for b in batches_of(kinds["no_duplicates"])) and all(len(set(b)) == 2 for b in batches_of(kinds["grouped"]))
    with pytest.raises(VembedError, match="group"): fit("d", batch_sampler="grouped")


@covers("samples_per_group")
def test_samples_per_group(fit, shop, grouped):
    t = fit("a", batch_sampler="grouped", samples_per_group=2, data_path=grouped, image_root=str(shop))
    assert all(len(set(b)) == 4 and len(b) == 8 for b in batches_of(t))
    with pytest.raises(VembedError, match="倍数"): fit("b", batch_sampler="grouped", samples_per_group=3, data_path=grouped, image_root=str(shop))


@covers("augment")
def test_augment(fit):
    plain, crop = fit("a", epochs=2), fit("b", epochs=2, augment="crop=0.3,erase=1")
    assert losses(plain) != losses(crop) == losses(fit("c", epochs=2, augment="crop=0.3,erase=1", num_workers=2))
    with pytest.raises(VembedError, match="crop"): fit("d", augment="corp=0.3")


@covers("image_draft")
def test_image_draft(fit, shop, micro, tmp_path):
    from PIL import Image

    big = tmp_path / "big"
    big.mkdir()
    rows = [json.loads(line) for line in (shop / "train.jsonl").read_text(encoding="utf-8").splitlines()][:24]
    for n, r in enumerate(rows):
        Image.radial_gradient("L").resize((640, 640)).rotate(15 * n).convert("RGB").save(big / f"{n}.jpg")
    data = tmp_path / "big.jsonl"
    write_jsonl(data, [{"query": f"{r.get('query', '')} {n}", "positive": f"{n}.jpg"} for n, r in enumerate(rows)])
    seen = []
    import vembed_nb.train.trainer as module
    real = module.open_image
    try:
        module.open_image = lambda *a, **k: seen.append(k.get("side")) or real(*a, **k)
        a, b = fit("a", data_path=str(data), image_root=str(big)), fit("b", data_path=str(data), image_root=str(big), image_draft=True)
    finally: module.open_image = real
    assert len(seen) == 24 and all(seen) and losses(a) != losses(b)
    assert abs(losses(a)[0] - losses(b)[0]) < .02


@covers("image_cache_dir")
def test_image_cache_dir(fit, tmp_path):
    plain, cached = fit("a", epochs=2, learn_temperature=False), fit("b", epochs=2, learn_temperature=False, image_cache_dir=str(tmp_path / "cache"), num_workers=2)
    assert losses(plain) == losses(cached) and len(list((tmp_path / "cache").rglob("*.pix"))) == 24
    vlm = Trainer("tiny-qwen3vl", TrainConfig(model_name_or_path="tiny-qwen3vl", batch_size=8, data_path=plain.config.data_path, output_dir=str(tmp_path / "v"), image_cache_dir=str(tmp_path / "c2")))
    with pytest.raises(VembedError, match="固定的大小"): vlm.train()


@covers("image_cache_dir_mb")
def test_image_cache_dir_mb(fit, tmp_path, monkeypatch):
    import vembed_nb.train.trainer as module

    made, real = [], module.ImageCache
    monkeypatch.setattr(module, "ImageCache", lambda folder, max_bytes: made.append(max_bytes) or real(folder, max_bytes))
    fit("a", image_cache_dir=str(tmp_path / "cache"), image_cache_dir_mb=3)
    assert made == [3 * 2**20]
