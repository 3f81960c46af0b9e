"""公开数据集（一）：照发表的布局造出极小的样本，读对的、也读坏的；每个错误是一句话，不留下半个文件夹。"""
import base64
import gzip
import io
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data import captions, classes, public
from vembed_nb.data.protocol import Part, PublicSet, check_counts, find_file, images_in, picture_suffix, positives_of, prepare, read_json, read_lines, save_picture
from vembed_nb.data.read import read_corpus, read_records


def jpeg(seed=0, form="JPEG"):
    buf = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)).save(buf, form)
    return buf.getvalue()


def put(path, data="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def rows(path): return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
def names(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def fails(call, *words):
    "恰好一句话的 VembedError，里面有这些词。"
    with pytest.raises(VembedError) as e: call()
    said = str(e.value)
    assert "\n" not in said and "Traceback" not in said and len(said) < 700, said
    assert not [w for w in words if w not in said], said
    return said


def made(name, src, out, splits=None, **kw):
    "准备一个（条数当然不对），然后像评测那样读回来：正例都在图库里，图都在。"
    summary = public.prepare_set(name, src, out, splits=splits, allow_counts=True, **kw)
    root = out if summary["image_root"] == "." else Path(summary["image_root"])
    for folder in [out] + ([out/"i2t"] if summary["reverse"] else []):
        tag = {"valid": "val"}.get(summary["eval_split"], summary["eval_split"])
        if not (folder/f"{tag}.jsonl").exists(): continue
        records, (ids, items, _) = read_records(folder/f"{tag}.jsonl"), read_corpus(folder/"corpus.jsonl")
        assert {p for r in records for p in r.positive_ids} <= set(ids)
        qrels = [line.split("\t") for line in (folder/"qrels.tsv").read_text(encoding="utf-8").splitlines()]
        assert qrels[0] == ["query-id", "corpus-id", "score"]
        assert {(q, d) for q, d, _ in qrels[1:]} == {(r.query_id, p) for r in records for p in r.positive_ids}
        assert all((root/i).is_file() for item in items for i in item.images)
    assert json.loads((out/"dataset.json").read_text(encoding="utf-8"))["splits"].keys() == summary["splits"].keys()
    return summary


# ── 协议 ───────────────────────────────────────────────────────────────────────────────────────────────

def toy(reader, **kw): return PublicSet("toy", "玩具", ("t2i",), kw.pop("splits", {"test": {}}), "p", ("R@1",), "CC0", "1 KB", "w", reader, **kw)


def test_images_and_positives():
    row = {"query": "a.jpg", "query_image": "q", "positives": ["p.jpg", {"text": "t", "image": "i"}, "文字"], "positive_ids": [1, 2, 3], "meta_x": "m.jpg", "_y": "n.jpg", "query_id": "z.jpg"}
    assert images_in(row) == ["q", "p.jpg", "i"]
    assert [i for i, _ in positives_of(row)] == ["1", "2", "3"]
    assert [i for i, _ in positives_of({"positive": {"image": "a", "text": "b"}})] == ["a\tb"]
    assert positives_of({"positive_text": ["x", "y.jpg"]}) == [("x", "x"), ("y.jpg", "y.jpg")] and images_in({"positive_text": ["y.jpg"]}) == []


def test_counts():
    fails(lambda: check_counts("甲", "test", {"images": 1}, {"images": 2000}), "甲", "test", "2,000", "allow_counts")
    assert check_counts("甲", "test", {"images": 1}, {"images": 2}, allow=True) == {"images": [2, 1]}
    assert check_counts("甲", "test", {"images": 1}, {"images": None}) == {}
    fails(lambda: check_counts("甲", "test", {"images": 1}, {"picture": 1}), "picture")


def test_files(tmp_path):
    put(tmp_path/"deep"/"a.txt", "\ufeff一\r\n\r\n二\n")
    assert list(read_lines(find_file(tmp_path, "a.txt"))) == [("a.txt 第 1 行", "一"), ("a.txt 第 3 行", "二")]
    put(tmp_path/"._deep"/"b.txt")
    fails(lambda: find_file(tmp_path, "b.txt", what="甲"), "甲", "b.txt")
    fails(lambda: find_file(tmp_path/"nowhere", "b.txt", what="甲"), "nowhere")
    fails(lambda: list(read_lines(put(tmp_path/"gb.txt", "一二三".encode("gb18030")))), "gb.txt", "UTF-8")
    fails(lambda: read_json(put(tmp_path/"x.json", '{"a": [1, 2')), "x.json", "没下载完")
    fails(lambda: picture_suffix(b"%PDF-1.4"), "PDF")
    for bad in ("../x", "a/b", "", ".hidden", "a\0"): fails(lambda bad=bad: save_picture(tmp_path, bad, jpeg()), "文件名")
    for form, suffix in (("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("GIF", ".gif"), ("BMP", ".bmp"), ("TIFF", ".tif")): assert picture_suffix(jpeg(form=form)) == suffix


def test_prepare_joins_and_limits(tmp_path):
    def reader(src, split):
        docs = [{"id": i, "text": f"文{i}"} for i in range(4)]
        return Part(None, docs, [{"query_id": q, "query": f"问{q}"} for q in range(3)], [(0, 1, 2), (0, 2, 0), (1, 3, 1), (9, 0, 1)], image_root=src)
    s = prepare(toy(reader), tmp_path, tmp_path/"out")
    got = rows(tmp_path/"out"/"test.jsonl")
    assert [(r["query_id"], r["positive_ids"]) for r in got] == [("0", ["1"]), ("1", ["3"])]  # 0 分不是正例，问 2 没有正例
    assert s["splits"]["test"]["dropped"] == {"查询没有正例": 1} and s["splits"]["test"]["counts"]["pairs"] == 2
    assert (tmp_path/"out"/"qrels.tsv").read_text() == "query-id\tcorpus-id\tscore\n0\t1\t2\n0\t2\t0\n1\t3\t1\n"
    assert len(read_records(tmp_path/"out"/"test.jsonl")) == 2 and len(read_corpus(tmp_path/"out"/"corpus.jsonl")[0]) == 4
    s = prepare(toy(reader, splits={"test": {"queries": 99}}), tmp_path, tmp_path/"one", limit=1)  # limit：不对条数，图库不变
    assert len(rows(tmp_path/"one"/"test.jsonl")) == 1 and len(rows(tmp_path/"one"/"corpus.jsonl")) == 4 and s["limit"] == 1
    fails(lambda: prepare(toy(reader), tmp_path, tmp_path/"two", limit=0), "limit")


def test_prepare_missing_pictures(tmp_path):
    put(tmp_path/"img"/"a.jpg", jpeg())
    def reader(src, split):
        recs = [{"query": "一", "query_id": "1", "positives": ["a.jpg", "b.jpg"], "positive_ids": ["A", "B"]}, {"query": "二", "query_id": "2", "positives": ["b.jpg"], "positive_ids": ["B"]},
                {"query": "三", "query_image": "b.jpg", "query_id": "3", "positives": ["a.jpg"], "positive_ids": ["A"]}]
        return Part(iter(recs), [{"id": "A", "image": "a.jpg"}, {"id": "B", "image": "b.jpg"}], image_root=src/"img")
    fails(lambda: prepare(toy(reader), tmp_path, tmp_path/"out"), "1 张图", "b.jpg", "allow_missing")
    assert not (tmp_path/"out").exists() and names(tmp_path) == ["img/a.jpg"]
    s = prepare(toy(reader), tmp_path, tmp_path/"out", allow_missing=True)
    assert rows(tmp_path/"out"/"test.jsonl") == [{"query": "一", "query_id": "1", "positives": ["a.jpg"], "positive_ids": ["A"]}]
    assert s["splits"]["test"]["dropped"] == {"图库里缺图": 1, "记录缺图": 2} and s["splits"]["test"]["missing_images"] == 1
    s = prepare(toy(reader), tmp_path, tmp_path/"notes", check_images=False)  # 只有标注、没有图的机器
    assert s["splits"]["test"]["counts"]["records"] == 3


@pytest.mark.parametrize("bad", ["/etc/passwd.jpg", "../x.jpg", "a/../../x.jpg", "a\0.jpg"])
def test_prepare_refuses_paths(tmp_path, bad):
    fails(lambda: prepare(toy(lambda src, split: Part([{"query": "q", "positives": [bad]}], image_root=src)), tmp_path, tmp_path/"out"), "不在图片文件夹里")
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("part, words", [
    (lambda: Part([], [{"id": "a", "text": "x"}]), ["一条记录也没有"]),
    (lambda: Part([{"query": "q", "positives": ["x"]}], [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]), ["'a'", "两次"]),
    (lambda: Part([{"query": "q", "positives": ["z"]}], [{"id": "a", "text": "x"}]), ["不在图库里", "'z'"]),
    (lambda: Part(None, [{"id": "a", "text": "x"}], [{"query_id": 1, "query": "q"}], [(1, "a", 1), (1, "b", 1)]), ["不在图库里", "'b'"]),
    (lambda: Part([{"query": float("nan"), "positives": ["x"]}]), ["JSON"]),
    (lambda: Part([{"query": b"x", "positives": ["x"]}]), ["JSON"]),
], ids=["empty", "twice", "foreign", "qrels", "nan", "bytes"])
def test_prepare_refuses_parts(tmp_path, part, words):
    fails(lambda: prepare(toy(lambda src, split: replace(part(), image_root=src)), tmp_path, tmp_path/"out"), *words)
    assert names(tmp_path) == []


def test_prepare_arguments(tmp_path):
    ok = lambda src, split, colour=1, out=None: Part([{"query": "q", "positives": ["x"]}], image_root=src)
    fails(lambda: prepare(toy(ok), tmp_path/"no", tmp_path/"out"), "--src")
    fails(lambda: prepare(toy(ok), tmp_path, tmp_path/"out", splits="tset"), "tset", "test")
    fails(lambda: prepare(toy(ok), tmp_path, tmp_path/"out", color=2), "color", "colour")
    fails(lambda: prepare(toy(ok), tmp_path, tmp_path/"out", out_=2), "out_")
    prepare(toy(ok), tmp_path, tmp_path/"out")
    fails(lambda: prepare(toy(ok), tmp_path, tmp_path/"out"), "overwrite")
    prepare(toy(ok), tmp_path, tmp_path/"out", overwrite=True)
    put(tmp_path/"mine"/"notes.txt", "重要")
    fails(lambda: prepare(toy(ok), tmp_path, tmp_path/"mine", overwrite=True), "dataset.json")  # 不是我们写的，不删
    assert (tmp_path/"mine"/"notes.txt").read_text(encoding="utf-8") == "重要"
    roots = lambda src, split: Part([{"query": "q", "positives": ["x"]}], image_root=src/split)
    fails(lambda: prepare(toy(roots, splits={"train": {}, "test": {}}), tmp_path, tmp_path/"out2"), "不同的文件夹")


def test_failed_overwrite_keeps_the_old_one(tmp_path):
    prepare(toy(lambda src, split: Part([{"query": "旧", "positives": ["x"]}], image_root=src)), tmp_path, tmp_path/"out")
    fails(lambda: prepare(toy(lambda src, split: Part([], image_root=src)), tmp_path, tmp_path/"out", overwrite=True))
    assert rows(tmp_path/"out"/"test.jsonl")[0]["query"] == "旧"


# ── 图和描述 ───────────────────────────────────────────────────────────────────────────────────────────

def karpathy(n=3, split="test", per=5, **more):
    return [{"filename": f"{i}.jpg", "imgid": i, "sentids": [i * per + k for k in range(per)], "split": split,
             "sentences": [{"raw": f" A man, in hat {i}, caption {k}.\n", "tokens": ["a", "man"], "imgid": i, "sentid": i * per + k} for k in range(per)], **more} for i in range(n)]


def flickr(folder, images):
    put(folder/"dataset_flickr30k.json", json.dumps({"images": images, "dataset": "flickr30k"}))
    for im in images: put(folder/"flickr30k-images"/im["filename"], jpeg())
    return folder


def test_flickr_karpathy(tmp_path):
    images = karpathy(3) + [dict(im, filename="t" + im["filename"]) for im in karpathy(2, "train")] + [dict(im, filename="v" + im["filename"]) for im in karpathy(1, "val")]
    s = made("flickr30k", flickr(tmp_path/"src", images), tmp_path/"out")
    out = tmp_path/"out"
    assert names(out) == sorted(["dataset.json", "train.jsonl", "val.jsonl", "test.jsonl", "corpus.jsonl", "qrels.tsv", "corpus.val.jsonl", "qrels.val.tsv", "i2t/train.jsonl", "i2t/val.jsonl", "i2t/test.jsonl",
                                 "i2t/corpus.jsonl", "i2t/qrels.tsv", "i2t/corpus.val.jsonl", "i2t/qrels.val.tsv"])
    test, back = rows(out/"test.jsonl"), rows(out/"i2t"/"test.jsonl")
    assert len(test) == 15 and len(rows(out/"corpus.jsonl")) == 3 and len(back) == 3 and len(rows(out/"i2t"/"corpus.jsonl")) == 15  # 图按路径算，不按行
    assert test[0] == {"query": "A man, in hat 0, caption 0.", "query_id": "0", "positives": ["0.jpg"]}
    assert back[1]["positive_ids"] == ["5", "6", "7", "8", "9"] and len(read_records(out/"i2t"/"test.jsonl")[0].positives) == 5
    assert "query_id" not in rows(out/"train.jsonl")[0] and "positive_ids" not in rows(out/"i2t"/"train.jsonl")[0]
    assert read_records(out/"test.jsonl").modes == {"t2i"} and read_records(out/"i2t"/"test.jsonl").modes == {"i2t"}
    assert s["splits"]["test"]["different"]["images"] == [1000, 3] and s["image_root"] == str((tmp_path/"src"/"flickr30k-images").resolve())


def test_flickr_published_counts(tmp_path):
    "真正的条数对得上时不用 allow_counts；少一句就停。"
    images = karpathy(1000)
    put(tmp_path/"dataset_flickr30k.json", json.dumps({"images": images}))
    s = public.prepare_set("flickr30k", tmp_path, tmp_path/"out", splits=["test"], check_images=False)
    assert s["splits"]["test"]["different"] == {} and s["splits"]["test"]["counts"]["i2t.corpus"] == 5000
    images[7]["sentences"].pop()
    put(tmp_path/"dataset_flickr30k.json", json.dumps({"images": images}))
    fails(lambda: public.prepare_set("flickr30k", tmp_path, tmp_path/"bad", splits=["test"], check_images=False), "5,000", "4,999")


def test_flickr_empty_caption_is_counted(tmp_path):
    images = karpathy(2)
    images[0]["sentences"][2]["raw"] = "  \n"
    s = made("flickr30k", flickr(tmp_path/"src", images), tmp_path/"out", "test")
    assert s["splits"]["test"]["dropped"] == {"空的句子": 1} and s["splits"]["test"]["counts"]["records"] == 9


@pytest.mark.parametrize("change, words", [
    (lambda d: d.update(images=[]), ["images", "Karpathy"]),
    (lambda d: d["images"][0].pop("filename"), ["第 0 张", "filename"]),
    (lambda d: d["images"][1].pop("sentences"), ["第 1 张", "sentences"]),
    (lambda d: d["images"][1].update(sentences=[{"tokens": []}]), ["第 1 张"]),
    (lambda d: d["images"][1].update(sentences=None), ["第 1 张"]),
    (lambda d: [im.update(split="dev") for im in d["images"]], ["没有划分 test", "dev"]),
    (lambda d: d["images"].insert(0, "x"), ["第 0 张"]),
])
def test_flickr_bad_json(tmp_path, change, words):
    data = {"images": karpathy(2)}
    change(data)
    put(tmp_path/"dataset_flickr30k.json", json.dumps(data))
    fails(lambda: public.prepare_set("flickr30k", tmp_path, tmp_path/"out", splits="test", check_images=False), *words)


def test_flickr_nothing_there(tmp_path):
    put(tmp_path/"readme.md")
    fails(lambda: public.prepare_set("flickr30k", tmp_path, tmp_path/"out", splits="test"), "dataset_flickr30k.json", "readme.md")
    put(tmp_path/"dataset_flickr30k.json", '{"images": [')
    fails(lambda: public.prepare_set("flickr30k", tmp_path, tmp_path/"out", splits="test"), "没下载完")
    put(tmp_path/"dataset_flickr30k.json", json.dumps({"images": karpathy(2)}))
    fails(lambda: public.prepare_set("flickr30k", tmp_path, tmp_path/"out", splits="test", allow_counts=True), "2 张图", "0.jpg")
    fails(lambda: public.prepare_set("flickr30k", tmp_path, tmp_path/"out", splits="test", images=str(tmp_path/"nope")), "nope")
    assert names(tmp_path) == ["dataset_flickr30k.json", "readme.md"]


@pytest.mark.parametrize("header", ["image,caption\n", "image_id,caption\r\n", "", "image\tcaption\n"])
def test_flickr_clip_benchmark_text(tmp_path, header):
    "描述里有逗号、引号，甚至有 .jpg,；有没有表头都行。"
    said = ["A man, in a hat, smiles.", '"Hi," he says.', "file a.jpg, they said", " two,  spaces "]
    put(tmp_path/"flickr30k_test_karpathy.txt", header + "".join(f"10.jpg,{t}\n" for t in said) + "11.jpg,x\n")
    for n in ("10", "11"): put(tmp_path/"Images"/f"{n}.jpg", jpeg())
    s = made("flickr30k", tmp_path, tmp_path/"out", "test")
    assert [r["query"] for r in rows(tmp_path/"out"/"test.jsonl")] == [t.strip() for t in said] + ["x"]
    assert s["splits"]["test"]["note"] == "CLIP_benchmark 的文本"


@pytest.mark.parametrize("text, words", [("image,caption\n", ["一句话也没有"]), ("h\n10.jpg,a\n\n10 b\n", ["第 4 行"]), ("10.jpg,a\n,b\n", ["第 2 行"])])
def test_caption_lines_refuse(tmp_path, text, words): fails(lambda: captions.caption_lines(put(tmp_path/"a.txt", text)), *words)


def test_flickr_blip(tmp_path):
    put(tmp_path/"flickr30k_test.json", json.dumps([{"image": "flickr30k-images/1.jpg", "caption": ["a man in a hat", "a man"]}, {"image": "flickr30k-images/2.jpg", "caption": ["x"]}]))
    put(tmp_path/"flickr30k_train.json", json.dumps([{"image": "flickr30k-images/3.jpg", "caption": "a", "image_id": 3}, {"image": "flickr30k-images/3.jpg", "caption": "b", "image_id": 3}]))
    for i in (1, 2, 3): put(tmp_path/"flickr30k-images"/f"{i}.jpg", jpeg())
    made("flickr30k", tmp_path, tmp_path/"out", "train,test")
    assert len(rows(tmp_path/"out"/"test.jsonl")) == 3 and rows(tmp_path/"out"/"i2t"/"train.jsonl") == [{"query_image": "flickr30k-images/3.jpg", "positive_text": ["a", "b"]}]
    for bad in ('{"a": 1}', '[{"image": 3, "caption": "a"}]', '[{"image": "a.jpg"}]', '["x"]'):
        put(tmp_path/"flickr30k_test.json", bad)
        fails(lambda: public.prepare_set("flickr30k", tmp_path, tmp_path/"bad", splits="test"), "flickr30k_test.json")


def hub_rows():
    image = {"bytes": jpeg(), "path": "1.jpg"}
    return [{"image": image, "caption": ["a", "b"], "sentids": ["1", "2"], "split": "test", "img_id": "1", "filename": "1.jpg"}, {"image": image, "caption": ["c"], "sentids": ["3"], "split": "train", "img_id": "2", "filename": "2.jpg"}]


def test_flickr_hub(tmp_path, capsys):
    "Hub 的唯一划分叫 test，里面有全部的图：按 split 这一列挑；下载走 datasets，图原样写出来。"
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "caption": [datasets.Value("string")], "sentids": [datasets.Value("string")], **{k: datasets.Value("string") for k in ("split", "img_id", "filename")}})
    (tmp_path/"hub").mkdir()
    datasets.Dataset.from_list(hub_rows(), features=features).to_parquet(str(tmp_path/"hub"/"test.parquet"))
    card = public.SETS["flickr30k"]
    old, card.hub = card.hub, str(tmp_path/"hub")
    try: s = made("flickr30k", tmp_path/"src", tmp_path/"out", "test", download_first=True)
    finally: card.hub = old
    said = capsys.readouterr().out
    assert "许可：" in said and "大小：" in said
    assert s["splits"]["test"]["counts"]["images"] == 1 and s["image_root"] == "." and (tmp_path/"out"/"images"/"1.jpg").read_bytes() == hub_rows()[0]["image"]["bytes"]


def test_flickr_hub_without_split_is_refused(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist([{k: v for k, v in r.items() if k != "split"} for r in hub_rows()]), tmp_path/"a.parquet")
    fails(lambda: public.prepare_set("flickr30k", tmp_path, tmp_path/"out", splits="test"), "split")
    put(tmp_path/"a.parquet", b"PAR1....")
    fails(lambda: public.prepare_set("flickr30k", tmp_path, tmp_path/"out", splits="test"), "a.parquet")


def test_coco(tmp_path):
    images = [dict(im, filename=f"COCO_val2014_{i:012d}.jpg", filepath="val2014", cocoid=i) for i, im in enumerate(karpathy(6))]
    images[2]["sentences"].append({"raw": "sixth", "tokens": [], "sentid": 999})  # 有的图六句
    for i, split in enumerate(["train", "restval", "val", "test", "test", "test"]): images[i]["split"] = split
    put(tmp_path/"dataset_coco.json", json.dumps({"images": images}))
    for im in images: put(tmp_path/im["filepath"]/im["filename"], jpeg())
    s = made("coco", tmp_path, tmp_path/"out")
    assert s["splits"]["train"]["counts"]["images"] == 2 and s["splits"]["val"]["counts"]["records"] == 6
    assert rows(tmp_path/"out"/"corpus.jsonl")[0]["image"] == "val2014/COCO_val2014_000000000003.jpg"
    s = made("coco", tmp_path, tmp_path/"less", "train", restval=False)
    assert s["splits"]["train"]["counts"]["images"] == 1 and s["splits"]["train"]["published"] == {"images": 82783}
    fails(lambda: public.prepare_set("coco", tmp_path, tmp_path/"x", splits="train", fold=0), "fold=0")
    fails(lambda: public.prepare_set("coco", tmp_path, tmp_path/"x", splits="test", fold=5), "fold=5")
    fails(lambda: public.prepare_set("coco", tmp_path, tmp_path/"x", splits="test", fold=2), "第 2 个一千张")
    s = made("coco", tmp_path, tmp_path/"fold", "test", fold=0)
    assert s["splits"]["test"]["note"] == "第 0 个一千张"


def muge(folder, split="valid", encode=base64.urlsafe_b64encode, texts=None, lines=None):
    put(folder/f"{split}_imgs.tsv", "".join(lines or [f"{i}\t{encode(jpeg(i)).decode()}\n" for i in (1076345, 517602, 9)]))
    texts = texts or [{"text_id": 8428, "text": "高级感托特包斜挎", "image_ids": [1076345, 517602]}, {"text_id": 8429, "text": "“NIKE” 鞋", "image_ids": [9]}]
    put(folder/f"{split}_texts.jsonl", "".join(json.dumps(t, ensure_ascii=False) + "\n" for t in texts))
    return folder


@pytest.mark.parametrize("encode", [base64.urlsafe_b64encode, base64.b64encode, lambda b: base64.urlsafe_b64encode(b).rstrip(b"=")], ids=["urlsafe", "standard", "unpadded"])
def test_muge(tmp_path, encode):
    s = made("muge", muge(tmp_path/"MUGE", encode=encode), tmp_path/"out", "valid")
    got = rows(tmp_path/"out"/"val.jsonl")
    assert got[0]["positive_ids"] == ["1076345", "517602"] and rows(tmp_path/"out"/"corpus.jsonl")[2] == {"id": "9", "image": "images/valid-9.jpg"}  # 图库的 id 是原来的整数，能交排行榜
    assert got[0]["positives"] == ["images/valid-1076345.jpg", "images/valid-517602.jpg"] and got[1]["query"] == "“NIKE” 鞋"
    assert (tmp_path/"out"/"images"/"valid-9.jpg").read_bytes() == jpeg(9) and s["splits"]["valid"]["counts"] | {} == {"records": 2, "queries": 2, "pairs": 3, "images": 3, "classes": 0, "corpus": 3}
    assert not s["reverse"]
    made("muge", tmp_path/"MUGE", tmp_path/"clip", "valid", like_clip=True)
    assert rows(tmp_path/"clip"/"val.jsonl")[1]["query"] == '"nike" 鞋'


def test_muge_submission():
    assert captions.muge_submission({7: range(12)}) == [{"text_id": 7, "image_ids": list(range(10))}]
    for bad in ({7: range(9)}, {7: [1] * 10}, {"x": range(10)}, {7: ["images/1.jpg", *range(9)]}): fails(lambda bad=bad: captions.muge_submission(bad), "10 个不同的整数")


def test_muge_hidden_test_and_train(tmp_path):
    muge(tmp_path, "test", texts=[{"text_id": 1, "text": "包", "image_ids": []}, {"text_id": 2, "text": "鞋", "image_ids": []}])
    muge(tmp_path, "train")
    s = made("muge", tmp_path, tmp_path/"out", "train,test")
    assert rows(tmp_path/"out"/"queries.test.jsonl") == [{"query_id": "1", "query": "包"}, {"query_id": "2", "query": "鞋"}]
    assert len(rows(tmp_path/"out"/"corpus.test.jsonl")) == 3 and not (tmp_path/"out"/"test.jsonl").exists() and not (tmp_path/"out"/"corpus.train.jsonl").exists()
    assert s["splits"]["test"]["counts"]["queries"] == 2 and "不公开" in s["splits"]["test"]["note"]


b64 = lambda i=0: base64.b64encode(jpeg(i)).decode()


@pytest.mark.parametrize("lines, texts, words", [
    ([f"1 {b64()}\n"], None, ["第 1 行", "两列"]),
    ([f"1\t{b64()}\tx\n"], None, ["第 1 行", "3 列"]),
    ([f"id\tbase64\n"], None, ["第 1 行", "整数"]),
    ([f"1.5\t{b64()}\n"], None, ["整数"]),
    ([f"1\t{b64()}\n", f"1\t{b64(1)}\n"], None, ["第 2 行", "前面已经有了"]),
    ([f"1\t{b64()[:41]}\n"], None, ["base64"]),
    ([f"1\t{b64()[:20]}!!!!{b64()[20:]}\n"], None, ["base64"]),
    ([f"1\tb'{b64()}'\n"], None, ["base64"]),  # 有人把 bytes 的样子写了进去
    (["1\t\n"], None, ["不是图片"]),
    ([f"1\t{base64.b64encode(b'<html>').decode()}\n"], None, ["不是图片", "html"]),
    (["\n"], None, ["一张图也没有"]),
    (None, [{"text_id": 1, "text": "x", "image_ids": [404]}], ["404", "text_id 1"]),
    (None, [{"text_id": 1, "text": "x"}], ["image_ids"]),
    (None, [{"text_id": 1, "text": None, "image_ids": [9]}], ["第 1 行", "文字"]),
    (None, [{"text_id": 1, "text": "x", "image_ids": ["九"]}], ["整数"]),
    (None, [{"text_id": 1, "text": "x", "image_ids": 9}], ["第 1 行"]),
    (None, [{"text_id": 1, "text": "x", "image_ids": [9]}] * 2, ["text_id 1", "前面已经有了"]),
    (None, [[1]], ["第 1 行"]),
])
def test_muge_refuses(tmp_path, lines, texts, words):
    muge(tmp_path/"MUGE", lines=lines, texts=texts)
    fails(lambda: public.prepare_set("muge", tmp_path/"MUGE", tmp_path/"out", splits="valid", allow_counts=True), *words)
    assert not (tmp_path/"out").exists()


def test_muge_counts_blank_and_unmatched(tmp_path):
    texts = [{"text_id": 1, "text": "包", "image_ids": [9]}, {"text_id": 2, "text": "  ", "image_ids": [9]}, {"text_id": 3, "text": "鞋", "image_ids": []}]
    s = made("muge", muge(tmp_path/"M", texts=texts), tmp_path/"out", "valid")
    assert s["splits"]["valid"]["dropped"] == {"空的句子": 1, "句子没有图": 1}
    put(tmp_path/"M"/"valid_texts.jsonl", '{"text_id": 1\n')
    fails(lambda: public.prepare_set("muge", tmp_path/"M", tmp_path/"bad", splits="valid"), "第 1 行", "JSON")
    os.remove(tmp_path/"M"/"valid_imgs.tsv")
    put(tmp_path/"M"/"valid_texts.jsonl", '{"text_id": 1, "text": "x", "image_ids": [1]}\n')
    fails(lambda: public.prepare_set("muge", tmp_path/"M", tmp_path/"bad", splits="valid"), "valid_imgs.tsv")


@pytest.mark.parametrize("file, text, note", [
    ("flickr30k_cn_test.txt", "1007129816.jpg,一个男人，戴着帽子, 微笑\n11.jpg,二\n", "flickr30k_cn_test.txt"),
    ("flickr30k_cn_test.txt", "image,caption\n1007129816.jpg,一个男人，戴着帽子, 微笑\n11.jpg,二\n", "flickr30k_cn_test.txt"),
    ("test/flickr30k_cn_test.txt", "1007129816\t一个男人，戴着帽子, 微笑\n11\t二\n", "flickr30k_cn_test.txt"),
    ("test/flickr30k_cna_test.txt", "1007129816.jpg#0\t一个男人，戴着帽子, 微笑\n11.jpg#0\t二\n", "CNA"),
])
def test_flickr30k_cn_text(tmp_path, file, text, note):
    put(tmp_path/"src"/file, text)
    for n in ("1007129816", "11"): put(tmp_path/"src"/"flickr30k-images"/f"{n}.jpg", jpeg())
    s = made("flickr30k-cn", tmp_path/"src", tmp_path/"out", "test")
    assert rows(tmp_path/"out"/"test.jsonl")[0] | {"query_id": ""} == {"query": "一个男人，戴着帽子, 微笑", "query_id": "", "positives": ["1007129816.jpg"]}
    assert note in s["splits"]["test"]["note"]


def test_flickr30k_cn_tsv_and_missing(tmp_path):
    muge(tmp_path/"Flickr30k-CN", "test")
    s = made("flickr30k-cn", tmp_path/"Flickr30k-CN", tmp_path/"out", "test")
    assert s["reverse"] == "i2t" and len(rows(tmp_path/"out"/"i2t"/"test.jsonl")) == 3
    fails(lambda: public.prepare_set("flickr30k-cn", tmp_path/"Flickr30k-CN", tmp_path/"x", splits="val"), "flickr30k_cn_val.txt", "valid_texts.jsonl")


A, B, C = "COCO_val2014_000000217153", "COCO_train2014_000000000002", "COCO_val2014_000000000003"


def coco_cn(folder, said=f"{A}#0\t一个人在滑雪\n{A}#1\t雪，山\n{B}#0\t狗\n", ids=f"{A}\n{B}\n{C}\n"):
    put(folder/"coco-cn_test.txt", ids)
    put(folder/"imageid.human-written-caption.txt", said)
    put(folder/"imageid.manually-translated-caption.txt", f"{A}#0\t翻译的\n{C}#3\t又一句\n")
    put(folder/"imageid.human-written-caption.bosonseg.txt", "不该读它")
    for i in (A, B, C): put(folder.parent/f"{i.split('_')[1]}"/f"{i}.jpg", jpeg())
    return folder.parent


def test_coco_cn(tmp_path):
    s = made("coco-cn", coco_cn(tmp_path/"src"/"coco-cn-version1805v1.1"), tmp_path/"out", "test")
    assert [r["query"] for r in rows(tmp_path/"out"/"test.jsonl")] == ["一个人在滑雪", "雪，山", "狗"]  # #1 还在
    assert s["splits"]["test"]["counts"]["corpus"] == 3 and s["splits"]["test"]["dropped"] == {"i2t：图没有句子": 1}
    s = made("coco-cn", tmp_path/"src", tmp_path/"more", "test", translated=True)
    ids = [r["query_id"] for r in rows(tmp_path/"more"/"test.jsonl")]
    assert ids == [f"{A}#0", f"{A}#1", f"{A}#t0", f"{B}#0", f"{C}#t3"] and s["splits"]["test"]["published"] == {"images": 1000, "queries": 6053}


@pytest.mark.parametrize("kw, words", [
    ({"said": f"{A}#0 空格隔开\n"}, ["第 1 行"]), ({"said": f"{A}\t没有号\n"}, ["第 1 行"]), ({"ids": f"{A}\n{A}\n"}, ["重复"]), ({"ids": "\n"}, ["一个也没有"]), ({"ids": "217153\n"}, ["217153"]), ({"ids": "../../x\n"}, ["不是 COCO"]),
])
def test_coco_cn_refuses(tmp_path, kw, words):
    src = coco_cn(tmp_path/"src"/"coco-cn-version1805v1.1", **kw)
    fails(lambda: public.prepare_set("coco-cn", src, tmp_path/"out", splits="test", allow_counts=True), *words)


# ── 同款与同类 ─────────────────────────────────────────────────────────────────────────────────────────

HEADER = "image_id class_id super_class_id path\n"


def sop(folder, split="test", text=None):
    lines = ["1 11319 1 bicycle_final/1_0.JPG", "2 11319 1 bicycle_final/1_1.JPG", "3 11320 1 bicycle_final/2_0.JPG", "4 11320 1 bicycle_final/2_1.JPG", "5 11321 2 cabinet_final/3_0.JPG"]
    put(folder/"Stanford_Online_Products"/f"Ebay_{split}.txt", text if text is not None else HEADER + "\n".join(lines) + "\n")
    for line in lines: put(folder/"Stanford_Online_Products"/line.split()[3], jpeg())
    return folder


@pytest.mark.parametrize("inner", ["", "Stanford_Online_Products"])
def test_sop(tmp_path, inner):
    sop(tmp_path/"src"), sop(tmp_path/"src", "train")
    s = made("sop", tmp_path/"src"/inner, tmp_path/"out")
    got = rows(tmp_path/"out"/"test.jsonl")
    assert len(got) == 4 and len(rows(tmp_path/"out"/"corpus.jsonl")) == 5 and s["mask_self"] and s["splits"]["test"]["dropped"] == {"同组只有自己": 1}
    assert all(r["query_image"] not in r["positives"] for r in got) and got[0]["group"] == "11319"
    assert not (tmp_path/"out"/"corpus.train.jsonl").exists() and read_records(tmp_path/"out"/"train.jsonl").modes == {"i2i"}


def test_sop_masks_itself_in_evaluation(tmp_path):
    "自己在图库里、正例里没有自己：评测时不参加排名，即使图库里有一张一模一样的。"
    import torch

    from vembed_nb.evaluate.report import report_from_vectors

    made("sop", sop(tmp_path/"src"), tmp_path/"out", "test")
    records, (ids, items, _) = read_records(tmp_path/"out"/"test.jsonl"), read_corpus(tmp_path/"out"/"corpus.jsonl")
    d = torch.eye(5)[[0, 0, 1, 1, 0]]  # 第 4 张是第 0 张的复制品，却是别的商品
    q = torch.stack([d[ids.index(r.query.image)] for r in records])
    report = report_from_vectors(q, d, records, ids, items)
    assert [r.tolist() for r in report.ranks] == [[1], [1], [1], [1]]
    assert report_from_vectors(q, d[[0, 2, 1, 3, 0]], records, ids, items).metrics["hit@1"] < 1  # 排除的是自己，不是第一名


@pytest.mark.parametrize("text, words", [
    ("1 1 1 a.JPG\n", ["表头"]), (HEADER.replace(" ", ","), ["表头"]), (HEADER, ["一张图也没有"]), (HEADER + "1 1 a.JPG\n", ["第 2 行"]), (HEADER + "1 x 1 a.JPG\n", ["第 2 行"]), (HEADER + "1 1 1 a b.JPG\n", ["第 2 行"]), ("", ["一张图也没有"]),
])
def test_sop_refuses(tmp_path, text, words):
    sop(tmp_path/"src", text=text)
    fails(lambda: public.prepare_set("sop", tmp_path/"src", tmp_path/"out", splits="test"), *words)


def test_sop_wrong_counts_and_lost_picture(tmp_path):
    sop(tmp_path/"src")
    fails(lambda: public.prepare_set("sop", tmp_path/"src", tmp_path/"out", splits="test"), "60,502", "allow_counts")
    fails(lambda: public.prepare_set("sop", tmp_path/"src", tmp_path/"out"), "Ebay_train.txt")
    os.remove(tmp_path/"src"/"Stanford_Online_Products"/"bicycle_final"/"1_1.JPG")
    fails(lambda: public.prepare_set("sop", tmp_path/"src", tmp_path/"out", splits="test", allow_counts=True), "1_1.JPG")


def test_train_positives_are_shared_evenly():
    items = [(f"{i}.jpg", "x") for i in range(20)]
    got = [r["positives"] for r in classes.class_part(items, ".", True, k=8).records]
    times = {p: sum(p in g for g in got) for p, _ in items}
    assert set(times.values()) == {8} and all(len(set(g)) == 8 and f"{i}.jpg" not in g for i, g in enumerate(got))
    assert all(len(r["positives"]) == 19 for r in classes.class_part(items, ".", False).records)


INSHOP = [("WOMEN/Dresses/id_00000002/02_1_front.jpg", "id_00000002", "query"), ("WOMEN/Dresses/id_00000002/02_2_side.jpg", "id_00000002", "gallery"), ("MEN/Tees/id_00000003/01_1_front.jpg", "id_00000003", "gallery"),
          ("MEN/Tees/id_00000001/01_1_front.jpg", "id_00000001", "train"), ("MEN/Tees/id_00000001/01_2_side.jpg", "id_00000001", "train")]


def inshop(folder, where="Eval", text=None, kind="img"):
    lines = [f"img/{p:<60} {i} {s}" for p, i, s in INSHOP]
    put(folder/where/"list_eval_partition.txt", text or "\n".join([str(len(INSHOP)), "image_name item_id evaluation_status", *lines]) + "\n")
    for p, _, _ in INSHOP: put(folder/"Img"/kind/p, jpeg())
    return folder


def test_inshop(tmp_path):
    s = made("inshop", inshop(tmp_path/"src"), tmp_path/"out")
    got = rows(tmp_path/"out"/"test.jsonl")
    assert len(got) == 1 and got[0]["positives"] == [f"img/{INSHOP[1][0]}"] and got[0]["group"] == "2" and len(rows(tmp_path/"out"/"corpus.jsonl")) == 2
    assert not s["mask_self"] and s["splits"]["train"]["counts"]["images"] == 2 and s["splits"]["test"]["note"] == "256 像素"
    fails(lambda: public.prepare_set("inshop", tmp_path/"src", tmp_path/"x", splits="test", highres=True, allow_counts=True), "img_highres")
    inshop(tmp_path/"high", where=".", kind="img_highres")
    made("inshop", tmp_path/"high", tmp_path/"high_out", "test", highres=True)
    assert rows(tmp_path/"high_out"/"test.jsonl")[0]["query_image"].startswith("img_highres/WOMEN")


@pytest.mark.parametrize("text, words", [
    ("000001.jpg 0\n000002.jpg 0\n", ["CelebA"]), ("5\n000001.jpg 0\n", ["image_name"]), ("2\nimage_name item_id evaluation_status\nimg/a.jpg id_00000001 train\n", ["2 行", "1 行"]),
    ("1\nimage_name item_id evaluation_status\nimg/a.jpg id_00000001 val\n", ["第 3 行"]), ("1\nimage_name item_id evaluation_status\nimg/a.jpg 1 train\n", ["第 3 行"]), ("0\nimage_name item_id evaluation_status\n", ["0 行"]),
])
def test_inshop_refuses(tmp_path, text, words):
    inshop(tmp_path/"src", text=text)
    fails(lambda: public.prepare_set("inshop", tmp_path/"src", tmp_path/"out", splits="test"), *words)


def cub(folder, files=None, labels=None):
    files = files or [(i, f"{c:03d}.Bird/Bird_{i:04d}.jpg") for i, c in enumerate([1, 1, 100, 101, 101, 200, 200], 1)]
    labels = labels or [(i, int(f.split(".")[0])) for i, f in files]
    put(folder/"CUB_200_2011"/"images.txt", "".join(f"{i} {f}\n" for i, f in files))
    put(folder/"CUB_200_2011"/"image_class_labels.txt", "".join(f"{i} {c}\n" for i, c in reversed(labels)))  # 次序相反：按序号对
    put(folder/"CUB_200_2011"/"train_test_split.txt", "".join(f"{i} {i % 2}\n" for i, _ in files))  # 分类的划分，不该读
    for _, f in files: put(folder/"CUB_200_2011"/"images"/f, jpeg())
    return folder


def test_cub(tmp_path):
    s = made("cub", cub(tmp_path/"src"), tmp_path/"out")
    assert {r["group"] for r in rows(tmp_path/"out"/"test.jsonl")} == {"101", "200"} and {r["group"] for r in rows(tmp_path/"out"/"train.jsonl")} == {"1"}
    assert s["splits"]["train"]["dropped"] == {"同组只有自己": 1} and s["mask_self"]
    files = [(1, "101.Bird/a.jpg"), (2, "101.Bird/b.jpg"), (3, "101.Bird/._b.jpg")]
    s = made("cub", cub(tmp_path/"mac", files), tmp_path/"mac_out", "test")
    assert s["splits"]["test"]["dropped"] == {"影子文件 ._*": 1} and s["splits"]["test"]["counts"]["corpus"] == 2


@pytest.mark.parametrize("files, labels, words", [
    ([(1, "101.a/a.jpg"), (2, "101.a/b.jpg")], [(1, 101)], ["对不上", "2"]), ([(1, "101.a/a.jpg")], [(1, 201)], ["201"]), ([(1, "101.a/a.jpg")], [(1, 0)], ["'0'"]), ([(1, "101.a/a b.jpg")], [(1, 101)], ["第 1 行"]),
    ([(1, "101.a/a.jpg"), (1, "101.a/b.jpg")], [(1, 101)], ["序号 1"]), ([(1, "001.a/a.jpg")], None, ["一张图也没有"]),
])
def test_cub_refuses(tmp_path, files, labels, words):
    cub(tmp_path/"src", files, labels)
    fails(lambda: public.prepare_set("cub", tmp_path/"src", tmp_path/"out", splits="test"), *words)


def idx(x, magic=None): return struct.pack(f">4B{x.ndim}I", *(magic or (0, 0, 8, x.ndim)), *x.shape) + x.tobytes()


def fashion(folder, n=40, images=None, labels=None, gz=True, prefix="t10k"):
    pics = np.random.default_rng(0).integers(0, 256, (n, 28, 28), dtype=np.uint8)
    for kind, data in (("images-idx3", images or idx(pics)), ("labels-idx1", labels or idx(np.arange(n, dtype=np.uint8) % 10))):
        put(folder/(f"{prefix}-{kind}-ubyte" + ".gz" * gz), gzip.compress(data) if gz else data)
    return pics


@pytest.mark.parametrize("gz", [True, False])
def test_fashion_mnist(tmp_path, gz):
    pics = fashion(tmp_path/"src", gz=gz)
    fails(lambda: public.prepare_set("fashion-mnist", tmp_path/"src", tmp_path/"out", splits="test"), "MNIST 用同样的文件名", "any_idx")
    s = made("fashion-mnist", tmp_path/"src", tmp_path/"out", "test", any_idx=True, queries_per_class=1)
    got = rows(tmp_path/"out"/"test.jsonl")
    assert len(got) == 10 and len(rows(tmp_path/"out"/"corpus.jsonl")) == 30 and all(len(r["positives"]) == 3 for r in got) and not s["mask_self"]
    assert not {r["query_image"] for r in got} & {r["id"] for r in rows(tmp_path/"out"/"corpus.jsonl")}
    assert (np.asarray(Image.open(tmp_path/"out"/"images"/"t10k-00007.png")) == pics[7]).all()
    fashion(tmp_path/"src", prefix="train", gz=gz)
    s = made("fashion-mnist", tmp_path/"src", tmp_path/"train", "train", any_idx=True, per_class=2)
    assert s["splits"]["train"]["counts"]["records"] == 20 and s["splits"]["train"]["counts"]["pairs"] == 20
    fails(lambda: public.prepare_set("fashion-mnist", tmp_path/"src", tmp_path/"x", splits="test", any_idx=True), "图库就空了")


@pytest.mark.parametrize("kw, words", [
    ({"images": idx(np.zeros((3, 28, 28), np.uint8), (0, 0, 9, 3))}, ["魔数", "00000903"]), ({"images": idx(np.zeros(3, np.uint8))}, ["魔数"]), ({"images": idx(np.zeros((3, 28, 28), np.uint8))[:-5]}, ["不完整"]),
    ({"labels": idx(np.zeros(3, np.uint8)) + b"x"}, ["不完整"]), ({"images": b"\0\0\x08\x03\0\0"}, ["头都不全"]), ({"images": b"\0"}, ["魔数"]), ({"labels": idx(np.zeros(3, np.uint8))}, ["40 张图", "3 个标签"]),
])
def test_fashion_mnist_refuses(tmp_path, kw, words):
    fashion(tmp_path/"src", **kw)
    fails(lambda: public.prepare_set("fashion-mnist", tmp_path/"src", tmp_path/"out", splits="test", any_idx=True), *words)


@pytest.mark.parametrize("cut", [10, 200])
def test_fashion_mnist_truncated_gzip(tmp_path, cut):
    fashion(tmp_path/"src")
    path = tmp_path/"src"/"t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    fails(lambda: public.prepare_set("fashion-mnist", tmp_path/"src", tmp_path/"out", splits="test"), "没下载完")
    path.write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + b"junk" * 20)
    fails(lambda: public.prepare_set("fashion-mnist", tmp_path/"src", tmp_path/"out", splits="test"), "没下载完")
    os.remove(path)
    fails(lambda: public.prepare_set("fashion-mnist", tmp_path/"src", tmp_path/"out", splits="test"), "t10k-images-idx3-ubyte")


def test_fashion_mnist_for_real(tmp_path):
    src = Path(os.environ.get("FASHION_MNIST", "/usr/share/datasets/fashion-mnist"))
    if not (src/"t10k-images-idx3-ubyte.gz").exists(): pytest.skip("没有装 Debian 包 dataset-fashion-mnist")
    s = public.prepare_set("fashion-mnist", src, tmp_path/"out", splits="test")  # 条数都对，不用 allow_counts
    assert s["splits"]["test"]["counts"] == {"records": 1000, "queries": 1000, "pairs": 900000, "images": 10000, "classes": 10, "corpus": 9000}


# ── 大门 ───────────────────────────────────────────────────────────────────────────────────────────────

MINE = ["flickr30k", "coco", "flickr30k-cn", "coco-cn", "muge", "sop", "inshop", "cub", "fashion-mnist", "emoji"]


def test_table_and_facts():
    assert set(MINE) <= set(public.SETS) and all(k == s.name for k, s in public.SETS.items())
    text = public.table()
    width = {line.count("|") for line in text.splitlines()}
    assert len(text.splitlines()) == len(public.SETS) + 2 and width == {9}
    json.dumps(public.rows(), ensure_ascii=False)
    for name, s in public.SETS.items():
        said = public.facts(name)
        assert "许可：" in said and "大小：" in said and s.licence and s.size and s.protocol and s.where, name
        assert s.eval_split in {*s.splits, ""} or set(s.splits) == {"train"}, name  # 空串：没有评测的划分
    fails(lambda: public.find_set("muga"), "muge")
    fails(lambda: public.prepare_set("", "a", "b"), "flickr30k")


def test_download_refuses(tmp_path, capsys):
    fails(lambda: public.download("coco", tmp_path/"d"), "没有现成的", "dataset_coco.json")
    card = public.SETS["flickr30k"]
    old, card.hub = card.hub, str(tmp_path/"no-such-folder")
    try: fails(lambda: public.download("flickr30k", tmp_path/"d"), "没有取到", "--src")
    finally: card.hub = old
    assert "许可：" in capsys.readouterr().out and not (tmp_path/"d").exists()
    put(tmp_path/"full"/"x")
    fails(lambda: public.download("flickr30k", tmp_path/"full"), "不是空的")


def test_emoji(tmp_path):
    "miniature npm 包：留出的概念不进训练，同名的图都算对。"
    from vembed_nb.data.emoji import emoji_split

    split, nm = emoji_split(), tmp_path/"node_modules"
    labels = {"1f600": split["test"][0], "1f601": split["test"][1], "1f602": split["val"][0], "1f603": "zzz not held out"}
    for lang in ("zh", "en"):
        put(nm/"emojibase-data"/lang/"data.json", json.dumps([{"hexcode": k.upper(), "group": 0, "label": ("同名" if lang == "zh" and k in ("1f600", "1f601") else v)} for k, v in labels.items()]))
    for folder, ext, form in (("@lobehub/fluent-emoji-3d/assets", "webp", "WEBP"), ("emoji-datasource-google/img/google/64", "png", "PNG"), ("emoji-datasource-twitter/img/twitter/64", "png", "PNG")):
        for k in labels: put(nm/folder/f"{k}.{ext}", jpeg(form=form))
    s = made("emoji", tmp_path, tmp_path/"out", size=16)
    got = {r["query_id"]: r["positive_ids"] for r in rows(tmp_path/"out"/"test.jsonl")}
    assert sorted(got["zh-1f600"]) == ["fluent-1f600", "fluent-1f601"] and got["en-1f600"] == ["fluent-1f600"]
    assert s["splits"]["train"]["counts"]["images"] == 3 and {r["group"] for r in rows(tmp_path/"out"/"train.jsonl")} == {"zzz not held out"}
    fails(lambda: public.prepare_set("emoji", tmp_path/"out", tmp_path/"x"), "npm install")
