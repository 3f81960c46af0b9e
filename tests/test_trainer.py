"""黄金等式「续训 = 没有断过」，以及训练中会出的事：Ctrl-C、磁盘满、坏检查点、梯度累积、温度。"""
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl
from safetensors.torch import load_file, save_file

from vembed_nb.config import TrainConfig
from vembed_nb.core import VembedError
from vembed_nb.models.load import load_encoder
from vembed_nb.train.checkpoint import read_index
from vembed_nb.train.trainer import Trainer

BASE = dict(epochs=2, batch_size=8, logging_steps=1, learning_rate=1e-2)


@pytest.fixture
def config(tmp_path, micro, shop):
    "配置的键值：24 条，每批 8 条，两轮，共 6 步。"
    def make(name="out", model=micro, **kw):
        return {**BASE, "model_name_or_path": model, "data_path": str(shop / "train.jsonl"), "output_dir": str(tmp_path / name), **kw}

    return make


def fit(kw, **how):
    t = Trainer(kw["model_name_or_path"], TrainConfig(**kw))
    t.train(**how)
    return t


def flat(x, at=""):
    "嵌套的状态摊平成 {路径: 张量或数}。"
    if isinstance(x, dict): return {k2: v2 for k, v in x.items() for k2, v2 in flat(v, f"{at}/{k}").items()}
    if isinstance(x, (list, tuple)): return {k2: v2 for i, v in enumerate(x) for k2, v2 in flat(v, f"{at}/{i}").items()}
    return {at: x}


def same(a, b): return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def losses(history): return [(h["step"], h["epoch"], h["loss"], h["lr"], h["grad_norm"], h["temperature"]) for h in history if "loss" in h]


def assert_same_checkpoint(a, b):
    "两个检查点逐位相等：权重、优化器、学习率、损失、随机数、进度和历史（用时除外）。"
    wa, wb = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert wa.keys() == wb.keys() and not [k for k in wa if not torch.equal(wa[k], wb[k])]
    sa, sb = (torch.load(f / "training_state.pt", weights_only=True) for f in (a, b))
    assert losses(json.loads(sa.pop("history"))) == losses(json.loads(sb.pop("history")))
    fa, fb = flat(sa), flat(sb)
    assert fa.keys() == fb.keys() and not [k for k in fa if not same(fa[k], fb[k])]
    assert [k for k in fa if "exp_avg" in k], "优化器的状态应当在里面"


def crash_after_epoch(monkeypatch, n):
    "第 n 轮存盘之后像断电一样停下。"
    real = Trainer._end_epoch

    def end(self):
        real(self)
        if self.epoch + 1 == n: raise RuntimeError("断电")

    monkeypatch.setattr(Trainer, "_end_epoch", end)


@pytest.mark.parametrize("kind", ["plain", "dropout", "accumulate", "validate", "sigmoid", "cosine-3"])
def test_resume_from_epoch(config, monkeypatch, shop, micro, micro_dropout, kind):
    "从一轮末尾的检查点续训，和没有断过逐位相等。"
    kw = {"plain": {}, "dropout": {"model": micro_dropout}, "accumulate": {"gradient_accumulation_steps": 2, "epochs": 3}, "validate": {"val_data_path": str(shop / "val.jsonl")},
          "sigmoid": {"loss_type": "sigmoid"}, "cosine-3": {"epochs": 3, "temperature": 0.2}}[kind]
    whole = fit(config("whole", **kw))
    with monkeypatch.context() as m:
        crash_after_epoch(m, 1)
        with pytest.raises(RuntimeError, match="断电"): fit(config("broken", **kw))
    again = fit(config("broken", **kw), resume=True)
    last = f"checkpoint-epoch-{kw.get('epochs', 2)}"
    assert again.step == whole.step and losses(again.history) == losses(whole.history)
    assert_same_checkpoint(Path(whole.config.output_dir) / last, Path(again.config.output_dir) / last)
    assert read_index(whole.config.output_dir) == read_index(again.config.output_dir)


SCRIPT = """
import os, select, signal, sys
import torch
torch.set_num_threads(1)
from vembed_nb.train.trainer import Trainer
from vembed_nb.cli import main
reader, writer = os.pipe()
os.set_blocking(writer, False)
signal.set_wakeup_fd(writer)
real = Trainer._step
def step(self, *a):
    out = real(self, *a)
    if self.step == PAUSE:
        print("READY", flush=True)
        select.select([reader], [], [], 60)  # 信号到了才往下走
    return out
Trainer._step = step
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def training(kw, pause):
    "在子进程里用命令行训练，停在第 pause 步。"
    p = subprocess.Popen([sys.executable, "-c", SCRIPT.replace("PAUSE", str(pause)), "train", *[f"{k}={v}" for k, v in kw.items()]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while "READY" not in (line := p.stdout.readline()): assert line, p.communicate()
        yield p
    finally:
        p.kill()
        p.communicate()


def interrupted(kw, pause):
    "第 pause 步时送去 Ctrl-C；返回 (退出码, stderr)。"
    with training(kw, pause) as p:
        p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=60)
    return p.returncode, err


@pytest.fixture
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.mark.parametrize("kind", ["plain", "dropout", "accumulate", "end-of-epoch"])
def test_ctrl_c_and_resume(config, one_thread, micro_dropout, kind):
    "一轮中间 Ctrl-C：退出码 130；检查点能打开；续训后与没有断过逐位相等。"
    kw = {"dropout": {"model": micro_dropout}, "accumulate": {"gradient_accumulation_steps": 2}}.get(kind, {})
    whole = fit(config("whole", **kw))
    code, err = interrupted(config("cut", **kw), pause={"end-of-epoch": 3}.get(kind, 4))
    assert code == 130 and "Traceback" not in err, err
    last = read_index(config("cut")["output_dir"])["last"]
    assert last == {"accumulate": "checkpoint-step-5", "end-of-epoch": "checkpoint-step-3"}.get(kind, "checkpoint-step-4"), "累积到一半时要等到更新之后再存"
    load_encoder(str(Path(config("cut")["output_dir"]) / last))
    again = fit(config("cut", **kw), resume=True)
    assert losses(again.history) == losses(whole.history)
    assert_same_checkpoint(Path(whole.config.output_dir) / "checkpoint-epoch-2", Path(again.config.output_dir) / "checkpoint-epoch-2")


def test_ctrl_c_says_one_sentence(config):
    "停下时说出检查点的名字和接着训的办法，一行，没有别的。"
    code, err = interrupted(config(), pause=2)
    assert code == 130 and err.count("\n") == 1 and "checkpoint-step-2" in err and "--resume" in err, err


def test_killed_between_checkpoints(config):
    "训练中途被杀（SIGKILL）：已有的检查点完好，没有半截的文件夹，能接着训。"
    kw = config("killed")
    with training(kw, pause=5) as p: p.kill()
    out = Path(kw["output_dir"])
    assert read_index(out)["last"] == "checkpoint-epoch-1" and not list(out.glob(".checkpoint*"))
    assert fit(kw, resume=True).step == 6


def test_finished_run_resumes_to_itself(config):
    "已经训完的再 --resume：什么也不做，也不改权重。"
    kw = config()
    a = fit(kw)
    before = load_file(Path(kw["output_dir"]) / "checkpoint-epoch-2/model.safetensors")
    b = fit(kw, resume=True)
    after = load_file(Path(kw["output_dir"]) / "checkpoint-epoch-2/model.safetensors")
    assert b.step == a.step == 6 and all(torch.equal(before[k], after[k]) for k in before)


def test_resume_refuses_another_configuration(config):
    fit(config())
    with pytest.raises(VembedError, match="learning_rate"): fit(config(learning_rate=0.5), resume=True)
    with pytest.raises(VembedError, match="batch_size"): fit(config(batch_size=4), resume=True)
    fit(config(logging_steps=3), resume=True)


def test_resume_from_nothing_starts_fresh(config):
    kw = config()
    Path(kw["output_dir"]).mkdir()
    (Path(kw["output_dir"]) / "notes.txt").write_text("我的笔记")
    assert fit(kw, resume=True).step == 6
    assert (Path(kw["output_dir"]) / "notes.txt").read_text() == "我的笔记"


@pytest.mark.parametrize("harm", ["checkpoint.json", "training_state.pt", "model.safetensors", "missing-folder", "no-config"])
def test_resume_from_a_damaged_checkpoint(config, harm):
    "损坏的检查点：一句话说出是哪个文件，不留下半途的训练。"
    kw = config()
    fit(kw)
    out = Path(kw["output_dir"])
    if harm == "checkpoint.json": (out / harm).write_text("{")
    elif harm == "missing-folder": shutil.rmtree(out / "checkpoint-epoch-2")
    elif harm == "no-config": (out / "checkpoint-epoch-2/train_config.yaml").unlink()
    else: (out / "checkpoint-epoch-2" / harm).write_bytes((out / "checkpoint-epoch-2" / harm).read_bytes()[:500])
    with pytest.raises(VembedError) as e: fit(kw, resume=True)
    assert "checkpoint" in str(e.value) and "\n" not in str(e.value)
    load_encoder(str(out / "checkpoint-epoch-1"))


def damaged(micro, to, change):
    "改动权重后的一份拷贝。"
    shutil.copytree(micro, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


@pytest.mark.parametrize("change, word", [
    (lambda w: w.pop("text_projection.weight"), "缺少权重 1 个（例如 text_projection.weight"),
    (lambda w: w.update(extra_head=torch.zeros(3)), "多出权重 1 个（例如 extra_head"),
    (lambda w: w.update({"visual_projection.weight": torch.zeros(4, 16)}), "visual_projection.weight"),
], ids=["missing", "unexpected", "shape"])
def test_wrong_weights_are_refused(micro, tmp_path, config, change, word):
    folder = damaged(micro, tmp_path / "model", change)
    with pytest.raises(VembedError) as e: load_encoder(folder)
    assert word in str(e.value) and folder in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(VembedError): fit(config(model=folder))


@contextmanager
def full_disk(limit):
    "文件最多写 limit 个字节，之后的 write 真的失败（EFBIG），和磁盘满时走同一条路。"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [50, 2_000, 100_000, 400_000], ids=lambda n: f"{n}B")
def test_disk_full_while_saving(config, monkeypatch, limit):
    "第二轮存盘时磁盘满：一句话；第一轮的检查点完好，没有残留；腾出空间后续训，与没有断过相等。"
    whole, kw = fit(config("whole")), config("full")
    real = Trainer._end_epoch

    def end(self):
        if self.epoch == 1:
            with full_disk(limit): return real(self)
        return real(self)

    with monkeypatch.context() as m:
        m.setattr(Trainer, "_end_epoch", end)
        with pytest.raises(VembedError) as e: fit(kw)
    out = Path(kw["output_dir"])
    assert "checkpoint-epoch-1" in str(e.value) and "--resume" in str(e.value) and "\n" not in str(e.value)
    assert not list(out.glob(".*")), "留下了临时文件"
    assert json.loads((out / "history.json").read_text()) and read_index(out)["last"] == "checkpoint-epoch-1"
    load_encoder(str(out))
    again = fit(kw, resume=True)
    assert_same_checkpoint(out / "checkpoint-epoch-2", Path(whole.config.output_dir) / "checkpoint-epoch-2")
    assert losses(again.history) == losses(whole.history)


@pytest.mark.parametrize("where", ["safetensors", "torch", "history"])
def test_disk_full_errors_of_every_writer(config, monkeypatch, where):
    "各个库把「磁盘满」报成不同的异常（OSError、SafetensorError、RuntimeError），都要变成一句话。"
    import safetensors.torch
    from safetensors import SafetensorError

    import vembed_nb.train.trainer as trainer

    kw = config()
    with monkeypatch.context() as m:
        crash_after_epoch(m, 1)
        with pytest.raises(RuntimeError): fit(kw)

    def fail(error):
        def raising(*a, **k): raise error
        return raising

    def broken_safetensors(m):
        import transformers.modeling_utils as mu
        error = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        m.setattr(safetensors.torch, "save_file", fail(error))
        if hasattr(mu, "safe_save_file"): m.setattr(mu, "safe_save_file", fail(error))

    with monkeypatch.context() as m:
        if where == "safetensors": broken_safetensors(m)
        elif where == "torch": m.setattr(torch, "save", fail(RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0: file write failed")))
        else: m.setattr(trainer, "write_json", fail(OSError(28, "No space left on device")))
        with pytest.raises(VembedError, match="checkpoint-epoch-1"): fit(kw, resume=True)
    assert fit(kw, resume=True).step == 6


def test_same_seed_same_run(config):
    a, b = fit(config("a", seed=7)), fit(config("b", seed=7))
    assert losses(a.history) == losses(b.history)
    assert_same_checkpoint(Path(a.config.output_dir) / "checkpoint-epoch-2", Path(b.config.output_dir) / "checkpoint-epoch-2")
    assert losses(fit(config("c", seed=8)).history) != losses(a.history)


def test_a_trainer_trains_twice(config, micro, shop, tmp_path):
    "同一个 Trainer 再训一次：历史、步数、验证都属于新的一次，不与上一次混在一起。"
    kw = config("first", val_data_path=str(shop / "val.jsonl"))
    t = Trainer(micro, TrainConfig(**kw))
    first = list(t.train())
    rows = (shop / "val.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "val2.jsonl").write_text("".join(rows[:3]), encoding="utf-8")
    second = t.train(output_dir=str(tmp_path / "second"), val_data_path=str(tmp_path / "val2.jsonl"), image_root=str(shop))
    assert len(second) == len(first) and second[0]["step"] == 1
    assert [h for h in second if "val_mean_rank" in h][-1]["val_mean_rank"] <= 3, "第二次的验证集只有 3 张图"
    assert losses(second) == losses(first), "给的是名字：每次都从那个模型重新开始，扫超参数时才公平"


@pytest.mark.parametrize("steps, batch", [(3, 8), (2, 8)], ids=["even", "last-window-short"])
def test_gradient_accumulation(config, micro, shop, steps, batch):
    "累积 k 个小批 = k 个小批损失的平均求一次梯度；最后一个不满的窗口按它自己的个数平均。"
    from vembed_nb.data.read import read_records
    from vembed_nb.data.sample import NoDuplicateBatches
    from vembed_nb.train.optim import make_optimizer
    from vembed_nb.train.trainer import Collate, make_loss

    kw = config(gradient_accumulation_steps=steps, epochs=1, max_grad_norm=0.0, scheduler_type="constant", learning_rate=1e-3)
    t = fit(kw)
    c, encoder = TrainConfig(**kw), load_encoder(micro).train()
    loss, records = make_loss(c, encoder), read_records(kw["data_path"])
    opt, collate = make_optimizer([encoder, loss], c), Collate(records, encoder.preprocess, str(shop))
    batches = list(NoDuplicateBatches(records, batch, c.seed))
    norms = []
    for at in range(0, len(batches), steps):
        window = [collate(b) for b in batches[at:at + steps]]
        sum(loss(encoder(q), encoder(d), targets) for q, d, targets in window).div(len(window)).backward()
        norms.append(math.sqrt(sum(float(p.grad.pow(2).sum()) for g in opt.param_groups for p in g["params"] if p.grad is not None)))
        opt.step(); opt.zero_grad(); loss.clamp_()
    assert [h["grad_norm"] for h in t.history if h["grad_norm"]] == pytest.approx(norms, rel=1e-4)
    for (k, a), b in zip(t.encoder.model.state_dict().items(), encoder.model.state_dict().values()):
        if k != "logit_scale": assert torch.allclose(a, b, atol=1e-5), k


def test_accumulation_counts_updates(config):
    "学习率按更新次数走：9 个小批、每 3 个更新一次，预热和退火都在 3 次更新里走完。"
    t = fit(config(gradient_accumulation_steps=3, epochs=3, scheduler_type="linear", warmup_ratio=0.0))
    assert sum(h["grad_norm"] is not None for h in t.history) == 3
    assert t.history[-1]["lr"] == pytest.approx(0, abs=1e-12)


def test_temperature_trains_and_is_clamped(config, micro):
    "温度在优化器里、不衰减、会变，并限制在 [0, ln 100]；学到的值写回存下的模型。"
    t = fit(config(temperature=0.2))
    groups = t.optimizer.param_groups
    assert any(p is t.loss.logit_scale for g in groups for p in g["params"] if g["weight_decay"] == 0)
    assert float(t.loss.logit_scale.detach()) != pytest.approx(math.log(5))
    saved = load_file(Path(t.config.output_dir) / "checkpoint-epoch-2/model.safetensors")["logit_scale"]
    assert torch.equal(saved, t.loss.logit_scale.detach().cpu())
    assert load_encoder(t.config.output_dir).get_scale()["temperature"] == pytest.approx(float(torch.exp(-t.loss.logit_scale.detach())))
    for start, lr, end in ((0.011, 5.0, None), (0.99, 5.0, None)):
        value = float(fit(config(f"c{start}", temperature=start, learning_rate=lr, max_grad_norm=0.0, weight_decay=0.0, max_steps=2)).loss.logit_scale.detach())
        assert 0 <= value <= math.log(100) + 1e-6
    chained = Trainer(str(Path(t.config.output_dir) / "checkpoint-epoch-2"), TrainConfig(**config("next", max_steps=1, temperature=0.0)))
    chained.train()
    assert chained.history[0]["temperature"] == pytest.approx(float(torch.exp(-saved)), rel=1e-5), "接着训练从学到的温度起步"


def test_sigmoid_bias_is_written_back(tmp_path, config, shop):
    "SigLIP：温度和偏置都学，都写回。"
    from vembed_nb.pretrain import build_tiny, build_tokenizer

    torch.manual_seed(0)
    build_tiny("tiny-siglip", build_tokenizer(["红色的杯子"], vocab_size=4200)).save(tmp_path / "siglip")
    t = fit(config(model=str(tmp_path / "siglip"), max_steps=2, learning_rate=1e-3))
    assert type(t.loss).__name__ == "SigmoidLoss"
    saved = load_file(Path(t.config.output_dir) / "checkpoint-epoch-1/model.safetensors")
    for name in ("logit_scale", "logit_bias"):
        assert saved[name].item() == pytest.approx(getattr(t.loss, name).item())
    assert t.loss.logit_bias.item() != -10


def test_checkpoint_gives_the_same_vectors(config, shop):
    "存下来再打开，向量相同。"
    t = fit(config())
    items = ["红色的第 0 件", "images/01.png"]
    a = t.encoder.encode(items, image_root=str(shop))
    assert torch.equal(a, load_encoder(t.config.output_dir).encode(items, image_root=str(shop)))


def test_nan_stops_with_a_sentence(config):
    with pytest.raises(VembedError, match="learning_rate|NaN"): fit(config(learning_rate=1e30, max_grad_norm=0.0, epochs=3, warmup_ratio=0.0))


def test_validation_problems_show_before_training(config, shop, tmp_path, monkeypatch):
    "图库有坏图、正例不在图库里：训练开始之前就说，而不是训完一轮再丢掉它。"
    steps = []
    real = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, *a: steps.append(1) or real(self, *a))
    rows = (shop / "corpus.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "small.jsonl").write_text("".join(rows[:3]), encoding="utf-8")
    val = dict(val_data_path=str(shop / "val.jsonl"), image_root=str(shop))
    with pytest.raises(VembedError, match="不在图库里"): fit(config("a", corpus_path=str(tmp_path / "small.jsonl"), **val))
    (tmp_path / "broken.jsonl").write_text("".join(rows) + '{"id": "x", "image": "images/missing.png"}\n', encoding="utf-8")
    t = fit(config("b", corpus_path=str(tmp_path / "broken.jsonl"), max_steps=1, **val))
    assert "images/missing.png" in t.dropped, "图库里的坏图也要数"
    assert len(steps) == 1


def test_says_how_many_records_are_left_over(tmp_path, micro, shop):
    rows = [json.loads(line) for line in (shop / "train.jsonl").read_text(encoding="utf-8").splitlines()][:12]
    images = [r.get("positive") or r["positives"][0] for r in rows]
    write_jsonl(tmp_path / "same.jsonl", [{"query": f"第 {i} 句", "positive": images[i] if i < 12 else images[0]} for i in range(40)])
    with pytest.warns(UserWarning, match="轮不到"): Trainer(micro).train(data_path=str(tmp_path / "same.jsonl"), image_root=str(shop), output_dir=str(tmp_path / "out"), epochs=1, batch_size=8)


def test_resume_refuses_other_data(tmp_path, micro, shop):
    rows = [json.loads(line) for line in (shop / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    write_jsonl(tmp_path / "a.jsonl", rows)
    run = lambda **kw: Trainer(micro).train(data_path=str(tmp_path / "a.jsonl"), image_root=str(shop), output_dir=str(tmp_path / "out"), batch_size=8, **kw)
    run(epochs=2, max_steps=2)
    write_jsonl(tmp_path / "a.jsonl", rows[1:])
    with pytest.raises(VembedError, match="续不上"): run(epochs=2, max_steps=2, resume=True)
