"""命令行：issue 2 里的写法在新的进程里逐条跑；每一种坏输入都是一句话、退出码不为 0、旧的结果不动。"""
import json
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_jsonl

METRICS = {"hit@1", "hit@5", "hit@10", "recall@1", "recall@10", "mrr", "ndcg@10"}


def tree(folder):
    "文件夹里每个文件的内容，用来确认没有被动过。"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def sentence(r, *words):
    "失败、一行、没有 Traceback、说出了该说的词。"
    lines = r.err.strip().splitlines()
    assert r.code not in (0, None), (r.code, r.out, r.err)
    assert len(lines) == 1 and "Traceback" not in r.err and r.err.endswith("\n"), r.err
    missing = [w for w in words if str(w) not in r.err]
    assert not missing, f"{lines[0]} 里没有 {missing}"


# ---------------------------------------------------------------- 正常的路

@pytest.fixture(scope="module")
def trained(toyshop, micro, tmp_path_factory):
    "命令行训好的模型和建好的索引（在进程里跑，供后面的测试用；只读）。"
    from vembed_nb.cli import main

    out = tmp_path_factory.mktemp("cli")
    assert main(["train", "--data", f"{toyshop}/train.jsonl", "--val", f"{toyshop}/val.jsonl", "--image-root", str(toyshop), "--model", micro, "--out", f"{out}/model", "epochs=2", "batch_size=16", "learning_rate=1e-3"]) == 0
    assert main(["index", "--model", f"{out}/model", "--data", f"{toyshop}/corpus.jsonl", "--image-root", str(toyshop), "--out", f"{out}/index"]) == 0
    return out


def test_the_main_job_in_real_processes(toyshop, tmp_path, vembed):
    "issue 2 第 6 点的五条命令，原样，用随包的小模型；目录名里有空格和中文。"
    home = tmp_path / "我的 项目"
    home.mkdir()
    (home / "shop").symlink_to(toyshop)
    run = lambda *args: vembed(*args, cwd=home)
    r = run("train", "--data", "shop/train.jsonl", "--val", "shop/val.jsonl", "--image-root", "shop", "--model", "tiny-clip", "--out", "OUT", "epochs=1", "batch_size=32")
    assert r.returncode == 0, r.stderr
    assert r.stderr == "" and "训练完成" in r.stdout
    assert (home / "OUT/checkpoint-epoch-1/model.safetensors").exists()

    r = run("eval", "--model", "OUT", "--data", "shop/test.jsonl", "--image-root", "shop", "--json", "metrics.json")
    assert r.returncode == 0, r.stderr
    report = json.loads((home / "metrics.json").read_text(encoding="utf-8"))
    assert METRICS <= set(report) and all(0 <= report[k] <= 1 for k in METRICS) and (report["n_queries"], report["n_corpus"]) == (30, 40)

    r = run("index", "--model", "OUT", "--data", "shop/corpus.jsonl", "--image-root", "shop", "--out", "INDEX")
    assert r.returncode == 0, r.stderr
    r = run("search", "红色的杯子", "--index", "INDEX", "-k", "5", "--json")
    assert r.returncode == 0, r.stderr
    hits = json.loads(r.stdout)["hits"]
    assert [h["rank"] for h in hits] == [1, 2, 3, 4, 5] and all((toyshop / h["image"]).exists() for h in hits)
    assert [h["score"] for h in hits] == sorted((h["score"] for h in hits), reverse=True)

    r = run("encode", "shop/corpus.jsonl", "--model", "OUT", "--image-root", "shop", "--out", "v.npz")
    assert r.returncode == 0, r.stderr
    z = np.load(home / "v.npz", allow_pickle=False)
    assert z["vectors"].shape == (40, 128) and z["ids"][0] == json.loads((toyshop / "corpus.jsonl").read_text().splitlines()[0])["id"]


def test_entry_point_exit_codes(vembed, tmp_path):
    "真正的入口程序也是一句话和退出码 2。"
    r = vembed("train", "--data", "nowhere.jsonl", "--out", tmp_path / "o", cwd=tmp_path)
    assert r.returncode == 2 and r.stdout == "" and r.stderr.count("\n") == 1 and "nowhere.jsonl" in r.stderr


def test_search_text_table(cli, trained):
    r = cli("search", "红色的杯子", "--index", trained / "index", "-k", "3")
    assert r.code == 0 and len(r.out.strip().splitlines()) == 3 and r.err == ""


def test_search_more_than_there_are(cli, trained):
    assert len(json.loads(cli("search", "红色的杯子", "--index", trained / "index", "-k", "500", "--json").out)["hits"]) == 40


def test_search_with_a_picture(cli, trained, toyshop):
    "用图库里的一张图搜，第一名是它自己；绝对路径也行。"
    first = json.loads((toyshop / "corpus.jsonl").read_text().splitlines()[0])["id"]
    r = cli("search", toyshop / first, "--index", trained / "index", "-k", "2", "--json")
    assert r.code == 0 and json.loads(r.out)["hits"][0]["id"] == first


def test_index_survives_a_move(cli, trained, toyshop, tmp_path):
    "索引、模型、图片一起搬家，照样能搜。"
    home = tmp_path / "moved"
    shutil.copytree(trained, home)
    assert cli("search", "红色的杯子", "--index", home / "index").code == 0


def test_index_same_answers_as_brute_force(cli, trained, toyshop):
    from vembed_nb import Predictor, read_corpus

    p = Predictor(str(trained / "model"), image_root=str(toyshop))
    ids, items, _ = read_corpus(toyshop / "corpus.jsonl")
    scores = p.encode_text("红色的杯子") @ p.encode(items).T
    hits = json.loads(cli("search", "红色的杯子", "--index", trained / "index", "-k", "10", "--json").out)["hits"]
    assert [h["id"] for h in hits] == [ids[i] for i in scores.argsort(descending=True, stable=True)[:10]]
    assert [h["score"] for h in hits] == pytest.approx([float(s) for s in scores.sort(descending=True).values[:10]], abs=1e-5)


@pytest.mark.parametrize("kind", ["Flat", "HNSW16"])
def test_faiss_index(cli, trained, toyshop, tmp_path, kind):
    r = cli("index", "--model", trained / "model", "--data", toyshop / "corpus.jsonl", "--image-root", toyshop, "--out", tmp_path / "i", "--kind", kind)
    assert r.code == 0
    search = lambda index: [h["id"] for h in json.loads(cli("search", "红色的杯子", "--index", index, "-k", "5", "--json").out)["hits"]]
    assert search(tmp_path / "i") == search(trained / "index")


@pytest.fixture(scope="module")
def priced(toyshop, tmp_path_factory):
    "带价格和类别的图库。"
    rows = [json.loads(line) for line in (toyshop / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    path = tmp_path_factory.mktemp("priced") / "cat.jsonl"
    write_jsonl(path, [{**r, "price": 10 * i, "category": "杯子" if i % 2 else "鞋"} for i, r in enumerate(rows)])
    return path


def indexed(cli, trained, toyshop, priced, out, *options):
    r = cli("index", "--model", trained / "model", "--data", priced, "--image-root", toyshop, "--out", out, *options)
    assert r.code == 0, r.err
    return r


@pytest.mark.parametrize("options", [[], ["--kind", "HNSW16"], ["--kind", "IVF4,Flat", "--params", "nprobe=4"], ["--precision", "int8", "--rescore", "float32", "--oversample", "40"], ["--kind", "milvus"]], ids=lambda o: " ".join(o) or "flat")
def test_every_kind_of_index_filters_the_same(cli, trained, toyshop, priced, tmp_path, options):
    "各种索引，同样的条件，同样的结果；index-info 认得它们。"
    if options[-1:] == ["milvus"]:
        pytest.importorskip("milvus_lite")
        options = ["--kind", f"milvus:{tmp_path / 'm.db'}"]
    indexed(cli, trained, toyshop, priced, tmp_path / "flat")
    indexed(cli, trained, toyshop, priced, tmp_path / "i", *options)
    where = '{"price": {"<": 200}, "category": "杯子"}'
    found = [json.loads(cli("search", "红色的杯子", "--index", tmp_path / x, "-k", "5", "--where", where, "--json").out)["hits"] for x in ("flat", "i")]
    assert [h["id"] for h in found[0]] == [h["id"] for h in found[1]] and len(found[0]) == 5
    assert all(h["price"] < 200 and h["category"] == "杯子" for h in found[1])
    facts = json.loads(cli("index-info", tmp_path / "i", "--json").out)
    assert (facts["现在有"], facts["维数"]) == (40, 16)


def test_tuned_index(cli, trained, toyshop, priced, tmp_path):
    r = indexed(cli, trained, toyshop, priced, tmp_path / "i", "--kind", "IVF4,Flat", "--recall", "0.99")
    nprobe = int(re.search(r"nprobe=(\d+)", r.out)[1])
    assert json.loads(cli("index-info", tmp_path / "i", "--json").out)["params"] == {"nprobe": nprobe}


def test_compact_takes_the_log_in(cli, trained, toyshop, priced, tmp_path):
    from vembed_nb import VectorIndex

    indexed(cli, trained, toyshop, priced, tmp_path / "i")
    with VectorIndex.open(tmp_path / "i", writable=True) as index:
        first = next(iter(index))
        index.delete([first])
        sentence(cli("index-compact", tmp_path / "i"), "别的进程")
    before = json.loads(cli("index-info", tmp_path / "i", "--json", "--verify").out)
    assert (before["现在有"], before["上次存的时候"], before["没整理的改动"]) == (39, 40, 1)
    assert cli("index-compact", tmp_path / "i").code == 0
    after = json.loads(cli("index-info", tmp_path / "i", "--json", "--verify").out)
    assert (after["现在有"], after["上次存的时候"], after["没整理的改动"], after["第几代"]) == (39, 39, 0, 2)


@pytest.mark.parametrize("options, words", [
    (["--pool", "2"], ["pool", "用不上"]), (["--rescore", "float16"], ["rescore", "precision"]), (["--precision", "int8", "--kind", "HNSW16"], ["kind", "用不上"]), (["--precision", "int4"], ["int4", "int8"]),
    (["--params", "nprobe"], ["nprobe", "整数"]), (["--recall", "0.9"], ["recall", "IVF"]), (["--kind", "HNSW16", "--recall", "95"], ["recall", "0.95"]), (["--kind", "IVF1024,Flat"], ["1024", "40"]), (["--params", "nprobe=3"], ["flat", "nprobe"]), (["--kind", "HSNW32"], ["HSNW32"]), (["--metric", "cos"], ["cos", "cosine"])], ids=lambda x: " ".join(x))
def test_bad_index_options(cli, trained, toyshop, priced, tmp_path, options, words):
    sentence(cli("index", "--model", trained / "model", "--data", priced, "--image-root", toyshop, "--out", tmp_path / "i", *options), *words)
    assert not (tmp_path / "i/manifest.json").exists()


@pytest.mark.parametrize("options, words", [(["--where", "{"], ["--where", "JSON"]), (["--where", '{"prise": 1}'], ["prise", "没有"]), (["--where", '{"id": {"~": 1}}'], ["~"]), (["--unique", "catgory"], ["catgory"]), (["--candidates", "5"], ["--rerank"]), (["--rerank", "tiny-rerankr"], ["tiny-rerankr"])], ids=lambda x: " ".join(x))
def test_bad_search_options(cli, trained, options, words):
    sentence(cli("search", "红色的杯子", "--index", trained / "index", *options), *words)


def test_compare_two_models(cli, trained, toyshop, micro, tmp_path):
    "逐个查询地比；存下的报告拿来再比，数字相同，不用数据。"
    test = ("--data", toyshop / "test.jsonl", "--image-root", toyshop)
    r = cli("eval", *test, "--model", micro, "--compare", trained / "model", "--save", tmp_path / "before.json", "--plot", tmp_path / "c.png", "--by", "language", "--json", tmp_path / "m.json")
    assert r.code == 0, r.err
    assert "变好" in r.out and "| hit@1 |" in r.out and "| 汉字 |" in r.out and (tmp_path / "c.png").stat().st_size > 5000
    assert cli("eval", *test, "--model", trained / "model", "--save", tmp_path / "after.json").code == 0
    again = cli("eval", "--model", tmp_path / "before.json", "--compare", tmp_path / "after.json", "--json", tmp_path / "n.json")
    assert again.code == 0, again.err
    a, b = (json.loads((tmp_path / f"{x}.json").read_text(encoding="utf-8"))["compare"][0] for x in "mn")
    assert a["mrr"] == b["mrr"] and a["hit@1"] == b["hit@1"]
    short = cli("eval", "--compare", tmp_path / "before.json", tmp_path / "after.json")
    assert short.code == 0 and short.out == again.out


@pytest.mark.parametrize("options, words", [
    (["--by", "colour"], ["colour", "language"]), (["--ties", "best?"], ["best?", "order"]), (["--plot", "x.png"], ["--compare"]), (["--compare", "tiny-clop"], ["tiny-clop", "tiny-clip"]), (["--save", "没有/a.json"], ["没有", "文件夹"]),
    (["--compare", "没有.json"], ["没有.json"]), (["--qrels", "没有.tsv"], ["没有.tsv"]), (["--compare", "tiny-clip"], ["重复"]), (["tiny-siglip"], ["tiny-siglip", "--compare"])], ids=lambda x: " ".join(x))
def test_bad_eval_options(cli, toyshop, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    sentence(cli("eval", "--data", toyshop / "test.jsonl", "--image-root", toyshop, "--model", "tiny-clip", *options), *words)
    assert not list(tmp_path.iterdir())


def test_reports_of_other_queries_are_not_compared(cli, trained, toyshop, tmp_path):
    lines = (toyshop / "test.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "half.jsonl").write_text("\n".join(lines[:10]), encoding="utf-8")
    for name, data in (("a", toyshop / "test.jsonl"), ("b", tmp_path / "half.jsonl")):
        assert cli("eval", "--data", data, "--image-root", toyshop, "--corpus", toyshop / "corpus.jsonl", "--model", trained / "model", "--save", tmp_path / f"{name}.json").code == 0
    sentence(cli("eval", "--model", tmp_path / "a.json", "--compare", tmp_path / "b.json"), "查询不同")


def test_pareto(cli, trained, toyshop, tmp_path):
    r = cli("pareto", "--data", toyshop / "test.jsonl", "--image-root", toyshop, "--model", trained / "model", "--dims", "16,8", "--precisions", "float32,binary", "--rescores", "none,int8", "--out", tmp_path / "p")
    assert r.code == 0, r.err
    rows = json.loads((tmp_path / "p/pareto.json").read_text(encoding="utf-8"))["rows"]
    assert {(r["dim"], r["precision"]) for r in rows} == {(16, "float32"), (16, "binary"), (8, "float32"), (8, "binary")} and (tmp_path / "p/pareto.png").exists()
    for options, words in ((["--dims", "一半"], ["一半", "整数"]), (["--dims", "999"], ["999", "16"]), (["--precisions", "int3"], ["int3", "int8"]), (["--rescores", "foo"], ["foo", "self"])):
        sentence(cli("pareto", "--data", toyshop / "test.jsonl", "--image-root", toyshop, "--model", trained / "model", *options), *words)


def test_serve_says_what_is_missing(cli, tmp_path):
    sentence(cli("serve"), "--index")
    sentence(cli("serve", "--index", tmp_path / "no"), "不是索引")
    sentence(cli("serve", "--index", tmp_path / "no", "max_bach=3"), "max_bach", "max_batch")
    sentence(cli("serve", "--index", tmp_path / "no", "快"), "键=值")
    sentence(cli("serve", "--index", tmp_path / "no", "--port", "99999"), "65535")


def test_a_taken_port(cli, trained, tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen()
        port = s.getsockname()[1]
        sentence(cli("serve", "--index", trained / "index", "--port", port), port, "换一个端口")
        sentence(cli("app", "--index", trained / "index", "--labels", tmp_path / "l.jsonl", "--port", port), port, "换一个端口")


def test_a_csv_catalogue_filters_by_number(cli, trained, toyshop, tmp_path):
    "CSV 里的价格是文字；读成图库时变成数，按大小筛得到。类型对不上的条件一句话拒绝。"
    rows = [json.loads(line)["image"] for line in (toyshop / "corpus.jsonl").read_text(encoding="utf-8").splitlines()]
    (tmp_path / "货.csv").write_text("id,image,price,code\n" + "".join(f"{n},{r},{n}.5,{n:03d}\n" for n, r in enumerate(rows)), encoding="utf-8")
    indexed(cli, trained, toyshop, tmp_path / "货.csv", tmp_path / "i")
    hits = json.loads(cli("search", "红", "--index", tmp_path / "i", "--where", '{"price": {"<": 3}}', "--json").out)["hits"]
    assert sorted(h["price"] for h in hits) == [.5, 1.5, 2.5] and all(len(h["code"]) == 3 for h in hits)
    sentence(cli("search", "红", "--index", tmp_path / "i", "--where", '{"price": "1.5"}'), "price", "数", "文字")
    empty = cli("search", "红", "--index", tmp_path / "i", "--where", '{"price": {"<": 0}}')
    assert (empty.code, empty.out) == (0, "") and "没有一样" in empty.err


def test_milvus_can_be_replaced_and_compacted(cli, trained, toyshop, priced, tmp_path):
    pytest.importorskip("milvus_lite")
    for n in (1, 2): indexed(cli, trained, toyshop, priced, tmp_path / "i", "--kind", f"milvus:{tmp_path / 'm.db'}", *(["--overwrite"] if n == 2 else []))
    assert cli("index-compact", tmp_path / "i").code == 0
    facts = json.loads(cli("index-info", tmp_path / "i", "--json").out)
    assert facts["现在有"] == 40 and "字节" not in facts


def test_app_says_what_is_missing(cli, tmp_path):
    sentence(cli("app", "--model", "tiny-clip"), "--index")
    sentence(cli("app", "--index", tmp_path / "no"), "不是索引")
    sentence(cli("app", *[x for n in "abc" for x in ("--index", tmp_path / n)]), "3")


def test_encode_texts_and_pictures(cli, trained, toyshop, tmp_path, monkeypatch):
    "文字和图片混在一起；图片写相对路径或绝对路径都行。"
    picture = next((toyshop / "images").rglob("*.jpg"))
    r = cli("encode", "红色的杯子", picture, "--model", trained / "model", "--out", tmp_path / "a.npz")
    assert r.code == 0, r.err
    monkeypatch.chdir(picture.parent)
    assert cli("encode", "红色的杯子", picture.name, "--model", trained / "model", "--out", tmp_path / "b.npz", "--dim", "8").code == 0
    a, b = np.load(tmp_path / "a.npz")["vectors"], np.load(tmp_path / "b.npz")["vectors"]
    assert a.shape == (2, 16) and b.shape == (2, 8)
    cut = a[:, :8] / np.linalg.norm(a[:, :8], axis=1, keepdims=True)
    assert np.allclose(cut, b, atol=1e-5)


def test_train_from_yaml_and_overrides(cli, toyshop, micro, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"data_path: {toyshop}/train.jsonl\nmodel_name_or_path: {micro}\nepochs: 5\nbatch_size: 16\nlearning_rate: 1e-3\n", encoding="utf-8")
    assert cli("train", path, "epochs=1", "--out", tmp_path / "o").code == 0
    saved = (tmp_path / "o/checkpoint-epoch-1/train_config.yaml").read_text(encoding="utf-8")
    assert "epochs: 1" in saved and "batch_size: 16" in saved and "learning_rate: 0.001" in saved


def test_train_from_csv_with_columns(cli, toyshop, micro, tmp_path):
    "Excel 存的 CSV（带 BOM）和自己的列名。"
    r = cli("train", "--data", toyshop / "catalog.csv", "--columns", "query=title,positive=image", "--model", micro, "--out", tmp_path / "o", "epochs=1", "batch_size=16")
    assert r.code == 0, r.err


def test_five_modes_train_and_evaluate(cli, toyshop, micro, tmp_path):
    "文搜图之外的四种任务也是同样的命令。"
    for mode in ("i2i", "i2t", "composed", "t2t"):
        rows = (toyshop / f"train_{mode}.jsonl").read_text(encoding="utf-8").splitlines()
        if len(rows) < 4: continue
        r = cli("train", "--data", toyshop / f"train_{mode}.jsonl", "--model", micro, "--out", tmp_path / mode, "epochs=1", "max_steps=1", "batch_size=2")
        assert r.code == 0, (mode, r.err)
        r = cli("eval", "--data", toyshop / f"train_{mode}.jsonl", "--model", tmp_path / mode, "--corpus", "none", "--json", tmp_path / f"{mode}.json")
        assert r.code == 0, (mode, r.err)
        assert METRICS <= set(json.loads((tmp_path / f"{mode}.json").read_text()))


def test_from_a_table_to_a_search(cli, toyshop, micro, tmp_path):
    "自己的图片文件夹和一张表：准备、训练、评测。"
    r = cli("data", "table", toyshop / "catalog.csv", "--text", "title", "--out", tmp_path / "set")
    assert r.code == 0 and "vembed train" in r.out
    assert cli("data", "check", tmp_path / "set/train.jsonl", "--image-root", toyshop).code == 0
    assert cli("train", "--data", tmp_path / "set/train.jsonl", "--image-root", toyshop, "--model", micro, "--out", tmp_path / "m", "epochs=1", "batch_size=8").code == 0
    assert cli("eval", "--data", tmp_path / "set/test.jsonl", "--image-root", toyshop, "--model", tmp_path / "m", "--json", tmp_path / "r.json").code == 0


def test_check_as_json(cli, toyshop):
    report = json.loads(cli("data", "check", toyshop / "train.jsonl", "--json").out)
    assert report["broken"] == {} and report["images"] == 60 and set(report["modes"]) == {"t2i"}


def test_toyshop_command(cli, tmp_path):
    "画一个玩具店；不覆盖已有的；--overwrite 重画得到同样的字节。"
    args = ("data", "toyshop", "--out", tmp_path / "t", "--train", "6", "--val", "3", "--test", "4", "--queries", "3", "--size", "32", "--workers", "1")
    assert cli(*args).code == 0
    before = tree(tmp_path / "t")
    sentence(cli(*args), tmp_path / "t", "--overwrite")
    assert tree(tmp_path / "t") == before
    assert cli(*args, "--overwrite").code == 0 and tree(tmp_path / "t") == before


def test_doctor(cli):
    r = cli("doctor", "--json")
    report = json.loads(r.out)
    assert r.code == (1 if report["problems"] else 0)
    assert "torch" in cli("doctor").out


HELP = ["quickstart", "train", "eval", "encode", "index", "search", "index-info", "index-compact", "pareto", "serve", "app", "export", "doctor", "pretrain", "data", "data toyshop", "data check", "data list", "data prepare", "data cache", "data table", "data emoji"]


@pytest.mark.parametrize("command", HELP)
def test_help_is_chinese_and_complete(cli, command):
    "每条命令的 --help 是中文，每个选项都有说明。"
    r = cli(*command.split(), "--help")
    assert r.code == 0 and re.search(r"[\u4e00-\u9fff]", r.out) and r.err == ""
    import typer

    from vembed_nb.cli import app
    cmd = typer.main.get_command(app)
    for name in command.split(): cmd = cmd.commands[name]
    silent = [p.name for p in cmd.params if p.name != "help" and not getattr(p, "help", None) and not getattr(p, "metavar", None)]
    assert not silent, silent


def test_train_help_lists_every_key(cli):
    from vembed_nb.config import KEYS

    text = cli("train", "--help").out
    assert not [k for k in KEYS if k not in text]


def test_help_commands_are_all_tested():
    import typer

    from vembed_nb.cli import app

    top = typer.main.get_command(app).commands
    names = set(top) | {f"data {n}" for n in top["data"].commands}
    assert names == set(HELP)


# ---------------------------------------------------------------- 坏的输入：一张表

GOOD = '{"query": "红色的杯子", "positive": "images/00.png"}\n'


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


BAD_DATA = {  # 名字 → (文件名, 内容, 消息里要有的词)
    "missing": ("gone.jsonl", None, ["gone.jsonl"]),
    "folder": ("folder.jsonl", ..., ["folder.jsonl", "文件夹"]),
    "not json": ("a.jsonl", GOOD + "{坏\n", ["a.jsonl 第 2 行"]),
    "truncated json": ("a.jsonl", GOOD + GOOD[:20], ["a.jsonl 第 2 行"]),
    "a list": ("a.jsonl", GOOD + "[1, 2]\n", ["a.jsonl 第 2 行"]),
    "a number": ("a.jsonl", "3\n", ["a.jsonl 第 1 行"]),
    "huge number": ("a.jsonl", GOOD + '{"query": ' + "9" * 5000 + "}\n", ["a.jsonl 第 2 行"]),
    "deeply nested": ("a.jsonl", GOOD + "[" * 100_000 + "\n", ["a.jsonl 第 2 行"]),
    "lone surrogate": ("a.jsonl", GOOD + '{"query": "\\ud800", "positive": "images/00.png"}\n', ["a.jsonl 第 2 行"]),
    "no query": ("a.jsonl", GOOD + '{"positive": "images/00.png"}\n', ["a.jsonl 第 2 行", "query"]),
    "empty query": ("a.jsonl", GOOD + '{"query": "  ", "positive": "images/00.png"}\n', ["a.jsonl 第 2 行", "query"]),
    "query is a number": ("a.jsonl", GOOD + '{"query": 5, "positive": "images/00.png"}\n', ["a.jsonl 第 2 行", "query"]),
    "query list with a number": ("a.jsonl", GOOD + '{"query": ["a", 5], "positive": "images/00.png"}\n', ["a.jsonl 第 2 行", "query"]),
    "query image is a number": ("a.jsonl", GOOD + '{"query_image": 7, "positive": "images/00.png"}\n', ["a.jsonl 第 2 行", "query_image"]),
    "no positive": ("a.jsonl", GOOD + '{"query": "杯子"}\n', ["a.jsonl 第 2 行", "positive"]),
    "empty positives": ("a.jsonl", GOOD + '{"query": "杯子", "positives": []}\n', ["a.jsonl 第 2 行", "positive"]),
    "null positive": ("a.jsonl", GOOD + '{"query": "杯子", "positive": null}\n', ["a.jsonl 第 2 行", "positive"]),
    "empty positive object": ("a.jsonl", GOOD + '{"query": "杯子", "positive": {}}\n', ["a.jsonl 第 2 行", "positive"]),
    "misspelt field": ("a.jsonl", GOOD + '{"query": "杯子", "positve": "images/00.png"}\n', ["a.jsonl 第 2 行", "positve", "positive"]),
    "ids do not match": ("a.jsonl", GOOD + '{"query": "杯子", "positives": ["images/00.png"], "positive_ids": ["a", "b"]}\n', ["a.jsonl 第 2 行", "positive_ids"]),
    "empty": ("a.jsonl", "", ["a.jsonl", "没有一条记录"]),
    "only blank lines": ("a.jsonl", "\n\n  \n", ["a.jsonl", "没有一条记录"]),
    "not utf-8": ("a.jsonl", GOOD.replace("红色的杯子", "caf\xe9 rouge").encode("latin-1"), ["a.jsonl", "UTF-8"]),
    "binary": ("a.jsonl", bytes(range(256)) * 4, ["a.jsonl"]),
    "unknown suffix": ("a.xlsx", GOOD, ["a.xlsx", ".csv"]),
    "csv without the columns": ("a.csv", "标题,图\n杯子,images/00.png\n", ["a.csv 第 2 行"]),
    "csv with too many cells": ("a.csv", "query,positive\n杯子,images/00.png\n红,杯子,images/01.png\n", ["a.csv 第 3 行"]),
    "csv with an empty cell": ("a.csv", "query,positive\n杯子,images/00.png\n,images/01.png\n", ["a.csv 第 3 行", "query"]),
    "csv with only a header": ("a.csv", "query,positive\n", ["a.csv", "没有一条记录"]),
    "csv with a giant cell": ("a.csv", "query,positive\n" + "x" * 200_000 + ",images/00.png\n", ["a.csv"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(cli, tmp_path, micro, shop, case):
    "坏数据：train、eval、data check 都用同样的一句话拒绝；还没有留下任何输出。"
    name, content, words = BAD_DATA[case]
    path = tmp_path / name
    if content is ...: path.mkdir()
    elif content is not None: write(path, content)
    common = ("--data", path, "--image-root", shop)
    sentence(cli("train", *common, "--model", micro, "--out", tmp_path / "o", "batch_size=2", "epochs=1"), *words)
    assert not (tmp_path / "o").exists() or not tree(tmp_path / "o")
    sentence(cli("eval", *common, "--model", micro, "--json", tmp_path / "m.json"), *words)
    assert not (tmp_path / "m.json").exists()
    sentence(cli("data", "check", path, "--image-root", shop), *words)


BAD_CORPUS = {
    "missing": ("gone.jsonl", None, ["gone.jsonl"]),
    "not json": ("c.jsonl", '{"id": "a", "text": "杯子"}\n{\n', ["c.jsonl 第 2 行"]),
    "nothing in the row": ("c.jsonl", '{"id": "a"}\n', ["c.jsonl 第 1 行", "image"]),
    "same id twice": ("c.jsonl", '{"id": "a", "text": "杯子"}\n{"id": "a", "text": "帽子"}\n', ["c.jsonl 第 2 行", "'a'"]),
    "image is a number": ("c.jsonl", '{"id": "a", "image": 5}\n', ["c.jsonl 第 1 行", "image"]),
    "text is a list": ("c.jsonl", '{"id": "a", "text": ["x"]}\n', ["c.jsonl 第 1 行", "text"]),
    "empty": ("c.jsonl", "", ["c.jsonl"]),
}


@pytest.mark.parametrize("case", BAD_CORPUS)
def test_bad_corpus(cli, tmp_path, micro, shop, case):
    "坏图库：index、encode、eval --corpus 都是一句话，旧的索引不动。"
    name, content, words = BAD_CORPUS[case]
    if content is not None: write(tmp_path / name, content)
    assert cli("index", "--data", shop / "corpus.jsonl", "--model", micro, "--out", tmp_path / "i").code == 0
    before = tree(tmp_path / "i")
    sentence(cli("index", "--data", tmp_path / name, "--image-root", shop, "--model", micro, "--out", tmp_path / "i", "--overwrite"), *words)
    assert tree(tmp_path / "i") == before
    sentence(cli("eval", "--data", shop / "val.jsonl", "--corpus", tmp_path / name, "--model", micro), *words)
    sentence(cli("encode", tmp_path / name, "--image-root", shop, "--model", micro, "--out", tmp_path / "v.npz"), *words)
    assert not (tmp_path / "v.npz").exists()


BAD_CONFIG = {  # 名字 → (命令行的参数或 YAML 的内容, 消息里要有的词)
    "unknown key": (["learning_rat=1e-3"], ["learning_rat", "learning_rate"]),
    "unknown key in yaml": ("lerning_rate: 1e-3\n", ["c.yaml", "lerning_rate", "learning_rate"]),
    "unknown key nothing near": (["zzzzz=1"], ["zzzzz", "--help"]),
    "planned key": (["teacher_model_name=x"], ["teacher_model_name", "蒸馏"]),
    "planned key in yaml": ("report_to: wandb\n", ["c.yaml", "report_to"]),
    "int is a word": (["epochs=three"], ["epochs", "int"]),
    "int is a float": (["batch_size=16.5"], ["batch_size", "int"]),
    "float is a word": (["learning_rate=fast"], ["learning_rate", "float"]),
    "bool is a word": (["learn_temperature=maybe"], ["learn_temperature", "bool"]),
    "wrong type in yaml": ("batch_size: 16.5\n", ["c.yaml", "batch_size", "int"]),
    "string for int in yaml": ("epochs: '3'\n", ["c.yaml", "epochs", "int"]),
    "bool for int in yaml": ("epochs: true\n", ["c.yaml", "epochs", "int"]),
    "list in yaml": ("seed: [1]\n", ["c.yaml", "seed"]),
    "null in yaml": ("seed:\n", ["c.yaml", "seed"]),
    "choice": (["scheduler_type=cosin"], ["scheduler_type", "cosine"]),
    "too small": (["batch_size=1"], ["batch_size", "2"]),
    "negative": (["epochs=-1"], ["epochs", "1"]),
    "nan": (["learning_rate=nan"], ["learning_rate"]),
    "inf": (["learning_rate=inf"], ["learning_rate"]),
    "temperature": (["temperature=5"], ["temperature", "0.01"]),
    "warm-up": (["warmup_ratio=2"], ["warmup_ratio"]),
    "no value": (["epochs"], ["epochs"]),
    "no equals": (["epochs=1", "batch_size"], ["batch_size", "键=值"]),
    "broken yaml": ("a: [1\nb: {\n", ["c.yaml", "YAML"]),
    "yaml is a list": ("- epochs\n", ["c.yaml"]),
    "yaml is binary": (b"\xff\xfe\x00\x01", ["c.yaml"]),
    "fp16 on a cpu": (["mixed_precision=fp16"], ["mixed_precision", "fp16"]),
}


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_config(cli, tmp_path, micro, shop, case):
    import torch

    if case == "fp16 on a cpu" and torch.cuda.is_available(): pytest.skip("这台机器有 GPU")
    what, words = BAD_CONFIG[case]
    args = what if isinstance(what, list) else [write(tmp_path / "c.yaml", what)]
    small = [] if "batch_size" in str(what) else ["batch_size=8"]
    r = cli("train", *args, *small, "--data", shop / "train.jsonl", "--model", micro, "--out", tmp_path / "o")
    sentence(r, *words)
    assert not (tmp_path / "o").exists() or not tree(tmp_path / "o")


def test_missing_config_file(cli, tmp_path):
    sentence(cli("train", tmp_path / "no.yaml"), "no.yaml")


def test_no_data_given(cli, tmp_path):
    sentence(cli("train", "--out", tmp_path / "o"), "--data")


USAGE = {
    "no such command": (["trian"], ["trian"]),
    "no such option": (["train", "--dta", "x"], ["--dta"]),
    "missing option": (["search", "杯子"], ["--index"]),
    "option without value": (["eval", "--data"], ["--data"]),
    "not a number": (["search", "杯子", "--index", "x", "-k", "many"], ["-k"]),
    "missing argument": (["data", "check"], []),
}


@pytest.mark.parametrize("case", USAGE)
def test_bad_usage(cli, case):
    args, words = USAGE[case]
    sentence(cli(*args), *words)


# ---------------------------------------------------------------- 坏图

def bomb():
    "一个几百字节的 PNG，声称自己有 40000×40000 像素。"
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def picture_cases(shop):
    good = (shop / "images/00.png").read_bytes()
    return {"missing": None, "truncated": good[: len(good) // 2], "zero-byte": b"", "not an image": b"hello, I am text", "bomb": bomb(), "a folder": ..., "outside": "../secret.png",
            "absolute": "/etc/hostname.png", "symlink outside": "symlink", "long name": "x" * 300 + ".png", "null character": "a\0b.png"}


@pytest.fixture
def broken_shop(shop, tmp_path):
    "在好数据后面加一条坏图的记录；返回 (文件夹, 坏图的路径)。"
    def make(case):
        root = tmp_path / "broken" / "data"
        shutil.copytree(shop, root)
        content = picture_cases(shop)[case]
        name = "images/bad.png"
        shutil.copy(root / "images/00.png", root.parent / "secret.png")
        if isinstance(content, bytes): (root / name).write_bytes(content)
        elif content is ...: (root / name).mkdir()
        elif content == "symlink": (root / name).symlink_to(root.parent / "secret.png")
        elif content is not None: name = content
        for split in ("train", "val"):
            with open(root / f"{split}.jsonl", "a", encoding="utf-8") as f: f.write(json.dumps({"query": "坏的那一件", "positive": name}, ensure_ascii=False) + "\n")
        with open(root / "corpus.jsonl", "a", encoding="utf-8") as f: f.write(json.dumps({"id": "bad", "image": name}) + "\n")
        return root, name

    return make


CASES = ["missing", "truncated", "zero-byte", "not an image", "bomb", "a folder", "outside", "absolute", "symlink outside", "long name", "null character"]


@pytest.mark.parametrize("case", CASES)
def test_bad_pictures(cli, broken_shop, micro, tmp_path, case):
    "坏图：默认跳过并数出来；--strict 时是一句话，写明是哪张图；旧的结果不动。"
    root, name = broken_shop(case)
    shown = repr(name)[1:20] if "\0" in name else name[:20]

    out = ("--data", root / "train.jsonl", "--model", micro, "epochs=1", "batch_size=8", "--out")
    r = cli("train", *out, tmp_path / "o")
    assert r.code == 0 and re.search(r"丢掉.*1 张", r.out + r.err), (r.out, r.err)
    assert list(json.loads((tmp_path / "o/history.json").read_text(encoding="utf-8"))["dropped_images"]) == [name]
    sentence(cli("train", *out, tmp_path / "o2", "--strict"), shown)

    evaluate = ("eval", "--data", root / "val.jsonl", "--model", micro, "--json")
    r = cli(*evaluate, tmp_path / "m.json", "--corpus", "none")
    report = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert r.code == 0 and re.search(r"1 张", r.out + r.err), (r.out, r.err)
    assert report["n_queries"] == 6 and report["n_corpus"] == 6
    r = cli(*evaluate, tmp_path / "m2.json")  # 图库是数据旁边的 corpus.jsonl
    assert r.code == 0 and json.loads((tmp_path / "m2.json").read_text())["n_corpus"] == 30
    sentence(cli(*evaluate, tmp_path / "m.json", "--corpus", "none", "--strict"), shown)
    assert json.loads((tmp_path / "m.json").read_text(encoding="utf-8")) == report

    index = ("index", "--data", root / "corpus.jsonl", "--model", micro, "--out", tmp_path / "i")
    r = cli(*index)
    assert r.code == 0 and re.search(r"1 张", r.out + r.err), (r.out, r.err)
    before = tree(tmp_path / "i")
    sentence(cli(*index, "--overwrite", "--strict"), shown)
    assert tree(tmp_path / "i") == before and json.loads(before["manifest.json"])["count"] == 30

    r = cli("data", "check", root / "train.jsonl", "--json")
    assert r.code == 0 and list(json.loads(r.out)["broken"]) == [name]
    if "\0" not in name: sentence(cli("encode", root / name, "--image-root", root, "--model", micro, "--out", tmp_path / "v.npz"))


def test_all_pictures_bad(cli, shop, micro, tmp_path):
    "图全坏（多半是 --image-root 写错了）：是错误，不是空的结果。"
    for args in (("train", "--data", shop / "train.jsonl", "--out", tmp_path / "o"), ("eval", "--data", shop / "val.jsonl", "--json", tmp_path / "m.json"), ("index", "--data", shop / "corpus.jsonl", "--out", tmp_path / "i")):
        sentence(cli(*args, "--image-root", tmp_path, "--model", micro), "images/")
    assert not (tmp_path / "m.json").exists() and not (tmp_path / "i/manifest.json").exists()


# ---------------------------------------------------------------- 输出文件夹、模型、索引

def test_existing_output_is_kept(cli, shop, micro, tmp_path):
    "非空的输出文件夹：train、index 都拒绝，内容不动；--overwrite 才重来。"
    train = ("train", "--data", shop / "train.jsonl", "--model", micro, "--out", tmp_path / "o", "epochs=1", "batch_size=8")
    index = ("index", "--data", shop / "corpus.jsonl", "--model", micro, "--out", tmp_path / "i")
    for args, out in ((train, tmp_path / "o"), (index, tmp_path / "i")):
        assert cli(*args).code == 0
        before = tree(out)
        sentence(cli(*args), out, "--overwrite")
        assert tree(out) == before
        assert cli(*args, "--overwrite").code == 0


def test_overwrite_only_deletes_our_own(cli, shop, micro, tmp_path):
    "--overwrite 指向一个不是本工具写的文件夹：拒绝，里面的东西不动。"
    home = tmp_path / "照片"
    write(home / "重要.txt", "别删我")
    for args in (("train", "--data", shop / "train.jsonl", "batch_size=8", "epochs=1"), ("index", "--data", shop / "corpus.jsonl"), ("quickstart",)):
        out = ("--out", home, "--overwrite", "--model", micro)
        sentence(cli(*args, *out), home)
        assert tree(home) == {"重要.txt": "别删我".encode()}, args
    sentence(cli("data", "toyshop", "--out", home, "--overwrite", "--train", "3", "--val", "3", "--test", "3", "--workers", "1"), home)
    sentence(cli("data", "table", shop / "train.jsonl", "--text", "query", "--image", "positive", "--out", home, "--overwrite"), home)
    assert tree(home) == {"重要.txt": "别删我".encode()}


@pytest.mark.parametrize("why, extra", [("model", ["--model", "tiny-clap"]), ("batch", ["batch_size=500"]), ("strict", ["--strict"]), ("val", ["--val", "gone.jsonl"]), ("root", ["--image-root", "nowhere"])])
def test_overwrite_keeps_the_old_until_the_new_can_start(cli, broken_shop, micro, tmp_path, why, extra):
    "--overwrite 而新的训练起不来：旧的输出原样还在。"
    root, _ = broken_shop("missing")
    args = ("train", "--data", root / "train.jsonl", "--out", tmp_path / "o", "--model", micro, "epochs=1")
    assert cli(*args, "batch_size=8").code == 0
    before = tree(tmp_path / "o")
    r = cli(*args, *([] if why == "batch" else ["batch_size=8"]), "--overwrite", *extra)
    sentence(r)
    assert tree(tmp_path / "o") == before


@pytest.mark.parametrize("inside", ["data", "model"])
def test_overwrite_does_not_eat_its_own_input(cli, shop, micro, tmp_path, inside):
    "数据或起点模型就在要清空的输出文件夹里：拒绝，什么也不丢。"
    out = tmp_path / "o"
    assert cli("train", "--data", shop / "train.jsonl", "--model", micro, "--out", out, "epochs=1", "batch_size=8").code == 0
    shutil.copytree(shop, out / "data")
    before = tree(out)
    data, model = (out / "data", micro) if inside == "data" else (shop, out)
    sentence(cli("train", "--data", data / "train.jsonl", "--model", model, "--out", out, "epochs=1", "batch_size=8", "--overwrite"), out)
    assert tree(out) == before


def test_output_is_a_file(cli, shop, micro, tmp_path):
    path = write(tmp_path / "file", "x")
    for args in (("train", "--data", shop / "train.jsonl", "batch_size=8"), ("index", "--data", shop / "corpus.jsonl")):
        for extra in ([], ["--overwrite"]):
            sentence(cli(*args, "--out", path, "--model", micro, *extra), path)
            assert path.read_text() == "x"
    sentence(cli("eval", "--data", shop / "val.jsonl", "--model", micro, "--json", path / "m.json"), path)
    sentence(cli("encode", "杯子", "--model", micro, "--out", path / "v.npz"), path)


def test_too_few_records_names_a_batch_that_works(cli, shop, micro, tmp_path):
    "记录比一批少：说出能用的最大的 batch_size，而且它真的能用。"
    rows = [{"query": f"第 {i % 5} 种", "query_id": f"q{i % 5}", "positive": f"images/{i:02d}.png"} for i in range(12)]
    data = write_jsonl(tmp_path / "dup.jsonl", rows)
    args = ("train", "--data", data, "--image-root", shop, "--model", micro, "epochs=1")
    r = cli(*args, "--out", tmp_path / "a", "batch_size=64")
    sentence(r, "12", "64", "batch_size")
    best = int(re.search(r"最大 batch_size 是 (\d+)", r.err)[1])
    assert best == 5 and cli(*args, "--out", tmp_path / "b", f"batch_size={best}").code == 0
    one = write_jsonl(tmp_path / "one.jsonl", rows[:1])
    sentence(cli("train", "--data", one, "--image-root", shop, "--model", micro, "--out", tmp_path / "c"), "1")


MODELS = {
    "misspelt": ("tiny-clp", ["tiny-clp", "tiny-clip"]),
    "no folder": ("./no/such/folder", ["./no/such/folder"]),
    "empty folder": (..., ["config.json"]),
    "a file": ("FILE", ["文件"]),
    "hub name offline": ("openai/clip-vit-base-patch32", ["openai/clip-vit-base-patch32"]),
    "unknown family": ({"model_type": "bart"}, ["bart", "还不支持"]),
    "config is not json": (b"{", ["config.json"]),
    "no weights": ("NO WEIGHTS", ["权重"]),
    "cut weights": ("CUT", ["权重"]),
    "no tokenizer": ("NO TOKENIZER", ["tokenizer"]),
}


@pytest.mark.parametrize("case", MODELS)
def test_bad_model(cli, shop, micro, tmp_path, case):
    what, words = MODELS[case]
    folder = tmp_path / "m"
    if what is ...: folder.mkdir()
    elif what == "FILE": write(folder, "x")
    elif isinstance(what, dict): write(folder / "config.json", json.dumps(what))
    elif isinstance(what, bytes): write(folder / "config.json", what)
    elif what in ("NO WEIGHTS", "CUT", "NO TOKENIZER"):
        shutil.copytree(micro, folder)
        if what == "NO WEIGHTS": (folder / "model.safetensors").unlink()
        elif what == "CUT": (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
        else:
            for p in folder.glob("tokenizer*"): p.unlink()
    name = what if isinstance(what, str) and not what.isupper() and what != "NO WEIGHTS" and what != "NO TOKENIZER" else folder
    sentence(cli("train", "--data", shop / "train.jsonl", "--model", name, "--out", tmp_path / "o", "batch_size=8", "epochs=1"), *words)
    sentence(cli("eval", "--data", shop / "val.jsonl", "--model", name), *words)
    sentence(cli("index", "--data", shop / "corpus.jsonl", "--model", name, "--out", tmp_path / "i"), *words)
    assert not (tmp_path / "i").exists()
    sentence(cli("encode", "杯子", "--model", name, "--out", tmp_path / "v.npz"), *words)


@pytest.mark.parametrize("harm", ["no folder", "not an index", "cut vectors", "cut ids", "manifest", "model gone", "model retrained"])
def test_bad_index(cli, trained, toyshop, tmp_path, harm):
    "坏索引、模型不见了、模型重新训过：一句话。"
    shutil.copytree(trained, tmp_path / "t")
    index = tmp_path / "t/index"
    if harm == "no folder": shutil.rmtree(index)
    elif harm == "not an index": (index / "manifest.json").unlink()
    elif harm == "cut vectors": (index / "vectors.safetensors").write_bytes((index / "vectors.safetensors").read_bytes()[:100])
    elif harm == "cut ids": (index / "items.jsonl").write_text("".join(open(index / "items.jsonl").readlines()[:5]))
    elif harm == "manifest": (index / "manifest.json").write_text("{}")
    elif harm == "model gone": shutil.rmtree(tmp_path / "t/model")
    else:
        from safetensors.torch import load_file, save_file

        for path in (tmp_path / "t/model").glob("checkpoint-*/model.safetensors"):
            w = load_file(path)
            w["logit_scale"] += 1; w["visual_projection.weight"] *= -1
            save_file(w, path, metadata={"format": "pt"})
    sentence(cli("search", "红色的杯子", "--index", index), {"model gone": "model", "model retrained": "重建索引"}.get(harm, index))


SEARCHES = {"empty": (["  "], ["查询"]), "k zero": (["杯子", "-k", "0"], ["k"]), "missing picture": (["nowhere.jpg"], ["nowhere.jpg"])}


@pytest.mark.parametrize("case", SEARCHES)
def test_bad_search(cli, trained, case):
    args, words = SEARCHES[case]
    sentence(cli("search", *args, "--index", trained / "index"), *words)


def test_bad_dim(cli, micro, tmp_path):
    for dim in ("99", "-3"): sentence(cli("encode", "杯子", "--model", micro, "--dim", dim, "--out", tmp_path / "v.npz"), dim)


def test_positive_not_in_the_corpus(cli, shop, micro, tmp_path):
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"id": "x", "image": "images/00.png"}])
    sentence(cli("eval", "--data", shop / "val.jsonl", "--corpus", corpus, "--model", micro, "--json", tmp_path / "m.json"), "val.jsonl 第 1 行", "images/24.png")
    assert not (tmp_path / "m.json").exists()


def test_eval_keeps_the_old_json_when_it_fails(cli, shop, micro, tmp_path):
    path = write(tmp_path / "m.json", "旧")
    sentence(cli("eval", "--data", "gone.jsonl", "--model", micro, "--json", path), "gone.jsonl")
    assert path.read_text() == "旧"


@pytest.mark.parametrize("command", [("index", "--data", "corpus.jsonl", "--out", "i"), ("encode", "corpus.jsonl", "--out", "v.npz"), ("eval", "--data", "val.jsonl", "--json", "m.json")], ids=lambda c: c[0])
def test_disk_full(cli, shop, micro, tmp_path, command):
    "写结果时磁盘满：一句话，旧的结果不动，没有残留。"
    from test_trainer import full_disk

    args = [command[0], *((shop / a if a.endswith(".jsonl") else tmp_path / a if a in ("i", "v.npz", "m.json") else a) for a in command[1:]), "--model", micro, "--image-root", shop]
    assert cli(*args).code == 0
    before = tree(tmp_path)
    extra = ["--overwrite"] if command[0] == "index" else []
    with full_disk(100): r = cli(*args, *extra)
    sentence(r)
    assert tree(tmp_path) == before


def test_mode_variable(cli, monkeypatch, micro, tmp_path):
    "环境变量写错了，一开始就说，而不是做完两分钟再说。"
    monkeypatch.setenv("VEMBED_MODE", "huge")
    sentence(cli("quickstart", "--out", tmp_path / "q", "--model", micro), "VEMBED_MODE")
    assert not (tmp_path / "q").exists() or not tree(tmp_path / "q")


# ---------------------------------------------------------------- quickstart

SMALL = dict(n_train=48, n_test=24, n_queries=12, epochs=1, batch_size=16)


@pytest.fixture(scope="module")
def quick(tmp_path_factory, micro):
    "一次很小的 quickstart；返回 (文件夹, 报告, 说过的话)。"
    from vembed_nb.quickstart import quickstart

    out, said = tmp_path_factory.mktemp("quick") / "q", []
    return out, quickstart(out, model=micro, say=said.append, **SMALL), said


def test_quickstart_leaves_everything(quick):
    out, report, said = quick
    assert {"mode", "seed", "versions", "device", "seconds", "n_queries", "n_corpus", "before", "after"} <= set(report)
    assert set(report["before"]) == set(report["after"]) == METRICS and (report["n_queries"], report["n_corpus"]) == (12, 24)
    assert json.loads((out / "report.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report))
    from PIL import Image

    with Image.open(out / "gallery.png") as im: assert min(im.size) > 200
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "gallery.png" in text and f"{report['after']['hit@1']:.3f}" in text
    assert (out / "data/train.jsonl").exists() and (out / "index/manifest.json").exists() and list(out.glob("checkpoint-*/model.safetensors"))
    assert [line[:3] for line in said] == [f"{i}/6" for i in range(1, 7)]


def test_quickstart_result_can_be_used(quick, cli):
    "报告里写的两条后续命令能用。"
    out, report, _ = quick
    assert cli("search", "红色的杯子", "--index", out / "index", "-k", "5").code == 0
    r = cli("eval", "--model", out, "--data", out / "data/test.jsonl", "--image-root", out / "data", "--json", out.parent / "m.json")
    assert r.code == 0 and json.loads((out.parent / "m.json").read_text())["hit@1"] == pytest.approx(report["after"]["hit@1"])


def test_quickstart_again_says_it_exists(quick, cli):
    "再跑一次：说结果在、怎么重做，并显示它；什么也不改。"
    out, report, _ = quick
    before = tree(out)
    r = cli("quickstart", "--out", out)
    assert r.code == 0 and "已经有结果" in r.out and "--overwrite" in r.out and f"{report['after']['hit@1']:.3f}" in r.out
    assert tree(out) == before


def test_quickstart_overwrite_really_starts_again(quick, micro, tmp_path):
    "--overwrite 重做：检查点是新的；换种子也行；换大小也行。"
    from vembed_nb.quickstart import quickstart

    out = tmp_path / "q"
    shutil.copytree(quick[0], out)
    before = tree(out)
    report = quickstart(out, seed=7, model=micro, overwrite=True, say=lambda s: None, **{**SMALL, "n_test": 20, "epochs": 2})
    after = tree(out)
    assert report["seed"] == 7 and report["n_corpus"] == 20 and report["training"]["epochs"] == 2
    assert before["checkpoint-epoch-1/model.safetensors"] != after["checkpoint-epoch-1/model.safetensors"]
    again = quickstart(out, seed=7, model=micro, overwrite=True, say=lambda s: None, **{**SMALL, "n_test": 20, "epochs": 1})
    assert again["training"]["epochs"] == 1 and again["stages"]["train"] > 0 and not (out / "checkpoint-epoch-2").exists()


def test_quickstart_continues_after_a_stop(quick, micro, tmp_path):
    "上次停在中途（有数据和一个检查点，没有报告）：接着做，结果与一口气做完相同。"
    from vembed_nb.quickstart import quickstart

    out = tmp_path / "q"
    shutil.copytree(quick[0], out)
    (out / "report.json").unlink()
    shutil.rmtree(out / "index")
    report = quickstart(out, model=micro, say=lambda s: None, **SMALL)
    assert report["after"] == quick[1]["after"] and (out / "index/manifest.json").exists()


def test_quickstart_refuses_a_strange_folder(cli, tmp_path):
    write(tmp_path / "重要.txt", "别删我")
    sentence(cli("quickstart", "--out", tmp_path), tmp_path)
    assert tree(tmp_path) == {"重要.txt": "别删我".encode()}


def test_readme_two_commands():
    "README 里有 issue 要求的两条命令。"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "pip install -c constraints.txt -e ." in text and "vembed quickstart" in text and "pytest" in text


# ---------------------------------------------------------------- 有了真正的权重才能问的

def shipped():
    from vembed_nb.tiny import TINY, tiny_path

    return [n for n in TINY if (tiny_path(n) / "vembed.json").exists()]


@pytest.mark.parametrize("name", ["tiny-clip", "tiny-siglip"])
def test_shipped_model_knows_the_shop(tmp_path, toyshop, name):
    "随包的小模型在没见过的世界 B 上零样本明显好于瞎猜（要有预训练好的权重）。"
    from vembed_nb import evaluate_encoder, load_encoder, read_corpus, read_records

    assert name in shipped(), f"{name} 还没有随包"
    report = evaluate_encoder(load_encoder(name), read_records(toyshop / "test.jsonl"), read_corpus(toyshop / "corpus.jsonl"), str(toyshop))
    assert report.metrics["mrr"] > 0.35, "随机向量在这份数据上的 mrr 是 0.14 到 0.23（六个种子）"
