"""导出到 sentence-transformers，在那边打开，向量一样吗？每个家族一行，记最大的差别；表达不了的，记拒绝的那句话。
在同行的环境里跑（benchmarks/peers.txt）：.venv-peers/bin/python benchmarks/export_check.py
没有真权重的家族用随机的微型模型（tests/micro_*.py）：类、处理器、模板都是真的。"""
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("VEMBED_PROGRESS", "0")
import numpy as np
import torch

from vembed_nb.core import VembedError, versions, write_json
from vembed_nb.data.tasks import Item
from vembed_nb.models.load import load_encoder
from vembed_nb.ship.export import export_sentence_transformers, probe_items

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/"tests"))
result_file = ROOT/"assets/results/export_check.json"
warnings.simplefilter("ignore")
GOAL = 1e-4
QWEN = "AutoProcessor 换成不带视频处理器的 Qwen3VLProcessor 子类（没有 torchvision，原来的打不开）"


def no_video():
    "Qwen-VL 的处理器带着视频处理器，没有 torchvision 打不开；这里换成只有图的子类。"
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, ProcessorMixin, Qwen3VLProcessor
    import sentence_transformers.base.modules.transformer as st

    class ImagesOnly(Qwen3VLProcessor):
        @classmethod
        def get_attributes(cls): return ["image_processor", "tokenizer"]

        def __init__(self, image_processor, tokenizer):
            self.image_token, self.video_token, self.vision_start_token, self.vision_end_token = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
            for n in ("image", "video", "vision_start", "vision_end"): setattr(self, f"{n}_token_id", tokenizer.convert_tokens_to_ids(getattr(self, f"{n}_token")))
            self.image_ids, self.video_ids = [self.image_token_id], [self.video_token_id]
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=tokenizer.chat_template)

    class Auto:
        @staticmethod
        def from_pretrained(path, **kw):
            if json.loads((Path(path)/kw.get("subfolder", "")/"config.json").read_text())["model_type"] not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"): return AutoProcessor.from_pretrained(path, **kw)
            return ImagesOnly(AutoImageProcessor.from_pretrained(path), AutoTokenizer.from_pretrained(path))
    st.AutoProcessor = Auto


def dual(name, **prompts):
    encoder = load_encoder(name)
    encoder.card.prompts = prompts
    return encoder


def composed(**kw):
    import micro_composed
    prompts = kw.pop("prompts", {})
    encoder = micro_composed.make(**kw)
    encoder.card.prompts = prompts
    return encoder


def with_lora(encoder):
    from vembed_nb.models.adapt import lora
    encoder = lora(encoder, verbose=False)
    torch.manual_seed(1)
    for n, p in encoder.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.1)
    return encoder.eval()


def vlm(kind, **kw):
    import micro_vlm
    return micro_vlm.encoder(kind, **kw)


def late(kind, **kw):
    import micro_late
    from vembed_nb.models.late import LateEncoder
    return LateEncoder(*micro_late.make(kind), **kw).eval()


CASES = {
    "tiny-clip（真权重），有前缀": lambda: dual("tiny-clip", query="找图：", document="图："),
    "tiny-siglip（真权重）": lambda: dual("tiny-siglip"),
    "tiny-clip + LoRA，合并": lambda: with_lora(dual("tiny-clip")),
    "bert + dinov2，线性头": lambda: composed(prompts={"query": "query: ", "document": "passage: "}),
    "bert + vit，两层头": lambda: composed(image="vit", head="mlp"),
    "xlm-roberta，只有文字": lambda: composed(text="xlm-roberta", image="", head="none"),
    "bert，只有文字，cls": lambda: composed(image="", head="none", text_pooling="cls", prompts={"query": "为这个句子生成表示以用于检索相关文章："}),
    "qwen3，只有文字，last": lambda: composed(text="qwen3", image=""),
    "dinov2，只有图": lambda: composed(text="", head="none"),
    "convnext，只有图，pooler": lambda: composed(text="", image="convnext", head="none"),
    "qwen3_vl": lambda: vlm("qwen3_vl"),
    "qwen2_vl（GME 模板）": lambda: vlm("qwen2_vl"),
    "qwen2_5_vl（GME 模板）": lambda: vlm("qwen2_5_vl"),
    "colqwen2，positions=flat": lambda: late("colqwen2", positions="flat"),
    "colqwen2，positions=flat，只留图 token": lambda: late("colqwen2", positions="flat", document_tokens="image"),
    "colpali": lambda: late("colpali"),
    "colmodernvbert（应当拒绝）": lambda: late("colmodernvbert"),
    "vit_mae（应当拒绝）": lambda: composed(text="", image="vit_mae"),
    "dinov2，mean（应当拒绝）": lambda: composed(text="", image_pooling="mean"),
    "colqwen2，augment=0（应当拒绝）": lambda: late("colqwen2", positions="flat", augment=0),
    "colqwen2，positions=grid（应当拒绝）": lambda: late("colqwen2"),
}
GROUPS = {"dual": ("text", "image"), "composed": ("text", "image"), "vlm": ("text", "image", "both", "images")}


def gap(a, b):
    "两组向量的最大差别；多向量逐个比，长度也要一样。"
    if hasattr(b, "mask"): return max(float("inf") if x.shape != v[m].shape else float((torch.as_tensor(x).cpu() - v[m]).abs().max()) for x, v, m in zip(a, b.vectors, b.mask))
    return float((torch.as_tensor(np.asarray(a)) - b).abs().max())


def compare(encoder, folder):
    "每种输入的最大差别。"
    from sentence_transformers import MultiVectorEncoder, SentenceTransformer
    multi, out = encoder.card.multi_vector, {}
    theirs = (MultiVectorEncoder if multi else SentenceTransformer)(str(folder))
    probes = [i for i in probe_items(encoder) if len(i.text or "") <= 60 or not (multi or encoder.card.family == "vlm")]
    texts, images = [i.text for i in probes if i.text], [i.image for i in probes if i.images]
    rows = {"文字，查询": (texts, texts, "query")}
    if not multi: rows["文字，文档"] = (texts, texts, "document")
    rows["图"] = (images, images, "document")
    if encoder.card.family == "vlm": rows |= {"图加文字": ([Item(t, i) for t, i in zip(texts, images)], [dict(image=i, text=t) for t, i in zip(texts, images)], "query")}
    with torch.inference_mode():
        for name, (mine, yours, role) in rows.items():
            if mine: out[name] = gap(getattr(theirs, f"encode_{role}")(yours, **({} if multi else dict(show_progress_bar=False))), encoder.encode(mine, role=role))
    return out


def main(only=""):
    logging.disable(logging.WARNING)
    no_video()
    rows = {}
    for name, make in CASES.items():
        if only and only not in name: continue
        encoder = make()
        row = rows[name] = dict(family=encoder.card.family, model_type=encoder.card.model_type, **({"note": QWEN} if encoder.card.family == "vlm" or encoder.card.model_type == "colqwen2" else {}))
        with tempfile.TemporaryDirectory() as tmp:
            try:
                folder = export_sentence_transformers(encoder, Path(tmp)/"st")
                gaps = compare(encoder, folder)
                row |= dict(max_difference={k: float(f"{v:.2g}") for k, v in gaps.items()}, met=max(gaps.values()) <= GOAL, reload=gap(load_encoder(str(folder)).encode(probe_items(encoder)), encoder.encode(probe_items(encoder))) if not encoder.card.multi_vector else None)
            except VembedError as e: row["refused"] = str(e)
            except Exception as e:
                if only: raise
                row["error"] = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
        print(name, {k: v for k, v in row.items() if k not in ("family", "model_type", "note")}, flush=True)
    if not only: write_json(result_file, dict(goal=GOAL, rows=rows, versions=versions(["torch", "transformers", "sentence-transformers", "peft"])))


if __name__ == "__main__": main(*sys.argv[1:])
