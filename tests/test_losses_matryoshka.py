"""Matryoshka：与金值相等；共用乘法的近路与逐个长度相等；次序、权重、坏的长度。"""
import pytest
import torch
from golden import agree, golden, leaves
from hypothesis import given, settings
from hypothesis import strategies as st

from vembed_nb.core import VembedError
from vembed_nb.losses.contrastive import InfoNCE, SigmoidLoss
from vembed_nb.losses.late import ColBERTLoss
from vembed_nb.losses.matryoshka import Matryoshka, Matryoshka2D
from vembed_nb.losses.pairwise import CoSENT, TripletLoss
from vembed_nb.losses.targets import make_targets
from vembed_nb.vectors import Embeddings, truncate

few = settings(max_examples=15, deadline=None, derandomize=True)


def random(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def ids(name, n): return [f"{name}{i}" for i in range(n)]


def messy(B=7, extra=3):
    "有重复、有名单、有组、有主人的一批。"
    docs = [f"d{i // 2}" for i in range(B)] + [f"h{i}" for i in range(extra)]
    return make_targets([f"q{i % 5}" for i in range(B)], docs, owners=[*range(B), *(i % B for i in range(extra))], grades=[float(i % 3) for i in range(B + extra)])


def grads(loss, q, d, targets, mask=(None, None)):
    "(值, 对 q、d 和损失的各个参数的梯度)。"
    q, d = q.clone().requires_grad_(), d.clone().requires_grad_()
    value = loss(Embeddings(q, mask[0]), Embeddings(d, mask[1]), targets)
    return value.detach(), *torch.autograd.grad(value, [q, d, *loss.parameters()], allow_unused=True, materialize_grads=True)


def same(a, b, rtol=1e-8):
    for x, y in zip(a, b, strict=True): assert (x - y).norm() <= rtol * y.norm() + 1e-10, (x, y)


@pytest.mark.parametrize("block", [None, 2], ids=["whole", "shared"])
@pytest.mark.parametrize("name", ["matryoshka_mnrl", "matryoshka_mnrl_weights", "matryoshka_mnrl_unsorted", "matryoshka_mnrl_without_full_dim"])
def test_equals_sentence_transformers(name, block):
    "同行收乱序的 dims，把权重也照样排好；我们要求先排好，值相同。"
    case = golden("sentence_transformers")[name]
    q, p = leaves(case, "queries", "positives")
    negatives = leaves(case, "negatives")
    B, docs = len(q), torch.cat([p, *(n for x in negatives for n in x)])
    dims, weights = case["params"]["matryoshka_dims"], case["params"]["matryoshka_weights"] or [1.0] * len(case["params"]["matryoshka_dims"])
    dims, weights = zip(*sorted(zip(dims, weights), reverse=True))
    loss = Matryoshka(InfoNCE(0.05, False, ("q2d",), block=block).double(), list(dims), list(weights))
    value = loss(Embeddings(q), Embeddings(docs), make_targets(ids("q", B), ids("d", len(docs)), owners=[j % B for j in range(len(docs))]))
    keys = ["queries", "positives", "negatives"][:2 + len(negatives)]
    agree(case, value.detach(), dict(zip(keys, torch.autograd.grad(value, [q, p, *negatives]), strict=True)))


def test_cosent_inside():
    case = golden("sentence_transformers")["matryoshka_cosent"]
    q, p = leaves(case, "queries", "positives")
    loss = Matryoshka(CoSENT(20.0), case["params"]["matryoshka_dims"], case["params"]["matryoshka_weights"])
    value = loss(Embeddings(q), Embeddings(p), make_targets(ids("q", len(q)), ids("d", len(q)), grades=case["inputs"]["labels"]))
    agree(case, value.detach(), dict(zip(("queries", "positives"), torch.autograd.grad(value, [q, p]))))


OPTIONS = [dict(), dict(directions=("q2d",)), dict(margin=0.1), dict(hardness=4.0, hardness_on="in_batch"), dict(negatives="own", directions=("q2d",)), dict(hardness=4.0, hardness_on="hard", margin=-0.2)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@given(st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([[8], [8, 3], [7, 4, 1]]))
@few
def test_shared_product_equals_one_by_one(options, seed, block, dims):
    "近路（块有几行都行）与逐个长度：值、梯度、温度的梯度、记下的每个长度的损失都相等。"
    q, d, t, weights = random(7, 8, seed=seed), random(10, 8, seed=seed + 1), messy(), [0.5 + k for k in range(len(dims))]
    shared, apart = (Matryoshka(InfoNCE(0.1, block=b, **options).double(), dims, weights) for b in (block, None))
    same(grads(shared, q, d, t), grads(apart, q, d, t))
    assert shared.logs == pytest.approx(apart.logs)


def test_gradcheck():
    f = Matryoshka(InfoNCE(0.2, block=2).double(), [2, 4], [1, 0.3])
    t = messy(4, 2)
    q, d = random(4, 5).requires_grad_(), random(6, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, s: torch.func.functional_call(f, {"loss.logit_scale": s}, (Embeddings(a), Embeddings(b), t)), [q, d, torch.tensor(1.5, dtype=torch.double, requires_grad=True)])


@pytest.mark.parametrize("loss", [SigmoidLoss(0.1, -5), TripletLoss(), TripletLoss(distance="euclidean"), InfoNCE(0.1, positives="all"), InfoNCE(0.1, joint=True), InfoNCE(0.1, variant="debiased")], ids=lambda m: type(m).__name__)
def test_wraps_any_loss(loss):
    "外面包一层 = 自己截、自己归一化、自己加权。"
    loss, q, d, t = loss.double(), random(7, 8), random(10, 8, seed=1), messy()
    by_hand = lambda q, d: sum(w * loss(Embeddings(truncate(q, k)), Embeddings(truncate(d, k)), t) for k, w in ((8, 1), (3, 0.5)))
    a, b = q.clone().requires_grad_(), d.clone().requires_grad_()
    want = by_hand(a, b)
    same(grads(Matryoshka(loss, [8, 3], [1, 0.5]), q, d, t)[:3], (want.detach(), *torch.autograd.grad(want, [a, b])))


def test_late_interaction_slices_the_last_axis():
    "多向量：截的是每个 token 的维数，不是 token 的个数；掩码照旧。"
    q, d, qm, dm = random(3, 4, 8), random(3, 6, 8, seed=1), torch.ones(3, 4).bool(), torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    loss, t = ColBERTLoss(0.1).double(), make_targets(ids("q", 3), ids("d", 3))
    want = sum(loss(Embeddings(truncate(q, k), qm), Embeddings(truncate(d, k), dm), t) for k in (8, 2))
    assert torch.allclose(Matryoshka(loss, [8, 2])(Embeddings(q, qm), Embeddings(d, dm), t), want)


@pytest.mark.parametrize("block", [None, 2])
def test_wrong_order_is_detected(block):
    "先归一化、再截短的写法，损失和梯度都对不上。"
    q, d, t = random(6, 8), random(6, 8, seed=1), make_targets(ids("q", 6), ids("d", 6))
    right = grads(Matryoshka(InfoNCE(0.1, block=block).double(), [8, 2]), q, d, t)
    wrong = grads(InfoNCE(0.1).double(), q, d, t)[0] + torch.nn.functional.cross_entropy(10 * truncate(q)[:, :2] @ truncate(d)[:, :2].T, torch.arange(6))
    with pytest.raises(AssertionError): same(right[:1], [wrong], 1e-3)


def test_shares_of_two_ranks_average_to_the_whole():
    from dataclasses import replace

    q, d, t = random(7, 8), random(10, 8, seed=1), messy()
    for block in (None, 2):
        loss = Matryoshka(InfoNCE(0.1, block=block).double(), [8, 3])
        whole, a, b = (grads(loss, q, d, replace(t, start=s, stop=e, ranks=r)) for s, e, r in ((0, 7, 1), (0, 4, 2), (4, 7, 2)))
        same([(x + y) / 2 for x, y in zip(a, b)], whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_fp32_out(dtype):
    q, d, t = random(7, 8).to(dtype), random(10, 8, seed=1).to(dtype), messy()
    for block in (None, 2):
        loss = Matryoshka(InfoNCE(0.1, block=block), [8, 3])
        with torch.autocast("cpu", torch.bfloat16): value = loss(Embeddings(q), Embeddings(d), t)
        assert value.dtype == torch.float32 and torch.equal(value, loss(Embeddings(q.float()), Embeddings(d.float()), t))


BAD = {"duplicate": (dict(dims=[8, 8]), "重复"), "unsorted": (dict(dims=[4, 8, 2]), "8, 4, 2"), "zero": (dict(dims=[0]), "正整数"), "empty": (dict(dims=[]), "正整数"),
       "weights": (dict(dims=[8, 4], weights=[1]), "2 个"), "negative weight": (dict(dims=[8, 4], weights=[1, -1]), "不小于 0")}


@pytest.mark.parametrize("case", BAD)
def test_bad_dims(case):
    kw, word = BAD[case]
    with pytest.raises(VembedError, match=word): Matryoshka(InfoNCE(), **kw)


@pytest.mark.parametrize("block", [None, 2])
def test_bad_batches(block):
    q, d, t = Embeddings(random(7, 8)), Embeddings(random(10, 8, seed=1)), messy()
    with pytest.raises(VembedError, match=r"9.*8 维.*\[7, 8\]"): Matryoshka(InfoNCE(block=block), [9])(q, d, t)
    broken = random(10, 8); broken[4, 7] = float("nan")
    with pytest.raises(VembedError, match="文档向量的第 4 行"): Matryoshka(InfoNCE(block=block), [8, 4])(q, Embeddings(broken), t)
    with pytest.raises(VembedError, match="layers"): Matryoshka2D(InfoNCE(), [8])(q, d, t)


def test_two_dimensional():
    "层 × 长度：每一格都算，权重各归各的。"
    layers, t = [random(7, 8, seed=s) for s in range(3)], make_targets(ids("q", 7), ids("d", 7))
    docs = [random(7, 8, seed=s) for s in range(10, 13)]
    loss = Matryoshka2D(InfoNCE(0.1).double(), [8, 4], [1, 0.5], layer_weights=[0.25, 2])
    got = loss(Embeddings(layers[2], None, layers[:2]), Embeddings(docs[2], None, docs[:2]), t)
    one = Matryoshka(InfoNCE(0.1).double(), [8, 4], [1, 0.5])
    assert torch.allclose(got, sum(w * one(Embeddings(q), Embeddings(d), t) for w, q, d in zip((0.25, 2, 1), layers, docs)))
    assert {"loss@8", "loss@4", "layer0/loss@8", "layer1/loss@4"} <= set(loss.logs)
    with pytest.raises(VembedError, match="layer_weights"): Matryoshka2D(InfoNCE(), [8], layer_weights=[1])(Embeddings(layers[2], None, layers[:2]), Embeddings(docs[2], None, docs[:2]), t)
