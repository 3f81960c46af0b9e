"""检索台：先是纯的逻辑，再走 API，最后在真的无头 Chromium 里点。

截图默认放在临时文件夹；设 VEMBED_SHOTS=文件夹 就留下来看。
"""
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data.read import read_records
from vembed_nb.data.tasks import Item
from vembed_nb.evaluate.metrics import read_qrels
from vembed_nb.models.load import load_encoder
from vembed_nb.search.searcher import Hits, Searcher, build_index
from vembed_nb.ship import app as A

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "${value}", "{{value}}", "一句\n两行\t的话", "很长" * 400, "$\\frac{1$"]


# ---------- 共用 ----------

@pytest.fixture(scope="module")
def shop(toyshop):
    corpus = A.shop_corpus(toyshop)
    sides = {name: Searcher(build_index(e := load_encoder(name), corpus, toyshop), e) for name in ("tiny-clip", "tiny-qwen3vl")}
    return A.Shelves(sides, "玩具店", A.shop_examples(toyshop), read_records(toyshop / "test.jsonl"))


@pytest.fixture(scope="module")
def paper(tmp_path_factory): return A.demo_pages(tmp_path_factory.mktemp("pages") / "pages", lambda text: None, 10)


@pytest.fixture
def answer(shop): return A.ask(shop, A.read_query("蓝色的杯子"), 6)


@pytest.fixture
def labels(tmp_path): return A.Labels(tmp_path / "labels.jsonl")


def hits(ids, scores=None, metas=None, root=""): return Hits(Item("查询"), list(ids), scores or [1 - .1 * r for r in range(len(ids))], metas or [{} for _ in ids], root)


def two(before, after, k=3, known=()): return A.Answer(Item("查询"), k, {"前": hits(before), "后": hits(after)}, 50, "q1", tuple(known))


def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory):
    "不能当查询的文件 → 那句话里要有的词。"
    d = tmp_path_factory.mktemp("bad")
    Image.new("RGB", (300, 200), "red").save(d / "ok.png")
    ok = (d / "ok.png").read_bytes()
    files = {"pdf.jpg": (b"%PDF-1.7 hello" * 20, "PDF"), "empty.png": (b"", "空文件"), "cut.png": (ok[:300], "截断"), "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>', "SVG"),
             "html.jpg": (b"<!doctype html><html>", "网页"), "text.png": ("不是图片".encode() * 9, "不是能识别的图片"),
             "bomb.png": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b""), "炸弹"),
             "wide.png": (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 6000, 6000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b""), "上限"),
             "big.png": (ok + b"\0" * A.MAX_UPLOAD, "MB")}
    for name, (data, _) in files.items(): (d / name).write_bytes(data)
    return d, {name: word for name, (_, word) in files.items()}


# ---------- 读懂一个问题 ----------

def test_import_does_not_load_gradio():
    code = "import sys, vembed_nb.ship.app; print('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "False"


def test_query(bad_files, toyshop):
    folder, words = bad_files
    assert A.read_query("  红 ") == Item("红")
    both = A.read_query("换成红色", str(folder / "ok.png"))
    assert both.kind == "both" and both.image.size == (300, 200) and A.read_query(None, str(folder / "ok.png")).kind == "image"
    assert max(A.read_query("", Image.new("RGB", (4000, 2000))).image.size) == 768
    for name, word in words.items():
        with pytest.raises(VembedError, match=word): A.read_query("", str(folder / name))
    for bad in ("", "   ", None, "字" * 2001, 3, ["a"]):
        with pytest.raises(VembedError): A.read_query(bad)
    with pytest.raises(VembedError, match="已经不在了"): A.read_query("", str(folder / "没有.png"))


def test_k():
    assert A.read_k("5") == 5 and A.read_k(8.0) == 8
    for bad in (0, -1, 49, 1e12, "abc", None, 2.5, float("nan"), float("inf"), [], "９" * 5000):
        with pytest.raises(VembedError, match="要看几个"): A.read_k(bad)


def test_facets():
    metas = [{"类": "杯子" if i % 2 else "伞", "价": i, "件": i % 3 + 1, "货": bool(i % 2), "题": f"第 {i} 件", "图": {"a": 1}, "签": ["甲", "乙"] if i % 2 else ["甲"], "image": "x.png"} for i in range(40)]
    f = {x["key"]: x for x in A.facets(metas)}
    assert set(f) == {"类", "价", "件", "货", "签"} and f["价"] == {"key": "价", "kind": "range", "low": 0, "high": 39}
    assert dict(f["件"]["options"]) == {1: 14, 2: 13, 3: 13} and dict(f["签"]["options"]) == {"甲": 40, "乙": 20} and dict(f["货"]["options"]) == {True: 20, False: 20}
    assert A.facets([]) == [] and A.facets([{"同": "一样"}] * 9) == [] and A.facets([{"坏": float("nan")}] * 9) == []


def test_where():
    found = [{"key": "类", "kind": "choice", "options": [("杯子", 3), (2, 1)]}, {"key": "价", "kind": "range", "low": 0, "high": 9}]
    assert A.make_where(found, [None, None]) is None and A.make_where(found, [[], (None, "")]) is None
    assert A.make_where(found, [["2"], ("1", 8.5)]) == {"类": [2], "价": {">=": 1, "<=": 8.5}}
    assert A.make_where(found, [["杯子"], None], '{"货": true}') == {"类": ["杯子"], "货": True}
    for chosen, more in (([["船"], None], ""), (["杯子", None], ""), ([None, (9, 1)], ""), ([None, ("x", None)], ""), ([None, (float("inf"), None)], ""), ([None, None], "{坏"), ([None, None], "[1]"), ([None, None], "[" * 1999), ([None, None], "[" * 9999), ([None, None], {"a": 1}), ([None, None], '{"a": {"~": 1}}'), ([None, None], '{"a": null}')):
        with pytest.raises(VembedError): A.make_where(found, chosen, more)


def test_filter_is_exact(shop):
    colours = [v for f in shop.facets if f["key"] == "颜色" for v, _ in f["options"]][:2]
    where = A.make_where(shop.facets, [colours if f["key"] == "颜色" else None for f in shop.facets])
    got = A.ask(shop, Item("杯子"), 20, where)
    expect = {i for i, m in shop.rows["tiny-clip"].items() if m["颜色"] in colours}
    assert all(set(h.ids) == expect for h in got.hits.values()) and 0 < len(expect) < 40


# ---------- 名次的变化 ----------

def test_moves():
    assert A.moves("abc", "cadb") == [2, -1, None, -2] and A.moves("", "ab") == [None, None] and A.moves("ab", "ab") == [0, 0]
    assert [A.arrow(m) for m in (3, -5, 0, None)] == ["↑3", "↓5", "＝", "新"]
    assert "完全相同" in A.sentence(two("abcd", "abcx"))
    text = A.sentence(two("abcde", "xeab", 4))
    assert "1 个升" in text and "2 个降" in text and "1 个是新的" in text and "第 5 名 → 第 2 名" in text
    assert "已知的 2 个正例，前的前 3 名里有 1 个（最靠前的第 1 名），后的前 50 名里没有。" in A.sentence(two("abc", "xyz", 3, ("a", "q")))
    assert "没有符合筛选条件的" in A.sentence(two("", ""))
    assert "没有" in A.cards_html(two("", ""))
    assert A.cards_html(two("ab", "bc", 2)).count("vm-card") == 4 + 2  # 两栏


def test_known_positives_use_their_query_id(shop):
    text, record = next(iter(shop.records.items()))
    got = A.ask(shop, A.read_query(text))
    assert got.key == record.query_id and got.known == tuple(record.positive_ids)
    assert A.ask(shop, A.read_query("没见过的话")).key.startswith("q") and A.query_key(Item("a")) != A.query_key(Item("b"))
    im = Image.new("RGB", (9, 9), "red")
    assert A.query_key(Item("a", im)) == A.query_key(Item("a", im.copy())) != A.query_key(Item("a"))


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_escapes_into_the_page(text, shop, tmp_path):
    h = hits(["a", text], metas=[{"标题": text, text: text, "text": text}, {"image": text}], root=str(tmp_path))
    got = A.Answer(Item(text), 2, {text: h, "后": h}, 50, "q")
    row = {"key": "k", "query_id": "q", "id": text, "query": text, "grade": 1, "time": text, "document": {"image": text}}
    book = A.Labels(tmp_path / "l.jsonl")
    book.append(row)
    for page in (A.cards_html(got, {}, (0, 0)), A.detail_html(got, (0, 0)), A.detail_html(got, (1, 1)), A.table_html(book, [str(tmp_path)]), A.message(text), A.heat_html(np.ones((1, 2, 2)), [text], Image.new("RGB", (9, 9)))):
        assert "<script" not in page and "onerror=alert(1)>" not in page.replace("&gt;", "") and "<img src=x" not in page


def test_pictures_outside_the_root_are_not_opened(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (9, 9), "red").save(tmp_path / "secret.png")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "secret.png")
    for path in ("../secret.png", str(tmp_path / "secret.png"), "link.png", "没有.png"):
        page = A.picture_html("a", {"image": path}, tmp_path / "in")
        assert "<img" not in page and "打不开" in page


def test_thumbnails_are_remembered_until_the_file_changes(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png"); os.utime(tmp_path / "a.png", (1, 1))
    first = A.thumbnail("a.png", tmp_path)
    assert A.thumbnail("a.png", tmp_path) is first
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png"); os.utime(tmp_path / "a.png", (2, 2))
    assert A.thumbnail("a.png", tmp_path) != first
    (tmp_path / "a.png").unlink()
    with pytest.raises(VembedError): A.thumbnail("a.png", tmp_path)


def test_shelves(shop, toyshop, tmp_path):
    with pytest.raises(VembedError, match="一个或两个"): A.Shelves({n: next(iter(shop.sides.values())) for n in "abc"})
    with pytest.raises(VembedError, match="Searcher"): A.Shelves({"a": 3})
    ids, items, metas = A.shop_corpus(toyshop)
    other = Searcher(build_index(e := load_encoder("tiny-clip"), ([f"x{i}" for i in ids], items, metas), toyshop), e)
    with pytest.raises(VembedError, match="相同"): A.Shelves({"a": next(iter(shop.sides.values())), "b": other})
    assert len(shop) == 40 and {f["key"] for f in shop.facets} >= {"种类", "颜色", "价格"}
    kinds = {Item(t or None, p or None).kind for t, p in shop.examples}
    assert kinds == {"text", "image", "both"}


def test_documents_that_are_text(labels, tmp_path):
    "图库里是文字：卡片上是字，热图说没有图，导出的是文字。"
    encoder = load_encoder("tiny-clip")
    texts = [f"{c}的{k}" for c in ("红色", "蓝色", "黄色") for k in ("杯子", "帽子")]
    shelves = A.Shelves(Searcher(build_index(encoder, (texts, [Item(t) for t in texts], [{}] * 6)), encoder))
    answer = A.ask(shelves, Item("红色的杯子"), 3)
    page = A.cards_html(answer)
    assert answer.hits["结果"].ids[0] == "红色的杯子" and page.count("vm-text") == 3 and "<img" not in page
    assert "没有图" in A.Desk(shelves).heat(answer, (0, 0), lambda t: t) and "vm-star" in A.map_html(shelves, "结果", answer)
    labels.mark(answer, "结果", 0, 1); labels.mark(answer, "结果", 1, 0)
    record = read_records(A.export_labels(labels, tmp_path, [shelves])[1])[0]
    assert [p.text for p in record.positives] == ["红色的杯子"] and record.negatives[0].text == answer.hits["结果"].ids[1]


def test_an_index_far_away(toyshop, tmp_path):
    "Milvus 的不列出来：没有筛选和地图，搜索和「更多条件」照常。"
    pytest.importorskip("milvus_lite", reason="没有装 milvus-lite")
    encoder = load_encoder("tiny-clip")
    with build_index(encoder, A.shop_corpus(toyshop), toyshop, kind=f"milvus:{tmp_path / 'm.db'}") as index:
        shelves = A.Shelves(Searcher(index, encoder, str(toyshop)))
        answer = A.ask(shelves, Item("红色的杯子"), 3, A.make_where([], [], '{"价格": {"<": 200}}'))
        assert shelves.facets == [] and len(shelves) == 40 and all(m["价格"] < 200 for m in answer.hits["结果"].metas) and A.cards_html(answer).count("<img") == 3
        with pytest.raises(VembedError, match="本机"): A.map_html(shelves, "结果", answer)


# ---------- 改标注 ----------

def test_labels_round_trip(shop, answer, labels, toyshop):
    assert labels.state() == {} and not labels.path.exists()  # 没标之前不建文件
    h = answer.hits["tiny-clip"]
    for r, g in ((0, 1), (1, 0), (2, 1), (2, 0)): labels.mark(answer, "tiny-clip", r, g, "甲")
    again = A.Labels(labels.path)  # 重新打开
    assert again.marks_of(answer.key) == {h.ids[0]: 1, h.ids[1]: 0, h.ids[2]: 0}
    row = json.loads(labels.path.read_text().splitlines()[0])
    assert {"query", "query_id", "id", "grade", "model", "time", "who"} <= set(row)
    assert again.undo("甲")["id"] == h.ids[2] and again.marks_of(answer.key)[h.ids[2]] == 1
    assert again.undo("甲") and again.undo("甲") and again.undo("甲") and again.marks_of(answer.key) == {}
    with pytest.raises(VembedError, match="没有可以撤销"): again.undo("甲")


def test_undo_is_mine(answer, labels):
    labels.mark(answer, "tiny-clip", 0, 1, "甲"); labels.mark(answer, "tiny-clip", 1, 1, "乙")
    labels.undo("甲")
    assert labels.marks_of(answer.key) == {answer.hits["tiny-clip"].ids[1]: 1}


def test_labels_survive_a_torn_line(answer, labels):
    labels.mark(answer, "tiny-clip", 0, 1)
    whole = labels.path.read_bytes()
    for cut in range(len(whole)):
        labels.path.write_bytes(whole + whole[:cut])
        A.Labels(labels.path).mark(answer, "tiny-clip", 1, 0)
        got = A.Labels(labels.path).marks_of(answer.key)
        assert got == {answer.hits["tiny-clip"].ids[0]: 1, answer.hits["tiny-clip"].ids[1]: 0}, cut
    labels.path.write_bytes(b'\xff\xfe\n[1]\n"x"\n{"key": 3}\n{"key": "k", "grade": 7, "query_id": "q", "id": "d"}\n{"undo": "nothing"}\n' + whole)
    assert A.Labels(labels.path).marks_of(answer.key) == {answer.hits["tiny-clip"].ids[0]: 1}
    assert "读不懂" in A.table_html(A.Labels(labels.path))


def test_labels_from_many_threads_and_processes(answer, labels, tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom vembed_nb.ship.app import Labels\nb = Labels({str(labels.path)!r})\nfor i in range(40): b.append({{'key': f'p{{i}}', 'query_id': 'q', 'id': f'p{{i}}', 'grade': 1}})"
    child = subprocess.Popen([sys.executable, "-c", code])
    def work(t):
        for i in range(20): labels.append({"key": f"{t}-{i}", "query_id": "q", "id": f"{t}-{i}", "grade": 0})
    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert child.wait(60) == 0
    assert len(A.Labels(labels.path).state()) == 120 and A.Labels(labels.path).lines()[1] == 0


def test_labels_cannot_be_written(answer, tmp_path):
    with pytest.raises(VembedError, match="文件夹"): A.Labels(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(VembedError, match="写不进"): A.Labels(tmp_path / "file" / "labels.jsonl").mark(answer, "tiny-clip", 0, 1)
    with pytest.raises(VembedError, match="相关"): A.Labels(tmp_path / "l.jsonl").mark(answer, "tiny-clip", 0, 2)


def test_export(shop, labels, tmp_path, toyshop):
    with pytest.raises(VembedError, match="还没有标注"): A.export_labels(labels, tmp_path)
    record = next(r for r in shop.records.values() if len(r.positive_ids) >= 2)
    answer = A.ask(shop, A.read_query(record.query.text), 40)
    name, h = "tiny-clip", answer.hits["tiny-clip"]
    wrong, new = h.ids.index(record.positive_ids[0]), next(r for r, i in enumerate(h.ids) if i not in record.positive_ids)
    labels.mark(answer, name, wrong, 0); labels.mark(answer, name, new, 1)
    lonely = A.ask(shop, A.read_query("只有坏的"), 3)
    labels.mark(lonely, name, 0, 0)
    picture = A.ask(shop, A.read_query("换成红色", Image.new("RGB", (64, 64), "blue")), 3)
    labels.mark(picture, name, 2, 1)
    qrels, train, left = A.export_labels(labels, tmp_path, [shop])
    grades = read_qrels(qrels)
    assert left == 1 and grades[record.query_id] == {**{i: 1 for i in record.positive_ids}, h.ids[wrong]: 0, h.ids[new]: 1} and grades[lonely.key] == {lonely.hits[name].ids[0]: 0}
    rows = {r.query_id: r for r in read_records(train)}
    assert set(rows) == {record.query_id, picture.key}
    assert set(rows[record.query_id].positive_ids) == {*record.positive_ids[1:], h.ids[new]} and rows[record.query_id].negative_ids == [h.ids[wrong]]
    assert rows[picture.key].query.kind == "both" and rows[picture.key].query.image.size == (64, 64)
    for r in rows.values(): assert all((toyshop / p.image).is_file() for p in r.positives)


# ---------- 热图与地图 ----------

def test_token_maps(paper, shop):
    from vembed_nb.predict import Predictor

    side = paper.sides["tiny-colqwen2"]
    answer = A.ask(paper, A.read_query(paper.examples[0][0]), 2)
    picture = answer.hits["tiny-colqwen2"].metas[0]["image"]
    maps, words = A.token_maps(side.encoder, answer.query.text, picture, side.image_root)
    heat, same = Predictor(side.encoder, image_root=side.image_root).heat(answer.query.text, picture)
    assert words == same and np.allclose(maps.mean(0), heat, atol=1e-5) and len(maps) == len(words)
    page = A.heat_html(maps, words, picture, side.image_root)
    assert page.count("vm-layer") == len(words) + 1 and page.count("checked>") == 1
    with pytest.raises(VembedError, match="一个向量"): A.token_maps(shop.sides["tiny-clip"].encoder, "杯子", picture, side.image_root)
    desk, note = A.Desk(shop), lambda t: t
    assert "一个向量" in desk.heat(A.ask(shop, Item("杯子"), 2), (0, 0), note)
    assert "没有字" in desk.heat(A.ask(shop, Item(image=Image.new("RGB", (9, 9))), 2), (0, 0), note)


def test_layer_is_small_and_its_peak_is_opaque():
    import base64, io

    s = np.zeros((20, 14)); s[3, 4] = 1
    data = base64.b64decode(A.layer(s, 0, 1).split(",")[1])
    im = Image.open(io.BytesIO(data))
    assert len(data) < 400 and im.size == (14, 20) and im.getpixel((4, 3))[3] == 190 and im.getpixel((0, 0))[3] == 0


def test_map(shop, paper, answer):
    m, page = A.side_map(shop, "tiny-clip")
    assert A.side_map(shop, "tiny-clip")[1] is page and len(m) == 40
    placed = A.map_html(shop, "tiny-clip", answer)
    assert placed.count('class="vm-ring"') == 6 and placed.count('class="vm-star"') == 1 and "vm-star" not in page
    h = answer.hits["tiny-clip"]
    spot = m.points()[m.ids.index(h.ids[0])]
    assert f'left:{3 + 94 * spot["x"]:.1f}%;top:{97 - 94 * spot["y"]:.1f}%' in placed.split("vm-star")[0]  # 圈正好在那个点上
    late = A.ask(paper, A.read_query(paper.examples[0][0]), 2)
    assert A.map_html(paper, "tiny-colqwen2", late).count("vm-ring") == 2
    few = A.Shelves(shop.sides["tiny-clip"]); few.rows["结果"] = {}
    with pytest.raises(VembedError, match="至少"): A.side_map(few, "结果")


def test_guarded_never_raises(capfd):
    def broken(): raise RuntimeError("秘密的路径 /etc/x")
    def wrong(): raise VembedError("<b>一句话</b>")
    said = A.guarded(broken, 3)()
    assert "RuntimeError" in said[0] and "秘密" not in said[0] and len(said) == 3 and "秘密" in capfd.readouterr().err
    assert "&lt;b&gt;一句话" in A.guarded(wrong, 2)()[0]


# ---------- 打开索引 ----------

@pytest.fixture(scope="module")
def two_indexes(toyshop, tmp_path_factory):
    from vembed_nb.tiny import tiny_path

    out = tmp_path_factory.mktemp("two")
    for name in ("tiny-clip", "tiny-siglip"): build_index(load_encoder(name), A.shop_corpus(toyshop), toyshop, str(tiny_path(name)), out / name)
    return out


def test_open_shelves(two_indexes, toyshop):
    from vembed_nb.tiny import tiny_path

    quiet = lambda text: None
    one = A.open_shelves(two_indexes / "tiny-clip", say=quiet)
    pair = A.open_shelves([two_indexes / "tiny-clip", two_indexes / "tiny-siglip"], say=quiet)
    twin = A.open_shelves([two_indexes / "tiny-clip"], compare=str(two_indexes / "tiny-siglip"), say=quiet)
    coded = A.open_shelves([two_indexes / "tiny-clip"], compare="tiny-siglip", data=toyshop / "test.jsonl", say=quiet)
    assert list(one.sides) == ["tiny-clip"] and list(pair.sides) == list(twin.sides) == list(coded.sides) == ["tiny-clip", "tiny-siglip"] and coded.records
    a, b = (A.ask(x, Item("红色的杯子"), 5).hits["tiny-siglip"] for x in (pair, coded))
    assert a.ids == b.ids and a.metas[0]["种类"] == b.metas[0]["种类"]
    same = A.open_shelves([two_indexes / "tiny-clip"] * 2, say=quiet)
    assert list(same.sides) == ["tiny-clip（前）", "tiny-clip（后）"] and "完全相同" in A.sentence(A.ask(same, Item("伞"), 5))
    for folder, options, name in (("late", {}, "tiny-colqwen2"), ("small", {"precision": "binary"}, "tiny-clip")):  # 多向量的、压缩的
        build_index(load_encoder(name), A.shop_corpus(toyshop), toyshop, str(tiny_path(name)), two_indexes / folder, **options)
        other = A.open_shelves([two_indexes / "tiny-clip", two_indexes / folder], say=quiet)
        got = A.ask(other, Item("红色的杯子"), 5, {"价格": {"<": 200}})
        assert all(len(h) >= 5 and all(m["价格"] < 200 for m in h.metas) for h in got.hits.values()) and A.map_html(other, folder, got).count("vm-ring") == 5
    for bad in (dict(indexes=[]), dict(indexes=["没有"]), dict(indexes=[two_indexes / "tiny-clip"] * 3), dict(indexes=[two_indexes / "tiny-clip"] * 2, compare="tiny-siglip"), dict(indexes=[two_indexes / "tiny-clip"], compare="没有这个模型"), dict(indexes=[two_indexes / "tiny-clip"], model="tiny-siglip")):
        with pytest.raises(VembedError): A.open_shelves(**bad, say=quiet)


def test_reranker(shop, toyshop):
    from vembed_nb.models.load import load_reranker

    base = shop.sides["tiny-clip"]
    shelves = A.Shelves({"前": base, "后": Searcher(base.index, base.encoder, base.image_root, load_reranker("tiny-reranker"))})
    plain, again = A.ask(shelves, Item("红色的杯子"), 4), A.ask(shelves, Item("红色的杯子"), 4, rerank=True)
    assert plain.hits["前"].ids == plain.hits["后"].ids == again.hits["前"].ids and set(again.hits["后"].ids) == set(plain.hits["后"].ids)
    assert "重排" in A.stages_line(again.hits["后"]) and "重排" not in A.stages_line(again.hits["前"])


# ---------- 走 HTTP ----------

@pytest.fixture(scope="module")
def site(shop, paper, tmp_path_factory):
    "开着的检索台：两个图库。"
    folder, called, connect, patch = tmp_path_factory.mktemp("site"), set(), socket.socket.connect, pytest.MonkeyPatch()
    def spy(self, address):
        if isinstance(address, tuple): called.add(address[0])
        return connect(self, address)
    patch.setattr(socket.socket, "connect", spy)
    with A.launch_app([shop, paper], folder / "labels.jsonl", port=0, inline=False, say=lambda text: None) as app:
        app.labels = folder / "labels.jsonl"
        yield app
    patch.undo()
    assert called <= {"127.0.0.1", "localhost", "::1"}, called  # 服务自己也不出门
    with pytest.raises(httpx.ConnectError): httpx.get(app.url, timeout=2)  # 关得掉


def blank(shelves): return [[] if f["kind"] == "choice" else "" for f in shelves.facets for _ in range(1 + (f["kind"] == "range"))]


@pytest.fixture
def press(site, shop):
    from gradio_client import Client

    client = Client(site.url, verbose=False, analytics_enabled=False)
    return lambda text="", picture=None, k=4, more="", fields=None: client.predict(text, picture, k, False, more, *(fields or blank(shop)), api_name="/search")


def test_api(press, shop, bad_files):
    from gradio_client import handle_file

    folder, words = bad_files
    assert press("红色的杯子")[-1].count("data-pick") == 8
    assert press("", handle_file(str(folder / "ok.png")))[-1].count("data-pick") == 8 == press("换成蓝色", handle_file(str(folder / "ok.png")))[-1].count("data-pick")
    for name, word in words.items():
        if name != "big.png": assert word in press("", handle_file(str(folder / name)))[0]
    for kw, word in ((dict(), "还没有查询"), (dict(text="字" * 3000), "最多"), (dict(text="杯", k=0), "要看几个"), (dict(text="杯", k="abc"), "要看几个"), (dict(text="杯", k=10**9), "要看几个"), (dict(text="杯", more="{"), "JSON"),
                     (dict(text="杯", more='{"没有": 1}'), "没有"), (dict(text="杯", more='{"价格": {"DROP": 1}}'), "比较号"), (dict(text=["杯"]), "文字"), (dict(text="杯", fields=["船", *blank(shop)[1:]]), "筛选"), (dict(text="杯", fields=[["船"], *blank(shop)[1:]]), "筛选")):
        said = press(**kw)[0]
        assert word in said and 'class="vm-error"' in said and said.count("。") <= 1 and "Traceback" not in said, kw


def test_only_what_is_needed_is_served(site, toyshop, shop):
    "别的文件拿不到：系统的、仓库的、图片根目录的、标注的。"
    site.labels.touch()
    for path in ("/etc/passwd", ROOT / "README.md", "README.md", "../README.md", toyshop / "images" / "000" / "000000.jpg", site.labels, A.font_path(), "/proc/self/environ"):
        for route in ("/gradio_api/file=", "/file=", "/vembed/", "/static/", "/gradio_api/file/"):
            got = httpx.get(f"{site.url.rstrip('/')}{route}{path}")
            assert got.status_code >= 400, (route, path, got.status_code)
    font = httpx.get(f"{site.url}vembed/font.otf")
    assert font.status_code == 200 and len(font.content) == A.font_path().stat().st_size
    for path in ("/etc/passwd", str(toyshop / "images" / "000" / "000000.jpg"), "http://127.0.0.1:9/x.png", "../../x.png"):  # 客户端自己说文件在哪里：不信
        event = httpx.post(f"{site.url}gradio_api/call/search", json={"data": ["", {"path": path, "meta": {"_type": "gradio.FileData"}}, 4, False, "", *blank(shop)]}).json()["event_id"]
        said = httpx.get(f"{site.url}gradio_api/call/search/{event}", timeout=20).text
        assert "event: error" in said and "data-pick" not in said and "root:" not in said, said
    assert httpx.post(f"{site.url}gradio_api/upload", files={"files": ("big.png", b"\0" * (A.MAX_UPLOAD + 9))}).status_code == 413


def test_many_at_once(site, shop):
    "八个人一起搜，各得各的。"
    from gradio_client import Client

    texts, got = [f"{c}{n}" for c in ("红色的", "蓝色的", "条纹的", "木头") for n in ("杯子", "椅子")], {}
    def work(text):
        client = Client(site.url, verbose=False, analytics_enabled=False)
        got[text] = [client.predict(text, None, 3, False, "", *blank(shop), api_name="/search")[-1] for _ in range(2)]
    threads = [threading.Thread(target=work, args=(t,)) for t in texts]
    for t in threads: t.start()
    for t in threads: t.join()
    for text in texts:
        names = [A.title_of(i, m) for h in A.ask(shop, Item(text), 3).hits.values() for i, m in zip(h.ids[:3], h.metas)]
        for page in got[text]: assert [page.index(f'alt="{n}"') for n in names[:3]] and all(f'alt="{n}"' in page for n in names)


def test_port_taken_and_no_gradio(site, shop, monkeypatch):
    port = int(site.url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(VembedError, match="换一个端口"): A.launch_app(shop, "", port=port, inline=False, say=lambda text: None)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(VembedError, match="pip install gradio"): A.launch_app(shop, "", port=0)


def test_inline_in_a_notebook(shop, monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    with A.launch_app(shop, "", port=0, inline=True, say=lambda text: None) as app: assert f'src="{app.url}"' in shown[0].data


def test_demo(tmp_path, monkeypatch):
    "离线的例子：没有 quickstart 时画一个，说出怎样得到微调过的；有就用它的。"
    said = []
    shelves, note = A.demo(tmp_path / "demo", tmp_path / "没有", pages=False, say=said.append)
    assert len(shelves) == 1 and len(shelves[0]) == 300 and "vembed quickstart" in note and "vembed quickstart" in " ".join(said)
    assert len(A.ask(shelves[0], Item("红色的杯子"), 5).hits) == 2
    quick = tmp_path / "quick"
    shutil.copytree(tmp_path / "demo" / "shop", quick / "data")
    best = load_encoder("tiny-siglip"); best.save(quick / "checkpoint-9")
    (quick / "report.json").write_text(json.dumps({"model": "tiny-clip"})); (quick / "checkpoint.json").write_text(json.dumps({"best": "checkpoint-9"}))
    again, note = A.demo(tmp_path / "demo", quick, pages=False, say=said.append)
    assert list(again[0].sides) == ["微调前", "微调后"] and "quick" in note and again[0].sides["微调后"].encoder.card.model_type == "siglip"


# ---------- 真的浏览器 ----------

CHROME = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)


@pytest.fixture(scope="module")
def chrome():
    if not CHROME: pytest.skip("没有 Chromium，不测网页")
    api = pytest.importorskip("playwright.sync_api", reason="没有装 playwright，不测网页")
    with api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROME, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    folder = Path(os.environ.get("VEMBED_SHOTS") or tmp_path_factory.mktemp("shots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def visit(chrome, site):
    "打开一页；结束时检查：只问过本机，没有脚本错误。"
    contexts, asked, wrong = [], [], []

    def go(width=1280, height=900, query="", ready=".vm-card", **kw):
        contexts.append(context := chrome.new_context(viewport={"width": width, "height": height}, locale="zh-CN", **kw))
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("request", lambda r: asked.append(r.url)); page.on("pageerror", lambda e: wrong.append(str(e))); page.on("dialog", lambda d: (wrong.append(d.message), d.dismiss()))
        page.goto(site.url + query)
        page.wait_for_selector(ready)
        return page

    yield go
    for c in contexts: c.close()
    out = [u for u in asked if not u.startswith((site.url, "data:", "blob:"))]
    assert not out and not wrong, (out, wrong)


SAID = "want => document.querySelector('.vm-say')?.innerText == want"  # 新的结果到了


def search(page, text=None, upload=None):
    "填好，按「搜索」，等新的结果。"
    if text is not None: page.locator(".vm-query textarea:visible").fill(text)
    if upload:
        page.locator("input[type=file]").first.set_input_files(str(upload))
        page.wait_for_selector('[data-testid="image"] img, .image-frame img, img[alt="Uploaded"], button[aria-label="Remove Image"], button[aria-label="Clear"]')
    with page.expect_response(lambda r: "queue/data" in r.url): page.locator(".vm-go:visible").click()


def says(page): return page.locator(".vm-say:visible").inner_text()


def test_page_search_and_compare(visit, shots, shop):
    page = visit()
    assert page.locator(".vm-query textarea:visible").input_value() in [t for t, _ in shop.examples]  # 一进门已经搜好一个例题
    search(page, "红色的椅子")
    page.wait_for_function(SAID, arg=A.sentence(A.ask(shop, Item("红色的椅子"), 8)))
    assert page.locator(".vm-card").count() == 16
    assert all(page.locator(".vm-card img").evaluate_all("all => all.map(i => i.naturalWidth > 0)"))
    h = list(A.ask(shop, Item("红色的椅子"), 8).hits.values())
    moves = [A.arrow(m) for m in A.moves(h[0].ids, h[1].ids[:8])]
    assert page.locator(".vm-side").nth(1).locator(".vm-move").all_inner_texts() == moves
    shown = [float(t) for t in page.locator(".vm-side").nth(0).locator(".vm-card small").all_inner_texts()]
    assert np.allclose(shown, h[0].scores[:8], atol=6e-4)
    page.locator(".vm-card").nth(10).click()
    page.wait_for_selector(".vm-card.vm-on[data-pick='1,2']")
    page.wait_for_function("id => document.querySelector('.vm-one')?.innerText.includes(id)", arg=h[1].ids[2])
    page.screenshot(path=shots / "compare.png", full_page=True)


def test_page_picture_and_composed(visit, shots, toyshop, shop):
    page, picture = visit(), toyshop / "images" / "000" / "000075.jpg"
    search(page, "", picture)
    first = A.ask(shop, A.read_query("", str(picture)), 8)
    page.wait_for_function(SAID, arg=A.sentence(first))
    search(page, "换成蓝色")
    both = A.ask(shop, A.read_query("换成蓝色", str(picture)), 8)
    page.wait_for_function(SAID, arg=A.sentence(both))
    page.screenshot(path=shots / "composed.png")
    page.locator(".vm-eg:visible button").last.click()  # 图加文的例题
    page.wait_for_function("want => document.querySelector('.vm-query textarea').value == want", arg=shop.examples[-1][0])
    page.wait_for_function("old => document.querySelector('.vm-say').innerText != old", arg=A.sentence(both))


def test_page_filter(visit, shots, shop):
    page = visit()
    page.locator(".vm-filter:visible button").first.click()
    facet = shop.facets[0]
    page.get_by_label(facet["key"], exact=True).first.click()
    value, n = facet["options"][0]
    page.get_by_role("option", name=f"{value}（{n}）").click()
    page.keyboard.press("Escape")
    search(page, "红色")
    want = A.ask(shop, Item("红色"), 8, {facet["key"]: [value]})
    page.wait_for_function(SAID, arg=A.sentence(want))
    assert page.locator(".vm-card").count() == 2 * min(8, n)
    got = set(page.locator(".vm-card img").evaluate_all("all => all.map(i => i.alt)"))
    assert got <= {m["标题"] for m in shop.rows["tiny-clip"].values() if m[facet["key"]] == value}
    page.screenshot(path=shots / "filter.png")
    page.locator(".vm-filter:visible button", has_text="清空").click()
    page.locator(".vm-filter:visible").get_by_text(f"{value}（{n}）").wait_for(state="hidden")
    page.get_by_label("价格 ≤").first.fill("200")
    search(page, "红色")
    page.wait_for_function(SAID, arg=A.sentence(A.ask(shop, Item("红色"), 8, {"价格": {"<=": 200}})))
    page.get_by_label("更多条件").first.fill('{"价格": {"<": 1}}')
    search(page)
    page.wait_for_function("document.querySelector('.vm-say').innerText.includes('没有符合')")


def test_page_labels_survive(visit, site, shots, shop):
    page = visit()
    search(page, "黄色的东西")
    page.wait_for_function(SAID, arg=A.sentence(A.ask(shop, Item("黄色的东西"), 8)))
    page.locator(".vm-card").nth(9).click(); page.wait_for_selector(".vm-on[data-pick='1,1']")
    page.locator(".vm-no:visible").click(); page.wait_for_selector("[data-pick='1,1'] .vm-g0")
    page.locator(".vm-card").nth(8).click(); page.wait_for_selector(".vm-on[data-pick='1,0']")
    page.locator(".vm-yes:visible").click(); page.wait_for_selector("[data-pick='1,0'] .vm-g1")
    page.get_by_role("tab", name="标注").first.click(); page.wait_for_selector(".vm-table")
    page.locator(".vm-export:visible").click(); page.wait_for_selector("text=train.jsonl")
    page.screenshot(path=shots / "labels.png", full_page=True)
    page.reload(); page.wait_for_selector(".vm-card")
    search(page, "黄色的东西")
    page.wait_for_selector("[data-pick='1,0'] .vm-g1"); assert page.locator("[data-pick='1,1'] .vm-g0").count() == 1  # 重新打开还在
    page.locator(".vm-undo:visible").click()
    page.wait_for_function("!document.querySelector(\"[data-pick='1,0'] .vm-g1\")")  # 还认得是自己标的
    key = A.ask(shop, Item("黄色的东西"), 8)
    assert A.Labels(site.labels).marks_of(key.key) == {key.hits["tiny-qwen3vl"].ids[1]: 0}


def test_page_heat(visit, shots, paper, site):
    page = visit()
    page.get_by_role("tab", name="看哪里像").first.click()
    page.wait_for_function("document.querySelector('.vm-heatbox').innerText.includes('一个向量')")  # 单向量的模型说为什么没有
    page.get_by_role("tab", name="文档页").click()
    page.locator(".vm-eg:visible button").first.click()
    page.wait_for_function("[...document.querySelectorAll('.vm-card')].some(e => e.offsetParent && e.closest('.vm-1'))")
    page.locator("[role=tab]:visible", has_text="看哪里像").click()
    page.wait_for_selector(".vm-heat:visible")
    boxes = lambda: page.locator(".vm-page:visible .vm-layer:visible").count()
    assert boxes() == 1
    words = page.locator(".vm-heat:visible label")
    assert "".join(w.split()[0] for w in words.all_inner_texts()[1:]) == paper.examples[0][0].replace(" ", "")
    words.nth(2).click()
    assert boxes() == 1 and page.locator(".vm-page .l2:visible").count() == 2
    page.screenshot(path=shots / "heat.png", full_page=True)
    page.locator("[role=tab]:visible", has_text="选中的").click()
    page.locator(".vm-yes:visible").click(); page.wait_for_selector(".vm-g1:visible")
    assert len(A.Labels(site.labels.with_stem("labels-2")).state()) == 1  # 第二个图库的标注在自己的文件里


def test_page_map(visit, shots):
    page = visit()
    page.get_by_role("tab", name="嵌入地图").first.click()
    page.wait_for_selector(".vm-star:visible")
    assert page.locator(".vm-ring:visible").count() == 8
    dot = page.locator(".vmap a").nth(3)
    assert not dot.locator("span").is_visible()
    dot.scroll_into_view_if_needed(); dot.locator("i").hover(force=True)
    middle = "all => all.map(e => { const r = e.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2] })"
    dots, rings = (np.array(page.locator(s).evaluate_all(middle)) for s in (".vmap i:visible", ".vm-ring:visible"))
    assert (np.abs(rings[:, None] - dots[None]).max(-1).min(1) < 2).all()  # 每个圈的正中有一个点
    page.wait_for_selector(".vmap a:hover > span", state="visible")
    page.screenshot(path=shots / "map.png")


def test_page_bad_input(visit, shots, bad_files):
    folder, words = bad_files
    page = visit()
    before = says(page)
    search(page, "   "); page.wait_for_selector(".vm-error")
    assert "还没有查询" in page.locator(".vm-error").inner_text() and says(page) == before  # 旧的结果留着
    for name in ("pdf.jpg", "bomb.png", "cut.png"):
        page.locator("input[type=file]").first.set_input_files(str(folder / name))
        page.wait_for_selector("button[aria-label='Remove Image'], button[aria-label='Clear'], button[title='清除'], .icon-button-wrapper button")
        page.wait_for_timeout(300)
        page.locator(".vm-go:visible").click()
        page.wait_for_function("word => document.querySelector('.vm-error')?.innerText.includes(word)", arg=words[name])
        if name == "bomb.png": page.screenshot(path=shots / "bad.png")
        page.locator(".icon-button-wrapper button").first.click()
        page.wait_for_selector("input[type=file]", state="attached")
    page.locator("input[type=file]").first.set_input_files(str(folder / "big.png"))
    page.wait_for_function("document.querySelector('.toast-body')?.innerText.includes('太大')")
    assert "Traceback" not in page.content()


def test_page_two_people(visit, shop):
    "两个人各看各的，互不相干。"
    a, b = visit(), visit()
    search(a, "红色的杯子")
    b.locator(".vm-query textarea:visible").fill("木头椅子"); b.keyboard.press("Enter")  # 回车也行
    for page, text in ((a, "红色的杯子"), (b, "木头椅子")):
        answer = A.ask(shop, Item(text), 8)
        page.wait_for_function(SAID, arg=A.sentence(answer))
        page.locator(".vm-card").nth(3).click(); page.wait_for_selector(".vm-on[data-pick='0,3']")
        page.wait_for_function("id => document.querySelector('.vm-one')?.innerText.includes(id)", arg=answer.hits["tiny-clip"].ids[3])


@pytest.mark.parametrize("name,kw", [("phone", dict(width=400, height=860, is_mobile=True, has_touch=True, device_scale_factor=2)), ("dark", dict(color_scheme="dark")), ("phone_dark", dict(width=400, height=860, color_scheme="dark"))])
def test_page_sizes(visit, shots, name, kw):
    "手机上不横着滚，深色时字看得清。"
    page = visit(**kw)
    page.wait_for_timeout(300)
    page.screenshot(path=shots / f"{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    light = lambda css: sum(map(float, css.strip("rgba()").split(",")[:3])) / 3
    look = page.evaluate("[getComputedStyle(document.querySelector('.vm-say')).color, getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.vm-card')).color, getComputedStyle(document.querySelector('.vm-card')).backgroundColor]")
    if "width" in kw:
        page.locator(".vm-go:visible").click()
        page.wait_for_function("document.querySelector('.vm-results').getBoundingClientRect().top < 200")  # 搜完滚到结果
    assert abs(light(look[0]) - light(look[1])) > 120 and abs(light(look[2]) - light(look[3])) > 120, look
