"""玩具文档：同样的种子同样的文件，答案独立重算一遍，问到的值对不跨部分，坏参数给一句话。"""
import hashlib
import json
import random
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data.read import read_corpus, read_records
from vembed_nb.toypages import ASKS, FACETS, MAX_POSITIVES, PHRASES, PRINTED, TREE, TYPES, VALUES, draw_page, matches, near_misses, page_records, render_query, sample_pages, split_of_pair, words_of, write_toypages

SMALL = dict(n_train=50, n_val=12, n_test=45, n_queries=40, size=112)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "B"
    write_toypages(out, **SMALL, seed=3, workers=1)
    return out


def lines(path): return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


def digest(folder):
    h = hashlib.sha256()
    for p in sorted(folder.rglob("*")):
        if p.suffix == ".jpg": h.update(np.asarray(Image.open(p)).tobytes())
        elif p.is_file(): h.update(p.name.encode() + p.read_bytes())
    return h.hexdigest()


def test_deterministic(folder, tmp_path):
    "与进程数无关；种子、世界不同就不同。"
    write_toypages(tmp_path / "again", **SMALL, seed=3, workers=2)
    assert digest(tmp_path / "again") == digest(folder)
    tiny = dict(SMALL, n_train=3, n_val=2, n_test=6, n_queries=5, workers=1)
    seen = set()
    for k, options in enumerate((dict(seed=3), dict(seed=4), dict(seed=3, world="A"))):
        write_toypages(tmp_path / str(k), **tiny, **options)
        seen.add(digest(tmp_path / str(k)))
    assert len(seen) == 3


def test_same_pixels_in_any_size_and_process():
    "一页只由属性、风格、大小和种子决定；换大小，字还在同样的位置（按比例）。"
    row = sample_pages("val", 3, 0)[1]
    small, big = draw_page(row, width=224, seed=5), draw_page(row, width=448, seed=5)
    assert [m[0] for m in small.marks] == [m[0] for m in big.marks]
    assert np.allclose([m[1:] for m in small.marks], np.array([m[1:] for m in big.marks]) / 2)
    assert draw_page(row, "scan", 224, 5).image.tobytes() == draw_page(row, "scan", 224, 5).image.tobytes() != draw_page(row, "scan", 224, 6).image.tobytes()


def test_sizes_and_files(folder):
    "页数、条数、图片大小；每个文件都能用普通的读法读。"
    summary = json.loads((folder / "toypages.json").read_text(encoding="utf-8"))
    assert summary["pages"] == 107 == len(list(folder.rglob("*.jpg"))) == len(lines(folder / "pages.jsonl"))
    assert {Image.open(p).size for p in folder.rglob("*.jpg")} == {(112, 160)}
    for split in ("train", "val", "test"):
        records = read_records(folder / f"{split}.jsonl")
        assert len(records) == summary["counts"][split] and records.modes == {"t2i"}
        assert all((folder / i.image).is_file() for r in records for i in r.positives + r.negatives)
    ids, items, _ = read_corpus(folder / "corpus.jsonl")
    assert len(ids) == 45 and summary["counts"]["test"] == 40


def asked(query, world):
    "从一句查询的文字反推它的条件（把这个世界会说的话全写一遍）。"
    table = defaultdict(set)
    for kind, pairs in ASKS.items():
        for f, g in pairs:
            for i, j in np.ndindex(len(VALUES[f]), len(VALUES[g])):
                facets = {"type": list(TYPES).index(kind), f: i, g: j}
                for k in range(60): table[render_query(facets, random.Random(k), world, ("zh", "en")[k % 2])].add(tuple(facets.items()))
    return {q: table[q] for q in query}


def test_answers_recomputed(folder):
    "qrels 和正例与逐条比较一致；难反例恰好差一项；一句话只有一个意思。"
    pages = [p for p in lines(folder / "pages.jsonl") if p["split"] == "test"]
    records = lines(folder / "test.jsonl")
    meaning = asked([r["query"] for r in records], "B")
    rows = sample_pages("test", 45, 3)
    qrels = defaultdict(set)
    for line in (folder / "qrels.tsv").read_text(encoding="utf-8").splitlines()[1:]: qrels[line.split("\t")[0]].add(line.split("\t")[1])
    checked = 0
    for r in records:
        assert qrels[r["query_id"]] == set(r["positives"])
        if not meaning[r["query"]]: continue  # 这种说法没有被随机写到
        (facets,) = meaning[r["query"]]
        words = {f: words_of([dict(facets).get(g, 0) for g in FACETS])[f] for f, _ in facets}
        right = {p["image"] for p in pages if all(p.get(f) == w for f, w in words.items())}
        assert right == set(r["positives"]), r["query"]
        for n in r["negatives"]:
            page = next(p for p in pages if p["image"] == n)
            assert sum(page.get(f) != w for f, w in words.items()) == 1, (r["query"], page)
        checked += 1
    assert checked > 30 and len(rows) == len(pages)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_are_held_out(seed):
    "测试问的每一对值，训练的任何一页里都没有；每个值训练里都有。"
    tables = {s: sample_pages(s, 900, seed) for s in ("train", "val", "test")}
    for f, g in TREE:
        at = [FACETS.index(f), FACETS.index(g)]
        pairs = {s: {tuple(r) for r in t[:, at].tolist()} for s, t in tables.items()}
        for s, p in pairs.items(): assert all(split_of_pair(f, i, g, j) == s for i, j in p)
    for k, f in enumerate(FACETS): assert set(tables["train"][:, k]) == set(range(len(VALUES[f])))
    assert {tuple(sorted(p)) for ps in ASKS.values() for p in ps} <= {tuple(sorted(t)) for t in TREE}
    queries = {s: {r["query"] for r in page_records(t, str, "B", random.Random(seed))} for s, t in tables.items()}
    assert not queries["train"] & queries["test"] and not queries["val"] & queries["test"]


def test_what_is_asked_is_printed():
    "问到的属性都印在那种页上；每种问法都有说法。"
    for kind, pairs in ASKS.items():
        for pair in pairs: assert set(pair) <= PRINTED[kind] and ((kind, *pair) in PHRASES or (kind, *pair[::-1]) in PHRASES)
    for i, row in enumerate(sample_pages("train", 90, 1)):
        text = "".join(m[0] for m in draw_page(row, width=112, seed=i).marks)
        assert all(words_of(row)[f] in text for f in PRINTED[VALUES["type"][row[0]]])


def test_matches_and_near_misses():
    table = sample_pages("test", 200, 1)
    for row in table[:20].tolist():
        for pair in ASKS[VALUES["type"][row[0]]]:
            facets = {f: row[FACETS.index(f)] for f in ("type", *pair)}
            differ = [[f for f, v in facets.items() if r[FACETS.index(f)] != v] for r in table.tolist()]
            assert matches(table, facets).tolist() == [i for i, d in enumerate(differ) if not d]
            for f, found in near_misses(table, facets).items(): assert all(differ[i] == [f] for i in found)
    assert all(len(r["positives"]) <= MAX_POSITIVES for r in page_records(table, str, "A", random.Random(0)))


@pytest.mark.parametrize("bad, said", [(dict(world="C"), "world='C'"), (dict(n_test=0), "至少是 1"), (dict(negatives=-1), "negatives"), (dict(size=50), "112")])
def test_bad_arguments(tmp_path, bad, said):
    with pytest.raises(VembedError, match=said): write_toypages(tmp_path / "x", **bad)
    assert not (tmp_path / "x").exists()


def test_bad_calls(tmp_path):
    row = sample_pages("test", 1, 0)[0]
    for call, said in ((lambda: draw_page(row, "photo"), "style"), (lambda: draw_page(row, width=20), "112"), (lambda: sample_pages("dev", 3, 0), "split"), (lambda: split_of_pair("kind", 0, "when", 0), "不是会一起问到")):
        with pytest.raises(VembedError, match=said): call()
    (tmp_path / "mine.txt").write_text("不能删")
    with pytest.raises(VembedError): write_toypages(tmp_path, **SMALL)
    assert (tmp_path / "mine.txt").exists()
