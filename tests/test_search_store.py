"""索引的底：三种索引各跑一遍。答应过的不丢，只有一个人写，坏的、别的模型的打不开，一边存一边读总是完整的。"""
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vembed_nb.core import VembedError, stable_id
from vembed_nb.search import store
from vembed_nb.search.store import TYPES, Growing, Journal, Stored, conditions, fingerprint, holds, load_index, open_index, read_journal
from vembed_nb.vectors import Embeddings, normalize

COMMON = '''
import sys, time, torch
from vembed_nb.search.index import VectorIndex
from vembed_nb.search.multivector import MultiVectorIndex
from vembed_nb.search.quantize import QuantizedIndex
from vembed_nb.search.store import open_index
from vembed_nb.vectors import Embeddings

MAKE = {"flat": lambda info=None: VectorIndex(8, "flat", info), "hnsw": lambda info=None: VectorIndex(8, "HNSW8", info), "tokens": lambda info=None: MultiVectorIndex(8, "float32", info=info),
        "pooled": lambda info=None: MultiVectorIndex(8, "float16", coarse="pooled", info=info), "centroid": lambda info=None: MultiVectorIndex(8, "float16", coarse="centroid", info=info),
        "binary": lambda info=None: QuantizedIndex(8, "binary", "float32", info=info), "int8": lambda info=None: QuantizedIndex(8, "int8", "", info=info)}

def vectors(kind, n, seed=0):
    "n 样的向量；多向量的长短不一，遮住的是 NaN。"
    g = torch.Generator().manual_seed(seed)
    if kind not in ("tokens", "pooled", "centroid"): return torch.randn(n, 8, generator=g)
    mask = torch.arange(4) < torch.randint(1, 5, (n, 1), generator=g)
    return Embeddings(torch.where(mask[..., None], torch.randn(n, 4, 8, generator=g), torch.nan), mask)
'''
exec(COMMON)
KINDS = list(MAKE)  # noqa: F821
THREE = ["flat", "tokens", "binary"]


def names(n, start=0): return [f"商品{i}" for i in range(start, start + n)]
def shop(n): return [{"类": ("杯子", "碗", "雨伞")[i % 3], "价": i % 50, "标签": ["新品", "红"][:i % 3], **({"注": None} if i % 5 else {"注": f"第 {i} 件"})} for i in range(n)]


def built(kind, n=60, **kw):
    index = MAKE[kind](**kw)  # noqa: F821
    index.add(names(n), vectors(kind, n), shop(n))  # noqa: F821
    return index


def one(v, i): return Embeddings(v.vectors[i:i + 1], v.mask[i:i + 1]) if isinstance(v, Embeddings) else v[i:i + 1]


def refuses(f, *words):
    with pytest.raises(VembedError) as e: f()
    text = str(e.value)
    assert "\n" not in text and all(w in text for w in words), text
    return text


def answers(index, kind, q=5, k=5, where=None): return [[(i, round(s, 4), m) for i, s, m in row] for row in index.find(vectors(kind, q, 9), k, where)]  # noqa: F821


# ---------------------------------------------------------------- 一辈子

@pytest.mark.parametrize("kind", KINDS)
def test_life_of_an_index(kind, tmp_path):
    v, ids = vectors(kind, 60), names(60)  # noqa: F821
    index = built(kind)
    best = lambda i: index.find(one(v, i), 1)[0][0][0]
    if kind in ("flat", "tokens"): assert [best(i) for i in range(60)] == ids
    assert len(index) == 60 and "商品3" in index and index.get("没有") is None and list(index) == ids and index.metas[7] == shop(60)[7]
    assert index.delete(["商品3", "没有"]) == 1 and len(index) == 59 and best(3) != "商品3" and "商品3" not in index
    assert index.upsert(["商品5", "新的"], vectors(kind, 2, 77), [{"价": 1}, {}]) == 1  # noqa: F821
    assert len(index) == 60 and index.get("商品5")["meta"] == {"价": 1} and index.ids[5] == "商品5" and index.ids[60] == "商品5"  # 旧的行号还指着旧的
    assert set(index.filter({"类": "杯子", "价": {"<": 10}})) == {i for i, m in zip(ids, shop(60)) if m["类"] == "杯子" and m["价"] < 10 and i not in ("商品3", "商品5")}
    s, at = index.search(one(v, 0), 100, {"类": "碗"})
    assert at.shape[1] == len(index.filter({"类": "碗"})) and all(index.metas[j]["类"] == "碗" for j in at[0].tolist() if j >= 0)
    want = answers(index, kind)
    index.info = {"model": "m", "type": "乱写的"}
    index.save(tmp_path / "i")
    back = load_index(tmp_path / "i", verify=True)
    assert type(back) is type(index) and back.info == {"model": "m"} and list(back) == list(index) and len(back.ids) == 60
    if kind != "hnsw": assert answers(back, kind) == want
    assert torch.allclose(back.get("商品5")["vector"], index.get("商品5")["vector"], atol=1e-3)
    back.upsert("又一个", one(v, 7))
    back.save(tmp_path / "i")  # 写到自己正映射着的地方
    assert len(load_index(tmp_path / "i", verify=True)) == 61 and len(back) == 61
    assert index.delete(list(index)) == 60 and len(index) == 0
    refuses(lambda: index.search(one(v, 0)), "空的")
    index.save(tmp_path / "i")
    assert len(load_index(tmp_path / "i")) == 0 and "商品1" not in load_index(tmp_path / "i")


@pytest.mark.parametrize("kind", THREE)
def test_all_or_nothing(kind):
    index, v = built(kind, 20), vectors(kind, 2)  # noqa: F821
    before = list(index), answers(index, kind)
    bad = Embeddings(torch.where(torch.arange(2)[:, None, None] == 1, torch.nan, v.vectors), v.mask) if kind == "tokens" else torch.stack([v[0], v[1] * torch.inf])
    narrow = Embeddings(v.vectors[:1, :, :4], v.mask[:1]) if kind == "tokens" else v[:1, :4]
    for ids, x, m, words in ((["a", "商品3"], v, None, ["商品3"]), (["a", "a"], v, None, ["'a'"]), (["a"], v, None, ["1 个 id", "2 个向量"]), (["a"], narrow, None, ["4", "8"]), (["a", "b"], bad, None, ["第 1 个", "NaN"]),
                             ([3, 4], v, None, ["3", "int"]), (["", "b"], v, None, ["''"]), (["a", "b"], v, [{}], ["1 份元数据"]), (["a", "b"], v, ["x", {}], ["dict"])):
        refuses(lambda: index.add(ids, x, m), *words)
        if words != ["商品3"]: refuses(lambda: index.upsert(ids, x, m), *words)
        assert (list(index), answers(index, kind)) == before
    for k in (0, -1, 2.5): refuses(lambda: index.search(v, k), "k=")
    refuses(lambda: index.search(v, 3, {"价格": 3}), "'价格'")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(["add", "upsert", "delete", "save", "reopen"]), st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True), st.integers(0, 99)), max_size=12))
def test_like_a_dict(kind, tmp_path_factory, steps):
    "随便增改删存开，与一个 dict 一样。"
    folder, model = tmp_path_factory.mktemp("x") / "i", {}
    MAKE[kind]().save(folder)  # noqa: F821
    index = open_index(folder, writable=True)
    for what, keys, seed in steps:
        ids, v = [f"k{i}" for i in keys], vectors(kind, len(keys), seed)  # noqa: F821
        if what == "add" and not set(ids) & set(model) or what == "upsert":
            getattr(index, what)(ids, v, [{"s": seed, "i": i} for i in ids])
            model |= {i: (one(v, n), seed) for n, i in enumerate(ids)}
        elif what == "delete": assert index.delete(ids) == sum(model.pop(i, None) is not None for i in ids)
        elif what == "save": index.save()
        elif what == "reopen": index.close(); index = open_index(folder, writable=True)
    for seen in (index, load_index(folder, verify=True)):
        assert sorted(seen) == sorted(model) and len(seen) == len(model) and all(i in seen for i in model)
        for i, (x, s) in model.items():
            got = seen.get(i)
            assert got["meta"] == {"s": s, "i": i}
            if kind in ("flat", "hnsw"): assert torch.equal(got["vector"], normalize(x)[0])
            if kind == "tokens": assert torch.allclose(got["vector"], normalize(x.vectors[x.mask]), atol=1e-6)
        if model: assert sorted(seen.ids[j] for j in seen.search(vectors(kind, 1), 99)[1][0].tolist() if j >= 0) == sorted(model)  # noqa: F821
    index.close()


@pytest.mark.parametrize("kind", KINDS)
def test_threads(kind):
    "一边查一边改：不报错，查到的总是完整的。"
    index, errors, stop, q = built(kind, 100), [], threading.Event(), vectors(kind, 2, 3)  # noqa: F821
    def reader():
        while not stop.is_set():
            try:
                for where in (None, {"价": {"<": 1000}}):
                    for row in index.find(q, 5, where): assert len(row) == 5 and all(i.startswith(("商品", "新")) and "价" in m for i, _, m in row)
            except Exception as e: errors.append(e); return
    threads = [threading.Thread(target=reader) for _ in range(2)]
    for t in threads: t.start()
    for i in range(60): index.upsert([f"新{i % 40}"], vectors(kind, 1, i), [{"价": i}]); index.delete(f"商品{i}")  # noqa: F821
    stop.set()
    for t in threads: t.join()
    assert not errors and len(index) == 80, errors


@pytest.mark.parametrize("n", [0, 1, 300])
def test_growing(n):
    "底和尾：与 np.concatenate 一样；交出去的旧的不变。"
    whole = np.arange(4 * n, dtype=np.int32).reshape(n, 4)
    g, rng = Growing(whole), np.random.default_rng(n)
    for _ in range(40):
        more = rng.integers(0, 99, (int(rng.integers(0, 30)), 4)).astype(np.int32)
        before, kept = g.parts(), whole
        g.push(more)
        whole = np.concatenate([whole, more])
        a, b = sorted(rng.integers(0, len(whole) + 1, 2))
        rows = rng.integers(0, max(1, len(whole)), 9) if len(whole) else np.zeros(0, int)
        assert len(g) == len(whole) and (np.concatenate(g.parts()) == whole).all() and (g[a:b] == whole[a:b]).all() and (g[rows] == whole[rows]).all() and (np.concatenate(before) == kept).all()


# ---------------------------------------------------------------- 过滤

values = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([.5, -1.5]), st.sampled_from(["", "a", "b", '"or"', "1"]), st.lists(st.sampled_from(["a", "b", 1, 2]), max_size=2))
plain = st.one_of(st.booleans(), st.integers(-3, 3), st.sampled_from([.5, "", "a", '"or"', "1"]))
wheres = st.one_of(plain, st.lists(plain, max_size=3), st.tuples(st.sampled_from(["==", "!="]), plain).map(lambda p: {p[0]: p[1]}), st.tuples(st.sampled_from(["in", "not in"]), st.lists(plain, max_size=3)).map(lambda p: {p[0]: p[1]}),
                   st.tuples(st.sampled_from(["<", "<=", ">", ">="]), plain.filter(lambda v: not isinstance(v, bool))).map(lambda p: {p[0]: p[1]}))


@pytest.mark.parametrize("kind", THREE)
@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(values, min_size=1, max_size=12), wheres)
def test_filter_is_row_by_row(kind, have, want):
    "编成号码的过滤与逐行判断一样；划掉的不算。"
    index = MAKE[kind]()  # noqa: F821
    index.add([*names(len(have)), "划掉的"], vectors(kind, len(have) + 1), [*({"x": v, "y": 0} if v is not None else {"y": 0} for v in have), {"x": have[0]}])  # noqa: F821
    index.delete("划掉的")
    expected = [i for i, v in zip(names(len(have)), have) if v is not None and all(holds(op, v, w) for _, op, w in conditions({"x": want}))]
    if all(v is None for v in have): refuses(lambda: index.filter({"x": want}), "'x'"); return
    kinds = set().union(*(store.kinds_of(v) for v in have if v is not None))
    if any(op not in ("!=", "not in") and store.kinds_of(w) and not store.kinds_of(w) & kinds for _, op, w in conditions({"x": want})):
        assert not expected
        refuses(lambda: index.filter({"x": want}), "一样也不会符合"); return
    assert index.filter({"x": want}) == expected == [index.ids[j] for j in index.live({"x": want})]


@pytest.mark.parametrize("where,word", [({"price": {"=<": 3}}, "=<"), ({"price": None}, "None"), ({"price": {"<": True}}, "真假"), ({"price": {"in": 3}}, "一列"), ({"price": {"<": [1]}}, "一个"), ("price < 3", "dict"), ({3: 3}, "3"), ({"price": float("nan")}, "nan"), ({"price": {"$gt": 1}}, "$gt")])
def test_bad_filter(where, word):
    for kind in THREE: refuses(lambda: built(kind, 5).search(vectors(kind, 1), 3, where), word)  # noqa: F821


# ---------------------------------------------------------------- id

@pytest.mark.parametrize("kind", THREE)
def test_ids_without_reading_all(kind, tmp_path, monkeypatch):
    "按 id 找只读那一行；没有 ids.npy 的旧文件夹照样找得到；摘要撞在一起也不会认错。"
    built(kind).save(tmp_path / "i")
    index, read = load_index(tmp_path / "i"), []
    monkeypatch.setattr(store.Rows, "read", lambda self, a, b, pictures=True, real=store.Rows.read: read.append((a, b)) or real(self, a, b, pictures))
    assert index.get("商品7")["meta"] == shop(60)[7] and "没有" not in index and 7 not in index and set(read) == {(7, 8)}
    index.upsert("商品7", vectors(kind, 1), [{"价": 3}]); index.delete("商品8")  # noqa: F821
    assert index.get("商品7")["meta"] == {"价": 3} and "商品8" not in index and len(index) == 59 and all(b - a == 1 for a, b in read)
    m = json.loads((tmp_path / "i/manifest.json").read_text())
    del m["files"]["ids"]
    (tmp_path / "i/manifest.json").write_text(json.dumps(m))
    old = load_index(tmp_path / "i")
    assert old.get("商品7")["meta"] == shop(60)[7] and old.upsert("商品7", vectors(kind, 1)) == 0  # noqa: F821
    with monkeypatch.context() as c:
        c.setattr(store, "stable_id", lambda text: 2**63 - 1 if text.endswith("9") else stable_id(text))
        built(kind).save(tmp_path / "j")
        index = load_index(tmp_path / "j")
        assert [x["meta"] for x in index.get([f"商品{i}" for i in range(60)])] == shop(60) and "商品99" not in index and index.delete(["商品19", "商品29"]) == 2 and "商品9" in index


# ---------------------------------------------------------------- 存和读

@pytest.mark.parametrize("kind", THREE)
def test_saved_metas(kind, tmp_path):
    "图片、numpy 的数、换行、没有的值；存两遍也一样；日志里的图片也在。"
    red, blue, v = Image.new("RGB", (5, 4), "red"), Image.new("RGBA", (3, 3), (0, 0, 255, 128)), vectors(kind, 3)  # noqa: F821
    metas = [{"image": red, "text": "两\n行 \u2028"}, {"image": [blue, "a.jpg"], "price": np.float32(.5), "n": np.int64(3), "v": np.arange(3)}, {"$picture": "../../etc/passwd"}]
    for wrong, words in (({"raw": __import__("io").BytesIO()}, ["BytesIO", "'x'"]), ({"t": "\ud800"}, ["'x'"])):
        index = MAKE[kind]()  # noqa: F821
        index.add(["x"], one(v, 0), [wrong])
        refuses(lambda: index.save(tmp_path / "i"), *words)
        assert not (tmp_path / "i/manifest.json").exists()
    index = MAKE[kind]()  # noqa: F821
    index.add(["a", "b", "c"], v, metas)
    for _ in range(2):
        index.save(tmp_path / "i")
        back = load_index(tmp_path / "i")
        assert back.metas[0]["image"].convert("RGB").tobytes() == red.tobytes() and back.metas[0]["text"] == metas[0]["text"]
        assert back.metas[1]["image"][0].tobytes() == blue.tobytes() and {k: back.metas[1][k] for k in ("price", "n", "v")} == {"price": .5, "n": 3, "v": [0, 1, 2]}
        assert back.metas[2] == {"$picture": "../../etc/passwd"} and back.ids == ["a", "b", "c"]
        index = back
    with open_index(tmp_path / "i", writable=True) as index:
        index.delete("a"); index.upsert(["d"], one(v, 0), [{"image": Image.new("L", (2, 2), 9)}])
        refuses(lambda: index.upsert(["e"], one(v, 0), [{"raw": object()}]), "object")
        assert load_index(tmp_path / "i").get("d")["meta"]["image"].tobytes() == b"\x09" * 4 and "e" not in index
        index.save()
    assert len(list((tmp_path / "i/pictures").iterdir())) == 2 and load_index(tmp_path / "i").get("d")["meta"]["image"].size == (2, 2)
    next((tmp_path / "i/pictures").iterdir()).unlink()
    refuses(lambda: [m for m in load_index(tmp_path / "i").metas], "缺一张图")


class Encoder(torch.nn.Linear):
    dim = 8


@pytest.mark.parametrize("kind", THREE)
def test_wrong_pairs(kind, tmp_path):
    torch.manual_seed(0)
    mine, other, small = Encoder(4, 4), Encoder(4, 4), Encoder(4, 4)
    small.dim = 4
    index = built(kind, info={"model": "甲", "fingerprint": fingerprint(mine)})
    index.save(tmp_path / "i")
    m = json.loads((tmp_path / "i/manifest.json").read_text())
    assert {"format": 2, "dim": 8, "metric": index.metric, "count": 60, "model": "甲", "generation": 1}.items() <= m.items()
    assert m.get("type") == {"flat": None, "tokens": "multivector", "binary": "quantized"}[kind]
    assert load_index(tmp_path / "i", mine, index.metric).info["model"] == "甲"
    refuses(lambda: load_index(tmp_path / "i", other), "甲", "重建索引")
    refuses(lambda: load_index(tmp_path / "i", small), "甲", "8 维", "4 维")
    refuses(lambda: load_index(tmp_path / "i", metric="l2"), "l2", index.metric)
    refuses(lambda: open_index(tmp_path / "i", True, other), "甲")
    open_index(tmp_path / "i", True, mine).close()  # 上一次被拒绝之后，锁已经放开
    for name in THREE:
        for opens in (type(MAKE[name]()).load, lambda f, name=name: type(MAKE[name]()).open(f, writable=True).close()):  # noqa: F821
            if name == kind: opens(tmp_path / "i")
            else: refuses(lambda: opens(tmp_path / "i"), "type")
    for change, word in (({"format": 3}, "升级"), ({"type": "nonsense"}, "nonsense")):
        (tmp_path / "i/manifest.json").write_text(json.dumps(m | change))
        refuses(lambda: load_index(tmp_path / "i"), word)


def test_types_register_themselves():
    assert {"vector", "multivector", "quantized", "milvus"} <= set(TYPES) and None not in TYPES


FILES = [("hnsw", "vectors.safetensors"), ("hnsw", "index.faiss"), ("hnsw", "items.jsonl"), ("hnsw", "ids.npy"), ("tokens", "tokens.bin"), ("tokens", "offsets.npy"), ("tokens", "items.jsonl"), ("centroid", "coarse.npz"), ("pooled", "coarse.npz"),
         ("binary", "codes.bin"), ("binary", "fine.bin"), ("binary", "rotation.npy"), ("int8", "scale.bin"), ("int8", "ids.npy")]


@pytest.mark.parametrize("kind,name", FILES)
@pytest.mark.parametrize("harm", ["cut", "gone", "flip", "empty"])
def test_harmed_files(tmp_path, kind, name, harm):
    "截断、缺失、变空：打开就说；翻了一位：verify 说。"
    built(kind).save(tmp_path / "i")
    path = tmp_path / "i" / name
    data = path.read_bytes()
    if harm == "gone": path.unlink()
    else: path.write_bytes({"cut": data[:-1], "flip": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "empty": b""}[harm])
    refuses(lambda: load_index(tmp_path / "i", verify=harm == "flip"), "i", name, "重建")
    refuses(lambda: open_index(tmp_path / "i", writable=True, verify=harm == "flip"), name)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", '{"format": 2}', '{"format": "2", "dim": 8, "kind": "flat", "count": 60}', '{"format": 2, "dim": 8, "kind": "flat", "count": 60, "files": {"vectors": {"name": "../x", "bytes": 3}}}', '{"format": 2, "dim": 8, "kind": "flat", "count": 60, "files": []}', '{"format": 2, "dim": 8, "type": ["x"], "count": 60}'])
def test_harmed_manifest(tmp_path, text):
    for kind in THREE:
        built(kind).save(tmp_path / kind)
        (tmp_path / kind / "manifest.json").write_text(text)
        refuses(lambda: load_index(tmp_path / kind), "manifest.json", "重建")


def test_harmed_settings(tmp_path):
    "manifest 里的设定被改了：数组对不上，一句话。"
    for kind, change in (("flat", {"dim": 16}), ("flat", {"count": 59}), ("tokens", {"precision": "int8"}), ("tokens", {"count": 59}), ("binary", {"keep": 4}), ("binary", {"rescore": ""}), ("binary", {"precision": "int8"}), ("int8", {"dim": "8"})):
        built(kind).save(tmp_path / kind)
        m = json.loads((tmp_path / kind / "manifest.json").read_text())
        (tmp_path / kind / "manifest.json").write_text(json.dumps(m | change))
        if change == {"rescore": ""}: continue  # 少用一个文件，不算错
        refuses(lambda: list(load_index(tmp_path / kind)), "重建")


@pytest.mark.parametrize("kind", THREE)
def test_save_refuses_and_keeps(kind, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir(); (tmp_path / "mine/a.txt").write_text("x")
    refuses(lambda: built(kind).save(tmp_path / "mine"), "不像索引")
    refuses(lambda: built(kind).save(), "哪里")
    built(kind).save(tmp_path / "i")
    before = {p.name: p.read_bytes() for p in (tmp_path / "i").iterdir()}
    def full(*a, **k): raise OSError(28, "No space left on device")
    for what in ("_digest", "_write", "_dump"):
        with monkeypatch.context() as m: m.setattr(store, what, full); refuses(lambda: built(kind, 50).save(tmp_path / "i"), "没有动")
        assert {p.name: p.read_bytes() for p in (tmp_path / "i").iterdir()} == before
    with monkeypatch.context() as m: m.setattr(MAKE[kind]().__class__, "_write", full); refuses(lambda: built(kind, 50).save(tmp_path / "i"), "没有动")  # noqa: F821
    assert len(load_index(tmp_path / "i", verify=True)) == 60


def run(code, *args): return subprocess.Popen([sys.executable, "-c", COMMON + code, *map(str, args)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kind", THREE)
def test_one_writer(kind, tmp_path):
    "第二个写的人被拒绝；读的人不受影响；进程死了锁就放开。"
    built(kind).save(tmp_path / "i")
    p = run("x = open_index(sys.argv[1], writable=True); print('ok', flush=True); time.sleep(60)", tmp_path / "i")
    assert p.stdout.readline() == "ok\n"
    refuses(lambda: open_index(tmp_path / "i", writable=True), "别的进程")
    refuses(lambda: built(kind).save(tmp_path / "i"), "别的进程")
    assert len(load_index(tmp_path / "i")) == 60
    p.kill(); p.wait()
    with open_index(tmp_path / "i", writable=True) as index: index.upsert(["x"], vectors(kind, 1))  # noqa: F821
    assert "x" in load_index(tmp_path / "i")


@pytest.mark.parametrize("kind", KINDS)
def test_reader_survives_a_new_generation(kind, tmp_path):
    "打开着的旧索引照样能查；没有打开过的部分也读得到。"
    built(kind, 500).save(tmp_path / "i")
    old = load_index(tmp_path / "i")
    built(kind, 30).save(tmp_path / "i")
    assert len(old) == 500 and old.find(vectors(kind, 1, 1), 40)[0][-1][2] and "商品444" in old and len(load_index(tmp_path / "i")) == 30  # noqa: F821


@pytest.mark.parametrize("kind", THREE)
def test_reading_while_saving(kind, tmp_path):
    "一个不停地改、不停地换代，一个不停地打开：每次都是完整的，而且答应过的都在。"
    MAKE[kind]().save(tmp_path / "i")  # noqa: F821
    said, seen, errors, stop = [0], [], [], threading.Event()
    def reader():
        while not stop.is_set():
            try:
                least = said[0]
                index = load_index(tmp_path / "i", verify=True)
                have = set(index)
                assert len(have) % 2 == 0 and all(f"右{i[1:]}" in have for i in have if i[0] == "左") and len(have) >= 2 * least, (len(have), least)
                if have: index.get(list(have))
                seen.append(len(have))
            except Exception as e: errors.append(e); return
    threads = [threading.Thread(target=reader) for _ in range(2)]
    for t in threads: t.start()
    with open_index(tmp_path / "i", writable=True) as index:
        for i in range(40):
            index.upsert([f"左{i}", f"右{i}"], vectors(kind, 2, i)); said[0] = i + 1  # noqa: F821
            if i % 3 == 0: index.save()
    stop.set()
    for t in threads: t.join()
    assert not errors and len(seen) > 3 and len(load_index(tmp_path / "i", verify=True)) == 80, errors


# ---------------------------------------------------------------- 日志

WRITER = """
with open_index(sys.argv[1], writable=True) as index:
    for i in range(100000):
        if i % 7 == 6: index.delete(str(i - 1)); print(-(i - 1), flush=True)
        else: index.upsert([str(i), f"双{i}"], vectors(sys.argv[3], 2, i), [{"i": i}] * 2); print(i, flush=True)
        if int(sys.argv[2]) and i % int(sys.argv[2]) == 3: index.save()
"""


@pytest.mark.parametrize("every,kind", [(0, "flat"), (5, "flat"), (9, "hnsw"), (0, "tokens"), (5, "tokens"), (7, "pooled"), (0, "binary"), (5, "int8")])
def test_kill_9(tmp_path, every, kind):
    "不停地改（有的还不停地存），在随便什么时候 kill -9：答应过的都在，一次改动要么全在要么全不在，打得开，还能接着写。"
    MAKE[kind]().save(tmp_path / "i")  # noqa: F821
    have, rng = {}, np.random.default_rng(every)
    for turn in range(3):
        p = run(WRITER, tmp_path / "i", every, kind)
        said = [int(p.stdout.readline()) for _ in range(int(rng.integers(5, 40)))]
        time.sleep(float(rng.random()) * .02)
        p.kill()
        said += [int(x) for x in p.stdout.read().split("\n")[:-1] if x]
        p.wait()
        for i in said: have[str(abs(i))] = i >= 0
        index = load_index(tmp_path / "i", verify=True)
        seen = set(index)
        lost = [i for i, ok in have.items() if ok and i not in seen]
        kept = [i for i, ok in have.items() if not ok and i in seen]
        assert len(lost + kept) <= 1 and all(int(i) % 7 == 5 for i in lost + kept), (lost, kept)  # 至多一样：它的删除（或又一次加入）已经落盘，还没来得及说
        assert all(f"双{i}" in seen for i in have)
        for i in have:
            got = index.get(f"双{i}")
            assert got["meta"] == {"i": int(i)} and torch.isfinite(got["vector"]).all()
        assert index.search(vectors(kind, 1), 3)[1].shape == (1, 3)  # noqa: F821
    with open_index(tmp_path / "i", writable=True) as index: index.save()
    assert set(load_index(tmp_path / "i", verify=True)) == seen


@pytest.mark.parametrize("moment", ["_digest", "_sync_dir", "_sweep"])
@pytest.mark.parametrize("kind", THREE)
def test_killed_while_saving(kind, moment, tmp_path):
    "日志里有东西，存到一半死了：写数组时、换 manifest 之前、换了之后还没扫。答应过的都在，留下的碎片会扫掉。"
    built(kind).save(tmp_path / "i")
    p = run(f"""
import os
from vembed_nb.search import store
with open_index(sys.argv[1], writable=True) as x:
    x.upsert(["a", "b"], vectors({kind!r}, 2)); x.delete(["a", "商品3"])
    store.{moment} = lambda *a: os.kill(os.getpid(), 9)
    x.save()""", tmp_path / "i")
    assert p.wait() == -9
    want = set(names(60)) - {"商品3"} | {"b"}
    assert set(load_index(tmp_path / "i", verify=True)) == want
    with open_index(tmp_path / "i", writable=True) as index:
        m = json.loads((tmp_path / "i/manifest.json").read_text())
        assert m["generation"] == (2 if moment == "_sweep" else 1) and set(index) == want
        assert {p.name for p in (tmp_path / "i").iterdir()} <= {".lock", ".manifest.tmp", "manifest.json", "wal.jsonl" if m["generation"] == 1 else "wal.2.jsonl", *(f["name"] for f in m["files"].values())}
        index.save()
    assert set(load_index(tmp_path / "i", verify=True)) == want


@pytest.mark.parametrize("kind", THREE)
def test_torn_and_harmed_journal(kind, tmp_path):
    "最后一行写了一半：任何一个字节断开都打得开；中间坏了、是别的维数的：拒绝。"
    MAKE[kind]().save(tmp_path / "i")  # noqa: F821
    with open_index(tmp_path / "i", writable=True) as index:
        for i in range(3): index.upsert([str(i)], vectors(kind, 1, i), [{"t": "两\n行"}])  # noqa: F821
    path = tmp_path / "i/wal.jsonl"
    whole = path.read_bytes()
    ends = [i + 1 for i, b in enumerate(whole) if b == 10]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert len(read_journal(path)[0]) == sum(e <= cut for e in ends)
    path.write_bytes(whole[:-5])
    assert len(load_index(tmp_path / "i")) == 2 and path.read_bytes() == whole[:-5]  # 只读的不改文件
    with open_index(tmp_path / "i", writable=True) as index: index.upsert(["9"], vectors(kind, 1))  # noqa: F821
    assert set(load_index(tmp_path / "i")) == {"0", "1", "9"}
    path.write_bytes(whole[:20] + b"X" + whole[21:])
    for opens in (load_index, lambda f: open_index(f, writable=True)): refuses(lambda: opens(tmp_path / "i"), "wal.jsonl", "第 1 行")
    path.unlink()
    log = Journal(path)
    log.append(json.dumps({"op": "upsert", "rows": [{"id": "x", "meta": {}}], **{name: "AAAA" for name in index._spec()}}).encode())
    log.close()
    refuses(lambda: load_index(tmp_path / "i"), "日志", "重建")


@pytest.mark.parametrize("kind", THREE)
def test_full_disk(kind, tmp_path, monkeypatch):
    "盘满了：这次改动被拒绝，内存和日志都没有它，腾出地方以后接着写。"
    MAKE[kind]().save(tmp_path / "i")  # noqa: F821
    with open_index(tmp_path / "i", writable=True) as index:
        index.upsert(["a"], vectors(kind, 1))  # noqa: F821
        def half(fd, data, write=os.write): write(fd, bytes(data[:10])); raise OSError(28, "No space left on device")
        with monkeypatch.context() as m:
            m.setattr(os, "write", half)
            refuses(lambda: index.upsert(["b"], vectors(kind, 1)), "没有生效")  # noqa: F821
            refuses(lambda: index.delete("a"), "没有生效")
        assert list(index) == ["a"]
        index.upsert(["c"], vectors(kind, 1))  # noqa: F821
        assert set(load_index(tmp_path / "i")) == {"a", "c"}
    assert index._journal is None and Journal(tmp_path / "x.jsonl").size == 0


# ---------------------------------------------------------------- 从前的文件夹

@pytest.mark.parametrize("kind", ["flat", "tokens", "pooled", "centroid", "binary", "int8"])
def test_format_1_still_opens(kind, tmp_path):
    "从前存的：没有 files、没有代、没有 ids.npy。打得开，改得了，存一次就成了新的。"
    new = built(kind)
    new.save(tmp_path)
    m = json.loads((tmp_path / "manifest.json").read_text())
    old = {k: v for k, v in m.items() if k not in ("files", "generation", "normalized", "dtype")} | {"format": 1, "model": "m"}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    (tmp_path / "ids.npy").unlink()
    assert load_index(tmp_path).ids == new.ids and load_index(tmp_path).info == {"model": "m"} and answers(load_index(tmp_path), kind) == answers(new, kind)
    (tmp_path / "items.jsonl").write_bytes((tmp_path / "items.jsonl").read_bytes().rstrip(b"\n"))
    with open_index(tmp_path, writable=True) as index: assert index.delete("商品1") == 1; index.save()
    assert set(load_index(tmp_path, verify=True)) == set(new) - {"商品1"} and all(".2." in p.name for p in tmp_path.iterdir() if p.name not in (".lock", "manifest.json"))


def test_other_kinds_of_stored_are_one_class(tmp_path):
    "换一种索引存进同一个文件夹：旧的那种的文件不留下。"
    for kind in ("hnsw", "tokens", "int8", "centroid", "flat"): built(kind).save(tmp_path / "i")
    m = json.loads((tmp_path / "i/manifest.json").read_text())
    assert {p.name for p in (tmp_path / "i").iterdir()} == {".lock", "manifest.json", *(f["name"] for f in m["files"].values())}
    assert isinstance(load_index(tmp_path / "i", verify=True), Stored) and m["generation"] == 5


def test_opening_reads_almost_nothing(tmp_path):
    "映射：打开 40 MB 的索引，按 id 取一样，常驻内存几乎不长。"
    from vembed_nb.search.index import VectorIndex

    index = VectorIndex(256)
    index.add(names(40_000), torch.randn(40_000, 256), [{"price": i} for i in range(40_000)])
    index.save(tmp_path / "i")
    code = """
rss = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
a = rss(); index = open_index(sys.argv[1]); print(rss() - a, len(index), index.ids[39_999], index.get("商品777")["meta"]["price"])"""
    if not Path("/proc/self/statm").exists(): pytest.skip("没有 /proc")
    mb, n, name, price = run(code, tmp_path / "i").communicate()[0].split()
    assert float(mb) < 14 and (n, name, price) == ("40000", "商品39999", "777"), mb
