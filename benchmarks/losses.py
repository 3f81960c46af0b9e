"""损失与 GradCache 和同行比：同一次运行、两个线程，量时间和内存，写 assets/results/losses.json 和 assets/img/losses.png。
用法（在 benchmarks/peers.txt 的环境里）：python benchmarks/losses.py [infonce gradcache memory maxsim colbert matryoshka plot]
不写名字就全部重做；写了就只重做这几行，其余照旧。时间：轮流跑，先热身，取最小值和中位数，比例用最小值。
内存：每个对手用一个新的子进程，输入造好、热身以后，看再跑一次时常驻内存的最高点涨了多少（VmHWM）；三次的中位数。"""
import json
import operator
import statistics
import sys
import time
from pathlib import Path

import race
import torch
import torch.nn.functional as F
import transformers
from golden import BOTH, ONE_WAY, Given, colpali, columns, dense, maxsim_cpu, mean_colbert_scores, multi, open_clip, score_multi_vector, tokens, util
from peft import LoraConfig, inject_adapter_in_model
from race import Case, compare
from sentence_transformers import SentenceTransformer
from torch import nn

from vembed_nb.core import PACKAGES, machine, set_seed, versions, write_json
from vembed_nb.data.batch import Inputs
from vembed_nb.gradcache import GradCache, graph_bytes
from vembed_nb.losses.contrastive import InfoNCE
from vembed_nb.losses.late import ColBERTLoss
from vembed_nb.losses.matryoshka import Matryoshka
from vembed_nb.losses.targets import make_targets
from vembed_nb.models.base import Encoder, ModelCard, quiet
from vembed_nb.models.load import load_encoder, resolve_model
from vembed_nb.vectors import Embeddings, maxsim, normalize

SEED = 42
PEERS = ["sentence-transformers", "open_clip_torch", "colpali-engine", "maxsim-cpu"]
OURS, ST = "本库", "sentence-transformers"
root = Path(__file__).parent.parent
result_file, image_file = root/"assets/results/losses.json", root/"assets/img/losses.png"


def goal(what, value, sign, limit): return dict(what=what, value=value, goal=f"{sign} {limit}", met={"≤": operator.le, "≥": operator.ge}[sign](value, limit))
def rival(row, key="min_s"): return min(v[key] for n, v in row["contenders"].items() if not n.startswith(OURS))
def of(row, name, key="min_s"): return row["contenders"][name][key]


def rand(*shape): return torch.randn(*shape, requires_grad=True)
def unit(x): return F.normalize(x, dim=-1)
def ids(n): return make_targets([f"q{i}" for i in range(n)], [f"d{i}" for i in range(n)])
def lengths(n, longest): return torch.arange(longest) < torch.randint(int(longest * 0.7), longest + 1, (n,))[:, None]


def infonce_cases(B, both=False, D=256):
    "从没有归一化的向量开始，到它们的梯度为止；τ = 0.05。"
    set_seed(SEED)
    q, d, targets, labels = rand(B, D), rand(B, D), ids(B), torch.arange(B)
    ours = InfoNCE(0.05, learn_temperature=False, directions=("q2d", "d2q") if both else ("q2d",))
    st = dense.MultipleNegativesRankingLoss(None, scale=20.0, directions=BOTH if both else ONE_WAY, partition_mode="per_direction" if both else "joint")

    def materialised():
        z = 20 * unit(q) @ unit(d).T
        return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2 if both else F.cross_entropy(z, labels)

    fs = {OURS: lambda: ours(Embeddings(q), Embeddings(d), targets), "F.cross_entropy": materialised, ST: lambda: st.compute_loss_from_embeddings([q, d], None)}
    if both: fs["open_clip"] = lambda: open_clip.ClipLoss()(unit(q), unit(d), torch.tensor(20.0))
    return {n: Case.loss([q, d], f) for n, f in fs.items()}


def infonce():
    rows, goals = [], []
    for both, name, limit in ((False, "单向", 0.5), (True, "双向", 0.8)):
        for B in (1024, 4096, 16384): rows.append(row := compare(f"InfoNCE {name} B={B}", infonce_cases, dict(B=B, both=both), OURS, seconds=20))
        goals += [goal(f"{name} B=16384 时间：本库 / 最快的同行", of(row, OURS) / rival(row), "≤", limit), goal(f"{name} B=16384 内存：本库 / 最省的同行", of(row, OURS, "peak_mb") / rival(row, "peak_mb"), "≤", 0.05)]
    start = time.perf_counter()
    ids(16384).pairs(0, 1)
    return dict(races=rows, goals=goals, targets_s=time.perf_counter() - start, notes="targets 在计时之外做好；targets_s 是 B=16384 时从字符串做出来并排好序的秒数")


class TinyVLM(Encoder):
    "随机初始化的小 Qwen3-VL：每个样本一段字、零或一张图，取最后一个 token。"
    def __init__(self):
        super().__init__()
        text = dict(vocab_size=1000, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=128,
                    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[16, 8, 8], mrope_interleaved=True), pad_token_id=0)
        vision = dict(depth=4, hidden_size=192, intermediate_size=768, num_heads=4, patch_size=8, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=256,
                      num_position_embeddings=64, deepstack_visual_indexes=[1])
        self.model = transformers.Qwen3VLModel(transformers.Qwen3VLConfig(text_config=text, vision_config=vision, image_token_id=990, video_token_id=991, vision_start_token_id=992, vision_end_token_id=993))
        self.card = ModelCard("vlm", "qwen3_vl", 256, 128)

    def forward(self, inputs):
        ids, mask, more = inputs["input_ids"], inputs["attention_mask"], {}
        if "pixel_values" in inputs: more = dict(pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"], mm_token_type_ids=(ids == 990).int())
        out = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **more).last_hidden_state
        return Embeddings(normalize(out[torch.arange(len(ids)), mask.sum(1) - 1]))


def words(B, n, vocab): return torch.randint(4, vocab, (B, n))


def vlm_inputs(B):
    "查询是 16 个 token 的字；文档是一张 16 到 64 块的图加 8 个 token 的字。"
    grids = torch.tensor([[1, 4, 4], [1, 4, 8], [1, 8, 4], [1, 8, 8]])[torch.randint(4, (B,))]
    rows = [[992, *[990] * (int(g.prod()) // 4), 993, *w] for g, w in zip(grids, words(B, 8, 900).tolist())]
    ids = torch.tensor([r + [0] * (26 - len(r)) for r in rows])
    patches = grids.prod(1)
    docs = Inputs(B, dict(input_ids=ids, attention_mask=(ids > 0).long(), pixel_values=torch.randn(int(patches.sum()), 384), image_grid_thw=grids), dict(pixel_values=patches))
    query = words(B, 16, 900)
    return Inputs(B, dict(input_ids=query, attention_mask=torch.ones_like(query))), docs


def clip_inputs(B):
    "查询是 24 个 token 的字，文档是一张 64×64 的图。"
    text = words(B, 24, 5200)
    text[:, -1] = 3
    return Inputs(B, dict(input_ids=text, attention_mask=torch.ones_like(text))), Inputs(B, dict(pixel_values=torch.randn(B, 3, 64, 64)))


class ForST(nn.Sequential):
    "给 sentence-transformers 的壳：features → sentence_embedding。"
    def forward(self, features):
        tensors = {k: v for k, v in features.items() if k in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")}
        sizes = dict(pixel_values=tensors["image_grid_thw"].prod(1)) if "image_grid_thw" in tensors else {}
        return {"sentence_embedding": self[0](Inputs(len(features["input_ids"]), tensors, sizes)).vectors}


ENCODERS = {"clip": "tiny-clip（1.8 M 参数）", "lora": "tiny-clip + LoRA", "vlm": "小 Qwen3-VL（随机，8 M 参数）"}
PLAIN, NONE, HALF, ALL, CACHED = "整批（本库的损失）", OURS + "，一块不留", OURS + "，留一半", OURS + "，全留", ST + " Cached"


def gradcache_setup(B, kind):
    "编码器、查询、文档。"
    set_seed(SEED)
    encoder = TinyVLM() if kind == "vlm" else load_encoder("tiny-clip")
    if kind == "lora": inject_adapter_in_model(LoraConfig(r=8, init_lora_weights=False, target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]), encoder.model)
    return encoder.train(), *(vlm_inputs if kind == "vlm" else clip_inputs)(B)


def gradcache_cases(B, kind="clip", chunk=32):
    "一步：前向、损失、反向，从清掉梯度开始；同样的权重，同样的张量。"
    encoder, q, d = gradcache_setup(B, kind)
    targets, loss, features = ids(B), InfoNCE(0.05, learn_temperature=False, directions=("q2d",)), [dict(x.tensors) for x in (q, d)]
    if kind == "vlm": st = ForST(encoder)
    else:
        with quiet(): st = SentenceTransformer(resolve_model("tiny-clip"), device="cpu", model_kwargs=dict(dtype=torch.float32)).train()
        st[0].model = encoder.model
        for f, modality in zip(features, ("text", "image")): f["modality"] = modality
    cached, sizes = dense.CachedMultipleNegativesRankingLoss(st, mini_batch_size=chunk), []
    for x in (q, d):
        with graph_bytes(encoder) as size: encoder(x.chunk(chunk)[0])
        sizes.append(size[0] * B // chunk)
    leaves, step = [p for p in encoder.parameters() if p.requires_grad], lambda keep: lambda: GradCache(encoder, loss, chunk, keep=keep).step(q, d, targets=targets)
    fs = {NONE: step(0), HALF: step(sum(sizes) // 2), ALL: step(2**40), PLAIN: lambda: loss(encoder(q), encoder(d), targets), CACHED: lambda: cached(features, None)}
    return {n: Case.loss(leaves, f) for n, f in fs.items()}


def costs(kind, B=256, chunk=32):
    "前向 f、反向 b 各几秒：整批的，和一块一块的（n 是不留图的前向）；中位数。"
    (encoder, *inputs), out = gradcache_setup(B, kind), {k: [] for k in ("f", "b", "chunk_f", "chunk_b", "chunk_n")}

    def timed(key, fn):
        t = time.perf_counter()
        y = fn().vectors if key != "b" and key != "chunk_b" else fn()
        times[key] += time.perf_counter() - t
        return y

    for _ in range(6):
        times = dict.fromkeys(out, 0.0)
        for x in inputs:
            for parts, prefix in (([x], ""), (x.chunk(chunk), "chunk_")):
                for part in parts:
                    if prefix:
                        with torch.no_grad(): timed("chunk_n", lambda: encoder(part))
                    y = timed(prefix + "f", lambda: encoder(part))
                    timed(prefix + "b", lambda: y.backward(torch.ones_like(y)))
        for p in encoder.parameters(): p.grad = None
        for k in out: out[k].append(times[k])
    return {k: round(statistics.median(v[1:]), 4) for k, v in out.items()}


def gradcache(B=256):
    rows, goals = [], []
    for kind, name in ENCODERS.items():
        rows.append(row := compare(f"GradCache {name} B={B} 块=32", gradcache_cases, dict(B=B, kind=kind), PLAIN, seconds=60))
        row["costs"] = c = costs(kind, B)
        row["predicted"] = {"f/(f+b)": (share := c["f"] / (c["f"] + c["b"])), NONE: 1 + share, HALF: 1 + share / 2, NONE + "（按块量的 f、b）": (c["chunk_n"] + c["chunk_f"] + c["chunk_b"]) / (c["f"] + c["b"])}
        print("  ", c, row["predicted"])
        if kind != "lora": goals += [goal(f"{name}：一块不留 / 整批", of(row, NONE) / of(row, PLAIN), "≤", 1.33), goal(f"{name}：一块不留 / {CACHED}", of(row, NONE) / of(row, CACHED), "≤", 1),
                                     goal(f"{name}：{CACHED} / 留一半", of(row, CACHED) / of(row, HALF), "≥", 1.2)]
    note = "LoRA 一行只为说明：底座冻结时反向便宜，f/(f+b) 变大。小 Qwen3-VL：sentence-transformers 读不了这个文件夹（Qwen3VLVideoProcessor 要 torchvision），所以给同一个编码器套一层壳，用它的 Cached 损失"
    return dict(races=rows, goals=goals, notes=note)


def memory(sizes=(256, 1024, 4096), limit_mb=12000):
    "GradCache 的内存随批怎样变；嵌入和它们的梯度（4·B·D 个数）另算。"
    table = {n: {} for n in (NONE, CACHED, PLAIN)}
    for n, row in table.items():
        for B in sizes:
            expected = max(row.values(), default=0) * 4
            if expected < limit_mb: row[B] = race.peak(gradcache_cases, n, dict(B=B))
            else: print(f"  {n} B={B}：大约要 {expected:.0f} MB，不量")
    embeddings = {B: 4 * B * 128 * 4 / 2**20 for B in sizes}
    first, *_, last = [table[NONE][B] - embeddings[B] for B in sizes]
    return dict(peak_mb=table, embeddings_mb=embeddings, goals=[goal(f"B={sizes[0]} → {sizes[-1]}：本库的峰值（除去嵌入和它们的梯度）涨到几倍", last / first, "≤", 1.1)])


def maxsim_cases(Ld, N=500, Lq=32, D=128):
    "一个查询对 N 篇文档；每家拿到自己最喜欢的格式，在计时之外备好。"
    set_seed(SEED)
    with torch.no_grad(): q, d, ok = unit(torch.randn(1, Lq, D)), unit(torch.randn(N, Ld, D)), lengths(N, Ld)
    zero = d * ok[..., None]
    ragged = [x[m].clone() for x, m in zip(d, ok)]
    numbers, fixed, query, q_ok = [x.numpy() for x in ragged], zero.numpy(), q[0].numpy(), torch.ones(1, Lq, dtype=torch.bool)
    qe, de = Embeddings(q, q_ok), Embeddings(d, ok)
    fs = {OURS: lambda: maxsim(qe, de)[0], "maxsim-cpu（长短不一）": lambda: maxsim_cpu.maxsim_scores_variable(query, numbers), "maxsim-cpu（补零）": lambda: maxsim_cpu.maxsim_scores(query, fixed),
          ST: lambda: util.maxsim(q, d, q_ok, ok)[0], "colpali": lambda: score_multi_vector(list(q), ragged, device="cpu")[0],
          "einsum": lambda: torch.einsum("qd,nld->nql", q[0], d).masked_fill_(~ok[:, None], -torch.inf).amax(-1).sum(-1)}
    return {n: Case(f) for n, f in fs.items()}


def scoring():
    rows = [compare(f"MaxSim 32×128 对 500×{Ld}", maxsim_cases, dict(Ld=Ld), OURS, seconds=15) for Ld in (256, 1030)]
    goals = [goal(f"{row['title']}：最快的同行 / 本库", rival(row) / of(row, OURS), "≥", 1.5) for row in rows]
    return dict(races=rows, goals=[*goals, goal("本库的内存（MB），两种长度里大的", max(of(r, OURS, "peak_mb") for r in rows), "≤", 32)], notes="colpali 和补零的 maxsim-cpu 没有掩码，靠补零；余弦全是负数时补零会赢，这里不会")


def colbert_cases(B, Lq=32, Ld=256, D=128):
    "晚交互的 InfoNCE，MaxSim 取平均，τ = 0.02；从没有归一化的向量开始。"
    set_seed(SEED)
    q, d, qm, dm, targets = rand(B, Lq, D), rand(B, Ld, D), lengths(B, Lq), lengths(B, Ld), ids(B)
    ours, theirs = ColBERTLoss(0.02, learn_temperature=False), colpali.ColbertLoss(temperature=0.02, normalize_scores=True)
    st = multi.MultiVectorMultipleNegativesRankingLoss(Given(), scale=50.0, similarity_fct=mean_colbert_scores)
    fs = {OURS: lambda: ours(Embeddings(q, qm), Embeddings(d, dm), targets), ST: lambda: st(tokens([unit(q), unit(d)], [qm, dm])),
          "colpali": lambda: theirs(unit(q) * qm[..., None], unit(d) * dm[..., None])}
    return {n: Case.loss([q, d], f) for n, f in fs.items()}


def colbert():
    row = compare("ColBERT 损失 B=64 Lq=32 Ld=256", colbert_cases, dict(B=64), OURS, seconds=60)
    return dict(races=[row], goals=[goal("时间：本库 / 最快的同行", of(row, OURS) / rival(row), "≤", 1), goal("内存：本库 / 最省的同行", of(row, OURS, "peak_mb") / rival(row, "peak_mb"), "≤", 0.1)])


SINGLE = OURS + "，只有一个长度"


def matryoshka_cases(B, dims, both=False):
    "五个长度的 InfoNCE，τ = 0.05。"
    set_seed(SEED)
    q, d, targets = rand(B, dims[0]), rand(B, dims[0]), ids(B)
    inner, model = InfoNCE(0.05, learn_temperature=False, directions=("q2d", "d2q") if both else ("q2d",)), Given(dims[0])
    st = dense.MatryoshkaLoss(model, dense.MultipleNegativesRankingLoss(model, scale=20.0, directions=BOTH if both else ONE_WAY, partition_mode="per_direction" if both else "joint"), dims)
    ours, e = Matryoshka(inner, dims), lambda: (Embeddings(q), Embeddings(d), targets)
    return {OURS: Case.loss([q, d], lambda: ours(*e())), ST: Case.loss([q, d], lambda: st(columns(q, d), None)), SINGLE: Case.loss([q, d], lambda: inner(*e()), same=False)}


def matryoshka():
    rows, goals = [], []
    for B, dims in ((4096, [1536, 1024, 768, 512, 256]), (2048, [768, 512, 256, 128, 64])):
        for both, name in ((False, "单向"), (True, "双向")):
            size = dict(B=B, dims=dims, both=both)
            rows.append(row := compare(f"Matryoshka {name} B={B} dims={dims}", matryoshka_cases, size, OURS, seconds=30))
            if not both: goals += [goal(f"B={B} D={dims[0]}：五个长度 / 一个长度", of(row, OURS) / of(row, SINGLE), "≤", 1.5), goal(f"B={B} D={dims[0]}：本库 / {ST}", of(row, OURS) / of(row, ST), "≤", 1)]
    return dict(races=rows, goals=goals)


# 画图，写结果
COLORS = {OURS: "#0f766e", HALF: "#14b8a6", ALL: "#5eead4", NONE: "#0f766e", SINGLE: "#99f6e4", ST: "#f59e0b", CACHED: "#f59e0b", "F.cross_entropy": "#94a3b8", PLAIN: "#94a3b8", "einsum": "#94a3b8",
          "open_clip": "#a78bfa", "colpali": "#60a5fa", "maxsim-cpu（长短不一）": "#f472b6", "maxsim-cpu（补零）": "#f9a8d4"}


def bars(ax, rows, titles, heading, unit="s", base=None):
    "每一组是一场比赛，每一条是一个对手，写着时间和额外的内存；base 给出时画它的几倍。"
    y, at, names = 0, [], []
    for row, title in zip(rows, titles):
        ax.text(0, y, title, fontsize=10, color="#64748b", va="center")
        for n, v in row["contenders"].items():
            y += 1
            x = v["ratio"] if base else v["min_s"] * (1000 if unit == "ms" else 1)
            ax.barh(y, x, color=COLORS[n], height=0.8)
            ax.text(x, y, f" {x:.2f} 倍，{v['peak_mb']:,.0f} MB" if base else f" {x:.3g} {unit}，{v['peak_mb']:,.0f} MB", va="center", fontsize=9.5, color="#334155")
            at.append(y)
            names.append(n)
        y += 1.6
    ax.set_yticks(at, names, fontsize=9.5)
    ax.set_ylim(max(y, 8.5) - 0.6, -1)
    ax.set_xlim(0, ax.get_xlim()[1] * 1.28)
    ax.set_xticks([])
    ax.set_title(heading, fontsize=12, loc="left", color="#0f172a")


def lines(ax, table, heading):
    "GradCache 的内存峰值随批怎样变。"
    for n, row in table.items():
        xs, ys = list(map(int, row)), list(row.values())
        ax.plot(xs, ys, "o-", color=COLORS[n], lw=2.2)
        ax.text(xs[-1] * 1.1, ys[-1], f"{n}\n{ys[-1]:,.0f} MB", color=COLORS[n], fontsize=9.5, va="bottom" if n == NONE else "top")
    ax.set(xscale="log", yscale="log", xlim=(200, 16000), ylim=(70, 5000))
    ax.set_xticks([256, 1024, 4096], ["B = 256", "1,024", "4,096"])
    ax.set_yticks([100, 300, 1000, 3000], ["100 MB", "300 MB", "1 GB", "3 GB"])
    ax.minorticks_off()
    ax.grid(alpha=0.25)
    ax.set_title(heading, fontsize=12, loc="left", color="#0f172a")


def plot(result):
    "六格：一格一行。"
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from vembed_nb.fonts import use_chinese_font
    use_chinese_font()
    fig, axes = plt.subplots(3, 2, figsize=(14, 13), gridspec_kw=dict(height_ratios=[17, 13, 9]))
    (a, b), (c, d), (e, f) = axes
    picked = lambda name, **size: [r for r in result["rows"].get(name, {}).get("races", []) if all(r["size"][k] == v for k, v in size.items())]
    bars(a, picked("infonce", B=16384), ["单向", "双向"], "InfoNCE 前向加反向，B = 16,384，D = 256")
    bars(b, picked("gradcache"), ["tiny-clip", "tiny-clip + LoRA（底座冻结）", "小 Qwen3-VL"], "GradCache 一步，B = 256，一块 32；整批 = 1", base=PLAIN)
    if "memory" not in result["rows"]: c.axis("off")
    lines(c, result["rows"].get("memory", {}).get("peak_mb", {}), "GradCache 的内存峰值，tiny-clip，一块 32")
    bars(d, picked("maxsim"), ["每篇 256 个 token", "每篇 1,030 个 token"], "MaxSim 打分：32 个 token 的查询对 500 篇文档", unit="ms")
    bars(e, picked("colbert"), ["B = 64，Lq = 32，Ld = 256"], "ColBERT 损失前向加反向", unit="ms")
    bars(f, picked("matryoshka", both=False), ["B = 4,096，D = 1,536", "B = 2,048，D = 768"], "Matryoshka 五个长度，单向 InfoNCE")
    for ax in axes.flat:
        ax.spines[["top", "right", *(["bottom"] if ax is not c else [])]].set_visible(False)
        ax.tick_params(length=0)
    fig.suptitle(f"和同类库在同一次运行里比（{result['threads']} 个线程，fp32；每条写着时间和额外的内存）", fontsize=14, x=0.02, ha="left")
    fig.tight_layout(rect=(0, 0, 1, 0.985), h_pad=2.5, w_pad=3)
    image_file.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(image_file, dpi=110)


ROWS = dict(infonce=infonce, gradcache=gradcache, memory=memory, maxsim=scoring, colbert=colbert, matryoshka=matryoshka)


def save(rows):
    "并进 JSON：别的行照旧。"
    result = json.loads(result_file.read_text(encoding="utf-8")) if result_file.exists() else dict(rows={})
    result |= dict(seed=SEED, threads=race.THREADS, machine=machine(), versions=versions([*PACKAGES, *PEERS]))
    result["rows"] = {n: (result["rows"] | rows)[n] for n in ROWS if n in result["rows"] | rows}
    write_json(result_file, result)
    return result


def main(*names):
    if unknown := set(names) - {*ROWS, "plot"}: raise SystemExit(f"没有 {'、'.join(unknown)}；可选 {'、'.join(ROWS)}、plot")
    for name in [n for n in names or ROWS if n in ROWS]: save({name: race.rounded(ROWS[name]())})  # 先算完再读文件，别的进程刚写的行不会丢
    result = save({})
    plot(result)
    for row in result["rows"].values():
        for g in row["goals"]: print("达到" if g["met"] else "没有达到", f"{g['what']}：{g['value']:.3f}（目标 {g['goal']}）")


if __name__ == "__main__":
    race.start()
    main(*sys.argv[1:])
