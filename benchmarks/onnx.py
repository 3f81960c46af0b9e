"""ONNX 和 int8：质量与速度，写 assets/results/onnx.json。用法：OMP_NUM_THREADS=1 python benchmarks/onnx.py（本库自己的环境，加 extra onnx）
质量：玩具店（世界 A，没见过的组合），图库由 torch 编码一次，查询由 torch fp32、ONNX fp32、ONNX int8 各编码一次，比 hit@1。
速度：同一个文字塔，同样的 token，同样的线程数，轮流跑（race.py）：在线（一句一批）和批量（按长度排好，64 句一批）。
同一目录里这个文件名和 onnx 包重名，所以先把自己的目录挪到 sys.path 的末尾。"""
import operator
import sys
import tempfile
from pathlib import Path

sys.path.append(sys.path.pop(0))
import torch

import race
from race import Case
from vembed_nb.core import machine, versions, write_json
from vembed_nb.data.read import read_corpus, read_records
from vembed_nb.evaluate.report import report_from_vectors
from vembed_nb.models.load import load_encoder
from vembed_nb.ship.export import OnnxEncoder, export_onnx, quantize_onnx, tower_inputs
from vembed_nb.toyshop import write_toyshop

ROOT = Path(__file__).resolve().parents[1]
SEED, MODELS = 5, ("tiny-clip", "tiny-siglip")


def goal(what, value, sign, limit): return dict(what=what, value=value, goal=f"{sign} {limit}", met={"≤": operator.le, "≥": operator.ge}[sign](value, limit))


def quality(encoders, data):
    "每个编码器的 hit@1，图库的向量都用 torch 的。"
    records, corpus = read_records(data/"test.jsonl"), read_corpus(data/"corpus.jsonl")
    d = next(iter(encoders.values())).encode(corpus[1], image_root=str(data))
    q = {n: e.encode([r.query for r in records], role="query") for n, e in encoders.items()}
    reports = {n: report_from_vectors(v, d, records, corpus[0], corpus[1], n) for n, v in q.items()}
    return {n: dict(hit1=r.metrics["hit@1"], hit10=r.metrics["hit@10"], mrr=r.metrics["mrr"], ci=r.ci["hit@1"]) for n, r in reports.items()}, [r.query for r in records]


def cases(encoder, folder, batches):
    "同样的 token，三座文字塔。"
    tower = encoder.towers()["text"].eval()
    feeds = [tower_inputs(tower, encoder.preprocess(b)) for b in batches]
    plain = [{k: v.numpy() for k, v in f.items()} for f in feeds]
    sessions = {n: OnnxEncoder(folder, p, threads=race.THREADS).sessions["text"] for n, p in (("ONNX fp32", "fp32"), ("ONNX int8", "int8"))}

    def torch_tower():
        with torch.inference_mode(): return torch.cat([tower(**f) for f in feeds])
    ours = lambda s: lambda: torch.cat([torch.from_numpy(s.run(None, f)[0]) for f in plain])
    return {"torch fp32": Case(torch_tower), **{n: Case(ours(s), same="int8" not in n) for n, s in sessions.items()}}


def main():
    rows, goals = {}, []
    with tempfile.TemporaryDirectory() as tmp:
        data = Path(tmp)/"shop"
        write_toyshop(data, n_train=10, n_val=10, n_test=1000, n_queries=600, world="A", seed=SEED, workers=1)
        for name in MODELS:
            encoder = load_encoder(name)
            folder = export_onnx(encoder, Path(tmp)/name)
            sizes = quantize_onnx(folder)
            score, queries = quality({"torch fp32": encoder, "ONNX fp32": OnnxEncoder(folder), "ONNX int8": OnnxEncoder(folder, "int8")}, data)
            queries = sorted(queries, key=lambda i: len(i.text))
            speed = [race.race(f"{name}，{title}", cases(encoder, folder, batches), "torch fp32", seconds=8, patience=40, batch_size=b)
                     for title, b, batches in (("一句一批，60 句", 1, [[q] for q in queries[::10]]), ("64 句一批，600 句", 64, [queries[i:i + 64] for i in range(0, 600, 64)]))]
            rows[name] = dict(quality=score, files=sizes, speed=speed)
            loss = score["torch fp32"]["hit1"] - score["ONNX int8"]["hit1"]
            goals.append(goal(f"{name}：int8 的 hit@1 掉了多少", loss, "≤", 0.01))
            goals += [goal(f"{name}：int8 文字塔比 torch fp32 快几倍，一批 {s['batch_size']} 句", 1 / s["contenders"]["ONNX int8"]["ratio"], "≥", 1.5) for s in speed]
    result = dict(seed=SEED, threads=race.THREADS, n_queries=600, n_corpus=1000, rows=rows, goals=goals, machine=machine(), versions=versions(["torch", "transformers", "onnx", "onnxruntime", "onnxscript"]))
    write_json(ROOT/"assets/results/onnx.json", race.rounded(result))
    for g in goals: print("达到" if g["met"] else "没有达到", f"{g['what']}：{g['value']:.3f}（目标 {g['goal']}）")


if __name__ == "__main__": main()
