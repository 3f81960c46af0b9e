"""搜索的漏斗：每一层与最笨的做法相等，筛掉再多也够 k 个，重排读不了的也不丢。"""
import json
import math

import pytest
import torch
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data.read import read_corpus
from vembed_nb.data.tasks import Item, Record
from vembed_nb.models.load import load_encoder
from vembed_nb.search.index import VectorIndex
from vembed_nb.search.searcher import Cascade, Searcher, build_index, tune_cascade


class FakeReranker:
    "分数由元数据里的 price 决定：越便宜越好。接口与 `Reranker` 相同。"
    seen = 0

    def rerank(self, query, hits, **options):
        from dataclasses import replace

        self.seen += len(hits)
        assert all(m.get("text") or m.get("image") for m in hits.metas)
        order = sorted(range(len(hits)), key=lambda j: hits.metas[j]["price"])
        metas = [{"recall_score": hits.scores[j], "recall_rank": j + 1, **hits.metas[j]} for j in order]
        return replace(hits, ids=[hits.ids[j] for j in order], scores=[-float(hits.metas[j]["price"]) for j in order], metas=metas)

    def score_pairs(self, pairs, *args, **options): return torch.tensor([float(len(d.text or d.image)) for _, d in pairs])


@pytest.fixture(scope="module")
def encoder(micro): return load_encoder(micro)


@pytest.fixture(scope="module")
def corpus(shop):
    ids, items, metas = read_corpus(shop / "corpus.jsonl")
    return ids, items, [{**m, "price": (7 * n) % 30, "product": f"款 {n // 3}", "category": "杯子" if n % 3 else "沙发"} for n, m in enumerate(metas)]


@pytest.fixture(scope="module")
def searcher(encoder, corpus, shop): return Searcher(build_index(encoder, corpus, shop), encoder, str(shop), FakeReranker())


def brute(searcher, encoder, query):
    "整个库从好到差的 (id, 分数, 元数据)。"
    v = encoder.encode([query], image_root=searcher.image_root, role="query")[0]
    s = searcher.index.vectors @ v
    return [(searcher.index.ids[j], float(s[j]), searcher.index.metas[j]) for j in s.argsort(descending=True, stable=True).tolist()]


@pytest.mark.parametrize("query", ["红色的第 3 件", Item(image="images/03.png"), Item("蓝色", "images/04.png")], ids=["文字", "图", "图加文"])
def test_equals_brute_force(searcher, encoder, query):
    hits = searcher.search(query, 7, rerank=False)
    want = brute(searcher, encoder, query)[:7]
    assert hits.ids == [i for i, _, _ in want] and hits.scores == pytest.approx([s for _, s, _ in want], abs=1e-5)
    assert [s["name"] for s in hits.stages] == ["编码", "召回"] and all(s["seconds"] >= 0 for s in hits.stages)


def test_where_keep_unique_equal_filtering_the_whole_ranking(searcher, encoder):
    "在索引里筛、召回之后筛、同款只留一个：都等于把整个库排好再筛。"
    whole = brute(searcher, encoder, "绿色")
    assert searcher.search("绿色", 5, where={"category": "沙发"}, rerank=False).ids == [i for i, _, m in whole if m["category"] == "沙发"][:5]
    rare = searcher.search("绿色", 2, keep=lambda m: m["price"] < 2, rerank=False)
    assert rare.ids == [i for i, _, m in whole if m["price"] < 2][:2] and len(rare) == 2
    seen, firsts = set(), []
    for i, _, m in whole:
        if m["product"] not in seen: seen.add(m["product"]); firsts.append(i)
    assert searcher.search("绿色", 10, unique="product", rerank=False).ids == firsts
    with pytest.raises(VembedError, match="没有这个键"): searcher.search("绿色", 30, unique="没有这个键", rerank=False)
    assert len(searcher.search("绿色", 5, keep=lambda m: False, rerank=False)) == 0


def test_rerank_looks_only_at_the_candidates(searcher, encoder):
    searcher.reranker.seen = 0
    hits = searcher.search("红色", 3, candidates=8)
    want = sorted(brute(searcher, encoder, "红色")[:8], key=lambda r: r[2]["price"])[:3]
    assert hits.ids == [i for i, _, _ in want] and searcher.reranker.seen == 8
    assert [s["name"] for s in hits.stages] == ["编码", "召回", "重排"] and hits.stages[-1]["pairs"] == 8 and hits.stages[-1]["kept"] == 3
    assert all(1 <= m["recall_rank"] <= 8 and "recall_score" in m for m in hits.metas)
    assert len(searcher.search("红色", 3, candidates=1).ids) == 3  # 候选不会比 k 少
    json.dumps(hits.to_dict(), allow_nan=False)


def test_documents_the_reranker_cannot_read_stay_at_the_end(encoder, shop):
    index = VectorIndex(encoder.dim)
    g = torch.Generator().manual_seed(0)
    index.add(list("abcd"), torch.randn(4, encoder.dim, generator=g), [{"text": "一", "price": 5}, {}, {"text": "三", "price": 1}, {}])
    s = Searcher(index, encoder, str(shop), FakeReranker())
    plain, hits = s.search("红", 4, rerank=False), s.search("红", 4)
    assert hits.ids[:2] == ["c", "a"] and hits.ids[2:] == [i for i in plain.ids if i in "bd"]
    assert all(map(math.isnan, hits.scores[2:])) and [r["score"] for r in hits.to_dict()["hits"]][2:] == [None, None]
    assert "nan" in hits._repr_html_() and hits.stages[-1]["pairs"] == 2


def test_pictures_in_the_metadata_do_not_break_json(encoder, shop):
    index = VectorIndex(encoder.dim)
    im = Image.new("RGB", (32, 32), "red")
    index.add(["图"], encoder.encode([Item(image=im)]), [{"image": im, "price": 1}])
    hits = Searcher(index, encoder, str(shop)).search(im, 1)
    assert hits.ids == ["图"] and "image" not in json.loads(json.dumps(hits.to_dict()))["hits"][0] and len(hits.images()) == 1


def test_empty_index_and_bad_k(encoder, searcher):
    assert len(Searcher(VectorIndex(encoder.dim), encoder).search("红", 3)) == 0
    for k in (0, -1):
        with pytest.raises(VembedError, match="至少是 1"): searcher.search("红", k, rerank=False)
    with pytest.raises(VembedError, match="没有重排器"): Searcher(searcher.index, encoder).search("红", rerank=True)
    with pytest.raises(VembedError, match="price_"): searcher.search("红", where={"price_": 1}, rerank=False)


@pytest.mark.parametrize("kind", ["flat", "HNSW8"])
def test_a_saved_folder_can_move(encoder, corpus, shop, micro, tmp_path, kind):
    build_index(encoder, corpus, shop, micro, tmp_path / "a", kind)
    before = Searcher(tmp_path / "a", encoder).search("红色", 5).ids
    (tmp_path / "a").rename(tmp_path / "b")
    with VectorIndex.open(tmp_path / "b", writable=True) as index: assert Searcher(index, encoder, str(shop)).search("红色", 5).ids == before


def test_the_wrong_model_is_refused(encoder, corpus, shop, micro_dropout):
    index = build_index(encoder, corpus, shop)
    other = load_encoder(micro_dropout)
    with torch.no_grad(): next(other.parameters()).add_(1)
    with pytest.raises(VembedError, match="另一份权重"): Searcher(index, other)


def test_milvus_gives_the_same(encoder, corpus, shop, micro, tmp_path):
    pytest.importorskip("milvus_lite")
    flat = Searcher(build_index(encoder, corpus, shop), encoder, str(shop))
    index = build_index(encoder, corpus, shop, micro, kind=f"milvus:{tmp_path / 'shop.db'}")
    try:
        s = Searcher(index, encoder, str(shop))
        for options in ({}, {"where": {"category": "沙发", "price": {"<": 20}}}, {"unique": "product"}):
            a, b = flat.search("红色", 5, **options), s.search("红色", 5, **options)
            assert a.ids == b.ids and a.scores == pytest.approx(b.scores, abs=1e-4)
    finally: index.close()


def test_cascade_equals_reranking_each_size(searcher):
    "打一遍最多的那一档，少的各档与单独去做一样。"
    records = [Record(Item(f"{'红蓝绿黄'[i % 4]}色的第 {i} 件"), [Item(image=f"images/{i:02d}.png")]) for i in range(8)]
    table = tune_cascade(searcher, records, (2, 5, 30))
    assert [r["candidates"] for r in table.rows] == [0, 2, 5, 30] and table.n_queries == 8
    items, vectors = searcher.encode([r.query for r in records])
    for row in table.rows[1:]:
        hit = 0
        for h, r in zip(searcher.recall(items, vectors, row["candidates"]), records):
            order = sorted(range(len(h)), key=lambda j: -len(h.metas[j]["image"]))
            hit += h.ids[order[0]] in r.positive_ids
        assert row["hit@1"] == hit / 8
    ceilings = [r["ceiling"] for r in table.rows[1:]]
    assert ceilings == sorted(ceilings) and ceilings[-1] == 1 and [r["seconds"] for r in table.rows] == sorted(r["seconds"] for r in table.rows)
    json.dumps(table.to_dict(), allow_nan=False)
    test = table.compare(5)
    assert test.n == 8 and test.delta == pytest.approx(table.rows[2]["ndcg@10"] - table.rows[0]["ndcg@10"]) and test.p <= 1
    with pytest.raises(VembedError, match="7"): table.compare(7)
    assert table._repr_markdown_().count("\n") == 5
    for bad in ((), (0,)):
        with pytest.raises(VembedError): tune_cascade(searcher, records, bad)
    with pytest.raises(VembedError): tune_cascade(searcher, [])


def test_cascade_best():
    row = lambda n, q, s: {"candidates": n, "ceiling": 1, "hit@1": q, "ndcg@10": q, "ci": (q, q), "seconds": s}
    table = Cascade([row(0, .7, .001), row(10, .895, .1), row(50, .9, .5)], 5, .01)
    assert table.best()["candidates"] == 10 and table.best(drop=0)["candidates"] == 50 and table.best(seconds=.01)["candidates"] == 0
    with pytest.raises(VembedError, match="预算太小"): table.best(seconds=1e-6)
