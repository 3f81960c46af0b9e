"""GradCache = 一整批：登记表里的全部家族 × 损失 × 情况，两个进程，内存不够，以及每一处守信用的细节。"""
import gc
import json
import warnings
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vembed_nb.gradcache as room
from vembed_nb.core import VembedError
from vembed_nb.data.batch import Inputs
from vembed_nb.diagnose import proof as P
from vembed_nb.gradcache import GradCache, embed, find_limit, freeze_batchnorm, graph_bytes, split
from vembed_nb.losses.contrastive import InfoNCE
from vembed_nb.losses.targets import make_targets
from vembed_nb.vectors import Embeddings, normalize

torch.set_num_threads(1)
BF16 = lambda: torch.autocast("cpu", torch.bfloat16)


def assert_equal(proofs):
    "每一个都相等；不相等的说出是哪一个。"
    wrong = {o: p for o, p in proofs.items() if not p.ok}
    assert proofs and not wrong, wrong


# ---- 一个进程：家族 × 损失 × 情况 ----

@pytest.mark.parametrize("family, objective", [(f, o) for f in P.FAMILIES for o in P.objectives_for(f)])
def test_every_family_and_objective(family, objective):
    assert_equal(P.prove(family, "ragged", [objective]))


FULL = ("keep", "accumulate", "checkpointing", "lora")  # 与上面那一条、两个进程的那一条一起，就是全部的乘积


@pytest.mark.parametrize("family", P.FAMILIES)
@pytest.mark.parametrize("condition", FULL)
def test_every_objective_under_the_main_conditions(family, condition):
    assert_equal(P.prove(family, condition))


@pytest.mark.parametrize("family", P.FAMILIES)
@pytest.mark.parametrize("condition", [c for c in P.CONDITIONS if c not in ("ragged", *FULL)])
def test_some_objectives_under_the_other_conditions(family, condition):
    "从登记表里隔几个取一个，从不同的地方取起。"
    start = list(P.CONDITIONS).index(condition) % 5
    names = P.objectives_for(family)
    assert_equal(P.prove(family, condition, names[start % len(names)::5]))


@pytest.mark.parametrize("family", P.FAMILIES)
def test_another_seed(family):
    assert_equal(P.prove(family, "one", P.objectives_for(family)[:1], seed=7))


# ---- 登记表自己：批真的不整齐，情况真的布置上了 ----

def test_the_batch_is_awkward():
    t = P.make_case("dual").targets
    r, c = t.pairs()
    assert len(r) > 6 and (r != c).any(), "要有对角线以外的正例"
    assert (t.positive_counts > 1).any() and (t.owners == -1).any()
    assert t.owners[6:][t.owners[6:] >= 0].bincount(minlength=6).tolist() == [2, 0, 0, 1, 0, 0], "难反例的个数不齐"


def test_vlm_chunks_are_ragged():
    "有的样本没有图，有的不止一张；有的块一张图也没有。"
    case = P.make_case("vlm")
    assert {0, 1, 2} <= set(case.d.sizes["image_grid_thw"].tolist() + case.q.sizes["image_grid_thw"].tolist())
    assert any("pixel_values" not in c for c in case.q.chunk(1)) and len(set(case.d.sizes["pixel_values"].tolist())) > 3


def test_late_chunks_have_different_lengths():
    case = P.make_case("late")
    assert len({case.encoder(c).vectors.shape[1] for c in case.d.chunk(4)}) > 1


@pytest.mark.parametrize("queries", P.WHOLE[0])
def test_towers_end_with_images_on_both_ranks(queries):
    "两个进程的最后一块都没有字：文字塔的梯度只能靠碰一碰。"
    mine = P.part(P.make_case("towers"), queries)
    assert "input_ids" not in mine.d.chunk(3)[-1] and any("input_ids" in c for c in mine.q.chunk(3))


@pytest.mark.parametrize("family", P.FAMILIES)
def test_conditions_do_something(family):
    plain, half = P.make_case(family), P._keep_half(P.make_case(family), "")["keep"]
    sizes = lambda case: P._keep_half(case, "")["keep"] * 2
    for prepare, check in ((P._checkpointing, lambda c: sizes(c) < .6 * 2 * half), (P._add_lora, lambda c: any("lora" in n for m in c.modules for n, _ in m.named_parameters())),
                           (P._freeze, lambda c: 0 < sum(p.requires_grad for m in c.modules for p in m.parameters()) < sum(1 for m in plain.modules for _ in m.parameters()))):
        case = P.make_case(family)
        prepare(case, P.FAMILIES[family][2])
        assert check(case), prepare
    kept = [k for parts in embed(plain.encoders, [plain.q.chunk(4), plain.d.chunk(4)], half) for _, _, k in parts]
    assert any(kept) and not all(kept), "预算一半：留几块，也有不留的"
    state = torch.get_rng_state()
    case = P.make_case(family, dropout=.2)
    assert torch.equal(state, torch.get_rng_state()), "造例子不动全局的随机数"
    a, b = (case.encoders[0](case.q).vectors for _ in range(2))
    assert not torch.equal(a, b), "dropout 真的在起作用"


def test_a_chunk_does_not_change_the_embeddings():
    "分块编码 = 一起编码：参照自己站得住。"
    for family in P.FAMILIES:
        case = P.make_case(family)
        with torch.no_grad():
            for e, x in zip(case.encoders, (case.q, case.d)):
                whole, parts = e(x), [e(c) for c in x.chunk(3)]
                for w, p in zip(torch.split(whole.vectors, 3), parts):
                    L = p.vectors.shape[1]
                    assert torch.allclose(w[:, :L] * (1 if p.mask is None else p.mask[..., None]), p.vectors * (1 if p.mask is None else p.mask[..., None]), atol=1e-5), family


# ---- 两个进程：全部放进一组进程 ----

def all_quiet():
    real = room.backprop
    return patch.object(room, "backprop", lambda encoders, chunks, embedded, grads, last: real(encoders, chunks, embedded, grads))


def no_touch():
    real = room._push
    return patch.object(room, "_push", lambda e, grads, touch=None: real(e, grads))


def forward_only():
    real = room.quietly

    @contextmanager
    def quietly(encoder):
        def run(x):
            with real(encoder) as inner: return inner(x)
        yield run

    return patch.object(room, "quietly", quietly)


def some(family, start): return P.objectives_for(family)[start::6][:6]


RANK_JOBS = {
    **{f"{f}-全部损失": P.Job(f, P.objectives_for(f)) for f in ("dual", "late")},
    **{f"{f}-损失": P.Job(f, some(f, 1) + (["matryoshka_2d"] if f == "vlm" else [])) for f in ("vlm", "towers", "pair")},
    **{f"{f}-累积": P.Job(f, some(f, 2)[:3], plan=P.TWICE, options=dict(chunk_size=1)) for f in P.FAMILIES},
    **{f"{f}-LoRA": P.Job(f, some(f, 0)[:2], "lora", options=dict(chunk_size=2)) for f in P.FAMILIES},
    **{f"{f}-重算-留图": P.Job(f, some(f, 3)[:2], "checkpointing", options=dict(chunk_size=3, keep=2**40)) for f in P.FAMILIES},
    **{f"{f}-冻结-留一部分": P.Job(f, some(f, 0)[:2], "frozen", options=dict(chunk_size=2, keep=60_000)) for f in P.FAMILIES},
    "towers-no_sync 只包前向": P.Job("towers", ["infonce"], change=forward_only),  # DDP 在前向时决定同步不同步，所以没有错
    "towers-一块": P.Job("towers", ["infonce"], options=dict(chunk_size=100)),
}
BROKEN_JOBS = {"都不同步": P.Job("towers", ["infonce"], change=all_quiet), "没有碰到每个参数": P.Job("towers", ["infonce"], change=no_touch)}


@pytest.fixture(scope="module")
def ranks():
    jobs = RANK_JOBS | BROKEN_JOBS
    return dict(zip(jobs, P.check_ranks(list(jobs.values()))))


@pytest.mark.parametrize("name", RANK_JOBS)
def test_two_ranks_equal_one(ranks, name):
    assert_equal(ranks[name])


@pytest.mark.parametrize("name", BROKEN_JOBS)
def test_broken_ranks_are_detected(ranks, name):
    assert ranks[name]["infonce"].error > .05


# ---- 打破它：警报器会响 ----

def test_rng_not_replayed_is_detected():
    for family in ("dual", "towers"):
        with patch.object(room, "set_rng", lambda *state: None): assert P.prove(family, "dropout", ["infonce"])["infonce"].error > .01


def test_duplicates_as_negatives_are_detected():
    case, loss = P.make_case("dual"), P.make_loss("infonce")
    by_position = make_targets([f"q{i}" for i in range(6)], [f"d{i}" for i in range(10)])
    _, ours, _ = P.gradients([case.encoder, loss], lambda: GradCache(case.encoder, loss, 4).step(case.q, case.d, targets=by_position))
    _, theirs, _ = P.gradients([case.encoder, loss], lambda: P.plain_step(case.encoders, loss, (case.q, case.d), case.targets))
    assert P.compare(ours, theirs, loss=0, expected=0).error > .01


def test_loss_of_each_chunk_is_detected():
    "最朴素的错误：每块各算各的损失再相加（梯度累积）。"
    case, loss = P.make_case("dual"), P.make_loss("infonce")
    parts = [P.part(case, [0, 1, 2]), P.part(case, [3, 4, 5])]
    _, ours, _ = P.gradients([case.encoder, loss], lambda: sum(P.plain_step(p.encoders, loss, (p.q, p.d), p.targets, divide=2) for p in parts))
    _, theirs, _ = P.gradients([case.encoder, loss], lambda: P.plain_step(case.encoders, loss, (case.q, case.d), case.targets))
    assert P.compare(ours, theirs, loss=0, expected=0).error > .05


def test_an_outer_autocast_is_seen():
    "训练循环常常整个在 autocast 里：GradCache 算的是 bf16，参照仍是 fp32。"
    case, loss = P.make_case("dual"), P.make_loss("infonce")
    with BF16(): proof = P.check_gradcache(case.encoder, loss, case.q, case.d, targets=case.targets)
    inner = P.check_gradcache(case.encoder, loss, case.q, case.d, targets=case.targets, autocast=BF16)
    assert proof.ok and inner.ok and 1e-4 < proof.error == pytest.approx(inner.error) and "fp32" in proof.reference


def test_a_dead_loss_parameter_is_detected():
    "温度没有梯度：它只是一个数，也要看得见。"
    case, loss = P.make_case("dual"), P.make_loss("infonce")
    _, theirs, _ = P.gradients([case.encoder, loss], lambda: P.plain_step(case.encoders, loss, (case.q, case.d), case.targets))
    ours = [theirs[0], {"logit_scale": torch.zeros(())}]
    proof = P.compare(ours, theirs, loss=0, expected=0)
    assert not proof.ok and proof.worst == "损失 logit_scale" and proof.errors["编码器"] == 0


# ---- check_gradcache 的信用 ----

class Tower(nn.Module):
    "两层，可以有 dropout 和较浅的一层。"
    def __init__(self, p=0.0, layers=False):
        super().__init__()
        self.a, self.b, self.p, self.layers = nn.Linear(12, 16), nn.Linear(16, 8), p, layers

    def forward(self, inputs):
        h = nn.functional.dropout(torch.tanh(self.a(inputs["x"])), self.p, self.training)
        return Embeddings(self.b(h), None, [torch.tanh(h[:, :8])] if self.layers else [])


def batch(n=10, seed=0): return Inputs(n, {"x": torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))})
def ids(n=10): return make_targets([f"q{i}" for i in range(n)], [f"d{i}" for i in range(n)])


def build(p=0.0, **options):
    torch.manual_seed(0)
    return Tower(p, **options), InfoNCE(.1)


def flat(*modules): return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for m in modules for p in m.parameters()])


def test_check_changes_nothing():
    case, loss = P.make_case("towers", dropout=.2), P.make_loss("distill_mix")
    modules = [case.encoder, loss]
    for p in case.encoder.model.text.parameters(): p.grad = torch.ones_like(p)
    before = [(p.clone(), p.grad) for m in modules for p in m.parameters()]
    state, modes, step = torch.get_rng_state(), [m.training for e in modules for m in e.modules()], int(loss.step)
    assert P.check_gradcache(case.encoder, loss, case.q, case.d, targets=case.targets, keep=2**20).ok
    after = [(p, p.grad) for m in modules for p in m.parameters()]
    assert all(torch.equal(a, b) and g is h for (a, g), (b, h) in zip(before, after)) and all(bool((p.grad == 1).all()) for p in case.encoder.model.text.parameters())
    assert torch.equal(state, torch.get_rng_state()) and int(loss.step) == step == 0 and modes == [m.training for e in modules for m in e.modules()]


def test_check_restores_after_an_error():
    case, loss = P.make_case("dual"), InfoNCE()
    case.encoder.model.logit_scale.grad = torch.ones(())
    with pytest.raises(VembedError, match="targets 说是"): P.check_gradcache(case.encoder, loss, case.q, case.q, targets=case.targets)
    assert float(case.encoder.model.logit_scale.grad) == 1


def test_proof_reads_well():
    case = P.make_case("pair")
    proof = P.check_gradcache(case.encoder, P.make_loss("infonce"), case.q, case.d, targets=case.targets)
    assert set(proof.errors) == {"编码器 0", "编码器 1", "损失"} and proof.reference == "一整批"
    out = json.loads(json.dumps(proof.to_dict()))
    assert out["ok"] is True and out["error"] == proof.error and "相等" in repr(proof) and proof.worst in proof._repr_markdown_()
    nan = P.compare([{"w": torch.tensor([float("nan")])}, {}], [{"w": torch.ones(1)}, {}], loss=0, expected=0)
    assert not nan.ok and "不相等" in repr(nan) and nan.worst == "编码器 w"


def test_proof_names_the_worst_parameter():
    ref = {"a": torch.ones(4), "b": torch.ones(4)}
    proof = P.compare([{"a": torch.ones(4), "b": torch.full((4,), 1.1)}, {}], [ref, {}], loss=0, expected=0)
    assert proof.worst == "编码器 b" and proof.worst_error == pytest.approx(.1) and proof.error == pytest.approx(.1 / 2**.5)


def test_check_refuses():
    tower, loss = build()
    for p in [*tower.parameters(), *loss.parameters()]: p.requires_grad_(False)
    with pytest.raises(VembedError, match="没有一个要训练的参数"): P.check_gradcache(tower, loss, batch(), batch(seed=1), targets=ids())
    with patch.object(P, "world", lambda: (0, 2)), pytest.raises(VembedError, match="check_ranks"): P.check_gradcache(tower, loss, batch(), batch(seed=1), targets=ids())


# ---- 一步做完以后 ----

@pytest.mark.parametrize("keep", [0, 3000, 2**30])
def test_rng_position_after_a_step(keep):
    "一步之后的随机数，和不求导地编码一遍之后相同：留不留图，后面的训练都一样。"
    tower, loss = build(.3)
    torch.manual_seed(5)
    with torch.no_grad(): [tower(c) for x in (batch(), batch(seed=1)) for c in x.chunk(4)]
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    GradCache(tower, loss, 4, keep).step(batch(), batch(seed=1), targets=ids())
    assert torch.equal(expected, torch.get_rng_state())


def test_gradients_are_added():
    tower, loss = build()
    GradCache(tower, loss, 3).step(batch(), batch(seed=1), targets=ids())
    once = flat(tower, loss)
    for p in [*tower.parameters(), *loss.parameters()]: p.grad = torch.ones_like(p)
    GradCache(tower, loss, 3).step(batch(), batch(seed=1), targets=ids())
    assert torch.allclose(flat(tower, loss), once + 1, atol=1e-6)


@pytest.mark.parametrize("p", [0.0, .3])
def test_what_is_kept_changes_no_bit(p):
    def run(keep):
        tower, loss = build(p)
        torch.manual_seed(1)
        return GradCache(tower, loss, 3, keep).step(batch(), batch(seed=1), targets=ids()), flat(tower, loss)
    value, grad = run(0)
    assert all(torch.equal(value, v) and torch.equal(grad, g) for v, g in map(run, (1, 2000, 5000, 10_000, 2**30, "auto")))


def test_budget_is_obeyed():
    tower, _ = build()
    with graph_bytes(tower) as one: tower(batch(3))
    for budget in (0, one[0] - 1, one[0], 2 * one[0], 2 * one[0] + 1, 3 * one[0], 100 * one[0]):
        kept = [k for _, _, k in embed([tower], [batch(12).chunk(3)], budget)[0]]
        assert sum(kept) * one[0] <= budget and sum(kept) >= min(4, budget // one[0] - 1), (budget, kept)


def test_nothing_is_left_in_memory():
    "一步之后，留着的图都放掉了，不必等垃圾回收。"
    def alive():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
    tower, loss = build()
    cache, q, d, t = GradCache(tower, loss, 3, 2**30), batch(), batch(seed=1), ids()
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(4):
            cache.step(q, d, targets=t)
            counts.append(alive())
    finally: gc.enable()
    assert len(set(counts[1:])) == 1, counts


def test_three_training_steps():
    "连着三步 SGD，参数走到同一处。"
    def run(step):
        case, loss = P.make_case("dual"), P.make_loss("infonce")
        optimizer = torch.optim.SGD([*case.encoder.parameters(), *loss.parameters()], .5)
        for _ in range(3):
            optimizer.zero_grad()
            step(case, loss)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in [*case.encoder.parameters(), *loss.parameters()]])
    a = run(lambda c, loss: GradCache(c.encoder, loss, 4, keep=50_000).step(c.q, c.d, targets=c.targets))
    b = run(lambda c, loss: P.plain_step(c.encoders, loss, (c.q, c.d), c.targets))
    assert (a - b).norm() / b.norm() < 1e-5


def test_grad_scaler_unscales_to_the_same_gradient():
    tower, loss = build()
    scaler, params = torch.amp.GradScaler("cpu", init_scale=2.0**12), [*tower.parameters(), *loss.parameters()]
    optimizer = torch.optim.SGD(params, 1.0)
    P.plain_step([tower, tower], loss, (batch(), batch(seed=1)), ids())
    plain, start = flat(tower, loss), [p.detach().clone() for p in params]
    optimizer.zero_grad()
    value = GradCache(tower, loss, 4, scaler=scaler).step(batch(), batch(seed=1), targets=ids(), divide=2)
    assert float(flat(tower).norm()) > 100 * float(plain.norm()), "还没有除回来"
    scaler.unscale_(optimizer)
    assert torch.allclose(flat(tower, loss), plain / 2, rtol=1e-4, atol=1e-7) and float(value) == pytest.approx(loss(tower(batch()), tower(batch(seed=1)), ids()).item(), rel=1e-5)
    scaler.step(optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(start, params))


# ---- 输入的各种样子 ----

class Three(nn.Module):
    "吃三个嵌入、不要 targets 的损失。"
    def forward(self, a, b, c): return ((a.vectors * b.vectors).sum(1) - (a.vectors * c.vectors).sum(1)).logsumexp(0)


def test_three_inputs_share_an_encoder():
    tower, _ = build()
    assert P.check_gradcache(tower, Three(), batch(5), batch(5, 1), batch(5, 2), chunk_size=2).ok
    assert P.check_gradcache([tower, build()[0], tower], Three(), batch(5), batch(5, 1), batch(5, 2), chunk_size=2).ok


class Shallow(nn.Module):
    "只看较浅的一层，或两层都看。"
    def __init__(self, both): super().__init__(); self.both = both
    def forward(self, q, d, targets):
        value = (q.layers[0] @ d.layers[0].T).logsumexp(1).mean()
        return value + (q.vectors @ d.vectors.T).logsumexp(1).mean() if self.both else value


@pytest.mark.parametrize("both", [True, False])
def test_layers_are_carried(both):
    tower, _ = build(layers=True)
    assert P.check_gradcache(tower, Shallow(both), batch(), batch(seed=1), targets=ids()).ok
    GradCache(tower, Shallow(both), 4).step(batch(), batch(seed=1), targets=ids())
    assert float(tower.a.weight.grad.norm()) > 0 and (tower.b.weight.grad is None) is not both


def test_dropping_the_layers_is_detected():
    tower, _ = build(layers=True)
    replaced = Embeddings.replaced
    with patch.object(Embeddings, "replaced", lambda e, tensors: replaced(e, [tensors[0], *(t.detach() for t in tensors[1:])])):
        assert P.check_gradcache(tower, Shallow(True), batch(), batch(seed=1), targets=ids()).error > .05


def test_frozen_parts_get_no_gradient():
    case = P.make_case("pair")
    P._freeze(case, "text")
    GradCache(case.encoder, P.make_loss("infonce"), 4, keep=2**20).step(case.q, case.d, targets=case.targets)
    text, image = case.encoder
    assert all(p.grad is None for p in text.parameters()) and any(float(p.grad.norm()) > 0 for p in image.parameters() if p.grad is not None)


def test_an_encoder_without_parameters():
    "文档的向量是算好的：没有参数的编码器。"
    class Fixed(nn.Module):
        def forward(self, x): return Embeddings(x["x"][:, :8])
    tower, loss = build()
    assert P.check_gradcache([tower, Fixed()], loss, batch(), batch(seed=1), targets=ids()).ok


def test_one_pair_has_no_gradient():
    tower, loss = build()
    with pytest.warns(UserWarning, match="只有一对"): value = GradCache(tower, loss, 4).step(batch(1), batch(1, 1), targets=ids(1))
    assert float(value) == pytest.approx(0, abs=1e-6) and float(flat(tower).norm()) < 1e-6


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 13), keep=st.integers(0, 20_000), n=st.integers(2, 12))
def test_any_chunk_and_any_budget(size, keep, n):
    tower, loss = build()
    assert P.check_gradcache(tower, loss, batch(n), batch(n, 1), targets=ids(n), chunk_size=size, keep=keep).error < 1e-5


# ---- BatchNorm ----

def test_batchnorm_is_refused_or_frozen():
    case, loss = P.make_case("dual"), P.make_loss("infonce")
    P._add_batchnorm(case, "")
    case.encoder.train()
    with pytest.raises(VembedError, match="BatchNorm.*freeze_batchnorm"): GradCache(case.encoder, loss, 4).step(case.q, case.d, targets=case.targets)
    freeze_batchnorm(case.encoder)
    mean = case.encoder.norm.running_mean.clone()
    assert P.check_gradcache(case.encoder, loss, case.q, case.d, targets=case.targets).ok and torch.equal(mean, case.encoder.norm.running_mean)


def test_batchnorm_without_running_statistics_is_refused():
    "它在 eval 状态也用这一块的统计量。"
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.norm = nn.BatchNorm1d(12, track_running_stats=False)
        def forward(self, x): return Embeddings(self.norm(x["x"]))

    net = Net().eval()
    with pytest.raises(VembedError, match="track_running_stats"): GradCache(net, InfoNCE(), 4).step(batch(), batch(seed=1), targets=ids())


# ---- 内存不够 ----

class Narrow(Tower):
    "一块超过 limit 个样本就放不下。"
    def __init__(self, limit, error=torch.OutOfMemoryError("假装的"), **options):
        super().__init__(**options)
        self.limit, self.error, self.seen = limit, error, []

    def forward(self, inputs):
        self.seen.append(len(inputs))
        if len(inputs) > self.limit: raise self.error
        return super().forward(inputs)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("假装的"), RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")])
def test_auto_chunk_halves_until_it_fits(error):
    tower, loss = Narrow(5, error), InfoNCE(.1)
    tower.a.weight.grad, state = torch.ones(16, 12), torch.get_rng_state()
    limit = find_limit(tower, batch(16))
    assert limit == 4 * 12 and float(tower.a.weight.grad.sum()) == 16 * 12 and tower.b.weight.grad is None and torch.equal(state, torch.get_rng_state())
    tower.a.weight.grad = None
    assert P.check_gradcache(tower.requires_grad_(True), loss, batch(5), batch(5, 1), targets=ids(5), chunk_size="auto").ok


def test_auto_chunk_is_found_once_per_input():
    tower, loss = Narrow(5), InfoNCE(.1)
    cache = GradCache(tower, loss, "auto")
    for _ in range(2): cache.step(batch(16), batch(16, 1), targets=ids(16))
    assert cache.limits == {0: 48, 1: 48} and sum(n > 5 for n in tower.seen) == 4, tower.seen


def test_auto_limit_is_not_taken_from_the_short_texts():
    "短的字不该决定图的块：每个输入各找各的。"
    case = P.make_case("pair")
    cache = GradCache(case.encoder, P.make_loss("infonce"), "auto")
    cache.step(case.q, case.d, targets=case.targets)
    assert [len(cache.split(i, e, x)) for i, (e, x) in enumerate(zip(case.encoders, (case.q, case.d)))] == [1, 1]


def test_auto_chunk_follows_the_cost():
    "样本有长有短：按代价切，块的代价都不超过上限，一个样本也不丢。"
    case = P.make_case("vlm")
    total = room.costs(case.d)
    chunks = split(case.d, limit=int(total.max()))
    assert all(int(room.costs(c).sum()) <= int(total.max()) for c in chunks) and sum(map(len, chunks)) == 10 and len({len(c) for c in chunks}) > 1
    for names in ("pixel_values", "input_ids"): assert torch.equal(torch.cat([c[names] for c in chunks if names in c]), case.d[names])


def test_auto_chunk_gives_up_clearly():
    with pytest.raises(VembedError, match="一个样本.*也放不进内存"): find_limit(Narrow(0), batch(4))


def test_auto_chunk_lets_other_errors_through():
    with pytest.raises(RuntimeError, match="别的错误"): find_limit(Narrow(2, RuntimeError("别的错误")), batch(4))
    frozen = Tower().requires_grad_(False)
    assert find_limit(frozen, batch(4)) == 48


class Created(TorchDispatchMode):
    "记下每个算子造出的存储；之后看谁还活着。"
    def __init__(self): super().__init__(); self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self.made[t.untyped_storage()._cdata] = (StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes())
        return out

@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", P.FAMILIES)
def test_graph_bytes_is_honest(family, recompute):
    "数出来的，与前向之后真正还活着的存储相差不超过一成（重算时，闭包里的位置编码数不到）。"
    case = P.make_case(family)
    if recompute: P._checkpointing(case, "")
    e, x, mode = case.encoders[1], case.d, Created()
    with graph_bytes(e) as size, mode: out = e(x)
    out = out.vectors.grad_fn  # 只留图
    gc.collect()
    known = {t.untyped_storage()._cdata for t in [*e.parameters(), *e.buffers(), *x.tensors.values()]}
    real = sum(n for where, (ref, n) in mode.made.items() if where not in known and not ref.expired())
    inputs = sum(t.nbytes for t in x.tensors.values())
    assert out is not None and .9 * real <= size[0] <= 1.02 * (real + inputs), (real, size[0], inputs)


def test_graph_bytes_counts_a_storage_once_and_no_parameters():
    tower, _ = build()
    x = batch(50)
    with graph_bytes(tower) as size: tower(x)
    assert size[0] == x["x"].nbytes + 50 * 16 * 4, "输入一份，tanh 的结果一份；参数不算"
    with graph_bytes(tower) as size, torch.no_grad(): tower(x)
    assert size[0] == 0


# ---- 说清楚的错误 ----

@pytest.mark.parametrize("make, words", [
    (lambda t, loss: GradCache(t, loss, 0), "chunk_size=0"),
    (lambda t, loss: GradCache(t, loss, 2.5), "chunk_size=2.5"),
    (lambda t, loss: GradCache(t, loss, "big"), "chunk_size='big'"),
    (lambda t, loss: GradCache(t, loss, 4, keep=-1), "keep=-1"),
    (lambda t, loss: GradCache(t, loss, 4, keep=1e9), "keep=1000000000.0"),
    (lambda t, loss: GradCache([t], loss, 4).step(batch(), batch(seed=1), targets=ids()), "1 个编码器.*2 个输入"),
    (lambda t, loss: GradCache(t, loss, 4).step(batch()["x"], batch(seed=1), targets=ids()), "Inputs.*Tensor"),
    (lambda t, loss: GradCache(t, loss, 4).step(batch(), batch(9, 1), targets=ids()), "10 个查询和 10 个文档"),
])
def test_errors_say_what_to_do(make, words):
    with pytest.raises(VembedError, match=words): make(*build())


def test_nan_is_named_and_leaves_no_gradient():
    tower, loss = build()
    bad = batch()
    bad["x"][7, 3] = float("nan")
    with pytest.raises(VembedError, match="第 7 行有 NaN"): GradCache(tower, loss, 4).step(bad, batch(seed=1), targets=ids())
    assert all(p.grad is None for p in tower.parameters())
