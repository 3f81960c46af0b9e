"""公开数据集（二）：组合检索、日志和别家的记录、页面、分片。小样照发表的布局造，坏的也照着造。"""
import csv
import importlib.util
import io
import json
import os
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data import edits, logs, pages, shards
from vembed_nb.data.protocol import prepare
from vembed_nb.data.read import read_corpus, read_records
from vembed_nb.data.tasks import MODES

JPEG = b"\xff\xd8\xff\xe0" + bytes(16)


def put(path, obj):
    "写一个 JSON 文件。"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(obj if isinstance(obj, str) else json.dumps(obj), encoding="utf-8")
    return path


def table(path, **columns):
    "写一个 Parquet 文件。"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({k.replace("__", "-"): v for k, v in columns.items()}), path)
    return path


def picture(path, color=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), color).save(path)


def png(color):
    f = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(f, "PNG")
    return {"bytes": f.getvalue(), "path": None}


def lines(path): return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


def said(do):
    "一句话的错误。"
    with pytest.raises(VembedError) as e: do()
    text = str(e.value)
    assert "\n" not in text and len(text) < 400, text
    return text


# ---------------------------------------------------------------- FashionIQ、CIRR、CIRCO

def fashioniq(root, rows=None, names=("B1", "B2", "B3", "B4")):
    for c in edits.CATEGORIES:
        for s in ("train", "val", "test"):
            good = rows or [{"target": "B2", "candidate": "B1", "captions": ["is solid black with no sleeves", "is black with straps."]}, {"target": "B3", "candidate": "B1", "captions": ["", " "]},
                            {"target": "B1", "candidate": "B3", "captions": ["", "is longer"]}]
            put(root/f"captions/cap.{c}.{s}.json", [{k: v for k, v in r.items() if s != "test" or k != "target"} for r in good])
            put(root/f"image_splits/split.{c}.{s}.json", list(names))
    for n in names: picture(root/f"images/{n}.jpg")
    return root


def cirr(root, change=lambda row: row):
    for s, prefix in (("train", "train"), ("val", "dev"), ("test1", "test1")):
        names = [f"{prefix}-{i}-0-img0" for i in range(8)]
        row = {"pairid": 12, "reference": names[0], "target_hard": names[3], "target_soft": {names[3]: 1.0, names[4]: 0.5, names[5]: -1.0}, "caption": "show three bottles of soft drink", "img_set": {"id": 36, "members": names[:6], "reference_rank": 3}}
        if s == "test1": row = {k: v for k, v in row.items() if not k.startswith("target")}
        put(root/f"captions/cap.rc2.{s}.json", [change(row)])
        put(root/f"image_splits/split.rc2.{s}.json", {n: f"./{prefix}/{'7/' if s == 'train' else ''}{n}.png" for n in names})
        for n in names: picture(root/f"img_raw/{prefix}/{'7/' if s == 'train' else ''}{n}.png")
    return root


def circo(root, **change):
    row = {"reference_img_id": 85932, "target_img_id": 9761, "relative_caption": "is held by a little girl on a chair", "shared_concept": "a teddy bear", "gt_img_ids": [9761, 489535, 9761], "id": 13, "semantic_aspects": ["addition"], **change}
    put(root/"annotations/val.json", [row])
    put(root/"annotations/test.json", [{k: row[k] for k in ("reference_img_id", "relative_caption", "shared_concept", "id")}])
    put(root/"COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", {"images": [{"id": i, "file_name": f"{i:012d}.jpg"} for i in (85932, 9761, 489535, 7)]})
    for i in (85932, 9761, 489535, 7): picture(root/f"COCO2017_unlabeled/unlabeled2017/{i:012d}.jpg")
    return root


def test_fashioniq_reads_and_evaluates(tmp_path):
    "每个类别一个图库，两句话接起来，全空白的数下来；写出来的文件夹能被读回。"
    done = prepare(edits.SETS["fashioniq-dress"], fashioniq(tmp_path/"fiq"), tmp_path/"out", allow_counts=True)
    assert done["splits"]["val"]["counts"]["queries"] == 3 and done["splits"]["val"]["counts"]["listed"] == 4 and done["splits"]["val"]["dropped"] == {"两句修改都是空白": 1}
    assert not done["mask_self"], "FashionIQ 的参考图留在图库里"
    records, (ids, _, _) = read_records(tmp_path/"out/val.jsonl"), read_corpus(tmp_path/"out/corpus.jsonl")
    assert records.modes == {"m2i"} and ids == ["B1", "B2", "B3", "B4"] and records[0].positive_ids == ["B2"]
    assert records[0].query.text == "is solid black with no sleeves and is black with straps" and records[1].query.text == "is longer"
    assert "target" not in (tmp_path/"out/queries.test.jsonl").read_text() and not (tmp_path/"out/test.jsonl").exists()


def test_fashioniq_all_categories_only_train(tmp_path):
    done = prepare(edits.SETS["fashioniq"], fashioniq(tmp_path/"fiq"), tmp_path/"out", allow_counts=True)
    assert done["splits"]["train"]["counts"]["records"] == 6 and {r["meta_category"] for r in lines(tmp_path/"out/train.jsonl")} == set(edits.CATEGORIES)
    both = edits.read_fashioniq(tmp_path/"fiq", "train", ["dress"], both_orders=True)
    assert [r["query"] for r in both.records][:2] == ["is solid black with no sleeves and is black with straps", "is black with straps and is solid black with no sleeves"]


def test_fashioniq_finds_the_real_suffix_and_dead_links(tmp_path):
    "图是 .png 的也认；死链下载不到的图由 prepare 说清，allow_missing 才丢。"
    root = fashioniq(tmp_path/"fiq")
    (root/"images/B2.jpg").rename(root/"images/B2.png")
    assert edits.read_fashioniq(root, "val", ["dress"]).records[0]["positives"] == ["images/B2.png"]
    (root/"images/B4.jpg").unlink()
    go = lambda **kw: prepare(edits.SETS["fashioniq-dress"], root, tmp_path/"out", "val", allow_counts=True, **kw)
    assert "B4.jpg" in said(go)
    assert go(allow_missing=True)["splits"]["val"]["dropped"]["图库里缺图"] == 1


def test_cirr(tmp_path):
    "参考图不算、小组里没标对的才当反例、test1 只有查询。"
    root = cirr(tmp_path/"cirr")
    done = prepare(edits.SETS["cirr"], root, tmp_path/"out", allow_counts=True)
    train, val = lines(tmp_path/"out/train.jsonl")[0], lines(tmp_path/"out/val.jsonl")[0]
    assert train["negative_ids"] == ["train-1-0-img0", "train-2-0-img0", "train-5-0-img0"] and "negatives" not in val
    assert val["query_image"] == "dev/dev-0-0-img0.png" and val["query_id"] == "12" and len(val["meta_subset"]) == 5
    assert done["mask_self"] and (tmp_path/"out/queries.test1.jsonl").exists() and len(lines(tmp_path/"out/corpus.jsonl")) == 8
    assert read_records(tmp_path/"out/train.jsonl").modes == {"m2i"}
    assert Path(done["image_root"]).name == "img_raw"


def test_circo(tmp_path):
    done = prepare(edits.SETS["circo"], circo(tmp_path/"circo"), tmp_path/"out", allow_counts=True)
    r = lines(tmp_path/"out/val.jsonl")[0]
    assert r["positive_ids"] == ["9761", "489535"] and r["query_image"] == "000000085932.jpg" and r["meta_aspects"] == ["addition"]
    assert done["splits"]["val"]["counts"]["corpus"] == 4 and not done["mask_self"]
    assert "13\t489535\t1" in (tmp_path/"out/qrels.tsv").read_text()


def test_published_counts():
    "卡片上的数与标注文件相符：三类之和、CIRR 的更正。"
    total = lambda s: sum(edits.SETS[f"fashioniq-{c}"].splits[s]["queries"] for c in edits.CATEGORIES)
    assert (total("train"), total("val"), total("test")) == (18000, 6016, 6118) and edits.SETS["fashioniq"].splits["train"]["queries"] == 18000
    assert edits.SETS["cirr"].splits["val"] == {"queries": 4181, "corpus": 2297} and edits.SETS["circo"].splits["val"]["queries"] == 220


def bad_fiq(rows=None, **kw): return lambda d: edits.read_fashioniq(fashioniq(d, rows, **kw), "val", ["dress"])
def bad_cirr(**change): return lambda d: list(edits.read_cirr(cirr(d, lambda r: {**r, **change}), "val").records)
def bad_circo(**change): return lambda d: edits.read_circo(circo(d, **change), "val")
def broken(make, path, text, read):
    def go(d):
        make(d)
        put(d/path, text)
        return read(d)
    return go


EDITS_BAD = [
    ("目标不在名单里", bad_fiq([{"target": "B9", "candidate": "B1", "captions": ["x"]}]), "cap.dress.val.json 第 1 条"),
    ("没有 target", bad_fiq([{"candidate": "B1", "captions": ["x"]}]), "target"),
    ("captions 是字符串", bad_fiq([{"target": "B2", "candidate": "B1", "captions": "x"}]), "captions"),
    ("candidate 是 null", bad_fiq([{"target": "B2", "candidate": None, "captions": ["x"]}]), "candidate"),
    ("JSON 断了", broken(fashioniq, "captions/cap.dress.val.json", '[{"target"', lambda d: edits.read_fashioniq(d, "val", ["dress"])), "没下载完"),
    ("JSON 是空列表", broken(fashioniq, "captions/cap.dress.val.json", "[]", lambda d: edits.read_fashioniq(d, "val", ["dress"])), "列表"),
    ("JSON 是 dict", broken(fashioniq, "captions/cap.dress.val.json", "{}", lambda d: edits.read_fashioniq(d, "val", ["dress"])), "dict"),
    ("名单里有数", broken(fashioniq, "image_splits/split.dress.val.json", "[1, 2]", lambda d: edits.read_fashioniq(d, "val", ["dress"])), "str"),
    ("没有文件", lambda d: edits.read_fashioniq(d, "val"), "cap.dress.val.json"),
    ("图库名写错", lambda d: edits.read_fashioniq(fashioniq(d), "val", gallery="all"), "union"),
    ("CIRR 混了划分", bad_cirr(reference="train-0-0-img0"), "第 1 条"),
    ("CIRR 没有 target_hard", bad_cirr(target_hard=None), "target_hard"),
    ("CIRR 没有小组", bad_cirr(img_set=None), "img_set"),
    ("CIRR 的 pairid 是字符串", bad_cirr(pairid="12"), "pairid"),
    ("CIRR 的 split 是列表", broken(cirr, "image_splits/split.rc2.val.json", "[]", lambda d: edits.read_cirr(d, "val")), "{图名: 路径}"),
    ("CIRCO 的图查不到", bad_circo(gt_img_ids=[9761, 1]), "1 不在 image_info"),
    ("CIRCO 的 target 不在 gt", bad_circo(gt_img_ids=[489535]), "target_img_id 9761"),
    ("CIRCO 的 id 是 true", bad_circo(reference_img_id=True), "reference_img_id"),
    ("CIRCO 没有 images", broken(circo, "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", "{}", lambda d: edits.read_circo(d, "val")), "images"),
]


@pytest.mark.parametrize("do, word", [c[1:] for c in EDITS_BAD], ids=[c[0] for c in EDITS_BAD])
def test_edits_bad(do, word, tmp_path):
    text = said(lambda: do(tmp_path))
    assert word in text, text


def test_edits_path_out_of_root(tmp_path):
    "标注里的 ../ 不许离开图片文件夹。"
    root = cirr(tmp_path/"cirr")
    names = json.loads((root/"image_splits/split.rc2.val.json").read_text())
    put(root/"image_splits/split.rc2.val.json", {k: "../../secret.png" for k in names})
    assert "secret" in said(lambda: prepare(edits.SETS["cirr"], root, tmp_path/"out", "val", allow_counts=True))


def test_metrics_and_submissions():
    import numpy as np

    rng = np.random.default_rng(0)
    for _ in range(50):  # 与逐位累计的写法对照
        ranked, truth, k = rng.permutation(30).tolist(), rng.choice(30, rng.integers(1, 9), replace=False).tolist(), int(rng.integers(1, 12))
        hit = np.isin(ranked[:k], truth)
        want = float((np.cumsum(hit) * hit / np.arange(1, k + 1)).sum() / min(len(truth), k))
        assert abs(edits.average_precision_at(ranked, truth, k) - want) < 1e-12
    fifty = [str(i) for i in range(50)]
    assert edits.submission({"0": fifty + ["60"]}, "circo") == {"0": list(range(50))}
    assert edits.submission({12: [*fifty]}, "cirr")["metric"] == "recall"
    for do in (lambda: edits.submission({"0": fifty[:49] + ["3"]}, "circo"), lambda: edits.submission({"1": fifty}, "circo"), lambda: edits.submission({}, "coco"), lambda: edits.average_precision_at([1, 1], [1], 2),
               lambda: edits.average_precision_at([1], [], 2), lambda: edits.subset_rank({"a": 1}, ["a"], "b")): said(do)


# ---------------------------------------------------------------- Qilin

def qilin(root, click=float, paths=None, idx=None, as_json=False):
    cell = (lambda x: json.dumps(x)) if as_json else (lambda x: x)
    table(root/"notes/train-00000-of-00001.parquet", note_idx=idx or list(range(6)), note_title=["红杯子", None, "猫", "狗", "包", "鞋"], note_content=["好看", "…", "", "", "", " "], image_path=[cell(x) for x in paths or [[f"image/{i}.jpg"] if i != 3 else [] for i in range(6)]])
    for i in (0, 1, 2, 4, 5): picture(root/f"image/{i}.jpg")
    see = lambda *xs: cell([dict(note_idx=n, click=click(c), position=p, like=0.0, page_time=-1.0) for p, (n, c) in enumerate(xs)])
    for s in ("train", "test"):
        table(root/f"search_{s}/train-00000-of-00001.parquet", query=["杯子", "宠物", " ", "没人点"], search_idx=[7, 8, 9, 10], search_result_details_with_idx=[see((0, 1), (4, 0), (5, 0)), see((3, 1), (2, 1), (1, 0)), see((1, 1)), see((1, 0))])
    put(root/"datasets/search.test.qrels.csv", "qid,pid\n0,0\n1,2\n1,3\n")
    return root


@pytest.mark.parametrize("as_json", [False, True], ids=["嵌套列", "JSON 字符串"])
def test_qilin(tmp_path, as_json):
    "点击变正例，展示没点变反例；没有图的笔记、没点击、空查询都数下来。"
    done = prepare(logs.SETS["qilin"], qilin(tmp_path/"q", as_json=as_json), tmp_path/"out", allow_counts=True)
    rows = lines(tmp_path/"out/train.jsonl")
    assert [(r["query"], r["positive_ids"], r["negative_ids"]) for r in rows] == [("杯子", ["0"], ["4", "5"]), ("宠物", ["2"], ["1"])]
    assert done["splits"]["train"]["dropped"] == {"没有图的笔记": 1, "查询是空的": 1, "一个也没点": 1} and done["splits"]["train"]["counts"]["requests"] == 4
    test = done["splits"]["test"]
    assert test["counts"]["qrels"] == 3 and test["counts"]["queries"] == 4 and test["counts"]["corpus"] == 5 and test["dropped"]["标准答案里没有图（字）或重复的"] == 1
    assert read_records(tmp_path/"out/train.jsonl").modes == {"t2i"} and (tmp_path/"out/qrels.tsv").read_text().splitlines()[1:] == ["0\t0\t1", "1\t2\t1"]


def test_qilin_text_and_options(tmp_path):
    root = qilin(tmp_path/"q")
    rows = list(logs.read_qilin(root, "train", document="text").records)
    assert rows[0]["positives"] == [{"text": "红杯子\n好看"}] and rows[1]["positive_ids"] == ["3", "2"]
    assert [r.get("negative_ids") for r in logs.read_qilin(root, "train", seen_only=True).records] == [None, None]
    assert {r["id"] for r in logs.read_qilin(root, "test", gallery="exposed").corpus} == {"0", "1", "2", "4", "5"}
    assert logs.read_qilin(root, "test", qrels="clicks").qrels == [(0, 0, 1), (1, 2, 1), (2, 1, 1)]


def test_clicked_is_never_a_negative():
    "官方基线的毛病（issue 12）：取反例的条件写成了 click != 0。"
    shown = [dict(note_idx=i, click=c, position=i) for i, c in enumerate([1.0, 0, 1, 0.0, None, float("nan"), -1])]
    yes, no, unclear = logs.clicks_to_pairs(shown)
    assert (yes, no, unclear) == ([0, 2], [1, 3], 3) and logs.clicks_to_pairs(shown, True)[1] == [1]


QILIN_BAD = [
    ("行号不等于 note_idx", lambda d: logs.read_qilin(qilin(d, idx=[0, 2, 1, 3, 4, 5]), "train"), "note_idx"),
    ("note_idx 越界", lambda d: list(logs.read_qilin(_shown(qilin(d), 99), "train").records), "第 1 行"),
    ("展示是坏 JSON", lambda d: list(logs.read_qilin(_shown(qilin(d), text="[{"), "train").records), "第 1 行"),
    ("图片列是坏 JSON", lambda d: logs.read_qilin(qilin(d, paths=["[", "[]", "[]", "[]", "[]", "[]"]), "train"), "第 1 行"),
    ("qrels 越界", lambda d: logs.read_qilin(_qrels(qilin(d), "qid,pid\n4,0\n"), "test"), "越界"),
    ("qrels 从 1 数", lambda d: logs.read_qilin(_qrels(qilin(d), "qid,pid\n0,6\n"), "test"), "从 0 开始"),
    ("qrels 表头不对", lambda d: logs.read_qilin(_qrels(qilin(d), "a,b\n0,0\n"), "test"), "qid"),
    ("qrels 不是数", lambda d: logs.read_qilin(_qrels(qilin(d), "qid,pid\n0,x\n"), "test"), "第 2 行"),
    ("没有 qrels", lambda d: logs.read_qilin(_qrels(qilin(d), None), "test"), "qrels=clicks"),
    ("没有 notes", lambda d: logs.read_qilin(d, "train"), "notes"),
    ("分片不全", lambda d: logs.read_qilin(_rename(qilin(d)), "train"), "没下载完"),
    ("document 写错", lambda d: logs.read_qilin(qilin(d), "train", document="both"), "image"),
]


def _shown(root, note=None, text=None):
    table(root/"search_train/train-00000-of-00001.parquet", query=["x"], search_result_details_with_idx=[text or [dict(note_idx=note, click=1.0, position=0)]])
    return root


def _qrels(root, text):
    path = root/"datasets/search.test.qrels.csv"
    path.unlink() if text is None else path.write_text(text, encoding="utf-8")
    return root


def _rename(root):
    (root/"notes/train-00000-of-00001.parquet").rename(root/"notes/train-00000-of-00005.parquet")
    return root


@pytest.mark.parametrize("do, word", [c[1:] for c in QILIN_BAD], ids=[c[0] for c in QILIN_BAD])
def test_qilin_bad(do, word, tmp_path):
    text = said(lambda: do(tmp_path))
    assert word in text, text


# ---------------------------------------------------------------- MMEB、sentence-transformers、ms-swift

MMEB = dict(qry=["<|image_1|>\nFind a caption.\n", "a dog ", "", "x"], qry_image_path=["i/1.jpg", "", "", ""], pos_text=["a cat", "<|image_1|>\nRepresent the given image.\n", "y", "<|image_1|>"],
            pos_image_path=["", "i/2.jpg", "", ""], neg_text=["", "<|image_1|>", "", ""], neg_image_path=["", "i/1.jpg", "", ""])


def test_mmeb_train(tmp_path):
    "记号去掉、空串是没有、两个划分不一起读、整边是空的数下来。"
    for s in ("original", "train"): table(tmp_path/f"MSCOCO/{s}-00000-of-00001.parquet", **MMEB)
    for n in (1, 2): picture(tmp_path/f"MSCOCO/i/{n}.jpg")
    done = prepare(logs.SETS["mmeb"], tmp_path/"MSCOCO", tmp_path/"out", "original")
    rows = lines(tmp_path/"out/original.jsonl")
    assert rows == [{"query": "Find a caption.", "query_image": "i/1.jpg", "positives": [{"text": "a cat"}]}, {"query": "a dog", "positives": [{"image": "i/2.jpg"}], "negatives": [{"image": "i/1.jpg"}]}]
    assert done["splits"]["original"]["dropped"] == {"查询或正例是空的": 2}
    assert "diverse_instruction" in said(lambda: prepare(logs.SETS["mmeb"], tmp_path/"MSCOCO", tmp_path/"o2", "diverse_instruction"))


def test_mmeb_eval():
    row = {"qry_inst": "<|image_1|> Find", "qry_text": "a cat", "qry_img_path": "", "tgt_inst": "", "tgt_text": ["", ""], "tgt_img_path": ["g.jpg", "b.jpg"]}
    assert logs.mmeb_eval_record(row, "第 1 行") == {"query": "Find a cat", "positives": [{"image": "g.jpg"}], "negatives": [{"image": "b.jpg"}]}
    for bad in ({**row, "tgt_text": [""]}, {**row, "tgt_text": [], "tgt_img_path": []}, {"qry": "x"}, {**row, "qry_text": "", "qry_inst": ""}): assert "第 1 行" in said(lambda: logs.mmeb_eval_record(bad, "第 1 行"))


def test_st_columns(tmp_path):
    "次序就是角色；空的反例不算；label 为 0 的一对数下来。"
    with open(tmp_path/"a.csv", "w", encoding="utf-8", newline="") as f: csv.writer(f).writerows([["query", "image", "negative_0", "negative_1", "label"], ["红，杯子", "a.jpg", "", "b.jpg", "1"], ["猫", "b.jpg", "", "", "0"]])
    for n in "ab": picture(tmp_path/f"{n}.jpg")
    done = prepare(logs.SETS["sentence-transformers"], tmp_path/"a.csv", tmp_path/"out")
    assert lines(tmp_path/"out/train.jsonl") == [{"query": "红，杯子", "positives": [{"image": "a.jpg"}], "negatives": [{"image": "b.jpg"}]}] and done["splits"]["train"]["dropped"] == {"分数太低，不算正例": 1}
    assert read_records(tmp_path/"out/train.jsonl").modes == {"t2i"}
    table(tmp_path/"p/train-00000-of-00001.parquet", anchor=["x"], positive=["y"])
    assert list(logs.read_st(tmp_path/"p").records) == [{"query": "x", "positives": [{"text": "y"}]}]


def test_st_cells():
    chat = [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "换成红色"}]}]
    assert list(logs.st_records([("第 1 行", {"a": chat, "b": {"image": "b.jpg"}})])) == [{"query": "换成红色", "query_image": "a.jpg", "positives": [{"image": "b.jpg"}]}]


ST_BAD = [
    ("多一列", [{"a": "x", "b": "y"}, {"a": "x", "b": "y", "c": "z"}], "第 2 行"), ("anchor 空", [{"a": " ", "b": "y"}], "anchor"), ("positive 空", [{"a": "x", "b": None}], "positive"), ("数", [{"a": "x", "b": 3}], "label"),
    ("id 列", [{"id": 1, "a": "x", "b": "y"}], "'id'"), ("query_id 列", [{"query_id": "1", "a": "x"}], "query_id"), ("一列", [{"a": "x"}], "两列"), ("坏分数", [{"a": "x", "b": "y", "score": "高"}], "score"), ("空分数", [{"a": "x", "b": "y", "label": None}], "label"),
    ("图文都有", [{"a": "x", "b": {"text": "t", "image": "a.jpg"}}], "doc_text"), ("assistant", [{"a": [{"role": "assistant", "content": "x"}], "b": "y"}], "assistant"), ("坏对话", [{"a": [1], "b": "y"}], "对话"),
]


@pytest.mark.parametrize("rows, word", [c[1:] for c in ST_BAD], ids=[c[0] for c in ST_BAD])
def test_st_bad(rows, word):
    text = said(lambda: list(logs.st_records((f"第 {n} 行", r) for n, r in enumerate(rows, 1))))
    assert word in text, text


def user(text): return [{"role": "user", "content": text}]


SWIFT = {"messages": user("<image>换成红色"), "images": ["a.jpg"], "positive_messages": [user("<image>")], "positive_images": [["b.jpg"]], "negative_messages": [user("<image><image>"), user("字")], "negative_images": [["a.jpg", "b.jpg"], []]}


def test_swift(tmp_path):
    r = logs.swift_record(SWIFT, "第 1 行")
    assert r == {"query": "换成红色", "query_image": "a.jpg", "positives": [{"image": "b.jpg"}], "negatives": [{"image": ["a.jpg", "b.jpg"]}, {"text": "字"}]}
    assert logs.swift_record({"messages": [{"role": "system", "content": "指令"}, *user("问")], "positive_messages": [user("答")], "label": 0.8}, "")["query"] == "指令 问"
    assert logs.swift_record({"messages": user("问"), "positive_messages": [user("答")], "label": 0}, "") is None
    for n in "ab": picture(tmp_path/f"root/{n}.jpg")
    absolute = {**SWIFT, "images": [str(tmp_path/"root/a.jpg")], "positive_images": [[str(tmp_path/"root/b.jpg")]], "negative_images": [[str(tmp_path/"root/a.jpg"), str(tmp_path/"root/b.jpg")], []]}
    put(tmp_path/"t.jsonl", json.dumps(absolute, ensure_ascii=False) + "\n")
    prepare(logs.SETS["ms-swift"], tmp_path/"t.jsonl", tmp_path/"out", images=str(tmp_path/"root"))
    assert lines(tmp_path/"out/train.jsonl")[0]["query_image"] == "a.jpg"  # 绝对路径改成了相对的
    assert "图片路径" in said(lambda: prepare(logs.SETS["ms-swift"], tmp_path/"t.jsonl", tmp_path/"o2", images=str(tmp_path/"out")))


SWIFT_BAD = [
    ("图少了", {"images": []}, "<image>"), ("少一层括号", {"positive_messages": user("<image>")}, "括号"), ("两个正例", {"positive_messages": [user("a"), user("b")], "positive_images": None}, "恰好一个"), ("没有正例", {"positive_messages": []}, "恰好一个"),
    ("图少一层", {"positive_images": ["b.jpg"]}, "列表的列表"), ("外层长度不同", {"negative_images": [["a.jpg", "b.jpg"]]}, "negative_images"), ("图是 null", {"images": [None]}, "路径"), ("图是 dict", {"images": [{"bytes": "x"}]}, "路径"),
    ("有视频", {"videos": ["a.mp4"]}, "videos"), ("正例有视频", {"positive_videos": [["a.mp4"]]}, "positive_videos"), ("label 是字符串", {"label": "1"}, "label"), ("没有 messages", {"messages": None, "images": []}, "messages"),
    ("查询是空的", {"messages": user(" "), "images": []}, "messages"), ("content 是数", {"messages": [{"role": "user", "content": 3}], "images": []}, "content"), ("正例图文都有", {"positive_messages": [user("<image>字")]}, "doc_text"),
]


@pytest.mark.parametrize("change, word", [c[1:] for c in SWIFT_BAD], ids=[c[0] for c in SWIFT_BAD])
def test_swift_bad(change, word):
    text = said(lambda: logs.swift_record({**SWIFT, **change}, "train.jsonl 第 3 行"))
    assert word in text and "第 3 行" in text, text


# ---------------------------------------------------------------- 分片

def tar(path, members, link=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as t:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
        if link:
            info = tarfile.TarInfo("9.jpg")
            info.type, info.linkname = tarfile.SYMTYPE, link
            t.addfile(info)
    return path


def sample(key, text="a cat", image=JPEG, **meta): return [(f"{key}.jpg", image), (f"{key}.txt", text.encode()), (f"{key}.json", json.dumps({"url": f"http://x/{key}", "caption": text, "key": key, "status": "success", **meta}).encode())]


def stream(path, **kw):
    s = shards.Shards(path, **kw)
    return [x["key"] for x in s], dict(s.dropped)


def test_shards_img2dataset(tmp_path):
    "img2dataset 的布局：旁边的 parquet 和 stats 不碍事；条数与 stats 相符。"
    for i in (0, 1):
        tar(tmp_path/f"{i:05d}.tar", [m for k in range(5) for m in sample(f"{i}{k:08d}", f"图 {k}")])
        put(tmp_path/f"{i:05d}_stats.json", {"count": 7, "successes": 5, "failed_to_download": 2, "status_dict": {"success": 5}})
        table(tmp_path/f"{i:05d}.parquet", url=["x"])
    s = shards.Shards(tmp_path)
    got = list(s)
    assert s.total == s.read == len(got) == 10 and not s.dropped and got[0]["text"] == "图 0" and got[0]["meta"]["url"].endswith("000000000") and got[0]["where"] == "00000.tar 的 000000000"
    assert [x["key"] for r in (0, 1) for x in shards.Shards(tmp_path, r, 2)] == [x["key"] for x in got]
    assert len(shards.find_shards(str(tmp_path/"{00000..00001}.tar"))) == len(shards.find_shards(str(tmp_path/"*.tar"))) == 2


def test_shards_memory_is_constant(tmp_path):
    "成员不会堆在内存里：读五百个样本，TarFile 里不留下一个。"
    path = tar(tmp_path/"0.tar", [m for k in range(500) for m in sample(f"{k:05d}")])
    tracemalloc.start()
    n = sum(1 for _ in shards.read_shard(path))
    assert n == 500 and tracemalloc.get_traced_memory()[1] < 600_000
    tracemalloc.stop()
    assert shards.Shards(path).total is None and len(list(shards.Shards(path))) == 500  # 没有 sizes.json 也能 list()


good = [m for k in range(10) for m in sample(f"{k:03d}")]
one = 3 * 1024  # 一个样本：三个成员，各一个头、一个内容块


def cut(at): return lambda d: _bytes(d/"0.tar", tar(d/"t/x.tar", good).read_bytes()[:at])


def _bytes(path, data):
    path.write_bytes(data)
    return path


def hurt(d):
    data = bytearray(tar(d/"t/x.tar", good).read_bytes())
    data[5 * one:5 * one + 10] = b"?" * 10
    return _bytes(d/"0.tar", data)


SHARD_BAD = [
    ("截断在头上", cut(5 * one + 100), 4, {"tar 被截断（没有结束标记）": 1, "断口处不完整的样本": 1}),
    ("截断在内容里", cut(5 * one + 522), 4, {"tar 被截断（一个成员没有读完）": 1, "断口处不完整的样本": 1}),
    ("截断在成员之间", cut(5 * one + 1024), 5, {"tar 被截断（没有结束标记）": 1, "断口处不完整的样本": 1}),
    ("中间的头坏了", hurt, 4, {"tar 中间坏了（有一个文件头认不出来）": 1, "断口处不完整的样本": 1}),
    ("两个 tar 接在一起", lambda d: _bytes(d/"0.tar", tar(d/"t/a.tar", good).read_bytes() * 2), 9, {"结束标记后面还有内容（几个 tar 接在了一起）": 1, "断口处不完整的样本": 1}),
    ("空文件", lambda d: _bytes(d/"0.tar", b""), 0, None),
    ("网页", lambda d: _bytes(d/"0.tar", b"<html>404</html>" * 100), 0, None),
    ("没有图", lambda d: tar(d/"0.tar", good + [("a.txt", b"x")]), 10, {"没有图（或图是空文件）": 1}),
    ("图是空文件", lambda d: tar(d/"0.tar", sample("a", image=b"") + good), 10, {"没有图（或图是空文件）": 1}),
    ("没有文字", lambda d: tar(d/"0.tar", good + [("a.jpg", JPEG)]), 10, {"没有文字（或只有空白）": 1}),
    ("文字是空白", lambda d: tar(d/"0.tar", good + sample("a", " \n")), 10, {"没有文字（或只有空白）": 1}),
    ("文字是 GBK", lambda d: tar(d/"0.tar", good + [("a.jpg", JPEG), ("a.txt", "你好".encode("gbk"))]), 10, {"文字不是 UTF-8": 1}),
    ("json 坏了", lambda d: tar(d/"0.tar", good + [("a.jpg", JPEG), ("a.txt", b"x"), ("a.json", b"{")]), 10, {"json 读不出来": 1}),
    ("json 是列表", lambda d: tar(d/"0.tar", good + [("a.jpg", JPEG), ("a.txt", b"x"), ("a.json", b"[]")]), 10, {"json 读不出来": 1}),
    ("下载失败", lambda d: tar(d/"0.tar", good + sample("a", status="failed_to_download")), 10, {"下载失败（failed_to_download）": 1}),
    ("key 隔开了", lambda d: tar(d/"0.tar", good + [("000.png", JPEG)]), 10, {"key 隔开了又出现，或没有 key 的成员": 1}),
    ("种类重复", lambda d: tar(d/"0.tar", good + sample("a") + [("a.jpg", b"other")]), 11, {"同一个样本里种类重复的成员": 1}),
    ("影子文件", lambda d: tar(d/"0.tar", [("._000.jpg", b"x"), *good]), 10, {"key 隔开了又出现，或没有 key 的成员": 1}),
    ("符号链接", lambda d: tar(d/"0.tar", good, link="/etc/passwd"), 10, {"不是普通文件的成员": 1}),
]


@pytest.mark.parametrize("make, n, want", [c[1:] for c in SHARD_BAD], ids=[c[0] for c in SHARD_BAD])
def test_shard_damage_is_counted(make, n, want, tmp_path):
    "坏的分片不会让流停下，也不会悄悄变短。"
    make(tmp_path)
    got, dropped = stream(tmp_path/"0.tar")
    assert len(got) == n and sum(dropped.values()), dropped
    if want is not None: assert dropped == want
    else: assert "不是 tar" in next(iter(dropped)) or "坏了" in next(iter(dropped))


def test_sizes_say_how_many_were_lost(tmp_path):
    cut(5 * one + 600)(tmp_path)
    put(tmp_path/"sizes.json", {"0.tar": 10})
    assert stream(tmp_path)[1]["比 sizes.json 少的样本"] == 5
    assert "0.tar" in said(lambda: stream(tmp_path, strict=True))
    tar(tmp_path/"0.tar", good[:9])
    assert "应有 10 个样本，读到 3 个" in said(lambda: stream(tmp_path, strict=True)) and stream(tmp_path) == (["000", "001", "002"], {"比 sizes.json 少的样本": 7})
    cut(5 * one + 600)(tmp_path)
    put(tmp_path/"sizes.json", {"0.tar": 4})
    assert stream(tmp_path)[1]["比 sizes.json 多的样本"] == 1


SHARD_ERRORS = [
    ("一个也没有", lambda d: shards.Shards(d), "没有 .tar"), ("不存在", lambda d: shards.Shards(d/"no"), "没有 .tar"), ("读者太多", lambda d: shards.Shards(tar(d/"0.tar", good), 0, 2), "2 个读者"), ("rank 越界", lambda d: shards.Shards(tar(d/"0.tar", good), 2, 2), "rank=2"),
    ("大括号缺", lambda d: (tar(d/"00000.tar", good), shards.Shards(d/"{00000..00003}.tar")), "缺了 3"), ("大括号反了", lambda d: shards.Shards(d/"{00003..00001}.tar"), "反"), ("strict 截断", lambda d: list(shards.Shards(cut(5 * one + 100)(d), strict=True)), "截断"),
    ("sizes 里缺片", lambda d: (tar(d/"0.tar", good), put(d/"sizes.json", {"0.tar": 1, "1.tar": 1}), shards.Shards(d)), "1.tar"),
    ("sizes 是负数", lambda d: (tar(d/"0.tar", good), put(d/"sizes.json", {"0.tar": -1}), shards.Shards(d)), "-1"), ("sizes 坏了", lambda d: (tar(d/"0.tar", good), put(d/"sizes.json", "{"), shards.Shards(d)), "sizes.json"), ("sizes 是列表", lambda d: (tar(d/"0.tar", good), put(d/"sizes.json", [1]), shards.Shards(d)), "sizes.json"),
    ("stats 没有 successes", lambda d: (tar(d/"0.tar", good), put(d/"0_stats.json", {"count": 1}), shards.Shards(d)), "successes"), ("Parquet 断了", lambda d: list(shards.parquet_rows([_bytes(d/"a.parquet", table(d/"b.parquet", a=[1]).read_bytes()[:50])])), "a.parquet"),
    ("Parquet 没有列", lambda d: list(shards.parquet_rows([table(d/"b.parquet", a=[1])], ["b"])), "'b'"), ("Parquet 编号不全", lambda d: (table(d/"x-00001-of-00002.parquet", a=[1]), shards.parquet_files(d)), "2 个"), ("空文件夹", lambda d: shards.parquet_files(d), "parquet"),
]


@pytest.mark.parametrize("do, word", [c[1:] for c in SHARD_ERRORS], ids=[c[0] for c in SHARD_ERRORS])
def test_shard_errors(do, word, tmp_path):
    text = said(lambda: do(tmp_path))
    assert word in text, text


def test_shards_to_folder(tmp_path):
    "写成普通的文件夹：内容不是图的数下来；名字里的 ../ 出不了图片文件夹。"
    tar(tmp_path/"src/00000.tar", sample("0001", "一只猫", png("red")["bytes"]) + sample("0002", "网页", b"<html>") + sample("../../etc/3", "坏名字", png("blue")["bytes"]))
    done = prepare(logs.SETS["webdataset"], tmp_path/"src", tmp_path/"out")
    rows = lines(tmp_path/"out/train.jsonl")
    assert [r["query"] for r in rows] == ["一只猫", "坏名字"] and rows[0]["positive"] == "images/00000_0001.png" and done["splits"]["train"]["dropped"] == {"内容不是图片": 1}
    assert sorted(p.name for p in (tmp_path/"out/images").iterdir()) == ["00000_.._.._etc_3.png", "00000_0001.png"] and done["splits"]["train"]["counts"]["shards"] == 1
    assert read_records(tmp_path/"out/train.jsonl").modes == {"t2i"}


# ---------------------------------------------------------------- ViDoRe

def vidore(root, **change):
    columns = dict(query=["甲", None, "甲", "乙", " "], image=[png("red"), png("blue"), png("green"), png("red"), png("black")], image_filename=["a.png", "b.png", "c.png", "a.png", "d.png"], answer=["1"] * 5, source=["x"] * 5)
    table(root/"data/test-00000-of-00001.parquet", **{k: v for k, v in {**columns, **change}.items() if v is not None})
    return root


def test_vidore_v1(tmp_path):
    "与官方评测相同：同样的问题只问一次、最后一行为准、干扰页留在图库里。"
    done = prepare(pages.SETS["vidore-arxivqa"], vidore(tmp_path/"v"), tmp_path/"out", allow_counts=True)["splits"]["test"]
    assert done["counts"]["queries"] == 2 and done["counts"]["corpus"] == 4 and done["dropped"] == {"空白的问题": 1, "重复的问题": 1}
    assert (tmp_path/"out/qrels.tsv").read_text().splitlines()[1:] == ["q0\tc.png\t1", "q1\ta.png\t1"]
    assert len(list((tmp_path/"out/images").iterdir())) == 4 and read_records(tmp_path/"out/test.jsonl").modes == {"t2i"}
    part = pages.read_vidore(tmp_path/"v", out=tmp_path, answers="all")
    assert [c for q, c, _ in part.qrels if q == "q0"] == ["a.png", "c.png"]
    assert "500" in said(lambda: prepare(pages.SETS["vidore-arxivqa"], tmp_path/"v", tmp_path/"o2"))


def test_vidore_counts_same_pictures(tmp_path):
    "TAT-DQA 里同一页换个文件名又出现：数出来；同名而内容不同的也数出来。"
    part = pages.read_vidore(vidore(tmp_path/"v", image=[png("red"), png("red"), png("green"), png("blue"), png("black")]), out=tmp_path)
    assert len(list(part.corpus)) == 4 and part.counts["same_pictures"] == 1 and part.dropped["同名而内容不同的页（用第一张）"] == 1


def beir(root, qrels=((0, 0, 2), (0, 1, 0), (1, 0, 1), (2, 1, 1), (0, 0, 1)), languages=("english", "french", "eng-Latn")):
    table(root/"corpus/test-00000-of-00001.parquet", corpus__id=[0, 1], image=[png("red"), png("blue")])
    table(root/"queries/test-00000-of-00001.parquet", query__id=[0, 1, 2], query=["red?", "rouge ?", "blue?"], **({"language": list(languages)} if languages else {}))
    table(root/"qrels/test-00000-of-00001.parquet", query__id=[q for q, _, _ in qrels], corpus__id=[c for _, c, _ in qrels], score=[s for *_, s in qrels])
    return root


def test_vidore_v2(tmp_path):
    done = prepare(pages.SETS["vidore2-esg"], beir(tmp_path/"v"), tmp_path/"out", allow_counts=True)["splits"]["test"]
    assert done["counts"]["queries"] == 2 and done["dropped"] == {"别的语言的问题": 1} and [r["positive_ids"] for r in lines(tmp_path/"out/test.jsonl")] == [["0"], ["1"]]
    assert len(pages.read_vidore_beir(tmp_path/"v", out=tmp_path, language="all").queries) == 3
    assert len(pages.read_vidore_beir(beir(tmp_path/"w", languages=None), out=tmp_path).queries) == 3  # 没有 language 列的（esg-human）


def test_colpali_train(tmp_path):
    table(tmp_path/"c/data/train-00000-of-00001.parquet", image=[png("red"), png("red"), png("blue")], image_filename=["a", "a", "b"], query=["问一", "问二", None])
    done = prepare(pages.SETS["colpali-train"], tmp_path/"c", tmp_path/"out", "train")["splits"]["train"]
    assert done["counts"]["records"] == 2 and done["counts"]["images"] == 1 and done["dropped"] == {"没有问题的页": 1}


PAGES_BAD = [
    ("缺 query 列", lambda d: pages.read_vidore(vidore(d, query=None), out=d), "'query'"), ("缺 image 列", lambda d: list(pages.read_vidore(vidore(d, image=None), out=d).corpus), "'image'"), ("全是干扰页", lambda d: pages.read_vidore(vidore(d, query=pa.array([None] * 5, pa.string())), out=d), "没有一个问题"),
    ("图是空的", lambda d: list(pages.read_vidore(vidore(d, image=[{"bytes": None, "path": "a.png"}] * 5), out=d).corpus), "第 1 行"), ("图是网页", lambda d: list(pages.read_vidore(vidore(d, image=[{"bytes": b"<html>", "path": None}] * 5), out=d).corpus), "<html"),
    ("没有文件名", lambda d: list(pages.read_vidore(vidore(d, image_filename=[""] * 5), out=d).corpus), "image_filename"), ("没有文件", lambda d: pages.read_vidore(d, out=d), "parquet"), ("answers 写错", lambda d: pages.read_vidore(vidore(d), out=d, answers="first"), "last"),
    ("没有这种语言", lambda d: pages.read_vidore_beir(beir(d), out=d, language="german"), "english"), ("没有 qrels", lambda d: pages.read_vidore_beir(_without(beir(d), "qrels"), out=d), "qrels"),
    ("答案不在图库里", lambda d: prepare(pages.SETS["vidore2-esg"], beir(d/"v", qrels=((0, 9, 1), (2, 1, 1))), d/"o", allow_counts=True), "9"),
]


def _without(root, name):
    shutil.rmtree(root/name)
    return root


@pytest.mark.parametrize("do, word", [c[1:] for c in PAGES_BAD], ids=[c[0] for c in PAGES_BAD])
def test_pages_bad(do, word, tmp_path):
    text = said(lambda: do(tmp_path))
    assert word in text, text


# ---------------------------------------------------------------- PDF

def pdf(path, texts, outline, box="0 0 300 240", extra=""):
    "手写的小 PDF：每页一行英文；目录是 [(标题, 页)]，页是 None 时没有去处。"
    objs = ["<< /Type /Catalog /Pages 2 0 R /Outlines 3 0 R >>", "", "<< >>", "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    nums = []
    for t in texts:
        stream = f"BT /F1 20 Tf 40 200 Td ({t}) Tj ET" if t else ""
        objs.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
        objs.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] /Contents {len(objs)} 0 R /Resources << /Font << /F1 4 0 R >> >> >>")
        nums.append(len(objs))
    objs[1] = f"<< /Type /Pages /Count {len(nums)} /Kids [{' '.join(f'{n} 0 R' for n in nums)}] >>"
    first = len(objs) + 1
    for n, (title, page) in enumerate(outline):
        links = (f" /Next {first + n + 1} 0 R" if n + 1 < len(outline) else "") + (f" /Prev {first + n - 1} 0 R" if n else "")
        if extra == "loop" and n + 1 == len(outline): links += f" /Next {first} 0 R"
        objs.append(f"<< /Title <feff{title.encode('utf-16-be').hex()}> /Parent 3 0 R{f' /Dest [{nums[page]} 0 R /Fit]' if page is not None else ''}{links} >>")
    if outline: objs[2] = f"<< /Type /Outlines /First {first} 0 R /Last {len(objs)} 0 R /Count {len(outline)} >>"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("%PDF-1.4\n" + "".join(f"{i} 0 obj\n{o}\nendobj\n" for i, o in enumerate(objs, 1)) + "trailer << /Root 1 0 R >>\n%%EOF\n").encode())
    return path


pdfium = pytest.mark.skipif(not importlib.util.find_spec("pypdfium2"), reason="没装 pypdfium2（pip install 'vembed-nb[pdf]'）")


@pdfium
def test_pdf_folder(tmp_path):
    "页、文字层、目录；同名的标题几页都算对；坏的数下来，写着文件名。"
    pdf(tmp_path/"in/甲/手册.pdf", ["Cover", "Install", "Clean"], [("1. 安装", 1), ("1.1 清洁灯罩", 2), ("2", 2), ("附录甲", None)])
    pdf(tmp_path/"in/乙.pdf", ["Install too", ""], [("安装", 0)])
    pdf(tmp_path/"in/没有目录.pdf", ["Nothing"], [])
    _bytes(tmp_path/"in/坏.pdf", b"%PDF-1.7 ....")
    done = prepare(pages.SETS["pdf"], tmp_path/"in", tmp_path/"out", side=300)["splits"]["test"]
    rows, docs = lines(tmp_path/"out/test.jsonl"), {r["id"]: r for r in lines(tmp_path/"out/corpus.jsonl")}
    assert [(r["query"], sorted(r["positive_ids"])) for r in rows] == [("安装", ["乙.pdf#1", "甲/手册.pdf#2"]), ("清洁灯罩", ["甲/手册.pdf#3"])]
    assert done["counts"]["pages"] == 6 and done["counts"]["with_text"] == 5 and done["counts"]["no_outline"] == 1 and done["counts"]["files"] == 3
    assert done["dropped"] == {"坏.pdf 打不开：不是完整的 PDF": 1, "没有去处的目录项": 1, "太短的标题": 1}
    assert docs["甲/手册.pdf#2"]["page_text"] == "Install" and docs["甲/手册.pdf#2"]["image"] == "images/甲_手册-0002.png"
    assert max(Image.open(tmp_path/"out"/docs["乙.pdf#1"]["image"]).size) == 300
    assert read_records(tmp_path/"out/test.jsonl").modes == {"t2i"} and {i.kind for i in read_corpus(tmp_path/"out/corpus.jsonl")[1]} == {"image"}
    assert "坏.pdf" in said(lambda: pages.read_pdfs(tmp_path/"in", out=tmp_path, strict=True))
    assert pages.read_pdfs(tmp_path/"in/乙.pdf", out=tmp_path).counts["files"] == 1


@pdfium
def test_pdf_by_chapter(tmp_path):
    "一章只在一边；图库不重叠；封面和目录不要。"
    titles = [f"标题{c}" for c in "甲乙丙丁戊己庚辛壬癸"]
    pdf(tmp_path/"in/a.pdf", ["Contents"] + [f"p{i}" for i in range(10)], [(t, i + 1) for i, t in enumerate(titles)])
    done = prepare(pages.SETS["pdf-chapters"], tmp_path/"in", tmp_path/"out", side=64)
    got = {s: {r["positive_ids"][0] for r in lines(tmp_path/f"out/{s}.jsonl")} for s in ("train", "val", "test")}
    assert sum(map(len, got.values())) == 10 and not got["train"] & got["test"] and not got["val"] & got["test"]
    gallery = {r["id"] for r in lines(tmp_path/"out/corpus.jsonl")}
    assert gallery == got["test"] and "a.pdf#1" not in gallery and done["splits"]["test"]["counts"]["pages"] == len(gallery)


@pdfium
def test_pdf_render_is_bounded(tmp_path):
    "自称 200 英寸见方的页也只画到 side；细长得不正常的页数下来；打结的目录不会转圈。"
    pdf(tmp_path/"in/huge.pdf", ["x"], [("巨大的页", 0)], box="0 0 14400 14400")
    part = pages.read_pdfs(tmp_path/"in", out=tmp_path/"o", side=128)
    assert len(list(part.corpus)) == 1 and Image.open(tmp_path/"o/images/huge-0001.png").size == (128, 128)
    pdf(tmp_path/"in/thin.pdf", ["x"], [("细长的页", 0)], box="0 0 10 5000")
    done = prepare(pages.SETS["pdf"], tmp_path/"in", tmp_path/"out", side=64)["splits"]["test"]
    assert done["dropped"] == {"thin.pdf 里尺寸不正常的页": 1} and done["counts"]["queries"] == done["counts"]["pages"] == 1
    assert "5000" in said(lambda: pages.render_page(pages.open_pdf(tmp_path/"in/thin.pdf"), 0, 64))
    doc = pages.open_pdf(pdf(tmp_path/"loop.pdf", ["x"], [("一圈", 0), ("两圈", 0)], extra="loop"))
    assert [t for _, t, _ in pages.pdf_outline(doc)] == ["一圈", "两圈"]
    doc.close()


PDF_BAD = [
    ("没有 PDF", lambda d: pages.read_pdfs(d, out=d), "*.pdf"), ("全坏", lambda d: (_bytes(d/"a.pdf", b"x"), pages.read_pdfs(d, out=d)), "一个也打不开"), ("都没有目录", lambda d: (pdf(d/"a.pdf", ["x"], []), pages.read_pdfs(d, out=d)), "目录"), ("一页也没有", lambda d: pages.open_pdf(pdf(d/"a.pdf", [], [])), "a.pdf"),
    ("图当 PDF", lambda d: pages.open_pdf(_bytes(d/"a.pdf", JPEG)), "不是完整的 PDF"), ("是文件夹", lambda d: pages.open_pdf(d), "打不开"), ("太小的 side", lambda d: pages.render_page(pages.open_pdf(pdf(d/"a.pdf", ["x"], [])), 0, 8), "side=8"),
]


@pdfium
@pytest.mark.parametrize("do, word", [c[1:] for c in PDF_BAD], ids=[c[0] for c in PDF_BAD])
def test_pdf_bad(do, word, tmp_path):
    text = said(lambda: do(tmp_path))
    assert word in text, text


@pdfium
def test_debian_manuals(tmp_path):
    "真的文档（要先把 Debian 的三本中文手册放在 pdfs/ 里，见 48_data.pages）。"
    src = Path(os.environ.get("VEMBED_PDFS") or Path(__file__).resolve().parents[1]/"pdfs")
    if not src.is_dir(): pytest.skip("没有 pdfs/：apt-get download debian-reference-zh-cn maint-guide-zh-cn debmake-doc，再 dpkg -x")
    part = pages.read_pdfs(src, out=tmp_path, side=64, pattern="*zh-cn.pdf")
    assert part.counts["files"] == 3 and len(list(part.records)) > 600 and not any("打不开" in k for k in part.dropped)


def test_every_card_is_complete():
    "卡片上的话写全；没有核实的写明。"
    for sets in (edits.SETS, logs.SETS, pages.SETS):
        for name, s in sets.items():
            assert name == s.name and all((s.title, s.modes, s.splits, s.protocol, s.licence, s.size, s.where, s.layout)), name
            assert s.eval_split in s.splits or not s.eval_split, name
            assert set(s.modes) <= set(MODES), name
