"""图片不是路径、而是嵌在数据里的字节：评测、建索引、训练都照常。"""
import base64
import json

from conftest import write_jsonl

from vembed_nb.data.read import read_corpus, read_records
from vembed_nb.evaluate.report import evaluate_encoder
from vembed_nb.models.load import load_encoder
from vembed_nb.search.searcher import Searcher, build_index


def test_embedded_pictures_end_to_end(shop, tmp_path):
    rows = [json.loads(line) for line in (shop / "train.jsonl").read_text(encoding="utf-8").splitlines()][:12]
    paths = [r.get("positive") or r.get("positive_image") or r["positives"][0] for r in rows]
    data = lambda p: "data:image/png;base64," + base64.b64encode((shop / p).read_bytes()).decode()
    write_jsonl(tmp_path / "t2i.jsonl", [{"query": r.get("query"), "positive_image": data(p)} for r, p in zip(rows, paths)])
    write_jsonl(tmp_path / "path.jsonl", [{"query": r.get("query"), "positive": p} for r, p in zip(rows, paths)])
    write_jsonl(tmp_path / "i2i.jsonl", [{"query_image": data(paths[i]), "positive_image": data(paths[i + 1]), "positive_id": paths[i + 1]} for i in range(0, 12, 2)])
    enc = load_encoder("tiny-clip")
    embedded, plain = (evaluate_encoder(enc, read_records(tmp_path / f), image_root=shop).metrics for f in ("t2i.jsonl", "path.jsonl"))
    assert embedded == plain
    write_jsonl(tmp_path / "corpus.jsonl", [{"id": p, "image": data(p)} for p in dict.fromkeys(paths)])
    corpus = read_corpus(tmp_path / "corpus.jsonl")
    records = read_records(tmp_path / "i2i.jsonl")
    masked, kept = (evaluate_encoder(enc, records, corpus, mask_self=m).metrics for m in (True, False))
    assert kept["hit@1"] == 0 and masked["mean_rank"] == kept["mean_rank"] - 1
    build_index(enc, corpus, model="tiny-clip", out=tmp_path / "index")
    assert len(Searcher(tmp_path / "index").search("杯子", 3)) == 3


def test_broken_embedded_pictures_are_dropped_and_counted(shop, tmp_path):
    from vembed_nb.data.check import drop_broken, drop_broken_corpus

    whole = next(p for p in sorted(shop.rglob("*")) if p.suffix in (".png", ".jpg")).read_bytes()
    uri = lambda b: "data:image/png;base64," + base64.b64encode(b).decode()
    write_jsonl(tmp_path / "t.jsonl", [{"query": "好的", "positive_image": uri(whole)}, {"query": "截断的", "positive_image": uri(whole[:len(whole) // 2])}])
    kept, bad = drop_broken(read_records(tmp_path / "t.jsonl"))
    assert [r.query.text for r in kept] == ["好的"] and len(bad) == 1 and next(iter(bad)).startswith("sha256:")
    write_jsonl(tmp_path / "c.jsonl", [{"id": "1", "image": uri(whole)}, {"id": "2", "image": uri(whole[:len(whole) // 2])}])
    (ids, _, _), bad = drop_broken_corpus(read_corpus(tmp_path / "c.jsonl"))
    assert ids == ["1"] and len(bad) == 1
