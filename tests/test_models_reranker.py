"重排器：与 transformers 和作者的写法相同；补齐、分批、次序不变；存读；截断；重排；坏输入。"
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import transformers as tf
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from micro_reranker import build

from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item
from vembed_nb.models.base import quiet
from vembed_nb.models.files import Source
from vembed_nb.models.reranker import HEAD, SYSTEM, Reranker

KINDS = [("qwen3_vl", ""), ("qwen3_vl", "head"), ("qwen2_5_vl", ""), ("qwen2_vl", ""), ("qwen3", ""), ("qwen3", "head"), ("bert", ""), ("roberta", "")]
NAMES = ["-".join(filter(None, k)) for k in KINDS]
RED, BLUE = (Image.new("RGB", size, c) for size, c in (((60, 40), "red"), ((40, 64), "blue")))
TEXTS = [(Item("红色的杯子"), Item("一个很长的描述：红色的陶瓷杯子，放在桌上，旁边有一把椅子")), (Item("红色的杯子 cup"), Item("短")), (Item("蓝"), Item("蓝色的杯子，蓝色的"))]
IMAGES = [(Item("红色的杯子"), Item(image=RED)), (Item("换成蓝色", RED), Item("蓝色", BLUE)), (Item("哪一件"), Item("三张", [RED, BLUE, RED])), (Item(image=BLUE), Item("没有图的文档"))]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("rerankers")
    return {name: build(root/name, kind=k, form=f) for name, (k, f) in zip(NAMES, KINDS)}


def opened(folder, **kw): return Reranker.open(Source(Path(folder).name, str(folder)), **kw).eval()


def pairs_for(r): return TEXTS + (IMAGES if r.chat else [])


def refused(call, *words):
    with pytest.raises(VembedError) as e: call()
    assert all(w in str(e.value) for w in words), str(e.value)


@pytest.mark.parametrize("name", NAMES)
def test_padding_batches_and_order(folders, name):
    r = opened(folders[name])
    pairs = pairs_for(r)
    want = torch.cat([r.score_pairs([p]) for p in pairs])
    assert want.isfinite().all() and want.std() > 1e-5
    inputs = r.preprocess(pairs)
    with torch.inference_mode(): whole, chunks = r(inputs), torch.cat([r(c) for c in inputs.chunk(2)])
    others = [whole, chunks, r.score_pairs(pairs, batch_size=3), r.score_pairs(pairs[::-1]).flip(0)]
    if r.parts: others.append(opened(folders[name], padding_side="left").score_pairs(pairs))
    for other in others: assert torch.allclose(other, want, atol=1e-5), name


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("qwen3_vl-head", "qwen3-head")])
def test_same_as_plain_transformers(folders, name):
    "同一个文件夹，transformers 自己打开，用它自己的前向（位置编码也是它自己算的）。"
    r = opened(folders[name])
    auto = tf.AutoModelForImageTextToText if r.chat else tf.AutoModelForCausalLM if r.parts else tf.AutoModelForSequenceClassification
    with quiet(): model, tok = auto.from_pretrained(folders[name]).eval(), tf.AutoTokenizer.from_pretrained(folders[name])
    for q, d in pairs_for(r):
        if not r.parts:
            x = dict(tok(q.text, d.text, return_tensors="pt"))
            assert ("token_type_ids" in x) == (name == "bert")
        else:
            x = dict(r.preprocess([(q, d)]).tensors)
            if r.chat: x["mm_token_type_ids"] = (x["input_ids"] == r.chat.image_id).int()
        with torch.inference_mode(): logits = model(**x).logits[0]
        want = logits[-1, tok.convert_tokens_to_ids("yes")] - logits[-1, tok.convert_tokens_to_ids("no")] if r.parts else logits[0]
        assert torch.allclose(r.score_pairs([(q, d)])[0], want, atol=1e-5)


def test_sequence_classification_of_a_causal_model(folders):
    r = opened(folders["qwen3-head"])
    with quiet(): model = tf.AutoModelForSequenceClassification.from_pretrained(folders["qwen3-head"]).eval()
    with torch.inference_mode(): want = model(**r.preprocess(TEXTS).tensors).logits[:, 0]
    assert torch.allclose(r.score_pairs(TEXTS), want, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_same_as_cross_encoder(tmp_path, kind):
    "同一个文件夹，sentence-transformers 的 CrossEncoder 打开，logit 相同；它默认的 predict 就是我们的 sigmoid。"
    st = pytest.importorskip("sentence_transformers")
    folder = build(tmp_path, kind=kind, initializer_range=.3)  # 权重大一些，不同的对分数才分得开
    r, texts = opened(folder), [(q.text, d.text) for q, d in TEXTS]
    with quiet(): theirs = st.CrossEncoder(str(folder), device="cpu")
    for kw, activation in (({"activation_fn": torch.nn.Identity()}, "none"), ({}, "sigmoid")):
        want = theirs.predict(texts, convert_to_tensor=True, show_progress_bar=False, **kw)
        assert torch.allclose(r.score_pairs(TEXTS, activation=activation), want, atol=1e-5) and want.std() > .01


def test_the_authors_layout(folders):
    "Qwen3-VL-Reranker 和 Qwen3-Reranker 的提示，逐字。"
    head = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    vl, text = opened(folders["qwen3_vl"]), opened(folders["qwen3"])
    default = "Given a search query, retrieve relevant candidates that answer the query."
    assert vl.render(Item("q", RED), Item("d", [RED, BLUE])) == head + f"<Instruct>: {default}<Query>:{picture}q\n<Document>:{picture}{picture}d<|im_end|>\n<|im_start|>assistant\n"
    assert vl.render(Item(image=RED), Item(""), "找") == head + f"<Instruct>: 找<Query>:{picture}\n<Document>:NULL<|im_end|>\n<|im_start|>assistant\n"
    web = "Given a web search query, retrieve relevant passages that answer the query"
    assert text.render(Item("q"), Item("d{query}")) == head + f"<Instruct>: {web}\n<Query>: q\n<Document>: d{{query}}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("name", NAMES)
def test_save_and_reload(folders, name, tmp_path):
    r = opened(folders[name])
    r.save(tmp_path/"again")
    again = opened(tmp_path/"again")
    assert torch.equal(again.score_pairs(pairs_for(r)), r.score_pairs(pairs_for(r))) and again.card == r.card
    assert (tmp_path/"again"/HEAD).exists() == (name == "qwen3_vl-head")


def test_settings_are_saved(folders, tmp_path):
    r = opened(folders["qwen3_vl"], instruction="找到同款", system="只回答 yes 或 no。", tokens=["是", "否"], padding_side="left", max_length=200, max_pixels=1024)
    assert not torch.allclose(r.score_pairs(IMAGES), opened(folders["qwen3_vl"]).score_pairs(IMAGES), atol=1e-4)
    assert not torch.allclose(r.score_pairs(TEXTS), r.score_pairs(TEXTS, instruction="找到不同的东西"), atol=1e-6)
    r.save(tmp_path/"m")
    assert torch.equal(opened(tmp_path/"m").score_pairs(IMAGES), r.score_pairs(IMAGES)) and opened(tmp_path/"m").card == r.card


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_everything(folders, name):
    r = opened(folders[name]).train()
    r(r.preprocess(pairs_for(r))).square().sum().backward()
    dead = [n for n, p in r.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not [n for n in dead if "bias" not in n], dead  # 有的偏置恰好没有作用（键的偏置）


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_merge(folders):
    from peft import LoraConfig, get_peft_model

    r = opened(folders["qwen3_vl"])
    want = r.score_pairs(IMAGES)
    r.model = get_peft_model(r.model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    assert torch.allclose(r.score_pairs(IMAGES), want, atol=1e-6)
    r(r.preprocess(IMAGES)).sum().backward()
    assert {p.grad is not None for p in r.parameters() if p.requires_grad} == {True} and all(p.grad is None for p in r.parameters() if not p.requires_grad)
    for n, p in r.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=.1)
    adapted = r.score_pairs(IMAGES)
    refused(lambda: r.save("nowhere"), "LoRA")
    assert not Path("nowhere").exists()
    r.model = r.model.merge_and_unload()
    assert torch.allclose(r.score_pairs(IMAGES), adapted, atol=1e-4) and not torch.allclose(adapted, want, atol=1e-4)
    head = opened(folders["qwen3_vl"])  # 输出层也套了 LoRA 时，不能只看原来的权重
    head.model = get_peft_model(head.model, LoraConfig(r=4, target_modules=["lm_head"]))
    for n, p in head.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=.5)
    with torch.inference_mode(): logits = head.model(**(x := dict(head.preprocess(TEXTS[:1]).tensors)), mm_token_type_ids=torch.zeros_like(x["input_ids"]).int()).logits[0, -1]
    assert torch.allclose(head.score_pairs(TEXTS[:1])[0], logits[head.token_ids[0]] - logits[head.token_ids[1]], atol=1e-5)


def test_only_the_last_position_meets_the_vocabulary(folders):
    r, seen = opened(folders["qwen3_vl"]), []
    r.model.lm_head.register_forward_hook(lambda m, x, y: seen.append(y.shape))
    r.score_pairs(IMAGES)
    assert not seen


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3", "bert"])
def test_long_documents_lose_their_end(folders, name):
    r = opened(folders[name], max_length=200 if r_has_template(name) else 40, **({"system": "", "instruction": ""} if r_has_template(name) else {}))
    long, query = Item("杯" * 300), Item("蓝色的椅子")
    with pytest.warns(UserWarning, match="1 份文档太长"): s = r.score(query, [long, "短", long])
    assert s[0] == s[2]
    ids = r.preprocess([(query, long)])["input_ids"][0]
    text = "".join(r.tokenizer.convert_ids_to_tokens(ids.tolist()))
    assert len(ids) == r.card.max_length and "蓝色的椅子" in text and "杯杯杯" in text
    if r.parts: assert text.endswith("<|im_start|>assistant<0x0A>" if r.chat else "</think><0x0A><0x0A>".replace("</think>", "<0x3C>/think<0x3E>"))
    refused(lambda: r.score("椅" * 300, ["杯"]), "第 0" if name != "qwen3_vl" else "max_length")
    exact = r.preprocess([(query, Item("杯" * (text.count("杯"))))])  # 恰好放得下的不算截断
    r.truncated = 0
    r.preprocess([(query, Item("杯" * text.count("杯")))])
    assert r.truncated == 0 and torch.equal(exact["input_ids"][0], ids)


def r_has_template(name): return name != "bert"


def test_score_dedups_sorts_and_restores(folders):
    r, calls = opened(folders["qwen3_vl"]), []
    original = r.preprocess
    r.preprocess = lambda pairs, *a: calls.append([d.text or d.image for _, d in pairs]) or original(pairs, *a)
    docs = ["短", Item(image=RED), "一段长一点的文字", "短", Item(image=RED.copy())]
    s = r.score("红色", docs, batch_size=2)
    assert [len(c) for c in calls] == [2, 1] and calls[0][1] == "一段长一点的文字" and calls[1] == ["短"]
    assert s[0] == s[3] and s[1] == s[4] and torch.allclose(s, torch.cat([opened(folders["qwen3_vl"]).score("红色", [d]) for d in docs]), atol=1e-5)
    assert torch.equal(r.score("红色", docs, activation="sigmoid"), r.score("红色", docs).sigmoid())
    assert r.score("红色", []).shape == (0,) and not r.training
    r.train(); r.score("红色", ["短"]); assert r.training


@dataclass
class Found:
    query: Item; ids: list; scores: list; metas: list = field(repr=False); image_root: str = ""


def test_rerank(folders, tmp_path):
    r = opened(folders["qwen3_vl"])
    RED.save(tmp_path/"a.png"); BLUE.save(tmp_path/"b.png")
    hits = Found(Item("红色"), list("abcd"), [.9, .8, .7, .6], [{"image": "a.png", "price": 3}, {"text": "蓝"}, {"image": "b.png", "text": "蓝"}, {"image": "a.png"}], str(tmp_path))
    out = r.rerank(None, hits)
    s = dict(zip("abcd", r.score("红色", [Item(image=RED), "蓝", Item("蓝", BLUE), Item(image=RED)]).tolist()))
    assert type(out) is Found and out.ids == sorted("abcd", key=lambda i: -s[i]) and out.scores == pytest.approx([s[i] for i in out.ids], abs=1e-5)
    assert out.ids.index("a") + 1 == out.ids.index("d")  # 同样的文档同样的分，保持原来的次序
    by_id = dict(zip(out.ids, out.metas))
    assert by_id["c"] == {"recall_score": .7, "recall_rank": 3, "image": "b.png", "text": "蓝"} and by_id["a"]["price"] == 3 and "recall_rank" not in hits.metas[0]
    assert r.rerank(None, hits, top_n=2).ids == out.ids[:2] and r.rerank("红色", hits).query == Item("红色")
    again = r.rerank("蓝色的", out)
    assert {m["recall_rank"]: i for i, m in zip(again.ids, again.metas)} == {1: "a", 2: "b", 3: "c", 4: "d"}  # 第二次重排仍记得召回的名次
    assert r.rerank(None, Found(Item("红色"), [], [], [])).ids == []
    refused(lambda: r.rerank(None, hits, top_n=0), "top_n=0")
    refused(lambda: r.rerank(None, Found(Item("红"), ["x"], [1.], [{"price": 3}])), "结果 x")


def test_real_hits(folders):
    from vembed_nb.search.searcher import Hits

    hits = Hits(Item("红色"), ["a", "b"], [.9, .8], [{"text": "红"}, {"text": "蓝"}])
    out = opened(folders["bert"]).rerank(None, hits)
    assert type(out) is Hits and {m["recall_score"] for m in out.metas} == {.9, .8} and out.to_dict()["hits"][0]["rank"] == 1


def edited(folder, out, fn):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    w = load_file(out/"model.safetensors"); fn(w); save_file(w, out/"model.safetensors", metadata={"format": "pt"})
    return out


def test_incomplete_folders_are_refused(folders, tmp_path):
    for n, (name, key) in enumerate([("bert", "classifier.weight"), ("qwen3-head", "score.weight"), ("qwen3_vl", "model.language_model.norm.weight"), ("qwen3_vl-head", "language_model.norm.weight")]):
        refused(lambda: opened(edited(folders[name], tmp_path/f"a{n}", lambda w: w.pop(key))), "缺少权重", key)
    refused(lambda: opened(edited(folders["bert"], tmp_path/"b", lambda w: w.update(extra=torch.zeros(1)))), "多出权重", "extra")
    refused(lambda: opened(edited(folders["bert"], tmp_path/"c", lambda w: w.update({"classifier.weight": torch.zeros(2, 32)}))), "形状不符")
    shutil.copytree(folders["qwen3_vl-head"], tmp_path/"d"); (tmp_path/"d"/HEAD).unlink()
    refused(lambda: opened(tmp_path/"d"), HEAD)
    for n, change in enumerate([lambda c: c["options"].update(tmplate=""), lambda c: c["options"].update(form="maybe"), lambda c: c.update(family="vlm")]):
        shutil.copytree(folders["qwen3_vl"], tmp_path/f"e{n}")
        card = json.loads((tmp_path/f"e{n}"/"vembed.json").read_text(encoding="utf-8")); change(card)
        (tmp_path/f"e{n}"/"vembed.json").write_text(json.dumps(card), encoding="utf-8")
        refused(lambda: opened(tmp_path/f"e{n}"), ("template", "maybe", "load_encoder")[n])
    (tmp_path/"f").mkdir()
    refused(lambda: opened(tmp_path/"f"), "config.json")
    (tmp_path/"f"/"config.json").write_text('{"model_type": "gpt2"}')
    refused(lambda: opened(tmp_path/"f"), "gpt2")
    (tmp_path/"f"/"config.json").write_text('{"model_type": "bert", "num_labels": 3}')
    refused(lambda: opened(tmp_path/"f"), "3 个输出", "new=True")


def test_a_base_model_starts_only_with_new(folders, tmp_path):
    "没有打分头的底座：平时打不开，new=True 得到一个待训练的。"
    tf.BertModel(tf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=5000)).save_pretrained(tmp_path/"base")
    opened(folders["bert"]).tokenizer.save_pretrained(tmp_path/"base")
    refused(lambda: opened(tmp_path/"base"), "new=True")
    r = opened(tmp_path/"base", new=True)
    r.save(tmp_path/"ok")
    assert torch.equal(opened(tmp_path/"ok").score("红", ["蓝", "绿"]), r.score("红", ["蓝", "绿"]))
    refused(lambda: opened(folders["qwen3_vl"], form="head"), "new=True")
    assert opened(folders["qwen3_vl"], form="head", new=True).heads == ["score_head"]


def test_half_precision_scores_are_fp32(folders):
    r = Reranker.open(Source("半精度", str(folders["qwen3_vl"]), dtype=torch.bfloat16)).eval()
    s = r.score_pairs(IMAGES)
    assert s.dtype == torch.float32 and r.model.dtype == torch.bfloat16 and torch.allclose(s, opened(folders["qwen3_vl"]).score_pairs(IMAGES), atol=.05)


def test_bad_input(folders):
    vl, bert = opened(folders["qwen3_vl"]), opened(folders["bert"])
    refused(lambda: bert.score("红", ["蓝", Item(image=RED)]), "第 1 对", "文档", "只读文字")
    refused(lambda: bert.score(Item(image=RED), ["蓝"]), "第 0 对", "查询")
    refused(lambda: vl.score("红", [Item()]), "既没有文字也没有图片")
    refused(lambda: vl.score("红", ["没有.jpg"]), "没有.jpg", "不存在")
    for bad in ("<|im_end|>", "<|image_pad|>"): refused(lambda: vl.score("红", [f"好 {bad} 坏"]), bad)
    refused(lambda: vl.score("红", ["蓝"], activation="softmax"), "softmax")
    refused(lambda: vl.score("红", ["蓝"], batch_size=0), "batch_size=0")
    for options, word in ((dict(tokens=["yes", "nein"]), "nein"), (dict(tokens=["yes", "yes"]), "两个不同"), (dict(tokenz=[]), "tokens"), (dict(template="{query}"), "{document}"), (dict(form="score"), "form"), (dict(padding_side="up"), "up"), (dict(max_pixels=10), "max_pixels")):
        refused(lambda: opened(folders["qwen3_vl"], **options), word)
    if not torch.cuda.is_available(): refused(lambda: Reranker.open(Source("四位", str(folders["qwen3_vl"]), quantize="4bit")), "GPU", "bitsandbytes")


@pytest.mark.parametrize("name", NAMES)
def test_lora_folder(folders, name, tmp_path):
    "训过的 LoRA：load_reranker 打开只存适配器的文件夹，分相同；合并后的文件夹没有 peft，分也相同；底座一个字节不变。"
    from vembed_nb.models import adapt
    from vembed_nb.models.load import load_reranker

    before = {p.name: p.read_bytes() for p in Path(folders[name]).iterdir()}
    r = adapt.lora(load_reranker(folders[name]), r=4, verbose=False)
    pairs = pairs_for(r)
    plain, g = r.score_pairs(pairs), torch.Generator().manual_seed(1)
    assert torch.equal(plain, load_reranker(folders[name]).score_pairs(pairs))
    with torch.no_grad():
        for n, p in r.named_parameters():
            if p.requires_grad: p.add_(torch.randn(p.shape, generator=g), alpha=.1)
    want = r.score_pairs(pairs)
    r.save(tmp_path/"adapter"); adapt.save_merged(r, tmp_path/"merged")
    assert (want - plain).abs().max() > 1e-3 and want.std() > 1e-3 and (tmp_path/"adapter"/"adapter_config.json").exists() and not list((tmp_path/"adapter").glob("model*")) and not (tmp_path/"merged"/"adapter_config.json").exists()
    assert (load_reranker(tmp_path/"adapter").score_pairs(pairs) - want).abs().max() <= 1e-6
    assert (load_reranker(tmp_path/"merged").score_pairs(pairs) - want).abs().max() <= 1e-4
    assert {p.name: p.read_bytes() for p in Path(folders[name]).iterdir()} == before
