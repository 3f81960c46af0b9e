"""读数据：图片的各种写法、六种任务、仓库、各种来源、编码、缓存、坏输入。"""
import base64
import gzip
import io
import json
import os
import pickle
import threading
import tracemalloc
import warnings
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data import read, store, tasks
from vembed_nb.data.read import Records, gallery_of, read_corpus, read_records, read_rows, rename_columns, text_encoding
from vembed_nb.data.store import Store, keys_of, picture_bytes
from vembed_nb.data.tasks import MODES, Item, Record, as_item, as_picture, as_record, as_records, mode_of, picture_id


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    "每个测试有自己的缓存。"
    monkeypatch.setenv("VEMBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "records"


def encoded(fmt="PNG", size=(8, 6), colour="red", mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, size, colour).save(out, fmt)
    return out.getvalue()


def refused(fn, *words):
    "抛一句 VembedError，里面有这些词。"
    with pytest.raises(VembedError) as e: fn()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), (str(e.value), words)
    return str(e.value)


def lines(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows), encoding="utf-8")
    return path


PAIR = {"query": "一只猫", "positive": "cat.jpg"}


# ---- 图片的写法 ----

@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_pictures_in_every_form(fmt):
    "字节、{bytes, path}、base64（两种字母表、有没有补齐、折了行）、data: URI：同一个 id，还没解码。"
    raw = encoded(fmt)
    plain = base64.b64encode(raw).decode()
    forms = [raw, bytearray(raw), {"bytes": raw, "path": None}, {"bytes": raw, "path": "a.png"}, {"path": "x", "bytes": raw}, plain, plain.rstrip("="), base64.urlsafe_b64encode(raw).decode(), base64.encodebytes(raw).decode(),
             f"data:image/{fmt.lower()};base64,{plain}", f"DATA:image/x;base64,{plain}"]
    opened = [as_picture(f) for f in forms]
    assert {picture_id(i) for i in opened} == {picture_id(opened[0])} and picture_id(opened[0]).startswith("sha256:") and len(picture_id(opened[0])) == 23
    assert all(i.encoded == raw and i.size == (8, 6) for i in opened)
    for f in forms: assert as_record({"query": "a", "positive_image": f}).positives[0].kind == "image"
    assert as_record({"query_image": plain, "positive": {"image": plain}}).query_id == picture_id(opened[0])


def test_pictures_are_not_decoded():
    "截断在像素里的图，读的时候不解码，打开时才知道（13 房间负责说清楚）。"
    raw = encoded("JPEG", (64, 64))[:-40]
    r = as_record({"query": "a", "positive_image": raw})
    with pytest.raises(OSError): r.positives[0].image.load()


def test_base64_is_never_guessed_as_text():
    plain = base64.b64encode(encoded()).decode()
    assert as_item(plain).kind == "text" and as_record({"query": "a", "positive": plain}).positives[0].text == plain
    assert as_item("/9j/4AAQSkZJRgABAQAAAQABAAD.jpg", "image").image == "/9j/4AAQSkZJRgABAQAAAQABAAD.jpg", "有点号，不是 base64"
    assert as_item("iVBORw0KGgo", "image").image == "iVBORw0KGgo", "太短，是一个没有扩展名的文件名"
    refused(lambda: as_item("R0lGOD" + "/a" * 30, "image"), "GIF")


def test_picture_ids_follow_content(tmp_path):
    red, again, blue = (Image.new("RGB", (4, 4), c) for c in ("red", "red", "blue"))
    assert Item(image=red).key == Item(image=again).key != Item(image=blue).key and Item("x", red).key == Item(image=red).key + "\tx"
    assert Item(image=Image.new("L", (2, 8))).key != Item(image=Image.new("L", (8, 2))).key
    (tmp_path / "a.png").write_bytes(encoded())
    opened = Image.open(tmp_path / "a.png")
    assert picture_id(opened) == picture_id(as_picture(encoded())), "用 Image.open 打开的文件按文件的字节算"
    assert len({r.positive_ids[0] for r in read_records([{"query": "a", "positive": Image.new("RGB", (4, 4), (i, 0, 0))} for i in range(50)])}) == 50, "id 不是内存地址"


def test_every_suffix_takes_the_careful_road():
    "快的那条路只给不以 g、p、f 结尾的文字。"
    assert {s[-1] for s in tasks.IMAGE_SUFFIXES} <= set("gpf")
    for s in tasks.IMAGE_SUFFIXES: assert as_record({"query": "a", "positive": f"x{s.upper()}"}).positives[0].kind == "image"
    for text in (".jpg", "a.jpg.", "a.jpg ", "a\n.jpg", "a/.png", "jpg", "一句话 see fig"): assert not tasks.looks_like_image(text)


# ---- 六种任务 ----

def item_of(kind): return {"text": Item("字"), "image": Item(image="a.jpg"), "both": Item("字", "a.jpg")}[kind]


@pytest.mark.parametrize("q", ["text", "image", "both"])
@pytest.mark.parametrize("d", ["text", "image", "both"])
def test_modes(q, d):
    record, want = Record(item_of(q), [item_of(d)], where="x 第 3 行"), [m for m, (a, b, _) in MODES.items() if (a, b) == (q, d)]
    if want: assert mode_of(record) == want[0] and mode_of(record, want[0]) == want[0]
    else: refused(lambda: mode_of(record), "x 第 3 行", "六种")
    for other in set(MODES) - set(want): refused(lambda: mode_of(record, other), "x 第 3 行")


def test_modes_of_several_positives():
    refused(lambda: mode_of(Record(Item("a"), [Item("b"), Item(image="c.jpg")], where="x 第 9 行")), "x 第 9 行", "同一种")
    assert mode_of(Record(Item("a"), [Item(image="c.jpg")], [Item("b"), Item(image="d.jpg")])) == "t2i", "反例两种都行"
    assert set(MODES) == {"t2i", "i2i", "i2t", "m2i", "t2t", "m2t"}
    refused(lambda: read_records([PAIR], mode="t2q"), "t2q")
    assert "第 2 条" in refused(lambda: read_records([PAIR, {"query_image": "a.jpg", "positive": "b.jpg"}], mode="t2i"), "i2i", "t2i")


def test_captions_become_records():
    row = {"query": ["一", "二", "三"], "query_id": 5, "positive": "a.jpg", "group": 3}
    got = as_records(row, "x 第 1 行")
    assert [r.query_id for r in got] == ["5#0", "5#1", "5#2"] and {r.where for r in got} == {"x 第 1 行"} and {r.group for r in got} == {"3"}
    assert [r.query_id for r in as_records(row | {"query_id": ["a", "b", "c"]})] == ["a", "b", "c"]
    assert [r.query_id for r in as_records(row | {"query_id": None})] == ["一", "二", "三"] and as_records({"query": ["一"], "query_id": "q", "positive": "a.jpg"})[0].query_id == "q"
    assert [r.query.kind for r in as_records({"query": ["一", "二"], "query_image": "q.jpg", "positive": "a.jpg"})] == ["both", "both"]
    for bad in ([], [""], ["a", None], ["a", 3], ["a", ["b"]]): refused(lambda: as_records(row | {"query": bad}, "x 第 1 行"), "x 第 1 行", "query")
    refused(lambda: as_records(row | {"query_id": ["a"]}, "x 第 1 行"), "一一对应")
    refused(lambda: as_record(row, "x 第 1 行"), "list")


PNG = encoded()
BAD_ROWS = {
    "no query": ({"positive": "a.jpg"}, "没有查询"),
    "null query": ({"query": None, "positive": "a.jpg"}, "没有查询"),
    "empty query": ({"query": "", "positive": "a.jpg"}, "没有查询"),
    "blank query": ({"query": " \t\u3000", "positive": "a.jpg"}, "空白"),
    "blank query beside an image": ({"query": "  ", "query_image": "q.jpg", "positive": "a.jpg"}, "空白"),
    "number query": ({"query": 5, "positive": "a.jpg"}, "int"),
    "nan query": ({"query": float("nan"), "positive": "a.jpg"}, "float"),
    "bytes query": ({"query": b"abc", "positive": "a.jpg"}, "bytes"),
    "dict query": ({"query": {"text": "a"}, "positive": "a.jpg"}, "dict"),
    "two queries": ({"query": "a", "query_text": "b", "positive": "a.jpg"}, "只能写一个"),
    "half a character": ({"query": "\ud800x", "positive": "a.jpg"}, "半个字符"),
    "half a character in a document": ({"query": "a", "positive": "\udfffx"}, "半个字符"),
    "huge query": ({"query": "x" * 100_001, "positive": "a.jpg"}, "上限"),
    "huge document": ({"query": "a", "positive_text": "x" * 100_001}, "上限"),
    "no positive": ({"query": "a"}, "没有正例"),
    "null positive": ({"query": "a", "positive": None}, "没有正例"),
    "empty positives": ({"query": "a", "positives": []}, "没有正例"),
    "null in positives": ({"query": "a", "positives": ["a.jpg", None]}, "positives"),
    "empty in positives": ({"query": "a", "positives": ["a.jpg", ""]}, "positives"),
    "blank in positives": ({"query": "a", "positives": [" "]}, "positives"),
    "number in positives": ({"query": "a", "positives": ["a.jpg", 3]}, "int"),
    "bool positive": ({"query": "a", "positive": True}, "bool"),
    "nested positives": ({"query": "a", "positives": [["a.jpg"]]}, "list"),
    "empty dict": ({"query": "a", "positive": {}}, "positive"),
    "odd key in dict": ({"query": "a", "positive": {"imge": "a.jpg"}}, "image"),
    "dict of nothing": ({"query": "a", "positive": {"text": None}}, "positive"),
    "dict text number": ({"query": "a", "positive": {"text": 3}}, "int"),
    "dict text blank": ({"query": "a", "positive": {"text": " ", "image": "a.jpg"}}, "空白"),
    "dict image number": ({"query": "a", "positive": {"image": 3}}, "int"),
    "dict no bytes no path": ({"query": "a", "positive_image": {"bytes": None, "path": None}}, "positive_image"),
    "text from bytes": ({"query": "a", "positive_text": PNG}, "positive_text"),
    "text is a dict": ({"query": "a", "positive_text": {"text": "b"}}, "positive_text"),
    "array": ({"query": "a", "positive_image": np.zeros((3, 3))}, "ndarray"),
    "blank negative": ({"query": "a", "positive": "a.jpg", "negatives": ["b.jpg", " "]}, "negatives"),
    "nested negative": ({"query": "a", "positive": "a.jpg", "negatives": [["b.jpg"]]}, "negatives"),
    "set": ({"query": "a", "positive": {"a.jpg"}}, "positive"),
    "query image number": ({"query_image": 7, "positive": "a.jpg"}, "query_image"),
    "query image dict": ({"query_image": {"url": "x"}, "positive": "a.jpg"}, "query_image"),
    "query image empty bytes": ({"query_image": b"", "positive": "a.jpg"}, "0 字节"),
    "query image list with null": ({"query_image": ["a.jpg", None], "positive": "a.jpg"}, "query_image"),
    "query image nested": ({"query_image": [["a.jpg"]], "positive": "a.jpg"}, "query_image"),
    "misspelt": ({"query": "a", "postive": "a.jpg"}, "positive"),
    "unknown number key": ({"query": "a", "positive": "a.jpg", 3: 4}, "3"),
    "ids do not match": ({"query": "a", "positives": ["a.jpg"], "positive_ids": ["x", "y"]}, "一一对应"),
    "null id": ({"query": "a", "positives": ["a.jpg"], "positive_ids": [None]}, "positive_ids"),
    "nested id": ({"query": "a", "positives": ["a.jpg"], "positive_ids": [["x"]]}, "positive_ids"),
    "nan id": ({"query": "a", "positive": "a.jpg", "query_id": float("nan")}, "query_id"),
    "list group": ({"query": "a", "positive": "a.jpg", "group": ["x"]}, "group"),
    "nan group": ({"query": "a", "positive": "a.jpg", "group": float("nan")}, "group"),
    "inf group": ({"query": "a", "positive": "a.jpg", "group": float("inf")}, "group"),
    "bool group": ({"query": "a", "positive": "a.jpg", "group": True}, "group"),
    "url": ({"query": "a", "positive": "https://example.com/a.jpg"}, "download=True"),
    "url in image": ({"query": "a", "positive_image": "http://example.com/a"}, "download=True"),
    "url in query image": ({"query_image": "https://example.com/a.jpg", "positive": "b"}, "download=True"),
    "file url": ({"query": "a", "positive_image": "file:///etc/passwd"}, "file:///etc/passwd"),
    "ftp url": ({"query": "a", "positive_image": "ftp://a/b.jpg"}, "ftp"),
    "data uri not base64": ({"query": "a", "positive": "data:image/png,abc"}, "base64"),
    "data uri broken": ({"query": "a", "positive": "data:image/png;base64,@@@@"}, "base64"),
    "data uri empty": ({"query": "a", "positive": "data:image/png;base64,"}, "0 字节"),
    "data uri of text": ({"query": "a", "positive_image": "data:text/html;base64," + base64.b64encode(b"<html></html>").decode()}, "网页"),
    "svg": ({"query": "a", "positive_image": b"<svg xmlns='http://www.w3.org/2000/svg'/>"}, "SVG"),
    "pdf": ({"query": "a", "positive_image": b"%PDF-1.7"}, "PDF"),
    "html": ({"query": "a", "positive_image": b"\n<!DOCTYPE html>"}, "网页"),
    "pickle": ({"query": "a", "positive_image": pickle.dumps([1])}, "pickle"),
    "old pickle": ({"query": "a", "positive": pickle.dumps([1], 0)}, "不是图片"),
    "zip": ({"query": "a", "positive_image": b"PK\x03\x04zip"}, "zip"),
    "postscript": ({"query": "a", "positive_image": b"%!PS-Adobe-3.0 EPSF-3.0\n"}, "不是图片"),
    "half a png header": ({"query": "a", "positive_image": PNG[:18]}, "截断"),
    "png signature only": ({"query": "a", "positive_image": PNG[:8] + b"\0" * 30}, "打不开"),
    "a bomb": ({"query": "a", "positive_image": PNG[:16] + (60_000).to_bytes(4, "big") * 2 + PNG[24:]}, "打不开"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case):
    row, word = BAD_ROWS[case]
    refused(lambda: as_records(row, "train.jsonl 第 3 行"), "train.jsonl 第 3 行", word)
    refused(lambda: read_records([PAIR, row]), "第 2 条", word)


def test_good_rows_stay_good():
    "空的 CSV 单元格、整数的 id、自己的字段、参差的反例。"
    r = as_record({"query": "a", "query_image": "", "positive": "a.jpg", "negative": "", "negatives": None, "group": "", "query_id": 3, "positive_id": 4.0, "_x": [1], "meta_y": {}})
    assert (r.query_id, r.positive_ids, r.group, r.negatives) == ("3", ["4"], "", [])
    assert as_record({"query_image": ["a.jpg", "b.jpg"], "positive": "x"}).query.images == ("a.jpg", "b.jpg")
    assert as_record({"query_image": Path("a.jpg"), "positive_image": Path("b")}).positives[0].image == "b"
    assert as_record({"query_text": "a", "positive": "b", "negative_image": "n.jpg", "negative_text": "n.jpg"}).negative_ids == ["n.jpg", "n.jpg"]
    assert as_item("https://example.com/a.jpg", "text").kind == "text" and as_item("见 https://example.com/a").kind == "text"


# ---- 仓库 ----

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda t: not t.isspace())
paths = st.sampled_from(["a.jpg", "b.jpg", "图/c.png", "d.webp"])
items = st.one_of(st.builds(Item, texts), st.builds(lambda p: Item(image=p), paths), st.builds(Item, texts, paths), st.builds(lambda p: Item(image=p), st.lists(paths, min_size=2, max_size=3)))
names = st.sampled_from(["", "x", "y", "一"])


@st.composite
def some_records(draw):
    same = draw(st.sampled_from(["text", "image"]))
    docs = st.lists(items.filter(lambda i: i.kind == same), min_size=1, max_size=3)
    pos, neg = draw(docs), draw(st.lists(items, max_size=2))
    return Record(draw(items), pos, neg, draw(names), draw(st.sampled_from([[], [f"p{k % 2}" for k in range(len(pos))]])), [], draw(names), draw(st.sampled_from(["", "a.jsonl 第 3 行", "第 7 条", "b 第 1 行 第 2 条", "\0"])))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(some_records(), max_size=12), st.integers(1, 5))
def test_store_gives_back_what_it_took(records, block):
    "任何记录，任何块的大小：一条一条取、遍历、挑，都与列表相同；编号与逐条编的相同。"
    old, store.BLOCK = store.BLOCK, block
    try: s = Store.build(iter(records))
    finally: store.BLOCK = old
    assert len(s) == len(records) and list(s) == records and [s[i] for i in range(len(s))] == records
    order = list(range(len(s)))[::-1]
    assert s.take(order) == records[::-1] and list(s.span(1, len(s) - 1)) == records[1:-1]
    mine, slow = s.keys(), keys_of(records)
    for n in ("query", "positive", "offsets", "group"): assert np.array_equal(getattr(mine, n), getattr(slow, n)) and getattr(mine, n).dtype == np.int64, n
    assert s.lengths().tolist() == [len(r.query.text or "") + len(r.positives[0].text or "") for r in records]
    assert [store.MODE_NAMES[m] for m in s.modes()] == [mode_of(r) for r in records]
    picked = mine.select(order)
    assert np.array_equal(picked.query, mine.query[::-1]) and picked.offsets[-1] == len(mine.positive)


def test_store_keeps_pictures_as_bytes(tmp_path):
    "字节原样；每次取都是新打开的，不会把解开的像素留在内存里；没有字节的 PIL 图不损失。"
    raw, drawn = encoded("JPEG", (32, 32)), Image.new("CMYK", (5, 4), (1, 2, 3, 4))
    records = [as_record({"query": "a", "positives": [raw, {"image": [raw, PNG]}], "negatives": [Image.new("RGBA", (3, 3), (1, 2, 3, 4)), drawn]}), as_record({"query_image": PNG, "query": "x", "positive_image": drawn})]
    s = Store.build(records, tmp_path / "s.arrow")
    for r, o in zip(s, records): assert (r.query_id, r.positive_ids, r.negative_ids) == (o.query_id, o.positive_ids, o.negative_ids)
    assert s[0].positives[0].image.encoded == raw and s[0].positives[1].images[1].encoded == PNG
    assert s[0].positives[0].image is not s[0].positives[0].image
    assert s[0].negatives[1].image.mode == "CMYK" and s[0].negatives[1].image.tobytes() == drawn.tobytes()
    assert picture_bytes(as_picture(raw)) is raw
    assert pickle.loads(pickle.dumps(s))[0].positive_ids == s[0].positive_ids and pickle.loads(pickle.dumps(Store.build(records)))[1].query_id == s[1].query_id


def test_store_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "s.arrow"
    Store.build([as_record(PAIR)] * 3, path)
    before = path.read_bytes()
    def broken():
        yield as_record(PAIR)
        raise VembedError("半路出错")
    with pytest.raises(VembedError): Store.build(broken(), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["s.arrow"]
    for cut in (0, 10, len(before) // 2, len(before) - 4):
        (tmp_path / "cut.arrow").write_bytes(before[:cut])
        refused(lambda: Store.open(tmp_path / "cut.arrow"), "cut.arrow")
    with pa.OSFile(str(tmp_path / "other.arrow"), "wb") as f, pa.ipc.new_file(f, pa.schema([("a", pa.int64())])) as w: w.write_table(pa.table({"a": [1]}))
    refused(lambda: Store.open(tmp_path / "other.arrow"), "other.arrow")
    refused(lambda: Store.open(tmp_path / "none.arrow"), "none.arrow")
    refused(lambda: Store.build([Record(Item("a"), [Item("b", "c.jpg")], where="x 第 2 行")], path), "x 第 2 行")
    with pytest.raises(IndexError): Store.open(path)[3]
    assert Store.open(path)[-3] == Store.open(path)[0]


def test_store_uses_little_memory(tmp_path, monkeypatch):
    "写六千条、遍历六千条：Python 对象的峰值不到全放进列表的一半。"
    monkeypatch.setattr(store, "BLOCK", 256)
    rows = lambda: (Record(Item(f"第 {i} 只红色的杯子"), [Item(image=f"images/{i:06d}.jpg")], where=f"train.jsonl 第 {i} 行") for i in range(6000))
    def peak(fn):
        tracemalloc.start()
        try: fn(); return tracemalloc.get_traced_memory()[1]
        finally: tracemalloc.stop()
    ours = peak(lambda: sum(1 for _ in Store.build(rows(), tmp_path / "s.arrow")))
    assert ours < peak(lambda: list(rows())) / 2, ours


# ---- 记录 ----

def test_records_over_a_list_and_a_store_are_the_same():
    items = [Record(Item(f"q{i % 70}"), [Item(image=f"{i % 90}.jpg")] if i % 3 else [Item(f"t{i}")], group=f"g{i % 5}" if i % 2 else "") for i in range(300)]
    a, b = Records(items, "表"), Records(Store.build(items), "表")
    for x, y in ((a, b), (a[10:200:3], b[10:200:3]), (a.select([5, 3, 250]), b.select(np.array([5, 3, 250]))), (a.sample(40, 7), b.sample(40, 7)), (a[::-1][5:9], b[::-1][5:9]), (a[-4:], b[-4:])):
        assert len(x) == len(y) and list(x) == list(y) and x[0] == y[0] and x[-1] == y[-1] and [x[i] for i in range(len(x))] == list(y)
        assert x.modes == y.modes and x.mode_counts == y.mode_counts and x.lengths().tolist() == y.lengths().tolist() and repr(x) == repr(y)
        kx, ky = x.keys(), y.keys()
        assert kx.offsets.tolist() == ky.offsets.tolist()
        for n in ("query", "positive", "group"):
            p, q = getattr(kx, n), getattr(ky, n)
            assert np.array_equal(p[:, None] == p, q[:, None] == q), "号相同，当且仅当 id 相同"
        assert np.array_equal(kx.group == -1, ky.group == -1)
    assert b[3:5].data is b.data, "切片不读记录"
    again = pickle.loads(pickle.dumps(b[5:9]))
    assert list(again) == items[5:9]
    for x in (a, b):
        refused(lambda: x[5:5], "一条")
        with pytest.raises(IndexError): x[300]
        with pytest.raises(IndexError): x.select([300])
        assert gallery_of(x[:2])[0] == gallery_of(items[:2])[0]
    refused(lambda: Records([], "空表"), "空表")


# ---- 来源 ----

ROWS = [{"query": f"第 {i} 只猫", "positives": [f"{i}.jpg", f"{i}b.jpg"], "negatives": ["狗"] * (i % 3), "group": f"g{i % 2}"} for i in range(5)]
WANT = [(f"第 {i} 只猫", [f"{i}.jpg", f"{i}b.jpg"], ["狗"] * (i % 3), f"g{i % 2}") for i in range(5)]
facts = lambda records: [(r.query.text, r.positive_ids, r.negative_ids, r.group) for r in records]


def test_every_source_gives_the_same_records(tmp_path):
    "文件、.gz、文件夹、通配符、save_to_disk、Dataset、IterableDataset、列表、生成器。"
    ds = datasets.Dataset.from_list(ROWS)
    lines(tmp_path / "a.jsonl", *ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    lines(tmp_path / "lines.json", *ROWS)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet", row_group_size=2)
    (tmp_path / "crlf.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    for name in ("folder", "disk"): (tmp_path / name).mkdir()
    lines(tmp_path / "folder/part-0.jsonl", *ROWS[:2]); pq.write_table(pa.Table.from_pylist(ROWS[2:]), tmp_path / "folder/part-1.parquet"); (tmp_path / "folder/README.md").write_text("x")
    ds.save_to_disk(tmp_path / "disk")
    sources = [*(tmp_path / n for n in ("a.jsonl", "b.json", "lines.json", "c.jsonl.gz", "d.parquet", "crlf.jsonl", "folder", "disk")), str(tmp_path / "a.jsonl"), str(tmp_path / "folder/part-*"), ds, ds.to_iterable_dataset(), ROWS, tuple(ROWS), iter(ROWS), (r for r in ROWS)]
    for s in sources: assert facts(read_records(s)) == WANT, s
    for s in (tmp_path / "a.jsonl", tmp_path / "d.parquet", ds, ds.to_iterable_dataset(), ROWS, iter(ROWS)): assert facts(read_records(s, limit=3)) == WANT[:3], s
    assert [r.where for r in read_records(tmp_path / "folder")] == ["part-0.jsonl 第 1 行", "part-0.jsonl 第 2 行", "part-1.parquet 第 1 行", "part-1.parquet 第 2 行", "part-1.parquet 第 3 行"]
    assert facts(read_records(read_records(ROWS))) == WANT, "Record 的序列也行"


def test_tables_and_columns(tmp_path):
    "CSV、TSV、Parquet、datasets 的列名映射；公式只是文字；多行的单元格报开头的行号。"
    (tmp_path / "t.csv").write_text('\ufeff标题,图,价格\r\n"=SUM(A1:A9)",1.jpg,9\r\n"两\n行",2.jpg,\r\n,,\r\n@cmd,3.jpg,\r\n', encoding="utf-8", newline="")
    columns = {"query": "标题", "positive": "图"}
    got = read_records(tmp_path / "t.csv", columns)
    assert [(r.query.text, r.where) for r in got] == [("=SUM(A1:A9)", "t.csv 第 2 行"), ("两\n行", "t.csv 第 3 行"), ("@cmd", "t.csv 第 6 行")]
    (tmp_path / "t.tsv").write_text("标题\t图\n一,二\t1.jpg\n", encoding="utf-8")
    assert read_records(tmp_path / "t.tsv", columns)[0].query.text == "一,二"
    table = pa.table({"标题": ["a"], "图": ["1.jpg"], "价格": [3], "query": ["不要我"]})
    pq.write_table(table, tmp_path / "t.parquet")
    for s in (tmp_path / "t.parquet", datasets.Dataset(table)): assert read_records(s, columns)[0].query.text == "a"
    for s in (tmp_path / "t.csv", tmp_path / "t.parquet", datasets.Dataset(table), lines(tmp_path / "t.jsonl", {"标题": "a", "图": "b.jpg"})):
        refused(lambda: read_records(s, columns | {"negatives": "图片"}), "图片", "图")
        refused(lambda: read_records(s, {"qurey": "标题", "positive": "图"}), "qurey", "query")
    assert rename_columns({"a": "x"}, {"query": "a", "positive": "a"}, "") == {"query": "x", "positive": "x"}, "一列当两个字段用"
    ragged = lines(tmp_path / "r.jsonl", {"t": "a", "i": "1.jpg"}, {"t": "b", "i": "2.jpg", "n": ["3.jpg"]})
    assert [len(r.negatives) for r in read_records(ragged, {"query": "t", "positive": "i", "negatives": "n"})] == [0, 1]


def test_embedded_pictures_from_tables(tmp_path):
    "Parquet 的字节列、datasets.Image：不解码，id 是内容；Sequence(Image) 也行。"
    a, b = encoded(colour="red"), encoded(colour="blue")
    ds = datasets.Dataset.from_dict({"query": ["红", "蓝", "红"], "positive": [{"bytes": x, "path": None} for x in (a, b, a)], "negatives": [[{"bytes": b, "path": None}], [], [{"bytes": b, "path": None}] * 2]},
                                    features=datasets.Features(query=datasets.Value("string"), positive=datasets.Image(), negatives=datasets.List(datasets.Image())))
    pq.write_table(pa.table({"query": ["红", "蓝", "红"], "positive": [a, b, a]}), tmp_path / "p.parquet")
    ids = [picture_id(as_picture(x)) for x in (a, b, a)]
    for s in (ds, ds.to_iterable_dataset(), ds.with_format("torch"), tmp_path / "p.parquet"):
        records = read_records(s)
        assert [r.positive_ids[0] for r in records] == ids and records.keys().positive.tolist() == [0, 1, 0] and records.modes == {"t2i"}
        assert isinstance(records.data, Store) and records[0].positives[0].image.getpixel((0, 0)) == (255, 0, 0)
    assert [len(r.negatives) for r in read_records(ds)] == [1, 0, 2]
    uri = f"data:image/png;base64,{base64.b64encode(a).decode()}"
    assert read_records(lines(tmp_path / "u.jsonl", {"query": "红", "positive": uri}))[0].positive_ids == ids[:1]
    (tmp_path / "u.csv").write_text(f"query,positive_image\n红,{base64.b64encode(encoded('BMP', (400, 400))).decode()}\n", encoding="utf-8")
    assert read_records(tmp_path / "u.csv")[0].positives[0].image.size == (400, 400), "64 万字符的单元格"


@pytest.mark.parametrize("name", ["Dataset", "Iterable", "list", "generator", "file"])
def test_errors_name_the_row_of_every_source(name, tmp_path):
    rows = [*ROWS, {"query": "坏", "positives": [""]}]
    ds = datasets.Dataset.from_list(rows)
    source = {"Dataset": ds, "Iterable": ds.to_iterable_dataset(), "list": rows, "generator": iter(rows), "file": lines(tmp_path / "a.jsonl", *rows)}[name]
    refused(lambda: read_records(source), "第 6", "positives")


# ---- 编码 ----

TEXT = "query,positive\n" + "".join(f"红色的杯子，第 {i} 个。,{i}.jpg\n" for i in range(50))


def test_encodings(tmp_path):
    path = tmp_path / "a.csv"
    for name in ("utf-8", "utf-8-sig"):
        path.write_bytes(TEXT.encode(name))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert read_records(path)[7].query.text == "红色的杯子，第 7 个。"
    path.write_bytes(TEXT.encode("gb18030"))
    with pytest.warns(UserWarning, match="a.csv.*GB18030"): assert read_records(path)[7].query.text == "红色的杯子，第 7 个。"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_records(path)  # 同一个文件只说一次
    gz = tmp_path / "b.jsonl.gz"
    gz.write_bytes(gzip.compress('{"query": "红色的杯子", "positive": "a.jpg"}\n'.encode("gb18030")))
    with pytest.warns(UserWarning, match="GB18030"): assert read_records(gz)[0].query.text == "红色的杯子"


@pytest.mark.parametrize("data", [TEXT.encode("utf-16"), TEXT.encode("utf-16-be"), "query,positive\n赤いカップです,a.jpg\n".encode("shift-jis"), "query,positive\n紅色的杯子與盤子,a.jpg\n".encode("big5"), "query,positive\ncafé über naïve,a.jpg\n".encode("latin-1"),
                                  TEXT.encode() + b"\xff\xfe\n", TEXT.encode()[:-20] + b"\xe7\xba", TEXT.encode("gb18030")[:-4] + b"\x81", TEXT.encode("gb18030") + b"\xff\xff", bytes(range(256)) * 4, TEXT.encode() + "红".encode("gb18030") + b",a.jpg\n"],
                         ids=["utf-16", "utf-16-be", "shift-jis", "big5", "latin-1", "bad bytes", "cut utf-8", "cut gb", "bad gb", "binary", "mixed"])
def test_other_encodings_are_refused(data, tmp_path):
    (tmp_path / "a.csv").write_bytes(data)
    refused(lambda: read_records(tmp_path / "a.csv"), "a.csv")


def test_encoding_across_blocks(tmp_path, monkeypatch):
    "一个字正好跨在两块之间；错误里的位置是整个文件里的位置。"
    monkeypatch.setattr(read, "_blocks", partial(read._blocks, size=7))
    path = tmp_path / "a.txt"
    for shift in range(7):
        path.write_bytes(b"x" * shift + "红色的杯子".encode() * 5)
        assert text_encoding(path) == "utf-8-sig"
        path.write_bytes(b"x" * shift + "红色的杯子".encode() * 5 + b"\xffabc")
        refused(lambda: text_encoding(path), f"第 {shift + 75} 个字节")
    path.write_bytes(("红色的杯子" * 5).encode("gb18030"))
    with pytest.warns(UserWarning): assert text_encoding(path) == "gb18030"


# ---- 坏文件 ----

GOOD = json.dumps(PAIR, ensure_ascii=False) + "\n"
BAD_FILES = {
    "missing": ("a.jsonl", None, "没有文件"),
    "empty": ("a.jsonl", b"", "没有一条记录"),
    "only bom": ("a.jsonl", b"\xef\xbb\xbf", "没有一条记录"),
    "blank lines": ("a.jsonl", b"\n \r\n\n", "没有一条记录"),
    "not json": ("a.jsonl", GOOD + "{坏\n", "第 2 行"),
    "truncated": ("a.jsonl", GOOD + GOOD[:20], "第 2 行"),
    "python dict": ("a.jsonl", GOOD + "{'query': 'a'}\n", "第 2 行"),
    "list": ("a.jsonl", GOOD + "[1]\n", "第 2 行"),
    "string": ("a.jsonl", GOOD + '"a"\n', "第 2 行"),
    "null": ("a.jsonl", GOOD + "null\n", "第 2 行"),
    "two objects on a line": ("a.jsonl", GOOD + GOOD.strip() + GOOD, "第 2 行"),
    "duplicate key": ("a.jsonl", GOOD + '{"query": "a", "query": "b", "positive": "c.jpg"}\n', "'query' 写了两次"),
    "duplicate inner key": ("a.jsonl", GOOD + '{"query": "a", "positive": {"text": "x", "text": "y"}}\n', "'text' 写了两次"),
    "nan": ("a.jsonl", GOOD + '{"query": "a", "positive": NaN}\n', "NaN"),
    "infinity in meta": ("a.jsonl", GOOD + '{"query": "a", "positive": "b.jpg", "_s": -Infinity}\n', "Infinity"),
    "huge number": ("a.jsonl", GOOD + '{"query": ' + "9" * 5000 + "}\n", "第 2 行"),
    "deep": ("a.jsonl", GOOD + "[" * 100_000 + "\n", "第 2 行"),
    "surrogate": ("a.jsonl", GOOD + '{"query": "\\ud800", "positive": "a.jpg"}\n', "第 2 行"),
    "surrogate in meta": ("a.jsonl", GOOD + '{"query": "a", "positive": "a.jpg", "meta": "\\udc00"}\n', "第 2 行"),
    "nul": ("a.jsonl", b"\0" * 100, "第 1 行"),
    "mac line ends": ("a.jsonl", GOOD.replace("\n", "\r") * 2, "第 1 行"),
    "10 MB line": ("a.jsonl", GOOD + '{"query": "' + "x" * 10_000_000 + '", "positive": "a.jpg"}\n', "第 2 行"),
    "10 MB of spaces then junk": ("a.jsonl", GOOD + " " * 10_000_000 + "x\n", "第 2 行"),
    "mixed positives": ("a.jsonl", GOOD + '{"query": "a", "positives": ["a.jpg", "一句话"]}\n', "第 2 行"),
    "json not array": ("a.json", '{\n "query": "a",\n "positive": "b.jpg"\n}', "a.json"),
    "json cut": ("a.json", "[" + GOOD + ",", "a.json"),
    "json array of arrays": ("a.json", "[[1]]", "第 1 条"),
    "json trailing": ("a.json", "[" + GOOD + "] x", "a.json"),
    "csv empty": ("a.csv", b"", "没有一条记录"),
    "csv header only": ("a.csv", "query,positive\n", "没有一条记录"),
    "csv open quote": ("a.csv", 'query,positive\na,b.jpg\n"c,d.jpg\ne,f.jpg\n', "第 3 行"),
    "csv stray quote": ("a.csv", 'query,positive\n"a"b,c.jpg\n', "第 2 行"),
    "csv extra cells": ("a.csv", "query,positive\na,b.jpg,c\n", "第 2 行"),
    "csv missing cell": ("a.csv", "query,positive\na\n", "第 2 行"),
    "csv twice the column": ("a.csv", "query,query,positive\na,b,c.jpg\n", "两列"),
    "csv unnamed column": ("a.csv", ",query,positive\n0,a,b.jpg\n", "第 2 行"),
    "csv unknown column": ("a.csv", "query,positve\na,b.jpg\n", "positive"),
    "csv with semicolons": ("a.csv", "query;positive\na;b.jpg\n", "第 2 行"),
    "csv blank cell": ("a.csv", "query,positive\n   ,b.jpg\n", "空白"),
    "csv huge cell": ("a.csv", "query,positive\n" + "x" * 200_000 + ",b.jpg\n", "第 2 行"),
    "tsv with commas": ("a.tsv", "query,positive\na,b.jpg\n", "第 2 行"),
    "parquet junk": ("a.parquet", b"PAR1 not really PAR1", "Parquet"),
    "parquet empty": ("a.parquet", b"", "Parquet"),
    "gz junk": ("a.jsonl.gz", b"not gzip", "gzip"),
    "gz cut": ("a.jsonl.gz", gzip.compress(GOOD.encode() * 500)[:-12], "gzip"),
    "gz broken inside": ("a.jsonl.gz", gzip.compress(os.urandom(400))[:200] + b"\xff" * 200, "gzip"),
    "gz of parquet": ("a.parquet.gz", gzip.compress(b"x"), "扩展名"),
    "excel": ("a.xlsx", b"PK\x03\x04", "CSV"),
    "pickle": ("a.pkl", pickle.dumps([PAIR]), "pickle"),
    "numpy": ("a.npy", b"\x93NUMPY", "pickle"),
    "no suffix": ("data", GOOD, "扩展名"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(case, tmp_path, monkeypatch):
    name, content, word = BAD_FILES[case]
    path = tmp_path / name
    if content is not None: path.write_bytes(content.encode() if isinstance(content, str) else content)
    said = refused(lambda: read_records(path), name.split(".")[0], word)
    assert len(said) < 600
    monkeypatch.setattr(read, "SMALL", 0)  # 大文件走的路，一样的话，不留下半个缓存
    refused(lambda: read_records(path), name.split(".")[0], word)
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_strange_places(tmp_path):
    "管道、设备、NUL、文件夹、没有符合的通配符：都不等，都一句话。"
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jsonl")
        refused(lambda: read_records(tmp_path / "pipe.jsonl"), "管道")
    refused(lambda: read_records("/dev/zero"), "管道")
    refused(lambda: read_records("a\0.jsonl"), "空字符")
    refused(lambda: read_records(tmp_path / "*.jsonl.nothing"), "没有文件符合")
    (tmp_path / "e").mkdir()
    refused(lambda: read_records(tmp_path / "e"), "没有数据文件")
    (tmp_path / "d").mkdir()
    for n in ("train", "val", "corpus"): lines(tmp_path / "d" / f"{n}.jsonl", PAIR)
    refused(lambda: read_records(tmp_path / "d"), "train.jsonl", "混")
    (tmp_path / "s").mkdir()
    lines(tmp_path / "s/a.jsonl", PAIR); (tmp_path / "s/a.jsonl.gz").write_bytes(gzip.compress(GOOD.encode()))
    refused(lambda: read_records(tmp_path / "s"), "同一份")
    datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS)).save_to_disk(tmp_path / "dd")
    refused(lambda: read_records(tmp_path / "dd"), "train", "test")
    assert facts(read_records(tmp_path / "dd/train")) == WANT
    refused(lambda: read_records(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))), "train")
    (tmp_path / "dd/train/state.json").write_text("{}")
    refused(lambda: read_records(tmp_path / "dd/train"), "save_to_disk")
    for odd in (3, None, {"query": "a"}, b"x", object()): refused(lambda: read_records(odd), "读不了")
    refused(lambda: read_records([PAIR, "一句话"]), "第 2 条")
    refused(lambda: read_records("hf:"), "hf:")
    refused(lambda: read_records("hf:nobody/nothing"), "hf:nobody/nothing")
    refused(lambda: read_records([PAIR], limit=0), "limit")


BAD_TABLES = {
    "int query": {"query": [1], "positive": ["a.jpg"]},
    "float query": {"query": [1.5], "positive": ["a.jpg"]},
    "nan group": {"query": ["a"], "positive": ["a.jpg"], "group": [float("nan")]},
    "null query": {"query": pa.array([None], pa.string()), "positive": ["a.jpg"]},
    "struct positive": {"query": ["a"], "positive": [{"url": "a"}]},
    "nested positives": {"query": ["a"], "positives": [[["a.jpg"]]]},
    "timestamp": {"query": ["a"], "positive": pa.array([0], pa.timestamp("s"))},
    "bytes that are not a picture": {"query": ["a"], "positive": [b"abc"]},
    "pickled": {"query": ["a"], "positive": [pickle.dumps(Image.new("L", (2, 2)))]},
    "empty bytes in a list": {"query": ["a"], "positives": [[b""]]},
    "wrong names": {"text": ["a"], "image": ["a.jpg"]},
    "bool id": {"query": ["a"], "positive": ["a.jpg"], "query_id": [True]},
    "map": {"query": ["a"], "positive": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string()))},
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_parquet_and_datasets(case, tmp_path, monkeypatch):
    "列的类型不对：说出是哪一行；哪里都不打开 pickle。"
    def never(*a, **k): raise AssertionError("打开了 pickle")
    table = pa.table(BAD_TABLES[case])
    pq.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(pickle, "load", never)
    refused(lambda: read_records(tmp_path / "a.parquet"), "a.parquet 第 1 行")
    refused(lambda: read_corpus(tmp_path / "a.parquet")) if case != "wrong names" else read_corpus(tmp_path / "a.parquet")


def test_parquet_broken_in_the_middle(tmp_path):
    "坏在第二个行组：报错，而不是只给前一半。"
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"query": [f"{i} {os.urandom(20).hex()}" for i in range(4000)], "positive": ["a.jpg"] * 4000}), path, row_group_size=2000, compression="snappy")
    data = bytearray(path.read_bytes())
    at = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset or pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[at:at + 4000] = b"\xff" * 4000
    path.write_bytes(data)
    refused(lambda: read_records(path), "a.parquet", "Parquet")


# ---- 缓存 ----

def test_big_sources_are_checked_once(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(read, "SMALL", 0)
    path = lines(tmp_path / "a.jsonl", *ROWS)
    assert facts(read_records(path)) == WANT and len(list(cache.glob("*.arrow"))) == 1
    with monkeypatch.context() as m:
        m.setattr(read, "_records", None)  # 第二次不再逐行读
        again = read_records(path)
        assert facts(again) == WANT and isinstance(again.data, Store)
        refused(lambda: read_records(path, mode="i2i"), "a.jsonl 第 1 行", "i2i")
        assert read_records(path, mode="t2i").modes == {"t2i"}
    lines(path, *ROWS[:2])
    assert facts(read_records(path)) == WANT[:2], "文件变了就重新读"
    os.utime(path, ns=(1, 1))
    assert facts(read_records(path)) == WANT[:2] and len(list(cache.glob("*.arrow"))) == 3, "修改时间变了也算变了"
    assert facts(read_records(path, limit=1)) == WANT[:1] and facts(read_records(path)) == WANT[:2]
    for p in cache.glob("*.arrow"): p.write_bytes(p.read_bytes()[:300])
    assert facts(read_records(path)) == WANT[:2], "坏了的缓存等于没有"
    ds = datasets.Dataset.from_list(ROWS)
    n = len(list(cache.glob("*.arrow")))
    assert facts(read_records(ds)) == facts(read_records(ds)) == WANT and len(list(cache.glob("*.arrow"))) == n + 1
    stream = read_records(iter(ROWS))
    assert facts(stream) == WANT
    before = len(list(cache.glob("*.arrow")))
    del stream
    assert len(list(cache.glob("*.arrow"))) == before - 1, "认不出来的来源，用完就删"
    refused(lambda: read_records(iter([*ROWS, {}])), "第 6 条")
    assert len(list(cache.glob("*.arrow"))) == before - 1, "出错时也不留下"


def test_cache_is_bounded(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(read, "SMALL", 0)
    paths = [lines(tmp_path / f"{i}.jsonl", *ROWS) for i in range(4)]
    for p in paths: read_records(p); [os.utime(a, (os.stat(a).st_atime, os.stat(a).st_mtime - 10)) for a in cache.glob("*.arrow")]
    size = max(a.stat().st_size for a in cache.glob("*.arrow"))
    old = cache / ("." + "0" * 32 + ".arrow.abcd1234"); old.write_text("x"); os.utime(old, (1, 1))
    monkeypatch.setenv("VEMBED_CACHE_GB", str(size * 2.5 / 1e9))
    read_records(paths[0])  # 用过的排到最后
    assert len(list(cache.glob("*.arrow"))) == 2 and not old.exists()
    monkeypatch.setattr(read, "_records", None)
    assert facts(read_records(paths[0])) == WANT, "最近用的留着"


def test_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("VEMBED_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(read, "SMALL", 0)
    monkeypatch.setattr(read.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.warns(UserWarning, match="VEMBED_CACHE"): assert facts(read_records(lines(tmp_path / "a.jsonl", *ROWS))) == WANT


# ---- 下载 ----

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        if self.path.startswith("/away"): self.send_response(302); self.send_header("Location", "file:///etc/passwd"); self.end_headers(); return
        body = {"/a.png": PNG, "/big.png": PNG + b"\0" * 500, "/page.png": b"<html>no</html>"}.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        if body: self.wfile.write(body)

    def log_message(self, *a): pass


@pytest.fixture
def server():
    s = HTTPServer(("127.0.0.1", 0), Handler)
    s.seen = []
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s, f"http://127.0.0.1:{s.server_port}"
    s.shutdown(); s.server_close()


def test_downloads_only_when_asked(server, tmp_path):
    s, base = server
    path = lines(tmp_path / "a.jsonl", {"query": "红", "positive": f"{base}/a.png"}, {"query": "也红", "positive_image": f"{base}/a.png"})
    refused(lambda: read_records(path), "a.jsonl 第 1 行", "download=True")
    assert not s.seen, "没有答应就不上网"
    got = read_records(path, download=True)
    assert [r.positive_ids for r in got] == [[picture_id(as_picture(PNG))]] * 2 and s.seen == ["/a.png"], "同一个网址只下一次"
    assert read_corpus(lines(tmp_path / "c.jsonl", {"id": "x", "image": f"{base}/a.png"}), download=True)[1][0].key == got[0].positive_ids[0]
    for name, word in (("/none.png", "下载不了"), ("/away.png", "下载不了"), ("/page.png", "网页")): refused(lambda: read_records([{"query": "a", "positive": base + name}], download=True), "第 1 条", word)
    refused(lambda: read.fetch_url(f"{base}/big.png", most=300), "超过")


# ---- 图库 ----

def test_corpus_reads_the_same_things(tmp_path):
    rows = [{"id": "1", "image": "a.jpg", "price": 9}, {"id": "2", "text": "一句话"}, {"id": "3", "image": "b.jpg", "text": "both"}]
    lines(tmp_path / "c.jsonl", *rows)
    pq.write_table(pa.table({k: [r.get(k) for r in rows] for k in ("id", "image", "text", "price")}), tmp_path / "c.parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress((tmp_path / "c.jsonl").read_bytes()))
    (tmp_path / "f").mkdir(); lines(tmp_path / "f/0.jsonl", *rows[:1]); lines(tmp_path / "f/1.jsonl", *rows[1:])
    want = read_corpus(tmp_path / "c.jsonl")
    assert want[0] == ["1", "2", "3"] and want[1] == [Item(image="a.jpg"), Item("一句话"), Item("both", "b.jpg")]
    for s in ("c.parquet", "c.jsonl.gz", "f", "f/*.jsonl"): assert read_corpus(str(tmp_path / s))[:2] == want[:2], s
    for s in (datasets.Dataset.from_parquet(str(tmp_path / "c.parquet")), rows): assert read_corpus(s)[:2] == want[:2]
    assert read_corpus([{"货号": 7, "图": "a.jpg"}], {"id": "货号", "image": "图"})[0] == ["7"]


def test_corpus_with_embedded_pictures():
    a, b = encoded(colour="red"), encoded(colour="blue")
    ids, items, _ = read_corpus([{"id": "x", "image": a}, {"id": "x", "image": {"bytes": a, "path": None}}, {"image": base64.b64encode(b).decode()}])
    assert ids == ["x", picture_id(as_picture(b))] and items[0].image.encoded == a
    refused(lambda: read_corpus([{"id": "x", "image": a}, {"id": "x", "image": b}]), "第 2 条", "不能重复")


@pytest.mark.parametrize("row, word", [({"id": 1}, "image 或 text"), ({"id": 1, "text": ""}, "image 或 text"), ({"id": 1, "text": 3}, "int"), ({"id": 1, "image": 3}, "int"), ({"id": 1, "image": b"abc"}, "不是图片"), ({"id": [1], "text": "a"}, "list"),
                                       ({"id": float("nan"), "text": "a"}, "float"), ({"id": 1, "image": "https://a/b.jpg"}, "download=True"), ({"id": 1, "image": ["a.jpg", 3]}, "int"), ({"id": 1, "image": {"url": "x"}}, "image"), ("x", "str")])
def test_bad_corpus_rows(row, word): refused(lambda: read_corpus([{"id": 0, "text": "好"}, row]), "第 2 条", word)


def test_rows_of_a_folder(tmp_path):
    lines(tmp_path / "a.jsonl", {"x": 1}); lines(tmp_path / "b.jsonl", {"x": 2})
    assert [w for w, _ in read_rows(tmp_path)] == ["a.jsonl 第 1 行", "b.jsonl 第 1 行"]


def test_keys_of_text_image_and_several_images_in_one_block():
    "pyarrow 的 binary_join_element_wise 在 skip 时会丢掉全空的行；三种查询混在一块里，号要对。"
    records = [Record(Item("0"), [Item("d")]), Record(Item(image="a.jpg"), [Item("d")]), Record(Item(image=["a.jpg", "b.jpg"]), [Item("d")]), Record(Item("0", "a.jpg"), [Item("d")])]
    assert Store.build(iter(records)).keys().query.tolist() == keys_of(records).query.tolist() == [0, 1, 2, 3]
