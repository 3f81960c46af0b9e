"""怎样公平地比：轮流跑，先热身并核对结果，别的程序捣乱的那些次不算；内存在各自的子进程里量。给 benchmarks/ 里的脚本用。"""
import ctypes
import gc
import multiprocessing
import os
import re
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch

THREADS = int(os.environ.get("OMP_NUM_THREADS", 2))
torch.set_num_threads(THREADS)


class Case:
    "一个对手：run() 跑一次，返回要核对的值；leaves 是要核对梯度的张量；same=False 表示算的是另一回事，不核对。"
    def __init__(self, run, leaves=(), same=True): self.run, self.leaves, self.same = run, list(leaves), same

    @classmethod
    def loss(cls, leaves, f, same=True):
        "前向加反向，从清掉梯度开始。f 返回损失；已经反向过的（GradCache）返回不带图的损失。"
        def run():
            for x in leaves: x.grad = None
            loss = f()
            if loss.requires_grad: loss.backward()
            return loss.detach()
        return cls(run, leaves, same)


# 一、时间
def cpu():
    "(时刻, 全机器用掉的 CPU 秒数, 本进程用掉的, 本进程花在内核里的)。"
    with open("/proc/stat", encoding="ascii") as f: used = [int(x) for x in f.readline().split()[1:9]]
    return time.perf_counter(), (sum(used) - used[3] - used[4]) / os.sysconf("SC_CLK_TCK"), time.process_time(), os.times().system


def clocked(run):
    "跑一次：(秒, 花在内核里的秒数, 别的程序占了几个核)。内核里的时间几乎全是缺页：第一次碰到新要来的内存。"
    a = cpu()
    run()
    wall, machine, own, kernel = (y - x for x, y in zip(a, cpu()))
    return wall, kernel, max(0.0, machine - own - 0.02) / wall  # /proc/stat 的一格是 0.01 秒


def distance(a, b):
    "两组张量的相对距离。"
    flat = lambda xs: torch.cat([x.flatten() for x in xs] or [torch.zeros(1)])
    return float((flat(a) - flat(b)).norm() / flat(b).norm().clamp(min=1e-12))


def check(title, cases):
    "各跑一次：热身，并核对值（相对误差 1e-4 以内）和梯度（1e-3：MaxSim 里几乎并列的两个 token，舍入会换掉赢家）；返回用了几秒。"
    start, reference = time.perf_counter(), None
    for name, case in cases.items():
        value = torch.as_tensor(case.run())
        got = [value], [x.grad.clone() for x in case.leaves if x.grad is not None]
        reference = reference or got
        wrong, wrong_grad = map(distance, got, reference)
        assert not case.same or wrong < 1e-4 and wrong_grad < 1e-3, f"{title}：{name} 和 {next(iter(cases))} 不一样，相对误差 {wrong}，梯度 {wrong_grad}"
        for x in case.leaves: x.grad = None
    return time.perf_counter() - start


def race(title, cases, base, seconds=60, patience=120, **facts):
    "轮流跑，直到每个对手都有够多次干净的（别的程序占不到 0.1 个核）：长的 3 次，短的 5 到 30 次。ratio 是最小值和 base 的比。"
    once, runs, table = check(title, cases), {n: [] for n in cases}, {}
    wanted = max(3 if once > 15 else 5, min(30, int(seconds / once)))
    deadline, clean = time.time() + patience + wanted * once, lambda rs: [r for r in rs if r[2] < 0.1]
    while min(map(len, runs.values())) < wanted or time.time() < deadline and min(len(clean(r)) for r in runs.values()) < wanted:
        for name, case in cases.items(): runs[name].append(clocked(case.run))
    for n, rs in runs.items():
        used = clean(rs) or rs
        table[n] = dict(min_s=min(used)[0], median_s=statistics.median(r[0] for r in used), kernel_s=min(used)[1], times=[r[0] for r in used], dropped=len(rs) - len(used), others_cpu=statistics.mean(r[2] for r in used))
    print(f"\n{title}")
    for n, row in table.items():
        row["ratio"] = row["min_s"] / table[base]["min_s"]
        print(f"  {n}：最小 {row['min_s']:.4f} s（内核 {row['kernel_s']:.2f}），中位 {row['median_s']:.4f} s，{row['ratio']:.2f} 倍；{len(row['times'])} 次，另有 {row['dropped']} 次不算", flush=True)
    return dict(title=title, **facts, contenders=table)


# 二、内存
def resident(key):
    with open("/proc/self/status", encoding="ascii") as f: return int(re.search(key + r":\s+(\d+)", f.read())[1]) / 1024


def measure(build, name, size, times=3):
    "在子进程里：输入造好，热身一次，把空闲的内存还给系统，再跑一次，看常驻内存的最高点（VmHWM）比开始时涨了多少 MB；三次的中位数。"
    case, out = build(**size)[name], []
    case.run()
    for _ in range(times):
        for x in case.leaves: x.grad = None
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f: f.write("5")  # 最高点从现在重新记
        before = resident("VmRSS")
        case.run()
        out.append(resident("VmHWM") - before)
    return statistics.median(out)


def peak(build, name, size):
    "新开一个子进程来量；它分叉自一个只装好了包、没有做过计算的进程，所以彼此不沾。"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool: mb = pool.submit(measure, build, name, size).result()
    print(f"  {name} {size}：{mb:.1f} MB", flush=True)
    return mb


def compare(title, build, size, base, **options):
    "时间和内存。build(**size) 给出 {名字: Case}。"
    row = race(title, build(**size), base, size=size, **options)
    for name in row["contenders"]: row["contenders"][name]["peak_mb"] = peak(build, name, size)
    return row


def start():
    "在脚本的 __main__ 里先调用一次：子进程从装好的包分叉，并且找得到脚本旁边的模块。"
    os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))
    multiprocessing.set_forkserver_preload(["__main__"])


def rounded(x, digits=5):
    "JSON 里的小数写短些。"
    if isinstance(x, dict): return {k: rounded(v, digits) for k, v in x.items()}
    if isinstance(x, list | tuple): return [rounded(v, digits) for v in x]
    return round(x, digits) if isinstance(x, float) else x
