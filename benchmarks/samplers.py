"""不重复的批与 sentence-transformers 的 NoDuplicatesBatchSampler 比：同样的记录、同一个进程、轮流跑；写 assets/results/samplers.json。
用法（在 benchmarks/peers.txt 的环境里）：OMP_NUM_THREADS=1 python benchmarks/samplers.py
量的是「编号 + 走完一轮」：从 Arrow 里的记录（本库的 Store，它的 Dataset；“一列 Record”是内存里的 Python 对象）开始，到最后一批交出来为止，批大小 128，凑不满的不要。
秒数是 CPU 时间（本进程加子进程，用户态加内核），不是墙上的钟：三家都是单线程、几乎不碰盘，机器上有别的程序时它比墙钟稳；墙钟的秒数也记在 wall_s。
它有两种走法：默认的每次去数据集里取字符串；precompute_hashes=True 先把每个格子变成哈希（进程数用它的默认值）。"""
import gc
import logging
import operator
import os
import resource
import time
from pathlib import Path

os.environ.setdefault("VEMBED_PROGRESS", "0")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
import numpy as np
import race
import torch

from vembed_nb.core import machine, versions, write_json
from vembed_nb.data.read import Records
from vembed_nb.data.sample import NoDuplicateBatches, ids_of
from vembed_nb.data.store import Store
from vembed_nb.data.tasks import Item, Record

ROOT = Path(__file__).resolve().parents[1]
result_file = ROOT/"assets/results/samplers.json"
SEED, BATCH, N = 42, 128, int(os.environ.get("VEMBED_SAMPLERS_N", 1_000_000))
OURS, LIST, ST, HASHED = "本库", "本库，一列 Record", "sentence-transformers", "sentence-transformers，先哈希"


def goal(what, value, sign, limit): return dict(what=what, value=value, goal=f"{sign} {limit}", met={"≤": operator.le, "≥": operator.ge}[sign](value, limit))


def rows(images):
    "每条一句不同的话，图由编号决定：(本库的记录, 它的 Dataset)。"
    from datasets import Dataset
    texts, paths = [f"第 {i} 张图的第 {n} 句话，说它上面有什么" for n, i in enumerate(images)], [f"images/{i:07d}.jpg" for i in images]
    records = Records(Store.build(Record(Item(t), [Item(image=p)]) for t, p in zip(texts, paths)))
    return records, Dataset.from_dict({"anchor": texts, "positive": paths})


def clock():
    "(CPU 秒, 墙上的秒)。"
    t = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + t.ru_utime + t.ru_stime, time.perf_counter()


def walk(make, times=1):
    "造好采样器，走完一轮，取 CPU 时间最少的一次；返回批数和秒数。"
    runs = []
    for _ in range(times):
        start = clock()
        batches = sum(1 for _ in make())
        cpu, wall = (b - a for a, b in zip(start, clock()))
        runs.append(dict(seconds=cpu, wall_s=wall, batches=batches))
    return min(runs, key=operator.itemgetter("seconds")) | dict(times=times)


def samplers(records, theirs):
    from sentence_transformers.base.sampler import NoDuplicatesBatchSampler
    st = lambda **kw: NoDuplicatesBatchSampler(theirs, BATCH, True, generator=torch.Generator(), seed=SEED, **kw)
    plain = list(records)
    gc.collect(); gc.freeze()  # 一百万条记录的列表不必每次都扫一遍
    return {OURS: lambda: NoDuplicateBatches(records, BATCH, SEED), LIST: lambda: NoDuplicateBatches(plain, BATCH, SEED), ST: st, HASHED: lambda: st(precompute_hashes=True)}


def verify(makers, images):
    "各走一轮，一批里有没有重复；返回批数。"
    out = {}
    for name, make in makers.items():
        batches = [[i[0] if isinstance(i, tuple) else i for i in b] for b in make()]
        assert all(len(b) == len(set(images[b].tolist())) == BATCH for b in batches), name
        out[name] = len(batches)
    return out


def compare(title, images, times):
    "三家各走 times 遍，轮流；返回一行结果和本库的记录。"
    records, theirs = rows(images)
    table = {}
    for name, make in samplers(records, theirs).items():
        table[name] = walk(make, times if name in (OURS, LIST) else max(1, times // 3))
        table[name]["ratio"] = table[name]["seconds"] / table[OURS]["seconds"]
        print(f"{title}，{name}：{table[name]}", flush=True)
    return dict(title=title, n=len(images), contenders=table), records


def growth(sizes):
    "从一千条到十万条；小的先核对每家的批里确实没有重复。"
    out = {n: [] for n in (OURS, LIST, ST, HASHED)}
    for size in sizes:
        images = np.arange(size) // 5
        makers = samplers(*rows(images))
        if size <= 10_000: verify(makers, images)
        for name, make in makers.items(): out[name].append(dict(n=size, **walk(make, 5 if size <= 10_000 else 1)))
    return out


def main():
    logging.disable(logging.WARNING)
    import datasets
    datasets.disable_caching(); datasets.disable_progress_bars()
    half = np.where(np.random.default_rng(SEED).random(1_000) < .5, 0, np.arange(1_000))
    heavy, _ = compare("1,000 条，一半是同一张图", half, 3)
    flickr, records = compare(f"{N:,} 条，每张图 5 句", np.arange(N) // 5, 3)
    start = clock(); ids_of(records); middle = clock()
    sampler = NoDuplicateBatches(records, BATCH, SEED); end = clock()
    keys, setup, wall = middle[0] - start[0], end[0] - middle[0], end[1] - middle[1]
    print(f"编号 {keys:.2f} 秒；准备（编号加排第 0 轮）{setup:.2f} 秒，墙钟 {wall:.2f} 秒；落下 {sampler.left} 条", flush=True)
    more = growth([n for n in (1_000, 10_000, 100_000) if n < N])
    for name in more: more[name].append(dict(n=N, **flickr["contenders"][name]))
    goals = [goal(f"{N:,} 条的准备（墙钟的秒）", wall, "≤", 10), *(goal(f"{N:,} 条的准备加一轮，比{n}快几倍", flickr["contenders"][n]["ratio"], "≥", 3) for n in (ST, HASHED))]
    write_json(result_file, race.rounded(dict(races=[flickr, heavy], growth=more, setup_s=setup, setup_wall_s=wall, keys_s=keys, left=sampler.left, goals=goals, seed=SEED, batch=BATCH, threads=race.THREADS,
                                              machine=machine(), versions=versions(["torch", "datasets", "numpy", "sentence-transformers", "xxhash"]))))
    for g in goals: print("达到" if g["met"] else "没有达到", f"{g['what']}：{g['value']:.3f}（目标 {g['goal']}）")


if __name__ == "__main__": main()
