"""三元组、CoSENT、AnglE 和排序的损失：与同行的金值（tests/golden）相等，以及应当成立的性质。"""
import json
import math
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from vembed_nb.core import VembedError
from vembed_nb.losses.pairwise import DISTANCES, MINING, AnglE, CoSENT, TripletLoss, ordered_logsumexp
from vembed_nb.losses.rank import BCE, WEIGHTINGS, CrossEntropy, LambdaLoss, ListNet, MarginMSE, RankEmbeddings, RankNet
from vembed_nb.losses.targets import make_targets
from vembed_nb.vectors import Embeddings

GOLDEN = Path(__file__).parent / "golden"
pytestmark = [pytest.mark.filterwarnings("ignore:.*损失是 0"), pytest.mark.filterwarnings("ignore:一批只有一对")]
few = settings(max_examples=20, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


# ---------------------------------------------------------------- 金值

@cache
def peer(name):
    "一个同行的全部金值：名字 → 一例，数组已经换成张量。"
    data = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    value = lambda v: data["arrays"][v] if isinstance(v, str) and v in data["arrays"] else v
    return {c["name"]: {**c, "inputs": {k: value(v) for k, v in c["inputs"].items()}, "grads": {k: value(v) for k, v in c["outputs"].get("grads", {}).items()}, "loss": c["outputs"]["loss"]} for c in data["cases"]}


def named(name, *prefixes): return [c for c in peer(name) if c.startswith(prefixes)]
def tensor(x, dtype=torch.float64): return torch.tensor(x, dtype=dtype)
def leaf(x, dtype=torch.float64): return tensor(x, dtype).requires_grad_()


def agree(case, loss, leaves, scale=1.0, dtype=torch.float64):
    "损失和每个输入的梯度都与金值相等；金值有 9 位有效数字，梯度有 6 位小数。"
    tol = dict(rtol=2e-6, atol=2e-6) if dtype == torch.float64 else dict(rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(loss.double() * scale, tensor(case["loss"]), **tol)
    if not case["grads"]: return
    assert set(case["grads"]) == set(leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    for (name, x), grad in zip(leaves.items(), grads):
        want = tensor(case["grads"][name])
        torch.testing.assert_close((torch.zeros_like(x) if grad is None else grad).double() * scale, want, rtol=tol["rtol"], atol=tol["atol"] * max(1, float(want.abs().max())), msg=lambda m: f"{name} 的梯度：{m}")


DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])


@DTYPES
@pytest.mark.parametrize("name", [n for n in named("sentence_transformers", "cosent", "angle") if n != "angle_triplets"])
def test_graded_pairs_equal_sentence_transformers(name, dtype):
    case = peer("sentence_transformers")[name]
    leaves = {k: leaf(case["inputs"][k], dtype) for k in ("queries", "positives")}
    n = len(leaves["queries"])
    targets = make_targets([f"q{i}" for i in range(n)], [f"d{i}" for i in range(n)], grades=case["inputs"]["labels"])
    loss = {"cosent": CoSENT, "angle": AnglE}[name.split("_")[0]](**case["params"])
    agree(case, loss(*map(Embeddings, leaves.values()), targets), leaves, dtype=dtype)


@DTYPES
def test_angle_with_own_negatives_equals_sentence_transformers(dtype):
    "它的 (锚点, 正例, 反例…) 就是我们的 owners：正例分级 1，反例分级 0。"
    case = peer("sentence_transformers")["angle_triplets"]
    leaves = {k: leaf(case["inputs"][k], dtype) for k in ("queries", "positives", "negatives")}
    K, n, _ = leaves["negatives"].shape
    targets = make_targets([f"q{i}" for i in range(n)], [f"d{i}" for i in range(n * (K + 1))], owners=list(range(n)) * (K + 1), grades=[1.0] * n + [0.0] * n * K)
    d = torch.cat([leaves["positives"], leaves["negatives"].flatten(0, 1)])
    agree(case, AnglE(**case["params"])(Embeddings(leaves["queries"]), Embeddings(d), targets), leaves, dtype=dtype)


def mined(loss, e, labels):
    "同行的挖掘：一堆带标签的向量，自己不算自己的正例。逐个锚点交给我们的实现，再合起来取平均。"
    total, n, active = e.sum() * 0, 0, 0
    for a in range(len(e)):
        others = [j for j in range(len(e)) if j != a]
        order = [j for j in others if labels[j] == labels[a]] + [j for j in others if labels[j] != labels[a]]
        if labels[order[0]] != labels[a]: continue
        targets = make_targets(["a"], [f"d{j}" for j in order], query_groups=["x"], doc_groups=["x" if labels[j] == labels[a] else "" for j in order])
        t, k, on = loss.run(e[a:a + 1], e[order], targets, range(1))
        total, n, active = total + t, n + k, active + on
    return total, n, active


ST_MINING = {"BatchAll": "all", "BatchHard": "hard", "BatchSemiHard": "semi-hard"}


@DTYPES
@pytest.mark.parametrize("name", [n for n in named("sentence_transformers", "triplet_Batch") if "SoftMargin" not in n])
def test_mining_equals_sentence_transformers(name, dtype):
    case = peer("sentence_transformers")[name]
    e, labels = leaf(case["inputs"]["embeddings"], dtype), case["inputs"]["labels"]
    _, kind, distance = name.split("_")[:3]
    loss = TripletLoss(case["params"]["margin"], ST_MINING[kind], "cosine" if distance == "cosine" else "euclidean")
    total, n, active = mined(loss, e, labels)
    if kind == "BatchHard":  # 它把没有正例的锚点也算进来，最远的正例当作 0；我们的每个查询都有自己的正例
        for a in (a for a in range(len(e)) if labels.count(labels[a]) == 1):
            total, n = total + (loss.margin - DISTANCES[loss.distance](e[a:a + 1], e[[j for j in range(len(e)) if j != a]]).min()).relu(), n + 1
    agree(case, total / (active if kind == "BatchAll" else n), {"embeddings": e}, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("name", named("sentence_transformers", "triplet_euclidean", "triplet_cosine"))
def test_given_triplets_equal_sentence_transformers(name, dtype):
    "给定的三元组：一个查询两个文档，三种挖掘都只有一个三元组；它对全部的（零也算）取平均。"
    case = peer("sentence_transformers")[name]
    leaves = {k: leaf(case["inputs"][k], dtype) for k in ("queries", "positives", "negatives")}
    rows = list(zip(leaves["queries"], leaves["positives"], leaves["negatives"][0]))
    for mining in MINING:
        loss = TripletLoss(case["params"]["margin"], mining, name.split("_")[1])
        value = sum(loss(Embeddings(q[None]), Embeddings(torch.stack([p, n])), make_targets(["q"], ["p", "n"])) for q, p, n in rows) / len(rows)
        agree(case, value, leaves, dtype=dtype)


@DTYPES
@pytest.mark.parametrize("distance", ["lp", "euclidean", "cosine"])
@pytest.mark.parametrize("kind", ["all", "no_miner", "batch_hard"])
def test_mining_equals_pytorch_metric_learning(distance, kind, dtype):
    "lp 是归一化以后的欧氏距离。它的 hard 也只对非零的取平均，这里的间隔下它们全都非零。"
    case = peer("pytorch_metric_learning")[f"triplet_{distance}_{kind}"]
    e = leaf(case["inputs"]["embeddings"], dtype)
    loss = TripletLoss(case["params"]["margin"], "hard" if kind == "batch_hard" else "all", "cosine" if distance == "cosine" else "euclidean")
    total, n, active = mined(loss, F.normalize(e, dim=-1) if distance == "lp" else e, case["inputs"]["labels"])
    agree(case, total / active, {"embeddings": e}, dtype=dtype)


@DTYPES
def test_triplets_over_documents_equal_pytorch_metric_learning(dtype):
    "查询对另一堆文档：正是我们的形式，正例由组来定；只是我们的前 B 个文档要是各查询的正例。"
    case = peer("pytorch_metric_learning")["triplet_cosine_ref"]
    leaves = {k: leaf(case["inputs"][k], dtype) for k in ("queries", "documents")}
    ql, dl = case["inputs"]["query_labels"], case["inputs"]["document_labels"]
    first = []
    for label in ql: first.append(next(j for j, x in enumerate(dl) if x == label and j not in first))
    order = first + [j for j in range(len(dl)) if j not in first]
    targets = make_targets([f"q{i}" for i in range(len(ql))], [f"d{j}" for j in order], query_groups=[f"g{x}" for x in ql], doc_groups=[f"g{dl[j]}" for j in order])
    agree(case, TripletLoss(case["params"]["margin"])(Embeddings(leaves["queries"]), Embeddings(leaves["documents"][order]), targets), leaves, dtype=dtype)


def rank_loss(case):
    "金值的名字 → (我们的损失, 乘几倍才与它相等)。"
    name, p = case["name"], case["params"]
    natural = 1 if p.get("reduction_log") == "natural" else 1 / math.log(2)
    scheme = {"ndcgloss1": "NDCGLoss1", "ndcgloss2": "NDCGLoss2", "lambdarank": "LambdaRank", "ndcgloss2pp": "NDCGLoss2++", "mu5": "NDCGLoss2++"}
    kind = name.split("_")[1]
    if name.startswith("listnet"): return ListNet(), 1
    if name.startswith("bce"): return BCE(p["pos_weight"]), 1
    if name.startswith("ranknet") or (kind == "no" and "k" not in p): return RankNet(p.get("sigma", 1.0)), natural
    return LambdaLoss(scheme[kind], k=p.get("k"), sigma=p.get("sigma", 1.0), mu=5.0 if kind == "mu5" else 10.0), natural * math.log(2)


@DTYPES
@pytest.mark.parametrize("name", [n for n in named("sentence_transformers_cross_encoder", "listnet", "lambda", "ranknet", "bce") if n != "lambda_no_k2_graded"])
def test_lists_equal_sentence_transformers(name, dtype):
    case = peer("sentence_transformers_cross_encoder")[name]
    s, grades, mask = leaf(case["inputs"]["scores"], dtype), tensor(case["inputs"]["labels"]), tensor(case["inputs"]["mask"]).bool()
    loss, scale = rank_loss(case)
    agree(case, loss(s, grades, mask), {"scores": s}, scale, torch.float32)  # 金值是 fp32 算的


@DTYPES
@pytest.mark.parametrize("name", named("sentence_transformers_cross_encoder", "candidates", "margin_mse"))
def test_candidates_equal_sentence_transformers(name, dtype):
    case = peer("sentence_transformers_cross_encoder")[name]
    s = leaf(case["inputs"]["scores"], dtype)
    if name.startswith("candidates"):
        z = case["params"]["scale"] * (s.sigmoid() if case["params"]["activation"] else s)
        value = CrossEntropy()(z, F.one_hot(torch.zeros(len(s), dtype=torch.long), s.shape[1]))
    else:
        labels = tensor(case["inputs"]["labels"])
        value = MarginMSE()(s, labels if name.endswith("scores") else torch.cat([torch.zeros(len(s), 1), -labels], 1))
    agree(case, value, {"scores": s}, dtype=torch.float32)


@pytest.mark.parametrize("name", ["margin_mse_neg1", "margin_mse_neg2", "margin_mse_scores"])
def test_margin_mse_of_embeddings_equals_sentence_transformers(name):
    "它的打分是点积；我们的 MarginMSE 吃现成的打分。"
    case = peer("sentence_transformers")[name]
    leaves = {k: leaf(case["inputs"][k]) for k in ("queries", "positives", "negatives")}
    s = torch.einsum("bd,kbd->bk", leaves["queries"], torch.cat([leaves["positives"][None], leaves["negatives"]]))
    labels = tensor(case["inputs"]["labels"])
    agree(case, MarginMSE()(s, labels if name.endswith("scores") else torch.cat([torch.zeros(len(s), 1), -labels], 1)), leaves)


def test_known_differences():
    "说过不同的地方确实不同：PML 的 semihard 留下每一个反例；sentence-transformers 的 RankNet 默认以 2 为底。"
    case = peer("pytorch_metric_learning")["triplet_cosine_semihard"]
    total, n, _ = mined(TripletLoss(case["params"]["margin"], "semi-hard"), tensor(case["inputs"]["embeddings"]), case["inputs"]["labels"])
    assert abs(float(total / n) - case["loss"]) > 1e-3
    case = peer("sentence_transformers_cross_encoder")["ranknet_graded"]
    ours = RankNet()(tensor(case["inputs"]["scores"]), tensor(case["inputs"]["labels"]), tensor(case["inputs"]["mask"]).bool())
    assert abs(float(ours) / case["loss"] - math.log(2)) < 1e-5


# ---------------------------------------------------------------- 性质：嵌入

PAIRWISE = {"triplet-all": lambda: TripletLoss(0.3), "triplet-hard": lambda: TripletLoss(0.3, "hard"), "triplet-semi": lambda: TripletLoss(0.3, "semi-hard"),
            "euclidean-all": lambda: TripletLoss(1.0, "all", "euclidean"), "euclidean-hard": lambda: TripletLoss(1.0, "hard", "euclidean"), "euclidean-semi": lambda: TripletLoss(1.0, "semi-hard", "euclidean"),
            "cosent": CoSENT, "angle": AnglE, "rank-cross": lambda: RankEmbeddings(CrossEntropy()), "rank-lambda": lambda: RankEmbeddings(LambdaLoss()), "rank-listnet": lambda: RankEmbeddings(ListNet()),
            "rank-margin": lambda: RankEmbeddings(MarginMSE(), 0.5, "scores")}
EACH = pytest.mark.parametrize("name", PAIRWISE)


def batch(seed, B=5, extra=6, D=6, dtype=torch.float64, order=None):
    "一批：有重复的查询、混进反例的正例、各自的反例；order 给出查询的新次序，文档跟着换，额外的倒过来。"
    g = torch.Generator().manual_seed(seed)
    N = B + extra
    q, d = (torch.randn(n, D, generator=g, dtype=torch.float64) for n in (B, N))
    owner = list(range(B)) + torch.randint(-1, B, (extra,), generator=g).tolist()
    grades, scores = torch.randint(0, 4, (N,), generator=g).tolist(), torch.randn(N, generator=g).tolist()
    names, docs = [f"q{max(i, 1)}" for i in range(B)], [f"d{j}" for j in range(N)]
    positives = [[f"d{i}"] for i in range(B)]
    if extra: positives[0].append(f"d{N - 1}")
    order = list(range(B)) if order is None else order
    where, cols = {i: k for k, i in enumerate(order)} | {-1: -1}, order + list(range(B, N))[::-1 if order != list(range(B)) else 1]
    targets = make_targets([names[i] for i in order], [docs[j] for j in cols], positives=[positives[i] for i in order], owners=[where[owner[j]] for j in cols], grades=[grades[j] for j in cols], scores=[scores[j] for j in cols])
    return q[order].to(dtype).requires_grad_(), d[cols].to(dtype).requires_grad_(), targets, cols


def value_and_grads(loss, q, d, targets):
    value = loss(Embeddings(q), Embeddings(d), targets)
    return [value, *torch.autograd.grad(value, (q, d), allow_unused=True, materialize_grads=True)]


@EACH
@few
@given(seed=seeds, B=st.integers(1, 6), extra=st.integers(0, 7))
def test_permutation_of_queries_and_documents(name, seed, B, extra):
    loss = PAIRWISE[name]()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(seed)).tolist()
    q, d, targets, _ = batch(seed, B, extra)
    want = value_and_grads(loss, q, d, targets)
    q2, d2, targets2, cols = batch(seed, B, extra, order=order)
    torch.testing.assert_close(value_and_grads(loss, q2, d2, targets2), [want[0], want[1][order], want[2][cols]])


@EACH
@few
@given(seed=seeds, D=st.integers(1, 7), factor=st.floats(0.01, 100))
def test_scale_of_the_vectors(name, seed, D, factor):
    "余弦不看长度；欧氏距离和间隔一起放大，损失放大同样的倍数。"
    q, d, targets, _ = batch(seed, D=D)
    if name.startswith("euclidean"):
        a, b = TripletLoss(1.0, PAIRWISE[name]().mining, "euclidean"), TripletLoss(factor, PAIRWISE[name]().mining, "euclidean")
        torch.testing.assert_close(b(Embeddings(q * factor), Embeddings(d * factor), targets), factor * a(Embeddings(q), Embeddings(d), targets))
    elif D > 1: torch.testing.assert_close(PAIRWISE[name]()(Embeddings(q * factor), Embeddings(d), targets), PAIRWISE[name]()(Embeddings(q), Embeddings(d), targets))


@EACH
def test_gradcheck(name):
    loss = PAIRWISE[name]()
    for seed in (1, 2):
        q, d, targets, _ = batch(seed, B=4, extra=4, D=5)
        assert gradcheck(lambda a, b: loss(Embeddings(a), Embeddings(b), targets), (q, d), atol=1e-6)


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_low_precision_is_computed_in_fp32(name, dtype, autocast):
    "半精度的输入先升上来再算：与升上来的 fp32 输入逐位相等，autocast 里也一样；梯度回到输入的类型。"
    loss = PAIRWISE[name]()
    q, d, targets, _ = batch(3, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast): value = loss(Embeddings(q), Embeddings(d), targets)
    got = [value, *torch.autograd.grad(value, (q, d), allow_unused=True, materialize_grads=True)]  # 反向在 autocast 之外，PyTorch 这样要求
    want = value_and_grads(loss, *(x.detach().float().requires_grad_() for x in (q, d)), targets)
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype and torch.equal(got[0], want[0])
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(got[1:], want[1:]))


@EACH
@few
@given(seed=seeds, cut=st.integers(0, 5))
def test_two_ranks_equal_one(name, seed, cut):
    "两张卡各算一段查询，损失和梯度的平均等于一张卡算整批（有一张卡一个查询也没有时也是）。"
    loss = PAIRWISE[name]()
    q, d, targets, _ = batch(seed)
    want = value_and_grads(loss, q, d, targets)
    parts = [value_and_grads(loss, q, d, replace(targets, start=a, stop=b, ranks=2)) for a, b in ((0, cut), (cut, 5))]
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(*parts)], want)


@EACH
@pytest.mark.parametrize("side, row", [("查询", 2), ("文档", 7)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_are_named(name, side, row, bad):
    q, d, targets, _ = batch(0)
    x = (q if side == "查询" else d).detach().clone()
    x[row, 1] = bad
    with pytest.raises(VembedError, match=f"{side}向量的第 {row} 行"):
        PAIRWISE[name]()(Embeddings(x if side == "查询" else q), Embeddings(x if side == "文档" else d), targets)


@EACH
def test_bad_shapes(name):
    loss, (q, d, targets, _) = PAIRWISE[name](), batch(0)
    many = Embeddings(torch.randn(5, 3, 6), torch.ones(5, 3, dtype=torch.bool))
    for a, b, words in ((q[:4], d, r"\[4, 6\].*5 个查询"), (q, d[:7], r"\[7, 6\].*11 个文档"), (q, d[:, :3], r"\[5, 6\].*\[11, 3\]"), (q.long(), d, "int64.*浮点")):
        with pytest.raises(VembedError, match=words): loss(Embeddings(a), Embeddings(b), targets)
    with pytest.raises(VembedError, match=r"\[5, 3, 6\]"): loss(many, Embeddings(d), targets)
    with pytest.raises(VembedError, match="多向量 .5, 3, 6."): loss(many, Embeddings(torch.randn(11, 3, 6), torch.ones(11, 3, dtype=torch.bool)), targets)
    with pytest.raises(VembedError, match="targets 在 meta"): loss(Embeddings(q), Embeddings(d), replace(targets, query_ids=targets.query_ids.to("meta")))


@EACH
def test_the_contract(name):
    "损失是一个模块：logs 是一列数，clamp_ 可以调，没有可学的参数。"
    loss, (q, d, targets, _) = PAIRWISE[name](), batch(0)
    loss(Embeddings(q), Embeddings(d), targets)
    assert loss.logs and all(isinstance(v, (int, float)) for v in loss.logs.values())
    loss.clamp_()
    assert not list(loss.parameters())


# ---------------------------------------------------------------- 三元组

@few
@given(seed=seeds, block=st.integers(1, 8), mining=st.sampled_from(list(MINING)), distance=st.sampled_from(["cosine", "euclidean"]))
def test_blocks_change_nothing(seed, block, mining, distance):
    q, d, targets, _ = batch(seed, B=7)
    torch.testing.assert_close(value_and_grads(TripletLoss(0.4, mining, distance, block), q, d, targets), value_and_grads(TripletLoss(0.4, mining, distance), q, d, targets))


def brute(q, d, targets, margin, mining):
    "三重循环。"
    D, pos, terms = 1 - F.normalize(q, dim=-1) @ F.normalize(d, dim=-1).T, targets.positive_mask(), []
    for a in range(len(q)):
        P, N = pos[a].nonzero().flatten().tolist(), (~pos[a]).nonzero().flatten().tolist()
        if not N: continue
        if mining == "hard": terms.append(max(D[a, p] for p in P) - min(D[a, n] for n in N))
        for p in P:
            if mining == "all": terms += [D[a, p] - D[a, n] for n in N]
            if mining == "semi-hard":
                farther = [D[a, n] for n in N if D[a, n] > D[a, p]]
                terms.append(D[a, p] - (min(farther) if farther else max(D[a, n] for n in N)))
    terms = (torch.stack(terms) + margin).relu() if terms else torch.zeros(1)
    return terms.sum() / max(1, int((terms > 0).sum()) if mining == "all" else len(terms))


@few
@given(seed=seeds, B=st.integers(1, 6), extra=st.integers(0, 6), mining=st.sampled_from(list(MINING)), margin=st.floats(0.01, 1))
def test_mining_equals_three_loops(seed, B, extra, mining, margin):
    q, d, targets, _ = batch(seed, B, extra)
    torch.testing.assert_close(TripletLoss(margin, mining)(Embeddings(q), Embeddings(d), targets), brute(q, d, targets, margin, mining).to(torch.float64))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("mining", MINING)
def test_identical_vectors(mining, distance):
    "塌缩：全是并列，损失恰好是间隔，梯度有限。"
    q, d = torch.ones(4, 3, requires_grad=True), torch.ones(6, 3, requires_grad=True)
    value, *grads = value_and_grads(TripletLoss(0.2, mining, distance), q, d, make_targets(list("abcd"), list("123456")))
    assert value.item() == pytest.approx(0.2, abs=1e-6) and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("mining", MINING)
def test_nothing_to_compare_is_zero_and_said(mining):
    "一个查询只有自己的正例；一批全是正例。"
    for targets in (make_targets(["a"], ["1"]), make_targets(["a", "a"], ["1", "1"])):
        n = len(targets.query_ids)
        q, d = torch.randn(n, 4, requires_grad=True), torch.randn(n, 4, requires_grad=True)
        with pytest.warns(UserWarning, match="没有一个反例"): value, *grads = value_and_grads(TripletLoss(mining=mining), q, d, targets)
        assert value == 0 and all((g == 0).all() for g in grads)


def test_satisfied_triplets_are_quiet():
    "全都隔开了：损失是 0，不警告。"
    x = torch.eye(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mining in MINING: assert TripletLoss(0.5, mining)(Embeddings(x), Embeddings(x), make_targets(list("abcd"), list("1234"))) == 0


def test_wrong_versions_are_detected():
    "把重复的查询当反例、对全部而不是非零的取平均：三重循环的对照能抓住。"
    q, d, targets, _ = batch(1)
    right = brute(q, d, targets, 0.3, "all")
    diagonal = make_targets([f"x{i}" for i in range(5)], [f"d{j}" for j in range(11)])
    loss = TripletLoss(0.3)
    torch.testing.assert_close(loss(Embeddings(q), Embeddings(d), targets), right)
    assert not torch.isclose(loss(Embeddings(q), Embeddings(d), diagonal), right, rtol=1e-3)
    loss(Embeddings(q), Embeddings(d), targets)
    assert loss.logs["active"] < loss.logs["triplets"]
    assert not torch.isclose(right * loss.logs["active"] / loss.logs["triplets"], right, rtol=1e-3)


def test_memory_does_not_grow_with_positives():
    "每个查询有很多正例时，存给反向的也只是一块的输入，没有 [B, P, N]。"
    B, N = 64, 512
    targets = make_targets([f"q{i}" for i in range(B)], [f"d{j}" for j in range(N)], query_groups=["g"] * B, doc_groups=["g"] * (N // 2) + [""] * (N // 2))
    q, d = torch.randn(B, 8, requires_grad=True), torch.randn(N, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t): TripletLoss(block=8)(Embeddings(q), Embeddings(d), targets)
    assert max(saved, default=0) <= B * (N // 2)  # pairs 的下标 B × P，没有再乘 N 的


@pytest.mark.parametrize("kwargs, words", [(dict(margin=0), "margin=0"), (dict(margin=math.nan), "margin"), (dict(mining="semihard"), "semi-hard"), (dict(distance="l2"), "euclidean")])
def test_bad_triplet_settings(kwargs, words):
    with pytest.raises(VembedError, match=words): TripletLoss(**kwargs)


# ---------------------------------------------------------------- 分级的对

@few
@given(seed=seeds, M=st.integers(1, 30), levels=st.integers(1, 5), scale=st.floats(0.1, 300))
def test_ordered_logsumexp_equals_all_pairs(seed, M, levels, scale):
    g = torch.Generator().manual_seed(seed)
    s, y = (torch.randn(M, generator=g, dtype=torch.float64) * scale).requires_grad_(), torch.randint(0, levels, (M,), generator=g)
    gap = (s[:, None] - s[None, :])[y[:, None] < y[None, :]]
    want = F.pad(gap, (1, 0)).logsumexp(0)
    got, n = ordered_logsumexp(s, y)
    assert n == len(gap)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(v, s)[0] for v in (got, want)))


@pytest.mark.parametrize("Loss", [CoSENT, AnglE])
def test_graded_pairs_edge_cases(Loss):
    one = torch.randn(1, 4, requires_grad=True), torch.randn(1, 4, requires_grad=True)
    with pytest.warns(UserWarning, match="没有次序可学"): value, *grads = value_and_grads(Loss(), *one, make_targets(["a"], ["1"], grades=[3]))
    assert value == 0 and all((g == 0).all() for g in grads)
    with pytest.raises(VembedError, match="grades"): Loss()(*map(Embeddings, one), make_targets(["a"], ["1"]))
    with pytest.raises(VembedError, match="第 0 个文档的 grades 是 nan"): Loss()(*map(Embeddings, one), make_targets(["a"], ["1"], grades=[math.nan]))
    with pytest.raises(VembedError, match="scale=-1"): Loss(scale=-1)
    q, d, targets, _ = batch(0)
    stray = replace(targets, owners=torch.where(torch.arange(11) < 5, targets.owners, -1), grades=torch.where(torch.arange(11) < 5, targets.grades, math.nan))
    value = Loss()(Embeddings(q), Embeddings(d), stray)  # 没有主人的文档不参加，分级是什么都行
    torch.testing.assert_close(value, Loss()(Embeddings(q), Embeddings(d[:5]), make_targets(list("abcde"), list("12345"), grades=targets.grades[:5])))


# ---------------------------------------------------------------- 性质：列表

RANK = {"bce": BCE, "bce-weight": lambda: BCE(3.0), "cross": CrossEntropy, "listnet": ListNet, "ranknet": RankNet, "margin": MarginMSE,
        **{w: (lambda w=w: LambdaLoss(w)) for w in WEIGHTINGS}, "lambda-k": lambda: LambdaLoss(k=2), "lambda-k9": lambda: LambdaLoss("LambdaRank", k=9)}
EACH_RANK = pytest.mark.parametrize("name", RANK)


def lists(seed, B=4, C=6, ties=False, dtype=torch.float64):
    "一批列表，候选有多有少；ties 时打分只有几种。"
    g = torch.Generator().manual_seed(seed)
    s = torch.randint(-1, 2, (B, C), generator=g).to(dtype) if ties else torch.randn(B, C, generator=g, dtype=torch.float64).to(dtype)
    mask = torch.arange(C) < torch.randint(1, C + 1, (B, 1), generator=g)
    return s.requires_grad_(), torch.randint(0, 4, (B, C), generator=g) / 4, mask  # 分级是 0、1/4、1/2、3/4，BCE 也能用


def of(loss, s, y, m=None):
    value = loss(s, y, m)
    return [value, torch.autograd.grad(value, s, allow_unused=True, materialize_grads=True)[0]]


@EACH_RANK
@few
@given(seed=seeds, B=st.integers(1, 5), C=st.integers(1, 7), ties=st.booleans())
def test_permutation_of_lists_and_candidates(name, seed, B, C, ties):
    "并列时也不变；打分和分级都相同的几个可以互换梯度。MarginMSE 的第 0 个是正例，留在原处。"
    s, y, m = lists(seed, B, C, ties)
    g = torch.Generator().manual_seed(seed + 1)
    rows, cols = torch.randperm(B, generator=g), torch.randperm(C, generator=g)
    if name == "margin": cols = torch.cat([torch.zeros(1, dtype=torch.long), cols[cols > 0]])
    value, grad = of(RANK[name](), s, y, m)
    move = lambda x: x.detach()[rows][:, cols]
    value2, grad2 = of(RANK[name](), move(s).requires_grad_(), move(y), move(m))
    table = lambda s, y, m, g: [torch.tensor(sorted(zip(*(x[i][m[i]].tolist() for x in (s, y, g)))), dtype=torch.float64) for i in range(B)]
    torch.testing.assert_close([value2, *table(move(s), move(y), move(m), grad2)], [value, *table(move(s), move(y), move(m), move(grad))])


@EACH_RANK
@few
@given(seed=seeds, extra=st.integers(1, 5), junk=st.sampled_from([0.0, 7.0, -1e30, math.nan, math.inf]))
def test_padding_changes_nothing(name, seed, extra, junk):
    "多补几列、补的位置放什么，损失和梯度都不变；补的位置梯度是 0。"
    s, y, m = lists(seed)
    wide = lambda x, v: torch.cat([x.detach().masked_fill(~m, v), torch.full((len(x), extra), v, dtype=x.dtype)], 1)
    value, grad = of(RANK[name](), s, y, m)
    value2, grad2 = of(RANK[name](), wide(s, junk).requires_grad_(), wide(y, junk), F.pad(m, (0, extra)))
    torch.testing.assert_close([value2, grad2], [value, F.pad(grad, (0, extra))])
    assert (grad2[~F.pad(m, (0, extra))] == 0).all()


@EACH_RANK
def test_dropping_the_mask_is_detected(name):
    s, y, m = lists(0)
    assert not m.all() and not torch.isclose(RANK[name]()(s, y, m), RANK[name]()(s, y), rtol=1e-3)


@EACH_RANK
def test_rank_gradcheck(name):
    for seed in (1, 2):
        s, y, m = lists(seed)
        assert gradcheck(lambda x: RANK[name]()(x, y, m), s, atol=1e-6)


@EACH_RANK
@few
@given(seed=seeds)
def test_shift_invariance(name, seed):
    "整列看和两两看的，一个列表整体加一个数，不变；逐个看的会变。"
    s, y, m = lists(seed)
    a, b = RANK[name]()(s, y, m), RANK[name]()(s + torch.arange(4.0)[:, None], y, m)
    if name.startswith("bce"): assert not torch.isclose(a, b)
    else: torch.testing.assert_close(a, b)


@EACH_RANK
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_rank_low_precision_is_computed_in_fp32(name, dtype):
    s, y, m = lists(5, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16): value = RANK[name]()(s, y, m)
    grad = torch.autograd.grad(value, s)[0]
    want, want_grad = of(RANK[name](), s.detach().float().requires_grad_(), y, m)
    assert value.dtype == torch.float32 and torch.equal(value, want) and torch.equal(grad, want_grad.to(dtype))


@EACH_RANK
@pytest.mark.parametrize("grades", [0.0, 0.5])
def test_lists_without_order(name, grades):
    "只有一个候选、分级全相同：有限，没有 NaN。"
    for B, C in ((1, 1), (1, 5), (3, 4)):
        s = torch.randn(B, C, dtype=torch.float64, requires_grad=True)
        value, grad = of(RANK[name](), s, torch.full((B, C), grades))
        assert value.isfinite() and grad.isfinite().all() and (value >= 0)
        if name in ("ranknet", "NDCGLoss2", "LambdaRank", "NDCGLoss2++") or (name == "cross" and not grades): assert value == 0


@EACH_RANK
def test_extreme_scores(name):
    s = torch.tensor([[1e4, -1e4, 0.0, 3e3], [-1e4, 1e4, 1e4, -1e4]], requires_grad=True)
    value, grad = of(RANK[name](), s, torch.tensor([[0.0, 1, 0.5, 0], [1, 0, 0, 0.5]]))
    assert value.isfinite() and grad.isfinite().all()


@EACH_RANK
@pytest.mark.parametrize("which", ["scores", "grades"])
def test_rank_bad_numbers_are_named(name, which):
    s, y, _ = lists(0)
    x = (s if which == "scores" else y).detach().clone()
    x[2, 3] = math.nan
    with pytest.raises(VembedError, match=f"{which} 的第 2 个列表、第 3 个候选是 nan"): RANK[name]()(x if which == "scores" else s, x if which == "grades" else y)


@EACH_RANK
def test_rank_bad_shapes(name):
    s, y, m = lists(0)
    for args, words in (((s, y[:, :3], m), r"\[4, 6\].*\[4, 3\]"), ((s[0], y[0], m[0]), r"\[6\]"), ((s, y, m[:2]), r"\[2, 6\]"), ((s, y, m.float()), "float32.*bool"),
                        ((s, y, m & (torch.arange(4) != 1)[:, None]), "第 1 个列表一个候选也没有"), ((s[:, :0], y[:, :0]), r"\[4, 0\]"), ((s, y.to("meta"), m), "cpu、meta")):
        with pytest.raises(VembedError, match=words): RANK[name]()(*args)


@pytest.mark.parametrize("call, words", [
    (lambda: BCE(0), "pos_weight=0"), (lambda: BCE()(torch.zeros(1, 2), torch.tensor([[0.0, 2]])), "0 到 1 之间.*2"), (lambda: RankNet(0), "sigma=0"), (lambda: LambdaLoss("ndcg"), "NDCGLoss2"),
    (lambda: LambdaLoss(k=0), "k=0"), (lambda: LambdaLoss(sigma=-1), "sigma=-1"), (lambda: LambdaLoss()(torch.zeros(1, 2), torch.tensor([[0.0, 200]])), "200"),
    (lambda: MarginMSE()(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[False, True]])), "第 0 个候选是补的"),
    (lambda: RankEmbeddings(BCE(), 0), "temperature=0"), (lambda: RankEmbeddings(BCE(), use="teacher"), "use='teacher'")])
def test_bad_rank_settings(call, words):
    with pytest.raises(VembedError, match=words): call()


def test_several_positives_share_the_cross_entropy():
    "两个正例：各当一次目标，取平均（SupCon 的 out 形式）。"
    s = torch.randn(1, 5, dtype=torch.float64)
    want = (F.cross_entropy(s, torch.tensor([1])) + F.cross_entropy(s, torch.tensor([3]))) / 2
    torch.testing.assert_close(CrossEntropy()(s, torch.tensor([[0, 1, 0, 1, 0]])), want)
    torch.testing.assert_close(CrossEntropy()(torch.cat([s, s]), torch.tensor([[-1, 2, 0, 2, 0], [0] * 5])), want)  # 没有正例的列表不进平均


def test_rank_embeddings_uses_its_own_candidates():
    "打分、分级和掩码都来自 targets.lists()；混进反例的正例按 id 认出来，不当反例推。"
    q, d, targets, _ = batch(4)
    targets = replace(targets, grades=None, owners=torch.tensor([0, 1, 2, 3, 4, 1, 1, 0, -1, 3, 0]))  # 最后一个是第 0 个查询的正例
    index, mask = targets.lists()
    cos = torch.stack([torch.stack([F.cosine_similarity(q[i], d[j], dim=0) for j in row]) for i, row in enumerate(index)]) / 0.05
    right = targets.positive_mask()[torch.arange(5)[:, None], index].double()
    assert right[0, mask[0]].tolist() == [1, 0, 1]
    value = RankEmbeddings(ListNet())(Embeddings(q), Embeddings(d), targets)
    torch.testing.assert_close(value, ListNet()(cos, right, mask))
    wrong = torch.zeros_like(right)
    wrong[:, 0] = 1
    assert not torch.isclose(value, ListNet()(cos, wrong, mask), rtol=1e-3)


def test_lambda_ties_take_the_worst_rank():
    "全部并列：正例排在最后，权重不随它在第几列变。"
    values = {round(float(LambdaLoss("LambdaRank")(torch.zeros(1, 4), F.one_hot(torch.tensor([j]), 4))), 6) for j in range(4)}
    assert len(values) == 1
    assert values.pop() == pytest.approx(sum(1 / math.log2(i + 1) - 1 / math.log2(5) for i in (1, 2, 3)) / 3, abs=1e-6)
