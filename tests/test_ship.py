"""交出去：导出的文件夹里写着什么，ONNX 的向量一样，int8 差得不多，模型卡读得回来，包装守约定，拒绝是一句话。
sentence-transformers 真的打开；更多的组合和 mteb 在 benchmarks/export_check.py、benchmarks/mteb_check.py（另一个环境），这里核对它们记下的结果。"""
import importlib.util
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data.tasks import Item
from vembed_nb.evaluate.report import EvalReport
from vembed_nb.models.load import load_encoder
from vembed_nb.ship import export as ship
from vembed_nb.ship.wrap import LangChainEmbeddings, MTEBEncoder

pytestmark = pytest.mark.filterwarnings("ignore:.*截掉了")
onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None or importlib.util.find_spec("onnxscript") is None, reason="没装 extra onnx")


def read(folder, name): return json.loads((folder/name).read_text(encoding="utf-8"))
def picture(seed=0, size=(40, 30)): return Image.frombytes("RGB", size, np.random.default_rng(seed).bytes(size[0] * size[1] * 3))
def things(encoder): return [*([Item("红色的杯子"), Item("A Blue bowl " * 12)] if "text" in encoder.can else []), *([Item(image=picture(1)), Item(image=picture(2, (64, 90)))] if "image" in encoder.can else [])]


def composed(**kw):
    import micro_composed
    return micro_composed.make(**kw)


def refused(f, *words):
    "拒绝是一句话，说出了该说的词。"
    with pytest.raises(VembedError) as e: f()
    assert "\n" not in str(e.value) and all(w in str(e.value) for w in words), str(e.value)


@pytest.fixture(scope="module")
def encoder(micro):
    encoder = load_encoder(micro)
    encoder.card.prompts = {"query": "找图：", "document": ""}
    return encoder


# ---------------------------------------------------------------- sentence-transformers

def test_st_dual(encoder, tmp_path):
    "两个模块，两种输入各有方法，前缀和补齐写在里面；load_encoder 也打得开，向量相同。"
    folder = ship.export_sentence_transformers(encoder, tmp_path/"st")
    assert [m["type"].rsplit(".", 1)[1] for m in read(folder, "modules.json")] == ["Transformer", "Normalize"]
    config, top = read(folder, "sentence_bert_config.json"), read(folder, "config_sentence_transformers.json")
    assert {k: v["method"] for k, v in config["modality_config"].items()} == {"text": "get_text_features", "image": "get_image_features"}
    assert config["processing_kwargs"]["text"] == dict(padding="longest", max_length=32, truncation=True, padding_side="right") and "do_lower_case" not in config
    assert top["prompts"] == {"query": "找图：", "document": ""} and top["default_prompt_name"] is None and top["model_type"] == "SentenceTransformer"
    assert torch.equal(load_encoder(str(folder)).encode(things(encoder), role="query"), encoder.encode(things(encoder), role="query"))


def test_st_siglip_padding(tmp_path):
    "SigLIP 要补满、不用掩码、变小写；少写一样，分数就变。"
    text = read(ship.export_sentence_transformers(load_encoder("tiny-siglip"), tmp_path/"st"), "sentence_bert_config.json")
    assert text["processing_kwargs"]["text"] == dict(padding="max_length", max_length=32, truncation=True, padding_side="right", return_attention_mask=False) and text["do_lower_case"]


def test_document_prompt_is_the_default(encoder, tmp_path):
    "encode 不写 role 是文档；文档有前缀时，那边的默认也是它。"
    other = load_encoder("tiny-clip")
    other.card.prompts = {"document": "图："}
    assert read(ship.export_sentence_transformers(other, tmp_path/"st"), "config_sentence_transformers.json")["default_prompt_name"] == "document"


def test_st_composed(tmp_path):
    "两座塔：Router 的两条路，各有池化、投影、归一化；投影的权重就是我们的。"
    from safetensors.torch import load_file
    encoder = composed(head="mlp", image_pooling="cls")
    folder = ship.export_sentence_transformers(encoder, tmp_path/"st")
    router = read(folder, "router_config.json")
    kinds = {k: [router["types"][m].rsplit(".", 1)[1] for m in ms] for k, ms in router["structure"].items()}
    assert kinds == dict.fromkeys(("text", "image"), ["Transformer", "Pooling", "Dense", "Dense", "Normalize"])
    assert read(folder, "text_Pooling/config.json")["pooling_mode"] == "mean" and read(folder, "image_Pooling/config.json")["pooling_mode"] == "cls"
    dense, w = read(folder, "text_Dense_0/config.json"), load_file(folder/"text_Dense_0/model.safetensors")
    assert torch.equal(w["linear.weight"], encoder.towers()["text"].head[0].weight) and dense["activation_function"].endswith("GELU")
    assert torch.equal(load_encoder(str(folder)).encode(things(encoder)), encoder.encode(things(encoder)))


def test_st_one_tower(tmp_path):
    "只有文字的塔没有 Router。"
    encoder = composed(text="qwen3", image="", head="none")
    folder = ship.export_sentence_transformers(encoder, tmp_path/"st")
    assert [m["type"].rsplit(".", 1)[1] for m in read(folder, "modules.json")] == ["Transformer", "Pooling", "Normalize"] and read(folder, "text_Pooling/config.json")["pooling_mode"] == "lasttoken"


def test_st_vlm_and_late(tmp_path):
    "VLM 走聊天模板，指令带着作者的句号；晚交互是 MultiVectorEncoder。"
    import micro_late
    import micro_vlm
    from vembed_nb.models.late import LateEncoder
    vlm = ship.export_sentence_transformers(micro_vlm.encoder("qwen3_vl"), tmp_path/"vlm")
    config = read(vlm, "sentence_bert_config.json")
    assert config["modality_config"]["message"]["format"] == "structured" and config["processing_kwargs"]["chat_template"] == {"add_generation_prompt": True}
    assert read(vlm, "config_sentence_transformers.json")["prompts"]["query"].endswith(".")
    late = ship.export_sentence_transformers(LateEncoder(*micro_late.make("colqwen2"), positions="flat", document_tokens="image"), tmp_path/"late")
    assert read(late, "config_sentence_transformers.json")["model_type"] == "MultiVectorEncoder" and read(late, "sentence_bert_config.json")["transformer_task"] == "retrieval"
    assert len(read(late, "1_MultiVectorMask/config.json")["keep_only_token_ids"]) == 1


def test_chat_jinja_equals_the_template():
    "翻译成 Jinja 的模板，渲染出来和我们自己的一字不差。"
    import micro_vlm
    encoder = micro_vlm.encoder("qwen2_vl")
    chat, tok = encoder.chat, encoder.chat.tokenizer
    tok.chat_template = ship.chat_jinja(chat.template, chat.picture)
    for n, text in ((0, "红色的杯子"), (1, "a mug\n{x}"), (2, "两张")):
        user = [{"type": "image"}] * n + [{"type": "text", "text": text}]
        got = tok.apply_chat_template([{"role": "system", "content": "说明"}, {"role": "user", "content": user}], tokenize=False, add_generation_prompt=True)
        assert got == str(chat.render(n, text, "说明"))


def test_st_refusals(tmp_path):
    "表达不了的说出为什么，不留半个文件夹。"
    import micro_late
    from vembed_nb.models.late import LateEncoder
    late = lambda kind, **kw: LateEncoder(*micro_late.make(kind), **kw)
    for make, word in ((lambda: composed(text="", image="vit_mae"), "噪声"), (lambda: composed(text="", image_pooling="mean"), "跳过"), (lambda: late("colqwen2"), "positions"), (lambda: late("colpali", augment=0), "augment"), (lambda: late("colmodernvbert"), "input_ids"), (lambda: late("colsmol"), "colpali-engine")):
        refused(lambda: ship.export_sentence_transformers(make(), tmp_path/"x"), "sentence-transformers", word)
        assert not (tmp_path/"x").exists() and not list(tmp_path.iterdir())


def test_other_folders_are_safe(encoder, tmp_path):
    "不是空的、不是自己写的，不动。"
    (tmp_path/"out").mkdir()
    (tmp_path/"out/mine.txt").write_text("别动")
    refused(lambda: ship.export_sentence_transformers(encoder, tmp_path/"out"), "--overwrite")
    refused(lambda: ship.export_sentence_transformers(encoder, tmp_path/"out", overwrite=True), "不敢删")
    assert (tmp_path/"out/mine.txt").read_text() == "别动"
    ship.export_sentence_transformers(encoder, tmp_path/"st")
    ship.export_sentence_transformers(encoder, tmp_path/"st", overwrite=True)


def test_merged(micro, tmp_path):
    "合并之后没有 peft，向量和带着适配器的一样；原来的编码器不动。"
    from vembed_nb.models.adapt import lora
    encoder = lora(load_encoder(micro), verbose=False).eval()
    torch.manual_seed(0)
    for n, p in encoder.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.1)
    want = encoder.encode(things(encoder))
    again = load_encoder(str(ship.export_merged(encoder, tmp_path/"m")))
    assert not (tmp_path/"m/adapter_config.json").exists() and again.adapter is None if hasattr(again, "adapter") else True
    assert (again.encode(things(encoder)) - want).abs().max() < 1e-4 and encoder.adapter is not None and torch.equal(encoder.encode(things(encoder)), want)
    assert (want - load_encoder(micro).encode(things(encoder))).abs().max() > 1e-3


def test_live_check_is_recorded():
    "在 sentence-transformers 里真的打开的结果：没有一行出错，都在 1e-4 以内，该拒绝的拒绝了。"
    rows = json.loads((ROOT/"assets/results/export_check.json").read_text(encoding="utf-8"))["rows"]
    assert {r["family"] for r in rows.values()} == set(ship.ST_FAMILIES)
    for name, r in rows.items(): assert ("refused" in r) == ("应当拒绝" in name) and "error" not in r and (r.get("met") or "refused" in r), name
    mteb = json.loads((ROOT/"assets/results/mteb_check.json").read_text(encoding="utf-8"))["rows"]
    assert abs(mteb["retrieval"]["mteb"]["ndcg_at_10"] - mteb["retrieval"]["ours"]["ndcg@10"]) < 1e-4


@pytest.fixture
def export_check(monkeypatch):
    "benchmarks/export_check.py：怎样和 sentence-transformers 比，写在那里；Qwen 的处理器换成不要 torchvision 的。"
    pytest.importorskip("sentence_transformers")
    import sentence_transformers.base.modules.transformer as st
    spec = importlib.util.spec_from_file_location("export_check", ROOT/"benchmarks/export_check.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    monkeypatch.setattr(st, "AutoProcessor", st.AutoProcessor)  # 测试之后换回来
    module.no_video()
    return module


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip", "tiny-bert-dinov2", "tiny-qwen3vl", "clip + LoRA", "qwen3", "colpali"])
def test_st_live(export_check, micro, tmp_path, name):
    "导出的文件夹，sentence-transformers 在本进程里打开：文字（两个角色）、图、图加文，向量都相同。"
    make = {"clip + LoRA": lambda: export_check.with_lora(load_encoder(micro)), "qwen3": lambda: composed(text="qwen3", image=""), "colpali": lambda: export_check.late("colpali")}
    encoder = make.get(name, lambda: load_encoder(name))()
    if encoder.card.family in ("dual", "composed"): encoder.card.prompts = {"query": "找图：", "document": ""}
    gaps = export_check.compare(encoder, ship.export_sentence_transformers(encoder, tmp_path/"st"))
    assert len(gaps) >= 2 and max(gaps.values()) <= 1e-5, gaps


# ---------------------------------------------------------------- ONNX

@pytest.fixture(scope="module")
def onnx_folder(encoder, tmp_path_factory):
    folder = ship.export_onnx(encoder, tmp_path_factory.mktemp("onnx")/"m")
    return folder, ship.quantize_onnx(folder)


@onnx
def test_onnx_same_vectors(encoder, onnx_folder):
    "批的大小、文字的长度、图的大小、图加文：都和内存里的一样。"
    other = ship.OnnxEncoder(onnx_folder[0])
    assert other.can == encoder.can
    for items in ([Item("红")], [Item("红" * n) for n in range(1, 40, 3)], [Item(image=picture(n, (30 + 7 * n, 50))) for n in range(5)], [Item("红", picture(1)), Item("蓝"), Item(image=picture(2))]):
        for role in ("query", "document"):
            assert (other.encode(items, role=role) - encoder.encode(items, role=role)).abs().max() < 1e-5
    assert torch.equal(other.encode([Item("红")], dim=8), torch.nn.functional.normalize(other.encode([Item("红")])[:, :8], dim=-1))


@onnx
def test_onnx_int8(onnx_folder):
    "文字塔是 int8：小了，余弦接近 1 但不是 1；图像塔还是 fp32。"
    import onnx as lib
    folder, report = onnx_folder
    assert set(report) == {"text"} and report["text"]["mb"][1] < report["text"]["mb"][0] and 0.98 < report["text"]["cosine"][1] < 1
    ops = {n.op_type for n in lib.load(folder/"text.int8.onnx").graph.node}
    assert "MatMulInteger" in ops and "Gather" in ops
    a, b = ship.OnnxEncoder(folder), ship.OnnxEncoder(folder, "int8")
    assert torch.equal(a.encode([Item(image=picture())]), b.encode([Item(image=picture())])) and not torch.equal(a.encode(["红"]), b.encode(["红"]))


@onnx
def test_onnx_dynamic_axes(onnx_folder):
    "批和长度是变量，不是例子里的 2。"
    text = ship.OnnxEncoder(onnx_folder[0]).sessions["text"]
    assert all(isinstance(d, str) for i in text.get_inputs() for d in i.shape)


@onnx
def test_onnx_composed_and_siglip(tmp_path):
    "拼装的两座塔；SigLIP 补满、小写、没有掩码。"
    for n, encoder in enumerate((composed(image="vit"), composed(text="qwen3", image=""), load_encoder("tiny-siglip"))):
        other = ship.OnnxEncoder(ship.export_onnx(encoder, tmp_path/str(n)))
        assert (other.encode(things(encoder)) - encoder.encode(things(encoder))).abs().max() < 1e-5


@onnx
def test_onnx_refusals(encoder, onnx_folder, tmp_path):
    import micro_late
    from vembed_nb.models.late import LateEncoder
    refused(lambda: ship.export_onnx(LateEncoder(*micro_late.make("colqwen2")), tmp_path/"x"), "没有可以单独导出的塔")
    refused(lambda: ship.export_onnx(load_encoder("tiny-clip", dtype=torch.float16), tmp_path/"x"), "fp32")
    refused(lambda: ship.export_onnx(encoder, tmp_path/"x", tolerance=-1), "不一样")
    refused(lambda: ship.OnnxEncoder(tmp_path), "onnx.json")
    refused(lambda: ship.quantize_onnx(onnx_folder[0], ["vision"]), "vision")
    assert not (tmp_path/"x").exists()
    (copy := tmp_path/"fp32").mkdir()
    for p in onnx_folder[0].iterdir(): (copy/p.name).write_bytes(p.read_bytes())
    facts = read(copy, "onnx.json")
    facts["towers"]["text"].pop("int8")
    (copy/"onnx.json").write_text(json.dumps(facts))
    refused(lambda: ship.OnnxEncoder(copy, "int8"), "quantize_onnx")


# ---------------------------------------------------------------- 模型卡、Hub

SCORES = {k: 0.25 for k in ("hit@1", "hit@5", "hit@10", "recall@1", "recall@10", "mrr", "ndcg@10")}
REPORT = EvalReport("玩具店测试集", SCORES, {k: (0.2, 0.3) for k in SCORES}, 600, 1000)


class FakeApi:
    "只把收到的东西记下来的 HfApi。"
    def __init__(self, error=None): self.error = error

    def create_repo(self, repo_id, **kw):
        if self.error: raise self.error
        self.repo = (repo_id, kw)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id, folder_path, **kw):
        from pathlib import Path
        self.files = {p.relative_to(folder_path).as_posix(): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}


def test_model_card(encoder, tmp_path):
    "YAML 头读得回来，正文有用法、数据、指标和区间、配置、版本。"
    from huggingface_hub import ModelCard
    path = ship.write_model_card(encoder, tmp_path, "me/shop-clip", "apache-2.0", REPORT, {"toyshop": "4,000 张图", "带 空格": "x"}, {"learning_rate": 0.001, "名": "中文"}, "openai/clip-vit-base-patch32")
    card = ModelCard.load(path)
    d = card.data
    assert (d.license, d.library_name, d.base_model, d.pipeline_tag, d.datasets, d.language) == ("apache-2.0", "transformers", "openai/clip-vit-base-patch32", "zero-shot-image-classification", ["toyshop"], ["zh", "en"])
    assert {r.metric_type: r.metric_value for r in d.eval_results} == dict.fromkeys(("hit@1", "hit@10", "mrr", "ndcg@10"), 0.25) and {"vembed-nb", "dual", "clip"} <= set(d.tags)
    for part in ("## 怎样用", "load_encoder(\"me/shop-clip\")", "4,000 张图", "0.250 [0.200, 0.300]", "learning_rate: 0.001", "名: 中文", "## 版本", "找图："): assert part in card.content, part
    assert str(tmp_path) not in card.content


def test_model_card_knows_the_folder(encoder, tmp_path):
    "导出成什么，就写成什么库。"
    folder = ship.export_sentence_transformers(encoder, tmp_path/"st")
    text = ship.write_model_card(encoder, folder, "me/x", "mit").read_text(encoding="utf-8")
    assert "library_name: sentence-transformers" in text and "encode_query" in text and "没有评测过" in text and "model-index" not in text


def test_push(encoder):
    api = FakeApi()
    assert ship.push_to_hub(encoder, "me/shop", "mit", REPORT, api=api) == "https://huggingface.co/me/shop"
    assert api.repo == ("me/shop", dict(private=True, exist_ok=True)) and {"README.md", "config.json", "model.safetensors", "vembed.json", "tokenizer.json"} <= set(api.files)


def test_push_refusals(encoder):
    from huggingface_hub.errors import LocalTokenNotFoundError
    refused(lambda: ship.push_to_hub(encoder, "shop", "mit", api=FakeApi()), "作者/名字")
    refused(lambda: ship.push_to_hub(encoder, "me/shop", "", api=FakeApi()), "许可证")
    refused(lambda: ship.push_to_hub(encoder, "me/shop", "mit", api=FakeApi(LocalTokenNotFoundError("x"))), "hf auth login")
    refused(lambda: ship.push_to_hub(encoder, "me/shop", "mit", api=FakeApi(ConnectionError("断了"))), "失败", "断了")


# ---------------------------------------------------------------- 包装

def test_langchain(encoder):
    "查询和文档用各自的前缀；普通的浮点数；装了 langchain-core 时是它的子类。"
    lc = LangChainEmbeddings(encoder, batch_size=2)
    q, d = lc.embed_query("红色的杯子"), lc.embed_documents(["红色的杯子", "a.png", "红色的杯子"])
    assert isinstance(q[0], float) and q != d[0] and d[0] == d[2] and abs(math.hypot(*q) - 1) < 1e-5
    assert torch.allclose(torch.tensor(q), encoder.encode([Item("红色的杯子")], role="query")[0], atol=1e-6)
    assert len(LangChainEmbeddings(encoder, dim=4).embed_image([picture()])[0]) == 4 and lc.embed_documents([]) == []
    base = pytest.importorskip("langchain_core.embeddings").Embeddings
    assert isinstance(lc, base)


def test_langchain_refuses_multi_vector():
    import micro_late
    from vembed_nb.models.late import LateEncoder
    refused(lambda: LangChainEmbeddings(LateEncoder(*micro_late.make("colqwen2"))), "LangChain")


def test_mteb_wrapper(encoder):
    "几批接起来，次序不变；prompt_type 决定前缀；图加文是组合的样本。"
    from types import SimpleNamespace
    wrapped, loader = MTEBEncoder(encoder, "me/x", dim=8), [{"text": ["红", "蓝"]}, {"image": [picture()]}, {"text": ["红", ""], "image": [picture(), picture(1)]}]
    got = wrapped.encode(loader, prompt_type=SimpleNamespace(value="query"), task_metadata=None, hf_split="test", hf_subset="default", show_progress_bar=False)
    items = [Item("红"), Item("蓝"), Item(image=picture()), Item("红", picture()), Item(image=picture(1))]
    assert isinstance(got, np.ndarray) and np.allclose(got, encoder.encode(items, dim=8, role="query"), atol=1e-6)
    assert np.allclose(wrapped.encode(loader[:1]), encoder.encode(items[:2], dim=8, role="document"), atol=1e-6)
    assert torch.allclose(wrapped.similarity(got, got).diag(), torch.ones(5), atol=1e-5) and wrapped.similarity_pairwise(got, got).shape == (5,)
    refused(lambda: wrapped.encode([{"audio": [1]}]), "audio")
    refused(lambda: MTEBEncoder(encoder, "x"), "作者/名字")


def test_mteb_multi_vector():
    "多向量：每样东西一个 [长度, D]，没有补齐。"
    import micro_late
    from vembed_nb.models.late import LateEncoder
    late = LateEncoder(*micro_late.make("colqwen2")).eval()
    got = MTEBEncoder(late, "me/x").encode([{"text": ["红", "一个长得多的查询 a red cup"]}], prompt_type="query")
    assert [g.shape[1] for g in got] == [8, 8] and len(got[0]) < len(got[1])


# ---------------------------------------------------------------- 命令行

def test_cli(micro, tmp_path, capsys):
    from vembed_nb.cli import main
    assert main(["export", micro, "--to", "st", "--out", str(tmp_path/"st")]) == 0 and "SentenceTransformer" in capsys.readouterr().out
    assert main(["export", micro, "--to", "merged", "--out", str(tmp_path/"m")]) == 0
    for args, word in ((["--to", "st", "--out", str(tmp_path/"st")], "--overwrite"), (["--to", "onxx", "--out", str(tmp_path/"x")], "onnx")):
        capsys.readouterr()
        assert main(["export", micro, *args]) == 2
        err = capsys.readouterr().err.strip()
        assert len(err.splitlines()) == 1 and word in err
