"""按定义写的损失：逐行逐格，float64，不求快。被测的是 vembed_nb，这里一行也不用它的。"""
import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass
class Batch:
    "一批的字符串 id。文档的前 B 个依次是各查询的正例。"
    query_ids: list
    doc_ids: list
    positives: list
    query_groups: list
    doc_groups: list
    owners: list

    @property
    def shape(self): return len(self.query_ids), len(self.doc_ids)

    def targets(self, **more):
        from vembed_nb.losses.targets import make_targets

        return replace(make_targets(**vars(self)), **more)

    def is_positive(self, i, j):
        "第 j 个文档是第 i 个查询（或同样的另一个查询）的正例：在名单里；是它的正例；同组。"
        alike = [k for k, q in enumerate(self.query_ids) if q == self.query_ids[i]]
        return j in alike or any(self.doc_ids[j] in self.positives[k] or (self.query_groups[k] != "" and self.query_groups[k] == self.doc_groups[j]) for k in alike)

    def positive(self):
        "[B, N] bool。"
        B, N = self.shape
        return torch.tensor([[self.is_positive(i, j) for j in range(N)] for i in range(B)]).view(B, N)

    def permuted(self, order, extra):
        "查询连同自己的文档换次序，额外的文档也换次序；owners 跟着改。"
        B = len(order)
        docs = [*order, *(B + k for k in extra)]
        pick = lambda xs, at: [xs[i] for i in at]
        return Batch(pick(self.query_ids, order), pick(self.doc_ids, docs), pick(self.positives, order), pick(self.query_groups, order), pick(self.doc_groups, docs),
                     [order.index(o) if o >= 0 else -1 for o in pick(self.owners, docs)])


def plain(B, owners=()):
    "没有重复的一批；owners 是额外文档的主人。"
    N = B + len(owners)
    ids = lambda c, n: [f"{c}{i}" for i in range(n)]
    return Batch(ids("q", B), ids("d", N), [[f"d{i}"] for i in range(B)], [""] * B, [""] * N, [*range(B), *owners])


def messy(seed, B, extra):
    "有重复的查询、重复的文档、多正例、组、主人多少不一的一批。三种 id 用同样的字符串：碰巧相同不算一对。"
    r = random.Random(seed)
    queries, docs = [str(r.randrange(2 * B)) for _ in range(B)], [str(r.randrange(2 * (B + extra))) for _ in range(B + extra)]
    group = lambda: r.choice(["", "", "", "0", "1", "2"])
    return Batch(queries, docs, [[d, *r.sample(docs, r.choice([0, 0, 1]))] for d in docs[:B]], [group() for _ in queries], [group() for _ in docs], [*range(B), *(r.randrange(-1, B) for _ in range(extra))])


def cosines(q, d):
    "四个方向的余弦矩阵。"
    q, d = F.normalize(q, dim=-1), F.normalize(d, dim=-1)
    p = d[:len(q)]
    return {"q2d": q @ d.T, "d2q": p @ q.T, "q2q": q @ q.T, "d2d": p @ d.T}


def token_max(q, d, q_mask, d_mask, reduce="sum"):
    "MaxSim [Nq, Nd]，逐对逐 token。"
    one = lambda x, y: (x @ y.T).amax(1).sum() / (len(x) if reduce == "mean" else 1)
    return torch.stack([torch.stack([one(x[m], y[n]) for y, n in zip(d, d_mask)]) for x, m in zip(q, q_mask)])


def maxsims(q, d, q_mask, d_mask, reduce="mean"):
    "两个方向的打分矩阵。"
    s = token_max(F.normalize(q, dim=-1), F.normalize(d, dim=-1), q_mask, d_mask, reduce)
    return {"q2d": s, "d2q": s[:, :len(q)].T}


def infonce(sims, batch, s, directions=("q2d", "d2q"), joint=False, positives="mask", negatives="shared", variant="plain", prior=0.1, margin=None, hardness=0.0, hardness_on="all", twice=False):
    "各行损失的平均。twice：joint 时把正例在 d2q 里再算一次（sentence-transformers 的写法）。"
    (B, N), P, own, total = batch.shape, batch.positive(), sims["q2d"].diagonal(), 0

    def is_negative(kind, i, j):
        hard = j >= B and batch.owners[j] == i
        if kind == "q2d" and P[i, j] or kind == "d2q" and P[j, i]: return False
        if kind == "q2d" and negatives == "own" and j >= B and not hard: return False
        if kind in ("q2q", "d2d") and (hard or P[i, j] or j < B and P[j, i]): return False
        return margin is None or float(sims[kind][i, j].detach()) <= float(own[i].detach()) + margin

    def logit(kind, i, j):
        hard, c = j >= B and batch.owners[j] == i, sims[kind][i, j]
        weighed = kind == "q2d" and {"all": True, "in_batch": not hard, "hard": hard}[hardness_on]
        return s * c + (hardness * c.detach() if weighed else 0)

    def row(kinds, i):
        pos, neg = s * own[i], [logit(k, i, j) for k in kinds for j in range(sims[k].shape[1]) if is_negative(k, i, j)]
        if positives == "all":
            targets = [s * sims[kinds[0]][i, j] for j in range(sims[kinds[0]].shape[1]) if (P[i, j] if kinds[0] == "q2d" else P[j, i])]
            return torch.stack(neg + targets).logsumexp(0) - sum(targets) / len(targets)
        if variant == "plain": return torch.stack([pos] * (2 if twice and "d2q" in kinds else 1) + neg).logsumexp(0) - pos
        if not neg: return pos * 0
        if variant == "decoupled": return torch.stack(neg).logsumexp(0) - pos
        left, least = (torch.stack(neg).exp().sum() - len(neg) * prior * pos.exp()) / (1 - prior), len(neg) * torch.exp(-s)
        return torch.log(pos.exp() + (left if left > least else least)) - pos

    splits = [directions] if joint else [(k,) for k in directions]
    return sum(row(kinds, i) for kinds in splits for i in range(B)) / B / len(splits)


def sigmoid(sims, batch, s, b):
    "SigLIP：每一格一个二分类，和除以 B。"
    y = 2 * batch.positive().double() - 1
    return -F.logsigmoid(y * (s * sims["q2d"] + b)).sum() / len(y)


def pairwise(sims, batch, s):
    "自己的正例对最难的反例；没有反例的行是 0。"
    rows = [(c[i], c[~p]) for i, (c, p) in enumerate(zip(sims["q2d"], batch.positive()))]
    return sum(F.softplus(s * (neg.amax() - own)) if len(neg) else own * 0 for own, neg in rows) / len(rows)


class Biggest(TorchDispatchMode):
    "记下这一段里造出来的最大的张量有几个数（按真正占的内存，广播和视图不算）。"
    numel = 0

    def __torch_dispatch__(self, fn, types, args=(), kwargs=None):
        out = fn(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.layout == torch.strided: self.numel = max(self.numel, t.untyped_storage().nbytes() // t.element_size())
        return out
