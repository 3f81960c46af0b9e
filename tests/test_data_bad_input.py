"""数据的坏输入，一张表：每一种都得到一句话的错误、数得清的丢弃，或者对的值；不崩、不卡、不给黑图、不悄悄变少，也不运行数据里的代码。"""
import base64
import gzip
import io
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data import read, store
from vembed_nb.data.check import check, drop_broken, write_clean
from vembed_nb.data.images import ImageCache, broken_images, open_image
from vembed_nb.data.read import Records, read_corpus, read_records, read_rows
from vembed_nb.data.sample import GroupedBatches, LengthGroupedBatches, MixedBatches, NoDuplicateBatches
from vembed_nb.data.store import Store
from vembed_nb.data.table import from_table
from vembed_nb.data.tasks import Item, Record, as_record

# ---------------------------------------------------------------- 材料

GOOD = {"query": "红杯子", "positive": "1.png"}


def jsonl(*rows): return "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in rows)


def put(t, name, content):
    "写一个文件，返回路径。"
    (t / name).parent.mkdir(parents=True, exist_ok=True)
    (t / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return t / name


def picture(fmt="PNG", mode="RGB", size=(24, 16), color=(200, 30, 40), **kw):
    out = io.BytesIO()
    Image.new(mode, size, color).save(out, fmt, **kw)
    return out.getvalue()


def noise(fmt="PNG", n=64, **kw):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (n, n, 3), np.uint8)).save(out, fmt, **kw)
    return out.getvalue()


def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
def fake_png(w, h): return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def parquet(t, name="a.parquet", **columns):
    pq.write_table(pa.table(columns), t / name)
    return t / name


def link(t, name, to): os.symlink(to, t / name); return t / name
def fifo(t, name): os.mkfifo(t / name); return t / name
def folder(t, name): (t / name).mkdir(parents=True); return t / name


class Bomb:
    "打开就留下记号的 pickle。"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return (open, (str(self.mark), "w"))


def bomb(t): return pickle.dumps(Bomb(t / "MARK"))


def extension(t, name):
    "一列声称是 Python 扩展类型，说明里藏着 pickle。"
    schema = pa.schema([pa.field("query", pa.string()), pa.field("positive", pa.string(), metadata={b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bomb(t)})])
    table = pa.table({"query": ["a"], "positive": ["b"]}).cast(schema)
    if name.endswith(".parquet"): pq.write_table(table, t / name)
    else:
        with pa.OSFile(str(t / name), "wb") as f, pa.ipc.new_file(f, schema) as w: w.write_table(table)
    return t / name


def dataset(t, rows=None, table=None):
    import datasets
    return datasets.Dataset(table) if table is not None else datasets.Dataset.from_list(rows or [GOOD])


def saved(t, table=None, state=None, name="ds"):
    "save_to_disk 的文件夹，里面的 Arrow 文件或 state.json 被换掉。"
    dataset(t, [GOOD] * 3).save_to_disk(t / name)
    file = next((t / name).glob("*.arrow"))
    if isinstance(table, bytes): file.write_bytes(table)
    elif table is not None:
        with pa.OSFile(str(file), "wb") as f, pa.ipc.new_stream(f, table.schema) as w: w.write_table(table)
    if state is not None: (t / name / "state.json").write_text(json.dumps(json.loads((t / name / "state.json").read_text()) | state) if isinstance(state, dict) else state)
    return t / name


def not_utf8(): return pa.Array.from_buffers(pa.string(), 1, [None, pa.array([0, 2], pa.int32()).buffers()[1], pa.py_buffer(b"\xff\xfe")])


def kept_store(t, meta=None, cut=None, name="s.arrow"):
    "一个好仓库；`meta` 换掉说明，`cut` 是对字节做的手脚。"
    good = Store.build([as_record({"query": f"q{i}", "positive": "b.png", "group": "g"}, f"f.jsonl 第 {i} 行") for i in range(5)], t / name)
    if meta is not None:
        with pa.OSFile(str(t / name), "wb") as f, pa.ipc.new_file(f, store.SCHEMA) as w:
            w.write_batch(good.batches[0])
            w.write_batch(pa.RecordBatch.from_pylist([], schema=store.SCHEMA), custom_metadata={"vembed": meta(good.meta) if callable(meta) else meta})
    if cut is not None: (t / name).write_bytes(cut((t / name).read_bytes()))
    return t / name


def album(t, n=12):
    "n 张不同的图。"
    for i in range(n): Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)).resize((80, 80)).save(t / f"{i}.png")
    return t


def goods(n=10): return [{"text": f"第 {i} 件", "image": f"{i}.png"} for i in range(n)]
def some(n=20): return [as_record({"query": f"q{i}", "positive": f"d{i}", "group": str(i % 5)}) for i in range(n)]

# ---------------------------------------------------------------- 门


def small(x, **kw):
    "读记录，留在内存里的路。"
    return [(r.query.text, r.positives[0].image if isinstance(r.positives[0].image, str) else r.positives[0].text) for r in read_records(x, **kw)]


def records(x, **kw):
    "读记录：小的路和大的路（经过仓库）要么给出同样的东西，要么说同样的话。"
    def outcome():
        try: return small(x, **kw)
        except VembedError as e: return e
    one, old, read.SMALL = outcome(), read.SMALL, 0
    try: two = outcome()
    finally: read.SMALL = old
    assert str(one) == str(two), (one, two)
    if isinstance(one, VembedError): raise one
    return one


def big(x, **kw):
    "只走大的路。"
    old, read.SMALL = read.SMALL, 0
    try: return small(x, **kw)
    finally: read.SMALL = old


def corpus(x, **kw): return list(zip(*read_corpus(x, **kw)[:2]))
def rows(x): return list(read_rows(x))


def fix(x, columns=None, root=None):
    "体检，写干净的一份，再读回来：(读到, 留下, 隔离, 去掉一部分, 隔离的大类, 重读的条数)。"
    out = Path(os.environ["VEMBED_CACHE"]).parent / "fixed"
    r = check(x, root or out.parent, columns)
    s = write_clean(x, out, r, columns)
    held = [json.loads(line) for line in (out / "quarantine.jsonl").read_text(encoding="utf-8").split("\n") if line]
    assert s["read"] == s["kept"] + s["quarantined"] and len(held) == s["quarantined"] and all(h["where"] and h["reason"] and "\n" not in h["reason"] for h in held)
    return s["read"], s["kept"], s["quarantined"], s["trimmed"], s["reasons"], len(read_records(out / s["file"]))


def image(x, **kw):
    "打开一张图；`broken_images` 的说法要相同。返回中间的像素。"
    path, root = (x.name, x.parent) if isinstance(x, Path) else x
    said = broken_images([path], root).get(path) if isinstance(path, str) else None
    try: im = open_image(path, root, **kw)
    except VembedError as e: assert not isinstance(path, str) or said == str(e), said; raise
    assert said is None and im.mode == "RGB"
    return im.getpixel((im.width // 2, im.height // 2))


def table(t, *more, out="set", **kw):
    "做一个数据集：丢掉的坏图都有原因，别的都在。"
    n = len(goods()) + len(more)
    s = from_table(put(t, "t.jsonl", jsonl(*goods(), *more)), t / out, **{"image_root": str(album(t)), **kw})
    assert sum(c["images"] for c in s["counts"].values()) + len(s["broken"]) <= n
    return s


def opened(path): return list(Store.open(path))


def child(code, *args):
    "在新的进程里跑：卡住、段错误都看得见。"
    r = subprocess.run([sys.executable, "-c", "import sys\nfrom vembed_nb.core import VembedError\nfrom vembed_nb.data.store import Store\n" + code, *map(str, args)], capture_output=True, text=True, timeout=20)
    if r.returncode == 9: raise VembedError(r.stdout.strip())
    assert r.returncode == 0, (r.returncode, r.stderr[-300:])
    return r.stdout.strip()


@dataclass
class Case:
    "一种坏输入。"
    name: str
    make: Callable  # 临时文件夹 → 给门的东西
    door: Callable
    want: object  # 文字（或几段）：要抛 VembedError，消息里有它们；函数：对结果成立
    bug: str = ""  # BUGS5.md 里的编号：现在还不对


def case(name, make, door, *want, bug=""): return Case(name, make, door, want[0] if len(want) == 1 and callable(want[0]) else want, bug)
def file(title, name, content, *want, door=records, bug=""): return case(f"文件：{title}", lambda t: put(t, name, content(t) if callable(content) else content), door, *want, bug=bug)
def row(title, value, *words, bug=""): return case(f"行：{title}", lambda t: [GOOD, value(t) if callable(value) else value], records, *(words if words and callable(words[0]) else ("第 2 条", *words)), bug=bug)
def line(title, text, *words, bug=""): return case(f"JSONL：{title}", lambda t: put(t, "a.jsonl", jsonl(GOOD) .encode() + (text if isinstance(text, bytes) else text.encode()) + b"\n" + jsonl(GOOD).encode()), records, *(words if words and callable(words[0]) else ("a.jsonl 第 2 行", *words)), bug=bug)
def pic(title, content, *want, name="x.jpg", bug=""): return case(f"图：{title}", lambda t: put(t, name, content(t) if callable(content) else content), image, *(want if want and callable(want[0]) else (name, *want)), bug=bug)


def near(*color): return lambda got: max(abs(a - b) for a, b in zip(got, color)) <= 6
def n(k): return lambda got: len(got) == k

# ---------------------------------------------------------------- 表

PNG, JPG = picture(), noise("JPEG", 200)
G = jsonl(GOOD)
DEEP = "[" * 100_000
STATE = lambda: NoDuplicateBatches(some(), 4).state_dict()
resume = lambda state: NoDuplicateBatches(some(), 4).load_state_dict(state)

CASES = [
    # 一行
    row("没有查询", {"positive": "b"}, "没有查询"), row("null 的描述", {"query": None, "positive": "b"}, "没有查询"), row("空串", {"query": "", "positive": "b"}, "没有查询"), row("只有空白", {"query": " \t\u3000\u00a0", "positive": "b"}, "空白"),
    row("正例只有空白", {"query": "a", "positives": ["b", "\n"]}, "positives"), row("查询是数", {"query": 3, "positive": "b"}, "int"), row("查询是 dict", {"query": {"a": 1}, "positive": "b"}, "dict"), row("嵌套的列表", {"query": "a", "positives": [["b"]]}, "list"),
    row("嵌套的描述", {"query": [["a"]], "positive": "b"}, "query", "第 1 句"), row("描述里有 null", {"query": ["a", None], "positive": "b"}, "第 2 句"), row("空的描述列表", {"query": [], "positive": "b"}, "空的列表"), row("描述里有空白", {"query": ["a", " "], "positive": "b"}, "第 2 句"),
    row("正例里混着数", {"query": "a", "positives": ["b", 3]}, "int"), row("一条里又有图又有字", {"query": "a", "positives": ["b", "c.png"]}, "同一种"), row("没有正例", {"query": "a", "positives": []}, "没有正例"), row("字段拼错", {"query": "a", "postive": "b"}, "positive"),
    row("多出来的字段", {"query": "a", "positive": "b", "价格": 3}, "价格"), row("id 不等长", {"query": "a", "positives": ["b"], "positive_ids": ["x", "y"]}, "一一对应"), row("id 是 NaN", {"query": "a", "positive": "b", "query_id": float("nan")}, "query_id"),
    row("id 是布尔", {"query": "a", "positive": "b", "positive_id": True}, "positive_ids"), row("id 是列表", {"query": "a", "positive": "b", "query_id": [1]}, "query_id"), row("id 是 0", {"query": "a", "positive": "b", "query_id": 0, "group": 0}, n(2)), row("组是 dict", {"query": "a", "positive": "b", "group": {}}, "group"),
    row("id 有半个字符", {"query": "a", "positive": "b", "query_id": "\ud800"}, "query_id"), row("路径有半个字符", {"query": "a", "positive_image": "\ud800.jpg"}, "positive_image"), row("文字有半个字符", {"query": "\udfff", "positive": "b"}, "半个字符"),
    row("极大的整数 id", {"query": "a", "positive": "b", "query_id": 10**30}, n(2)), row("五千位的 id", {"query": "a", "positive": "b", "query_id": 10**5000}, "query_id"), row("五千位的正例", {"query": "a", "positive": 10**5000}, "positive"),
    row("不是 dict", 7, "int"), row("null", None, "NoneType"), row("整行是列表", [1], "list"), row("查询是数组", {"query": np.zeros((3, 3)), "positive": "b"}, "ndarray"), row("自己套自己", lambda t: (lambda x: (x.append(x), {"query": "a", "positives": x})[1])([]), "positives"),
    row("没有正例的 Record", Record(Item("a"), []), "正例"), row("文字是数的 Record", Record(Item(3), [Item("b")]), "文字"), row("id 太多的 Record", Record(Item("a"), [Item("b")], positive_ids=["x", "y"]), "一一对应"),
    # 装在行里的图
    row("截断的 PNG 字节", {"query": "a", "positive_image": PNG[:20]}, "截断"), row("空的字节", {"query": "a", "positive_image": b""}, "没有正例"), row("SVG 字节", {"query": "a", "positive_image": b"<svg/>"}, "SVG"), row("PDF 字节", {"query": "a", "positive_image": b"%PDF-1.7"}, "PDF"),
    row("网页字节", {"query": "a", "positive_image": b"<html>"}, "网页"), row("炸弹", {"query": "a", "positive_image": fake_png(60000, 60000)}, "打不开"), row("pickle 字节", lambda t: {"query": "a", "positive_image": bomb(t)}, "pickle"), row("老 pickle", lambda t: {"query": "a", "positive": pickle.dumps(Bomb(t / "MARK"), 0)}, "不是图片"),
    row("坏的 base64", {"query": "a", "positive": "data:image/png;base64,####"}, "base64"), row("不是 base64 的 URI", {"query": "a", "positive": "data:image/svg+xml,<svg/>"}, "base64"), row("空的 URI", {"query": "a", "positive": "data:image/png;base64,"}, "0 字节"),
    row("URI 里是网页", {"query": "a", "positive_image": "data:image/png;base64," + base64.b64encode(b"<html></html>").decode()}, "网页"), row("URI 里是 SVG", {"query": "a", "positive_image": "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()}, "SVG"),
    row("看不完的 base64", {"query": "a", "positive_image": "iVBORw0KGgoAAAANSUhEUgAA" + "A" * 20 + " " * 40000 + "!"}, n(2)), row("网址", {"query": "a", "positive": "https://example.com/a.jpg"}, "download=True"), row("大写的网址", {"query_image": "HTTP://example.com/a", "positive": "b"}, "download=True"),
    row("file 网址", {"query": "a", "positive_image": "file:///etc/hostname"}, "file:///"), row("像 base64 的话", {"query": "iVBORw0KGgo 是什么", "positive": "/9j/ 是 JPEG 的开头"}, n(2)),
    # JSONL
    line("不是 JSON", "{坏"), line("切断", '{"query": "a", "posi'), line("两个对象", '{"query":"a","positive":"b"}{}'), line("单引号", "{'query': 'a'}"), line("数组", "[1]"), line("数", "7"), line("null", "null"), line("同一个键两次", '{"query":"a","query":"b","positive":"c"}', "写了两次"),
    line("里面的键两次", '{"query":"a","positive":{"text":"x","text":"y"}}', "写了两次"), line("NaN", '{"query":"a","positive":NaN}', "NaN"), line("负无穷", '{"query":"a","positive":"b","_x":-Infinity}', "Infinity"), line("一万层", DEEP), line("五千位的数", '{"query":' + "9" * 5000 + "}"),
    line("半个字符", '{"query":"\\ud800","positive":"b"}'), line("空字符", b"\0\0\0"), file("坏的 UTF-8", "a.jsonl", G.encode() + b'{"query":"\xe7\xba","positive":"b"}\n', "a.jsonl", "UTF-8"),
    line("10 MB 的一行", '{"query":"' + "x" * 10_000_000 + '","positive":"b"}', "上限"), line("10 MB 的空白", " " * 10_000_000 + "x"), line("空行", "  ", n(2)), line("U+2028 不是换行", '{"query":"a\u2028b","positive":"c"}', n(3)), line("键里有换行", json.dumps({"a\nb": 1})), line("中间的 BOM", "\ufeff" + G.strip()),
    file("CRLF", "a.jsonl", G.replace("\n", "\r\n") * 3, n(3)), file("只有 CR", "a.jsonl", G.replace("\n", "\r") * 2, "a.jsonl 第 1 行"), file("没有结尾的换行", "a.jsonl", (G * 2).rstrip(), n(2)), file("UTF-8 BOM", "a.jsonl", b"\xef\xbb\xbf" + G.encode(), n(1)), file("UTF-16", "a.jsonl", G.encode("utf-16"), "UTF-16"), file("UTF-16 大端", "a.jsonl", b"\xfe\xff" + G.encode("utf-16-be"), "UTF-16"),
    file("UTF-16 没有 BOM", "a.jsonl", G.encode("utf-16-le"), "a.jsonl"), file("GB18030", "a.jsonl", (G * 3).encode("gb18030"), lambda got: got == [("红杯子", "1.png")] * 3), file("Big5", "a.jsonl", jsonl({"query": "紅色的杯子與盤子", "positive": "b"}).encode("big5"), "UTF-8"), file("Latin-1", "a.jsonl", '{"query":"café","positive":"b"}\n'.encode("latin-1"), "UTF-8"),
    file("空文件", "a.jsonl", b"", "没有一条记录"), file("只有 BOM", "a.jsonl", b"\xef\xbb\xbf", "没有一条记录"), file("全是零", "a.jsonl", bytes(100), "第 1 行"), file("pickle 改名成 jsonl", "a.jsonl", bomb, "a.jsonl"), file("数组里的数组", "a.json", "[[1]]", "第 1 条"), file("切断的数组", "a.json", "[" + G, "a.json"), file("数组里的 NaN", "a.json", '[{"query":"a","positive":NaN}]', "NaN"),
    file("换行的文件名", "n\nl.jsonl", "{坏\n", "第 1 行"), file("列名三千个", "w.csv", ",".join(f"c{i}" for i in range(3000)) + "\n1\n", "zz", door=lambda x: records(x, columns={"query": "zz"})),
    # CSV
    file("公式是文字", "a.csv", 'query,positive\n"=HYPERLINK(""http://x"")",@SUM(A1)\n+1-1,-2\n', lambda got: got == [('=HYPERLINK("http://x")', "@SUM(A1)"), ("+1-1", "-2")]), file("只有表头", "a.csv", "query,positive\n", "没有一条记录"), file("CSV 的 BOM", "a.csv", "query,positive\na,b\n".encode("utf-8-sig"), n(1)),
    file("CSV 的 GB18030", "a.csv", "query,positive\n红色的杯子,蓝色的盘子\n".encode("gb18030"), lambda got: got == [("红色的杯子", "蓝色的盘子")]), file("CSV 只有 CR", "a.csv", "query,positive\ra,b\rc,d\r", n(2)), file("格子里有换行", "a.csv", 'query,positive\n"a\n1",b\nc,d\n', lambda got: got[0][0] == "a\n1"),
    file("引号没有闭上", "a.csv", 'query,positive\na,b\n"c,d\n', "a.csv 第 3 行"), file("多出来的格子", "a.csv", "query,positive\na,b,c\n", "a.csv 第 2 行", "表头"), file("少了格子", "a.csv", "query,positive\na\n", "a.csv 第 2 行"), file("两列同名", "a.csv", "query,query,positive\na,b,c\n", "重复"), file("分号", "a.csv", "query;positive\na;b\n", "第 2 行"),
    file("列数不认得", "a.csv", "标题,图\na,b\n", "标题"), file("columns 写错列名", "a.csv", "标题,图\na,b\n", "a.csv", "题目", door=lambda x: records(x, columns={"query": "题目", "positive": "图"})), file("columns 写错字段", "a.csv", "标题,图\na,b\n", "qurey", "query", door=lambda x: records(x, columns={"qurey": "标题"})),
    file("三万列", "a.csv", ",".join(f"c{i}" for i in range(100_000)) + "\n1\n", "a.csv"), file("TSV 里是逗号", "a.tsv", "query,positive\na,b\n", "第 2 行"), file("CSV 里的空字符", "a.csv", "query,positive\na\0b,c\n", lambda got: got[0][0] == "a\0b"),
    # gzip
    file("不是 gzip", "a.jsonl.gz", b"xx", "gzip"), file("切断的 gzip", "a.jsonl.gz", lambda t: gzip.compress(G.encode() * 500)[:-12], "gzip"), file("校验错的 gzip", "a.csv.gz", lambda t: gzip.compress(b"query,positive\na,b\n")[:-8] + b"\1" * 8, "gzip"), file("后面有垃圾的 gzip", "a.jsonl.gz", lambda t: gzip.compress(G.encode()) + b"junk", "gzip"), file("两段 gzip", "a.jsonl.gz", lambda t: gzip.compress(G.encode()) * 2, n(2)),
    file("gzip 炸弹：一行", "a.jsonl.gz", lambda t: gzip.compress(b" " * 80_000_000, 1), "a.jsonl.gz 第 1 行", "MB", door=small), file("gzip 炸弹：数组", "a.json.gz", lambda t: gzip.compress(b"[" + b" " * 2_000_000 + b"]"), "MB", door=lambda x: tight(x)), file("gzip 炸弹：很多行", "a.jsonl.gz", lambda t: gzip.compress(G.encode() * 20000), lambda kind: kind is Store, door=lambda x: tight_rows(x)), file("后缀大写", "A.JSONL.GZ", lambda t: gzip.compress(G.encode()), n(1)),
    # Parquet 和 datasets
    file("假的 Parquet", "a.parquet", b"PAR1 no PAR1", "Parquet"), case("Parquet：切断", lambda t: put(t, "b.parquet", parquet(t, query=["a"] * 99, positive=["b"] * 99).read_bytes()[:-30]), records, "b.parquet", "Parquet"), case("Parquet：空表", lambda t: parquet(t, query=pa.array([], pa.string()), positive=pa.array([], pa.string())), records, "没有一条记录"),
    case("Parquet：没有列", lambda t: parquet(t), records, "没有一条记录"), case("Parquet：别的列名", lambda t: parquet(t, 标题=["a"], 图=["b"]), records, "第 1 行", "标题"), case("Parquet：查询是数", lambda t: parquet(t, query=[1], positive=["b"]), records, "a.parquet 第 1 行", "int"), case("Parquet：第二行是 null", lambda t: parquet(t, query=["a", None], positive=["b", "c"]), records, "a.parquet 第 2 行"),
    case("Parquet：字典列", lambda t: parquet(t, query=pa.array(["a", "b", "a"]).dictionary_encode(), positive=pa.array(["x", "x", "x"]).dictionary_encode()), records, n(3)), case("Parquet：结构", lambda t: parquet(t, query=["a"], positive=[{"url": "b"}]), records, "a.parquet 第 1 行"), case("Parquet：嵌套结构", lambda t: parquet(t, query=["a"], positives=[[{"text": {"x": "b"}}]]), records, "a.parquet 第 1 行"),
    case("Parquet：好的结构", lambda t: parquet(t, query=["a"], positives=[[{"text": "b"}]]), records, n(1)), case("Parquet：pickle", lambda t: parquet(t, query=["a"], positive=[bomb(t)]), records, "a.parquet 第 1 行", "pickle"), case("Parquet：扩展类型里的 pickle", lambda t: extension(t, "e.parquet"), records, n(1)), case("Parquet：时间", lambda t: parquet(t, query=["a"], positive=pa.array([0], pa.timestamp("s"))), records, "datetime"),
    case("Parquet：公元三百亿年", lambda t: parquet(t, query=["a"], positive=["b"], meta_t=pa.array([2**30], pa.date32())), records, "a.parquet 第 1", "日期"), case("Parquet：没有的时区", lambda t: parquet(t, query=["a"], positive=["b"], meta_t=pa.array([0], pa.timestamp("s", "Mars/Olympus"))), records, "a.parquet 第 1", "Mars"), case("Parquet：坏的 UTF-8", lambda t: parquet(t, query=not_utf8(), positive=["b"]), records, "a.parquet"),
    case("Parquet：columns 写错", lambda t: parquet(t, 标题=["a"], 图=["b"]), lambda x: records(x, columns={"query": "题目", "positive": "图"}), "题目"), case("Dataset：查询是数", lambda t: dataset(t, [{"query": 1, "positive": "b"}]), records, "第 1 条", "int"), case("Dataset：坏的 UTF-8", lambda t: dataset(t, table=pa.table({"query": not_utf8(), "positive": ["b"]})), records, "datasets 第 1", "utf-8"),
    case("Dataset：pickle", lambda t: dataset(t, [{"query": "a", "positive": bomb(t)}]), records, "第 1 条", "pickle"), case("Dataset：没有行", lambda t: dataset(t, table=pa.table({"query": pa.array([], pa.string()), "positive": pa.array([], pa.string())})), records, "没有一条记录"), case("Dataset：没有的时区", lambda t: dataset(t, table=pa.table({"query": ["a"], "positive": ["b"], "meta_t": pa.array([0], pa.timestamp("s", "Mars/Olympus"))})), records, "datasets 第 1", "Mars"),
    case("save_to_disk：好的", lambda t: saved(t), records, n(3)), case("save_to_disk：切断", lambda t: saved(t, b"\0" * 50), records, "save_to_disk"), case("save_to_disk：空的", lambda t: saved(t, b""), records, "save_to_disk"), case("save_to_disk：列变了", lambda t: saved(t, pa.table({"query": ["a"], "positive": ["b"], "x": [1]})), records, "save_to_disk"), case("save_to_disk：坏的 state", lambda t: saved(t, state="{}"), records, "save_to_disk"),
    case("save_to_disk：扩展类型里的 pickle", lambda t: saved(t, pa.ipc.open_file(str(extension(t, "e.arrow"))).read_all()), records, n(1)), case("save_to_disk：别处的文件", lambda t: (saved(t, name="other"), saved(t, state={"_data_files": [{"filename": f"../other/{next((t / 'other').glob('*.arrow')).name}"}]}))[1], records, "ds"), case("save_to_disk：几个划分", lambda t: (put(t, "d/dataset_dict.json", "{}"), t / "d")[1], records, "划分"),
    case("来源自己出错", lambda t: lambda: (GOOD if i < 2 else os.stat(t / "没有了") for i in range(3)), lambda make: (lambda said: "写不下" not in said)(message(lambda: big(make()))), lambda got: got),
    # 哪里来的
    case("没有这个文件", lambda t: t / "no.jsonl", records, "no.jsonl"), case("文件夹叫 x.jsonl", lambda t: folder(t, "x.jsonl"), records, "没有数据文件"), case("管道", lambda t: fifo(t, "p.jsonl"), records, "管道"), case("设备", lambda t: "/dev/zero", records, "管道"), case("空字符", lambda t: "a\0.jsonl", records, "空字符"), case("链接绕圈", lambda t: link(t, "l.jsonl", t / "l.jsonl"), records, "l.jsonl"), case("断了的链接", lambda t: link(t, "l.jsonl", t / "无"), records, "l.jsonl"),
    case("极长的路径", lambda t: "a" * 5000 + ".jsonl", records, "aaa"), case("极长的路径（图库）", lambda t: "a" * 5000 + ".jsonl", corpus, "aaa"), case("极长的路径（体检）", lambda t: "a" * 5000 + ".jsonl", check, "aaa"), case("极深的路径", lambda t: str(t) + "/a" * 1500 + "/x.jsonl", records, "x.jsonl"), case("不是 UTF-8 的文件名", lambda t: (put(t, "a.jsonl", G), os.rename(t / "a.jsonl", os.fsencode(t) + b"/\xd6\xd0.jsonl"), os.fsdecode(os.fsencode(t) + b"/\xd6\xd0.jsonl"))[2], records, n(1)),
    case("Excel", lambda t: put(t, "a.xlsx", b"PK"), records, "CSV"), case("pickle 文件", lambda t: put(t, "a.pkl", bomb(t)), records, "pickle"), case("npy 文件", lambda t: put(t, "a.npy", bomb(t)), records, "pickle"), case("pt 文件", lambda t: put(t, "a.pt", bomb(t)), records, "pickle"), case("没有扩展名", lambda t: put(t, "a", G), records, "扩展名"), case("空的文件夹", lambda t: folder(t, "e"), records, "没有数据文件"),
    case("通配符没有符合的", lambda t: str(t / "*.jsonl"), records, "没有文件符合"), case("通配符里有绕圈的文件夹", lambda t: (put(t, "g/a.jsonl", G), link(t, "g/s", t / "g"), str(t / "g/**/*.jsonl"))[2], records, n(1)), case("通配符里有两个绕圈", lambda t: (put(t, "g/a.jsonl", G), link(t, "g/s1", t / "g"), link(t, "g/s2", t / "g"), str(t / "g/**/*.jsonl"))[3], records, n(1)),
    case("文件夹里断了的链接", lambda t: (put(t, "f/a.jsonl", G), link(t, "f/b.jsonl", t / "无"), t / "f")[2], records, "b.jsonl"), case("通配符里断了的链接", lambda t: (put(t, "f/a.jsonl", G), link(t, "f/b.jsonl", t / "无"), str(t / "f/*.jsonl"))[2], records, "b.jsonl"), case("文件夹里的管道", lambda t: (put(t, "f/a.jsonl", G), fifo(t, "f/b.jsonl"), t / "f")[2], records, "b.jsonl"),
    case("文件夹里压缩的一份", lambda t: (put(t, "f/part-0.jsonl", G), put(t, "f/part-1.jsonl.bz2", b"BZh"), t / "f")[2], records, "part-1.jsonl.bz2"), case("训练和测试混在一起", lambda t: (put(t, "f/train.jsonl", G), put(t, "f/test.jsonl", G), t / "f")[2], records, "测试"), case("同一份两种格式", lambda t: (put(t, "f/a.jsonl", G), put(t, "f/a.csv", "query,positive\na,b\n"), t / "f")[2], records, "同一份"),
    case("名字只差写法", lambda t: (put(t, "f/\u00e9.jsonl", G), put(t, "f/e\u0301.jsonl", G), t / "f")[2], records, n(2)), case("dict 当来源", lambda t: GOOD, records, "dict"), case("limit 是文字", lambda t: [GOOD], lambda x: records(x, limit="3"), "limit"), case("limit 是小数", lambda t: [GOOD], lambda x: records(x, limit=1.5), "limit"), case("limit 是零", lambda t: [GOOD], lambda x: records(x, limit=0), "limit"),
    case("mode 拼错", lambda t: [GOOD], lambda x: records(x, mode="t2v"), "t2v", "t2t"), case("mode 是数", lambda t: [GOOD], lambda x: records(x, mode=3), "mode"), case("mode 不符", lambda t: [GOOD], lambda x: records(x, mode="i2i"), "第 1 条", "i2i"), case("columns 是列表", lambda t: [GOOD], lambda x: records(x, columns=["query"]), "columns"), case("逐行读坏行", lambda t: put(t, "a.jsonl", G + "{\n"), rows, "a.jsonl 第 2 行"),
    # 图库
    case("图库：两行同一个 id", lambda t: [{"id": 1, "text": "a"}, {"id": "1", "text": "b"}], corpus, "第 2 条", "'1'"), case("图库：没有内容", lambda t: [{"id": 1}], corpus, "第 1 条"), case("图库：文字是数", lambda t: [{"id": 1, "text": 3}], corpus, "int"), case("图库：id 是小数", lambda t: [{"id": 1.5, "text": "a"}], corpus, "float"), case("图库：网址", lambda t: [{"id": 1, "image": "http://example.com/a.png"}], corpus, "download=True"),
    case("图库：id 是零", lambda t: [{"id": 0, "text": "a"}], corpus, lambda got: got[0][0] == "0"), case("图库：两种写法的 é", lambda t: [{"id": "\u00e9", "text": "a"}, {"id": "e\u0301", "text": "b"}], corpus, n(2)), case("图库：只有空白", lambda t: [{"id": 1, "text": "  "}], corpus, "第 1 条"), case("图库：二十万个字", lambda t: [{"id": 1, "text": "x" * 200_000}], corpus, "上限"), case("图库：半个字符", lambda t: [{"id": 1, "text": "\ud800"}], corpus, "半个字符"),
    case("图库：映射被盖住", lambda t: [{"id": 1, "caption": "A", "text": "B"}], lambda x: read_corpus(x, {"text": "caption"})[1][0].text, lambda got: got == "A"), case("图库：没有这一列", lambda t: [{"id": 1, "text": "A"}], lambda x: read_corpus(x, {"image": "没有"}), "没有"), case("图库：没有这个字段", lambda t: [{"id": 1, "text": "A", "x": "B"}], lambda x: read_corpus(x, {"imge": "x"}), "imge"), case("图库：空的", lambda t: put(t, "c.jsonl", ""), corpus, "没有一行"),
    # 仓库和缓存
    case("仓库：切断", lambda t: kept_store(t, cut=lambda b: b[:len(b) // 2]), opened, "s.arrow"), case("仓库：空的", lambda t: kept_store(t, cut=lambda b: b""), opened, "s.arrow"), case("仓库：别人的 Arrow", lambda t: extension(t, "e.arrow"), opened, "e.arrow"), case("仓库：Parquet", lambda t: parquet(t, a=[1]), opened, "a.parquet"), case("仓库：旧的格式", lambda t: kept_store(t, lambda m: json.dumps(m | {"format": 0})), opened, "另一个版本"), case("仓库：说明是列表", lambda t: kept_store(t, "[]"), opened, "s.arrow"),
    case("仓库：说明里没有文件名", lambda t: kept_store(t, lambda m: json.dumps({k: v for k, v in m.items() if k != "files"})), opened, "s.arrow"), case("仓库：文件名不够", lambda t: kept_store(t, lambda m: json.dumps(m | {"files": []})), opened, "s.arrow"), case("仓库：说明一万层", lambda t: kept_store(t, DEEP), opened, "s.arrow"), case("仓库：文件夹", lambda t: folder(t, "d"), opened, "d"), case("仓库：没有", lambda t: t / "无.arrow", opened, "无.arrow"),
    case("仓库：管道", lambda t: fifo(t, "p.arrow"), lambda x: child("try: Store.open(sys.argv[1])\nexcept VembedError as e: print(e); sys.exit(9)", x), "p.arrow"), case("仓库：改了一位", lambda t: kept_store(t), lambda x: child(FLIPS, x), lambda got: got == "好"), case("仓库：dict 当记录", lambda t: [GOOD], Store.build, "dict"), case("仓库：行号极大", lambda t: [Record(Item("a"), [Item("b")], where="x 第 99999999999999999999 行")], lambda x: Store.build(x)[0].where, lambda got: got == "x 第 99999999999999999999 行"),
    case("缓存：是一个文件", lambda t: (put(t, "file", ""), os.environ.update(VEMBED_CACHE=str(t / "file")), put(t, "a.jsonl", G))[2], big, n(1)), case("缓存：写不了的地方", lambda t: (os.environ.update(VEMBED_CACHE="/proc/none"), put(t, "a.jsonl", G))[1], big, n(1)), case("缓存：链接绕圈", lambda t: (link(t, "l", t / "l"), os.environ.update(VEMBED_CACHE=str(t / "l")), put(t, "a.jsonl", G))[2], big, n(1)),
    case("缓存：条目是垃圾", lambda t: junk(t, lambda p: p.write_bytes(b"junk")), big, n(2)), case("缓存：条目是断了的链接", lambda t: junk(t, lambda p: p.symlink_to(t / "无")), big, n(2)), case("缓存：条目是别人的", lambda t: junk(t, lambda p: pq.write_table(pa.table({"a": [1]}), p)), big, n(2)), case("缓存：条目是文件夹", lambda t: junk(t, lambda p: p.mkdir()), lambda x: message(lambda: big(x)) if message(lambda: big(x)) else big(x), lambda got: "arrow" in got or len(got) == 2),
    case("缓存：旧的点文件夹", lambda t: (folder(t, "cache/records/.old"), os.utime(t / "cache/records/.old", (1, 1)), put(t, "a.jsonl", G))[2], big, n(1)), case("缓存：上限写错", lambda t: (os.environ.update(VEMBED_CACHE_GB="abc"), put(t, "a.jsonl", G))[1], big, "VEMBED_CACHE_GB"), case("缓存：别人的文件", lambda t: (put(t, "cache/records/mine.parquet", bytes(5000)), os.utime(t / "cache/records/mine.parquet", (1, 1)), os.environ.update(VEMBED_CACHE_GB="0.000001"), put(t, "a.jsonl", G))[3], lambda x: (big(x), (x.parent / "cache/records/mine.parquet").exists())[1], lambda got: got),
    case("缓存：两个进程一起建", lambda t: put(t, "a.jsonl", jsonl(*({"query": f"q{i}", "positive": "b"} for i in range(3000)))), lambda x: together(x), lambda got: got == [3000] * 3),
    # 图片文件
    pic("空文件", b"", "空文件"), pic("全是零", bytes(5000), "不是能识别"), pic("SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"), pic("PDF", b"%PDF-1.7\n", "PDF"), pic("网页", b"<!DOCTYPE html><html>", "网页"), pic("LFS 指针", b"version https://git-lfs.github.com/spec/v1\n", "git lfs"), pic("JSON", b'{"error": 404}', "JSON"), pic("pickle", bomb, "不是能识别"), pic("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"), pic("zip", b"PK\3\4" + bytes(40), "压缩包"),
    pic("JPEG 切断", JPG[:-3000], "截断"), pic("JPEG 只有头", JPG[:20]), pic("PNG 切断", noise("PNG")[:4000], "解码失败"), pic("WebP 切断", noise("WEBP")[:200]), pic("GIF 切断", noise("GIF")[:300]), pic("TIFF 切断", noise("TIFF")[:300]), pic("炸弹", fake_png(60000, 60000), "大得不正常"), pic("太大", fake_png(12000, 9000), "上限"), pic("零乘零", fake_png(0, 0)), pic("负的尺寸", fake_png(2**32 - 1, 4)),
    pic("解压炸弹的文字块", PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))) + PNG[33:]), pic("扩展名不对", PNG, near(200, 30, 40), name="x.gif"), pic("扩展名大写", PNG, near(200, 30, 40), name="X.PnG"), pic("CMYK", picture("JPEG", "CMYK", color=(0, 0, 0, 0)), near(255, 255, 255)), pic("16 位", picture("PNG", "I;16", color=32896), near(128, 128, 128)), pic("浮点", picture("TIFF", "F", color=.5), "F"),
    pic("透明的地方是白的", picture("PNG", "RGBA", color=(0, 0, 0, 0)), near(255, 255, 255)), pic("调色板加透明", lambda t: transparent_palette(), near(255, 255, 255)), pic("灰度加透明", picture("PNG", "LA", color=(0, 0)), near(255, 255, 255)), pic("一位的图", picture("PNG", "1", color=1), near(255, 255, 255)), pic("动图用第一帧", lambda t: animated(), near(255, 0, 0), name="x.gif"), pic("EXIF 方向", lambda t: turned(), near(10, 200, 10)), pic("坏的 EXIF", picture("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(50)), near(200, 30, 40)),
    pic("TIFF 的页绕圈", lambda t: looped_tiff(), near(200, 30, 40), name="x.tif"), case("图：文件夹叫 x.jpg", lambda t: folder(t, "x.jpg"), image, "文件夹"), case("图：管道", lambda t: fifo(t, "x.jpg"), image, "管道"), case("图：设备", lambda t: ("zero", "/dev"), image, "设备"), case("图：根目录外面", lambda t: (put(t, "a.jpg", JPG), folder(t, "r"), ("../a.jpg", t / "r"))[2], image, "之外"), case("图：绝对路径", lambda t: ("/etc/hostname", t), image, "之外"),
    case("图：链接到外面", lambda t: (put(t, "a.jpg", JPG), folder(t, "r"), link(t, "r/b.jpg", t / "a.jpg"))[2], image, "之外"), case("图：链接的文件夹到外面", lambda t: (put(t, "o/a.jpg", JPG), folder(t, "r"), link(t, "r/o", t / "o"), ("o/a.jpg", t / "r"))[3], image, "之外"), case("图：链接绕圈", lambda t: link(t, "x.jpg", t / "x.jpg"), image, "x.jpg"), case("图：里面的链接可以", lambda t: (put(t, "a.png", PNG), link(t, "b.png", t / "a.png"))[1], image, near(200, 30, 40)),
    case("图：空字符", lambda t: ("a\0.jpg", t), image, "空字符"), case("图：半个字符", lambda t: ("\ud800.jpg", t), image, "图片"), case("图：名字只差写法", lambda t: (put(t, "e\u0301.jpg", JPG), ("\u00e9.jpg", t))[1], image, "不存在"), case("图：名字只差大小写", lambda t: (put(t, "a.JPG", JPG), ("a.jpg", t))[1], image, "不存在"), case("图：极长的名字", lambda t: ("长" * 300 + ".jpg", t), image, "打不开"), case("图：网址", lambda t: ("https://example.com/a.jpg", t), image, "网址"), case("图：data URI", lambda t: ("data:image/png;base64,AAAA", t), image, "网址"),
    case("图：根目录是文件", lambda t: ("a.jpg", put(t, "r", "")), image, "不存在"), case("图：None", lambda t: (None, t), image, "NoneType"), case("图：数组", lambda t: (np.zeros((2, 2, 3)), t), image, "ndarray"), case("图：内存里截断的", lambda t: Image.open(io.BytesIO(JPG[:-3000])), open_image, "截断"), case("图：关掉了的", lambda t: (lambda im: (im.close(), im)[1])(Image.open(put(t, "a.jpg", JPG))), open_image, "图"), case("图：side 是零", lambda t: put(t, "a.jpg", JPG), lambda x: open_image(x.name, x.parent, side=0), "side"),
    case("图片缓存：里面有别的东西", lambda t: put(t, "c/重要.txt", "x").parent, ImageCache, "重要.txt"), case("图片缓存：是一个文件", lambda t: put(t, "c", ""), ImageCache, "建不了"), case("图片缓存：上限是负的", lambda t: t / "c", lambda x: ImageCache(x, -1), "max_bytes"), case("图片缓存：条目坏了", lambda t: (put(t, "a.png", PNG), t)[1], lambda t: spoiled(t), near(200, 30, 40)), case("图片缓存：坏图", lambda t: put(t, "x.jpg", JPG[:-3000]), lambda x: ImageCache(x.parent / "c").open(x.name, x.parent), "截断"),
    # 体检和修复
    case("修复：坏行", lambda t: put(t, "a.jsonl", jsonl(*(q(i) for i in range(4)), "{坏", "[1]", {"query": "", "positive": "b"}, '{"query":"a","positive":NaN}')), fix, (lambda got: got == (8, 4, 4, 0, {"不合格": 4}, 4))), case("修复：坏图", lambda t: (album(t, 3), put(t, "坏.png", PNG[:40]), put(t, "a.jsonl", jsonl(pair(0), pair(1), {"query": "x", "positive": "坏.png"}, {"query": "y", "positive": "../a.png"}, {"query": "z", "positives": ["2.png", "无.png"]})))[2], fix, lambda got: got == (5, 3, 2, 1, {"坏图": 2}, 3)),
    case("修复：重复", lambda t: put(t, "a.jsonl", jsonl(q(1), q(2), q(1))), fix, lambda got: got == (3, 2, 1, 0, {"重复": 1}, 2)), case("修复：装着的坏图", lambda t: [q(1), {"query": "a", "positive_image": PNG}, {"query": "b", "positive_image": noise("PNG")[:4000]}], fix, lambda got: got == (3, 2, 1, 0, {"坏图": 1}, 2)), case("修复：几行编码坏了", lambda t: put(t, "a.jsonl", jsonl(q(1)).encode() + b'{"query":"\xff","positive":"b"}\n' + jsonl(q(2)).encode()), fix, lambda got: got[:3] == (3, 2, 1)),
    case("修复：CSV", lambda t: put(t, "a.csv", 'query,positive\n=1+1,b\n"c,d\n'), fix, lambda got: got[:3] == (2, 1, 1)), case("修复：全坏", lambda t: put(t, "a.jsonl", "{\n[\n"), fix, "2 行都不行"), case("修复：Parquet 里的 NaN", lambda t: parquet(t, query=["a", "b"], positive=["c", "d"], meta_p=[1., float("nan")]), fix, lambda got: got[:2] == (2, 2)), case("修复：1e999", lambda t: put(t, "a.jsonl", jsonl(q(1)) + '{"query":"a","positive":"b","meta_x":1e999}\n'), fix, lambda got: got[0] == got[1] + got[2]),
    case("修复：元组当键", lambda t: [q(1), {"query": "a", "positive": "b", (1, 2): 3}], fix, lambda got: got[:3] == (2, 1, 1)), case("修复：自己套自己", lambda t: (lambda d: (d.update(meta=d), [q(1), d])[1])(q(2)), fix, lambda got: got[0] == 2, bug="C22"), case("修复：说明里半个字符", lambda t: [q(1), {**q(2), "meta": "\ud800"}], fix, lambda got: got[0] == 2), case("修复：写在数据自己的文件夹里", lambda t: t, lambda t: overwritten(t), lambda got: got),
    case("体检：image_root 是数", lambda t: (put(t, "dataset.json", '{"image_root": 3}'), put(t, "a.jsonl", jsonl(q(1))))[1], lambda x: check(x).records, "dataset.json", "image_root"), case("体检：dataset.json 一万层", lambda t: (put(t, "dataset.json", DEEP), put(t, "a.jsonl", jsonl(q(1))))[1], lambda x: check(x).records, lambda got: got == 1), case("体检：dataset.json 是管道", lambda t: (fifo(t, "dataset.json"), put(t, "a.jsonl", jsonl(q(1))))[1], lambda x: check(x).records, lambda got: got == 1), case("体检：dataset.json 坏了", lambda t: (put(t, "dataset.json", b"\xff"), put(t, "a.jsonl", jsonl(q(1))))[1], lambda x: check(x).records, lambda got: got == 1),
    case("体检：管道", lambda t: fifo(t, "p.jsonl"), check, "管道"), case("体检：测试文件是坏的", lambda t: put(t, "a.jsonl", jsonl(q(1))), lambda x: check(x, against=put(x.parent, "t.jsonl", "{")), "t.jsonl 第 1 行"), case("去掉装着的坏图", lambda t: read_records([{"query": "a", "positive_image": JPG[:-3000]}, q(1)]), lambda r: [len(x) for x in drop_broken(r)], lambda got: got == [1, 1]),
    # 一张表
    case("一张表：坏图", lambda t: t, lambda t: table(t, {"text": "x", "image": "无.png"}, {"text": "y", "image": "../a.png"}, {"text": "z", "image": "a\0.png"})["broken"], lambda got: set(got) == {"无.png", "../a.png", "a\0.png"}), case("一张表：没有图片列", lambda t: t, lambda t: table(t, {"text": "x"}), "第 11 行", "image"), case("一张表：空白的描述", lambda t: t, lambda t: table(t, {"text": " ", "image": "1.png"}), "第 11 行", "text"), case("一张表：test 是 NaN", lambda t: t, lambda t: table(t, test=float("nan")), "test"), case("一张表：描述是列表", lambda t: t, lambda t: table(t, {"text": ["x"], "image": "1.png"}), "第 11 行"),
    case("一张表：没有分组的列", lambda t: t, lambda t: table(t, group="没有"), "没有"), case("一张表：名字里有制表符", lambda t: t, lambda t: tabbed(t), lambda got: got), case("一张表：覆盖自己", lambda t: t, lambda t: swallowed(t), lambda got: got),
    # 采样器
    case("批：零", lambda t: 0, lambda b: NoDuplicateBatches(some(), b), "batch_size"), case("批：布尔", lambda t: True, lambda b: NoDuplicateBatches(some(), b), "batch_size"), case("批：小数", lambda t: 1.5, lambda b: NoDuplicateBatches(some(), b), "batch_size"), case("批：太大", lambda t: 21, lambda b: NoDuplicateBatches(some(), b), "凑不出"), case("批：没有记录", lambda t: [], lambda r: NoDuplicateBatches(r, 2), "没有记录"), case("批：没有正例", lambda t: [Record(Item("a"), [])], lambda r: NoDuplicateBatches(r, 1), "没有正例"), case("批：dict", lambda t: [GOOD] * 4, lambda r: NoDuplicateBatches(r, 2), "dict"),
    case("批：没有组", lambda t: [as_record(GOOD)] * 4, lambda r: GroupedBatches(r, 2, 2), "group"), case("批：权重是 NaN", lambda t: NoDuplicateBatches(some(), 4), lambda s: MixedBatches({"a": s}, {"a": float("nan")}), "weights"), case("批：来源是列表", lambda t: NoDuplicateBatches(some(), 4), lambda s: MixedBatches([s]), "sources"), case("批：长度不够", lambda t: [1, 2], lambda x: LengthGroupedBatches(some(), 4, lengths=x), "一一对应"), case("批：长度是 NaN", lambda t: [float("nan")] * 20, lambda x: LengthGroupedBatches(some(), 4, lengths=x), "lengths"), case("批：长度是文字", lambda t: ["a"] * 20, lambda x: LengthGroupedBatches(some(), 4, lengths=x), "lengths"),
    case("续：空的", lambda t: {}, resume, "续不上"), case("续：不是 dict", lambda t: None, resume, "续"), case("续：批号太大", lambda t: {**STATE(), "batch": 99}, resume, "99"), case("续：批号是文字", lambda t: {**STATE(), "batch": "3"}, resume, "batch"), case("续：批号是小数", lambda t: {**STATE(), "batch": 1.5}, resume, "batch"), case("续：没有轮数", lambda t: {k: v for k, v in STATE().items() if k != "epoch"}, resume, "epoch"),
    # 公开数据集、分片、训练
    case("公开：没有这个名字", lambda t: t, lambda t: prepared(t, "flickr3ok"), "flickr30k"), case("公开：没有文件夹", lambda t: t / "无", lambda t: prepared(t, "flickr30k"), "无"), case("公开：空的文件夹", lambda t: folder(t, "e"), lambda t: prepared(t, "flickr30k"), "e"), case("公开：标注切断", lambda t: (put(t, "s/dataset_flickr30k.json", '{"images": ['), t / "s")[1], lambda t: prepared(t, "flickr30k"), "dataset_flickr30k.json"),
    case("分片：坏的 tar", lambda t: put(t, "a.tar", b"<html>" * 200), lambda x: shard(x), lambda got: got[0] == 0 and sum(got[1].values()) == 1), case("分片：切断", lambda t: put(t, "a.tar", tar()[:-9000]), lambda x: shard(x), lambda got: got[0] + sum(got[1].values()) >= 3 - 1 and got[1]), case("分片：设备和链接", lambda t: put(t, "a.tar", tar(odd=True)), lambda x: shard(x), lambda got: got[0] == 3 and got[1]["不是普通文件的成员"] == 2), case("分片：没有", lambda t: t, lambda x: shard(x), "tar"),
    case("编码器：截断的图", lambda t: [Item(image=Image.open(io.BytesIO(JPG[:-3000])))], lambda x: encoder().encode(x), "截断"), case("编码器：不见了的图", lambda t: [Item(image="无.png")], lambda x: encoder().encode(x, image_root="."), "无.png"),
]

# ---------------------------------------------------------------- 表里用到的小事


def q(i): return {"query": f"问题 {i}", "positive": f"回答 {i}"}
def pair(i): return {"query": f"第 {i} 张", "positive": f"{i}.png"}


def message(f):
    "抛出的 VembedError 的话；没有抛是空串。"
    try: f()
    except VembedError as e: return str(e)
    except Exception: pass
    return ""


def tight(x):
    "一行的上限调小，好用小文件试大数组。"
    old, read.MAX_LINE = read.MAX_LINE, 1 << 16
    try: return small(x)
    finally: read.MAX_LINE = old


def tight_rows(x):
    "留在内存里的上限调小：解压以后很大的，要走仓库。"
    old, read.SMALL = read.SMALL, 100_000
    try: return type(read_records(x).data)
    finally: read.SMALL = old


FLIPS = """
import random
raw = open(sys.argv[1], "rb").read()
want = list(Store.open(sys.argv[1]))
for k in range(60):
    b, r = bytearray(raw), random.Random(k)
    b[r.randrange(8, len(b) - 10)] ^= 1 << r.randrange(8)
    open(sys.argv[1] + "x", "wb").write(b)
    try: assert list(Store.open(sys.argv[1] + "x")) == want, k
    except VembedError: pass
print("好")
"""


def junk(t, make):
    "建好缓存，再把条目换成别的。"
    path = put(t, "a.jsonl", G * 2)
    big(path)
    entry = next((t / "cache/records").glob("*.arrow"))
    entry.unlink()
    make(entry)
    return path


def _count(x, gate, out):
    gate.wait()
    out.put(len(big(x)))


def together(x):
    "三个进程同时建同一份缓存。"
    ctx = multiprocessing.get_context("fork")
    gate, out = ctx.Event(), ctx.Queue()
    all_ = [ctx.Process(target=_count, args=(x, gate, out)) for _ in range(3)]
    for p in all_: p.start()
    gate.set()
    got = [out.get(timeout=15) for _ in all_]
    for p in all_: p.join(5)
    assert len(list((x.parent / "cache/records").iterdir())) == 1
    return got


def transparent_palette():
    im = Image.new("P", (24, 16), 0)
    im.putpalette([0, 0, 0] + [255, 0, 0] * 255)
    out = io.BytesIO()
    im.save(out, "PNG", transparency=0)
    return out.getvalue()


def animated():
    out = io.BytesIO()
    Image.new("RGB", (24, 16), (255, 0, 0)).save(out, "GIF", save_all=True, append_images=[Image.new("RGB", (24, 16), (0, 0, 255))] * 3)
    return out.getvalue()


def turned():
    "右边三分之二是绿的，方向 6：转正以后中间是绿的，而且是竖的。"
    im, exif, out = Image.new("RGB", (60, 30), (10, 200, 10)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    im.save(out, "JPEG", exif=exif, quality=95)
    assert open_image(Image.open(io.BytesIO(out.getvalue()))).size == (30, 60)
    return out.getvalue()


def looped_tiff():
    "一张图，下一页指回自己。"
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 40)).save(out, "TIFF")
    raw = bytearray(out.getvalue())
    at = struct.unpack_from("<I", raw, 4)[0]
    struct.pack_into("<I", raw, at + 2 + 12 * struct.unpack_from("<H", raw, at)[0], at)
    return bytes(raw)


def spoiled(t):
    "缓存条目改一个字节：等于没有。"
    cache = ImageCache(t / "c")
    cache.open("a.png", t, size=8)
    entry = next((t / "c").glob("??/*.pix"))
    raw = bytearray(entry.read_bytes())
    raw[-1] ^= 255
    entry.write_bytes(raw)
    return cache.open("a.png", t, size=8).getpixel((7, 7))


def overwritten(t):
    "--fix 写回数据自己的文件夹：拒绝，或者留着人家的图。"
    write_clean(put(t, "a.jsonl", jsonl(q(1))), t / "out", check(t / "a.jsonl"))
    source = put(album(folder(t, "out/图"), 1).parent, "b.jsonl", jsonl(pair(0)))
    r = check(source, t / "out/图")
    message(lambda: write_clean(source, t / "out", r, overwrite=True))
    return source.exists() and (t / "out/图/0.png").exists()


def swallowed(t):
    "表和图就在输出文件夹里：拒绝，或者留着。"
    out = album(folder(t, "out"))
    put(out, "table.json", "{}")
    source = put(out, "t.jsonl", jsonl(*goods()))
    message(lambda: from_table(source, out, overwrite=True))
    return source.exists() and (out / "0.png").exists()


def tabbed(t):
    "名字里有制表符和换行的图：拒绝、数下来，或者 qrels 仍是三列。"
    album(t)
    rows_ = [*goods()]
    for i, name in enumerate(("a\tb.png", "a\nb.png")): shutil.copy(t / f"{i}.png", t / name); rows_ += [{"text": f"{c}", "image": name, "g": f"{i}{c}"} for c in "甲乙丙"]
    try: from_table(put(t, "t.jsonl", jsonl(*rows_)), t / "set", image_root=str(t), test=.8, val=.05)
    except VembedError: return True
    return all(len(x.split("\t")) == 3 for x in (t / "set/qrels.tsv").read_text(encoding="utf-8").splitlines())


def prepared(t, name):
    from vembed_nb.data.public import prepare_set
    return prepare_set(name, t, t.parent / "prepared")


def tar(odd=False):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as f:
        def add(name, body): info = tarfile.TarInfo(name); info.size = len(body); f.addfile(info, io.BytesIO(body))
        if odd:
            for name, kind in (("链接.jpg", tarfile.SYMTYPE), ("设备.jpg", tarfile.CHRTYPE)): info = tarfile.TarInfo(name); info.type, info.linkname = kind, "/etc/hostname"; f.addfile(info)
        for i in range(3): add(f"../{i}.png", noise("PNG", 48)); add(f"../{i}.txt", f"第 {i} 张".encode())
    return out.getvalue()


def shard(x):
    "走一遍分片：(读到几条, 丢掉的)。"
    from vembed_nb.data.shards import Shards
    s = Shards(x)
    return len(list(s)), dict(s.dropped)


def encoder():
    from vembed_nb.models.load import load_encoder
    return load_encoder("tiny-clip")

# ---------------------------------------------------------------- 跑


class Stuck(BaseException): "不是 Exception：被测的代码接不住。"


@pytest.fixture(autouse=True)
def guarded(tmp_path, monkeypatch):
    "缓存在临时文件夹里；不上网；卡住就停。"
    monkeypatch.setenv("VEMBED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("VEMBED_CACHE_GB", "20")  # 有的情形会改它；这样结束时才还得回去
    monkeypatch.setattr(read.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(read, "_SAID", set())
    def never(*a, **k): raise AssertionError("要上网")
    monkeypatch.setattr(socket.socket, "connect", never)
    monkeypatch.setattr(socket, "getaddrinfo", never)
    def stop(*_): raise Stuck("卡住了")
    old = signal.signal(signal.SIGALRM, stop)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


HANGS = {"C1", "C6", "C7", "C26"}  # 还没修好的卡住，不必等久


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[pytest.mark.xfail(strict=True, reason=c.bug, raises=(Exception, Stuck, pytest.fail.Exception))] if c.bug else []) for c in CASES])
def test_bad_input(case, tmp_path):
    "一句话的错误、数得清的丢弃，或者对的值；不运行数据里的代码。"
    source = case.make(tmp_path)
    signal.setitimer(signal.ITIMER_REAL, 3 if case.bug in HANGS else 30)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if callable(case.want):
                got = case.door(source)
                assert case.want(got), got
            else:
                with pytest.raises(VembedError) as e: case.door(source)
                said = str(e.value)
                assert "\n" not in said and 5 < len(said) < 6000 and all(w in said for w in case.want), said
    finally: signal.setitimer(signal.ITIMER_REAL, 0)
    assert not (tmp_path / "MARK").exists(), "运行了数据里的代码"


def test_table_is_long_enough():
    "至少 150 种，名字不重。"
    names = [c.name for c in CASES]
    assert len(names) >= 150 and len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)


def test_bomb_would_go_off(tmp_path):
    "埋下的 pickle 真的会留下记号，否则上面什么也没有查。"
    pickle.loads(bomb(tmp_path)).close()
    assert (tmp_path / "MARK").exists()
