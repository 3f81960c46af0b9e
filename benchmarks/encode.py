"""encode 和 sentence-transformers 的 encode 比：同样的权重、同样的线程、同一个进程、轮流跑，向量要相同；写 assets/results/encode.json。
用法（在 benchmarks/peers.txt 的环境里，机器空着时）：OMP_NUM_THREADS=2 python benchmarks/encode.py [clip vlm]
2,000 个输入，长短不一：1,000 段中英文字（1 到 14 个词），1,000 张 128 像素的图；另一份有 30 % 是重复的。
sentence-transformers 的 CLIP 不收图文混合的一列（它的错误消息这样说），所以给它先分成文字和图两列。"""
import json
import logging
import operator
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("VEMBED_PROGRESS", "0")
import race
import torch
from PIL import Image
from race import Case

from vembed_nb.core import machine, versions, write_json
from vembed_nb.data.tasks import Item
from vembed_nb.models.load import load_encoder
from vembed_nb.ship.export import export_sentence_transformers
from vembed_nb.tiny import TINY

ROOT = Path(__file__).resolve().parents[1]
result_file = ROOT/"assets/results/encode.json"
SEED, N, OURS, ST = 42, int(os.environ.get("VEMBED_ENCODE_N", 2000)), "本库", "sentence-transformers"
WORDS = "红色的 蓝色的 黄色的 白色 杯子 碗 盘子 椅子 小圆点 条纹 一只 放在桌上的 a red blue mug bowl with many small dots stripes striped shoes".split()


def goal(what, value, sign, limit): return dict(what=what, value=value, goal=f"{sign} {limit}", met={"≤": operator.le, "≥": operator.ge}[sign](value, limit))


def inputs(n, duplicates=0.0):
    "一半文字一半图；duplicates 是重复的比例。"
    rng = random.Random(SEED)
    half, fresh = n // 2, round(n // 2 * (1 - duplicates))
    texts = list(dict.fromkeys(" ".join(rng.choices(WORDS, k=rng.randint(1, 14))) for _ in range(3 * half)))[:fresh]
    images = [Image.frombytes("RGB", (128, 128), rng.randbytes(128 * 128 * 3)) for _ in range(fresh)]
    fill = lambda xs: xs + [rng.choice(xs) for _ in range(half - len(xs))]
    out = [*fill(texts), *[im.copy() for im in fill(images)]]
    rng.shuffle(out)
    return out


def contenders(encoder, theirs, mixed, batch_size=64, prompt=None):
    "同样的输入，同样的批，两家。"
    text = [i for i, x in enumerate(mixed) if isinstance(x, str)]
    image = [i for i, x in enumerate(mixed) if not isinstance(x, str)]
    items = [Item(x) if isinstance(x, str) else Item(image=x) for x in mixed]

    def st():
        out = torch.zeros(len(mixed), encoder.dim)
        for at in (text, image): out[at] = theirs.encode_document([mixed[i] for i in at], batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True).float().cpu()
        return out
    return {OURS: Case(lambda: encoder.encode(items, batch_size)), ST: Case(st)}


def row(name):
    "一个模型：不重复的、三成重复的。"
    from sentence_transformers import SentenceTransformer
    encoder = load_encoder(name)
    with tempfile.TemporaryDirectory() as tmp:
        theirs = SentenceTransformer(str(export_sentence_transformers(encoder, Path(tmp)/"st")))
        races = [race.race(f"{name}：{title}", contenders(encoder, theirs, inputs(N, share)), OURS, seconds=20, patience=int(os.environ.get("VEMBED_PATIENCE", 60)), duplicates=share) for title, share in (("没有重复", 0.0), ("30 % 重复", 0.3))]
    goals = [goal(f"{name}：比 sentence-transformers 快几倍，{r['duplicates']:.0%} 重复", r["contenders"][ST]["ratio"], "≥", limit) for r, limit in zip(races, (1.2, 1.5))]
    return dict(races=races, goals=goals)


def main(*names):
    logging.disable(logging.WARNING)
    if "tiny-qwen3vl" in TINY or "vlm" in names:
        sys.path.insert(0, str(ROOT/"benchmarks"))
        from export_check import no_video
        no_video()
    models = {"clip": "tiny-clip", **({"vlm": "tiny-qwen3vl"} if "tiny-qwen3vl" in TINY else {})}
    result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else dict(rows={})
    for key, name in models.items():
        if not names or key in names: result["rows"][key] = race.rounded(row(name))
    result |= dict(seed=SEED, n=N, threads=race.THREADS, machine=machine(), versions=versions(["torch", "transformers", "sentence-transformers", "pillow"]))
    write_json(result_file, result)
    for r in result["rows"].values():
        for g in r["goals"]: print("达到" if g["met"] else "没有达到", f"{g['what']}：{g['value']:.3f}（目标 {g['goal']}）")


if __name__ == "__main__": main(*sys.argv[1:])
