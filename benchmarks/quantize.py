"""压缩的帕累托（维数 × 精度 × 重打分），多向量索引的字节、质量、时间；写 assets/results/quantize.json 和 assets/img/quantize.png。
用法：OMP_NUM_THREADS=1 python benchmarks/quantize.py WORK        WORK 放中间结果（图、向量），再跑时接着用
      OMP_NUM_THREADS=1 python benchmarks/quantize.py WORK plaid  只补 fast-plaid 的几行；在装了它（和它要的 torch）的环境里跑
质量：玩具店世界 A，5,000 张图，1,000 个文字查询；玩具文档世界 A，300 页，区间是 95 % bootstrap。
时间：一个线程，一次一个查询，走几遍取最快，数的是本进程的 CPU 时间（机器是共用的，墙钟不可信）；只看同一次里的比。"""
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("VEMBED_PROGRESS", "0")
os.environ.setdefault("MPLBACKEND", "agg")
import numpy as np
import torch
from race import THREADS, rounded

from vembed_nb.core import machine, versions, write_json
from vembed_nb.evaluate.metrics import bootstrap_ci
from vembed_nb.search.multivector import FastPlaidIndex, MultiVectorIndex
from vembed_nb.search.quantize import QuantizedIndex, alone, ndcg, pareto
from vembed_nb.vectors import Embeddings, maxsim, normalize

ROOT = Path(__file__).resolve().parents[1]
result_file, picture = ROOT/"assets/results/quantize.json", ROOT/"assets/img/quantize.png"


def encoded(work, name, write, corpus="corpus.jsonl", records="test.jsonl", batch=64):
    "一个模型的文档向量、查询向量、正例；算过的存在 WORK 里。"
    file = work/f"{name}.pt"
    if not file.exists():
        from vembed_nb.data.read import read_corpus, read_records
        from vembed_nb.models.load import load_encoder
        root = write(work)
        (ids, items, _), rows, encoder = read_corpus(root/corpus), read_records(root/records), load_encoder(name)
        where = {i: n for n, i in enumerate(ids)}
        d, q = encoder.encode(items, batch, image_root=root), encoder.encode([r.query for r in rows], batch, image_root=root, role="query")
        parts = [(e.vectors, e.mask) if isinstance(e, Embeddings) else (e, None) for e in (d, q)]
        torch.save(dict(d=parts[0], q=parts[1], positives=[[where[p] for p in r.positive_ids] for r in rows]), file)
    z = torch.load(file)
    d, q = (Embeddings(v, m) if m is not None else v.float() for v, m in (z["d"], z["q"]))
    return d, q, z["positives"]


def shop(work):
    "玩具店，5,000 张图，1,000 个查询。"
    from vembed_nb.toyshop import write_toyshop
    if not (work/"shop/toyshop.json").exists(): write_toyshop(work/"shop", 1, 1, 5000, 1000, world="A", seed=7, size=64)
    return work/"shop"


def pages(work):
    "玩具文档，300 页，300 个查询。"
    from vembed_nb.toypages import write_toypages
    if not (work/"pages/toypages.json").exists(): write_toypages(work/"pages", 1, 1, 300, 300, world="A", seed=1)
    return work/"pages"


def at_scale(n=200_000, dim=256, queries=20):
    "20 万个成团的向量：每种存法一个查询要几毫秒，前十名与精确的重合多少。"
    g = torch.Generator().manual_seed(0)
    centers = normalize(torch.randn(2000, dim, generator=g))
    near = lambda k: normalize(centers[torch.randint(2000, (k,), generator=g)] + .9 / dim**.5 * torch.randn(k, dim, generator=g))
    d, q, names, rows, best = near(n), near(queries), [str(i) for i in range(n)], [], None
    for precision, rescore in (("float32", ""), ("float16", ""), ("int8", ""), ("binary", ""), ("binary", "self"), ("binary", "int8")):
        index = QuantizedIndex(dim, precision, rescore)
        index.add(names, d)
        at = index.search(q, 10)[1]
        best = at if best is None else best
        rows.append(dict(precision=precision, rescore=rescore, **index.nbytes(), ms=alone(index, q, 10, queries, 5, time.process_time), top10=float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(at.tolist(), best.tolist())]))))
        rows[-1]["ratio"] = rows[-1]["ms"] / rows[0]["ms"]
        print(f"  {precision:>8} {rescore:>5}：{rows[-1]['ms']:.2f} ms，{rows[-1]['ratio']:.3f} 倍，前十名 {rows[-1]['top10']:.1%}", flush=True)
    return dict(n=n, dim=dim, queries=queries, rows=rows)


class Plain:
    "对照：每次把全部文档的 fp32 交给 vectors.maxsim。"
    def __init__(self, d): self.d = d

    def search(self, q, k): return maxsim(q, self.d).topk(k)


class Slices:
    "让 alone 可以对 Embeddings 取一段。"
    def __init__(self, e): self.e = e

    def __len__(self): return len(self.e)

    def __getitem__(self, at): return Embeddings(self.e.vectors[at], self.e.mask[at])


def row(name, index, q, positives, exact, size, **facts):
    "一种做法的质量和时间。"
    v = ndcg(index.search(q, 10)[1], positives)
    low, high = bootstrap_ci(v)
    out = dict(name=name, ndcg=float(v.mean()), low=low, high=high, kept=float(v.mean() / exact.mean()), delta=bootstrap_ci(v - exact), page_bytes=size, ms=alone(index, Slices(q), 10, 16, 3, time.process_time), **facts)
    print(f"  {name}：NDCG@10 {out['ndcg']:.4f}（{out['kept']:.1%}），每页 {size:,.0f} 字节，{out['ms']:.1f} ms", flush=True)
    return out


def late(work):
    "多向量：精度 × 池化 × 两步。"
    d, q, positives = encoded(work, "tiny-colqwen2", pages, batch=16)
    ids, exact, rows = [str(i) for i in range(len(d))], ndcg(maxsim(q, d).topk(10).indices, positives), []
    rows.append(row("vectors.maxsim，fp32", Plain(d), q, positives, exact, d.vectors.shape[1] * d.dim * 4))
    for precision, pool, coarse in [("float32", 1, ""), *(("float16", f, "") for f in (1, 2, 3, 4, 8, 16)), ("int8", 1, ""), ("int8", 4, ""), *(("binary", f, "") for f in (1, 2, 4, 8)), ("float16", 1, "pooled"), ("float16", 1, "centroid")]:
        index, start = MultiVectorIndex(d.dim, precision, pool, coarse), time.process_time()
        index.add(ids, d)
        index.build_coarse()
        built = time.process_time() - start
        if not coarse: rows.append(row(f"{precision}，{pool} 并 1", index, q, positives, exact, index.nbytes / len(d), build_s=built))
        for n in (20, 50) if coarse else ():
            class Two:
                def search(self, q, k, index=index, n=n): return index.search(q, k, candidates=n)
            rows.append(row(f"{precision}，{coarse} 粗找，{n} 个候选", Two(), q, positives, exact, index.nbytes / len(d), build_s=built))
    return dict(pages=len(d), tokens=d.vectors.shape[1], queries=len(q), rows=rows)


def plaid(work):
    "fast-plaid 4 比特和 2 比特，与同一个环境里的 MultiVectorIndex 并排。"
    import tempfile
    d, q, positives = encoded(work, "tiny-colqwen2", pages, batch=16)
    ids, exact, rows = [str(i) for i in range(len(d))], ndcg(maxsim(q, d).topk(10).indices, positives), []
    for bits in (4, 2):
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            index = FastPlaidIndex(d.dim, f"{folder}/plaid", bits)
            index.add(ids, d)
            built = time.process_time() - start
            size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file() and "embeddings" not in p.name)
            rows.append(row(f"fast-plaid，{bits} 比特", index, q, positives, exact, size / len(d), build_s=built))
    for precision, coarse in (("float16", ""), ("int8", ""), ("float16", "centroid")):
        index = MultiVectorIndex(d.dim, precision, 1, coarse)
        index.add(ids, d)
        rows.append(row(f"MultiVectorIndex，{precision}{'，' + coarse if coarse else ''}", index, q, positives, exact, index.nbytes / len(d)))
    return dict(rows=rows, versions=versions(["torch", "fast-plaid"]))


def main(work, what=""):
    torch.set_num_threads(THREADS)
    work = Path(work)
    work.mkdir(parents=True, exist_ok=True)
    out = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else {}
    if what == "plaid": out["fast_plaid"] = plaid(work)
    else:
        out |= dict(threads=THREADS, machine=machine(), versions=versions(), note="毫秒是本进程的 CPU 时间（机器是共用的），一个线程，一次一个查询，几遍里最快的；只看同一张表里的比")
        for name in ("tiny-clip", "tiny-qwen3vl"):
            d, q, positives = encoded(work, name, shop, batch=128)
            table = pareto(q, d, positives, clock=time.process_time)
            best = next(r for r in table.rows if (r["dim"], r["precision"], r["rescore"]) == (d.shape[1], "binary", "int8"))
            out[name] = table.to_dict() | dict(goal=dict(what="binary + int8 重打分，内存 1/32：保留的 NDCG@10", value=best["kept"], goal="≥ 0.98", met=best["kept"] >= .98 and best["memory"] * 32 == d.shape[1] * 4))
            print(name, out[name]["goal"], flush=True)
            if name == "tiny-qwen3vl": table.plot(picture)
        print("20 万 × 256")
        out["scale"] = at_scale()
        out["late"] = late(work)
    write_json(result_file, rounded(out))


if __name__ == "__main__": main(*sys.argv[1:])
