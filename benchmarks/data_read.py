"""读数据要多久、占多少内存：10³ 到 10⁶ 条记录的 JSONL，每一项都在新的进程里量；写 assets/results/data_read.json。
用法：python benchmarks/data_read.py [1000 10000 100000 1000000]
第一次打开＝逐行检查、写仓库、遍历一遍；第二次打开＝映射、遍历、随机取、编号。对照＝同样的检查，全放进一个列表。"""
import json
import operator
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
result_file = ROOT/"assets/results/data_read.json"
SEED = 42
WORDS = "红色的 蓝色的 黄色的 白色 杯子 碗 盘子 椅子 小圆点 条纹 一只 放在桌上的 a red blue mug bowl with many small dots stripes striped shoes".split()
CHILD = """
import json, os, random, sys, time
import numpy as np
from vembed_nb.data import read
read.SMALL = 0  # 不论大小都走仓库，才看得出怎样随条数长
def peak():
    "这个进程最多占过多少内存，MB；连映射进来的文件也算。"
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"): return int(line.split()[1]) / 1024
what, path = sys.argv[1:]
out = {}
def timed(name, fn):
    "墙上的秒数，和处理器的秒数（机器上有别的活时，后者才准）。"
    wall, cpu = time.perf_counter(), time.process_time()
    result = fn()
    out[name + "_s"], out[name + "_cpu_s"] = round(time.perf_counter() - wall, 4), round(time.process_time() - cpu, 4)
    return result
out["start_mb"] = round(peak())
if what == "list": records = timed("open", lambda: list(read._records(read._source(path), None, "", None)))
else: records = timed("open", lambda: read.read_records(path))
n = timed("iterate", lambda: sum(len(r.positives) for r in records))
if what == "second":
    rng = random.Random(0)
    at = [rng.randrange(len(records)) for _ in range(5000)]
    for i in at[:1000]: records[i]
    timed("random", lambda: [records[i].query_id for i in at])
    out["random_us"] = round(out.pop("random_s") / len(at) * 1e6, 1)
    out["random_cpu_us"] = round(out.pop("random_cpu_s") / len(at) * 1e6, 1)
    out["peak_before_keys_mb"] = round(peak())
    keys = timed("keys", records.keys)
    timed("lengths", records.lengths)
    out["distinct_queries"], out["distinct_positives"] = int(keys.query.max()) + 1, int(keys.positive.max()) + 1
out.update(records=len(records), peak_mb=round(out.get("peak_before_keys_mb") or peak()), peak_with_keys_mb=round(peak()))
print(json.dumps(out))
"""


def goal(what, value, sign, limit): return dict(what=what, value=value, goal=f"{sign} {limit}", met={"≤": operator.le, "≥": operator.ge}[sign](value, limit))


def picture(rng, n):
    "n / 3 张图里的一张，所以正例会重复。"
    i = rng.randrange(n // 3)
    return f"images/{i % 1000:03d}/{i:08d}.jpg"


def write(path, n):
    "n 条记录，每行约 200 字节：一句话、一张图，三成有两个反例。"
    rng = random.Random(SEED)
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            row = {"query": " ".join(rng.choices(WORDS, k=rng.randint(8, 20))), "positive": picture(rng, n), "group": f"sku-{rng.randrange(n // 3 + 1)}"}
            if rng.random() < 0.3: row["negatives"] = [picture(rng, n) for _ in range(2)]
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return os.path.getsize(path)


def child(what, path, cache):
    env = dict(os.environ, VEMBED_CACHE=str(cache), VEMBED_PROGRESS="0", OMP_NUM_THREADS="1")
    return json.loads(subprocess.run([sys.executable, "-c", CHILD, what, str(path)], check=True, capture_output=True, text=True, env=env, cwd=ROOT).stdout)


def main(sizes):
    from vembed_nb.core import machine, versions, write_json
    runs = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as d:
            path, cache = Path(d)/"train.jsonl", Path(d)/"cache"
            size = write(path, n)
            first, second = child("first", path, cache), child("second", path, cache)
            runs.append(dict(records=n, jsonl_mb=round(size / 1e6, 1), store_mb=round(sum(p.stat().st_size for p in cache.rglob("*.arrow")) / 1e6, 1), first=first, second=second, list=child("list", path, cache)))
            print(json.dumps(runs[-1]), flush=True)
    big, small = runs[-1], runs[0]
    goals = [goal(f"{big['records']} 条：打开、检查、遍历的内存峰值，MB", big["first"]["peak_mb"], "≤", 1024), goal(f"{big['records']} 条：第二次打开，秒", big["second"]["open_s"], "≤", 3),
             goal(f"随机取一条的处理器时间：{big['records']} 条 ÷ {small['records']} 条", round(big["second"]["random_cpu_us"] / small["second"]["random_cpu_us"], 2), "≤", 2),
             goal(f"{big['records']} 条的身份变成整数，秒", big["second"]["keys_s"], "≤", 10)]
    write_json(result_file, dict(runs=runs, goals=goals, seed=SEED, machine=machine(), versions=versions(["numpy", "pyarrow"])))
    print(json.dumps(goals, ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [1000, 10_000, 100_000, 1_000_000])
