"""蒸馏：与同行的金值（tests/golden）相等，坏的版本会被发现，以及应当成立的性质。"""
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import agree, golden, leaves, names
from hypothesis import given, settings
from hypothesis import strategies as st
from naive import plain
from torch import nn
from torch.autograd import gradcheck

from vembed_nb.core import VembedError
from vembed_nb.losses.distill import SCHEDULES, Distill, DistillEmbedding, DistillKL, DistillMargin, DistillRelation, TeacherCache, save_teacher
from vembed_nb.vectors import Embeddings, maxsim

few = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
PEER, MULTI = "sentence_transformers", "sentence_transformers_multi_vector"
OWNERS = (0, 0, 1, 3, 3, 3)  # 每个查询的反例多少不一，第 2 个没有


def rand(seed, *shape, dtype=torch.float64): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def setup(seed=0, B=4, owners=OWNERS, D=5, Dt=7, n_teachers=1, scores=False, dtype=torch.float64):
    "(查询, 文档, 身份)。"
    N = B + len(owners)
    teachers = [(rand(seed + 10 + k, B, Dt + k), rand(seed + 20 + k, N, Dt + k)) for k in range(n_teachers)]
    t = plain(B, owners).targets(teachers=teachers, scores=rand(seed + 30, N) * 3 if scores else None)
    return rand(seed, B, D, dtype=dtype), rand(seed + 1, N, D, dtype=dtype), t


ALL = {"kl": lambda: DistillKL(2.0, scale=4), "kl-two-ways": lambda: DistillKL(3.0, scale=4, symmetric=True), "kl-own": lambda: DistillKL(2.0, scale=4, over="own"),
       "kl-dot": lambda: DistillKL(2.0, 1.0, 4.0, scale=1, similarity="dot"), "mse": lambda: DistillEmbedding(5, 7), "cosine": lambda: DistillEmbedding(5, 7, "cosine"),
       "margin": lambda: DistillMargin(scale=3), "margin-dot": lambda: DistillMargin("dot"), "relation": lambda: DistillRelation(),
       "relation-angle": lambda: DistillRelation(2.0), "relation-raw": lambda: DistillRelation(1.0, normalize=False)}
every = pytest.mark.parametrize("name", ALL)


def make(name):
    "一个目标；投影的初值固定，float64。"
    torch.manual_seed(0)
    return ALL[name]().double()


def value_and_grads(loss, q, d, targets):
    "值，对查询和文档的梯度。"
    x, y = q.clone().requires_grad_(), d.clone().requires_grad_()
    value = loss(Embeddings(x), Embeddings(y), targets)
    return value.detach(), *torch.autograd.grad(value, (x, y), allow_unused=True, materialize_grads=True)


# ---------------------------------------------------------------- 金值

def own_case(case, dtype=torch.float64):
    "同行的 [查询, 正例, 反例 [K, B, D]] 变成我们的 (查询, 文档, 身份)；labels [B, 1 + K] 是教师的分。"
    xs = dict(zip(("queries", "positives", "negatives"), leaves(case, "queries", "positives", "negatives", dtype=dtype)))
    K, B = xs["negatives"].shape[:2]
    labels = case["inputs"]["labels"]
    if labels.shape[1] == K: labels = torch.cat([torch.zeros(B, 1), -labels], 1)  # 给的是间隔：正例 0 分，反例 -间隔
    return xs, torch.cat([xs["positives"], xs["negatives"].flatten(0, 1)]), plain(B, [*range(B)] * K).targets(scores=labels.T.flatten().double())


def kl_of(case):
    p = case["params"]
    if "temperature" in p: return DistillKL(p["temperature"], scale=1, similarity="cosine" if case["normalizes"] == "peer" else "dot", over="own")
    return DistillKL(student_temperature=p["student_temperature"], teacher_temperature=p["teacher_temperature"], scale=1, similarity="dot", over="own")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", names(PEER, "distill_kl", "margin_mse"))
def test_own_candidates_equal_sentence_transformers(name, dtype):
    case = golden(PEER)[name]
    xs, docs, targets = own_case(case, dtype)
    value = (kl_of(case) if "kl" in name else DistillMargin("dot"))(Embeddings(xs["queries"]), Embeddings(docs), targets)
    agree(case, value, dict(zip(xs, torch.autograd.grad(value, list(xs.values())))), rtol=1e-5 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("how", ["mse", "cosine"])
def test_embedding_equals_sentence_transformers(how):
    case = golden(PEER)[f"embed_distill_{how}"]
    q, d = leaves(case, "queries", "positives")
    targets = plain(len(q)).targets(teachers=[(case["inputs"]["teacher_queries"], case["inputs"]["teacher_positives"])])
    value = DistillEmbedding(q.shape[1], how=how)(Embeddings(q), Embeddings(d), targets)
    agree(case, value, dict(zip(("queries", "positives"), torch.autograd.grad(value, (q, d)))))


@pytest.mark.parametrize("name", names("open_clip", "distill"))
def test_two_ways_equals_open_clip_up_to_the_teachers_entropy(name):
    "它写的是交叉熵：比 KL 多教师的熵，梯度相同。"
    case = golden("open_clip")[name]
    q, d = leaves(case, "images", "texts")
    tq, td = (F.normalize(case["inputs"][k], dim=-1) for k in ("teacher_images", "teacher_texts"))
    scale, teacher_scale = float(case["inputs"]["scale"]), max(case["params"]["teacher_scale"], 1e-12)
    value = DistillKL(scale=scale, teacher_scale=teacher_scale, symmetric=True)(Embeddings(q), Embeddings(d), plain(len(q)).targets(teachers=[(tq, td)]))
    entropy = sum(torch.distributions.Categorical(logits=z).entropy().mean() for z in (teacher_scale * tq @ td.T, teacher_scale * td @ tq.T)) / 2
    agree(case | {"grads": {k: g for k, g in case["grads"].items() if k != "scale"}}, value + entropy, dict(zip(("images", "texts"), torch.autograd.grad(value, (q, d)))))


@pytest.mark.parametrize("name", ["distill_kl", "margin_mse"])
def test_late_interaction_equals_sentence_transformers(name):
    "学生是多向量：similarity=maxsim。补齐处是乱数，掩码挡住它。"
    case = golden(MULTI)[name]
    xs, _, targets = own_case(case, torch.float32)
    masks = [case["inputs"][k].bool() for k in ("query_mask", "positive_mask", "negative_mask")]
    L = max(m.shape[-1] for m in masks[1:])
    pad = lambda x: F.pad(x, (0, 0, 0, L - x.shape[-2]))
    docs = Embeddings(torch.cat([pad(xs["positives"]), pad(xs["negatives"]).flatten(0, 1)]), torch.cat([F.pad(masks[1], (0, L - masks[1].shape[-1])), F.pad(masks[2], (0, L - masks[2].shape[-1])).flatten(0, 1)]))
    loss = DistillKL(2.0, scale=1, similarity=maxsim, over="own") if "kl" in name else DistillMargin(maxsim)
    value = loss(Embeddings(xs["queries"], masks[0]), docs, targets)
    agree(case, value, dict(zip(xs, torch.autograd.grad(value, list(xs.values())))), rtol=1e-4)


def wrong_kl(kind):
    "几种写错的 KL。"
    def kl(self, student, teachers):
        Ts, Tt = self.student_temperature, self.teacher_temperature
        log_p, log_q = (teachers[0] / Tt).log_softmax(1), (student / Ts).log_softmax(1)
        if kind == "reversed": return Ts**2 * (log_q.exp() * (log_q - log_p)).sum(1)
        factor = {"forgot": 1, "once": Ts, "teacher": Tt**2, "mean": Ts**2 / student.shape[1]}[kind]
        return factor * (log_p.exp() * (log_p - log_q)).sum(1)
    return kl


@pytest.mark.parametrize("kind", ["forgot", "once", "teacher", "mean", "reversed"])
def test_a_wrong_kl_is_detected(kind, monkeypatch):
    "忘了 T²、只乘 T、乘了教师的 T²、对候选取平均、方向反了：金值都认得出来。"
    monkeypatch.setattr(DistillKL, "kl", wrong_kl(kind))
    case = golden(PEER)["distill_kl_student2_teacher05"]
    xs, docs, targets = own_case(case)
    value = kl_of(case)(Embeddings(xs["queries"]), Embeddings(docs), targets)
    with pytest.raises(AssertionError): agree(case, value, {k: torch.autograd.grad(value, x, retain_graph=True)[0] for k, x in xs.items()})


@few
@given(seeds)
def test_forgetting_t_squared_starves_the_gradient(seed):
    q, d, t = setup(seed, B=6, owners=())
    norm = lambda T: float(value_and_grads(DistillKL(T), q, d, t)[1].norm())
    right, forgot = norm(64) / norm(32), norm(64) / 64**2 / (norm(32) / 32**2)
    assert .8 < right < 1.25 and .2 < forgot < .32


def test_the_high_temperature_limit():
    "T → ∞ 时是 logits 之差（去掉各行的平均）的均方的一半：Hinton 等的式 4。"
    q, d, t = setup(3, B=5, owners=())
    z, v = (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T * 20 for a, b in ((q, d), t.teachers[0]))
    gap = z - v - (z - v).mean(1, keepdim=True)
    torch.testing.assert_close(DistillKL(1e4)(Embeddings(q), Embeddings(d), t), gap.square().mean() / 2, rtol=1e-3, atol=0)


# ---------------------------------------------------------------- 性质

@every
@few
@given(seed=seeds)
def test_order_does_not_matter(name, seed):
    "查询连同自己的文档换次序，额外的文档也换：值不变，梯度跟着换。"
    B, n = 4, len(OWNERS)
    order, extra = torch.randperm(B, generator=torch.Generator().manual_seed(seed)).tolist(), torch.randperm(n, generator=torch.Generator().manual_seed(seed + 1)).tolist()
    docs = [*order, *(B + k for k in extra)]
    q, d, t = setup(seed)
    moved = plain(B, OWNERS).permuted(order, extra).targets(teachers=[(tq[order], td[docs]) for tq, td in t.teachers])
    loss = make(name)
    a, b = value_and_grads(loss, q, d, t), value_and_grads(loss, q[order], d[docs], moved)
    torch.testing.assert_close(b, (a[0], a[1][order], a[2][docs]))


@every
def test_gradcheck(name):
    q, d, t = setup(5)
    loss = make(name)
    names, params = zip(*loss.named_parameters()) if list(loss.parameters()) else ((), ())
    f = lambda x, y, *ps: torch.func.functional_call(loss, dict(zip(names, ps)), (Embeddings(x), Embeddings(y), t))
    assert gradcheck(f, (q.requires_grad_(), d.requires_grad_(), *(p.detach().clone().requires_grad_() for p in params)))


@every
@pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 1, 4)], ids=str)
def test_shards_average_to_the_whole(name, cuts):
    "每个进程算自己负责的查询，再取平均，正好是一个进程的值和梯度；有的进程可以一个也没有。"
    q, d, t = setup(2)
    loss, ranks = make(name), len(cuts) - 1
    parts = [value_and_grads(loss, q, d, replace(t, start=a, stop=b, ranks=ranks)) for a, b in zip(cuts, cuts[1:])]
    torch.testing.assert_close(tuple(sum(x) / ranks for x in zip(*parts)), value_and_grads(loss, q, d, t))


@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", [n for n in ALL if n != "kl-dot"])  # kl-dot 两边的温度不同
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name, dtype, atol):
    tq, td = rand(1, 4, 7, dtype=dtype), rand(2, 10, 7, dtype=dtype)
    t = plain(4, OWNERS).targets(teachers=[(tq, td)])
    loss = {"mse": DistillEmbedding(7), "cosine": DistillEmbedding(7, how="cosine")}.get(name) or make(name)
    value, gq, gd = value_and_grads(loss, tq, td, t)
    assert abs(value) <= atol and gq.norm() <= 10 * atol and gd.norm() <= 10 * atol


@few
@given(seeds, st.floats(0.2, 5))
def test_scale_laws(seed, k):
    q, d, t = setup(seed)
    at = lambda loss, t=t, q=q, d=d: loss(Embeddings(q), Embeddings(d), t)
    same = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for over in ("batch", "own"): same(at(DistillKL(2 * k, scale=4 * k, over=over)), k**2 * at(DistillKL(2, scale=4, over=over)))  # 只有 scale / T 与 T² 说了算
    same(at(DistillMargin(scale=3 * k)), k**2 * at(DistillMargin(scale=3)))
    same(at(DistillEmbedding(5, 5), replace(t, teachers=[(k * q + q, k * d + d)])), k**2 * (q.square().sum() + d.square().sum()) / (len(q) + len(d)) / 5)
    longer = rand(seed + 7, len(q), 1).exp(), rand(seed + 8, len(d), 1).exp()
    for name in ("kl", "kl-two-ways", "kl-own", "margin", "relation", "relation-angle"): same(at(make(name), q=q * longer[0], d=d * longer[1]), at(make(name)))  # 余弦不看长度
    turn = torch.linalg.qr(rand(seed + 9, 7, 7))[0]
    turned = replace(t, teachers=[(k * a @ turn, k * b @ turn) for a, b in t.teachers])
    for name in ("kl", "margin", "relation", "relation-raw"): same(at(make(name), turned), at(make(name)))                    # 教师转一下、放大：关系不变


@few
@given(seeds)
def test_ragged_candidates_by_loops(seed):
    "反例多少不一时，补齐的格子一个也不能算进去：和逐个查询的循环相等。"
    q, d, t = setup(seed, scores=True)
    s, (kl, squares) = F.normalize(q, dim=1) @ F.normalize(d, dim=1).T * 4, ([], [])
    for i in range(len(q)):
        mine = [i, *(len(q) + k for k, o in enumerate(OWNERS) if o == i)]
        p, log_q = (t.scores[mine] / 2).softmax(0), (s[i, mine] / 2).log_softmax(0)
        kl.append(4 * (p * (p.log() - log_q)).sum())
        squares += [((s[i, i] - s[i, j]) - (t.scores[i] - t.scores[j])) ** 2 for j in mine[1:]]
    for loss, want in ((DistillKL(2.0, scale=4, over="own"), sum(kl) / len(kl)), (DistillMargin(scale=4), sum(squares) / len(squares))):
        torch.testing.assert_close(loss(Embeddings(q), Embeddings(d), t), want)


def test_relation_by_hand():
    "三个点，手算：边长 3、4、5 对 1、1、1。"
    triangle, even = torch.tensor([[0., 0], [3, 0], [0, 4]]).double(), torch.tensor([[1., 0, 0], [0, 1, 0], [0, 0, 1]]).double()
    t = plain(1, (0,)).targets(teachers=[(even[:1], even[1:])])
    by_hand = sum((x / 4 - 1) ** 2 / 2 for x in (3, 4, 5)) / 3
    args = Embeddings(triangle[:1]), Embeddings(triangle[1:]), t
    assert DistillRelation(normalize=False)(*args).item() == pytest.approx(by_hand)
    angles = sum((c - .5) ** 2 / 2 for c in (0, .6, .8)) / 3  # 直角三角形的三个余弦，对等边三角形的 1/2
    assert DistillRelation(2.0, normalize=False)(*args).item() == pytest.approx(by_hand + 2 * angles)


# ---------------------------------------------------------------- 极端的输入

@every
@pytest.mark.parametrize("case", ["duplicates", "collapsed", "opposite", "huge", "tiny"])
def test_adversarial_inputs_stay_finite(name, case):
    q, d, t = setup(4, dtype=torch.float32)
    if case == "duplicates": d[1] = d[5] = d[0]; q[2] = q[0]
    if case == "collapsed": q[:], d[:] = q[0], q[0]
    if case == "opposite": q, d = q.abs(), -d.abs()
    if case in ("huge", "tiny"): q, d = (x * {"huge": 1e4, "tiny": 1e-4}[case] for x in (q, d))
    value, *grads = value_and_grads(make(name).float(), q, d, t)
    assert torch.isfinite(value) and all(torch.isfinite(g).all() for g in grads)
    if case in ("duplicates", "collapsed"): assert all(g.norm() < 1e3 for g in grads), "重合的点不能除以 0 附近的数"


def test_one_dimension():
    q, d, t = setup(4, D=1, Dt=1)
    for loss in (DistillKL(symmetric=True), DistillKL(over="own"), DistillMargin(), DistillEmbedding(1), DistillRelation(1.0)):
        assert all(torch.isfinite(x).all() for x in value_and_grads(loss, q, d, t))


@pytest.mark.parametrize("loss", [DistillKL(symmetric=True), DistillRelation(1.0)], ids=["kl", "relation"])
def test_one_pair_says_that_there_is_nothing_to_learn(loss):
    q, d, t = setup(0, B=1, owners=())
    with pytest.warns(UserWarning, match="损失是 0"): value, *grads = value_and_grads(loss, q, d, t)
    assert value == 0 and not any(g.any() for g in grads)


def test_one_query():
    "B = 1：有自己的反例就能学；学向量什么都不缺，也不该有提醒。"
    q, d, t = setup(0, B=1, owners=(0, 0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for loss in (DistillKL(), DistillKL(over="own"), DistillMargin(), DistillRelation()): assert loss(Embeddings(q), Embeddings(d), t) > 0
        q, d, t = setup(0, B=1, owners=())
        assert DistillEmbedding(5, 7).double()(Embeddings(q), Embeddings(d), t) > 0


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_in_single_precision_out(name, dtype):
    "fp16 / bf16 进来，fp32 算，和先转成 fp32 一样；autocast 里也一样。"
    q, d, t = setup(6, dtype=torch.float32)
    t = replace(t, teachers=[(a.float(), b.float()) for a, b in t.teachers])
    loss = make(name).float()
    q, d = q.to(dtype), d.to(dtype)
    value, gq, gd = value_and_grads(loss, q, d, t)
    assert value.dtype == torch.float32 and gq.dtype == gd.dtype == dtype
    assert torch.equal(value, value_and_grads(loss, q.float(), d.float(), t)[0])
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(value_and_grads(loss, q.float(), d.float(), t)[0], value)
    assert value_and_grads(loss.double(), q.double(), d.double(), t)[0].dtype == torch.float64


@every
def test_teachers_get_no_gradient(name):
    q, d, t = setup(0)
    t = replace(t, teachers=[tuple(x.requires_grad_() for x in pair) for pair in t.teachers])
    make(name)(Embeddings(q.requires_grad_()), Embeddings(d), t).backward()
    assert all(x.grad is None for pair in t.teachers for x in pair) and q.grad is not None


# ---------------------------------------------------------------- 几个教师

@every
@few
@given(seed=seeds)
def test_several_teachers(name, seed):
    "KL 平均概率，其余平均损失；KL 的梯度也等于平均损失的梯度，值不大于它。权重只看比例，教师换次序、权重跟着换，不变。"
    q, d, t = setup(seed, n_teachers=2)
    torch.manual_seed(0)
    loss = DistillEmbedding(5, [7, 8], name).double() if name in ("mse", "cosine") else make(name)
    loss.weights = [3, 1]
    both = value_and_grads(loss, q, d, t)
    def alone(k):
        if name not in ("mse", "cosine"): return value_and_grads(make(name), q, d, replace(t, teachers=[t.teachers[k]]))
        single = DistillEmbedding(5, 7 + k, name).double()
        single.projections[0] = loss.projections[k]
        return value_and_grads(single, q, d, replace(t, teachers=[t.teachers[k]]))
    average = tuple(.75 * a + .25 * b for a, b in zip(alone(0), alone(1)))
    torch.testing.assert_close(both[1:], average[1:], rtol=1e-8, atol=1e-10)
    if "kl" in name: assert both[0] <= average[0] + 1e-12
    else: torch.testing.assert_close(both[0], average[0])
    loss.weights = [.75, .25]
    torch.testing.assert_close(value_and_grads(loss, q, d, t), both)
    if name not in ("mse", "cosine"):
        loss.weights = [1, 3]
        torch.testing.assert_close(value_and_grads(loss, q, d, replace(t, teachers=t.teachers[::-1])), both)


def test_a_student_at_the_mixture_has_loss_zero():
    "两个教师意见不同，学生正好在平均的分布上：损失是 0，平均损失不是。"
    q, d, t = setup(0, B=3, owners=(), n_teachers=2)
    p = sum(((F.normalize(a, dim=1) @ F.normalize(b, dim=1).T) * 20).softmax(1) for a, b in t.teachers) / 2
    assert abs(DistillKL(similarity=lambda *_: p.log() / 20)(Embeddings(q), Embeddings(d), t)) < 1e-12
    one = [DistillKL(similarity=lambda *_: p.log() / 20)(Embeddings(q), Embeddings(d), replace(t, teachers=[x])) for x in t.teachers]
    assert sum(one) / 2 > .01


# ---------------------------------------------------------------- 坏的输入

def put(x, row, value=math.nan):
    x = x.clone(); x[row, 0] = value
    return x


def swap(t, k, side, x):
    pair = list(t.teachers[k]); pair[side] = x
    return replace(t, teachers=[tuple(pair) if i == k else p for i, p in enumerate(t.teachers)])


@every
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_not_a_number_is_named(name, value):
    q, d, t = setup(0)
    bad = {"学生的查询向量的第 2 行": (put(q, 2, value), d, t), "学生的文档向量的第 7 行": (q, put(d, 7, value), t),
           "第 0 个教师的查询向量的第 1 行": (q, d, swap(t, 0, 0, put(t.teachers[0][0], 1, value))), "第 0 个教师的文档向量的第 3 行": (q, d, swap(t, 0, 1, put(t.teachers[0][1], 3, value)))}
    for message, (q, d, t) in bad.items():
        with pytest.raises(VembedError, match=message): make(name)(Embeddings(q), Embeddings(d), t)


@every
def test_missing_teachers(name):
    q, d, t = setup(0)
    with pytest.raises(VembedError, match="没有教师.*make_targets"): make(name)(Embeddings(q), Embeddings(d), replace(t, teachers=[]))


def test_scores_stand_for_one_teacher():
    q, d, t = setup(0, scores=True, n_teachers=2)
    for loss in (DistillMargin(), DistillKL(over="own")): assert torch.equal(loss(Embeddings(q), Embeddings(d), t), loss(Embeddings(q), Embeddings(d), replace(t, teachers=[])))
    with pytest.raises(VembedError, match="weights 有 2 个.*1 个教师"): DistillMargin(weights=[1, 1])(Embeddings(q), Embeddings(d), t)
    t.scores[5] = math.nan
    with pytest.raises(VembedError, match="scores 的第 5 个"): DistillMargin()(Embeddings(q), Embeddings(d), t)
    t.owners[5] = -1  # 没有主人的文档，分数用不着
    assert torch.isfinite(DistillMargin()(Embeddings(q), Embeddings(d), t))


def test_not_a_number_behind_the_mask_is_ignored():
    mask = torch.tensor([[1, 1, 0]] * 2).bool()
    x = rand(0, 2, 3, 4); x[0, 2] = math.nan
    t = plain(2).targets(teachers=[(rand(1, 2, 5), rand(2, 2, 5))])
    assert torch.isfinite(DistillKL(similarity=maxsim)(Embeddings(x, mask), Embeddings(rand(3, 2, 3, 4), mask), t))
    with pytest.raises(VembedError, match="similarity=maxsim"): DistillKL()(Embeddings(x, mask), Embeddings(rand(3, 2, 3, 4), mask), t)


BAD = {
    "学生的查询.*3, 5.*4 个": lambda q, d, t: DistillKL()(Embeddings(q[:3]), Embeddings(d), t),
    "查询是 5 维，文档是 4 维": lambda q, d, t: DistillKL()(Embeddings(q), Embeddings(d[:, :4]), t),
    "第 0 个教师的查询是 7 维，文档是 6 维": lambda q, d, t: DistillKL()(Embeddings(q), Embeddings(d), swap(t, 0, 1, t.teachers[0][1][:, :6])),
    "torch.int64，要浮点数": lambda q, d, t: DistillKL()(Embeddings(q.long()), Embeddings(d.long()), t),
    "cpu，文档在 meta": lambda q, d, t: DistillKL()(Embeddings(q), Embeddings(d.to("meta")), t),
    r"第 0 个教师的向量是 \[\[4, 7\], \[10, 7, 1\]\]": lambda q, d, t: DistillKL()(Embeddings(q), Embeddings(d), swap(t, 0, 1, t.teachers[0][1][..., None])),
    "单向量.*4, 1, 5": lambda q, d, t: DistillRelation()(Embeddings(q[:, None], torch.ones(4, 1).bool()), Embeddings(d[:, None], torch.ones(10, 1).bool()), t),
    "weights 有 3 个.*1 个教师": lambda q, d, t: DistillRelation(weights=[1, 1, 1])(Embeddings(q), Embeddings(d), t),
    r"学生是 5 维，教师是 \[7\] 维.*\[9\] 维": lambda q, d, t: DistillEmbedding(5, 9)(Embeddings(q), Embeddings(d), t),
    r"学生 4 维": lambda q, d, t: DistillEmbedding(4, 7)(Embeddings(q), Embeddings(d), t),
    r"\[4, 10\] 的打分，这里是 \[2, 10\]": lambda q, d, t: DistillKL(similarity=lambda q, d: q.vectors[:2] @ d.vectors.T)(Embeddings(q), Embeddings(d), t),
    "没有自己的反例": lambda q, d, t: DistillMargin()(Embeddings(q), Embeddings(d), replace(t, owners=torch.tensor([0, 1, 2, 3] + [-1] * 6))),
    "4 个查询都没有自己的反例": lambda q, d, t: DistillKL(over="own")(Embeddings(q), Embeddings(d), replace(t, owners=torch.tensor([0, 1, 2, 3] + [-1] * 6))),
    "temperature=-1": lambda *_: DistillKL(-1),
    "temperature=0": lambda *_: DistillKL(0),
    "student_temperature=0": lambda *_: DistillKL(student_temperature=0),
    "teacher_temperature=nan": lambda *_: DistillKL(teacher_temperature=math.nan),
    "scale=inf": lambda *_: DistillMargin(scale=math.inf),
    "你是不是想写 cosine": lambda *_: DistillKL(similarity="cosin"),
    "可选 batch、own": lambda *_: DistillKL(over="mine"),
    "over='own' 只有": lambda *_: DistillKL(over="own", symmetric=True),
    "可选 mse、cosine": lambda *_: DistillEmbedding(4, how="l1"),
    "angle=-1": lambda *_: DistillRelation(-1),
    r"权重 \[1, 0\]": lambda *_: DistillKL(weights=[1, 0]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(VembedError, match=message): BAD[message](*setup(0))


# ---------------------------------------------------------------- 教师向量的文件

both_formats = pytest.mark.parametrize("suffix", [".npz", ".safetensors"])


@both_formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_cache_round_trip(tmp_path, suffix, dtype):
    ids, x = ["图/红 杯.jpg", "a", "b\n", "0"], rand(0, 4, 6).to(dtype)
    path = save_teacher(tmp_path / f"t{suffix}", ids, x.requires_grad_(), model="大教师")
    cache = TeacherCache(str(path), dim=6)
    assert (len(cache), cache.dim, cache.model, "a" in cache, "z" in cache) == (4, 6, "大教师", True, False)
    got = cache(["0", "图/红 杯.jpg", "0", "b\n"])
    assert got.dtype == torch.float32 and torch.equal(got, x.detach()[[3, 0, 3, 2]].float())
    assert cache([]).shape == (0, 6)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@both_formats
def test_cache_errors(tmp_path, suffix):
    path, x = tmp_path / f"t{suffix}", rand(0, 3, 4)
    save_teacher(path, "abc", x)
    before = path.read_bytes()
    for message, ids, vectors in (("出现了两次.*第 0 和第 2 行", "aba", x), ("2 个 id.*3, 4", "ab", x), ("3 个 id", "abc", x.flatten()), ("第 1 行有 NaN", "abc", put(x, 1)), ("浮点数", "abc", x.long())):
        with pytest.raises(VembedError, match=message): save_teacher(path, ids, vectors)
    assert path.read_bytes() == before, "出错时旧文件不动"
    cache = TeacherCache(path)
    with pytest.raises(VembedError, match="没有 'x' 的教师向量（这一批 4 个里缺 2 个，文件里共 3 个）"): cache(["a", "x", "b", "y"])
    with pytest.raises(VembedError, match="4 维的向量.*要 5 维"): TeacherCache(path, dim=5)
    for content in (before[:-7], before[:40], b"", b"hello"):
        path.write_bytes(content)
        with pytest.raises(VembedError, match="读不了"): TeacherCache(path)
    with pytest.raises(VembedError, match="没有教师向量的文件"): TeacherCache(tmp_path / f"none{suffix}")
    with pytest.raises(VembedError, match="可选 .safetensors、.npz"): save_teacher(tmp_path / "t.pt", "abc", x)


def test_cache_reads_other_peoples_files(tmp_path):
    "别人用 numpy 或 safetensors 写的：整数 id 也认；少了数组、向量坏了、要 pickle 的，都拒绝。"
    from safetensors.torch import save_file

    path = tmp_path / "t.npz"
    np.savez(path, ids=np.arange(3), vectors=np.eye(3))
    assert TeacherCache(path)(["2"]).tolist() == [[0, 0, 1]]
    np.savez(path, ids=np.array(["a", "b", "a"]), vectors=np.eye(3))
    with pytest.raises(VembedError, match="'a' 出现了两次"): TeacherCache(path)
    np.savez(path, ids=np.arange(2), vectors=np.eye(3))
    with pytest.raises(VembedError, match="2 个 id，向量却是"): TeacherCache(path)
    np.savez(path, names=np.arange(3), vectors=np.eye(3))
    with pytest.raises(VembedError, match="读不了"): TeacherCache(path)
    np.savez(path, ids=np.array(["a", None, {}], dtype=object), vectors=np.eye(3))
    with pytest.raises(VembedError, match="读不了"): TeacherCache(path)
    save_file({"vectors": torch.eye(3)}, tmp_path / "t.safetensors")
    with pytest.raises(VembedError, match="读不了"): TeacherCache(tmp_path / "t.safetensors")


def test_cache_feeds_the_loss(tmp_path):
    q, d, t = setup(0)
    (tq, td), batch = t.teachers[0], plain(4, OWNERS)
    cache = TeacherCache(save_teacher(tmp_path / "t.safetensors", batch.query_ids + batch.doc_ids, torch.cat([tq, td])))
    from_file = batch.targets(teachers=[(cache(batch.query_ids), cache(batch.doc_ids))])
    torch.testing.assert_close(DistillKL()(Embeddings(q), Embeddings(d), from_file), DistillKL()(Embeddings(q), Embeddings(d), t), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- 配比

class Task(nn.Module):
    "一个有可学的参数和 clamp_ 的任务损失。"
    def __init__(self):
        super().__init__()
        self.scale, self.logs = nn.Parameter(torch.tensor(9.0)), {"temperature": 1.0}

    def clamp_(self): self.scale.data.clamp_(max=5)
    def forward(self, q, d, targets): return self.scale * (q.vectors * d.vectors[:len(q)]).sum()


WANT = {"constant": lambda t: .8, "linear": lambda t: .8 - .6 * t, "cosine": lambda t: .2 + .6 * (1 + math.cos(math.pi * t)) / 2}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_follows_the_schedule(schedule):
    q, d, t = setup(0)
    q, d = Embeddings(q), Embeddings(d)
    loss = Distill(Task(), DistillKL(), .8, schedule, total_steps=4, alpha_end=.2)
    task, distill = Task()(q, d, t), DistillKL()(q, d, t)
    for step in range(7):
        a = WANT[schedule](min(1, step / 4))
        loss.eval()
        for _ in range(2): torch.testing.assert_close(loss(q, d, t), (1 - a) * task + a * distill, rtol=1e-9, atol=0)  # 评测不数步
        torch.testing.assert_close(loss.train()(q, d, t), (1 - a) * task + a * distill, rtol=1e-9, atol=0)
        assert loss.logs == {"temperature": 1.0, "distill_kl": distill.item(), "task_loss": task.item(), "distill_loss": distill.item(), "distill_alpha": pytest.approx(a)}
    resumed = Distill(Task(), DistillKL(), .8, schedule, total_steps=4, alpha_end=.2)
    resumed.load_state_dict(loss.state_dict())
    assert int(resumed.step) == 7 and resumed.alpha_now == loss.alpha_now


def test_everything_learned_is_a_parameter():
    "任务的温度、蒸馏的投影都到得了优化器；两边都有梯度；clamp_ 传到里面。"
    q, d, t = setup(0, dtype=torch.float32)
    loss = Distill(Task(), DistillEmbedding(5, 7), .3)
    assert set(dict(loss.named_parameters())) == {"task.scale", "distill.projections.0.weight", "distill.projections.0.bias"}
    loss(Embeddings(q), Embeddings(d), t).backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())
    loss.clamp_()
    assert loss.task.scale == 5
    nested = Distill(Distill(nn.Identity(), DistillRelation()), DistillKL())
    nested.clamp_()  # 没有 clamp_ 的任务也行


def test_with_a_real_task():
    "和 InfoNCE、SigLIP 合在一起：α = 0 是任务，α = 1 是蒸馏。"
    from vembed_nb.losses.contrastive import InfoNCE, SigmoidLoss

    q, d, t = setup(0)
    q, d = Embeddings(q), Embeddings(d)
    for task in (InfoNCE(), SigmoidLoss()):
        assert torch.equal(Distill(task, DistillKL(), 0.0)(q, d, t), task(q, d, t)) and torch.equal(Distill(task, DistillKL(), 1.0)(q, d, t), DistillKL()(q, d, t))


@pytest.mark.parametrize("bad, message", [(dict(alpha=1.5), "alpha=1.5"), (dict(alpha_end=-1), "alpha_end=-1"), (dict(alpha=math.nan), "alpha=nan"), (dict(schedule="linea"), "你是不是想写 linear"),
                                          (dict(schedule="cosine"), "total_steps=None"), (dict(schedule="linear", total_steps=0), "total_steps=0")], ids=str)
def test_bad_mixture(bad, message):
    with pytest.raises(VembedError, match=message): Distill(Task(), DistillKL(), **bad)


def test_errors_do_not_count_a_step():
    q, d, t = setup(0)
    loss = Distill(Task(), DistillKL(), .5, "linear", total_steps=5)
    with pytest.raises(VembedError): loss(Embeddings(q), Embeddings(d), replace(t, teachers=[]))
    assert int(loss.step) == 0
