"""服务：攒批不串味，坏请求挡在门外，断电、断缓存、断索引、换模型都不出错。只用本机的端口，每个请求都有时限。"""
import asyncio
import base64
import http.client
import io
import json
import logging
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

for package in ("fastapi", "uvicorn", "prometheus_client", "multipart"): pytest.importorskip(package, reason=f"没有装 {package}：pip install 'vembed-nb[serve]'")

from vembed_nb.core import VembedError
from vembed_nb.data.read import read_corpus
from vembed_nb.data.tasks import Item
from vembed_nb.models.load import load_encoder
from vembed_nb.search.index import VectorIndex
from vembed_nb.search.searcher import Searcher, build_index, open_index
from vembed_nb.ship import server
from vembed_nb.ship.server import Batcher, Buckets, LOG, Refusal, ServeConfig, VectorCache, clean_id, clean_meta, clean_where

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "assets" / "deploy"


# 一、开门
def build(folder, micro, shop):
    ids, items, metas = read_corpus(shop / "corpus.jsonl")
    metas = [{**m, "price": n, "category": "杯子" if n % 3 else "沙发"} for n, m in enumerate(metas)]
    build_index(load_encoder(micro), (ids, items, metas), shop, micro, folder)
    return folder


@pytest.fixture
def index(tmp_path, micro, shop): return build(tmp_path / "shelf" / "v1", micro, shop)


class Client:
    "一条连接，会接着用。"
    def __init__(self, port): self.port, self.http = port, http.client.HTTPConnection("127.0.0.1", port, timeout=20)

    def __call__(self, method, path, body=None, headers=(), kind="application/json"):
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        try:
            self.http.request(method, path, data, {"Content-Type": kind, **dict(headers)})
            r = self.http.getresponse()
            raw = r.read()
        except (http.client.HTTPException, OSError):
            self.http.close()
            raise
        is_json = r.headers.get("content-type", "").startswith("application/json")
        return SimpleNamespace(status=r.status, headers=r.headers, raw=raw, json=json.loads(raw) if is_json else None)

    def search(self, text, k=5, **options): return self("POST", "/search", {"text": text, "k": k, **options})
    def upload(self, path, **parts): return self("POST", path, *form(**parts))


def form(_boundary="边界".encode().hex(), **parts):
    "表单：字节是文件，别的是文字。"
    out = b""
    for name, value in parts.items():
        extra = '; filename="a.png"\r\nContent-Type: image/png' if isinstance(value, bytes) else ""
        out += f'--{_boundary}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + (value if isinstance(value, bytes) else str(value).encode()) + b"\r\n"
    return out + f"--{_boundary}--\r\n".encode(), (), f"multipart/form-data; boundary={_boundary}"


def running(index, cache=None, searcher=None, read_timeout=5.0, **options):
    "在另一个线程里开门；给出 (服务, 端口)。"
    return server.running(ServeConfig(index=str(index), port=0, read_timeout=read_timeout, **{"drain": 10, **options}), searcher, cache)


def png(color="red", size=(32, 32), kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, kind)
    return out.getvalue()


def huge_png(w, h):
    "文件头说自己有 w×h 像素，里面几乎没有数据。"
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# 二、回答对不对
def test_concurrent_answers_equal_one_by_one(index, micro, shop):
    "32 个客户同时问：各拿各的，与 Searcher 一个一个算的相同，而且真的攒了批。"
    searcher = Searcher(index, load_encoder(micro), str(shop))
    asks = [(f"{'红蓝绿黄'[n % 4]}色的第 {n} 件", 1 + n % 7, [None, {"category": "沙发"}, {"price": {"<": 20}}][n % 3]) for n in range(96)]
    want = [searcher.search(t, k, where=w) for t, k, w in asks]
    with running(index) as (service, port):
        local = threading.local()
        def one(a):
            if not hasattr(local, "client"): local.client = Client(port)
            return local.client.search(a[0], a[1], where=a[2])
        with ThreadPoolExecutor(32) as pool: got = list(pool.map(one, asks))
        for r, h in zip(got, want):
            assert r.status == 200 and [x["id"] for x in r.json["hits"]] == h.ids and [x["score"] for x in r.json["hits"]] == pytest.approx(h.scores, abs=1e-4)
        assert max(service.batcher.sizes) > 4
        again = Client(port).search(*asks[0][:2])
        assert again.json["stages"][1]["cached"] and again.json["hits"] == got[0].json["hits"]


def test_every_route(index, micro, shop):
    encoder = load_encoder(micro)
    searcher = Searcher(index, encoder, str(shop))
    data = (shop / "images" / "03.png").read_bytes()
    with running(index, writable=True) as (service, port):
        ask = Client(port)
        r = ask.upload("/search/image", file=data, k=3)
        assert r.status == 200 and r.json["hits"][0]["id"] == "images/03.png" and r.json["hits"][0]["score"] > .999 and len(r.json["hits"]) == 3
        r = ask.upload("/search/composed", file=data, text="换成蓝色", k=2, where='{"price": {">": 5}}', unique="category")
        want = searcher.search(Item("换成蓝色", Image.open(io.BytesIO(data))), 2, where={"price": {">": 5}}, unique="category")
        assert [h["id"] for h in r.json["hits"]] == want.ids and len(want) == 2
        r = ask("POST", "/encode", {"items": [{"text": "红"}, {"image": base64.b64encode(data).decode()}, {"text": "红", "image": base64.b64encode(data).decode()}], "role": "document"})
        want = encoder.encode([Item("红"), Item(image="images/03.png"), Item("红", "images/03.png")], image_root=shop)
        assert np.allclose(r.json["vectors"], want, atol=1e-5) and r.json["dim"] == encoder.dim and r.json["model"] == searcher.fingerprint
        # 货架
        r = ask("POST", "/items", {"items": [{"id": "新", "image": base64.b64encode(png("purple")).decode(), "text": "紫", "meta": {"price": 3.5}}, {"id": "向量", "vector": [1.0] * encoder.dim}]})
        assert (r.status, r.json) == (200, {"acknowledged": 2, "new": 2})
        assert ask("GET", "/items?id=%E6%96%B0&id=none").json["items"] == [{"id": "新", "meta": {"price": 3.5, "text": "紫"}}, None]
        assert ask.search("紫", 1, where={"price": 3.5}).json["hits"][0]["id"] == "新"
        assert ask("DELETE", "/items?id=%E6%96%B0&id=none").json == {"deleted": 1}
        assert ask("GET", "/items?id=%E6%96%B0").json["items"] == [None]
        # 状态
        assert ask("GET", "/health").json["alive"] and ask("GET", "/ready").json["ready"] and ask("GET", "/ready").json["degraded"] == []
        text = ask("GET", "/metrics").raw.decode()
        assert 'vembed_requests_total{route="/search/image",status="200"} 1.0' in text and f"vembed_index_items {31.0}" in text and "process_resident_memory_bytes" in text


def test_an_empty_shelf_answers_nothing(tmp_path, micro):
    VectorIndex(16, info={"model": micro}).save(tmp_path / "empty")
    with running(tmp_path / "empty", writable=True) as (_, port):
        ask = Client(port)
        assert ask.search("红").json["hits"] == []
        ask("POST", "/items", {"items": [{"id": "a", "text": "红"}]})
        assert [h["id"] for h in ask.search("红").json["hits"]] == ["a"]


def test_rerank(index, micro, shop):
    class Backwards:
        def rerank(self, query, hits, **options):
            from dataclasses import replace
            return replace(hits, ids=hits.ids[::-1], scores=[float(n) for n in range(len(hits), 0, -1)], metas=hits.metas[::-1])
    searcher = Searcher(index, load_encoder(micro), str(shop), Backwards())
    with running(index, searcher=searcher) as (_, port):
        ask = Client(port)
        plain = [h["id"] for h in ask.search("红", 20).json["hits"]]
        r = ask.search("红", 3, rerank=True, candidates=20).json
        assert [h["id"] for h in r["hits"]] == plain[::-1][:3] and [s["name"] for s in r["stages"]] == ["排队", "编码", "召回", "重排"]
    with running(index) as (_, port): assert Client(port).search("红", rerank=True).json["error"]["code"] == "no_reranker"


# 三、坏请求
def hostile():
    "二百个坏请求：(说明, 方法, 路径, 体, 头, 种类, 准许的状态码)。"
    rng, out = random.Random(0), []
    def add(name, status, method="POST", path="/search", body=None, headers=(), kind="application/json"): out.append((name, method, path, body, headers, kind, {status} if isinstance(status, int) else set(status)))
    ok = {"text": "红"}
    for k in (-1, 0, 201, 10**9, 10**400, 1.5, "5", "'; DROP TABLE items; --", None, True, [5], {"$gt": 0}): add(f"k={str(k)[:20]}", (400, 422), body={**ok, "k": k})
    for n in (0, -5, 3, 10**6, "20", 2.5): add(f"candidates={n}", 422, body={**ok, "k": 5, "candidates": n, "rerank": True})
    for t in (None, 5, [], {}, ["红"], "", " \n", "长" * 2001, "\ud800", "a\0b", True): add(f"text={str(t)[:10]!r}", 422, body={"text": t})
    for w in ([], "price < 0", 5, {"price": {"$gt": 1}}, {"price) or (1==1": 1}, {"": 1}, {"a" * 65: 1}, {"price": None}, {"price": {"<": "a", "or": 1}}, {"price": {"<": [1]}}, {"price": {"in": 5}}, {"price": [[1]]}, {"price": {}, "x; drop": 1},
              {"category": "杯" * 300}, {"category": "\udfff"}, {"price": 10**300}, {f"k{n}": 1 for n in range(17)}, {"price": list(range(1001))}, {"price": {"<": {"a": 1}}}, {"没有的键": 1}, {"category\" in [\"": 1}, {"__proto__.x": 1}): add(f"where={str(w)[:30]}", 422, body={**ok, "where": w})
    for u in (5, "x" * 65, ["a"]): add(f"unique={str(u)[:10]}", 422, body={**ok, "unique": u})
    for extra in ({"文字": 1}, {"__class__": "x"}, {"model": "../../etc"}, {"index": "/etc"}): add(f"多出 {extra}", 422, body={**ok, **extra})
    for raw in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"text": "a", "k": Infinity}', b'{"text": "a", "where": {"price": NaN}}', b'{"text": "a", "where": {"price": 1e999}}', b'{"a":' * 5000, b'"' + b"a" * 1000, b"\0" * 100, b"<xml/>", b"text=a",
                b'{"text": "a", "k": ' + b"9" * 5000 + b"}", rng.randbytes(200), b'{"text": "a"} {"text": "b"}'): add(f"体 {raw[:12]!r}", (400, 422), body=raw)
    add("不是 JSON 的种类", (400, 415, 422), body=b'{"text": "a"}', kind="text/plain")
    add("太大的 JSON", 413, body=b'{"text": "' + b"a" * 300_000 + b'"}')
    # 图
    good = png()
    images = {"空": b"", "文字": b"hello", "截断": png(size=(64, 64), kind="JPEG")[:300], "炸弹": huge_png(60_000, 60_000), "两万见方": huge_png(20_000, 20_000), "超过上限": png(size=(1001, 1000)), "PDF": b"%PDF-1.7\n" + b"0" * 100, "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
              "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "压缩包": b"PK\x03\x04" + b"0" * 60, "随机": rng.randbytes(500), "只有头": good[:20], "坏的 PNG": good[:40] + b"\xff" * 40, "零宽": huge_png(0, 5), "GIF 头": b"GIF89a" + b"\0" * 10, "TIFF 头": b"II*\0" + b"\xff" * 30,
              "BMP 头": b"BM" + b"\xff" * 60, "WebP 头": b"RIFF\xff\xff\xff\xffWEBPVP8 " + b"\0" * 20, "AVIF 头": b"\0\0\0\x1cftypavif" + b"\0" * 40, "狭长": png(size=(4000, 1))}
    for name, data in images.items():
        add(f"图 {name}", (413, 422), path="/search/image", body=form(file=data)[0], kind=form()[2])
        add(f"编码图 {name}", (413, 422), path="/encode", body={"items": [{"image": base64.b64encode(data).decode()}]})
        add(f"上架图 {name}", (413, 422), path="/items", body={"items": [{"id": "坏图", "image": base64.b64encode(data).decode()}]})
    add("太大的图", 413, path="/search/image", body=form(file=b"\x89PNG" + b"0" * 300_000)[0], kind=form()[2])
    # 表单
    for name, parts in {"没有图": {"text": "a"}, "图是文字": {"file": "a"}, "k 是词": {"file": good, "k": "many"}, "负的 k": {"file": good, "k": -3}, "where 不是 JSON": {"file": good, "where": "price<1"}, "where 注入": {"file": good, "where": '{"a or 1": 1}'}, "多出": {"file": good, "path": "/etc/passwd"},
                        "rerank 乱写": {"file": good, "rerank": "maybe"}, "where 是一列": {"file": good, "where": "[1]"}, "where 很深": {"file": good, "where": "[" * 50_000}}.items():
        add(f"表单 {name}", (400, 422), path="/search/image", body=form(**parts)[0], kind=form()[2])
    add("组合没有文字", 422, path="/search/composed", body=form(file=good)[0], kind=form()[2])
    add("没有边界", 400, path="/search/image", body=form(file=good)[0], kind="multipart/form-data")
    add("边界不对", (400, 422), path="/search/image", body=form(file=good)[0], kind="multipart/form-data; boundary=x")
    add("一百个字段", 400, path="/search/image", body=form(**{f"f{n}": "a" for n in range(100)})[0], kind=form()[2])
    add("不是表单", 415, path="/search/image", body=good, kind="image/png")
    # 编码与货架
    for items in ([], [{}], [{"text": "a"}] * 9, "a", [{"image": "不是 base64"}], [{"image": "AAAA", "path": "/etc/passwd"}], [{"text": 5}], [None]): add(f"编码 {str(items)[:20]}", 422, path="/encode", body={"items": items})
    for role in ("admin", 5, ""): add(f"角色 {role}", 422, path="/encode", body={"items": [{"text": "a"}], "role": role})
    for i in ("../../etc/passwd", "..\\..\\windows", "/etc/passwd", "~root", "C:\\x", "file:///etc/passwd", "http://x/y", "a/../../b", "", "x" * 257, "a\nb", "a\0b", "\u202egnp.exe", "\ud800"):
        add(f"id {i[:12]!r}", 422, path="/items", body={"items": [{"id": i, "text": "a"}]})
    for i in ("..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "%00", "a" * 257): add(f"下架 {i[:10]}", 422, "DELETE", f"/items?id={i}")
    add("没有 id", 422, "DELETE", "/items")
    for meta in ({"x": {"$picture": "pictures/" + "0" * 32}}, {"image": "../../etc/passwd"}, {"text": "冒充"}, {"x": "a" * 20_000}, [], "a", {"$where": "1"}): add(f"meta {str(meta)[:20]}", 422, path="/items", body={"items": [{"id": "a", "text": "a", "meta": meta}]})
    for v in ([], [1.0] * 3, [0.0] * 16, ["a"] * 16, "x", [1e39] * 16): add(f"vector {str(v)[:12]}", 422, path="/items", body={"items": [{"id": "a", "vector": v}]})
    add("重复的 id", 422, path="/items", body={"items": [{"id": "a", "text": "a"}, {"id": "a", "text": "b"}]})
    for name in ("../v1", "/etc", "..", "v9", "v1/../v1", "", 5):
        if name != "": add(f"换到 {name}", (404, 422), path="/reload", body={"index": name})
    # 地址、方法、头
    for path in ("/", "/../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/items/../../etc", "/search/", "/.env", "/admin", "/static/../../x", "//etc/passwd", "/search%00"): add(f"地址 {path}", (307, 404, 405), "GET", path)
    for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE", "FOO"): add(f"方法 {method}", 405, method, "/search")
    add("很大的头", 431, body=ok, headers={"X-Junk": "a" * 40_000})
    add("很多的头", 431, body=ok, headers={f"X-{n}": "a" * 100 for n in range(400)})
    add("坏的请求号", 422, body={"text": ""}, headers={"X-Request-Id": "a b; drop"})
    return out


RAW = {  # 不成样子的字节
    "不是 HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50 + b"\r\n\r\n", "没有版本": b"GET /\r\n\r\n", "坏的长度": b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n", "长度是词": b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Length: many\r\n\r\n",
    "没有 Host": b"GET /health HTTP/1.1\r\n\r\n", "两种长度（请求走私）": b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 50\r\n\r\nhello", "坏的分块": b"POST /search HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "头里有换行": b"GET /health HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
    "说自己有 1 TB": b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Length: 1099511627776\r\n\r\n", "头没完没了": b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"X: a\r\n" * 8000,
}


def raw(port, data, wait=8, close=False):
    "发一串字节，收到断开为止。"
    with socket.create_connection(("127.0.0.1", port), timeout=wait) as s:
        try:
            s.sendall(data)
            if close: return b""
            out = b""
            while part := s.recv(65536): out += part
        except (TimeoutError, ConnectionError): pass
        return out


def tree(*folders): return {p: (p.stat().st_size, p.stat().st_mtime_ns) for f in folders for p in Path(f).rglob("*") if p.is_file()}


def test_hostile_requests(index, tmp_path, shop, monkeypatch):
    "二百多个坏请求：都是对的 4xx 和一句 JSON；没有 5xx，什么也没有写，之后照常回答。"
    scratch = tmp_path / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    asks, wrong = hostile(), []
    with running(index, writable=True, max_upload=200_000, max_pixels=1_000_000, max_items=8, read_timeout=1.5) as (service, port):
        ask, before = Client(port), tree(tmp_path, shop, index)
        want = ask.search("红", 3).json["hits"]
        assert len(asks) >= 200
        for name, method, path, body, headers, kind, allowed in asks:
            try: r = ask(method, path, body, headers, kind)
            except (http.client.HTTPException, OSError) as e: wrong.append((name, repr(e))); ask = Client(port); continue
            if r.status not in allowed: wrong.append((name, r.status, r.raw[:200]))
            elif r.status != 307 and not (r.json and r.json["error"]["code"] and r.json["error"]["message"]): wrong.append((name, r.raw[:200]))
            elif re.search(r"Traceback|File \"|/site-packages/|vembed_nb/", r.raw.decode("utf-8", "replace")): wrong.append((name, "漏了内部的东西", r.raw[:200]))
        for name, data in RAW.items():
            out = raw(port, data)
            status = out.split(b" ", 2)[1:2]
            if status not in ([b"400"], [b"408"], [b"413"], [b"431"]) or b'{"error"' not in out: wrong.append((name, out[:200]))
        assert not wrong, wrong[:10]
        assert tree(tmp_path, shop, index) == before, "坏请求写了东西"
        assert ask.search("红", 3).json["hits"] == want and len(service.searcher.index) == 30
        text = ask("GET", "/metrics").raw.decode()
        assert not re.search(r'vembed_requests_total\{[^}]*status="5', text), re.findall(r'vembed_requests_total\{[^}]*status="5.*', text)
        assert len(set(re.findall(r'route="([^"]*)"', text))) < 15  # 编出来的路径不会撑大指标


def test_slow_clients_and_disconnects_leak_nothing(index):
    "请求头、请求体一点一点地磨：408；说一半就走：没有事。连接和线程都收回来。"
    with running(index, read_timeout=.6) as (service, port):
        ask = Client(port)
        ask.search("红")
        start, threads = time.monotonic(), threading.active_count()
        head = raw(port, b"POST /search HTTP/1.1\r\nHost: a\r\n")
        body = raw(port, b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{\"te")
        assert b" 408 " in head and b" 408 " in body and b'"too_slow"' in head + body and time.monotonic() - start < 6
        assert raw(port, b"") == b""  # 什么也不说的，断开
        for n in range(30): raw(port, [b"POST /search HT", b"POST /search HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{", b'POST /search HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 17\r\n\r\n{"text": "\xe7\xba\xa2"}  '][n % 3], close=True)
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline and sum(b":%04X" % port in line for line in Path("/proc/net/tcp").read_bytes().splitlines() if b" 01 " in line) > 2: time.sleep(.1)
        assert ask.search("红").status == 200 and threading.active_count() <= threads + 2 and not service.batcher.queue


# 四、钥匙与流量
def test_keys(index):
    with running(index, api_key="读", admin_key="写", writable=True) as (_, port):
        ask, key = Client(port), lambda k: {"X-API-Key": k.encode()}
        item = {"items": [{"id": "a", "text": "红"}]}
        for path in ("/health", "/ready", "/metrics", "/openapi.json"): assert ask("GET", path).status == 200
        for headers in ({}, key("错"), {"Authorization": b"Bearer nope"}): assert ask("POST", "/search", {"text": "红"}, headers).status == 401
        assert ask("POST", "/search", {"text": "红"}, key("读")).status == 200 and ask("POST", "/search", {"text": "红"}, {"Authorization": "Bearer 写".encode()}).status == 200
        assert ask("POST", "/items", item, key("读")).status == 403 and ask("DELETE", "/items?id=a", headers=key("读")).status == 403 and ask("POST", "/reload", {}, key("读")).status == 403
        assert ask("POST", "/items", item, key("写")).status == 200 and ask("GET", "/items?id=a", headers=key("读")).json["items"][0]["id"] == "a"
    with running(index) as (_, port): assert Client(port)("POST", "/items", item).json["error"]["code"] == "read_only"
    with pytest.raises(VembedError, match="谁都能改"): ServeConfig(index=str(index), host="0.0.0.0", writable=True)


def test_rate(index):
    with running(index, rate=2.0, burst=3) as (_, port):
        got = [Client(port).search("红") for _ in range(6)]
        assert [r.status for r in got[:3]] == [200] * 3 and 429 in [r.status for r in got] and all(int(r.headers["retry-after"]) >= 1 for r in got if r.status == 429)
        assert Client(port)("GET", "/health").status == 200


def test_buckets_forget_old_clients():
    b = Buckets(1, 1, size=10, clock=lambda: 0.0)
    for n in range(1000): assert b.take(str(n)) == 0
    assert len(b.rows) == 10 and b.take("999") > 0


# 五、攒批
def test_batcher_isolates_failures_and_refuses_when_full():
    async def main():
        gate = threading.Event()
        def run(jobs):
            gate.wait(5)
            return [ValueError(str(j)) if j == 3 else j for j in jobs]
        b = Batcher(run, max_batch=4, max_queue=6)
        first = asyncio.create_task(b.submit(0))
        await asyncio.sleep(.05)  # 第一个已经在算，后面的排着
        rest = [asyncio.create_task(b.submit(n)) for n in range(1, 7)]
        await asyncio.sleep(.05)
        with pytest.raises(Refusal) as e: await b.submit(7)
        assert e.value.status == 503 and e.value.retry
        rest[4].cancel()  # 第 5 个不等了
        await asyncio.sleep(.01)
        gate.set()
        got = await asyncio.gather(first, *rest, return_exceptions=True)
        assert [str(g) for g in got] == ["0", "1", "2", "3", "4", "", "6"] and isinstance(got[3], ValueError)
        assert b.sizes == {1: 2, 4: 1} or b.sizes == {1: 1, 4: 1, 2: 1} or sum(n * c for n, c in b.sizes.items()) == 6
        await b.close()
        with pytest.raises(Refusal): await b.submit(1)
    asyncio.run(main())


def test_a_broken_batch_fails_only_the_broken(index, monkeypatch):
    with running(index) as (service, port):
        encode = service.searcher.encoder.encode
        def sometimes(items, *args, **kw):
            if any(i.text == "坏" for i in items): raise VembedError("编码不了「坏」")
            return encode(items, *args, **kw)
        monkeypatch.setattr(service.searcher.encoder, "encode", sometimes)
        with ThreadPoolExecutor(12) as pool: got = list(pool.map(lambda n: Client(port).search("坏" if n == 5 else f"红 {n}"), range(12)))
        assert [r.status for r in got] == [422 if n == 5 else 200 for n in range(12)] and "编码不了" in got[5].json["error"]["message"]


def test_an_unexpected_error_is_500_with_a_number_and_nothing_else(index, monkeypatch, caplog):
    with running(index) as (service, port):
        def boom(*args): raise RuntimeError("机密：数据库口令")
        monkeypatch.setattr(service, "clean_k", boom)
        r = Client(port).search("红")
        assert r.status == 500 and r.json["error"]["code"] == "internal" and r.json["error"]["request_id"] == r.headers["x-request-id"] and "机密" not in r.raw.decode()


def test_a_deadline(index, monkeypatch):
    with running(index, timeout=.3) as (service, port):
        recall = service.searcher.recall
        monkeypatch.setattr(service.searcher, "recall", lambda *a: time.sleep(.8) or recall(*a))
        assert Client(port).search("红").json["error"]["code"] == "timeout"
        monkeypatch.undo()
        time.sleep(.7)
        assert Client(port).search("红").status == 200


# 六、断电
CODE = "import sys, json; from vembed_nb.ship.server import ServeConfig, serve; serve(ServeConfig(**json.loads(sys.argv[1])))"


@contextmanager
def process(**settings):
    "一个真正的服务进程；给出 (进程, 端口, 日志)。"
    p = subprocess.Popen([sys.executable, "-c", CODE, json.dumps({"port": 0, **settings})], stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = []
    try:
        for line in p.stderr:
            log.append(line)
            if '"listening"' in line: break
        else: raise AssertionError("".join(log))
        thread = threading.Thread(target=lambda: log.extend(p.stderr), daemon=True)
        thread.start()
        yield p, json.loads(log[-1])["port"], log
    finally:
        if p.poll() is None: p.kill()
        p.wait(20)
        thread.join(5)
        p.stderr.close()


def test_kill_nine_loses_nothing_acknowledged(index):
    "几个客户一边上架一边下架，半路 kill -9：答应过的都在，索引打得开。"
    acked, deleted, lock = {}, set(), threading.Lock()
    with process(index=str(index), writable=True, threads=1) as (p, port, _):
        def writer(w):
            ask, rng = Client(port), random.Random(w)
            for n in range(10_000):
                i = f"{w}-{n}"
                try:
                    if ask("POST", "/items", {"items": [{"id": i, "vector": [rng.gauss(0, 1) for _ in range(16)], "meta": {"n": n}}]}).status != 200: return
                    with lock: acked[i] = n
                    if n % 5 == 4:
                        victim = f"{w}-{n - 2}"
                        if ask("DELETE", f"/items?id={victim}").status == 200:
                            with lock: deleted.add(victim)
                except (OSError, http.client.HTTPException): return
        threads = [threading.Thread(target=writer, args=(w,)) for w in range(4)]
        for t in threads: t.start()
        deadline = time.monotonic() + 40
        while len(acked) < 120 and time.monotonic() < deadline: time.sleep(.01)
        os.kill(p.pid, signal.SIGKILL)
        for t in threads: t.join(20)
    assert len(acked) >= 40
    with VectorIndex.open(index, writable=True) as back:  # 锁也放开了
        assert not [i for i, n in acked.items() if i not in deleted and f"{i.split('-')[0]}-{int(i.split('-')[1])}" not in back and not _maybe_deleted(i, acked, deleted)]
        assert not [i for i in deleted if i in back]
        assert all(back.get(i)["meta"] == {"n": n} for i, n in acked.items() if i in back) and all(f"images/{n:02d}.png" in back for n in range(30))


def _maybe_deleted(i, acked, deleted):
    "下架发出去了、没有等到回答的那一个：可能在，可能不在。"
    w, n = i.split("-")
    return int(n) % 5 == 2 and f"{w}-{int(n) + 2}" in acked and f"{w}-{int(n) + 3}" not in acked


def test_sigterm_finishes_what_is_in_hand(index):
    "SIGTERM：手上的请求做完，退出，锁放开；日志每行是 JSON，里面没有查询的内容。"
    secret = "谁也不该在日志里看见的红色"
    with process(index=str(index), writable=True, threads=1, max_wait_ms=0) as (p, port, log):
        s = socket.create_connection(("127.0.0.1", port), timeout=20)
        body = json.dumps({"items": [{"text": f"{secret} {n}"} for n in range(60)]}).encode()
        s.sendall(b"POST /encode HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:-10])
        time.sleep(.3)
        p.send_signal(signal.SIGTERM)
        time.sleep(.1)
        s.sendall(body[-10:])
        out = b""
        while part := s.recv(65536): out += part
        s.close()
        assert b" 200 " in out.split(b"\r\n")[0] and b"vectors" in out
        assert p.wait(20) in (0, -signal.SIGTERM)
    rows = [json.loads(line) for line in log]
    assert any(r["event"] == "request" and r["status"] == 200 and r["items"] == 60 for r in rows) and secret not in "".join(log)
    VectorIndex.open(index, writable=True).close()


# 七、断缓存、断索引
@pytest.fixture
def redis_server():
    fakeredis = pytest.importorskip("fakeredis")
    server = fakeredis.FakeServer()
    return server, lambda: fakeredis.FakeAsyncRedis(server=server)


def test_redis_is_shared_and_may_die(index, micro, shop, redis_server):
    server, connect = redis_server
    with running(index, cache=VectorCache(client=connect())) as (a, port):
        ask = Client(port)
        want = ask.search("红色").json
        with running(index, cache=VectorCache(client=connect())) as (b, other):
            shared = Client(other).search("红色").json
            assert shared["stages"][1]["cached"] and shared["hits"] == want["hits"] and b.cache.counts["redis"] == 1
        assert ask("GET", "/ready").json["parts"]["cache"] == "ok"
        server.connected = False
        assert ask.search("没见过的").status == 200 and ask.search("红色").json["hits"] == want["hits"]
        r = ask("GET", "/ready")
        assert r.status == 200 and r.json["degraded"] == ["cache"] and r.json["parts"]["cache"].startswith("down")
        server.connected = True
        a.cache.until = 0
        assert ask("GET", "/ready").json["degraded"] == []


def test_a_redis_that_is_not_there(index):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        dead = s.getsockname()[1]  # 绑着而不听：连不上
        with running(index, redis=f"redis://127.0.0.1:{dead}/0") as (_, port):
            ask, start = Client(port), time.monotonic()
            assert all(ask.search(f"红 {n}").status == 200 for n in range(20)) and time.monotonic() - start < 5
            assert ask("GET", "/ready").json["degraded"] == ["cache"]
    with pytest.raises(VembedError, match="Redis"): VectorCache(url="不是地址")


def test_poisoned_cache_values_are_ignored(index, redis_server):
    server, connect = redis_server
    async def poison():
        client = connect()
        for key in await client.keys("*"): await client.set(key, [b"", b"short", np.full(16, np.nan, np.float32).tobytes(), b"x" * 4096][len(key) % 4])
    with running(index, cache=VectorCache(client=connect())) as (_, port): want = [Client(port).search(f"红 {n}").json["hits"] for n in range(4)]
    asyncio.run(poison())
    with running(index, cache=VectorCache(client=connect())) as (_, port):
        got = [Client(port).search(f"红 {n}").json for n in range(4)]
        assert [g["hits"] for g in got] == want and not any(g["stages"][1]["cached"] for g in got)


class Far:
    "一个会断的索引，像一台 Milvus 服务器。"
    def __init__(self, index): self.index, self.up, self.kind = index, True, "milvus:http://far"
    def __getattr__(self, name): return getattr(self.index, name)
    def __len__(self): return self._try(lambda: len(self.index))
    def find(self, *a, **kw): return self._try(lambda: self.index.find(*a, **kw))
    def upsert(self, *a, **kw): return self._try(lambda: self.index.upsert(*a, **kw))
    def close(self): pass

    def _try(self, f):
        if self.up: return f()
        try: raise ConnectionError("refused")
        except OSError as e: raise VembedError("Milvus 没有做成") from e


@pytest.mark.parametrize("fallback", [True, False])
def test_the_index_goes_away_and_comes_back(index, micro, shop, fallback):
    searcher = Searcher(index, load_encoder(micro), str(shop))
    searcher.index = far = Far(searcher.index)
    with running(index, searcher=searcher, writable=True, fallback=str(index) if fallback else "") as (service, port):
        ask = Client(port)
        want = ask.search("红").json["hits"]
        far.up = False
        r = ask.search("红")
        if fallback: assert r.status == 200 and r.json["degraded"] == ["index"] and r.json["hits"] == want
        else: assert r.status == 503 and r.json["error"]["code"] == "index_down" and r.headers["retry-after"]
        assert ask("POST", "/encode", {"items": [{"text": "红"}]}).status == 200
        assert ask("POST", "/items", {"items": [{"id": "a", "text": "红"}]}).json["error"]["code"] == "index_down"
        ready = ask("GET", "/ready")
        assert ready.status == (200 if fallback else 503) and ready.json["degraded"] == ["index"] and ready.json["parts"]["index"] == ("fallback" if fallback else "down")
        assert ask("GET", "/metrics").status == 200 and 'vembed_degraded{part="index"} 1.0' in ask("GET", "/metrics").raw.decode()
        assert ask.search("红", where={"没有": 1}).status in (422, 503)
        far.up, service.retry_at = True, 0
        assert ask("GET", "/ready").json["degraded"] == [] and ask.search("红").json["hits"] == want and "degraded" not in ask.search("红").json


def test_an_index_that_hangs_is_given_up(index, micro, shop):
    "连着而不回答的索引：到点就当它断了，别的请求不跟着等。"
    searcher = Searcher(index, load_encoder(micro), str(shop))
    searcher.index = far = Far(searcher.index)
    with running(index, searcher=searcher, index_timeout=.3, fallback=str(index)) as (_, port):
        ask, answer = Client(port), far._try
        want, start = ask.search("红").json["hits"], time.monotonic()
        far._try = lambda f: time.sleep(3) or answer(f)
        got = [ask.search(f"红{' ' * n}") for n in range(5)]
        assert time.monotonic() - start < 2.5 and all(r.status == 200 and r.json["degraded"] == ["index"] for r in got) and got[0].json["hits"] == want
        assert ask("GET", "/ready").json["parts"]["index"] == "fallback" and ask("GET", "/metrics").status == 200


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_a_service_on_a_compressed_index(tmp_path, micro, shop, precision):
    "压缩的索引：回答与 Searcher 相同。"
    encoder = load_encoder(micro)
    build_index(encoder, read_corpus(shop / "corpus.jsonl"), shop, micro, tmp_path / "q", precision=precision)
    want = Searcher(tmp_path / "q").search("红色的", 5)
    with running(tmp_path / "q") as (_, port):
        got = Client(port).search("红色的", 5).json["hits"]
        assert [h["id"] for h in got] == want.ids and [h["score"] for h in got] == pytest.approx(want.scores, abs=1e-5)


def test_a_service_with_a_vector_per_token(tmp_path, shop):
    "每个 token 一个向量的模型：攒批、缓存、编码都和一个一个算的相同；直接给一个 vector 拒绝。"
    corpus = tuple(x[:8] for x in read_corpus(shop / "corpus.jsonl"))
    encoder = load_encoder("tiny-colqwen2")
    build_index(encoder, corpus, shop, "tiny-colqwen2", tmp_path / "late")
    searcher = Searcher(tmp_path / "late", encoder)
    asks = ["红色的杯子", "蓝", "一只很大很大的绿色的沙发 第 3 件"]
    with running(tmp_path / "late") as (service, port):
        with ThreadPoolExecutor(3) as pool: got = list(pool.map(lambda t: Client(port).search(t, 4).json, asks))
        for r, t in zip(got, asks):
            want = searcher.search(t, 4)
            assert [h["id"] for h in r["hits"]] == want.ids and [h["score"] for h in r["hits"]] == pytest.approx(want.scores, abs=1e-3)
        again = Client(port).search(asks[0], 4).json
        assert again["stages"][1]["cached"] and again["hits"] == got[0]["hits"]
        r = Client(port)("POST", "/encode", {"items": [{"text": t} for t in asks], "role": "query"}).json
        want = encoder.encode(asks, role="query")
        assert r["dim"] == encoder.dim and [len(v) for v in r["vectors"]] == want.mask.sum(1).tolist()
        assert all(np.allclose(v, w[m], atol=1e-4) for v, w, m in zip(r["vectors"], want.vectors, want.mask))
        assert Client(port)("GET", "/ready").json["ready"]


@pytest.mark.parametrize("model,options", [("micro", {"precision": "binary"}), ("tiny-colqwen2", {"coarse": "pooled"})])
def test_every_kind_of_index_can_be_written(tmp_path, shop, micro, model, options):
    "压缩的、每个 token 一个向量的，也能上架、下架、整理；返回了就是落了盘，服务占着锁。"
    encoder = load_encoder(micro if model == "micro" else model)
    corpus = tuple(x[:8] for x in read_corpus(shop / "corpus.jsonl"))
    build_index(encoder, corpus, shop, str(micro) if model == "micro" else model, tmp_path / "i", **options)
    with running(tmp_path / "i", writable=True, compact_bytes=1) as (service, port):
        ask = Client(port)
        assert ask("POST", "/items", {"items": [{"id": "新", "text": "紫色的雨伞", "meta": {"price": 3}}]}).json == {"acknowledged": 1, "new": 1}
        assert "新" in open_index(tmp_path / "i") and ask.search("紫色的雨伞", 1, where={"price": 3}).json["hits"][0]["id"] == "新"
        with pytest.raises(VembedError, match="别的进程"): open_index(tmp_path / "i", writable=True)
        assert ask("DELETE", f"/items?id={corpus[0][0]}").json == {"deleted": 1}
        assert corpus[0][0] not in open_index(tmp_path / "i", verify=True)
    assert len(open_index(tmp_path / "i", verify=True)) == 8 and open_index(tmp_path / "i").generation > 1


def test_the_cache_is_bounded_in_bytes():
    "多向量的一张图有几百个 token：记的个数没到，字节到了也要忘。"
    async def run():
        cache = VectorCache(size=2)
        for name in "ab": await cache.put(name, torch.ones(40, 128))  # 各 20 KB，上限 32 KB
        await cache.put("b", torch.ones(1, 128))
        return await cache.get("a", 128, True), await cache.get("b", 128, True), cache.used
    a, b, used = asyncio.run(run())
    assert a is None and b.shape == (1, 128) and used == 512


def test_a_service_on_milvus_lite(tmp_path, micro, shop):
    pytest.importorskip("milvus_lite")
    ids, items, metas = read_corpus(shop / "corpus.jsonl")
    metas = [{**m, "price": n} for n, m in enumerate(metas)]
    build_index(load_encoder(micro), (ids, items, metas), shop, micro, tmp_path / "m", f"milvus:{tmp_path / 'm.db'}").close()
    flat = Searcher(build_index(load_encoder(micro), (ids, items, metas), shop), load_encoder(micro), str(shop))
    with running(tmp_path / "m") as (_, port):
        ask = Client(port)
        assert [h["id"] for h in ask.search("红", 5, where={"price": {"<": 9}}).json["hits"]] == flat.search("红", 5, where={"price": {"<": 9}}).ids
        assert ask("GET", "/ready").json["ready"]


# 八、热切换
def test_hot_swap_drops_nothing(index, micro, shop):
    "一边被查一边换索引、换模型：没有一个失败，每个回答都整个属于旧的或者新的。"
    from conftest import build_micro

    other = build_micro(index.parent.parent / "another", seed=7)
    build(index.parent / "v2", str(other), shop)
    searchers = {s.fingerprint: s for s in (Searcher(index), Searcher(index.parent / "v2"))}
    want = {f: {t: s.search(t, 5).ids for t in ("红", "蓝", "绿")} for f, s in searchers.items()}
    assert len(want) == 2 and len({tuple(w["红"]) for w in want.values()}) == 2
    with running(index, writable=True) as (service, port):
        stop, bad, seen = threading.Event(), [], set()
        def hammer(n):
            ask = Client(port)
            while not stop.is_set():
                t = "红蓝绿"[n % 3]
                r = ask.search(t, 5)
                if r.status != 200 or [h["id"] for h in r.json["hits"]] != want[r.json["model"]][t]: bad.append(r.raw[:300])
                else: seen.add(r.json["model"])
                v = ask("POST", "/encode", {"items": [{"text": t}] * 2})
                if v.status != 200: bad.append(v.raw[:300])
        threads = [threading.Thread(target=hammer, args=(n,)) for n in range(6)]
        for t in threads: t.start()
        ask = Client(port)
        for name in ("v2", "v1", "", "v2"):
            r = ask("POST", "/reload", {"index": name} if name else {})
            assert r.status == 200 and r.json["index"] == (name or "v1"), r.raw
            time.sleep(.15)
        stop.set()
        for t in threads: t.join(20)
        assert not bad, bad[:2]
        assert seen == set(want) and service.searcher.fingerprint == searchers[[f for f in want if f != Searcher(index).fingerprint][0]].fingerprint
        assert ask("POST", "/items", {"items": [{"id": "新", "text": "红"}]}).status == 200
    assert "新" in VectorIndex.load(index.parent / "v2") and "新" not in VectorIndex.load(index)


def test_a_bad_new_index_leaves_the_old_one_working(index):
    (index.parent / "broken").mkdir()
    (index.parent / "broken" / "manifest.json").write_text("{", encoding="utf-8")
    with running(index, writable=True) as (_, port):
        ask = Client(port)
        want = ask.search("红").json["hits"]
        assert ask("POST", "/reload", {"index": "broken"}).status == 422
        assert ask.search("红").json["hits"] == want and ask("POST", "/items", {"items": [{"id": "a", "text": "红"}]}).status == 200 and ask("GET", "/ready").json["ready"]


def test_the_log_is_compacted(index):
    with running(index, writable=True, compact_bytes=2000) as (service, port):
        ask = Client(port)
        for n in range(20): assert ask("POST", "/items", {"items": [{"id": f"n{n}", "text": f"红 {n}"}]}).status == 200
        for n in range(60): assert ask("POST", "/items", {"items": [{"id": "n0", "text": f"蓝 {n}"}]}).status == 200
        time.sleep(.3)
        assert sum(p.stat().st_size for p in index.glob("wal*")) <= 4000 and len(service.searcher.index) == 50
        assert len(service.searcher.index.ids) < 70 and ask("GET", "/items?id=n0").json["items"][0]["meta"]["text"] == "蓝 59"  # 换掉的六十次，内存里也去掉了
    assert len(VectorIndex.load(index)) == 50


# 九、文档与部署
def test_openapi_is_in_chinese(index):
    with running(index) as (_, port):
        doc = Client(port)("GET", "/openapi.json").json
    routes = {(p, m): d for p, ms in doc["paths"].items() for m, d in ms.items()}
    assert {p for p, _ in routes} == {"/search", "/search/image", "/search/composed", "/encode", "/items", "/reload", "/health", "/ready", "/metrics"}
    for at, d in routes.items(): assert re.search("[一-龥]", d["summary"]) and re.search("[一-龥]", d["description"]), at
    for name, schema in doc["components"]["schemas"].items():
        if name not in ("HTTPValidationError", "ValidationError"):
            for key, p in schema.get("properties", {}).items(): assert re.search("[一-龥]", p.get("description", "")) or key == "items", (name, key)


def test_deploy_files():
    "部署的文件读得懂、彼此对得上：端口、探针、环境变量的名字、镜像的阶段。"
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    stages = re.findall(r"^FROM \S+ AS (\w+)", docker, re.M)
    assert {"cpu", "gpu"} <= set(stages) and "USER" in docker and "HEALTHCHECK" in docker
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    assert {"service", "milvus", "redis", "prometheus"} <= set(compose["services"]) and compose["services"]["service"]["build"]["target"] in stages
    for s in compose["services"].values(): assert ":" in s.get("image", ":") and s.get("restart") and "latest" not in s.get("image", "")
    names = {f"VEMBED_SERVE_{n.upper()}" for n in ServeConfig.__dataclass_fields__}
    docs = [d for d in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")) if d]
    env = set(re.findall(r"VEMBED_SERVE_\w+", docker + (DEPLOY / "compose.yaml").read_text(encoding="utf-8") + (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    assert env and env <= names, env - names
    deploy = next(d for d in docs if d["kind"] == "Deployment")
    for c in deploy["spec"]["template"]["spec"]["containers"]:
        assert c["readinessProbe"]["httpGet"]["path"] == "/ready" and c["livenessProbe"]["httpGet"]["path"] == "/health" and c["resources"]["limits"] and c["resources"]["requests"] and c["securityContext"]["runAsNonRoot"]
    service = next(d for d in docs if d["kind"] == "Service")
    assert service["spec"]["selector"].items() <= deploy["spec"]["template"]["metadata"]["labels"].items()
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    assert prometheus["scrape_configs"][0]["static_configs"][0]["targets"] == ["service:8000"]
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))
    from vembed_nb.ship.server import Metrics
    real = {s.name for m in Metrics().registry.collect() for s in m.samples} | {m.name for m in Metrics().registry.collect()}
    used = {n for g in rules["groups"] for r in g["rules"] for n in re.findall(r"\b(?:vembed|process)_\w+", r["expr"])}
    assert used and all(n in real or n.removesuffix("_bucket") in real or n.removesuffix("_total") in real for n in used), used - real


def test_config_from_the_environment():
    c = ServeConfig.from_env({"VEMBED_SERVE_INDEX": "a", "VEMBED_SERVE_RATE": "2.5", "VEMBED_SERVE_WRITABLE": "1", "PATH": "x"}, max_k=7)
    assert (c.index, c.rate, c.writable, c.max_k) == ("a", 2.5, True, 7)
    for env, given, say in (({"VEMBED_SERVE_PROT": "1"}, {}, "port"), ({"VEMBED_SERVE_PORT": "abc"}, {}, "要是数"), ({"VEMBED_SERVE_WRITABLE": "maybe"}, {}, "true 或 false"), ({}, {"max_bach": 1}, "max_batch"), ({}, {"timeout": 0.0}, "正数")):
        with pytest.raises(VembedError, match=say): ServeConfig.from_env(env, **given)


def test_cleaning():
    assert clean_where({"a": 1, "类别": ["x"]}) and clean_id("商品/一.png") == "商品/一.png" and clean_meta({"a": [1, {"b": None}]})
    deep = {}
    for _ in range(2000): deep = {"a": deep}
    with pytest.raises(Refusal): clean_meta(deep)


assert LOG is logging.getLogger("vembed.serve")
