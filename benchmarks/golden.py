"""同行的参考值：把同行库算出的损失和梯度写进 tests/golden/*.json，普通的 pytest 拿它们核对我们的损失。
用法（在 benchmarks/peers.txt 的环境里）：python benchmarks/golden.py [文件名的一部分]。每个例子的 call 就是真正执行的那一行。"""
import json
import math
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize


def bare(name):
    "只放一个包的壳，不执行它的 __init__（那里会装载 torchvision），这样就能单独装载它的子模块。"
    paths = find_spec(name).submodule_search_locations
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = paths


for name in ("open_clip", "colpali_engine", "colpali_engine.loss", "colpali_engine.utils"): bare(name)
import colpali_engine.loss.late_interaction_losses as colpali  # noqa: E402
import maxsim_cpu  # noqa: E402
import open_clip.loss as open_clip  # noqa: E402
import sentence_transformers.cross_encoder.losses as cross  # noqa: E402
import sentence_transformers.multi_vector_encoder.losses as multi  # noqa: E402
import sentence_transformers.sentence_transformer.losses as dense  # noqa: E402
from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor  # noqa: E402
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance  # noqa: E402
from pytorch_metric_learning.losses import SupConLoss, TripletMarginLoss  # noqa: E402
from pytorch_metric_learning.miners import BatchHardMiner, TripletMarginMiner  # noqa: E402
from sentence_transformers import util  # noqa: E402
from sentence_transformers.cross_encoder import CrossEncoder  # noqa: E402
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores  # noqa: E402

SEED = 42
mining, distances = dense.BatchHardTripletLossDistanceFunction, dense.TripletDistanceMetric
score_multi_vector = BaseVisualRetrieverProcessor.score_multi_vector


# 同行要的是模型和文本；下面几个小东西把现成的向量和分数递给它们
class Given(nn.Module):
    "什么也不算的模型：给什么特征，就当它是输出。"
    def __init__(self, dim=None): super().__init__(); self.dim = dim
    def get_embedding_dimension(self): return self.dim
    def forward(self, features, task=None): return dict(features)


class Scores(CrossEncoder):
    "什么也不算的重排模型：第 i 个文档的分数就是 scores[i]。"
    num_labels, device = 1, torch.device("cpu")
    def __init__(self, scores): nn.Module.__init__(self); self.scores = scores
    def preprocess(self, pairs, **_): return {"index": torch.tensor([d for _, d in pairs])}
    def forward(self, features): return {"scores": self.scores[features["index"]][:, None]}


def columns(*tensors): return [{"sentence_embedding": x} for x in tensors]
def tokens(embeddings, masks): return [{"token_embeddings": e, "attention_mask": m.long()} for e, m in zip(embeddings, masks)]
def padded(x, mask): return x * mask[..., None]
def ragged(x, mask): return [r[m] for r, m in zip(x, mask)]
def lists(mask): return [list(range(len(mask))), ragged(torch.cumsum(mask.flatten().long(), 0).view(mask.shape).sub(1), mask)]
def flat(x): return [list(range(x.numel())), list(range(x.numel()))]
def per_column(x): return [list(range(len(x))), *torch.arange(x.numel()).view(x.shape).T.tolist()]


# 输入只有三位小数：JSON 里写得短，读回来分毫不差
def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED + seed), dtype=torch.float64).mul(1e3).round() / 1e3


def batch(kind="random", negatives=0, b=6, d=8, seed=0):
    "一批单向量：queries [B, D]、positives [B, D]、negatives [N, B, D]；kind 是刁难的方式。"
    b, d = (1 if kind == "one" else b), (1 if kind == "one_dim" else d)
    q, p, n = rand(b, d, seed=seed), rand(b, d, seed=seed + 1), rand(negatives, b, d, seed=seed + 2)
    if kind == "all_negative": q, p, n = q.abs(), -p.abs(), -n.abs()
    if kind == "duplicates": p[1], q[3] = p[0], q[2]; n[:, 0] = p[0]
    return dict(queries=q, positives=p, **(dict(negatives=n) if negatives else {}))


def late(kind="random", negatives=0, b=4, d=8, lq=(3, 5, 4, 5), ld=(7, 4, 6, 5), seed=0):
    "一批多向量，长短不一；补齐的位置填了乱数，掩码必须起作用。"
    mask = lambda lengths: torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    qm, pm = mask(lq[:b]), mask(ld[:b])
    q, p = (normalize(rand(*m.shape, d, seed=seed + i), dim=-1).mul(1e3).round() / 1e3 for i, m in enumerate((qm, pm)))
    n, nm = rand(negatives, b, max(ld), d, seed=seed + 2).mul(400).round() / 1e3, torch.stack([mask(ld[1:] + ld[:1])] * negatives) if negatives else None
    if kind == "all_negative": q, p, n = q.abs(), -p.abs(), -n.abs()
    more = ({"negatives": n}, {"negative_mask": nm}) if negatives else ({}, {})
    return {"queries": q, "positives": p} | more[0], {"query_mask": qm, "positive_mask": pm} | more[1]


def plain(x, digits=None):
    "张量 → 嵌套列表：digits 位小数，不说就是九位有效数字。"
    if isinstance(x, torch.Tensor | np.ndarray): x = x.tolist()
    if isinstance(x, list | tuple): return [plain(y, digits) for y in x]
    if not isinstance(x, float): return int(x) if isinstance(x, bool) else x
    x = float(f"{x:.9g}") if digits is None else round(x, digits)
    return int(x) if x == int(x) and abs(x) < 1e15 else x


class Book:
    "一个同行的全部例子。"
    def __init__(self, name, peer, package, dtype=torch.float64):
        self.name, self.dtype, self.cases, self.arrays = name, dtype, [], {}
        self.head = dict(peer=peer, versions={p: version(p) for p in (package, "torch", "numpy")}, seed=SEED)

    def case(self, name, call, inputs, fixed={}, normalizes="peer", note=None, grads=True, parity=True, params={}):
        "执行 call，记下损失（或 scores）和它（或 scores 之和）对 inputs 的梯度；梯度精确到最大一个的千万分之一。"
        to = lambda x: x.to(self.dtype) if x.is_floating_point() else x
        leaves = {k: to(v).detach().clone().requires_grad_(grads) for k, v in inputs.items()}
        out = eval(call, globals() | leaves | {k: to(v) for k, v in fixed.items()} | params)
        outputs = {"loss": plain(out.item())} if getattr(out, "ndim", None) == 0 else {"scores": plain(out)}
        if grads:
            if out.requires_grad: out.sum().backward()
            outputs["grads"] = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in leaves.items()}
            largest = max(v.abs().max().item() for v in outputs["grads"].values())
            outputs["grads"] = {k: plain(v, 7 - math.ceil(math.log10(largest or 1))) for k, v in outputs["grads"].items()}
        row = dict(name=name, call=call, dtype=str(self.dtype).removeprefix("torch."), normalizes=normalizes, parity=parity, **({"note": note} if note else {}),
                   inputs={k: self.keep(v) for k, v in (inputs | fixed).items()}, params=params, outputs=outputs)
        assert name not in {c["name"] for c in self.cases}, name
        assert "NaN" not in json.dumps(row) and "Infinity" not in json.dumps(row), f"{name} 里有 NaN 或 Inf"
        self.cases.append(row)

    def keep(self, x):
        "例子共用的数组只存一份，例子里写它的名字。"
        text = json.dumps(plain(x), separators=(",", ":"))
        return self.arrays.setdefault(text, f"a{len(self.arrays)}")

    def save(self, folder):
        "一个例子一行，方便看差异。"
        arrays = ",\n".join(f'"{name}": {text}' for text, name in self.arrays.items())
        cases = ",\n".join(json.dumps(c, ensure_ascii=False, separators=(",", ":")) for c in self.cases)
        text = json.dumps(self.head, ensure_ascii=False)[:-1] + f',\n"arrays": {{\n{arrays}\n}},\n"cases": [\n{cases}\n]}}\n'
        (folder/f"{self.name}.json").write_text(text, encoding="utf-8")
        print(f"{self.name}.json：{len(self.cases)} 个例子，{len(text) / 1024:.0f} KB")


ONE_WAY, BOTH = ("query_to_doc",), ("query_to_doc", "doc_to_query")
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
KINDS = ("all_negative", "duplicates", "one", "one_dim")


def sentence_transformers():
    "单向量：对比、套娃、CoSENT、三元组、蒸馏。"
    book = Book("sentence_transformers", "sentence-transformers（SentenceTransformer 的损失）", "sentence-transformers")
    names = lambda data: "queries, positives" + (", *negatives" if "negatives" in data else "")

    def mnrl(name, directions, mode, data, scale=20.0, hardness=None, strength=0.0):
        options = dict(scale=scale, directions=directions, partition_mode=mode, hardness_mode=hardness, hardness_strength=strength)
        call = f"dense.MultipleNegativesRankingLoss(None, {', '.join(f'{k}={k}' for k in options)}).compute_loss_from_embeddings([{names(data)}], None)"
        book.case(f"mnrl_{name}", call, data, params=options)

    variants = {"one_way": (ONE_WAY, "joint"), "symmetric_per_direction": (BOTH, "per_direction"), "symmetric_joint": (BOTH, "joint"), "all_joint": (ALL, "joint"),
                "q2d_q2q_joint": (("query_to_doc", "query_to_query"), "joint"), "q2d_d2d_joint": (("query_to_doc", "doc_to_doc"), "joint")}
    for name, (directions, mode) in variants.items():
        for n in (0, 1, 2) if name == "one_way" else (0, 2): mnrl(f"{name}_neg{n}", directions, mode, batch(negatives=n, seed=10 * n))
    for name in ("one_way", "symmetric_per_direction", "all_joint"):
        for kind in KINDS: mnrl(f"{name}_{kind}", *variants[name], batch(kind, negatives=int(kind == "duplicates")))
        mnrl(f"{name}_scale100", *variants[name], batch(negatives=1), scale=100.0)
    for hardness in ("in_batch_negatives", "hard_negatives", "all_negatives"):
        mnrl(f"one_way_{hardness}", ONE_WAY, "joint", batch(negatives=2), hardness=hardness, strength=5.0)
        mnrl(f"all_joint_{hardness}", ALL, "joint", batch(negatives=1), hardness=hardness, strength=9.0)
    mnrl("symmetric_per_direction_in_batch_negatives", BOTH, "per_direction", batch(), hardness="in_batch_negatives", strength=9.0)

    def matryoshka(name, data, dims, weights, inner="dense.MultipleNegativesRankingLoss(m, scale=20.0)", labels="None", fixed={}):
        call = f"(lambda m: dense.MatryoshkaLoss(m, {inner}, matryoshka_dims, matryoshka_weights)(columns({names(data)}), {labels}))(Given(8))"
        book.case(f"matryoshka_{name}", call, data, fixed, params=dict(matryoshka_dims=dims, matryoshka_weights=weights))

    grades = torch.tensor([0.0, 0.2, 0.2, 0.5, 0.9, 1.0])
    matryoshka("mnrl", batch(), [8, 4, 2], None)
    matryoshka("mnrl_weights", batch(negatives=1), [8, 4, 2], [1.0, 0.5, 0.25])
    matryoshka("mnrl_unsorted", batch(), [2, 8, 4], [0.25, 1.0, 0.5])
    matryoshka("mnrl_without_full_dim", batch("all_negative"), [4, 1], [0.7, 0.3])
    matryoshka("cosent", batch(), [8, 4], [1.0, 0.5], "dense.CoSENTLoss(m)", "labels", dict(labels=grades))

    graded = {"graded": (batch(seed=3), grades, 20.0), "binary": (batch(seed=3), torch.tensor([1.0, 0, 0, 1, 1, 0]), 20.0),
              "scale100": (batch(seed=3), grades, 100.0), "all_equal": (batch(seed=3), grades * 0 + 1, 20.0),
              "duplicates": (batch("duplicates", seed=3), grades, 20.0), "one": (batch("one"), grades[:1], 20.0), "odd_dim": (batch(d=7, seed=3), grades, 20.0)}
    for loss in ("CoSENTLoss", "AnglELoss"):
        call = f"dense.{loss}(None, scale=scale).compute_loss_from_embeddings([queries, positives], labels)"
        for name, (data, labels, scale) in graded.items():
            book.case(f"{loss.removesuffix('Loss').lower()}_{name}", call, data, dict(labels=labels), params=dict(scale=scale))
    call = "dense.AnglELoss(None, scale=scale).compute_loss_from_embeddings([queries, positives, *negatives], None)"
    book.case("angle_triplets", call, batch(negatives=2, seed=3), params=dict(scale=20.0))

    for metric, margin in (("EUCLIDEAN", 5.0), ("EUCLIDEAN", 1.0), ("COSINE", 0.5), ("COSINE", 0.05), ("MANHATTAN", 5.0)):
        call = f"dense.TripletLoss(None, distance_metric=distances.{metric}, triplet_margin=margin).compute_loss_from_embeddings([queries, positives, negatives[0]], None)"
        book.case(f"triplet_{metric.lower()}_{margin}", call, batch(negatives=1, seed=4), normalizes="peer" if metric == "COSINE" else "no", params=dict(margin=margin))
    labels, tied = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]), rand(6, 8, seed=6)
    tied[1], tied[4] = tied[0], tied[0]
    for short in ("BatchAll", "BatchHard", "BatchSemiHard"):
        for metric, margin in (("euclidean", 5.0), ("euclidean", 0.5), ("cosine", 0.3)):
            call = f"dense.{short}TripletLoss(None, mining.{metric}_distance, margin).compute_loss_from_embeddings([embeddings], labels)"
            book.case(f"triplet_{short}_{metric}_{margin}", call, dict(embeddings=rand(8, 8, seed=5)), dict(labels=labels), normalizes="peer" if metric == "cosine" else "no", params=dict(margin=margin))
        call = f"dense.{short}TripletLoss(None, mining.euclidean_distance, margin).compute_loss_from_embeddings([embeddings], labels)"
        book.case(f"triplet_{short}_duplicates", call, dict(embeddings=tied), dict(labels=torch.tensor([0, 0, 1, 1, 2, 2])), normalizes="no", params=dict(margin=1.0), grads=False,
                  note="有重复的向量，距离为 0 处次梯度不唯一，只比损失")
    for metric in ("euclidean", "cosine"):
        call = f"dense.BatchHardSoftMarginTripletLoss(None, mining.{metric}_distance).compute_loss_from_embeddings([embeddings], labels)"
        book.case(f"triplet_BatchHardSoftMargin_{metric}", call, dict(embeddings=rand(8, 8, seed=5)), dict(labels=labels), normalizes="peer" if metric == "cosine" else "no")

    data, teacher = batch(negatives=2, seed=7), rand(6, 3, seed=8) * 4
    call = "dense.DistillKLDivLoss(None, {}).compute_loss_from_embeddings([queries, positives, *negatives], labels)"
    for name, s, t, scores in (("t1", 1.0, 1.0, teacher), ("t2", 2.0, 2.0, teacher), ("t_half", 0.5, 0.5, teacher), ("student2_teacher05", 2.0, 0.5, teacher),
                               ("extreme", 1.0, 1.0, teacher * 10), ("ties", 3.0, 3.0, teacher * 0)):
        params = dict(student_temperature=s, teacher_temperature=t)
        book.case(f"distill_kl_{name}", call.format(", ".join(f"{k}={k}" for k in params)), data, dict(labels=scores), normalizes="no", params=params)
    book.case("distill_kl_cos_t005", call.format("similarity_fct=util.pairwise_cos_sim, temperature=temperature"), data, dict(labels=teacher / 10), params=dict(temperature=0.05))
    call, margins = "dense.MarginMSELoss(None).compute_loss_from_embeddings([queries, positives, *negatives], labels)", "labels 是教师的差 [B, N]"
    book.case("margin_mse_neg1", call, batch(negatives=1, seed=7), dict(labels=teacher[:, :1]), normalizes="no", note=margins)
    book.case("margin_mse_neg2", call, data, dict(labels=teacher[:, :2]), normalizes="no", note=margins)
    book.case("margin_mse_scores", call, data, dict(labels=teacher), normalizes="no", note="labels 是教师的分 [B, 1 + N]，正例在前")
    for metric in ("mse", "l2", "cosine"):
        call = f"dense.EmbedDistillLoss(Given(), distance_metric='{metric}').compute_loss_from_embeddings([queries, positives], [teacher_queries, teacher_positives])"
        book.case(f"embed_distill_{metric}", call, batch(seed=7), {f"teacher_{k}": v for k, v in batch(seed=17).items()}, normalizes="peer" if metric == "cosine" else "no")
    return book


def cross_encoder():
    "重排：从分数直接算；scores、labels [B, N]，mask 标出真正的文档。"
    book = Book("sentence_transformers_cross_encoder", "sentence-transformers（CrossEncoder 的损失）", "sentence-transformers", torch.float32)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 4])[:, None]
    scores = rand(4, 6, seed=1) * mask
    grades = torch.tensor([[3, 0, 2, 0, 1, 0], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 2, 1, 0, 0]]).float() * mask
    binary, extreme = (grades > 0).float(), scores * 40
    one = scores[2:3, :1], torch.ones(1, 1), mask[2:3, :1]
    listwise = {"graded": (scores, grades, mask), "binary": (scores, binary, mask), "extreme": (extreme, grades, mask), "all_negative": (-scores.abs(), grades, mask),
                "all_equal_labels": (scores, mask.float(), mask), "one_query": (scores[:1], grades[:1], mask[:1]), "one_document": one}

    def listed(name, loss, keys=listwise, weighting=None, **params):
        options = [f"weighting_scheme=cross.{weighting}"] * bool(weighting) + [f"{k}={k}" for k in params]
        call = f"cross.{loss}({', '.join(['Scores(scores[mask])', *options])})(lists(mask), ragged(labels, mask))"
        for key in keys:
            s, y, m = listwise[key]
            book.case(f"{name}_{key}", call, dict(scores=s), dict(labels=y, mask=m), normalizes="no", params=params)

    listed("listnet", "ListNetLoss")
    for scheme in ("NoWeighting", "NDCGLoss1", "NDCGLoss2", "LambdaRank", "NDCGLoss2PP"):
        name, weighting = "lambda_" + scheme.removesuffix("Weighting").lower(), f"{scheme}Scheme()"
        listed(name, "LambdaLoss", listwise if scheme == "NDCGLoss2PP" else ("graded", "binary", "extreme", "all_equal_labels"), weighting)
        listed(f"{name}_k2", "LambdaLoss", ("graded",), weighting, k=2)
    listed("lambda_mu5_sigma2_natural", "LambdaLoss", ("graded",), "NDCGLoss2PPScheme(mu=5.0)", sigma=2.0, reduction_log="natural")
    listed("ranknet", "RankNetLoss")
    listed("ranknet_natural", "RankNetLoss", ("graded", "extreme"), reduction_log="natural", sigma=0.5)
    listed("listmle", "ListMLELoss", ("graded", "one_query"), respect_input_order=True)
    listed("plistmle", "PListMLELoss", ("graded", "one_query"), respect_input_order=True)

    call = "cross.BinaryCrossEntropyLoss(Scores(scores[mask]), pos_weight=pos_weight and torch.tensor(pos_weight))(flat(scores[mask]), labels[mask])"
    soft = rand(4, 6, seed=2).abs().clamp(max=1) * mask
    for name, (s, y, m), weight in (("binary", listwise["binary"], None), ("soft", (scores, soft, mask), None), ("pos_weight3", listwise["binary"], 3.0), ("extreme", (extreme, binary, mask), None), ("one", one, None)):
        book.case(f"bce_{name}", call, dict(scores=s), dict(labels=y, mask=m), normalizes="no", params=dict(pos_weight=weight))

    candidates, note = rand(5, 4, seed=3), "scores [B, C]，第 0 列是正例：候选上的交叉熵"
    for name, s, scale, activation in (("plain", candidates, 1.0, None), ("sigmoid10", candidates, 10.0, "nn.Sigmoid()"), ("extreme", candidates * 40, 1.0, None),
                                       ("ties", candidates * 0 + 1, 1.0, None), ("one", candidates[:1, :1], 1.0, None)):
        call = f"cross.MultipleNegativesRankingLoss(Scores(scores), scale=scale, activation_fn={activation}).calculate_loss(list(scores.T), len(scores))"
        book.case(f"candidates_{name}", call, dict(scores=s), normalizes="no", params=dict(scale=scale, activation=activation), note=note)
    for name, n, said in (("margins", 3, "教师的差 [B, N]"), ("scores", 4, "教师的分 [B, 1 + N]")):
        book.case(f"margin_mse_{name}", "cross.MarginMSELoss(Scores(scores.flatten()))(per_column(scores), labels)", dict(scores=candidates), dict(labels=rand(5, n, seed=4) * 3), normalizes="no",
                  note=f"scores [B, 1 + N]，正例在前；labels 是{said}")
    return book


def multi_vector():
    "多向量：MaxSim 和它的损失。"
    book = Book("sentence_transformers_multi_vector", "sentence-transformers（MultiVectorEncoder 的损失和 util.similarity）", "sentence-transformers", torch.float32)
    note = "补齐的位置填了乱数，只有掩码能挡住"

    def maxsim(name, q, d, document_mask=None, note=note, **kw):
        call = "util.maxsim(queries, documents, query_mask, document_mask" + (", length_normalize=True)" if name == "mean" else ")")
        masks = dict(query_mask=q[1]["query_mask"], document_mask=d[1]["positive_mask"] if document_mask is None else document_mask)
        book.case(f"maxsim_{name}", call, dict(queries=q[0]["queries"], documents=d[0]["positives"]), masks, normalizes="no", note=note, **kw)

    for name, data in dict(random=late(), mean=late(), all_negative=late("all_negative"), one_dim=late(d=1)).items(): maxsim(name, data, data)
    maxsim("more_documents", late(b=3, seed=5), late(b=4, seed=7))
    empty = late()[1]["positive_mask"]; empty[1] = False
    maxsim("empty_document", late(), late(), empty, "第 1 个文档全被挡住：同行给 -1e9，我们报错", grads=False, parity=False)

    def loss(name, call, kind="random", negatives=0, params={}, fixed={}, **kw):
        x, m = late(kind, negatives=negatives, **kw)
        more, masks = (", *negatives", ", *negative_mask") if negatives else ("", "")
        book.case(name, call.format(features=f"tokens([queries, positives{more}], [query_mask, positive_mask{masks}])"), x, m | fixed, normalizes="no", note=note, params=params)

    mnrl = "multi.MultiVectorMultipleNegativesRankingLoss(Given(), scale=scale)({features})"
    for n in (0, 1, 2): loss(f"mnrl_neg{n}", mnrl, negatives=n, params=dict(scale=1.0), seed=10 * n)
    loss("mnrl_scale20", mnrl, params=dict(scale=20.0), seed=20)
    loss("mnrl_all_negative", mnrl, "all_negative", params=dict(scale=1.0))
    loss("mnrl_one", mnrl, b=1, params=dict(scale=1.0))
    loss("mnrl_mean", mnrl.replace("scale=scale", "scale=scale, similarity_fct=mean_colbert_scores"), negatives=1, params=dict(scale=50.0))
    teacher = dict(labels=rand(4, 3, seed=8) * 4)
    loss("distill_kl", "multi.MultiVectorDistillKLDivLoss(Given(), temperature=temperature)({features}, labels)", negatives=2, params=dict(temperature=2.0), fixed=teacher)
    loss("margin_mse", "multi.MultiVectorMarginMSELoss(Given())({features}, labels)", negatives=2, fixed=teacher)
    return book


def clip():
    "open_clip：特征由模型先归一化，所以 normalize 写在 call 里；梯度是对归一化之前的。"
    book = Book("open_clip", "open_clip", "open_clip_torch")
    feats = "normalize(images, dim=-1), normalize(texts, dim=-1), scale"

    def case(name, call, data, scale=14.2857, bias=None, **more):
        scalars = {k: torch.tensor(v, dtype=torch.float64) for k, v in dict(scale=scale, bias=bias).items() if v is not None}
        book.case(name, call, dict(images=data["queries"], texts=data["positives"]) | scalars, normalizes="call", note="scale 已经取过 exp", **more)

    for kind in ("random", *KINDS):
        case(f"clip_{kind}", f"open_clip.ClipLoss()({feats})", batch(kind))
        case(f"siglip_{kind}", f"open_clip.SigLipLoss()({feats}, bias)", batch(kind), 10.0, -10.0)
    case("clip_scale100", f"open_clip.ClipLoss()({feats})", batch(seed=1), 100.0)
    case("clip_bias", f"open_clip.ClipLoss()({feats}, bias)", batch(seed=1), 10.0, -10.0)
    case("siglip_scale100", f"open_clip.SigLipLoss()({feats}, bias)", batch(seed=1), 100.0, -10.0)
    case("siglip_bias0", f"open_clip.SigLipLoss()({feats}, bias)", batch(seed=1), 1.0, 0.0)
    teachers = dict(teacher_images=rand(6, 5, seed=30), teacher_texts=rand(6, 5, seed=31))
    distill = f"open_clip.DistillClipLoss()({feats}, normalize(teacher_images, dim=-1), normalize(teacher_texts, dim=-1), teacher_scale)[1]"
    for name, scale, teacher in (("distill", 14.2857, 20.0), ("distill_scale100", 100.0, 100.0), ("distill_uniform", 5.0, 0.0)):
        case(name, distill, batch(seed=2), scale, fixed=teachers, params=dict(teacher_scale=teacher))
    return book


def metric_learning():
    "pytorch-metric-learning：多正例，和带挖掘的三元组。"
    book = Book("pytorch_metric_learning", "pytorch-metric-learning", "pytorch-metric-learning")
    labels, x = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3]), rand(8, 8, seed=1)
    tied = x.clone(); tied[1], tied[3] = x[0], x[0]
    views = torch.cat([x[:4].abs(), -x[4:].abs()]), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    call, lonely = "SupConLoss(temperature=temperature)(embeddings, labels)", "没有正例的锚点不进平均"
    for name, e, y, t, note in (("self", x, labels, 0.1, lonely), ("self_t007", x, labels, 0.07, lonely), ("self_t001", x, labels, 0.01, lonely), ("self_duplicates", tied, labels, 0.1, lonely),
                                ("self_one_dim", x[:, :1], labels, 0.1, lonely), ("self_no_lonely", x[:7], labels[:7], 0.1, None), ("self_all_negative", *views, 0.1, None)):
        book.case(f"supcon_{name}", call, dict(embeddings=e), dict(labels=y), params=dict(temperature=t), note=note)
    for name, y in (("all_same_label", [0] * 8), ("no_positive", list(range(8)))):
        book.case(f"supcon_{name}", call, dict(embeddings=x), dict(labels=torch.tensor(y)), params=dict(temperature=0.1), parity=False, note="没有反例（或没有正例）时同行直接给 0")

    sides = dict(queries=rand(5, 8, seed=2), documents=rand(9, 8, seed=3))
    some, many = torch.tensor([0, 1, 1, 2, 3]), torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4])
    call = "(queries, query_labels, ref_emb=documents, ref_labels=document_labels)"
    for name, ql, dl, t in (("one_each", torch.arange(5), torch.arange(9), 0.05), ("many", some, many, 0.1), ("query_without_positive", torch.tensor([0, 1, 1, 2, 9]), many, 0.1)):
        book.case(f"supcon_ref_{name}", f"SupConLoss(temperature=temperature){call}", sides, dict(query_labels=ql, document_labels=dl), params=dict(temperature=t))
    book.case("triplet_cosine_ref", f"TripletMarginLoss(margin=margin, distance=CosineSimilarity()){call}", sides, dict(query_labels=some, document_labels=many), params=dict(margin=0.2), note="查询对另一堆文档")

    for dist, build, margin in (("lp", "LpDistance()", 0.4), ("euclidean", "LpDistance(normalize_embeddings=False)", 3.0), ("cosine", "CosineSimilarity()", 0.4)):
        miners = {kind: f", TripletMarginMiner(margin=margin, type_of_triplets='{kind}', distance={build})(embeddings, labels)" for kind in ("all", "hard", "semihard")}
        miners |= {"no_miner": "", "batch_hard": f", BatchHardMiner(distance={build})(embeddings, labels)"}
        for kind, miner in miners.items():
            note = {"no_miner": "全部三元组，", "batch_hard": "每个锚点最远的正例、最近的反例；没有正例的锚点不算；"}.get(kind, "") + "对 > 0 的项取平均"
            call = f"TripletMarginLoss(margin=margin, distance={build})(embeddings, labels{miner})"
            book.case(f"triplet_{dist}_{kind}", call, dict(embeddings=x), dict(labels=labels), normalizes="no" if dist == "euclidean" else "peer", params=dict(margin=margin), note=note)
    return book


def colpali_engine():
    "colpali：没有掩码，靠补 0。补了 0 的文档遇到全负的相似度会出错，这样的例子 parity 是假。"
    book = Book("colpali_engine", "colpali-engine", "colpali-engine")
    queries, positives, negatives = (f"padded({side}, {mask})" for side, mask in (("queries", "query_mask"), ("positives", "positive_mask"), ("negatives", "negative_mask")))
    equal = dict(ld=(6, 6, 6, 6))

    def case(name, call, kind="random", negatives=0, parity=True, params={}, **kw):
        x, m = late(kind, negatives=negatives, **kw)
        if negatives: x["negatives"], m["negative_mask"] = x["negatives"].transpose(0, 1), m["negative_mask"].transpose(0, 1)
        book.case(name, call, x, m, normalizes="no", parity=parity, params=params, note="negatives [B, N, Ld, D]" if negatives else None)

    for loss, t in (("ColbertLoss", 0.02), ("ColbertPairwiseCELoss", 1.0), ("ColbertSigmoidLoss", 0.5)):
        short = loss.removeprefix("Colbert").removesuffix("Loss").lower() or "colbert"
        call = f"colpali.{loss}(temperature=temperature, normalize_scores=normalize_scores)({queries}, {positives})"
        case(short, call, params=dict(temperature=t, normalize_scores=True), seed=1)
        if short == "colbert": case("colbert_sum", call, params=dict(temperature=t, normalize_scores=False), seed=1)
        case(f"{short}_all_negative", call, "all_negative", params=dict(temperature=t, normalize_scores=True), **equal)
    call = f"colpali.ColbertLoss(temperature=temperature)({queries}, {positives})"
    case("colbert_padding_wins", call, "all_negative", params=dict(temperature=0.02), parity=False)
    case("colbert_one", call, params=dict(temperature=0.02), b=1)
    case("colbert_offset2", f"colpali.ColbertLoss(temperature=temperature)({queries}[:2], {positives}, offset=2)", params=dict(temperature=0.1), seed=1)
    for loss in ("ColbertNegativeCELoss", "ColbertPairwiseNegativeCELoss"):
        for weight in (0.0, 0.5):
            short = loss.removeprefix("Colbert").removesuffix("Loss").lower()
            call = f"colpali.{loss}(temperature=temperature, in_batch_term_weight=in_batch_term_weight)({queries}, {positives}, {negatives})"
            if weight or short == "negativece": case(f"{short}_weight{weight}", call, negatives=2, params=dict(temperature=0.1, in_batch_term_weight=weight), seed=2, **equal)
    score = "score_multi_vector(ragged(queries, query_mask), ragged(documents, document_mask), device='cpu')"
    for name, kind, parity, more in (("random", "random", True, dict(seed=1)), ("all_negative_equal_lengths", "all_negative", True, equal), ("all_negative_padding_wins", "all_negative", False, {})):
        x, m = late(kind, **more)
        masks = dict(query_mask=m["query_mask"], document_mask=m["positive_mask"])
        book.case(f"score_multi_vector_{name}", score, dict(queries=x["queries"], documents=x["positives"]), masks, normalizes="no", grads=False, parity=parity)
    return book


def maxsim():
    "maxsim-cpu：一个查询对一串长短不一的文档。"
    book = Book("maxsim_cpu", "maxsim-cpu", "maxsim-cpu", torch.float32)
    call = "[maxsim_cpu.maxsim_scores_variable(q.numpy(), [d.numpy() for d in ragged(documents, document_mask)]) for q in ragged(queries, query_mask)]"
    for name, kw in (("random", {}), ("all_negative", dict(kind="all_negative")), ("many", dict(seed=9, b=4, ld=(1, 2, 20, 3)))):
        x, m = late(**kw)
        book.case(f"maxsim_{name}", call, {"queries": x["queries"], "documents": x["positives"]}, {"query_mask": m["query_mask"], "document_mask": m["positive_mask"]}, normalizes="no", grads=False)
    return book


def main(wanted=""):
    torch.set_num_threads(1)
    folder = Path(__file__).parent.parent/"tests/golden"
    folder.mkdir(exist_ok=True)
    for write in (sentence_transformers, cross_encoder, multi_vector, clip, metric_learning, colpali_engine, maxsim):
        if wanted in write.__name__: write().save(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
