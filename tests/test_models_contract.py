"""编码器的约定，对每个家族逐条验证：声明了会的，真的会；没有声明的，用一句话拒绝。权重是随机的，所以只看性质，不看好坏。"""
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item
from vembed_nb.models.base import CAN, quiet
from vembed_nb.models.load import load_encoder
from vembed_nb.vectors import Embeddings, maxsim

CASES = {  # 名字 → (造它的模块, 选项)
    "clip": ("micro_dual", dict(kind="clip")),
    "metaclip_2": ("micro_dual", dict(kind="metaclip_2")),
    "chinese_clip": ("micro_dual", dict(kind="chinese_clip")),
    "siglip": ("micro_dual", dict(kind="siglip")),
    "siglip2": ("micro_dual", dict(kind="siglip2")),
    "qwen3_vl": ("micro_vlm", dict(model_type="qwen3_vl")),
    "qwen2_vl": ("micro_vlm", dict(model_type="qwen2_vl")),
    "qwen2_5_vl": ("micro_vlm", dict(model_type="qwen2_5_vl")),
    "qwen3_vl 左补齐": ("micro_vlm", dict(model_type="qwen3_vl", padding_side="left")),
    "colqwen2": ("micro_late", dict(kind="colqwen2")),
    "colpali": ("micro_late", dict(kind="colpali")),
    "colmodernvbert": ("micro_late", dict(kind="colmodernvbert")),
    "colsmol": ("micro_late", dict(kind="colsmol")),
    "bert + dinov2": ("micro_composed", dict()),
    "只有 bert": ("micro_composed", dict(text="bert", image="", head="none")),
    "只有 dinov2": ("micro_composed", dict(text="", image="dinov2", head="none")),
    "qwen3（文字）": ("micro_composed", dict(text="qwen3", image="", head="none")),
}
CLOSE = 2e-5  # fp32，随机的权重


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    "(名字, 文件夹, 编码器, 样本, 图片根目录)。"
    module, options = CASES[request.param]
    root = tmp_path_factory.mktemp("case")
    rng = np.random.default_rng(0)
    for i, size in enumerate([(32, 32), (48, 24), (20, 40), (64, 64)]):
        Image.fromarray(rng.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(root/f"{i}.png")
    folder = str(importlib.import_module(module).build(root/"model", **options))
    encoder = load_encoder(folder)
    return request.param, folder, encoder, samples(encoder.can), str(root)


def samples(can):
    "会什么就给什么：长短不一的文字、大小不一的图、图加文字、三张图。"
    out = []
    if "text" in can: out += [Item("红"), Item("a red cup 红色的杯子和一个蓝色的杯子"), Item("两个杯子")]
    if "image" in can: out += [Item(image="0.png"), Item(image="1.png")]
    if "both" in can: out += [Item("换成红色", "2.png")]
    if "images" in can: out += [Item("这三件", ["0.png", "3.png", "1.png"]), Item(image=("1.png", "2.png"))]
    return out


def rows(x):
    "每个样本的向量；多向量去掉补齐。"
    if isinstance(x, Embeddings) and x.mask is None: return list(x.vectors)
    return [v[m] for v, m in zip(x.vectors, x.mask)] if isinstance(x, Embeddings) else list(x)


def gap(a, b):
    "两次编码最大的差；token 数不同就是无穷大。"
    return max((float((x - y).abs().max()) if x.shape == y.shape else float("inf")) for x, y in zip(rows(a), rows(b)))


def whole(encoder, items, root):
    "一批一次过。"
    with torch.inference_mode(): return encoder(encoder.preprocess(items, root))


def test_declares(case):
    "声明的能力在表里；没有声明的，拒绝时说出第几个样本。"
    name, _, enc, items, root = case
    assert enc.can <= set(CAN) and enc.family == enc.card.family and enc.why
    assert ("multi_vector" in enc.can) == enc.card.multi_vector
    probes = {"text": Item("红"), "image": Item(image="0.png"), "both": Item("红", "0.png"), "images": Item("红", ["0.png", "1.png"])}
    for what, item in probes.items():
        need = {item.kind} | ({"images"} if what == "images" else set())
        if need <= enc.can: enc.encode([item], image_root=root)
        else:
            with pytest.raises(VembedError, match="第 1 个样本"): enc.encode([items[0], item], image_root=root)
    with pytest.raises(VembedError, match="既没有文字也没有图片"): enc.encode([Item()], image_root=root)


def test_shape_and_norm(case):
    name, _, enc, items, root = case
    out = enc.encode(items, image_root=root)
    assert isinstance(out, Embeddings) == enc.card.multi_vector
    for v in rows(out):
        assert v.dtype == torch.float32 and v.shape[-1] == enc.dim
        if enc.card.normalize: assert torch.allclose(v.norm(dim=-1), torch.ones(v.shape[:-1]), atol=1e-5)
    distinct = torch.stack([v if v.ndim == 1 else v.mean(0) for v in rows(out)])
    assert float(torch.cdist(distinct, distinct).fill_diagonal_(1).min()) > 1e-4, "不同的样本得到了同样的向量"


def test_batch_and_order(case):
    "一个一个编码 = 一批编码 = 打乱次序编码。"
    name, _, enc, items, root = case
    all_at_once = enc.encode(items, image_root=root)
    one_by_one = [rows(enc.encode([i], image_root=root))[0] for i in items]
    assert gap([*rows(all_at_once)], one_by_one) <= CLOSE
    order = list(reversed(range(len(items))))
    assert gap([rows(all_at_once)[i] for i in order], rows(enc.encode([items[i] for i in order], batch_size=3, image_root=root))) <= CLOSE


def test_padding(case):
    "同批里有没有长的样本，短的向量都一样。"
    name, _, enc, items, root = case
    alone = rows(whole(enc, items[:1], root))[0]
    if "text" in enc.can: longest = Item("杯子" * 6)
    else: longest = Item(image="3.png")
    together = rows(whole(enc, [items[0], longest], root))[0]
    assert alone.shape == together.shape and float((alone - together).abs().max()) <= CLOSE


def test_chunks(case):
    "`Inputs.chunk` 之后分块过 = 整批过；包括每块一个样本。"
    name, _, enc, items, root = case
    inputs = enc.preprocess(items, root)
    with torch.inference_mode():
        full = rows(enc(inputs))
        for n in (1, 2, 3): assert gap(full, [v for c in inputs.chunk(n) for v in rows(enc(c))]) <= CLOSE


def test_reload(case, tmp_path):
    "存下去读回来，向量相同；再存一次也相同。"
    name, folder, enc, items, root = case
    before = enc.encode(items, image_root=root)
    enc.save(tmp_path/"again")
    again = load_encoder(tmp_path/"again")
    assert gap(before, again.encode(items, image_root=root)) <= 1e-6
    assert again.card == enc.card
    for role in ("query", "document"): assert gap(enc.encode(items, image_root=root, role=role), again.encode(items, image_root=root, role=role)) <= 1e-6


def test_prompts_are_saved(case, tmp_path):
    "提示是模型的一部分：改了提示，向量就变；存下去读回来，变了的还是变了的。"
    name, folder, _, items, root = case
    enc = load_encoder(folder)
    if "text" not in enc.can: pytest.skip("没有文字")
    plain = enc.encode(items[:3], image_root=root, role="query")
    enc.card.prompts = {**enc.card.prompts, "query": "杯子杯子："}
    changed = enc.encode(items[:3], image_root=root, role="query")
    assert gap(plain, changed) > 1e-4
    enc.save(tmp_path/"m")
    assert gap(changed, load_encoder(tmp_path/"m").encode(items[:3], image_root=root, role="query")) <= 1e-6


def test_duplicates_dtype_dim(case):
    "重复的只算一次；dim 截短再归一化，太大就拒绝；float16 省一半。"
    name, _, enc, items, root = case
    twice = rows(enc.encode([items[0], items[1], items[0]], image_root=root))
    assert torch.equal(twice[0], twice[2])
    short = rows(enc.encode(items, image_root=root, dim=4))
    full = rows(enc.encode(items, image_root=root))
    if enc.card.normalize: full = [torch.nn.functional.normalize(v[..., :4], dim=-1) for v in full]
    assert gap(short, [v[..., :4] for v in full]) <= CLOSE
    with pytest.raises(VembedError, match="dim"): enc.encode(items, image_root=root, dim=enc.dim + 1)
    assert rows(enc.encode(items, image_root=root, dtype=torch.float16))[0].dtype == torch.float16
    assert gap(enc.encode(items, image_root=root), enc.encode(items, image_root=root, batch_size=1, devices=["cpu", "cpu"])) <= CLOSE


def test_gradients(case):
    "梯度到达每个要训练的参数，到不了任何冻结的；没有路的参数已经冻结。"
    name, folder, _, items, root = case
    enc = load_encoder(folder).train()
    emb = enc(enc.preprocess(items, root))
    g = torch.Generator().manual_seed(0)
    (emb.vectors * torch.randn(emb.vectors.shape, generator=g)).sum().backward()
    trained = {n: p for n, p in enc.model.named_parameters() if p.requires_grad}
    lost = [n for n, p in trained.items() if (p.grad is None or not p.grad.abs().any()) and not n.endswith(("logit_scale", "logit_bias", "k_proj.bias", "key.bias"))]  # 键的偏置在 softmax 里抵消
    assert not lost, f"没有梯度的参数要冻结并列出来：{lost[:8]}"
    assert trained and not [n for n, p in enc.named_parameters() if not p.requires_grad and p.grad is not None]


def test_missing_and_unexpected_keys(case, tmp_path):
    "少一个权重、多一个权重、形状不对，都打不开。"
    from safetensors.torch import load_file, save_file

    name, folder, _, _, _ = case
    for k, change in enumerate((lambda w, key: w.pop(key), lambda w, key: w.update({"surprise.weight": torch.zeros(2)}), lambda w, key: w.update({key: torch.zeros(3, 5, 7)}))):
        bad = tmp_path/f"bad{k}"
        shutil.copytree(folder, bad)
        for file in sorted(bad.rglob("*.safetensors")):
            w = load_file(file)
            change(w, sorted(w)[len(w) // 2])
            save_file(w, file, metadata={"format": "pt"})
        with pytest.raises(VembedError, match="权重"): load_encoder(bad)


def test_plain_transformers_opens_it(case):
    "transformers 自己打得开，一个权重也不少。"
    import transformers as tf
    from pathlib import Path

    name, folder, enc, _, _ = case
    folders = [p.parent for p in sorted(Path(folder).rglob("config.json"))]
    assert folders, "没有 config.json"
    for f in folders:
        made = json.loads((f/"config.json").read_text())["architectures"][0]
        cls, own = (tf.Idefics3Model, ("linear.weight", "linear.bias")) if made == "ColIdefics3" else (getattr(tf, made), ())  # ColSmol：transformers 只有骨干，投影层在它看来是多出的
        with quiet(): model, info = cls.from_pretrained(f, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"], info
        unexpected = [k for k in info["unexpected_keys"] if not k.endswith("position_ids") and k not in own]
        assert not unexpected, unexpected
        if "text" in enc.can and (f/"tokenizer_config.json").exists():
            with quiet(): assert len(tf.AutoTokenizer.from_pretrained(f)) > 100


def test_lora(case, tmp_path):
    "LoRA：只有适配器在训练；存取后向量相同；合并后与没有合并时相同。"
    from vembed_nb.models import adapt

    name, folder, _, items, root = case
    enc = load_encoder(folder)
    plain = enc.encode(items, image_root=root)
    adapt.lora(enc, r=2, alpha=4)
    assert gap(plain, enc.encode(items, image_root=root)) <= CLOSE, "刚加上的 LoRA 什么也不该改变"
    g = torch.Generator().manual_seed(1)
    for n, p in enc.named_parameters():
        if "lora_B" in n: p.data = torch.randn(p.shape, generator=g) * .2
    changed = enc.encode(items, image_root=root)
    assert gap(plain, changed) > 1e-4, "LoRA 没有挂到有用的地方"
    enc.save(tmp_path/"adapter")
    assert not list((tmp_path/"adapter").glob("model*.safetensors"))
    assert gap(changed, load_encoder(tmp_path/"adapter").encode(items, image_root=root)) <= 1e-6
    enc = adapt.merge(enc) or enc
    assert gap(changed, enc.encode(items, image_root=root)) <= 1e-4
    enc.save(tmp_path/"merged")
    assert gap(changed, load_encoder(tmp_path/"merged").encode(items, image_root=root)) <= 1e-4


def test_maxsim_ignores_padding(case):
    "多向量：补齐的 token 不参加 MaxSim。"
    name, _, enc, items, root = case
    if not enc.card.multi_vector: pytest.skip("单向量")
    emb = enc.encode(items, image_root=root)
    alone = torch.stack([torch.stack([maxsim(_one(emb, i), _one(emb, j))[0, 0] for j in range(len(items))]) for i in range(len(items))])
    assert float((maxsim(emb, emb) - alone).abs().max()) <= 1e-4


def _one(emb, i):
    n = int(emb.mask[i].sum())
    return Embeddings(emb.vectors[i:i + 1][emb.mask[i:i + 1]].view(1, n, -1), torch.ones(1, n, dtype=torch.bool))


def test_broken_image(case):
    name, _, enc, _, root = case
    if "image" not in enc.can: pytest.skip("没有图")
    from pathlib import Path
    (Path(root)/"empty.png").write_bytes(b"")
    for bad, word in (("empty.png", "空文件"), ("nowhere.png", "不存在"), ("../escape.png", "之外")):
        with pytest.raises(VembedError, match=word): enc.encode([Item(image="0.png"), Item(image=bad)], image_root=root)


def test_long_text_is_counted(case):
    "太长的文字被截断，数得出来，而且提醒一次。"
    name, folder, _, _, root = case
    enc = load_encoder(folder)
    if "text" not in enc.can: pytest.skip("没有文字")
    with pytest.warns(UserWarning, match="1 段文字"): enc.encode(["杯子" * enc.card.max_length, "短"], image_root=root)
    assert enc.truncated == 1
