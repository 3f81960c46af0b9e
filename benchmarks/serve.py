"""服务的测量：攒批与一个一个算，32 个客户，同一次运行里轮流；p50、p99、QPS；长时间负载下的内存。写 assets/results/serve.json。

用法：python benchmarks/serve.py [--seconds 8] [--rounds 3] [--soak 600] [--only compare|soak|writes]
服务在一个进程里，客户在另一个进程里（一个事件循环、一条连接一个客户），两个核由它们分；机器还有别人在用，所以看的是轮流跑的两边之比，QPS 和时延是当时的值。"""
import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "assets" / "results" / "serve.json"
CODE = "import sys, json; from vembed_nb.ship.server import ServeConfig, serve; serve(ServeConfig(**json.loads(sys.argv[1])))"
WORDS = ("红色的 蓝色的 绿色的 黄色的 白色的 带条纹的 圆点的 小号的 大号的 两个 三个".split(), "杯子 沙发 台灯 雨伞 书包 帽子 椅子 钟 鞋 花瓶".split())


def shop(folder):
    "一千张图的小店和它的索引。"
    from vembed_nb.data.read import read_corpus
    from vembed_nb.models.load import load_encoder
    from vembed_nb.search.searcher import build_index
    from vembed_nb.toyshop import write_toyshop

    write_toyshop(folder / "shop", n_train=3, n_val=3, n_test=1000, n_queries=50, world="B", workers=1)
    build_index(load_encoder("tiny-clip"), read_corpus(folder / "shop" / "corpus.jsonl"), folder / "shop", "tiny-clip", folder / "index")
    return sorted((folder / "shop").rglob("*.jpg"))[:256]


@contextmanager
def server(folder, **settings):
    "一个服务进程；给出 (pid, 端口)。"
    settings = {"index": str(folder / "index"), "port": 0, "threads": 1, "cache_size": 2000, "max_queue": 4096, **settings}
    log = open(folder / "log.jsonl", "w+", encoding="utf-8")
    p = subprocess.Popen([sys.executable, "-c", CODE, json.dumps(settings)], stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            if m := re.search(r'"listening".*"port": (\d+)', (folder / "log.jsonl").read_text(encoding="utf-8")): break
            time.sleep(.1)
        yield p.pid, int(m[1])
    finally:
        p.terminate()
        p.wait(60)
        log.close()


def request(path, body, kind="application/json"):
    return b"POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n" % (path.encode(), kind.encode(), len(body)) + body


def texts(seed):
    "没完没了的、各不相同的查询。"
    rng, n = random.Random(seed), 0
    while True:
        n += 1
        yield request("/search", json.dumps({"text": f"{rng.choice(WORDS[0])}{rng.choice(WORDS[0])}{rng.choice(WORDS[1])} {seed}-{n}", "k": 10}).encode())


def repeats(seed):
    "一百个热门查询。"
    rng = random.Random(seed)
    while True: yield request("/search", json.dumps({"text": f"{rng.choice(WORDS[0])}{rng.choice(WORDS[1])}", "k": 10}).encode())


def images(seed, pictures):
    "图搜图，每张图改几个字节的注释，所以不会命中缓存。"
    rng, n = random.Random(seed), 0
    while True:
        n += 1
        data = rng.choice(pictures).read_bytes()
        note = f"{seed}-{n}".encode()
        data = data[:2] + b"\xff\xfe" + (len(note) + 2).to_bytes(2, "big") + note + data[2:]  # JPEG 的注释段
        body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n' + data + b"\r\n--x--\r\n"
        yield request("/search/image", body, "multipart/form-data; boundary=x")


async def client(port, source, until, out):
    "一个客户：问完一个再问下一个。"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        while time.perf_counter() < until:
            data, start = next(source), time.perf_counter()
            writer.write(data)
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
            out.append((time.perf_counter() - start, int(head[9:12])))
    finally: writer.close()


def drive(port, kind, clients, seconds, seed, pictures):
    "在自己的进程里开 clients 个客户；(秒数, [用时], 不是 200 的个数, 这个进程用的 CPU 秒数)。"
    make = {"texts": texts, "repeats": repeats, "images": lambda s: images(s, pictures)}[kind]
    async def main():
        out, start = [], time.perf_counter()
        await asyncio.gather(*(client(port, make(seed * 1000 + n), start + seconds, out) for n in range(clients)))
        return time.perf_counter() - start, [t for t, _ in out], sum(s != 200 for _, s in out), time.process_time()
    return asyncio.run(main())


def cpu_of(pid):
    "一个进程用掉的 CPU 秒数。"
    row = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()
    return (int(row[11]) + int(row[12])) / os.sysconf("SC_CLK_TCK")


def rss(pid): return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(encoding="ascii"))[1]) / 1024


def measure(pool, pid, port, kind, clients, seconds, seed, pictures):
    "一段：QPS、时延、服务每个请求用的 CPU。"
    before = cpu_of(pid)
    wall, times, failed, _ = pool.apply(drive, (port, kind, clients, seconds, seed, pictures))
    times.sort()
    at = lambda q: times[min(len(times) - 1, int(q * len(times)))] * 1000
    return {"qps": len(times) / wall, "p50_ms": at(.5), "p99_ms": at(.99), "requests": len(times), "failed": failed, "server_cpu_ms_per_request": (cpu_of(pid) - before) / len(times) * 1000}


def compare(folder, pictures, clients, seconds, rounds):
    "攒批（max_batch=32）与一个一个算（max_batch=1），轮流，取各自的中位数。"
    out = {}
    with multiprocessing.get_context("spawn").Pool(1) as pool, server(folder, max_batch=1) as one, server(folder, max_batch=32) as many:
        for kind in ("texts", "images", "repeats"):
            rows = {"one_by_one": [], "batched": []}
            for who in (one, many): measure(pool, *who, kind, 8, 2, 999, pictures)  # 热身
            for n in range(rounds):
                for name, who in (("one_by_one", one), ("batched", many)): rows[name].append(measure(pool, *who, kind, clients, seconds, n, pictures))
            row = {name: {k: statistics.median(r[k] for r in rs) if k != "failed" else sum(r[k] for r in rs) for k in rs[0]} for name, rs in rows.items()}
            row["qps_ratio"] = statistics.median(b["qps"] / a["qps"] for a, b in zip(rows["one_by_one"], rows["batched"]))
            row["cpu_ratio"] = row["one_by_one"]["server_cpu_ms_per_request"] / row["batched"]["server_cpu_ms_per_request"]
            row["rounds"] = [[round(r["qps"], 1) for r in rs] for rs in rows.values()]
            row["single_client"] = {name: measure(pool, *who, kind, 1, max(2, seconds / 2), 77, pictures) for name, who in (("one_by_one", one), ("batched", many))}
            out[kind] = row
            print(f"{kind}：一个一个 {row['one_by_one']['qps']:.0f} QPS（p99 {row['one_by_one']['p99_ms']:.0f} ms），攒批 {row['batched']['qps']:.0f} QPS（p50 {row['batched']['p50_ms']:.0f}、p99 {row['batched']['p99_ms']:.0f} ms），{row['qps_ratio']:.2f} 倍，CPU {row['cpu_ratio']:.2f} 倍", flush=True)
    return out


def soak(folder, pictures, seconds, clients=8, writes=20, compact=2 * 2**20):
    "长时间的负载：文字、图、热门词轮流，同时上架下架；每隔一会儿记一次 RSS。"
    samples, start, done, failed = [], time.time(), 0, 0
    with multiprocessing.get_context("spawn").Pool(1) as pool, server(folder, writable=True, compact_bytes=compact) as (pid, port):
        n = 0
        while time.time() - start < seconds:
            kind = ("texts", "images", "repeats")[n % 3]
            wall, times, wrong, _ = pool.apply(drive, (port, kind, clients, 5, 10_000 + n, pictures))
            done, failed, n = done + len(times), failed + wrong, n + 1
            for i in range(writes):  # 上架几样，再下架，货架的大小不变
                item = json.dumps({"items": [{"id": f"新 {i}", "text": f"新品 {n}-{i}", "meta": {"n": n}}]}).encode()
                urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/items", item, {"Content-Type": "application/json"})).read()
            urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/items?" + "&".join(f"id=%E6%96%B0%20{i}" for i in range(writes)), method="DELETE")).read()
            samples.append((round(time.time() - start, 1), round(rss(pid), 1)))
    settled = [s for s in samples if s[0] >= .3 * seconds] or samples
    x, y = [s[0] for s in settled], [s[1] for s in settled]
    slope = statistics.linear_regression(x, y).slope * 60 if len(x) > 2 else 0.0
    third = max(1, len(settled) // 3)
    row = {"seconds": round(time.time() - start), "clients": clients, "writes_per_round": writes, "compact_bytes": compact, "requests": done, "failed": failed, "rss_mb": samples, "slope_mb_per_minute_after_30_percent": slope,
           "rss_mb_first_third": statistics.mean(y[:third]), "rss_mb_last_third": statistics.mean(y[-third:])}
    print(f"{row['seconds']} 秒，{done} 个请求，{failed} 个失败；RSS {samples[0][1]} → {samples[-1][1]} MB，稳定之后每分钟 {slope:+.2f} MB", flush=True)
    return row


def main():
    from vembed_nb.core import machine, versions, write_json

    a = argparse.ArgumentParser()
    a.add_argument("--seconds", type=float, default=8)
    a.add_argument("--rounds", type=int, default=3)
    a.add_argument("--clients", type=int, default=32)
    a.add_argument("--soak", type=float, default=600)
    a.add_argument("--only", default="", choices=["", "compare", "soak", "writes"])
    a = a.parse_args()
    found = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    with tempfile.TemporaryDirectory() as d:
        pictures = shop(Path(d))
        load = os.getloadavg()
        if a.only in ("", "compare"): found["compare"] = compare(Path(d), pictures, a.clients, a.seconds, a.rounds) | {"clients": a.clients, "seconds": a.seconds, "load_average": load}
        if a.only in ("", "soak"): found["soak"] = soak(Path(d), pictures, a.soak) | {"load_average": load}
        if a.only in ("", "writes"): found["soak_writes"] = soak(Path(d), pictures, a.soak / 4, writes=100, compact=2**19) | {"load_average": load}  # 写得多、整理得勤
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from race import rounded
    found |= {"model": "tiny-clip", "index": "1000 张图，flat", "machine": machine(), "versions": versions(["fastapi", "uvicorn", "torch"]), "note": "服务和客户在同一台两个核的机器上，机器由几个人合用：比值取自轮流跑的同一轮，QPS 与时延是当时的值"}
    write_json(OUT, rounded(found, 3))


if __name__ == "__main__": main()
