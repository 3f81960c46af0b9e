"""同行的金值（tests/golden/*.json，由 benchmarks/golden.py 写成）：读出来，拿来比。"""
import json
from functools import cache
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "golden"


@cache
def golden(peer):
    "一个同行的全部金值：名字 → 一例；输入和梯度都换成 float64 张量。"
    data = json.loads((FOLDER / f"{peer}.json").read_text(encoding="utf-8"))
    tensor = lambda x: torch.tensor(data["arrays"][x] if isinstance(x, str) else x, dtype=torch.float64)
    return {c["name"]: c | {"inputs": {k: tensor(a) for k, a in c["inputs"].items()}, "grads": {k: tensor(g) for k, g in c["outputs"].get("grads", {}).items()},
                            "want": tensor(c["outputs"].get("loss", c["outputs"].get("scores")))} for c in data["cases"]}


def names(peer, *prefixes, parity=True):
    "名字以 prefixes 之一开头的各例；parity=False 是我们本就不该与它相等的那些。"
    return [n for n, c in golden(peer).items() if n.startswith(prefixes) and c["parity"] == parity]


def leaves(case, *keys, dtype=torch.float64):
    "要求梯度的输入，每次都是新的。"
    return [case["inputs"][k].to(dtype, copy=True).requires_grad_() for k in keys if k in case["inputs"]]


def agree(case, value, grads, rtol=1e-5):
    "值相等；梯度 {名字: 张量} 逐个相等，按相对范数（金值的梯度有 7 位小数）。"
    far = (value.double() - case["want"]).norm() / case["want"].norm().clamp(min=1e-2)
    assert far <= rtol, f"{case['name']}：{value} ≠ {case['want']}（相差 {far:.1e}）"
    assert set(grads) == set(case["grads"]), f"{case['name']} 的梯度有 {set(case['grads'])}，比了 {set(grads)}"
    total = max([float(g.norm()) for g in case["grads"].values()] + [rtol * 1e4])  # 梯度正好是 0 时，fp32 的舍入也有 1e-6
    for k, g in grads.items():
        far = (g.double() - case["grads"][k]).norm()
        assert far <= rtol * case["grads"][k].norm() + rtol / 10 * total, f"{case['name']} 对 {k} 的梯度：相差 {far:.1e}，应当约 {case['grads'][k].norm():.1e}"
