"""MaxSim 和晚交互的损失：与同行的金值相等，与逐 token 的定义（naive.py）相等；补齐多长、补的是什么，都不要紧。"""
import pytest
import torch
import torch.nn.functional as F
from golden import agree, golden, leaves, names
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import Batch, Biggest, infonce, maxsims, messy, pairwise, plain, token_max
from torch.func import functional_call

from vembed_nb.core import VembedError
from vembed_nb.losses import late
from vembed_nb.losses.late import ColBERTLoss, ColBERTPairwise, pool_tokens
from vembed_nb.vectors import Embeddings, concat, maxsim

pytestmark = pytest.mark.filterwarnings("ignore:一批只有一对")
few = settings(max_examples=15, deadline=None, derandomize=True)
seeds, sizes, extras = st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 3)
blocks = st.sampled_from([1, 7, 40, 2**20])
OPTIONS = [dict(), dict(reduce="sum"), dict(directions=("q2d", "d2q")), dict(directions=("q2d", "d2q"), positives="all"), dict(joint=True, directions=("q2d", "d2q")), dict(negatives="own"),
           dict(variant="decoupled"), dict(variant="debiased", prior=0.2), dict(margin=0.1), dict(hardness=5.0, hardness_on="hard"), dict(hardness=5.0, hardness_on="in_batch", margin=0.0)]
name_of = lambda o: "-".join(f"{k}={'+'.join(v) if isinstance(v, tuple) else v}" for k, v in o.items()) or "default"
PAIRWISE = [dict(), dict(reduce="sum")]
MAKERS = [lambda o=o: ColBERTLoss(0.2, **o).double() for o in OPTIONS] + [lambda o=o: ColBERTPairwise(0.2, learn_temperature=True, **o).double() for o in PAIRWISE]
every_loss = pytest.mark.parametrize("make", MAKERS, ids=[*map(name_of, OPTIONS), *(f"pairwise-{name_of(o)}" for o in PAIRWISE)])


def tokens(seed, n, longest=4, dim=3, dtype=torch.float64, ragged=True):
    "(向量 [n, L, D], 掩码)；掩码挖了洞，每个至少留一个；遮住的位置是很大的乱数。"
    g = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(n, longest, dim, generator=g, dtype=dtype), torch.rand(n, longest, generator=g) > (0.4 if ragged else -1)
    mask[torch.arange(n), torch.randint(0, longest, (n,), generator=g)] = True
    return torch.where(mask[..., None], x, 50 * x), mask


def grads(loss, q, d, qm, dm, targets):
    "(值, 对 q、d 和可学的参数的梯度)。"
    q, d = q.clone().requires_grad_(), d.clone().requires_grad_()
    value = loss(Embeddings(q, qm), Embeddings(d, dm), targets)
    return value.detach(), *torch.autograd.grad(value, [q, d, *(p for p in loss.parameters() if p.requires_grad)], allow_unused=True, materialize_grads=True)


def close(got, want, rtol=1e-8, floor=1e-8):
    for k, (a, b) in enumerate(zip(got, want, strict=True)):
        far = (a.double() - b.double()).norm()
        assert far <= rtol * b.double().norm() + floor, f"第 {k} 个：{a} ≠ {b}"


def defined(loss, q, d, qm, dm, batch):
    "按定义算的 (值, 对 q、d 和 log s 的梯度)。"
    q, d, log_s = (x.detach().double().requires_grad_() for x in (q, d, loss.logit_scale))
    sims = maxsims(q, d, qm, dm, loss.reduce)
    options = {k: getattr(loss, k, None) for k in ("directions", "joint", "positives", "negatives", "variant", "prior", "margin", "hardness", "hardness_on")}
    value = pairwise(sims, batch, log_s.exp()) if isinstance(loss, ColBERTPairwise) else infonce(sims, batch, log_s.exp(), **options)
    return value.detach(), *torch.autograd.grad(value, [q, d, log_s], allow_unused=True, materialize_grads=True)


# ---------------------------------------------------------------- 金值

@pytest.fixture
def raw(monkeypatch):
    "同行的晚交互损失不归一化（模型已经做了）：金值的输入照原样进去。归一化由 `defined` 那一边来证。"
    monkeypatch.setattr(late, "normalize", lambda x, mask=None: x)


PRECISION = pytest.mark.parametrize("dtype, rtol", [(torch.float64, 2e-5), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
ST, COLPALI = "sentence_transformers_multi_vector", "colpali_engine"


def masks(case, *keys): return [case["inputs"][k].bool() for k in keys if k in case["inputs"]]


@PRECISION
@pytest.mark.parametrize("block", [1, 30, 2**20])
@pytest.mark.parametrize("peer, name", [(p, n) for p, stem in ((ST, "maxsim"), (COLPALI, "score_multi_vector"), ("maxsim_cpu", "maxsim")) for n in names(p, stem)])
def test_maxsim_equals_peers(peer, name, block, dtype, rtol):
    case = golden(peer)[name]
    (q, d), (qm, dm) = leaves(case, "queries", "documents", dtype=dtype), masks(case, "query_mask", "document_mask")
    value = maxsim(Embeddings(q, qm), Embeddings(d, dm), "mean" if name == "maxsim_mean" else "sum", block)
    agree(case, value, dict(zip(case["grads"], torch.autograd.grad(value.sum(), [q, d]))), rtol)


@PRECISION
@pytest.mark.parametrize("name", names(ST, "mnrl"))
def test_colbert_equals_sentence_transformers(name, dtype, rtol, raw):
    "难反例 [K, B, L, D] 一列一列接在正例后面；第 k 列的第 i 个属于第 i 个查询。"
    case = golden(ST)[name]
    x, m = leaves(case, "queries", "positives", "negatives", dtype=dtype), masks(case, "query_mask", "positive_mask", "negative_mask")
    K = len(x[2]) if len(x) > 2 else 0
    d = concat([Embeddings(v, k) for v, k in zip([x[1], *(x[2] if K else [])], [m[1], *(m[2] if K else [])])])
    loss = ColBERTLoss(1 / case["params"]["scale"], reduce="mean" if name == "mnrl_mean" else "sum").to(dtype)
    value = loss(Embeddings(x[0], m[0]), d, plain(len(x[0]), [*range(len(x[0]))] * K).targets())
    agree(case, value, dict(zip(case["grads"], torch.autograd.grad(value, x))), rtol)


@PRECISION
@pytest.mark.parametrize("name", ["colbert", "colbert_sum", "colbert_all_negative", "colbert_one", "pairwisece", "pairwisece_all_negative"])
def test_colbert_equals_colpali(name, dtype, rtol, raw):
    case = golden(COLPALI)[name]
    (q, d), (qm, dm) = leaves(case, "queries", "positives", dtype=dtype), masks(case, "query_mask", "positive_mask")
    loss = (ColBERTPairwise if name.startswith("pair") else ColBERTLoss)(case["params"]["temperature"], reduce="mean" if case["params"].get("normalize_scores", True) else "sum").to(dtype)
    value = loss(Embeddings(q, qm), Embeddings(d, dm), plain(len(q)).targets())
    agree(case, value, dict(zip(case["grads"], torch.autograd.grad(value, [q, d]))), rtol)


@PRECISION
def test_offset_equals_colpali(dtype, rtol, raw):
    "它的 offset=2：两个查询的正例是第 2、3 篇。我们让正例排在前面，别人的排在后面。"
    case = golden(COLPALI)["colbert_offset2"]
    (q, d), (qm, dm), order = leaves(case, "queries", "positives", dtype=dtype), masks(case, "query_mask", "positive_mask"), [2, 3, 0, 1]
    value = ColBERTLoss(case["params"]["temperature"]).to(dtype)(Embeddings(q[:2], qm[:2]), Embeddings(d[order], dm[order]), plain(2, [-1, -1]).targets())
    agree(case, value, dict(zip(("queries", "positives"), torch.autograd.grad(value, [q, d]))), rtol)


def test_where_padding_wins(raw):
    "相似度全是负数时，同行补的零赢了最大值：它的值不对，我们的是遮住以后的定义。全被遮住的文档它给 -1e9，我们说清楚。"
    case = golden(COLPALI)["colbert_padding_wins"]
    (q, d), (qm, dm) = leaves(case, "queries", "positives"), masks(case, "query_mask", "positive_mask")
    loss, batch = ColBERTLoss(case["params"]["temperature"]).double(), plain(len(q))
    right = F.cross_entropy(token_max(q, d, qm, dm, "mean") / case["params"]["temperature"], torch.arange(len(q)))
    value = loss(Embeddings(q, qm), Embeddings(d, dm), batch.targets())
    assert torch.allclose(value, right, rtol=1e-6) and abs(value - case["want"]) > 0.1
    case = golden(COLPALI)["score_multi_vector_all_negative_padding_wins"]
    (q, d), (qm, dm) = leaves(case, "queries", "documents"), masks(case, "query_mask", "document_mask")
    value = maxsim(Embeddings(q, qm), Embeddings(d, dm))
    assert torch.allclose(value, token_max(q, d, qm, dm)) and (value - case["want"]).abs().max() > 0.1
    case = golden(ST)["maxsim_empty_document"]
    (q, d), (qm, dm) = leaves(case, "queries", "documents"), masks(case, "query_mask", "document_mask")
    assert case["want"].min() <= -1e9
    with pytest.raises(VembedError, match="第 1 篇文档"): maxsim(Embeddings(q, qm), Embeddings(d, dm))


@pytest.mark.parametrize("which", [0, 1], ids=["query", "document"])
def test_a_dropped_mask_is_detected(which, raw):
    "打破它：把一边的掩码全当成真的，就不再等于金值。"
    case = golden(ST)["mnrl_neg0"]
    (q, d), m = leaves(case, "queries", "positives"), masks(case, "query_mask", "positive_mask")
    m[which] = torch.ones_like(m[which])
    value = ColBERTLoss(1.0, reduce="sum").double()(Embeddings(q, m[0]), Embeddings(d, m[1]), plain(len(q)).targets())
    with pytest.raises(AssertionError, match="mnrl_neg0"): agree(case, value, {})


# ---------------------------------------------------------------- 等于定义

@pytest.mark.parametrize("reduce", ["sum", "mean"])
@given(seeds, sizes, st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), blocks)
@settings(few, max_examples=30)
def test_maxsim_is_the_definition(reduce, seed, Nq, Nd, Lq, Ld, D, block):
    "任意的形状、掩码、块；值和梯度；遮住的位置梯度是 0；不求导时值一样。"
    (q, qm), (d, dm) = tokens(seed, Nq, Lq, D), tokens(seed + 1, Nd, Ld, D)
    x, y = [v.clone().requires_grad_() for v in (q, d)], [v.clone().requires_grad_() for v in (q, d)]
    got, want, g = maxsim(Embeddings(x[0], qm), Embeddings(x[1], dm), reduce, block), token_max(*y, qm, dm, reduce), torch.randn(Nq, Nd, dtype=torch.float64)
    close([got, *torch.autograd.grad(got, x, g)], [want, *torch.autograd.grad(want, y, g)], 1e-10, 1e-10)
    assert torch.equal(got, maxsim(Embeddings(q, qm), Embeddings(d, dm), reduce, block))
    got = maxsim(Embeddings(q, qm), Embeddings(d.requires_grad_(), dm), reduce, block)  # 只有一边要梯度
    close(torch.autograd.grad(got, d, g), torch.autograd.grad(token_max(*y, qm, dm, reduce), y[1], g), 1e-10, 1e-10)


@every_loss
@given(seeds, sizes, extras)
@few
def test_loss_is_the_definition(make, seed, B, extra):
    "随机的重复、多正例、组、主人、掩码；值和对 q、d、温度的梯度。"
    (q, qm), (d, dm), batch, loss = tokens(seed, B), tokens(seed + 1, B + extra, 5), messy(seed, B, extra), make()
    if isinstance(loss, ColBERTPairwise) and batch.positive().all(1).any(): loss.logit_scale.requires_grad_(False)  # 见 test_pairwise_row_without_negatives
    got, want = grads(loss, q, d, qm, dm, batch.targets()), defined(loss, q, d, qm, dm, batch)
    close(got, want[:len(got)])


@given(seeds, sizes, extras)
@few
def test_pairwise_of_single_vectors(seed, B, extra):
    "单向量就是长度为 1 的多向量。"
    (q, qm), (d, dm), batch, loss = tokens(seed, B, 1), tokens(seed + 1, B + extra, 1), messy(seed, B, extra), ColBERTPairwise(0.2).double()
    assert torch.allclose(loss(Embeddings(q[:, 0]), Embeddings(d[:, 0]), batch.targets()), loss(Embeddings(q, qm), Embeddings(d, dm), batch.targets()))


@every_loss
@given(seeds, st.integers(2, 4), extras)
@settings(few, max_examples=6)
def test_order_does_not_matter(make, seed, B, extra):
    (q, qm), (d, dm), batch, loss = tokens(seed, B), tokens(seed + 1, B + extra, 5), messy(seed, B, extra), make()
    loss.logit_scale.requires_grad_(False)
    shuffle = lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    order, more = shuffle(B), shuffle(extra)
    docs = order + [B + k for k in more]
    value, dq, dd = grads(loss, q, d, qm, dm, batch.targets())
    close(grads(loss, q[order], d[docs], qm[order], dm[docs], batch.permuted(order, more).targets()), [value, dq[order], dd[docs]])


@every_loss
@given(seeds, st.integers(2, 4), extras, st.integers(1, 3))
@settings(few, max_examples=6)
def test_ranks_share_the_loss(make, seed, B, extra, cut):
    "两个进程各算自己的查询，取平均正好是整体。"
    (q, qm), (d, dm), batch, loss, cut = tokens(seed, B), tokens(seed + 1, B + extra, 5), messy(seed, B, extra), make(), min(cut, B - 1)
    loss.logit_scale.requires_grad_(False)
    shares = [grads(loss, q, d, qm, dm, batch.targets(start=a, stop=b, ranks=2))[:3] for a, b in ((0, cut), (cut, B))]
    close([(x + y) / 2 for x, y in zip(*shares)], grads(loss, q, d, qm, dm, batch.targets()))


@every_loss
@given(seeds, sizes, extras, st.integers(0, 3), st.integers(0, 3))
@settings(few, max_examples=6)
def test_padding_does_not_matter(make, seed, B, extra, more_q, more_d):
    "两边再补任意长的乱数（有的很大），损失和真实 token 的梯度不变，补的地方梯度是 0。"
    (q, qm), (d, dm), targets, loss = tokens(seed, B), tokens(seed + 1, B + extra, 5), messy(seed, B, extra).targets(), make()
    loss.logit_scale.requires_grad_(False)
    junk = lambda x, n: torch.cat([x, 1e3 * torch.randn(len(x), n, 3, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)], 1)
    value, dq, dd = grads(loss, q, d, qm, dm, targets)
    padded = grads(loss, junk(q, more_q), junk(d, more_d), F.pad(qm, (0, more_q)), F.pad(dm, (0, more_d)), targets)
    close(padded, [value, F.pad(dq, (0, 0, 0, more_q)), F.pad(dd, (0, 0, 0, more_d))])
    assert not dq[~qm].any() and not dd[~dm].any()


@every_loss
@given(seeds, sizes, extras)
@settings(few, max_examples=6)
def test_length_of_a_token_does_not_matter(make, seed, B, extra):
    (q, qm), (d, dm), targets, loss = tokens(seed, B), tokens(seed + 1, B + extra, 5), messy(seed, B, extra).targets(), make()
    loss.logit_scale.requires_grad_(False)
    a, b = (torch.rand(*m.shape, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1 for m in (qm, dm))
    value, dq, dd = grads(loss, q, d, qm, dm, targets)
    close(grads(loss, q * a, d * b, qm, dm, targets), [value, dq / a, dd / b])




@pytest.mark.parametrize("make", [pytest.param(ColBERTLoss), ColBERTPairwise])
def test_a_rank_without_queries(make):
    "没有查询的进程，它的那一份是 0（InfoNCE 和 SigmoidLoss 已经如此）。"
    (q, qm), (d, dm) = tokens(0, 3), tokens(1, 3)
    value, *found = grads(make(), q, d, qm, dm, plain(3).targets(start=3, ranks=2))
    assert value == 0 and not any(g.any() for g in found)




@pytest.mark.parametrize("side", [0, pytest.param(1)], ids=["query", "document"])
def test_tokens_not_contiguous(side):
    (q, qm), (d, dm), targets, loss = tokens(0, 3), tokens(1, 4, 5), plain(3, [0]).targets(), ColBERTLoss(0.1).double()
    want = grads(loss, q, d, qm, dm, targets)
    x = [q, d]
    x[side] = x[side].transpose(1, 2).contiguous().transpose(1, 2)
    close(grads(loss, *x, qm, dm, targets), want)


# ---------------------------------------------------------------- 遮住的位置里是 NaN 或 Inf

POISON = pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])




def poisoned(value, side):
    "一批，一边遮住的位置换成 value；以及原来的值和真实位置的梯度。"
    (q, qm), (d, dm), targets = tokens(1, 3, dtype=torch.float32), tokens(2, 4, 5, dtype=torch.float32), plain(3, [0]).targets()
    assert not qm.all() and not dm.all()
    want = grads(ColBERTLoss(0.1), q, d, qm, dm, targets)
    if side == "query": q = torch.where(qm[..., None], q, value)
    else: d = torch.where(dm[..., None], d, value)
    return want, grads(ColBERTLoss(0.1), q, d, qm, dm, targets), qm, dm


@POISON
@pytest.mark.parametrize("side", [pytest.param("query"), "document"])
def test_masked_nan_does_not_reach_real_tokens(value, side):
    want, got, qm, dm = poisoned(value, side)
    close([got[0], got[1][qm], got[2][dm], got[3]], [want[0], want[1][qm], want[2][dm], want[3]], 1e-6)


@POISON
@pytest.mark.parametrize("side", ["query", "document"])
def test_masked_nan_has_no_gradient(value, side):
    _, got, qm, dm = poisoned(value, side)
    assert not got[1][~qm].any() and not got[2][~dm].any()


@POISON
def test_maxsim_ignores_masked_nan(value):
    (q, qm), (d, dm) = tokens(1, 3), tokens(2, 4, 5)
    got = maxsim(*(Embeddings(torch.where(m[..., None], v, value), m) for v, m in ((q, qm), (d, dm))))
    assert torch.equal(got, maxsim(Embeddings(q, qm), Embeddings(d, dm)))


# ---------------------------------------------------------------- 刁难

def hard_cases():
    (q, qm), (d, dm) = tokens(0, 3, 4), tokens(1, 6, 5)
    line = torch.randn(3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    toward = lambda x, sign: sign * line + 0.1 * F.normalize(x, dim=-1)
    yield "all-negative", toward(q, 1), toward(d[:3], -1), qm, dm[:3], plain(3)
    yield "duplicate-documents", q, d[[0, 1, 2, 0, 0]], qm, dm[[0, 1, 2, 0, 0]], plain(3, [0, 1])
    yield "one", q[:1], d[:1], qm[:1], dm[:1], plain(1)
    yield "one-token", q[:, :1], d[:, :1], torch.ones(3, 1).bool(), torch.ones(6, 1).bool(), plain(3, [0, -1, 2])
    yield "ragged", q, d, qm, dm, plain(3, [0, 0, -1])
    everyone, group = plain(3, [0, 1, 2]), plain(3, [0, 1, 2])
    everyone.positives = [[*everyone.doc_ids]] * 3
    group.query_groups, group.doc_groups = ["g"] * 3, ["g"] * 6
    yield "every-document-positive", q, d, qm, dm, everyone
    yield "one-group", q, d, qm, dm, group


HARD = {n: x for n, *x in hard_cases()}


@pytest.mark.parametrize("options", [*OPTIONS, "pairwise"], ids=lambda o: o if isinstance(o, str) else name_of(o))
@pytest.mark.parametrize("temperature", [0.01, 0.5])
@pytest.mark.parametrize("case", HARD)
def test_hard_cases_are_finite_and_right(case, temperature, options):
    q, d, qm, dm, batch = HARD[case]
    if case == "duplicate-documents" and options == "pairwise": batch = Batch(batch.query_ids, ["d0", "d1", "d2", "d0", "d0"], *list(vars(batch).values())[2:])  # 反例并列第一时梯度不唯一，这里按 id 认作正例
    for dtype, tol in ((torch.float64, 1e-8), (torch.float32, 2e-3)):
        loss = (ColBERTPairwise(temperature) if options == "pairwise" else ColBERTLoss(temperature, **options)).to(dtype)
        want, got = defined(loss, q, d, qm, dm, batch), grads(loss, q.to(dtype), d.to(dtype), qm, dm, batch.targets())
        close(got, want[:len(got)], tol, tol)


@pytest.mark.parametrize("case", ["one", "every-document-positive"])
def test_pairwise_row_without_negatives(case):
    q, d, qm, dm, batch = HARD[case]
    found = grads(ColBERTPairwise(0.1, learn_temperature=True), q, d, qm, dm, batch.targets())
    close(found, [torch.zeros_like(v) for v in found])


def test_equal_tokens_share_one_winner():
    "并列的 token：值不变，梯度只走一个，总和等于应有的那一份。"
    q, d = torch.tensor([[[1.0, 0]]]), torch.tensor([[[2.0, 0], [2, 0], [2, 0]]], requires_grad=True)
    score = maxsim(Embeddings(q, torch.ones(1, 1).bool()), Embeddings(d, torch.ones(1, 3).bool()))
    score.sum().backward()
    assert score.item() == 2 and torch.equal(d.grad.sum(1), q[0]) and (d.grad[0].abs().sum(1) > 0).sum() == 1


HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
SOME = {"colbert": lambda: ColBERTLoss(0.1), "colbert-two-ways": lambda: ColBERTLoss(0.1, directions=("q2d", "d2q"), positives="all"), "pairwise": lambda: ColBERTPairwise(0.1, learn_temperature=True)}


@HALF
@pytest.mark.parametrize("name", SOME)
def test_half_precision_in_fp32_out(name, dtype):
    (q, qm), (d, dm), targets, loss = tokens(0, 3, dtype=dtype), tokens(1, 4, 5, dtype=dtype), plain(3, [0]).targets(), SOME[name]()
    got, want = grads(loss, q, d, qm, dm, targets), grads(loss, q.float(), d.float(), qm, dm, targets)
    assert got[0].dtype == torch.float32 and torch.equal(got[0], want[0]) and got[1].dtype == dtype
    close(got, want, 1e-2, 1e-4)
    assert maxsim(Embeddings(q, qm), Embeddings(d, dm)).dtype == torch.float32




@pytest.mark.parametrize("inside", [False, pytest.param(True)], ids=["out", "in"])
@pytest.mark.parametrize("name", SOME)
def test_autocast_changes_nothing(name, inside):
    (q, qm), (d, dm), targets, loss = tokens(0, 3, dtype=torch.float32), tokens(1, 4, 5, dtype=torch.float32), plain(3, [0]).targets(), SOME[name]()
    want, x = grads(loss, q, d, qm, dm, targets), [v.clone().requires_grad_() for v in (q, d)]
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(Embeddings(x[0], qm), Embeddings(x[1], dm), targets)
        if inside: value.backward()
    if not inside: value.backward()
    assert value.dtype == torch.float32
    close([value.detach(), *(v.grad for v in (*x, loss.logit_scale))], want, 1e-6, 1e-7)


@pytest.mark.parametrize("options", [dict(), dict(reduce="sum", directions=("q2d", "d2q")), dict(negatives="own", positives="mask", variant="decoupled"), dict(positives="all")], ids=name_of)
def test_gradcheck(options):
    (q, qm), (d, dm), batch, loss = tokens(0, 3, 3), tokens(1, 5, 3), plain(3, [0, 0]), ColBERTLoss(**options).double()
    q, d = q.where(qm[..., None], 1), d.where(dm[..., None], 1)  # 遮住的 50 倍乱数只会让有限差分不准
    batch.query_ids[1] = "q0"
    targets = batch.targets()
    fn = lambda q, d, s: functional_call(loss, {"logit_scale": s}, (Embeddings(q, qm), Embeddings(d, dm), targets))
    assert torch.autograd.gradcheck(fn, [q.requires_grad_(), d.requires_grad_(), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)])


# ---------------------------------------------------------------- 内存

def test_maxsim_makes_no_grid_of_tokens():
    "32×16 个查询 token 对 64×32 个文档 token，一块 16,384：最大的张量是一块或每对（查询 token，文档）一个数，不是全部的对。"
    (q, qm), (d, dm) = tokens(0, 32, 16, 8, torch.float32), tokens(1, 64, 32, 8, torch.float32)
    q, d = q.requires_grad_(), d.requires_grad_()
    with Biggest() as seen: maxsim(Embeddings(q, qm), Embeddings(d, dm), block=2**14).sum().backward()
    assert seen.numel <= 32 * 16 * 64 < 32 * 16 * 64 * 32 / 16
    with Biggest() as whole: token_grid(q, d)
    assert whole.numel == 32 * 16 * 64 * 32


def token_grid(q, d): return torch.einsum("ald,bmd->abml", q, d)


def test_colbert_makes_no_grid_of_tokens():
    "训练的尺寸：64 个查询 × 32 token，64 篇 × 256 token，全部的对有 3,355 万。"
    q, d = torch.randn(64, 32, 16, requires_grad=True), torch.randn(64, 256, 16, requires_grad=True)
    with Biggest() as seen: ColBERTLoss()(Embeddings(q, torch.ones(64, 32).bool()), Embeddings(d, torch.ones(64, 256).bool()), plain(64).targets()).backward()
    assert seen.numel <= 2**20 < 64 * 32 * 64 * 256 / 30


# ---------------------------------------------------------------- 坏的输入

x, ok, nan = torch.ones(3, 2, 4), torch.ones(3, 2).bool(), float("nan")


def spoiled(row, value):
    y = torch.ones(3, 2, 4)
    y[row, 1, 0] = value
    return y


none = ok.clone()
none[2] = False
BAD = {
    "dims": (x, ok, torch.ones(3, 2, 5), ok, ["[3, 2, 4]", "[3, 2, 5]"]),
    "rows": (x, ok, x[:2], ok[:2], ["[2, 2, 4]", "3 个文档"]),
    "int": (x, ok, x.long(), ok, ["文档", "int64"]),
    "nan-query": (spoiled(1, nan), ok, x, ok, ["查询", "第 1 行"]),
    "inf-document": (x, ok, spoiled(2, -float("inf")), ok, ["文档", "第 2 行"]),
    "empty-query": (x, none, x, ok, ["第 2 个查询", "遮住"]),
    "empty-document": (x, ok, x, none, ["第 2 个文档", "遮住"]),
}


@pytest.mark.parametrize("loss", [ColBERTLoss, ColBERTPairwise])
@pytest.mark.parametrize("case", BAD)
def test_bad_vectors(case, loss):
    q, qm, d, dm, words = BAD[case]
    with pytest.raises(VembedError) as e: loss()(Embeddings(q, qm), Embeddings(d, dm), plain(3).targets())
    assert all(w in str(e.value) for w in words), e.value


@pytest.mark.parametrize("make, words", [
    (lambda: Embeddings(x), ["[3, 2, 4]", "[3, 2]"]),
    (lambda: Embeddings(x, ok[:2]), ["[3, 2]", "[2, 2]"]),
    (lambda: Embeddings(x[0, 0]), ["[4]"]),
    (lambda: Embeddings(x[None], ok), ["[1, 3, 2, 4]"]),
    (lambda: maxsim(Embeddings(x[:, 0]), Embeddings(x[:, 0])), ["[3, 4]", "掩码"]),
    (lambda: maxsim(Embeddings(x, ok), Embeddings(x[..., :3], ok)), ["4 维", "3 维"]),
    (lambda: maxsim(Embeddings(x, ok), Embeddings(x, ok), "max"), ["max", "sum、mean"]),
    (lambda: maxsim(Embeddings(x, ok), Embeddings(x, none)), ["第 2 篇"]),
    (lambda: ColBERTLoss(reduce="max"), ["max", "sum、mean"]),
    (lambda: ColBERTLoss(-0.1), ["-0.1"]),
    (lambda: ColBERTLoss(variant="debiased", reduce="sum"), ["mean"]),
    (lambda: ColBERTLoss()(Embeddings(x[:, 0]), Embeddings(x[:, 0]), plain(3).targets()), ["[3, 4]", "InfoNCE"]),
    (lambda: ColBERTLoss(directions=("q2d", "q2q"), joint=True)(Embeddings(x, ok), Embeddings(x, ok), plain(3).targets()), ["q2q"]),
    (lambda: ColBERTPairwise(3), ["temperature=3"]),
    (lambda: pool_tokens(Embeddings(x, ok), 0.5), ["0.5"]),
], ids=range(15))
def test_bad_input(make, words):
    with pytest.raises(VembedError) as e: make()
    assert all(w in str(e.value) for w in words), e.value


@pytest.mark.parametrize("make", [
    pytest.param(lambda: Embeddings(x, ok.long()), id="int-mask"),
    pytest.param(lambda: Embeddings(x[:, 0], torch.ones(3, 4).bool()), id="mask-of-single-vectors"),
    pytest.param(lambda: concat([]), id="concat-nothing"),
    pytest.param(lambda: concat([Embeddings(x, ok), Embeddings(x[:, 0])]), id="concat-kinds"),
    pytest.param(lambda: concat([Embeddings(x[:, 0]), Embeddings(x[:, 0, :3])]), id="concat-dims"),
    pytest.param(lambda: maxsim(Embeddings(x.double(), ok), Embeddings(x, ok)), id="fp64-and-fp32"),
    pytest.param(lambda: ColBERTPairwise(reduce="max"), id="pairwise-reduce"),
    pytest.param(lambda: pool_tokens(Embeddings(x[:, 0])), id="pool-single-vectors"),
])
def test_bad_input_not_noticed(make):
    with pytest.raises(VembedError): make()


def test_maxsim_of_no_queries():
    assert maxsim(Embeddings(x[:0], ok[:0]), Embeddings(x, ok)).shape == (0, 3)


@pytest.mark.parametrize("make", [ColBERTLoss, lambda: ColBERTPairwise(learn_temperature=False)], ids=["colbert", "pairwise"])
def test_one_pair_is_zero_and_warned(make):
    (q, qm), (d, dm) = tokens(0, 1), tokens(1, 1)
    with pytest.warns(UserWarning, match="一批只有一对"): found = grads(make(), q, d, qm, dm, plain(1).targets())
    close(found, [torch.zeros_like(v) for v in found], floor=1e-6)


# ---------------------------------------------------------------- 拼接和池化

def test_concat_pads_to_the_longest():
    "补齐到最长，掩码跟着补假；梯度传回每一批。"
    (a, am), (b, bm) = tokens(0, 2, 3), tokens(1, 3, 5)
    both = concat([Embeddings(a.requires_grad_(), am), Embeddings(b.requires_grad_(), bm)])
    assert both.vectors.shape == (5, 5, 3) and torch.equal(both.mask[:2], F.pad(am, (0, 2))) and torch.equal(both.vectors[both.mask], torch.cat([a[am], b[bm]]))
    both.vectors.sum().backward()
    assert (a.grad == 1).all() and (b.grad == 1).all()


@given(seeds, st.integers(1, 4), st.sampled_from([1, 1.5, 2, 3, 100]), st.integers(0, 2))
@few
def test_pool_tokens(seed, N, factor, protect):
    "单位长度；个数约为 1/factor；开头的原样留下；每个新 token 是真实 token 的锥组合，遮住的（哪怕 NaN）不掺进来；factor=1 只归一化。"
    x, mask = tokens(seed, N, 7, 4)
    out, clean = pool_tokens(Embeddings(torch.where(mask[..., None], x, nan), mask), factor, protect), F.normalize(x, dim=-1)
    for v, m, w, n in zip(out.vectors, out.mask, clean, mask):
        real, head = w[n], w[n][:protect]
        body = len(real) - len(head)
        assert int(m.sum()) <= len(head) + max(1, round(body / factor)) and torch.allclose(v[m].norm(dim=-1), torch.ones(int(m.sum()), dtype=v.dtype)) and torch.equal(v[m][:len(head)], head)
        if factor == 1: assert torch.allclose(v[m], real)
