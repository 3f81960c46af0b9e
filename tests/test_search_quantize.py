"""多向量索引与量化：与 vectors.maxsim 逐个相等，量化的误差在公式里，重打分说到做到，存读、删改、坏文件各有一句话。"""
import json
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item, Record
from vembed_nb.search import multivector as mv
from vembed_nb.search.multivector import PRECISIONS, Centroids, MultiVectorIndex, TokenStore, code_width, maxsim_topk, pack, unpack
from vembed_nb.search.quantize import Pareto, QuantizedIndex, ndcg, pareto, relevant_rows, rotation
from vembed_nb.vectors import Embeddings, maxsim, normalize, topk


def unit(*shape, seed=0): return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def ragged(n, longest, dim, seed=0, shortest=1):
    "n 篇，长短不一；遮住的地方是 NaN，谁碰了它就会露馅。"
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (n,), generator=g)
    mask = torch.arange(longest) < lengths[:, None]
    x = F.normalize(torch.randn(n, longest, dim, generator=g), dim=-1)
    return Embeddings(torch.where(mask[..., None], x, torch.nan), mask)


def clean(e): return Embeddings(e.vectors.nan_to_num(0), e.mask)


def filled(e, precision="float32", pool=1, coarse="", metas=None):
    index = MultiVectorIndex(e.dim, precision, pool, coarse)
    index.add([f"页{i}" for i in range(len(e))], e, metas)
    return index


def clustered(n, dim, seed=0, centers=40, spread=.5):
    g = torch.Generator().manual_seed(seed)
    c = F.normalize(torch.randn(centers, dim, generator=torch.Generator().manual_seed(99)), dim=-1)
    return F.normalize(c[torch.randint(centers, (n,), generator=g)] + spread / dim**.5 * torch.randn(n, dim, generator=g), dim=-1)


# 一、精确的 MaxSim
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 30), st.integers(1, 6), st.integers(1, 12), st.integers(2, 24), st.integers(1, 60), st.integers(1, 40))
def test_blocked_maxsim_is_maxsim(seed, nq, nd, lq, ld, dim, block, k):
    "金标准：任意的块长、长短不一的两边，分数和名次都与 vectors.maxsim 相同。"
    q, d = ragged(nq, lq, dim, seed), ragged(nd, ld, dim, seed + 1)
    want = maxsim(clean(q), clean(d))
    store = TokenStore(dim, "float32")
    store.append(Embeddings(d.vectors[:nd // 2], d.mask[:nd // 2]))
    store.append(Embeddings(d.vectors[nd // 2:], d.mask[nd // 2:]))
    s, at = maxsim_topk(store, mv.flat_tokens(q, dim), np.arange(nd), k, block)
    assert s.shape == (nq, min(k, nd)) and torch.allclose(s, want.gather(1, at), atol=1e-5)
    assert torch.allclose(s, want.topk(min(k, nd)).values, atol=1e-5)


def test_equals_the_double_loop():
    q, d = ragged(3, 4, 8, 1), ragged(7, 5, 8, 2)
    naive = [[sum(max(float(a @ b) for b in d.vectors[n][d.mask[n]]) for a in q.vectors[m][q.mask[m]]) for n in range(7)] for m in range(3)]
    s, at = filled(d).search(q, 7)
    assert torch.allclose(s, torch.tensor(naive).gather(1, at), atol=1e-5)


def test_ties_keep_the_order():
    d = ragged(1, 5, 8, shortest=5)
    same = Embeddings(d.vectors.repeat(9, 1, 1), d.mask.repeat(9, 1))
    assert filled(same).search(ragged(2, 3, 8, 5), 4)[1].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("coarse", ["", "pooled", "centroid"])
def test_more_than_there_are(coarse):
    index = filled(ragged(5, 6, 16), coarse=coarse)
    s, at = index.search(ragged(2, 3, 16, 4), 50)
    assert at.shape == (2, 5) and sorted(at[0].tolist()) == list(range(5))
    assert index.search(Embeddings(torch.zeros(0, 3, 16), torch.zeros(0, 3).bool()), 3)[0].shape[0] == 0


def test_scores_do_not_depend_on_batching():
    "40 个查询一起问（超过一组 32 个），与一个一个问，一样。"
    q, d = ragged(40, 5, 16, 1), ragged(60, 9, 16, 2)
    index = filled(d)
    s, at = index.search(q, 6)
    for i in (0, 31, 32, 39):
        one = index.search(Embeddings(q.vectors[i:i + 1], q.mask[i:i + 1]), 6)
        assert torch.equal(one[1][0], at[i]) and torch.allclose(one[0][0], s[i], atol=1e-5)


# 二、精度
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim", [8, 13, 128])
def test_pack_and_unpack(precision, dim):
    x = unit(50, dim)
    codes = pack(3 * x, precision)
    back, (width, kind) = unpack(codes, dim), code_width(dim, precision)
    assert tuple(codes.shape) == (50, width) and codes.numpy().dtype == kind and back.shape == x.shape
    assert (back.norm(dim=1) - 1).abs().max() < 2e-3
    assert 1 - (back * x).sum(1).min() < dict(float32=1e-6, float16=2e-3, int8=2e-3, binary=.55)[precision]


def test_binary_bits_are_sentence_transformers():
    quantize = pytest.importorskip("sentence_transformers.quantization", reason="对照要 sentence-transformers").quantize_embeddings
    x = unit(40, 64)
    assert np.array_equal(pack(x, "binary").numpy(), quantize(x.numpy(), "ubinary"))


def test_int8_error_follows_the_formula():
    "余弦的误差 ≈ max|x| / (127·√12)。"
    x, q = unit(3000, 96, seed=1), unit(3000, 96, seed=2)
    error = (q * unpack(pack(x, "int8"), 96)).sum(1) - (q * x).sum(1)
    assert .7 < float(error.std() / (x.abs().amax(1).mean() / 127 / 12**.5)) < 1.1


def test_hamming_estimates_the_angle():
    q = unit(2000, 256, seed=1)
    d = F.normalize(q + unit(2000, 256, seed=2), dim=1)
    h = ((q > 0) != (d > 0)).float().mean(1)
    angle = torch.arccos((q * d).sum(1)).mean() / torch.pi
    assert abs(h.mean() - angle) < .005 and abs(h.std() - (angle * (1 - angle) / 256)**.5) < .004


def test_zero_vector_survives():
    for p in PRECISIONS: assert torch.isfinite(unpack(pack(torch.zeros(2, 16), p), 16)).all()


@pytest.mark.parametrize("precision, least", [("float32", 1), ("float16", .99), ("int8", .97), ("binary", .4)])
def test_token_precision(precision, least):
    q, d = ragged(20, 5, 64, 1), ragged(80, 12, 64, 2)
    want = maxsim(clean(q), clean(d)).topk(10).indices
    index = filled(d, precision)
    got = index.search(q, 10)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(got.tolist(), want.tolist())]) >= least
    assert index.nbytes == int(d.mask.sum()) * 64 * PRECISIONS[precision] // 8


def test_pooling_is_pool_tokens():
    from vembed_nb.losses.late import pool_tokens
    q, d = ragged(4, 3, 16, 1), ragged(20, 12, 16, 2, shortest=4)
    small = pool_tokens(d, 3)
    s, at = filled(d, pool=3).search(q, 20)
    assert torch.allclose(s, maxsim(clean(q), small).gather(1, at), atol=1e-5)


# 三、两步
@pytest.mark.parametrize("coarse", ["pooled", "centroid"])
def test_two_stages_only_miss(coarse):
    "候选里的分数是精确的；候选等于全部时与精确的一样；越多越好。"
    topics = clustered(120, 32, 3, spread=1)[:, None] + .1 * torch.randn(120, 10, 32, generator=torch.Generator().manual_seed(1))
    d = Embeddings(F.normalize(topics, dim=-1), torch.ones(120, 10).bool())
    q = Embeddings(F.normalize(topics[:30, :4] + .1 * unit(30, 4, 32, seed=7), dim=-1), torch.ones(30, 4).bool())
    want, index = maxsim(q, d), filled(d, coarse=coarse)
    found = {}
    for n in (10, 40, 119, 120):
        s, at = index.search(q, 10, candidates=n)
        ok = at >= 0
        assert torch.allclose(s[ok], want.gather(1, at.clamp(min=0))[ok], atol=1e-5)
        found[n] = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(at.tolist(), want.topk(10).indices.tolist())])
    assert found[120] == 1 and found[40] > .8 and found[10] <= found[40] <= found[120]
    index.delete(["页0"]); assert 0 not in index.search(q, 10, candidates=20)[1].flatten().tolist()
    index.add(["新的"], Embeddings(q.vectors[:1], q.mask[:1]))
    assert index.ids[int(index.search(Embeddings(q.vectors[:1], q.mask[:1]), 10, candidates=20)[1][0, 0])] == "新的"


def test_centroid_lists_are_consistent():
    "倒排表与正排表说的是同一件事；每个 token 记的是最近的质心。"
    d = ragged(40, 8, 16, 3)
    store = filled(d).store
    c = Centroids(store, n=12, probe=2)
    for i in range(40):
        x = store.read(np.array([i]))[0]
        assert set(c.code[c.of_doc[i]:c.of_doc[i + 1]]) == set((x @ c.means.T).argmax(1).tolist())
    for k in range(12): assert set(c.doc[c.of_code[k]:c.of_code[k + 1]]) == {i for i in range(40) if k in c.code[c.of_doc[i]:c.of_doc[i + 1]]}


# 四、说得清楚的错
def test_words_of_the_multivector_errors():
    index = filled(ragged(4, 3, 16))
    for f, words in ((lambda: MultiVectorIndex(8, "int9"), "int9"), (lambda: MultiVectorIndex(8, coarse="centroids"), "centroid"), (lambda: MultiVectorIndex(8, pool=.5), "pool"), (lambda: index.search(torch.ones(1, 16)), "Embeddings"),
                     (lambda: index.search(ragged(1, 2, 16), 2, candidates=3), "coarse"), (lambda: filled(ragged(4, 3, 16), coarse="pooled").search(ragged(1, 2, 16), 3, candidates=2), "候选"),
                     (lambda: index.search(Embeddings(torch.ones(2, 2, 16), torch.tensor([[True, True], [False, False]]))), "第 1 个")):
        with pytest.raises(VembedError, match=words): f()


# 五、存读（锁、日志、坏文件见 test_search_store.py）
@pytest.mark.parametrize("coarse", ["pooled", "centroid"])
def test_coarse_is_saved(coarse, tmp_path, monkeypatch):
    "建好的粗库存下来，读回来不再重建。"
    q, d = ragged(5, 3, 16, 1), ragged(60, 8, 16, 2)
    index = filled(d, coarse=coarse)
    want = index.search(q, 5, candidates=20)
    index.save(tmp_path / "i")
    monkeypatch.setattr(mv.Centroids, "__init__", None)
    monkeypatch.setattr(mv, "pool_tokens", None)
    back = MultiVectorIndex.load(tmp_path / "i")
    got = back.search(q, 5, candidates=20)
    assert torch.equal(want[1], got[1]) and torch.allclose(want[0], got[0])


@pytest.mark.parametrize("coarse", ["pooled", "centroid"])
def test_coarse_follows_changes(coarse, tmp_path):
    "删了、换了、加了一些：服务里不重建粗库，新的总是候选；存盘时划掉的从粗库里去掉，加得多了就重建。"
    q, d, more = ragged(5, 3, 16, 1), ragged(60, 8, 16, 2), ragged(3, 8, 16, 7, shortest=3)
    filled(d, coarse=coarse).save(tmp_path / "i")
    with MultiVectorIndex.open(tmp_path / "i", writable=True) as index:
        assert len(index._coarse) == 60  # 存的时候建好了
        built = index._coarse
        index.delete([f"页{i}" for i in range(0, 20)]); index.upsert(["新1", "新2", "页30"], more)
        for i, name in enumerate(("新1", "新2", "页30")): assert index.find(Embeddings(more.vectors[i:i + 1], more.mask[i:i + 1]), 1, candidates=5)[0][0][0] == name
        got = {i for row in index.find(q, 10, candidates=20) for i, _, _ in row}
        assert not got & {f"页{i}" for i in range(20)} and index._coarse is built
        exact = index.find(q, 5, candidates=0)
        index.save()
        back = MultiVectorIndex.load(tmp_path / "i", verify=True)
        assert len(back._coarse) == 39 and len(back) == 42
        assert [[h[0] for h in r] for r in back.find(q, 5, candidates=0)] == [[h[0] for h in r] for r in exact]
        near, rest = [[h[0] for h in r] for r in back.find(q, 5, candidates=41)], [[h[0] for h in r] for r in exact]
        assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(near, rest)]) > .7
        index.upsert([f"多{i}" for i in range(60)], d)
        index.save()
    assert len(MultiVectorIndex.load(tmp_path / "i")._coarse) == 102


def test_tokens_stay_on_disk(tmp_path):
    "打开不读 token：它们是映射，改它不会写回去。"
    index = filled(ragged(50, 20, 64, 1), "float16")
    index.save(tmp_path / "i")
    back = MultiVectorIndex.load(tmp_path / "i")
    assert isinstance(back.store.tokens.base, np.memmap) and back.store.tokens.base.mode == "c" and not len(back.store.tokens.tail)
    assert (tmp_path / "i/tokens.bin").stat().st_size == index.nbytes == back.nbytes


# 六、量化的索引
@pytest.mark.parametrize("precision, rescore", [("float32", ""), ("float16", "float32"), ("int8", "float32"), ("binary", "float32")])
def test_everything_as_candidate_is_exact(precision, rescore):
    "候选是全部时，重打分就是精确的搜索。"
    d, q = unit(200, 48, seed=1), unit(15, 48, seed=2)
    index = QuantizedIndex(48, precision, rescore, oversample=100)
    index.add([str(i) for i in range(200)], d)
    want = topk(q, d, 8)
    s, at = index.search(q, 8)
    assert torch.equal(at, want[1]) and torch.allclose(s, want[0], atol=1e-5)


def test_hamming_order_is_the_definition():
    d, q = unit(300, 40, seed=1), unit(9, 40, seed=2)
    index = QuantizedIndex(40, "binary", "")
    index.add([str(i) for i in range(300)], d)
    turned = [x @ index.turn > 0 for x in (q, d)]
    want = 1 - 2 * (turned[0][:, None] != turned[1][None]).float().mean(2)
    s, at = index.search(q, 300)
    assert torch.allclose(s, want.gather(1, at), atol=1e-6) and torch.equal(s, s.sort(1, descending=True).values)
    s, at = QuantizedIndex.search(_with(index, "self"), q, 300)
    assert torch.allclose(s, ((q @ index.turn) @ ((turned[1].float() * 2 - 1) / 40**.5).T).gather(1, at), atol=1e-5)


def _with(index, rescore):
    index.rescore, index.oversample = rescore, 1
    return index


def test_rotation_is_orthogonal_and_fixed():
    r = rotation(48)
    assert torch.allclose(r @ r.T, torch.eye(48), atol=1e-5) and torch.equal(r, rotation(48)) and not torch.equal(r, rotation(48, 1))


def test_rotation_helps_uneven_dims():
    "内容都在前几维时，转一转，1 比特才好用。"
    scale = torch.cat([torch.ones(16), torch.full((112,), .05)])
    d, q = (F.normalize(unit(n, 128, seed=s) * scale, dim=1) for n, s in ((1500, 1), (40, 2)))
    want = topk(q, d, 10)[1]
    found = {}
    for turn in (True, False):
        index = QuantizedIndex(128, "binary", "float32")
        if not turn: index.turn = torch.eye(128)
        index.add([str(i) for i in range(1500)], d)
        found[turn] = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(index.search(q, 10)[1].tolist(), want.tolist())])
    assert found[True] > found[False] + .2


def test_rotation_travels_with_the_index(tmp_path, monkeypatch):
    index = QuantizedIndex(32, "binary", "self")
    index.add([str(i) for i in range(50)], unit(50, 32))
    index.save(tmp_path / "i")
    monkeypatch.setattr("vembed_nb.search.quantize.rotation", lambda dim, seed=0: -torch.eye(dim))  # 另一台机器的 QR
    back = QuantizedIndex.load(tmp_path / "i")
    assert torch.equal(back.turn, index.turn) and torch.equal(back.search(unit(5, 32, seed=4), 5)[1], index.search(unit(5, 32, seed=4), 5)[1])


def test_bytes_are_what_is_stored(tmp_path):
    for precision, rescore, keep in (("binary", "int8", 64), ("int8", "float16", 32), ("float16", "", None), ("float32", "int8", 16)):
        index = QuantizedIndex(64, precision, rescore, keep)
        index.add([str(i) for i in range(20)], unit(20, 64))
        index.save(tmp_path / "i")
        size = {p.name.split(".")[0]: p.stat().st_size for p in (tmp_path / "i").glob("*.bin")}
        assert index.nbytes() == {"memory": (size["codes"] + size.get("scale", 0)) // 20, "disk": size.get("fine", 0) // 20}


# 七、帕累托
def toy():
    d = clustered(600, 64, 1)
    q = F.normalize(d[:80] + .6 / 8 * torch.randn(80, 64, generator=torch.Generator().manual_seed(5)), dim=1)
    return q, d, [[i] for i in range(80)]


def test_pareto():
    q, d, positives = toy()
    table = pareto(q, d, positives, repeats=1)
    rows = {(r["dim"], r["precision"], r["rescore"]): r for r in table.rows}
    base = rows[64, "float32", ""]
    assert table.rows[0] is base and base["kept"] == 1 and base["delta"] == (0, 0) and base["memory"] == 256
    assert base["quality"] == pytest.approx(ndcg(topk(q, d, 10)[1], positives).mean())
    assert rows[64, "binary", "int8"]["memory"] * 32 == base["memory"]
    for r in table.rows:
        assert r["low"] <= r["quality"] <= r["high"] and r["ms"] > 0
        beaten = any(o["memory"] <= r["memory"] and o["quality"] >= r["quality"] and (o["memory"], o["quality"]) != (r["memory"], r["quality"]) for o in table.rows)
        assert r["front"] != beaten
    memory = [r["memory"] for r in table.front()]
    assert memory == sorted(memory) and (64, "float32", "self") not in rows
    json.dumps(table.to_dict())
    assert isinstance(table, Pareto) and table._repr_markdown_().count("\n") == len(rows) + 3
    fig = table.plot()
    assert len(fig.axes) == 2


def test_pareto_from_records():
    q, d, positives = toy()
    ids = [f"d{i}" for i in range(600)]
    records = [Record(Item(f"q{i}"), [Item("x")], positive_ids=[f"d{i}"]) for i in range(80)]
    assert relevant_rows(records, ids) == positives
    with pytest.raises(VembedError, match="d0"): relevant_rows(records, ids[1:])
    with pytest.raises(VembedError, match="没有正例"): relevant_rows([[1], []])
    with pytest.raises(VembedError, match="80 组"): pareto(q[:5], d, positives)


def test_ndcg_by_hand():
    at = torch.tensor([[3, 1, 2], [0, -1, -1]])
    assert ndcg(at, [[1], [5]], 3).tolist() == pytest.approx([1 / np.log2(3), 0])
    assert ndcg(at, [[3, 2], [0]], 3).tolist() == pytest.approx([(1 + .5) / (1 + 1 / np.log2(3)), 1])


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    from vembed_nb.data.read import read_corpus, read_records
    from vembed_nb.models.load import load_encoder
    from vembed_nb.toyshop import write_toyshop
    root = tmp_path_factory.mktemp("real") / "shop"
    write_toyshop(root, 1, 1, 600, 150, world="A", seed=3, size=64, workers=1)
    ids, items, _ = read_corpus(root / "corpus.jsonl")
    records, encoder = read_records(root / "test.jsonl"), load_encoder("tiny-clip")
    return encoder.encode([r.query for r in records], image_root=root, role="query"), encoder.encode(items, image_root=root), records, ids


def test_the_goal_on_a_tiny_model(real):
    "1/32 的内存，binary + 重打分留住 98 % 以上的 NDCG@10。"
    q, d, records, ids = real
    table = pareto(q, d, records, ids, dims=[128], precisions=("binary", "int8"), rescores=("", "int8"), repeats=1)
    rows = {(r["precision"], r["rescore"]): r for r in table.rows}
    assert rows["binary", "int8"]["kept"] >= .98 and rows["binary", "int8"]["memory"] * 32 == 128 * 4
    assert rows["binary", ""]["kept"] < rows["binary", "int8"]["kept"] and rows["int8", ""]["kept"] > .99


# 八、别的
def test_searches_from_threads():
    "几个线程同时搜，互不影响。"
    q, d = ragged(8, 4, 16, 1), ragged(60, 8, 16, 2)
    index, out = filled(d, coarse="centroid"), [None] * 4
    want = index.search(q, 5)
    def run(n): out[n] = index.search(q, 5)
    threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(torch.equal(o[1], want[1]) for o in out)


def test_fast_plaid_refuses_politely(tmp_path, monkeypatch):
    "没装，或编译时的 torch 不是这一个：一句话，不崩溃。"
    from importlib import metadata
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch==1.0.0", "numpy"])
    with pytest.raises(VembedError, match="1.0.0"): mv.FastPlaidIndex(16, tmp_path / "p")


def test_fast_plaid_for_real(tmp_path):
    try: index = mv.FastPlaidIndex(32, tmp_path / "p")
    except VembedError as e: pytest.skip(str(e))
    topics = clustered(300, 32, 3)[:, None] + .1 * torch.randn(300, 12, 32, generator=torch.Generator().manual_seed(1))
    d = Embeddings(normalize(topics), torch.ones(300, 12).bool())
    q = Embeddings(d.vectors[:40, :5], d.mask[:40, :5])
    index.add([f"页{i}" for i in range(200)], Embeddings(d.vectors[:200], d.mask[:200]), [{"偶": i % 2 == 0} for i in range(200)])
    index.add([f"页{i}" for i in range(200, 300)], Embeddings(d.vectors[200:], d.mask[200:]))
    s, at = index.search(q, 10)
    want = maxsim(q, d).topk(10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(at.tolist(), want.indices.tolist())]) > .6 and abs(s[:, 0] - want.values[:, 0]).max() < .3
    index.delete(["页0"])
    assert 0 not in index.search(q, 10)[1].flatten().tolist()
    assert all(j % 2 == 0 for j in index.search(q, 5, {"偶": True})[1].flatten().tolist() if j >= 0)
