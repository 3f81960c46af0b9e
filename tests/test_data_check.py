"""体检：数得对、坏行不停、一行不少、泄漏找得到、地板算得准；命令行的 data check、list、prepare、cache。"""
import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data.check import CROWD, DataReport, Pictures, check, check_data, duplicate_floor, look, mean_log_copies, near_pairs, root_of, script_of, write_clean
from vembed_nb.data.read import read_records

# ---------------------------------------------------------------- 图和数据

def photo(seed, size=96):
    "一张有起伏的图：几个随机的大色块。"
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)


def encoded(im, kind="PNG", **kw):
    out = io.BytesIO()
    im.save(out, kind, **kw)
    return out.getvalue()


@pytest.fixture
def shop(tmp_path):
    "十张不同的图。"
    (tmp_path / "images").mkdir()
    for i in range(10): photo(i).save(tmp_path / f"images/{i}.png")
    return tmp_path


def lines(path): return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


GOOD = {"query": "红杯子", "positive": "images/0.png"}

# ---------------------------------------------------------------- 地板

def floor_of(q, d):
    "一批的地板，照定义。"
    def mean(codes):
        _, back, n = np.unique(codes, return_inverse=True, return_counts=True)
        return np.log(n[back]).mean()
    return mean(q) + mean(d) - mean(q * 1000 + d)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("batch", [2, 7, 40])
def test_floor_is_the_average_over_batches(seed, batch):
    rng = np.random.default_rng(seed)
    q, d = rng.integers(0, 15 + 20 * seed, 40), rng.integers(0, 8, 40)
    drawn = [floor_of(q[i], d[i]) for i in (rng.permutation(40)[:batch] for _ in range(3000 if batch < 40 else 1))]
    assert abs(duplicate_floor(q, d, batch) - np.mean(drawn)) < 4 * np.std(drawn) / len(drawn) ** .5 + 1e-9


@pytest.mark.parametrize(("q", "d", "want"), [
    (range(8), range(8), 0), (range(8), [0] * 8, np.log(8)), ([0] * 8, range(8), np.log(8)), ([0] * 8, [0] * 8, np.log(8)),
    (range(8), [0, 0, 0, 0, 1, 2, 3, 4], .5 * np.log(4)), ([0], [0], 0)])
def test_floor_when_the_whole_set_is_one_batch(q, d, want):
    assert duplicate_floor(list(q), list(d), 10**6) == pytest.approx(want, abs=1e-9)


def test_no_model_goes_below_the_floor():
    "任意的打分表都不低于地板；照身份给分的那张达到它（查询各不相同时）。"
    rng = np.random.default_rng(0)
    d = rng.integers(0, 5, 16)
    loss = lambda s: float(np.mean(np.log(np.exp(s).sum(1)) - np.diag(s)))
    floor = floor_of(np.arange(16), d)
    assert all(loss(rng.normal(0, 3, (16, 5))[:, d]) > floor for _ in range(50))
    assert loss(30. * (np.arange(5)[None] == d[:, None])[:, d]) == pytest.approx(floor, abs=1e-6)


def test_floor_matches_losses_targets():
    "与损失那一层的地板相同（查询各不相同的一批）。"
    from vembed_nb.losses.targets import loss_floor, make_targets

    d = ["a", "a", "a", "b", "c", "c", "d", "e"]
    t = make_targets([str(i) for i in range(8)], d)
    assert loss_floor(t) == pytest.approx(duplicate_floor(range(8), np.unique(d, return_inverse=True)[1], 8), abs=1e-6)


def test_mean_log_copies_is_large_and_fast():
    codes = np.repeat(np.arange(200_000), 5)
    assert mean_log_copies(codes, 1024) == pytest.approx(np.log(2) * 1023 * 4 / 999_999, rel=.01)


# ---------------------------------------------------------------- 近重复

def random_pictures(n, seed=0, flips=()):
    rng = np.random.default_rng(seed)
    h = rng.integers(0, 256, (n, 8), np.uint8)
    for row, bits in enumerate(flips):
        x = np.unpackbits(h[row])
        x[rng.permutation(64)[:bits]] ^= 1
        h[n - 1 - row] = np.packbits(x)
    return Pictures([str(i) for i in range(n)], hashes=[x.tobytes() for x in h], thumbs=[bytes(192)] * n)


def bits_of(p): return np.unpackbits(np.frombuffer(b"".join(p.hashes), np.uint8).reshape(-1, 8), axis=1).astype(int)


@pytest.mark.parametrize("distance", [0, 3, 6, 7])
def test_near_pairs_is_exact(distance):
    p = random_pictures(600, distance, [k % 9 for k in range(120)])
    x = bits_of(p)
    gap = (x[:, None] != x[None]).sum(-1)
    found = near_pairs(p, distance=distance)
    assert {(i, j): n for i, j, n, _ in found} == {(i, j): gap[i, j] for i, j in zip(*np.nonzero(np.triu(gap <= distance, 1)))} and found
    other = random_pictures(300, 99)
    other.hashes[:50] = p.hashes[:50]
    y = bits_of(other)
    assert {f[:2] for f in near_pairs(p, other, distance)} == set(zip(*(z.tolist() for z in np.nonzero((x[:, None] != y[None]).sum(-1) <= distance))))


def test_near_pairs_looks_at_colour():
    p = Pictures(["a", "b", "c"], hashes=[bytes(8)] * 3, thumbs=[bytes(192), bytes([33]) + bytes(191), bytes([32]) + bytes(191)])
    assert near_pairs(p) == [(1, 2, 0, 1), (0, 2, 0, 32)]


def test_crowds_do_not_explode():
    "几千张纯色的图：不两两相比，也找得到一模一样的。"
    n = 4 * CROWD
    thumbs = [bytes([i % 256, i // 256, 0] * 64) for i in range(n)]
    thumbs[-1] = thumbs[0]
    p = Pictures([str(i) for i in range(n)], hashes=[bytes(8)] * n, thumbs=thumbs)
    assert (0, n - 1, 0, 0) in near_pairs(p, colour=0)


def test_near_pairs_of_nothing():
    assert near_pairs(Pictures()) == [] and near_pairs(random_pictures(3), Pictures()) == []
    with pytest.raises(VembedError, match="distance=9"): near_pairs(random_pictures(3), distance=9)


CHANGES = {"jpeg 60": lambda im: Image.open(io.BytesIO(encoded(im, "JPEG", quality=60))), "half": lambda im: im.resize((48, 48), Image.Resampling.LANCZOS), "double": lambda im: im.resize((192, 192)),
           "webp": lambda im: Image.open(io.BytesIO(encoded(im, "WEBP", quality=70))), "brighter": lambda im: im.point(lambda v: v * 1.06)}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_leaks(shop, change):
    "重新压缩、缩放、换格式之后仍认得出；别的九张不误报。"
    CHANGES[change](photo(3)).convert("RGB").save(shop / "考题.png")
    rows = [{"query": str(i), "positive": f"images/{i}.png"} for i in range(10)]
    r = check(write_jsonl(shop / "train.jsonl", rows), against=write_jsonl(shop / "test.jsonl", [{"query": "考", "positive": "考题.png"}]))
    assert list(r.leaked) == ["images/3.png"] and r.leaks[str(shop / "test.jsonl")]["near"] == 1


# ---------------------------------------------------------------- 坏行：每一种都记下来，好的照读

BAD_ROWS = {
    "not json": "{坏", "half": '{"query": "a", "posi', "list": "[1, 2]", "number": "7", "string": '"a"', "null": "null", "deep": "[" * 3000, "nan": '{"query": "a", "positive": "b", "group": NaN}',
    "same key twice": '{"query": "a", "query": "b", "positive": "c"}', "no query": '{"positive": "c"}', "no positive": '{"query": "a"}', "blank query": '{"query": "  ", "positive": "c"}', "misspelt": '{"qurey": "a", "positive": "c"}',
    "null positive": '{"query": "a", "positive": null}', "empty positives": '{"query": "a", "positives": []}', "nested": '{"query": "a", "positives": [["c"]]}', "number positive": '{"query": "a", "positive": 5}',
    "ids": '{"query": "a", "positive": "c", "positive_ids": ["x", "y"]}', "mixed kinds": '{"query": "a", "positives": ["c", "c.png"]}', "surrogate": '{"query": "\\ud800", "positive": "c"}', "url": '{"query": "a", "positive_image": "http://example.com/a.png"}',
    "bad base64": '{"query": "a", "positive_image": "data:image/png;base64,####"}', "svg inside": '{"query": "a", "positive_image": "data:image/svg+xml;base64,PHN2Zz48L3N2Zz4="}', "empty caption": '{"query": ["a", ""], "positive": "c.png"}',
    "latin-1": b'{"query": "caf\xe9", "positive": "c"}', "broken utf-8": b'{"query": "\xe7\xba", "positive": "c"}', "nul bytes": b"\x00\x00\x00", "huge number": '{"query": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_reported_and_the_rest_is_read(tmp_path, case):
    bad = BAD_ROWS[case] if isinstance(BAD_ROWS[case], bytes) else BAD_ROWS[case].encode()
    good = [json.dumps({"query": f"第 {i} 个问题", "positive": f"第 {i} 个回答"}, ensure_ascii=False).encode() for i in range(4)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([good[0], bad, *good[1:]]))
    r = check(tmp_path / "a.jsonl")
    assert (r.rows, r.records, r.bad_rows) == (5, 4, 1) and r.bad[0]["where"] == "a.jsonl 第 2 行" and "a.jsonl 第 2 行" in r.bad[0]["reason"] and "\n" not in r.bad[0]["reason"]
    s = write_clean(tmp_path / "a.jsonl", tmp_path / "out", r)
    assert (s["read"], s["kept"], s["quarantined"]) == (5, 4, 1) and len(read_records(tmp_path / "out/a.jsonl")) == 4
    held = lines(tmp_path / "out/quarantine.jsonl")
    assert len(held) == 1 and held[0]["where"] == "a.jsonl 第 2 行" and ("row" in held[0] or "raw" in held[0])
    with pytest.raises(VembedError, match="a.jsonl 第 2 行"): check_data(tmp_path / "a.jsonl")
    with pytest.raises(VembedError): read_records(tmp_path / "a.jsonl")


def test_bad_cells_of_a_csv(tmp_path):
    (tmp_path / "a.csv").write_text('标题,描述,价格\n红,一个红的,1\n蓝,"一个,蓝的",2,多了\n,没有标题,3\n"绿"坏,x,1\n=SUM(A1:A9),公式,4\n', encoding="utf-8-sig")
    r = check(tmp_path / "a.csv", columns={"query": "标题", "positive": "描述"})
    assert (r.rows, r.records, r.bad_rows) == (5, 2, 3) and [b["where"] for b in r.bad] == ["a.csv 第 3 行", "a.csv 第 4 行", "a.csv 第 5 行"]
    s = write_clean(tmp_path / "a.csv", tmp_path / "out", r, {"query": "标题", "positive": "描述"})
    assert s["kept"] == 2 and lines(tmp_path / "out/a.jsonl")[1] == {"query": "=SUM(A1:A9)", "positive": "公式", "meta_价格": "4"}


@pytest.mark.parametrize(("name", "content", "words"), [
    ("gone.jsonl", None, "gone.jsonl"), ("a.jsonl", b"", "没有一条记录"), ("a.jsonl", b"\n \n", "没有一条记录"), ("a.jsonl", b"{\n[\n", "2 行都不行"), ("a.xlsx", b"x", "a.xlsx"), ("a.pkl", b"\x80\x04.", "a.pkl"),
    ("a.csv", "标题\nx\n".encode(), "query|positive|标题"), ("a.jsonl", "\ufeff{}".encode("utf-16"), "UTF-16"), ("a.parquet", b"PAR1", "Parquet"), ("a.jsonl.gz", b"\x1f\x8b\x08", "gzip"), ("a\0.jsonl", None, "空字符")])
def test_whole_file_problems_are_one_sentence(tmp_path, name, content, words):
    if content is not None: (tmp_path / name).write_bytes(content)
    with pytest.raises(VembedError, match=words) as e: check(f"{tmp_path}/{name}")
    assert "\n" not in str(e.value)


def test_a_very_long_line(tmp_path, monkeypatch):
    monkeypatch.setattr("vembed_nb.data.read.MAX_LINE", 2000)
    (tmp_path / "a.jsonl").write_text('{"query": "a", "positive": "b"}\n{"query": "' + "x" * 9000 + '", "positive": "c"}\n{"query": "d", "positive": "e"}\n', encoding="utf-8")
    r = check(tmp_path / "a.jsonl")
    assert (r.records, [b["where"] for b in r.bad]) == (2, ["a.jsonl 第 2 行"])


def test_columns_that_never_appear(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"t": "a", "p": "b"}])
    with pytest.raises(VembedError, match="组别"): check(tmp_path / "a.jsonl", columns={"query": "t", "positive": "p", "group": "组别"})


# ---------------------------------------------------------------- 坏图

def test_broken_pictures(shop):
    (shop / "空.png").write_bytes(b"")
    (shop / "半.png").write_bytes((shop / "images/1.png").read_bytes()[:200])
    (shop / "页.jpg").write_text("<html>404</html>")
    (shop / "文件夹.png").mkdir()
    names = ["空.png", "半.png", "页.jpg", "文件夹.png", "没有.png", "../外面.png", "/etc/hostname.png"]
    r = check(write_jsonl(shop / "a.jsonl", [GOOD, *({"query": n, "positive": n} for n in names), {"query": "两张", "positives": ["images/1.png", "空.png"], "positive_ids": [1, 2]}]))
    assert set(r.broken) == set(names) and r.images == 9
    s = write_clean(shop / "a.jsonl", shop / "out", r)
    assert (s["kept"], s["quarantined"], s["trimmed"], s["reasons"]) == (2, 7, 1, {"坏图": 7})
    assert lines(shop / "out/a.jsonl")[1] == {"query": "两张", "positives": ["images/1.png"], "positive_ids": [1]} and lines(shop / "out/trimmed.jsonl")[0]["row"]["positive_ids"] == [1, 2]
    assert check(shop / "out/a.jsonl").broken == {}, "dataset.json 说了图在哪里"


def test_everything_broken_writes_nothing(shop):
    r = check(write_jsonl(shop / "a.jsonl", [{"query": "a", "positive": "没有.png"}]))
    with pytest.raises(VembedError, match="没有一行留得下来"): write_clean(shop / "a.jsonl", shop / "out", r)
    assert not (shop / "out").exists()


def test_data_that_changed_meanwhile(shop):
    r = check(write_jsonl(shop / "a.jsonl", [GOOD]))
    write_jsonl(shop / "a.jsonl", [GOOD, {"query": "b", "positive": "images/1.png"}])
    with pytest.raises(VembedError, match="变了"): write_clean(shop / "a.jsonl", shop / "out", r)
    assert not (shop / "out").exists()


def test_strange_folders_are_not_overwritten(shop):
    r = check(write_jsonl(shop / "a.jsonl", [GOOD]))
    for overwrite in (False, True):
        with pytest.raises(VembedError): write_clean(shop / "a.jsonl", shop / "images", r, overwrite=overwrite)
    assert len(list((shop / "images").iterdir())) == 10
    write_clean(shop / "a.jsonl", shop / "out", r)
    with pytest.raises(VembedError, match="out"): write_clean(shop / "a.jsonl", shop / "out", r)
    write_clean(shop / "a.jsonl", shop / "out", r, overwrite=True)


# ---------------------------------------------------------------- 数得对

def test_counts(shop):
    rows = [{"query": "红杯子", "positive": "images/0.png"}, {"query": "a red mug", "positive": "images/0.png", "group": "杯"}, {"query": ["蓝帽子", "帽子 hat"], "positives": ["images/1.png", "images/2.png"], "negatives": ["images/3.png", "反例"]},
            {"query": "红杯子", "positive": "images/0.png"}]
    r = check(write_jsonl(shop / "a.jsonl", rows))
    assert (r.rows, r.records, r.queries, r.documents, r.images, r.groups, r.modes) == (4, 5, 4, 3, 4, 1, {"t2i": 5})
    assert r.positives_per_query == 7 / 5 and r.documents_reused == 7 / 3 and r.negatives_per_record == 4 / 5
    assert r.duplicates["records"] == 1 and r.duplicates["most"] == 3 and r.duplicates["top"]["document"][0] == {"id": "images/0.png", "times": 3, "first": "a.jsonl 第 1 行"} and r.duplicates["top"]["query"] == [{"id": "红杯子", "times": 2, "first": "a.jsonl 第 1 行"}]
    assert r.captions_per_picture == {"2": 3} and r.scripts == {"query": {"han": 3, "latin": 1, "han+latin": 1}, "document": {"han": 2}}
    assert r.text_length["query"] == {"n": 5, "min": 3, "median": 3.0, "p95": pytest.approx(8.4), "max": 9} and r.picture_size["short"]["max"] == 96 and r.picture_size["formats"] == {"PNG": 4}
    assert json.loads(json.dumps(r.to_dict()))["records"] == 5 and "| 记录 | 5" in r._repr_markdown_() and str(shop) not in repr(r)


def test_same_file_under_two_names(shop):
    (shop / "images/副本.png").write_bytes((shop / "images/0.png").read_bytes())
    r = check(write_jsonl(shop / "a.jsonl", [GOOD, {"query": "b", "positive": "images/副本.png"}]))
    assert r.near["copies"] == 1 and r.near["pairs"] == 0 and any("假反例" in p for p in r.problems)


def test_source_kinds_agree(shop):
    "文件、一列 dict、Records、datasets：同样的结果。"
    import datasets

    rows = [{"query": f"第 {i} 件", "positive": f"images/{i}.png"} for i in range(6)] + [{"query": "第 0 件", "positive": "images/0.png"}]
    path = write_jsonl(shop / "a.jsonl", rows)
    want = check(path).to_dict()
    for source in (rows, read_records(path), datasets.Dataset.from_list(rows)):
        got = check(source, shop).to_dict()
        assert {k for k in want if want[k] != got[k]} <= {"source", "duplicates", "image_root"} and got["duplicates"]["records"] == 1
        s = write_clean(source, shop / f"out-{type(source).__name__}", check(source, shop))
        assert (s["kept"], s["quarantined"]) == (6, 1) and check(shop / f"out-{type(source).__name__}/data.jsonl").images == 6


def test_pictures_inside_the_data(tmp_path):
    "Parquet 里的字节、base64：看得到、数得清、写得出，字节不变。"
    import pyarrow as pa
    import pyarrow.parquet as pq

    good, half = [encoded(photo(i)) for i in range(3)], encoded(photo(5), "JPEG", quality=90)
    rows = [{"query": f"第 {i} 件", "positive_image": {"bytes": b, "path": None}} for i, b in enumerate([*good, good[0], half[:len(half) // 2]])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    r = check(tmp_path / "a.parquet")
    assert (r.records, r.images, len(r.broken)) == (5, 4, 1) and next(iter(r.broken)).startswith("sha256:")
    s = write_clean(tmp_path / "a.parquet", tmp_path / "out", r)
    assert (s["kept"], s["quarantined"]) == (4, 1)
    assert base64.b64decode(lines(tmp_path / "out/a.jsonl")[0]["positive_image"].split(",")[1]) == good[0]
    assert check(tmp_path / "out/a.jsonl").images == 3


def test_text_only(tmp_path):
    r = check(write_jsonl(tmp_path / "a.jsonl", [{"query": f"问题 {i}", "positive": f"回答 {i}"} for i in range(5)]))
    assert r.modes == {"t2t": 5} and r.images == 0 and r.floor == {"5": 0.0} and r.problems == [] and "没有发现问题" in r._repr_markdown_()
    assert len(r.plot().axes) == 3 and r.pairs_sheet() is None


@pytest.mark.parametrize(("text", "script"), [("红", "han"), ("red", "latin"), ("红 red", "han+latin"), ("かな", "kana"), ("한국", "hangul"), ("été", "latin"), ("да", "cyrillic"), ("12 元", "han"), ("123", "none"), ("…", "none"), ("ქართული", "other"), ("שלום a", "latin+hebrew")])
def test_scripts(text, script): assert script_of(text) == script


# ---------------------------------------------------------------- 泄漏

def test_leaks(shop):
    (shop / "test").mkdir()
    (shop / "test/改名.png").write_bytes((shop / "images/1.png").read_bytes())
    photo(2).save(shop / "test/压缩.jpg", quality=70)
    photo(50).save(shop / "test/新的.png")
    test = write_jsonl(shop / "test/test.jsonl", [{"query": f"考 {i}", "positive": n} for i, n in enumerate(["改名.png", "压缩.jpg", "新的.png"])])
    train = write_jsonl(shop / "train.jsonl", [{"query": str(i), "positive": f"images/{i}.png"} for i in range(5)] + [{"query": "两张", "positives": ["images/1.png", "images/6.png"]}, {"query": "反例", "positive": "images/7.png", "negative": "images/2.png"}])
    r = check(train, against=[test])
    leak = r.leaks[str(test)]
    assert set(r.leaked) == {"images/1.png", "images/2.png"} and (leak["pictures"], leak["same"], leak["near"], leak["pairs"], leak["queries"]) == (2, 1, 1, 0, 0)
    s = write_clean(train, shop / "out", r)
    assert (s["kept"], s["quarantined"], s["trimmed"], s["reasons"]) == (5, 2, 2, {"泄漏": 2})
    assert lines(shop / "out/train.jsonl")[-2:] == [{"query": "两张", "positives": ["images/6.png"]}, {"query": "反例", "positive": "images/7.png"}]
    assert check(shop / "out/train.jsonl", against=[test]).leaked == {} and r.pairs_sheet().width > 200


@pytest.mark.parametrize("images", [True, False])
def test_same_path_is_a_leak(shop, images):
    train, test = write_jsonl(shop / "a.jsonl", [GOOD, {"query": "b", "positive": "images/1.png"}]), write_jsonl(shop / "t.jsonl", [{"query": "c", "positive": "images/0.png"}])
    assert list(check(train, against=test, images=images).leaked) == ["images/0.png"]


def test_text_pairs_leak(tmp_path):
    rows = [{"query": f"q{i}", "positive": f"d{i}"} for i in range(6)]
    train, test = write_jsonl(tmp_path / "a.jsonl", rows), write_jsonl(tmp_path / "t.jsonl", [rows[2] | {"query_id": "别的号"}, {"query": "q3", "positive": "别的"}])
    r = check(train, against=test)
    assert (r.leaks[str(test)]["pairs"], r.leaks[str(test)]["queries"]) == (1, 2)
    assert write_clean(train, tmp_path / "out", r)["reasons"] == {"泄漏": 1} and [x["query"] for x in lines(tmp_path / "out/a.jsonl")] == ["q0", "q1", "q3", "q4", "q5"]


def test_against_may_use_our_own_names(tmp_path):
    train, test = write_jsonl(tmp_path / "a.jsonl", [{"标题": "q", "回答": "d"}]), write_jsonl(tmp_path / "t.jsonl", [{"query": "q", "positive": "d"}])
    assert check(train, columns={"query": "标题", "positive": "回答"}, against=test).leaks[str(test)]["pairs"] == 1


def test_a_bad_test_file_is_an_error(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", [{"query": "q", "positive": "d"}])
    (tmp_path / "t.jsonl").write_text("{坏\n")
    with pytest.raises(VembedError, match="--against t.jsonl.*t.jsonl 第 1 行"): check(train, against=tmp_path / "t.jsonl")


# ---------------------------------------------------------------- 一行不少

ROW = st.one_of(
    st.builds(lambda q, d: json.dumps({"query": q, "positive": d}), st.text(max_size=6), st.text(max_size=6)),
    st.builds(lambda q, n: json.dumps({"query": q, "positive": f"images/{n}.png"}), st.sampled_from("abc"), st.integers(0, 12)),
    st.builds(lambda q, ns: json.dumps({"query": q, "positives": [f"images/{n}.png" for n in ns], "negatives": ["images/99.png", "images/1.png"]}), st.sampled_from("abc"), st.lists(st.integers(8, 12), max_size=3)),
    st.text(st.characters(blacklist_characters="\r\n", blacklist_categories=("Cs", "Zl", "Zp", "Cc")), min_size=1, max_size=20).filter(str.strip), st.sampled_from(list(x for x in BAD_ROWS.values() if isinstance(x, str) and len(x) < 200)))


@settings(max_examples=30, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=12))
def test_nothing_is_lost(tmp_path_factory, rows):
    "随便什么样的行：留下的 + 隔离的 = 读到的；留下的都读得出、没有重复、不用坏图；隔离的带着原来的那一行。"
    d = tmp_path_factory.mktemp("any")
    (d / "images").mkdir()
    for i in range(10): photo(i, 32).save(d / f"images/{i}.png")
    (d / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    before = (d / "a.jsonl").read_bytes()
    try: r = check(d / "a.jsonl")
    except VembedError: return
    try: s = write_clean(d / "a.jsonl", d / "out", r)
    except VembedError as e: assert "没有一行留得下来" in str(e); return
    kept, held = lines(d / "out/a.jsonl"), lines(d / "out/quarantine.jsonl")
    assert len(kept) + len(held) == len(rows) == s["read"] and (len(kept), len(held)) == (s["kept"], s["quarantined"]) and (d / "a.jsonl").read_bytes() == before
    again = check(d / "out/a.jsonl")
    assert (again.rows, again.bad_rows, again.broken, again.duplicates["records"]) == (len(kept), 0, {}, 0)
    for h in held:
        line = rows[int(h["where"].split()[-2]) - 1]
        assert h.get("raw", "").rstrip("\n") == line or h.get("row") == json.loads(line)


# ---------------------------------------------------------------- 图片根目录

def test_root_of(tmp_path):
    (tmp_path / "set/i2t").mkdir(parents=True)
    assert root_of(tmp_path / "set/a.jsonl") == str(tmp_path / "set") and root_of(tmp_path / "set/a.jsonl", "别处") == "别处" and root_of([]) == ""
    (tmp_path / "set/dataset.json").write_text('{"image_root": "../图", "reverse": "i2t"}')
    assert root_of(tmp_path / "set/a.jsonl") == str(tmp_path / "图") == root_of(tmp_path / "set/i2t/a.jsonl")
    (tmp_path / "set/dataset.json").write_text("{坏")
    assert root_of(tmp_path / "set/a.jsonl") == str(tmp_path / "set")


# ---------------------------------------------------------------- 大

def test_memory_does_not_grow_with_the_pictures(tmp_path):
    "两万条、四万张图名，不看图：一个新进程的峰值内存（减去装载的）在 60 MB 以内。"
    with open(tmp_path / "a.jsonl", "w", encoding="utf-8") as f:
        for i in range(20_000): f.write(json.dumps({"query": f"第 {i} 句话，写得长一点，像真的描述一样", "positive": f"images/{i // 3:07d}.jpg", "negative": f"images/{i:07d}.jpg"}, ensure_ascii=False) + "\n")
    code = f"""
import resource
from vembed_nb.data.check import check
check([{{"query": "a", "positive": "b"}}], images=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
r = check({str(tmp_path / 'a.jsonl')!r}, images=False)
print(r.records, r.duplicates["most"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"""
    records, most, grown = map(int, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout.split())
    assert (records, most) == (20_000, 3) and grown < 60_000


# ---------------------------------------------------------------- 命令行

def one_line(r, *words):
    assert r.code == 2 and len(r.err.strip().splitlines()) == 1 and all(w in r.err for w in words), (r.code, r.err)


def test_cli_check(cli, shop):
    (shop / "a.jsonl").write_text(json.dumps(GOOD) + "\n{坏\n" + json.dumps({"query": "b", "positives": ["images/1.png", "没有.png"]}) + "\n", encoding="utf-8")
    r = cli("data", "check", shop / "a.jsonl")
    one_line(r, "a.jsonl 第 2 行", "1 行不合格", "--fix")
    assert any(line.split() == ["坏图", "1"] for line in r.out.splitlines())
    r = cli("data", "check", shop / "a.jsonl", "--json", "--fix", shop / "clean", "--plot", shop / "图.png")
    report = json.loads(r.out)
    assert r.code == 0 and r.err == "" and report["fix"]["kept"] == 2 and report["bad_rows"] == 1 and Image.open(shop / "图.png").width > 400
    assert cli("data", "check", shop / "clean/a.jsonl").code == 0
    one_line(cli("data", "check", shop / "a.jsonl", "--fix", shop / "clean"), "clean", "--overwrite")
    r = cli("data", "check", shop / "a.jsonl", "--fix", shop / "clean", "--overwrite")
    assert r.code == 0 and "读到 3 行 = 留下 2 行（其中 1 行去掉了一部分）+ 隔离 1 行" in r.out and f"vembed train --data {shop}" in r.out


def test_cli_strict_and_against(cli, shop):
    train = write_jsonl(shop / "a.jsonl", [GOOD, {"query": "b", "positive": "images/1.png"}])
    test, other = write_jsonl(shop / "t.jsonl", [{"query": "c", "positive": "images/0.png"}]), write_jsonl(shop / "u.jsonl", [{"query": "c", "positive": "images/1.png"}])
    r = cli("data", "check", train, "--against", test, "--against", other, "--json")
    assert r.code == 0 and set(json.loads(r.out)["leaked"]) == {"images/0.png", "images/1.png"}
    one_line(cli("data", "check", train, "--against", test, "--strict"), "images/0.png", "t.jsonl")
    r = cli("data", "check", train, "--no-images", "--json")
    assert json.loads(r.out)["looked"] is False and json.loads(r.out)["images"] == 2
    one_line(cli("data", "check", train, "--against", shop / "没有.jsonl"), "没有.jsonl")


def test_cli_columns(cli, tmp_path):
    (tmp_path / "a.csv").write_text("标题,描述\n红,一个红的\n", encoding="utf-8")
    assert json.loads(cli("data", "check", tmp_path / "a.csv", "--columns", "query=标题,positive=描述", "--json").out)["modes"] == {"t2t": 1}


def test_cli_list_and_prepare(cli, tmp_path, monkeypatch):
    from vembed_nb.data import public
    from vembed_nb.data.protocol import Part, PublicSet

    def reader(src, split, twice: bool = False): return Part(records=[{"query": f"第 {i} 张", "positive": f"{i}.png"} for i in range(2)], corpus=[{"id": f"{i}.png", "image": f"{i}.png"} for i in range(2)], image_root=src)

    card = PublicSet("小样", "小样集", ("t2i",), {"test": {"records": 2, "images": 3}}, "一张图一句话", ("R@1",), "未核实", "两张图", "这里", reader)
    monkeypatch.setitem(public.SETS, "小样", card)
    assert "小样集" in cli("data", "list").out and "许可：未核实" in cli("data", "list", "小样").out
    one_line(cli("data", "list", "小洋"), "小样")
    (tmp_path / "src").mkdir()
    for i in range(2): photo(i).save(tmp_path / f"src/{i}.png")
    args = ("data", "prepare", "小样", "--src", tmp_path / "src", "--out", tmp_path / "out")
    one_line(cli(*args), "images 发表的是 3，这里是 2", "--allow-counts")
    assert not (tmp_path / "out").exists()
    r = cli(*args, "--allow-counts", "--option", "twice=true", "--split", "test")
    assert r.code == 0 and "records 2" in r.out and "发表的是 3" in r.out and "vembed eval" in r.out
    assert cli("data", "check", tmp_path / "out/test.jsonl").code == 0, "图在 dataset.json 说的地方"
    one_line(cli(*args, "--allow-counts"), "--overwrite")
    one_line(cli(*args, "--overwrite", "--option", "x=1"), "'x'")
    one_line(cli(*args, "--overwrite", "--option", "x"), "键=值")
    one_line(cli(*args, "--overwrite", "--split", "train"), "train")
    one_line(cli("data", "prepare", "小样", "--out", tmp_path / "o"), "--src", "--download")
    one_line(cli("data", "prepare", "没有这个", "--src", tmp_path, "--out", tmp_path / "o"), "没有这个")


def test_cli_eval_uses_the_recorded_root(cli, micro, shop):
    "--fix 写的文件夹，评测时不用再说图在哪里。"
    write_jsonl(shop / "a.jsonl", [{"query": f"第 {i} 件", "positive": f"images/{i}.png"} for i in range(10)])
    assert cli("data", "check", shop / "a.jsonl", "--fix", shop.parent / "elsewhere").code == 0
    r = cli("eval", "--data", shop.parent / "elsewhere/a.jsonl", "--model", micro)
    assert r.code == 0 and "图库 10" in r.out, r.err


def test_cli_cache(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("VEMBED_CACHE", str(tmp_path))
    (tmp_path / "records").mkdir()
    (tmp_path / f"records/{'a' * 32}.arrow").write_bytes(b"x" * 2_000_000)
    (tmp_path / "records/mine.parquet").write_bytes(b"x")  # 用户自己的文件：不算，也不删
    (tmp_path / "别人的").mkdir()
    (tmp_path / "别人的/重要.txt").write_text("别删我")
    r = cli("data", "cache")
    assert r.code == 0 and "1 个文件，2.0 MB" in r.out
    r = cli("data", "cache", "--clear")
    assert "删掉了" in r.out and [p.name for p in (tmp_path / "records").iterdir()] == ["mine.parquet"] and (tmp_path / "别人的/重要.txt").exists()


def test_the_old_names_still_work(shop):
    from vembed_nb import check_data as top
    from vembed_nb.data.check import drop_broken, drop_broken_corpus

    r = top(write_jsonl(shop / "a.jsonl", [GOOD, {"query": "b", "positive": "没有.png"}]))
    assert isinstance(r, DataReport) and list(r.broken) == ["没有.png"]
    kept, bad = drop_broken(read_records(shop / "a.jsonl"), shop)
    assert len(kept) == 1 and list(bad) == ["没有.png"] and callable(drop_broken_corpus)
    assert isinstance(look("没有.png", shop), str)


def test_table_keeps_copies_on_one_side(tmp_path):
    "同一张图换了名字、缩小过、写成另一款：并成一家，进同一边；什么都不像的，切分与以前一样。"
    from vembed_nb.data.table import from_table

    for i in range(12): photo(i).save(tmp_path / f"{i}.png")
    table = ["text,image,款"] + [f"第 {i} 件,{i}.png,K{i}" for i in range(12)]
    (tmp_path / "a.csv").write_text("\n".join(table), encoding="utf-8")
    assert from_table(tmp_path / "a.csv", tmp_path / "a", group="款")["joined"] == 0
    photo(3).resize((60, 60)).save(tmp_path / "三.jpg", quality=80)
    (tmp_path / "四.png").write_bytes((tmp_path / "4.png").read_bytes())
    (tmp_path / "b.csv").write_text("\n".join([*table, "又是三,三.jpg,甲", "又是四,四.png,乙", "还是五,5.png,丙"]), encoding="utf-8")
    assert from_table(tmp_path / "b.csv", tmp_path / "b", group="款")["joined"] == 3
    side = {p: s for s in ("train", "val", "test") for r in lines(tmp_path / f"b/{s}.jsonl") for p in r["positives"]}
    assert len(side) == 14 and side["3.png"] == side["三.jpg"] and side["4.png"] == side["四.png"]
