"""指标与报告：与 pytrec_eval、torchmetrics、ranx 逐个查询相等；并列的期望等于把排列全部列一遍；流式的内存；坏输入。"""
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vembed_nb.core import VembedError
from vembed_nb.data.edits import average_precision_at
from vembed_nb.data.read import gallery_of
from vembed_nb.data.tasks import as_record
from vembed_nb.evaluate import metrics as M
from vembed_nb.evaluate.metrics import bootstrap_ci, metrics, paired_test, per_query, positive_ranks, pr_curve, read_qrels, read_run, rsum, run_from_vectors, run_ranks, same_label, score_ranks, write_qrels, write_run
from vembed_nb.evaluate.report import SHOWN, by_language, by_length, compare_reports, load_report, report_from_vectors
from vembed_nb.vectors import Embeddings, maxsim, normalize

few = settings(max_examples=25, deadline=None, derandomize=True)
KS = (1, 3, 5, 10)
OURS = {"hit_rate": "hit", "precision": "precision", "recall": "recall", "ndcg": "ndcg"}
GOLDEN = json.loads((Path(__file__).parent / "golden" / "ranx.json").read_text(encoding="utf-8"))


def example(seed, n_docs=40, n_queries=15, levels=None):
    "(run, qrels)；levels 是分数的档数，None 表示没有并列。等级 0 到 3，每个查询至少一个正例。"
    rng = np.random.default_rng(seed)
    docs = [f"d{i}" for i in range(n_docs)]
    score = lambda: rng.permutation(1000)[:n_docs] / 1000 if levels is None else rng.integers(1, levels + 1, n_docs) / 8
    run = {f"q{i}": dict(zip(docs, score().tolist())) for i in range(n_queries)}
    grade = lambda: {d: int(y) for d, y in zip(rng.permutation(docs)[:12].tolist(), [1 + rng.integers(3), *rng.integers(0, 4, 11)])}
    return run, {q: grade() for q in run}


def table(ranks, **more): return {q: {k: v[i] for k, v in per_query(ranks, KS, **more).items()} for i, q in enumerate(ranks.query_ids)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [None, 4], ids=["untied", "tied"])
def test_equals_pytrec_eval(seed, levels):
    "没有并列时逐个查询相等；有并列时 ties=\"trec\" 相等。"
    pytrec_eval = pytest.importorskip("pytrec_eval")
    run, qrels = example(seed, levels=levels)
    run["q3"] = dict(list(run["q3"].items())[:5])  # 有的正例不在 run 里
    cuts = ",".join(map(str, KS))
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {f"success.{cuts}", f"P.{cuts}", f"recall.{cuts}", f"ndcg_cut.{cuts}", "map", "recip_rank", "Rprec", "iprec_at_recall"}).evaluate(run)
    ranks = run_ranks(run, qrels, "order" if levels is None else "trec")
    mine = table(ranks)
    pairs = {f"{a}_{k}": f"{b}@{k}" for a, b in {"success": "hit", "P": "precision", "recall": "recall", "ndcg_cut": "ndcg"}.items() for k in KS} | {"map": "map", "recip_rank": "mrr", "Rprec": "r_precision"}
    for q, row in theirs.items():
        for a, b in pairs.items(): assert row[a] == pytest.approx(mine[q][b], abs=1e-9), (q, a)
    curve = [np.mean([row[f"iprec_at_recall_{x / 10:.2f}"] for row in theirs.values()]) for x in range(11)]
    assert np.allclose(pr_curve(ranks), curve, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_equals_torchmetrics(seed):
    tm = pytest.importorskip("torchmetrics.functional.retrieval")
    g = torch.Generator().manual_seed(seed)
    scores = torch.stack([torch.randperm(200, generator=g) for _ in range(12)]).float() / 200 + .001
    grades = torch.where(torch.rand(12, 200, generator=g) < .05, torch.randint(1, 4, (12, 200), generator=g), 0)
    grades[:, 7] = 2
    positives = [row.nonzero()[:, 0].tolist() for row in grades]
    mine = per_query(score_ranks(scores, positives, grades=[row[p].tolist() for row, p in zip(grades, positives)]), KS)
    for i, (s, y) in enumerate(zip(scores, grades)):
        b = y > 0
        for k in KS:
            for name, f in (("hit", tm.retrieval_hit_rate), ("recall", tm.retrieval_recall), ("precision", tm.retrieval_precision)): assert float(f(s, b, top_k=k)) == pytest.approx(mine[f"{name}@{k}"][i], abs=1e-6)
            assert float(tm.retrieval_normalized_dcg(s, y, top_k=k)) == pytest.approx(mine[f"ndcg@{k}"][i], abs=1e-6)
        for name, f in (("mrr", tm.retrieval_reciprocal_rank), ("map", tm.retrieval_average_precision), ("r_precision", tm.retrieval_r_precision)): assert float(f(s, b)) == pytest.approx(mine[name][i], abs=1e-6)


def ranx_agrees(values, run, qrels):
    ranks = run_ranks(run, qrels)
    linear, burges = (table(ranks, gain=g) for g in ("linear", "exp"))
    for name, row in values.items():
        kind, _, k = name.partition("@")
        for q, want in row.items():
            n = sum(y > 0 for y in qrels[q].values())
            got = {"mrr": linear[q]["mrr"], "r-precision": linear[q]["r_precision"], "map": linear[q]["map"]}.get(name)
            if got is None: got = burges[q][f"ndcg@{k}"] if kind == "ndcg_burges" else linear[q][f"map@{k}"] * min(n, int(k)) / n if kind == "map" else linear[q][f"{OURS[kind]}@{k}"]
            assert got == pytest.approx(want, abs=1e-8), (name, q)


def test_equals_ranx_golden():
    "金值由 benchmarks/metrics.py golden 写成。ranx 的 map@K 除以全部正例数，这里照 CIRCO 除以 min(正例数, K)。"
    ranx_agrees(GOLDEN["values"], GOLDEN["run"], GOLDEN["qrels"])


def test_equals_ranx_live():
    ranx = pytest.importorskip("ranx")
    run, qrels = example(5)
    names = list(GOLDEN["values"])
    out = ranx.evaluate(ranx.Qrels.from_dict({q: {d: y for d, y in docs.items() if y} for q, docs in qrels.items()}), ranx.Run.from_dict(run), names, return_mean=False)
    ranx_agrees({k: dict(zip(sorted(run), v)) for k, v in out.items()}, run, qrels)


@few
@given(st.lists(st.integers(0, 2), min_size=2, max_size=6), st.data())
def test_mean_is_the_mean_over_all_orders(scores, data):
    "ties=\"mean\" 等于把同分的次序全部列一遍再平均；\"worst\"、\"best\" 夹住它；\"order\" 是其中一种。"
    n = len(scores)
    p = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n)))
    y = data.draw(st.lists(st.integers(1, 3), min_size=len(p), max_size=len(p)))
    ours = {t: per_query(score_ranks(np.array([scores], np.float32), [p], ties=t, grades=[y]), (1, 2, 4)) for t in M.TIES}
    rows = []
    for order in itertools.permutations(range(n)):
        if any(scores[a] < scores[b] for a, b in itertools.pairwise(order)): continue
        rank = {doc: i for i, doc in enumerate(order, 1)}
        at = np.argsort([rank[x] for x in p])
        rows.append(per_query(M.Ranks([rank[p[i]] for i in at], [0, len(p)], [y[i] for i in at]), (1, 2, 4)))
    for k in rows[0]:
        each = [r[k][0] for r in rows]
        assert ours["mean"][k][0] == pytest.approx(np.mean(each), abs=1e-9), k
        if not k.startswith("ndcg"): assert min(each) == pytest.approx(ours["worst"][k][0]) and max(each) == pytest.approx(ours["best"][k][0])
        assert min(abs(ours["order"][k][0] - e) for e in each) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_three_paths_one_answer(seed, monkeypatch):
    "逐个数、整行排序、按定义排序，有没有并列、怎样分块，名次都一样；分数矩阵原样不动。"
    g = torch.Generator().manual_seed(seed)
    q, d = (torch.randint(-1, 2, (n, 6), generator=g).float() + .5 for n in (70, 90))
    positives = [torch.randperm(90, generator=g)[:1 + i % 7].tolist() for i in range(70)]
    exclude = [[next(x for x in range(90) if x not in p)] if i % 2 else [] for i, p in enumerate(positives)]
    s = normalize(q) @ normalize(d).T
    kept = s.clone()
    hidden = s.clone()
    for i, e in enumerate(exclude): hidden[i, e] = -torch.inf
    order = hidden.argsort(dim=1, descending=True, stable=True)
    want = [sorted((row == p).nonzero().item() + 1 for p in ps) for row, ps in zip(order, positives)]
    for few_ in (32, 0):
        monkeypatch.setattr(M._above, "__defaults__", (few_,))
        for scores in (s, s.numpy(), s.double()): assert [r.tolist() for r in score_ranks(scores, positives, exclude)] == want
    assert torch.equal(s, kept)
    monkeypatch.setattr(M._above, "__defaults__", (32,))
    x, y = torch.randn(70, 8, generator=g), torch.randn(90, 8, generator=g)
    first = positive_ranks(x, y, positives, exclude, block=64)
    assert [r.tolist() for r in first] == [r.tolist() for r in positive_ranks(x, y, positives, exclude, block=1024)] == [r.tolist() for r in positive_ranks(x.double(), y.double(), positives, exclude)]
    assert not first.tied.any()


def test_late_interaction_and_wrapped_vectors():
    g = torch.Generator().manual_seed(0)
    q, d = (Embeddings(normalize(torch.randn(n, 4, 8, generator=g)), torch.rand(n, 4, generator=g) > .3) for n in (9, 20))
    for e in (q, d): e.mask[:, 0] = True
    positives = [[i, i + 3] for i in range(9)]
    assert [r.tolist() for r in positive_ranks(q, d, positives, block=4)] == [r.tolist() for r in score_ranks(maxsim(q, d), positives)]
    a, b = torch.randn(5, 8), torch.randn(6, 8)
    assert positive_ranks(Embeddings(a), Embeddings(b), [[0]] * 5)[:] == positive_ranks(a, b, [[0]] * 5)[:]


@pytest.mark.parametrize("positives, exclude, words", [([[0], []], None, "没有正例"), ([[0], [4]], None, "只有 4 个"), ([[0], [-1]], None, "第 -1 个"), ([[0]], None, "1 组正例"), ([[0, 0], [1]], None, "写了两次"),
                                                       ([[0], [1]], [[0], []], "自己的正例"), ([[0], [1]], [[1]], "1 组要排除的"), ([[0], [1]], [[9], []], "只有 4 个")])
def test_bad_positives(positives, exclude, words):
    with pytest.raises(VembedError, match=words): positive_ranks(torch.randn(2, 3), torch.randn(4, 3), positives, exclude)


def test_bad_vectors():
    q, d = torch.randn(2, 3), torch.randn(4, 3)
    broken = d.clone()
    broken[2, 1] = torch.nan
    for call, words in ((lambda: positive_ranks(q, broken, [[0], [1]]), "图库的第 2 个向量里有 NaN"), (lambda: positive_ranks(broken[:3, :], d, [[0]] * 3), "查询的第 2 个"), (lambda: positive_ranks(q, d[:, :2], [[0], [1]]), "维数不同"),
                        (lambda: positive_ranks(q, d[:0], [[0], [1]]), "空的"), (lambda: positive_ranks(q[:0], d, []), "一个查询也没有"), (lambda: score_ranks(np.array([[1, np.nan]]), [[0]]), "NaN"),
                        (lambda: positive_ranks(q, d, [[0], [1]], ties="random"), "order、worst"), (lambda: positive_ranks(q, d, [[0], [1]], grades=[[0], [1]]), "大于 0"), (lambda: positive_ranks(q, d, [[0], [1]], grades=[[1]]), "一样多"),
                        (lambda: per_query([[1]], (0,)), "正整数"), (lambda: per_query([[1]], gain="square"), "gain"), (lambda: same_label([1, 2, 3]), "没有正例可找")):
        with pytest.raises(VembedError, match=words): call()


def test_streaming_memory():
    "两万 × 两万的相似度矩阵有 1.6 GB；算名次时多用的内存不到 150 MB。"
    code = """
import resource, torch
torch.set_num_threads(1)
from vembed_nb.evaluate.metrics import positive_ranks
x = torch.randn(20000, 8)
positive_ranks(x[:100], x, [[i] for i in range(100)])
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
r = positive_ranks(x, x, [[i] for i in range(20000)])
assert (r.flat == 1).all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert float(out.stdout) < 150


def test_map_at_k_is_circo():
    "mAP@K 与 data.edits 里 CIRCO 的 AP@K 相等。"
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(30).tolist()
        truth = rng.permutation(30)[:rng.integers(1, 9)].tolist()
        ranks = [sorted(order.index(t) + 1 for t in truth)]
        for k in (5, 10, 25, 50): assert per_query(ranks, (k,))[f"map@{k}"][0] == pytest.approx(average_precision_at(order, truth, k))


def test_same_label_and_rsum():
    labels = np.array(["b", "a", "c", "b", "b", "a"])
    at, positives, exclude = same_label(labels)
    assert at.tolist() == [0, 1, 3, 4, 5] and exclude == [[0], [1], [3], [4], [5]]
    assert [sorted(p.tolist()) for p in positives] == [[3, 4], [5], [0, 4], [0, 3], [1]]
    assert rsum({"hit@1": .1, "hit@5": .2, "hit@10": .3}, {"hit@1": .4, "hit@5": .5, "hit@10": .6}) == pytest.approx(210)


def test_missing_queries_count_as_zero():
    run, qrels = {"q1": {"a": 1.0}}, {"q1": {"a": 1}, "q2": {"b": 1}, "q3": {"c": 0}}
    ranks = run_ranks(run, qrels)
    assert metrics(ranks)["hit@1"] == metrics(ranks)["mrr"] == metrics(ranks)["map"] == .5 and ranks.left_out == ["q3"]
    assert metrics(run_ranks(run, qrels, "mean"))["mrr"] == .5 and metrics(ranks)["mean_rank"] == np.inf
    with pytest.raises(VembedError, match="没有一个共同的"): run_ranks({"x": {"a": 1.0}}, qrels)
    with pytest.raises(VembedError, match="NaN"): run_ranks({"q1": {"a": float("nan")}}, qrels)


def test_files_round_trip(tmp_path):
    run, qrels = example(1, levels=3)
    write_run(tmp_path / "run", run), write_qrels(tmp_path / "qrels", qrels)
    assert read_run(tmp_path / "run") == run and read_qrels(tmp_path / "qrels") == qrels
    assert (tmp_path / "run").read_text().splitlines()[0].split()[1::2] == ["Q0", "1", "vembed"]
    (tmp_path / "beir.tsv").write_text("\ufeffquery-id\tcorpus-id\tscore\n红 杯子\timages/a b.jpg\t2\n", encoding="utf-8")
    assert read_qrels(tmp_path / "beir.tsv") == {"红 杯子": {"images/a b.jpg": 2}}
    q, d = torch.randn(3, 4), torch.randn(9, 4)
    run = run_from_vectors(q, d, "abc", range(9), 5, exclude=[[0], [], [1, 2]])
    assert all(len(x) == 5 and list(x.values()) == sorted(x.values(), reverse=True) for x in run.values()) and "0" not in run["a"] and not {"1", "2"} & set(run["c"])


@pytest.mark.parametrize("read, text, words", [(read_qrels, "q1 0 d1\tx\n", "2 列"), (read_qrels, "q1 0 d1 yes\n", "第 1 行"), (read_qrels, "q1 0 d1 1.5\n", "整数"), (read_qrels, "q1 0 d 1\nq1 0 d 2\n", "第 2 行.*两次"), (read_qrels, "", "一行也没有"),
                                               (read_run, "q1 Q0 d1 1 0.5\n", "要 6 列"), (read_run, "q1 Q0 d1 1 nan me\n", "nan"), (read_run, "q1 Q0 d1 1 1e999 me\n", "inf"), (read_run, "\x00\n", "1 列")])
def test_bad_files(tmp_path, read, text, words):
    (tmp_path / "f").write_text(text)
    with pytest.raises(VembedError, match=words): read(tmp_path / "f")


def test_bad_paths_and_ids(tmp_path):
    for read in (read_qrels, read_run, load_report):
        with pytest.raises(VembedError, match="读不了"): read(tmp_path / "nothing")
    (tmp_path / "old").write_text("before")
    for bad in ({"a b": {"d": 1}}, {"a": {"": 1}}, {"a": {"x\ny": 1}}):
        with pytest.raises(VembedError, match="空白"): write_qrels(tmp_path / "old", bad)
    assert (tmp_path / "old").read_text() == "before"
    with pytest.raises(VembedError, match="不重复"): run_from_vectors(torch.randn(2, 3), torch.randn(2, 3), "ab", ["x", "x"])


def test_bootstrap_is_the_plain_one():
    "与一次一次重抽的写法同一个种子同样的数；一次算几列也一样。"
    x = np.random.default_rng(0).random((200, 3))
    rng = np.random.default_rng(7)
    means = np.array([x[rng.integers(200, size=200)].mean(0) for _ in range(300)])
    low, high = bootstrap_ci(x, 300, seed=7)
    assert np.allclose(low, np.quantile(means, .025, axis=0)) and np.allclose(high, np.quantile(means, .975, axis=0))
    assert bootstrap_ci(x[:, 1], 300, seed=7) == pytest.approx((low[1], high[1]))
    assert bootstrap_ci(x[:, 1], 300, seed=7, groups=np.arange(200)) == pytest.approx((low[1], high[1]))
    with pytest.raises(VembedError, match="3 个组名"): bootstrap_ci(x, groups=[1, 2, 3])


def test_paired_test_is_calibrated():
    "没有差别时，p < 0.05 约占 5 %；成组时按组翻转也是。按句子翻转成组的数据，会冤枉很多。"
    rng = np.random.default_rng(0)
    shared = [np.repeat(rng.normal(0, 1, 30), 5) + rng.normal(0, .2, 150) for _ in range(200)]
    picture = np.repeat(np.arange(30), 5)
    share = lambda groups, data: np.mean([paired_test(np.zeros(len(d)), d, 400, groups=groups).p < .05 for d in data])
    assert .01 <= share(None, [rng.normal(0, 1, 60) for _ in range(200)]) <= .1
    assert .01 <= share(picture, shared) <= .1 < .2 < share(None, shared)
    t = paired_test(np.zeros(50), np.full(50, .1))
    assert t.p == pytest.approx(1 / 10_001) and (t.wins, t.losses, t.n) == (50, 0, 50) and t.low == pytest.approx(t.high)
    with pytest.raises(VembedError, match="查询数不同"): paired_test(np.zeros(3), np.zeros(4))


@pytest.fixture(scope="module")
def reports():
    records = [as_record({"query": f"红杯子 {i}" if i % 2 else f"a red cup that is number {i}", "positives": [f"{i}.jpg", f"{i + 1}.jpg"], "group": "杯" if i < 10 else ""}) for i in range(30)]
    ids, items, _ = gallery_of(records)
    g = torch.Generator().manual_seed(0)
    d = torch.randn(len(ids), 12, generator=g)
    make = lambda noise, name, **more: report_from_vectors(d[:30] + noise * torch.randn(30, 12, generator=g), d, records, ids, items, name, **more)
    return make(2, "旧"), make(.5, "新"), make


def test_report_keeps_what_callers_use(reports):
    old, new, _ = reports
    assert set(SHOWN) <= set(old.metrics) and set(old.ci) == set(old.values) and old.health["tied"] == 0
    assert all(lo <= old.metrics[k] + 1e-9 and old.metrics[k] <= hi + 1e-9 for k, (lo, hi) in old.ci.items())
    assert json.loads(json.dumps(old.to_dict()))["hit@1"] == old.metrics["hit@1"] and compare_reports([old, new]).count("\n") == len(SHOWN) + 3


def test_report_round_trip(reports, tmp_path):
    old, _, make = reports
    for r in (old, make(1, "期望", ties="mean")):
        again = load_report(r.save(tmp_path / "r.json"))
        assert (again.metrics, again.ci, again.query_ids, again.queries) == (r.metrics, r.ci, r.query_ids, r.queries)
        assert all(np.array_equal(again.values[k], r.values[k]) for k in r.values)
    text = (tmp_path / "r.json").read_text(encoding="utf-8")
    for bad, words in ((text[:-40], "JSON"), ("{}", "不是带名次的"), ("[1]", "不是带名次的")):
        (tmp_path / "bad.json").write_text(bad, encoding="utf-8")
        with pytest.raises(VembedError, match=words): load_report(tmp_path / "bad.json")


def test_comparison(reports, tmp_path):
    old, new, make = reports
    both = old.compare(new, make(3, "第三"), groups=lambda r: r.group or r.query_id)
    t = both.tests[0]["mrr"]
    assert t.delta == pytest.approx(new.metrics["mrr"] - old.metrics["mrr"]) and t.low <= t.delta <= t.high and t.p < .05
    assert len(both.wins(99)) == t.wins and len(both.losses(99)) == t.losses
    w = both.wins(1)[0]
    assert w["after"] < w["before"] and w["query"] == old.records[w["at"]].query.text and w["query_id"] == old.query_ids[w["at"]]
    assert both.change()[w["at"]] == max(both.change()) == w["change"]
    assert json.loads(both.save(tmp_path / "c.json").read_text(encoding="utf-8"))["tests"][0]["mrr"]["wins"] == t.wins
    assert "第三" in str(both) and both.plot(tmp_path / "c.png").axes and (tmp_path / "c.png").stat().st_size > 10_000
    parts = both.slices(by_language)
    assert sum(p["n"] for p in parts.values()) == 30 and "+" in parts._repr_markdown_()
    assert np.average([p["mrr"][0] for p in parts.values()], weights=[p["n"] for p in parts.values()]) == pytest.approx(t.delta)
    assert set(old.slices(by_length(8))) == {"≤ 8 字符", "> 8 字符"} and set(old.slices(["a"] * 15 + ["b"] * 15)) == {"a", "b"}


def test_comparison_refuses(reports, tmp_path):
    old, new, make = reports
    loaded = load_report(new.save(tmp_path / "n.json"))
    assert old.compare(loaded).tests[0]["mrr"].delta == pytest.approx(new.metrics["mrr"] - old.metrics["mrr"])
    bare = type(old)("光秃", old.metrics, old.ci, 30, old.n_corpus, query_ids=old.query_ids)
    for call, words in ((lambda: old.compare(), "至少"), (lambda: old.compare(make(1, "x", ties="worst")), "并列"), (lambda: old.compare(new, names=("hit@7",)), "hit@7"), (lambda: bare.compare(new), "没有每个查询的名次"),
                        (lambda: loaded.slices(by_language), "没有记录"), (lambda: loaded.compare(new, groups=by_language), "没有记录"), (lambda: old.slices(["a"]), "1 个名字"), (lambda: old.slices(by_language, ("auc",)), "auc")):
        with pytest.raises(VembedError, match=words): call()


def test_qrels_in_a_report(reports, tmp_path):
    records = reports[0].records
    ids, items, _ = gallery_of(records)
    d = torch.eye(len(ids))
    qrels = {r.query_id: {p: 3 - j for j, p in enumerate(r.positive_ids)} for r in records}
    report = report_from_vectors(d[:30], d, records, ids, items, qrels=qrels)
    assert report.metrics["hit@1"] == 1 and report.values["ndcg@10"].max() <= 1
    (tmp_path / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{p}\t{y}\n" for q, docs in qrels.items() for p, y in docs.items()), encoding="utf-8")
    assert report_from_vectors(d[:30], d, records, ids, items, qrels=tmp_path / "qrels.tsv").metrics == report.metrics
    with pytest.raises(VembedError, match="没有查询"): report_from_vectors(d[:30], d, records, ids, items, qrels={"x": {"y": 1}})
    with pytest.raises(VembedError, match="不在图库里"): report_from_vectors(d[:30], d, records, ids, items, qrels={q: {"zz": 1} for q in qrels})
