"""图片流水线比 `PIL.Image.open().convert("RGB").resize` 快多少：1024×768 的 JPEG → 224 像素的张量，两个数据加载进程；写 assets/results/pictures.json。
用法（机器空着时）：OMP_NUM_THREADS=1 python benchmarks/pictures.py
几种办法在同一次运行里轮流跑，每次把全部图片过一遍；进程一直活着，启动不算在内。别的程序占了 0.1 个核以上的那些次不算（全都不干净时才算上，others_cpu 写着平均占了多少）。
图是 scikit-learn 和 matplotlib 自带的三张照片，用镜像铺大（不放大，保留原来的清晰度），再随机截取 1024×768，品质 90。"""
import operator
import os
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib.cbook as cbook
import numpy as np
import psutil
import race
import torch
from PIL import Image
from race import rounded
from sklearn.datasets import load_sample_image

from vembed_nb.core import machine, versions, write_json
from vembed_nb.data.images import DRAFT, ImageCache, open_image

SEED, N, SIDE, WORKERS, BATCH = 42, int(os.environ.get("VEMBED_PICTURES_N", 384)), 224, 2, 32
PLAIN, FULL, DRAFTED, CACHED = "PIL 直接打开", "open_image（全解）", "open_image（side=224）", "ImageCache（第二轮起）"
result_file = Path(__file__).resolve().parents[1]/"assets/results/pictures.json"


def write_pictures(folder):
    "N 张不同的 1024×768 的 JPEG，返回文件名。"
    rng, names = np.random.default_rng(SEED), []
    with cbook.get_sample_data("grace_hopper.jpg") as f: photos = [np.asarray(Image.open(f).convert("RGB")), *map(load_sample_image, ("china.jpg", "flower.jpg"))]
    wide = [np.pad(p, ((0, 1000), (0, 1200), (0, 0)), "symmetric") for p in photos]
    for i in range(N):
        p = wide[i % 3]
        y, x = rng.integers(0, p.shape[0] - 768), rng.integers(0, p.shape[1] - 1024)
        Image.fromarray(p[y:y + 768, x:x + 1024]).save(folder/(name := f"{i:04d}.jpg"), quality=90)
        names.append(name)
    return names


def tensor(im): return torch.from_numpy(np.array(im)).permute(2, 0, 1).float().div_(255)


class Pictures(torch.utils.data.Dataset):
    "第 i 张图的张量，用 how 打开。"
    def __init__(self, folder, names, how, cache=None): self.folder, self.names, self.how, self.cache = folder, names, how, cache
    def __len__(self): return len(self.names)

    def __getitem__(self, i):
        name, to = self.names[i], (SIDE, SIDE)
        if self.how == PLAIN: return tensor(Image.open(self.folder/name).convert("RGB").resize(to))
        if self.how == CACHED: return tensor(self.cache.open(name, self.folder, to))
        return tensor(open_image(name, self.folder, side=SIDE if self.how == DRAFTED else None).resize(to))


def passes(loader, start):
    "过一遍：(秒, 别的程序占了几个核)。数据加载进程的 CPU 时间也算自己的。"
    mine = lambda: sum(sum(p.cpu_times()[:2]) for p in [start, *start.children()])
    a, own = race.cpu(), mine()
    n = sum(len(x) for x in loader)
    wall, used = time.perf_counter() - a[0], race.cpu()[1] - a[1]
    assert n == N
    return wall, max(0.0, used - (mine() - own) - 0.03) / wall


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)/"pictures"
        folder.mkdir()
        names, cache, me = write_pictures(folder), ImageCache(Path(tmp)/"cache"), psutil.Process()
        sets = {how: Pictures(folder, names, how, cache) for how in (PLAIN, FULL, DRAFTED, CACHED)}
        loaders = {how: torch.utils.data.DataLoader(s, BATCH, num_workers=WORKERS, persistent_workers=True) for how, s in sets.items()}
        runs = {how: [] for how in sets}
        for loader in loaders.values(): passes(loader, me)  # 热身：起进程、填缓存、把文件读进内存
        clean = lambda rs: [r for r in rs if r[1] < 0.1]
        deadline = time.time() + int(os.environ.get("VEMBED_PATIENCE", 60))
        while min(map(len, runs.values())) < 7 or time.time() < deadline and min(len(clean(r)) for r in runs.values()) < 7:
            for how in runs: runs[how].append(passes(loaders[how], me))
        gaps = [abs(np.asarray(open_image(n, folder, side=SIDE).resize((SIDE, SIDE)), int) - np.asarray(open_image(n, folder).resize((SIDE, SIDE)), int)) for n in names[:48]]
        same = all(open_image(n, folder).resize((SIDE, SIDE)).tobytes() == Image.open(folder/n).convert("RGB").resize((SIDE, SIDE)).tobytes() == cache.open(n, folder, (SIDE, SIDE)).tobytes() for n in names[:48])
        table = {}
        for how, rs in runs.items():
            used = clean(rs) or rs
            table[how] = dict(images_per_s=N / min(used)[0], median_images_per_s=N / statistics.median(r[0] for r in used), times=[r[0] for r in used], dropped=len(rs) - len(used), others_cpu=statistics.mean(r[1] for r in used))
        for row in table.values():
            row["ratio"] = row["images_per_s"] / table[PLAIN]["images_per_s"]
            row["median_ratio"] = row["median_images_per_s"] / table[PLAIN]["median_images_per_s"]
        kb = statistics.mean((folder/n).stat().st_size for n in names) / 1000
    goals = [dict(what=f"{DRAFTED} 是 {PLAIN} 的几倍", value=table[DRAFTED]["ratio"], goal="≥ 1.5", met=operator.ge(table[DRAFTED]["ratio"], 1.5))]
    result = dict(title="1024×768 的 JPEG → 224 像素的张量", picture=f"1024×768 的 JPEG，平均 {kb:.0f} KB → {SIDE} 像素", n=N, workers=WORKERS, batch_size=BATCH, side=SIDE, draft=DRAFT, contenders=table, goals=goals,
                  difference=dict(what="side=224 与全解，缩到 224 以后的像素差（0–255），48 张", mean=float(np.mean(gaps)), p99=float(np.percentile(gaps, 99)), max=int(np.max(gaps))), full_and_cache_equal_plain=same,
                  seed=SEED, machine=machine(), versions=versions(["torch", "pillow", "numpy"]))
    assert same, "全解、缓存与 PIL 要逐像素相等"
    write_json(result_file, rounded(result))
    for how, row in table.items(): print(f"{how}：每秒 {row['images_per_s']:.0f} 张，{row['ratio']:.2f} 倍（中位 {row['median_ratio']:.2f}）；{len(row['times'])} 次，别的程序平均占 {row['others_cpu']:.2f} 个核")
    print(goals, result["difference"])


if __name__ == "__main__": main()
