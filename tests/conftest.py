"""全部测试共用的小数据、小模型和命令行入口。环境变量要在 torch 装载之前设好。"""
import os

os.environ.update(VEMBED_PROGRESS="0", MPLBACKEND="agg", VEMBED_MODE="mini", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # 逐位相等只在同样的线程数下成立

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))


def build_micro(folder, seed=0, dropout=0.0):
    "一个随机的 CLIP：32 像素、一层、16 维，几百 KB；训一步只要几毫秒。"
    import torch
    import transformers as tf

    from vembed_nb.models.dual import DualEncoder
    from vembed_nb.pretrain import build_tokenizer

    tok = build_tokenizer(["红色的杯子 a red cup"], vocab_size=4200)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=16, attention_dropout=dropout)
    text = dict(small, vocab_size=len(tok), max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=3)
    config = tf.CLIPConfig(text_config=text, vision_config=dict(small, image_size=32, patch_size=16), projection_dim=16)
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    torch.manual_seed(seed)
    DualEncoder(tf.CLIPModel(config), tf.CLIPProcessor(images, tok)).save(folder)
    return folder


def write_jsonl(path, rows):
    "逐行写 JSON。"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def make_shop(folder, n=24, n_val=6):
    "n 张单色的 32 像素图，每张一句描述；另有验证集和图库。"
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(n + n_val):
        Image.new("RGB", (32, 32), (i * 37 % 256, i * 91 % 256, i * 153 % 256)).save(folder / "images" / f"{i:02d}.png")
        rows.append({"query": f"{'红蓝绿黄'[i % 4]}色的第 {i} 件", "positive": f"images/{i:02d}.png"})
    write_jsonl(folder / "train.jsonl", rows[:n])
    write_jsonl(folder / "val.jsonl", rows[n:])
    write_jsonl(folder / "corpus.jsonl", [{"id": r["positive"], "image": r["positive"]} for r in rows])
    return folder


@pytest.fixture(scope="session")
def micro(tmp_path_factory):
    "随机的微型 CLIP 的文件夹。"
    return str(build_micro(tmp_path_factory.mktemp("micro") / "model"))


@pytest.fixture(scope="session")
def micro_dropout(tmp_path_factory):
    "同样的结构，但训练时有 dropout。"
    return str(build_micro(tmp_path_factory.mktemp("micro") / "dropout", dropout=0.2))


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    "24 + 6 张图的数据集；只读。"
    return make_shop(tmp_path_factory.mktemp("shop") / "data")


@pytest.fixture(scope="session")
def toyshop(tmp_path_factory):
    "玩具店：60 张训练图、12 张验证图、40 张图库；只读。"
    from vembed_nb.toyshop import write_toyshop

    out = tmp_path_factory.mktemp("toyshop") / "data"
    write_toyshop(out, 60, 12, 40, 30, seed=1, size=64, workers=1)
    return out


@pytest.fixture
def cli():
    "在本进程里跑一条 vembed 命令；返回 code、out、err。任何没有接住的异常都会让测试失败。"
    from vembed_nb.cli import main

    def run(*args):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(a) for a in args])
        return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())

    return run


VEMBED = Path(sys.executable).parent / "vembed"


@pytest.fixture
def vembed():
    "用真正的入口程序，在新的进程里跑一条命令。"
    def run(*args, cwd=None, timeout=120):
        return subprocess.run([str(VEMBED), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=timeout)

    return run
