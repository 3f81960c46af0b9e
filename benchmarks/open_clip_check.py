"""open_clip 的模型守不守约定：随机权重的 EVA、ViT、SigLIP、CoCa 小模型和全尺寸的 EVA02-B-16，与 open_clip 自己的结果并排比，写 assets/results/open_clip.json。
用法（在 benchmarks/peers.txt 的环境里，另装 torchvision）：
    .venv-peers/bin/pip install --no-deps --target 某个文件夹 torchvision
    PYTHONPATH=某个文件夹 .venv-peers/bin/python benchmarks/open_clip_check.py
torchvision 与 CPU 版的 torch 合不来（operator torchvision::nms does not exist），这里先登记两个空的算子；图像变换用不着它们。"""
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", VEMBED_PROGRESS="0")
import numpy as np
import torch
from PIL import Image

LIBRARY = torch.library.Library("torchvision", "DEF")
for op in ("nms", "qnms"): LIBRARY.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import open_clip  # noqa: E402

from vembed_nb.core import VembedError  # noqa: E402
from vembed_nb.data.tasks import Item  # noqa: E402
from vembed_nb.models.dual import OpenClipEncoder, to_pixels  # noqa: E402
from vembed_nb.models.load import load_encoder  # noqa: E402
from vembed_nb.tiny import tiny_path  # noqa: E402
from vembed_nb.vectors import normalize  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
TEXT = dict(context_length=77, vocab_size=49408, width=64, heads=2, layers=2)
SMALL = {
    "eva": dict(embed_dim=32, vision_cfg=dict(image_size=224, timm_model_name="eva02_tiny_patch14_224", timm_model_pretrained=False, timm_pool="token", timm_proj=None), text_cfg=TEXT, custom_text=True),
    "vit": dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=2, width=64, head_width=32, patch_size=8), text_cfg=TEXT),
    "siglip": dict(embed_dim=192, init_logit_bias=-10, custom_text=True, vision_cfg=dict(image_size=224, timm_model_name="vit_tiny_patch16_224", timm_model_pretrained=False, timm_pool="map", timm_proj="none"),
                   text_cfg=TEXT | dict(context_length=32, vocab_size=6000, hf_tokenizer_name="local", tokenizer_kwargs={"clean": "canonicalize"}, no_causal_mask=True, proj_bias=True, pool_type="last", norm_kwargs={"eps": 1e-6})),
    "coca": dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=2, width=64, head_width=32, patch_size=8, attentional_pool=True, attn_pooler_heads=2, output_tokens=True),
                 text_cfg=TEXT | dict(context_length=76, embed_cls=True, output_tokens=True), multimodal_cfg=dict(context_length=76, vocab_size=49408, width=64, heads=2, layers=2, attn_pooler_heads=2), custom_text=True),
}
TEXTS = ["a red cup", "红色的杯子，和两把雨伞", "", "A Photo of TWO dogs &amp; a cat", "word " * 100]


def picture(seed, size): return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).resize(size)


PICTURES = [picture(0, (300, 200)), picture(1, (200, 331)), picture(2, (224, 224)), picture(3, (31, 57)), picture(4, (640, 97))]
MIXED = [Item("a red cup"), Item(image=PICTURES[0]), Item("换成蓝色", PICTURES[1]), Item("two dogs"), Item(image=PICTURES[3])]


def gap(a, b): return float((a - b).abs().max())


def small(name, folder):
    "随机权重的小模型；权重放大，让不同的输入得到不同的向量。"
    (folder/f"{name}.json").write_text(json.dumps(SMALL[name]))
    open_clip.add_model_config(folder/f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(name)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1: p.mul_(2)
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tiny_path("tiny-siglip")), context_length=32, clean="canonicalize") if name == "siglip" else open_clip.get_tokenizer(name)
    return OpenClipEncoder(model, open_clip.get_model_config(name), tokenizer).eval()


@torch.inference_mode()
def against(enc):
    "与 open_clip 自己的分词、预处理、向量比。"
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**enc.preprocess_cfg), is_train=False)
    pixels = torch.stack([transform(p) for p in PICTURES])
    out = {"preprocess": gap(pixels, to_pixels(PICTURES, enc.preprocess_cfg))}
    out["tokens_equal"] = torch.equal(enc.tokenizer(TEXTS), enc.preprocess([Item(t) for t in TEXTS])["input_ids"])
    enc.truncated = 0
    enc.preprocess([Item(t) for t in TEXTS])
    out["truncated"] = enc.truncated
    out["text"] = gap(enc.model.encode_text(enc.tokenizer(TEXTS), normalize=True), enc(enc.preprocess([Item(t) for t in TEXTS])).vectors)
    out["image"] = gap(enc.model.encode_image(pixels, normalize=True), enc(enc.preprocess([Item(image=p) for p in PICTURES])).vectors)
    return out


@torch.inference_mode()
def contract(enc, folder):
    "批的大小、切块、图加文、存了再读。"
    inputs = enc.preprocess(MIXED)
    whole = enc(inputs).vectors
    enc.save(folder)
    again = load_encoder(str(folder))
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    theirs = torch.cat([model.encode_text(tokenizer(TEXTS[:4]), normalize=True), model.encode_image(torch.stack([transform(p) for p in PICTURES]), normalize=True)])
    half = load_encoder(str(folder), dtype=torch.bfloat16)
    return {"parameters": sum(p.numel() for p in enc.parameters()), "different": float((whole @ whole.T - torch.eye(len(whole))).max()),
            "one_by_one": gap(whole, torch.cat([enc(enc.preprocess([i])).vectors for i in MIXED])), "chunks": gap(whole, torch.cat([enc(c).vectors for c in inputs.chunk(2)])),
            "image_plus_text": gap(whole[2], normalize(enc.encode(["换成蓝色"])[0] + enc.encode([PICTURES[1]])[0])),
            "reload": gap(enc.encode(MIXED), again.encode(MIXED)), "same_card": again.card == enc.card, "opened_by_open_clip": gap(theirs, enc.encode([*(Item(t) for t in TEXTS[:4]), *PICTURES])),
            "bf16_cosine_min": float((half.encode(MIXED) * whole).sum(1).min()), "files": sorted(p.name for p in folder.iterdir())}


def gradients(enc):
    "每个没有冻住的参数都有梯度的路吗？没有的列出来。"
    enc.train()
    enc(enc.preprocess(MIXED)).vectors.pow(3).sum().backward()
    idle = sorted(n for n, p in enc.named_parameters() if p.grad is None and p.requires_grad)
    enc.zero_grad(set_to_none=True)
    enc.eval()
    return idle


def transforms():
    "三种缩放、两种插值、方的和长方的，与 torchvision 的变换比。"
    worst = {}
    for mode in ("shortest", "longest", "squash"):
        for interpolation in ("bicubic", "bilinear"):
            for size in (32, 97, (48, 32), (32, 80)):
                cfg = dict(size=size, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD, interpolation=interpolation, resize_mode=mode, fill_color=127)
                theirs = open_clip.image_transform(size, False, cfg["mean"], cfg["std"], mode, interpolation, 127)
                worst[f"{mode}_{interpolation}_{size}"] = gap(torch.stack([theirs(p) for p in PICTURES]), to_pixels(PICTURES, cfg))
    return worst


def errors():
    "写错的名字各得一句话；没有网时也是。"
    out = {}
    for name in ("open_clip:EVA02-B-16", "open_clip:EVA02-B-61/merged2b_s8b_b131k", "open_clip:EVA02-B-16/merged2b", "open_clip:ViT-B-32/openai", "open_clip:EVA02-B-16/merged2b_s8b_b131k"):
        try: load_encoder(name); raise SystemExit(f"{name} 应当报错")
        except VembedError as e: out[name] = str(e)
    return out


def main():
    result = {"what": "随机权重；误差是最大的绝对差", "versions": {p: version(p) for p in ("open_clip_torch", "timm", "torch", "torchvision", "transformers", "pillow")}}
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)
        for name in SMALL:
            enc = small(name, folder)
            result[name] = against(enc) | contract(enc, folder/name) | {"without_gradient": gradients(enc)}
            print(name, json.dumps(result[name], ensure_ascii=False))
    torch.manual_seed(0)
    full = OpenClipEncoder(open_clip.create_model("EVA02-B-16"), open_clip.get_model_config("EVA02-B-16"), open_clip.get_tokenizer("EVA02-B-16")).eval()
    result["EVA02-B-16"] = against(full) | {"parameters": sum(p.numel() for p in full.parameters()), "dim": full.dim, "max_length": full.card.max_length, "preprocess_cfg": full.preprocess_cfg}
    result["transforms"], result["errors"] = transforms(), errors()
    (ROOT/"assets/results/open_clip.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: result[k] for k in ("EVA02-B-16", "transforms", "errors")}, ensure_ascii=False, indent=1))
    bad = [(m, k, v) for m in (*SMALL, "EVA02-B-16") for k, v in result[m].items() if (k in ("preprocess", "text", "image", "one_by_one", "chunks", "image_plus_text", "opened_by_open_clip") and v > 1e-5) or (k == "reload" and v > 1e-6) or v is False]
    bad += [(m, "without_gradient", n) for m in SMALL for n in result[m]["without_gradient"] if n not in ("model.logit_scale", "model.logit_bias")]  # 温度在损失里训
    bad += [("transforms", k, v) for k, v in result["transforms"].items() if v > 1e-5]
    sys.exit(f"超过 1e-5：{bad}" if bad else None)


if __name__ == "__main__": main()
