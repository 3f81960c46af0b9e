"""一百万个 256 维向量：平铺、FAISS、打开、过滤、写日志，各要多久；写 assets/results/index.json。
用法（约十几分钟，内存约 6 GB，盘约 6 GB）：python benchmarks/index.py
向量是假的，按真的嵌入的样子造：3,000 个类，每个类在自己的 32 维子空间里散开，再加一点各向同性的噪声。真的数据不同，召回与速度的比例也不同；用 `VectorIndex.tune` 在自己的查询上量。
平铺与 faiss Flat：轮流跑（race.py），批大小 1 和 256。近似的：build 用 FAISS 自己的多线程，只建一次；每档 nprobe / efSearch 的召回对照精确的前 10 名，速度与平铺在同一段时间里交替地量，取各自最快的一次。
机器是和别人共用的：看比例，不看秒数；others_cpu 是量的时候别的程序占了几个核。"""
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("VEMBED_PROGRESS", "0")
import faiss
import numpy as np
import race
import torch

from vembed_nb.core import machine, versions, write_json
from vembed_nb.search.index import LADDERS, VectorIndex, flat_topk, load_index
from vembed_nb.search.store import Growing
from vembed_nb.vectors import normalize

ROOT = Path(__file__).resolve().parents[1]
result_file = ROOT/"assets/results/index.json"
N, D, K = int(os.environ.get("VEMBED_INDEX_N", 1_000_000)), 256, 10
KINDS = os.environ.get("VEMBED_INDEX_KINDS", "IVF1024,Flat;HNSW32;IVF1024,SQ8;SQ8;PQ64np;BFlat").split(";")


def vectors(n, seed, classes=3000, rank=32):
    g = torch.Generator().manual_seed(42)
    centers, spread = torch.randn(classes, D, generator=g), torch.randn(classes, rank, D, generator=g) / rank ** .5
    g, out = torch.Generator().manual_seed(seed), torch.empty(n, D)
    which = torch.randint(classes, (n,), generator=g).sort().values
    sizes = torch.bincount(which, minlength=classes).tolist()
    for c, part in enumerate(out.split(sizes)): part.copy_(centers[c] + 1.2 * torch.randn(sizes[c], rank, generator=g) @ spread[c] + .3 * torch.randn(sizes[c], D, generator=g))
    return normalize(out[torch.randperm(n, generator=g)])


def recall(got, truth): return sum(len(set(a) & set(b)) for a, b in zip(got.tolist(), truth.tolist())) / truth.numel()


def metas(n):
    g = np.random.default_rng(0)
    return [{"category": f"类{c}", "price": float(p), "title": f"第 {i} 件"} for i, (c, p) in enumerate(zip(g.integers(0, 50, n), g.integers(1, 5000, n) / 10))]


def flat(x, q):
    "平铺与 faiss Flat。"
    theirs, rows = faiss.IndexFlatIP(D), []
    theirs.add(x.numpy())
    for size in (1, 256):
        ask = q[:size]
        cases = {"本库": race.Case(lambda ask=ask: flat_topk(ask, [x], K)[0]), "faiss Flat": race.Case(lambda ask=ask: torch.from_numpy(theirs.search(ask.numpy(), K)[0]))}
        rows.append(race.race(f"平铺，{len(x):,} × {D}，一次 {size} 个查询", cases, "faiss Flat", seconds=30, patience=20, n=len(x), queries=size))
    return rows


def fastest(run, times=3):
    runs = []
    for _ in range(times): runs.append(race.clocked(run))
    return min(r[0] for r in runs), min(r[2] for r in runs)


def approximate(kind, x, q, truth, base, folder, built):
    "一种近似索引：建、每一档的召回和速度（与平铺交替）、存下的字节、打开的时间。"
    index = VectorIndex(D, kind)
    index._array, index._n, index._live = Growing(x.numpy()), len(x), torch.ones(len(x), dtype=torch.bool)
    start, cpu = time.perf_counter(), time.process_time()
    built[kind] = index.build()
    row = dict(kind=kind, build_s=time.perf_counter() - start, build_cpu_s=time.process_time() - cpu, steps=[])
    print(f"{kind}：建了 {row['build_s']:.0f} s", flush=True)
    name = "nprobe" if "IVF" in kind else "efSearch" if "HNSW" in kind else None
    for value in LADDERS[name] if name else (None,):
        if name: index._tell(index._faiss, {name: value})
        few = q if name else q[:100]
        (s, busy), (f, busy2) = fastest(lambda: index.search(few, K)), fastest(lambda: flat_topk(q[:256], [x], K), 1)
        base.append(256 / f)
        row["steps"].append({name or "step": value, "recall": recall(index.search(few, K)[1], truth[:len(few)]), "qps": len(few) / s, "flat_qps": 256 / f, "others_cpu": max(busy, busy2)})
        print("  ", row["steps"][-1], flush=True)
        if row["steps"][-1]["recall"] >= .99: break
    path = folder/"one.faiss"
    (faiss.write_index_binary if kind.startswith("B") else faiss.write_index)(index._faiss, str(path))
    row["bytes_per_vector"] = path.stat().st_size / len(x)
    path.unlink()
    if name is None: return row
    row["first_at_95"] = next((s for s in row["steps"] if s["recall"] >= .95), None)
    return row


OPEN = """
import sys, time, resource, torch
from vembed_nb.search.index import load_index
import faiss
q = torch.load(sys.argv[2])
rss = lambda: int(open('/proc/self/statm').read().split()[1]) * 4096 / 1e6
before, t = rss(), time.perf_counter(); index = load_index(sys.argv[1]); opened, after = time.perf_counter() - t, rss()
t = time.perf_counter(); hits = index.find(q[:1], 10); first = time.perf_counter() - t
t = time.perf_counter(); n = int(index.mask({"category": "类7", "price": {"<": 100}}).sum()); mask1 = time.perf_counter() - t
t = time.perf_counter(); index.mask({"category": "类8", "price": {"<": 50}}); mask2 = time.perf_counter() - t
t = time.perf_counter(); index.search(q[:1], 10, {"category": "类7", "price": {"<": 100}}); filtered = time.perf_counter() - t
print(dict(open_s=opened, open_mb=after - before, first_find_s=first, matching=n, first_mask_s=mask1, next_mask_s=mask2, filtered_search_s=filtered))
"""


def folders(x, q, folder, built):
    "存、打开（新的进程，文件还在系统的缓存里）、过滤。"
    out = []
    torch.save(q, folder/"q.pt")
    for kind in ("flat", "IVF1024,Flat", "HNSW32"):
        if kind != "flat" and kind not in KINDS: continue
        index = VectorIndex(D, kind, params={"nprobe": 32} if "IVF" in kind else {"efSearch": 64} if "HNSW" in kind else None)
        index.add([f"商品{i:07d}" for i in range(len(x))], x, metas(len(x)))
        if kind != "flat": index._faiss, index._indexed = built[kind], len(x)
        start = time.perf_counter(); index.save(folder/"index"); save = time.perf_counter() - start
        del index
        runs = [eval(subprocess.run([sys.executable, "-c", OPEN, folder/"index", folder/"q.pt"], capture_output=True, text=True, check=True).stdout) for _ in range(3)]
        out.append(dict(kind=kind, save_s=save, bytes=sum(p.stat().st_size for p in (folder/"index").rglob("*") if p.is_file()), **min(runs, key=lambda r: r["open_s"])))
        print(out[-1], flush=True)
    return out


def journal(folder):
    "一次一样、每次都落盘的 upsert。"
    VectorIndex(D).save(folder/"log")
    v, seconds = vectors(300, 5), []
    with VectorIndex.open(folder/"log", writable=True) as index:
        for i in range(300): start = time.perf_counter(); index.upsert([str(i)], v[i:i + 1], [{"price": i}]); seconds.append(time.perf_counter() - start)
        start = time.perf_counter(); index.upsert([f"批{i}" for i in range(300)], v, [{} for _ in range(300)]); batch = time.perf_counter() - start
    start = time.perf_counter(); n = len(load_index(folder/"log")); replay = time.perf_counter() - start
    assert n == 600
    return dict(p50_ms=1e3 * float(np.median(seconds)), p99_ms=1e3 * float(np.quantile(seconds, .99)), batch_of_300_ms=1e3 * batch, replay_600_s=replay)


def milvus(folder, n=20_000):
    "Milvus Lite，两万个：写、查、过滤，与平铺同样的结果。"
    from vembed_nb.search.index import make_index
    x, q, m, rows = vectors(n, 7), vectors(100, 8), metas(n), []
    for kind in ("flat", f"milvus:{folder}/m.db"):
        index = make_index(D, kind)
        start = time.perf_counter(); index.add([str(i) for i in range(n)], x, m); add = time.perf_counter() - start
        s1 = fastest(lambda: [index.search(b, K) for b in q.split(1)])[0]
        s2 = fastest(lambda: index.search(q, K))[0]
        where = {"category": "类7", "price": {"<": 100}}
        s3 = fastest(lambda: [index.search(b, K, where) for b in q[:10].split(1)])[0]
        found = [[i for i, _, _ in r] for r in index.find(q, K)], [[i for i, _, _ in r] for r in index.find(q[:10], K, where)]
        rows.append((found, dict(kind=kind.split(":")[0], n=n, add_s=add, one_by_one_qps=100 / s1, batch_100_qps=100 / s2, filtered_qps=10 / s3)))
        print(rows[-1][1], flush=True)
    same = np.mean([len(set(a) & set(b)) / len(a) for f, g in zip(rows[0][0], rows[1][0]) for a, b in zip(f, g)])
    return dict(same_top10=float(same), contenders=[r for _, r in rows])


def goal(what, value, sign, limit): return dict(what=what, value=value, goal=f"{sign} {limit}", met=bool(value <= limit if sign == "≤" else value >= limit))


def summary(out, base):
    "到现在为止的结论。"
    flat_qps = max(base + [256 / r["contenders"]["本库"]["min_s"] for r in out["races"] if r["queries"] == 256])
    ratio = lambda i: out["races"][i]["contenders"]["本库"]["ratio"]
    goals = [goal("平铺与 faiss Flat 之比，一次 256 个查询", ratio(1), "≤", 1.1), goal("平铺与 faiss Flat 之比，一次 1 个查询", ratio(0), "≤", 1.1)]
    if good := [a for a in out["approximate"] if a.get("first_at_95")]:
        best = max(good, key=lambda a: a["first_at_95"]["qps"])
        goals.append(goal(f"{best['kind']} 在 recall@10 ≥ 0.95 时的 QPS 是平铺（最快的一次）的几倍", best["first_at_95"]["qps"] / flat_qps, "≥", 10))
    if "folders" in out: goals.append(goal("打开（秒，映射，三种里最慢的）", max(f["open_s"] for f in out["folders"]), "≤", 1))
    return dict(goals=goals, flat_qps=flat_qps, machine=machine(), threads=race.THREADS, versions=versions(["torch", "faiss-cpu", "numpy", "pymilvus", "milvus-lite"]), peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, note=__doc__.split("\n机器")[1].strip())


def main():
    faiss.omp_set_num_threads(race.THREADS)
    x, q = vectors(N, 1), vectors(1000, 2)
    with tempfile.TemporaryDirectory() as d:
        d, base, built = Path(d), [], {}
        out = dict(n=N, dim=D, k=K, races=flat(x, q), journal=journal(d))
        truth = flat_topk(q, [x], K)[1]
        near = flat_topk(q, [x], 100)[0]
        out["data"] = dict(mean_top1=float(near[:, 0].mean()), mean_top10=float(near[:, 9].mean()), mean_top100=float(near[:, 99].mean()), mean_random=float((q[:100] @ x[:10000].T).mean()))
        out["approximate"] = []
        for kind in KINDS:
            out["approximate"].append(approximate(kind, x, q, truth, base, d, built))
            out |= summary(out, base)
            write_json(result_file, race.rounded(out))
        out["folders"] = folders(x, q, d, built)
        out |= summary(out, base)
        write_json(result_file, race.rounded(out))
        out["milvus_lite"] = milvus(d)
    out |= summary(out, base)
    write_json(result_file, race.rounded(out))
    print(json.dumps(out["goals"], ensure_ascii=False, indent=1))


if __name__ == "__main__":
    race.start()
    main()
