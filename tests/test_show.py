"""画图的房间：失败单、地图、探索器。看数字和结构，也看恶意的文字和没有内核的地方。"""
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image

from vembed_nb.core import VembedError
from vembed_nb.data.read import read_corpus, read_records
from vembed_nb.data.tasks import Item, Record
from vembed_nb.evaluate.report import EvalReport, evaluate_encoder
from vembed_nb.models.load import load_encoder
from vembed_nb.search.searcher import Hits, Searcher, build_index
from vembed_nb.show import curves as C
from vembed_nb.show import explore as E
from vembed_nb.show import gallery as G
from vembed_nb.show import map as M
from vembed_nb.vectors import Embeddings, normalize

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = ["$19 到 $25", r"$\frac{1$", "<script>alert(1)</script>", "一句\n两行\t的话", "很长" * 200, "a\u200bb", "🦊"]


@pytest.fixture(autouse=True)
def tidy():
    "每个测试之后关掉全部的图。"
    yield
    plt.close("all")


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(i=0): return Image.new("RGB", (20, 20), (i * 53 % 256, i * 101 % 256, i * 17 % 256))


def report(ranks, name="模型", n_corpus=100): return EvalReport(name, {}, {}, len(ranks), n_corpus, ranks=[np.array(r) for r in ranks])


def record(text="查询", n=1, image=None): return Record(Item(text, image), [Item(image=picture(i)) for i in range(n)], query_id=f"{text}", positive_ids=[f"p{i}" for i in range(n)])


def rendered(fig):
    "真的画一遍：写坏的公式、负的尺寸在这里才会报错。"
    fig.canvas.draw()
    return fig


# ---------- 失败单 ----------

RANKS = [[1], [7, 9], [2], [60], [1, 2], [3]]


def test_failures_order():
    records = [record(str(i)) for i in range(6)]
    at = lambda **kw: [f.at for f in G.failures(report(RANKS), records, **kw)]
    assert at() == [3, 1, 5, 2] and at(order="near") == [2, 5, 1, 3] and at(n=2) == [3, 1] and at(n=0) == []
    shuffled = at(order="random", seed=1)
    assert sorted(shuffled) == [1, 2, 3, 5] and shuffled == at(order="random", seed=1) and len({tuple(at(order="random", seed=s)) for s in range(9)}) > 1
    assert G.failures(report([[1], [1]]), records[:2]) == []
    assert [f.first for f in G.failures(report(RANKS), records)] == [60, 7, 3, 2]


@pytest.mark.parametrize("kw, word", [(dict(order="最差"), "order"), (dict(records=[record()]), "6 个查询"), (dict(report=report([])), "没有名次")])
def test_failures_refuse(kw, word):
    args = dict(report=report(RANKS), records=[record(str(i)) for i in range(6)]) | kw
    with pytest.raises(VembedError, match=word): G.failures(args.pop("report"), args.pop("records"), **args)


def hits(k=3, texts=False, root=""): return Hits(Item("x"), [f"d{i}" for i in range(k)], [.9 - .1 * i for i in range(k)], [{"text": f"第 {i} 段"} if texts else {"image": picture(i)} for i in range(k)], root)


def test_sheet_axes():
    "每行：查询的图（有的话）、k 个结果、至多 answers 个没进前几名的正例。"
    found = [G.Failure(0, record("一", 3), [4, 5, 6]), G.Failure(1, record("二", 1), [9])]
    assert len(rendered(G.failure_sheet(found, [hits(), hits()])).axes) == 3 + 2 + 3 + 1
    assert len(rendered(G.failure_sheet(found, [hits(), hits()], answers=3)).axes) == 3 + 3 + 3 + 1
    with_image = [G.Failure(0, record(None, 1, picture()), [4])]
    assert len(rendered(G.failure_sheet(with_image, [hits(texts=True)])).axes) == 1 + 3 + 1
    inside = Hits(Item("x"), ["d0", "p0"], [.9, .8], [{"image": picture()}] * 2)  # 正例已经在前几名里：右边不再画
    fig = rendered(G.failure_sheet([G.Failure(0, record(), [2])], [inside]))
    assert len(fig.axes) == 2 and fig.axes[1].spines["top"].get_edgecolor() != fig.axes[0].spines["top"].get_edgecolor()


@pytest.mark.parametrize("found, found_hits", [([], []), ([G.Failure(0, record(), [2])], [])], ids=["none", "count"])
def test_sheet_refuses(found, found_hits):
    with pytest.raises(VembedError): G.failure_sheet(found, found_hits)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_hostile_text_is_drawn(text, tmp_path):
    "别人写的文字不会被当成公式，也不会报错。"
    rendered(G.failure_sheet([G.Failure(0, Record(Item(text), [Item(text)], positive_ids=["p"]), [4])], [Hits(Item(text), ["d"], [.5], [{"text": text}])], path=tmp_path / "a.png"))
    rendered(G.gallery([(text, {"组": [(picture(), True)]})]))
    rendered(G.rank_bars(report(RANKS, text)))
    m = M.make_map(rand(4, 8), [Item(text)] * 4, [text, "b", "b", "b"])
    rendered(m.plot(marks=[(m.xy[0], text)]))
    rendered(E.draw_look(E.Look(Hits(Item(text), ["d"], [.5], [{"text": text}]), [.5], 2., 8, .1)))
    rendered(E.similarity(torch.eye(2), [text, "b"], ["甲", text]))
    rendered(E.two_rankings(Item(text), {text: hits(2), "b": hits(3)}))


def test_rank_bars_add_up(tmp_path):
    fig = G.rank_bars([report(RANKS, "前"), report([[1]] * 6, "后")], tmp_path / "bars.png")
    widths = {y: sum(b.get_width() for b in fig.axes[0].patches if abs(b.get_y() + b.get_height() / 2 - y) < .1) for y in (0, 1)}
    assert widths == pytest.approx({0: 1, 1: 1}) and fig.axes[0].patches[0].get_width() == pytest.approx(2 / 6)
    assert (tmp_path / "bars.png").stat().st_size > 1000


def test_compact_closes():
    before = plt.get_fignums()
    image = G.compact(G.rank_bars(report(RANKS)))
    assert plt.get_fignums() == before and image.data[:3] == b"\xff\xd8\xff"


# ---------- 地图 ----------

def test_pca_equals_svd():
    x = rand(60, 10) * torch.linspace(3, .1, 10)
    xy, axes, mean, share = M.pca(x, 3)
    u, s, vt = np.linalg.svd((x - x.mean(0)).numpy(), full_matrices=False)
    assert np.allclose(xy.abs(), np.abs(u[:, :3] * s[:3]), atol=1e-4) and share == pytest.approx((s[:3] ** 2).sum() / (s ** 2).sum(), abs=1e-5)
    again = M.pca(x[torch.randperm(60, generator=torch.Generator().manual_seed(1))], 3)[1]
    assert torch.allclose(axes, again, atol=1e-4)  # 次序不影响方向，正负也不影响


@pytest.mark.parametrize("x", [rand(2, 8), rand(5, 1), rand(5), torch.full((5, 4), torch.nan)], ids=["few", "thin", "flat", "nan"])
def test_pca_refuses(x):
    with pytest.raises(VembedError): M.pca(x)


def naive_neighbours(x, k): return [set(sorted((j for j in range(len(x)) if j != i), key=lambda j: float((x[i] - x[j]).norm()))[:k]) for i in range(len(x))]


def test_kept_neighbours_naive():
    x, xy = normalize(rand(40, 6)), rand(40, 2, seed=3)
    a, b = naive_neighbours(x, 5), naive_neighbours(xy, 5)
    assert M.kept_neighbours(x, xy, 5) == pytest.approx(np.mean([len(p & q) / 5 for p, q in zip(a, b)]))
    for bad in (dict(k=40), dict(k=0), dict(xy=xy[:3])):
        with pytest.raises(VembedError): M.kept_neighbours(x, **{"xy": xy, "k": 5} | bad)


def test_same_label_naive():
    x, labels = normalize(rand(40, 6)), [str(i % 3) for i in range(40)]
    near, chance = M.same_label(x, labels, 5)
    assert near == pytest.approx(np.mean([np.mean([labels[j] == labels[i] for j in n]) for i, n in enumerate(naive_neighbours(x, 5))]))
    assert chance == pytest.approx(np.mean([labels[i] == labels[j] for i in range(40) for j in range(40) if i != j]))
    assert M.same_label(torch.cat([x[:1]] * 40), labels, 5)[0] <= 1  # 全都一样也不会把自己算进去


def test_map_points_and_place():
    x = rand(30, 8)
    m = M.make_map(x, [Item(image="a.jpg") if i % 2 else Item(f"文字 {i}") for i in range(30)], [str(i % 4) for i in range(30)])
    points = json.loads(json.dumps(m.points(), ensure_ascii=False))
    assert len(points) == 30 and all(0 <= p["x"] <= 1 and 0 <= p["y"] <= 1 for p in points) and points[1]["image"] == "a.jpg" and points[0]["text"] == "文字 0"
    assert np.allclose(m.place(x), m.xy, atol=1e-5) and m.place(x[0]).shape == (1, 2)
    multi = Embeddings(rand(5, 3, 8), torch.ones(5, 3, dtype=torch.bool))
    assert len(M.make_map(multi)) == 5 and M.make_map(multi).ids == list("01234")


def test_map_of_identical_vectors():
    "全部一样的向量：一个点，不报错，也没有 nan。"
    m = M.make_map(torch.ones(6, 4))
    assert np.isfinite(m.xy).all() and np.isfinite(m.kept)
    rendered(m.plot())
    assert "nan" not in m.to_html()


@pytest.mark.parametrize("kw", [dict(labels=["a"]), dict(items=[]), dict(ids=["a"]), dict(centre=["a"]), dict(how="tsne")], ids=lambda k: next(iter(k)))
def test_make_map_refuses(kw):
    with pytest.raises(VembedError): M.make_map(rand(5, 4), **kw)


def test_centre():
    x = torch.cat([rand(20, 8), rand(20, 8, seed=1) + 5])
    groups = ["a"] * 20 + ["b"] * 20
    m = M.make_map(x, centre=groups)
    split = lambda xy: np.linalg.norm(xy[:20].mean(0) - xy[20:].mean(0))
    assert split(m.xy) < .2 * split(M.make_map(x).xy) and M.modality_gap(x[:20], x[20:]) > .5
    with pytest.raises(VembedError, match="centre"): m.place(x[:1])


def test_thumbnails_do_not_overlap():
    xy = M._unit_square(rand(300, 2).numpy())
    chosen = M._placed(xy, .1, 40)
    assert 5 < len(chosen) <= 40 and all(np.abs(xy[a] - xy[b]).max() > .1 for a in chosen for b in chosen if a < b)
    fig = M.make_map(rand(20, 4), [Item(image=picture(i)) for i in range(20)]).plot(pictures=0)
    assert not [a for a in fig.axes[0].artists if type(a).__name__ == "AnnotationBbox"]


def test_colours():
    labels = [str(i % 12) for i in range(60)] + ["0"] * 5
    table = M.colour_table(labels)
    assert list(table)[0] == "0" and list(table.values()).count(M.REST) == 3 and len(set(table.values())) == 10
    m = M.make_map(rand(65, 4), labels=labels)
    with pytest.raises(VembedError, match="没有颜色"): m.plot(colours={"0": "red"})
    rendered(m.plot(colours={str(i): "red" for i in range(20)}))


def test_html_is_safe_and_offline():
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
    m = M.make_map(rand(12, 4), [Item(evil), *(Item(image=picture(i)) for i in range(11))], [evil, *"abcdefghijk"], ids=[evil, *"abcdefghijk"])
    page = m._repr_html_()
    assert "<script" not in page and "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", page) and "http" not in page
    assert page.count("<img") == 11 and page.count("<a ") == 12 and "data:image/jpeg;base64," in page
    few = m.to_html(limit=5, thumb=0)
    assert few.count("<a ") == 5 and "画了其中 5 个" in few and "<img" not in few


def test_umap():
    pytest.importorskip("umap", reason="pip install 'vembed-nb[umap]'")
    x = normalize(torch.cat([rand(30, 16, seed=s) * .1 + rand(1, 16, seed=9 + s) for s in range(3)]))
    a, b = (M.make_map(x, how="umap", neighbors=10, seed=3) for _ in range(2))
    assert np.array_equal(a.xy, b.xy) and a.explained is None and a.kept > 10 / 89
    centres = a.xy.reshape(3, 30, 2).mean(1)
    inside = max(np.linalg.norm(a.xy[30 * s:30 * s + 30] - centres[s], axis=1).mean() for s in range(3))
    assert min(np.linalg.norm(centres[i] - centres[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > inside
    assert np.linalg.norm(a.place(x[:3]) - centres[0], axis=1).max() < np.linalg.norm(a.place(x[:3]) - centres[1], axis=1).min()
    for n in (1, 90):
        with pytest.raises(VembedError, match="neighbors"): M.umap_fit(x, n)


def test_umap_missing(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(VembedError, match=r"vembed-nb\[umap\]"): M.umap_fit(rand(20, 4))


# ---------- 会动的图 ----------

def simple(a=1, text="x"):
    fig, ax = plt.subplots(figsize=(1, 1))
    if a == 13: raise VembedError("13 <不行>")
    ax.text(a / 20, .5, G.plain(text))
    return fig


def counted():
    calls = []

    def draw(**kw):
        calls.append(kw)
        return simple(**kw)

    return calls, draw


def test_live_redraws():
    calls, draw = counted()
    live = E.Live(draw, {"a": (0, 20), "text": "x"})
    assert len(calls) == 1 and not live.controls["text"].continuous_update
    old = live.picture.value
    live.controls["a"].value = 3
    assert len(calls) == 2 and calls[-1] == {"a": 3, "text": "x"} and live.picture.value != old
    live.set(a=5, text="y")
    assert len(calls) == 3 and live.values == {"a": 5, "text": "y"}  # 改两个，画一次
    assert live.picture.value[:3] == b"\xff\xd8\xff"


def test_live_shows_errors_and_recovers():
    live = E.Live(simple, {"a": (0, 20)})
    old = live.picture.value
    live.controls["a"].value = 13
    assert "13 &lt;不行&gt;" in live.note.value and live.picture.value == old
    live.controls["a"].value = 14
    assert live.note.value == "" and live.picture.value != old
    with pytest.raises(VembedError, match="没有参数"): live.set(b=1)
    with pytest.raises(VembedError, match="变不成小部件"): E.Live(simple, {"a": object()})
    with pytest.raises(VembedError, match="13"): E.Live(simple, {"a": [13, 1]})  # 第一张就画不出：当场说


def test_live_leaks_no_figures():
    live = E.Live(lambda a: simple(min(a, 12)), {"a": (0, 20)})
    before = plt.get_fignums()
    for a in range(20): live.controls["a"].value = a
    assert plt.get_fignums() == before


def test_live_outside_a_kernel(monkeypatch):
    "没有内核：只有静态图，输出两次相同；有内核：小部件和静态图都有。"
    live = E.Live(simple, {"a": (0, 20)})
    still = live._repr_mimebundle_()
    assert set(still) == {"image/jpeg", "text/plain"} and still == E.Live(simple, {"a": (0, 20)})._repr_mimebundle_()
    monkeypatch.setattr(E, "_in_kernel", lambda: True)
    view = live._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == live.box.model_id and view["version_major"] == 2


def test_no_widget_ids_in_notebooks():
    "随机的 model_id 不进 git：存下来的输出里没有小部件的视图。"
    for path in [*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "tutorials_zh").glob("*.ipynb")]:
        nb = json.loads(path.read_text(encoding="utf-8"))
        assert "widgets" not in nb["metadata"], path.name
        for c in nb["cells"]: assert not any("widget-view" in k for o in c.get("outputs", []) for k in o.get("data", {})), path.name


# ---------- 搜一句话 ----------

@pytest.fixture(scope="module")
def place(micro, shop):
    "微型模型、图库、搜索器。"
    encoder, corpus = load_encoder(micro), read_corpus(shop / "corpus.jsonl")
    return encoder, corpus, Searcher(build_index(encoder, corpus, shop), encoder, str(shop))


def test_look_equals_search(place, shop):
    encoder, corpus, searcher = place
    for shelf in (E.Shelf(searcher), E.Shelf(encoder, corpus, shop)):
        look, plain = shelf.look("红色的第 0 件", k=7), searcher.search("红色的第 0 件", 7)
        assert look.hits.ids == plain.ids and look.hits.scores == pytest.approx(plain.scores, abs=1e-6)
        whole = shelf.look("红色的第 0 件", k=999)
        assert len(whole.hits) == len(corpus[0]) and sum(whole.probs) == pytest.approx(1) and 1 <= whole.choices <= len(corpus[0])


def test_temperature_keeps_the_order(place):
    shelf = E.Shelf(place[2])
    looks = [shelf.look("蓝色的第 1 件", temperature=t) for t in (.005, .05, 1)]
    assert len({tuple(x.hits.ids) for x in looks}) == 1 and looks[0].choices < looks[1].choices < looks[2].choices
    s = shelf.scores("蓝色的第 1 件").double()
    p = (s / .05).softmax(0)
    assert looks[1].choices == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=1e-6)


def test_dim_is_truncate_then_normalize(place):
    shelf = E.Shelf(place[2])
    q = place[0].encode([Item("绿")], role="query")
    assert torch.allclose(shelf.scores("绿", 8), normalize(shelf.vectors[:, :8]) @ normalize(q[0, :8]), atol=1e-6)
    with pytest.raises(VembedError): shelf.scores("绿", 17)


def test_queries_are_encoded_once(place, monkeypatch):
    encoder, _, searcher = place
    shelf, calls = E.Shelf(searcher), []
    monkeypatch.setattr(type(encoder), "encode", lambda self, items, *a, _old=type(encoder).encode, **kw: calls.append(items) or _old(self, items, *a, **kw))
    for dim in (16, 8, 4): shelf.look("黄", dim)
    assert len(calls) == 1


@pytest.mark.parametrize("kw", [dict(temperature=0), dict(temperature=float("nan")), dict(k=0), dict(dim=0), dict(query="  ")], ids=str)
def test_look_refuses(place, kw):
    with pytest.raises(VembedError): E.Shelf(place[2]).look(**{"query": "红"} | kw)


@pytest.mark.parametrize("kw", [dict(temperature=5), dict(k=0), dict(k=11), dict(dims=[17]), dict(dims=[-1]), dict(query="")], ids=str)
def test_explore_refuses(place, kw):
    "滑块会把越界的值悄悄挪回来；要说出来。"
    with pytest.raises(VembedError): E.explore(place[2], **kw)


def test_shelf_refuses(place):
    for bad in ((place[0],), ("x",), (None, place[1])):
        with pytest.raises(VembedError, match="Searcher"): E.Shelf(*bad)


def test_shelf_leaves_out_deleted(place, shop):
    "下架的东西不在探索器里；内积的索引说换不了维数。"
    encoder, corpus, _ = place
    index = build_index(encoder, corpus, shop)
    gone = list(index)[0]
    index.delete([gone])
    shelf = E.Shelf(Searcher(index, encoder, str(shop)))
    look = shelf.look("红", k=999)
    assert gone not in look.hits.ids and len(look.hits) == len(corpus[0]) - 1 == len(shelf.vectors) and sum(look.probs) == pytest.approx(1)
    index.metric = "ip"
    with pytest.raises(VembedError, match="换维数"): E.Shelf(Searcher(index, encoder, str(shop)))


def test_explore_callbacks(place):
    ex = E.explore(place[2], query="红色的第 0 件", examples=["蓝"], k=3)
    assert ex.controls["dim"].options == (16, 8)
    seen = {ex.picture.value}
    for name, value in (("query", "蓝色的第 1 件"), ("dim", 8), ("temperature", .5), ("k", 5)):
        ex.controls[name].value = value
        assert ex.note.value == "" and ex.picture.value not in seen, name
        seen.add(ex.picture.value)
    ex.controls["query"].value = "<img src=x onerror=alert(1)>"
    ex.controls["query"].value = ""
    assert "查询是空的" in ex.note.value and "<img" not in ex.note.value


@pytest.mark.filterwarnings("ignore:Glyph")
def test_explore_multivector(tmp_path):
    import micro_late
    from vembed_nb.models.load import load_encoder

    encoder = load_encoder(micro_late.build(tmp_path / "late"))
    ids, texts = [f"t{i}" for i in range(5)], ["红色", "红色的杯子", "a red cup", "杯", "red"]
    shelf = E.Shelf(encoder, (ids, [Item(t) for t in texts], [{} for _ in ids]))
    q, d = encoder.encode([Item("红色的杯子")], role="query"), encoder.encode([Item(t) for t in texts])
    s = [float((q.vectors[0][q.mask[0]] @ x[m].T).max(1).values.mean()) for x, m in zip(d.vectors, d.mask)]
    assert shelf.scores("红色的杯子").tolist() == pytest.approx(s, abs=1e-5)
    live = E.explore(encoder, (ids, [Item(t) for t in texts], [{} for _ in ids]), query="红色的杯子", dims=[4])
    live.controls["dim"].value = 4
    assert live.note.value == ""


# ---------- 相似度矩阵、名次 ----------

def test_similarity(tmp_path):
    scores = torch.tensor([[.9, .1], [.8, .2]])
    fig = rendered(E.similarity(scores, ["一", "二"], [picture(0), picture(1)], path=tmp_path / "s.png"))
    assert "50%" in fig.axes[0].get_xlabel() and len(fig.axes[0].patches) == 2
    assert "100%" in E.similarity(scores, ["一", "二"], ["甲", "乙"], [[0], [0]]).axes[0].get_xlabel()
    shown = E.similarity(scores, ["一", "二"], ["甲", "乙"], temperature=.1).axes[0].images[0].get_array()
    assert np.allclose(shown, (scores / .1).softmax(1))
    for bad in (dict(scores=scores[:1]), dict(scores=scores * torch.nan), dict(temperature=0)):
        with pytest.raises(VembedError): E.similarity(**dict(scores=scores, rows=["一", "二"], columns=["甲", "乙"]) | bad)
    live = E.explore_batch(scores, ["一", "二"], ["甲", "乙"])
    old = live.picture.value
    live.controls["temperature"].value = .5
    assert live.picture.value != old


def test_rank_diff_naive():
    a, b = [[1], [5, 6], [3], [10], [2]], [[2], [1], [3], [100], [2, 4]]
    d = E.rank_diff(report(a, "前"), report(b, "后"))
    assert (d.better, d.worse, d.same) == (1, 2, 2) and d.order("better") == [1] and d.order("worse") == [3, 0] and sorted(d.order("random")) == list(range(5))
    assert "变好 1（20%）" in d._repr_markdown_()
    rendered(d.plot(highlight=3))
    with pytest.raises(VembedError): d.order("最好")
    for other in (report(b[:4]), report([]), report(b, n_corpus=7)):
        with pytest.raises(VembedError, match="同样的查询"): E.rank_diff(report(a), other)


def test_two_rankings_lines():
    h = lambda *ids: Hits(Item("x"), list(ids), [.5] * len(ids), [{"text": i} for i in ids])
    fig = rendered(E.two_rankings(Item("x"), {"前": h("a", "b", "c", "d"), "后": h("c", "a", "e", "f")}, right=["a"], k=3))
    lines = [x for x in fig.artists if type(x).__name__ == "ConnectionPatch"]
    assert len(lines) == 2 and len(fig.axes) == 6  # a、c 连线；b、e 各写出去处
    assert fig.axes[1].get_xlabel() == "→ 4 名外" and fig.axes[5].get_title() == "← 4 名外"
    with pytest.raises(VembedError): E.two_rankings(Item("x"), {"前": h("a")})


def test_inspector(place, shop):
    encoder, corpus, searcher = place
    records = read_records(shop / "val.jsonl")
    one = evaluate_encoder(encoder, records, corpus, shop, name="前")
    two = EvalReport("后", {}, {}, one.n_queries, one.n_corpus, ranks=[np.array([max(1, r[0] - 1 if i % 2 else r[0] + 3)]) for i, r in enumerate(one.ranks)])
    diff = E.rank_diff(one, two)
    live = E.inspect_ranks(diff, records, {"前": searcher, "后": searcher}, k=3)
    order, which = live.controls["order"], live.controls["which"]
    for choice in order.options:
        order.value = choice
        assert which.max == int(re.search(r"（(\d+)）", choice)[1]) and live.note.value == ""
        which.value = which.max
        assert live.note.value == ""
    for bad in (dict(records=records[:2]), dict(searchers={"后": searcher, "前": searcher}), dict(k=99)):
        with pytest.raises(VembedError): E.inspect_ranks(**dict(diff=diff, records=records, searchers={"前": searcher, "后": searcher}) | bad)


def test_inspector_when_nothing_changed(place, shop):
    encoder, corpus, searcher = place
    records = read_records(shop / "val.jsonl")
    one = evaluate_encoder(encoder, records, corpus, shop, name="前")
    same = EvalReport("后", {}, {}, one.n_queries, one.n_corpus, ranks=one.ranks)
    live = E.inspect_ranks(E.rank_diff(one, same), records, {"前": searcher, "后": searcher}, k=3)
    assert [o.split("（")[0] for o in live.controls["order"].options] == ["随机"]


def test_explore_map(place, shop):
    encoder, (_, items, _), searcher = place
    m = M.make_map(searcher.index.vectors, items, image_root=shop)
    live = E.explore_map(m, encoder, "红", 10)
    old = live.picture.value
    live.controls["query"].value = "蓝色的第 1 件"
    assert live.picture.value != old
    live.controls["query"].value = ""  # 不标
    assert live.note.value == ""
    with pytest.raises(VembedError, match="centre"): E.explore_map(M.make_map(searcher.index.vectors, items, centre=["a"] * len(items), image_root=shop), encoder)


def test_explore_heat():
    class Fake:
        def heat(self, query, image, token=None):
            if token and token not in query: raise VembedError(f"查询里没有 {token!r}")
            return np.random.default_rng(len(token or "")).random((4, 4)), list(query)

    live = E.explore_heat(Fake(), picture(), "红色的杯子")
    old = live.picture.value
    live.controls["token"].value = "杯子"
    assert live.picture.value != old
    live.controls["token"].value = "沙发"
    assert "沙发" in live.note.value


# ---------- 曲线与失败单 ----------

def history(n=8, up=0.0, val=True): return [dict(step=i, loss=2.0 / i + up, lr=1e-3, temperature=.05) for i in range(1, n + 1)] + [{"step": n, "val_hit@1": .5, "val_hit@10": .9, "val_mrr": .6}] * val


def test_smoothing_is_the_bias_corrected_average():
    x, w = [5.0, 1.0, 4.0], .7
    naive = [sum(v * w ** (i - j) for j, v in enumerate(x[:i + 1])) / sum(w ** (i - j) for j in range(i + 1)) for i in range(3)]
    assert C.smoothed(x, w) == pytest.approx(naive) and C.smoothed(x, 0) == x
    for bad in (1, -.1):
        with pytest.raises(VembedError): C.smoothed(x, bad)


def test_curves_draw_the_numbers():
    fig = C.curves({"甲": history(), "乙": history(up=1)}, smooth=.5, log=True)
    loss = fig.axes[0]
    assert loss.get_yscale() == "log" and len(loss.lines) == 4  # 原来的和平滑的
    assert list(loss.lines[0].get_ydata()) == [h["loss"] for h in history(val=False)]
    assert list(loss.lines[3].get_ydata()) == pytest.approx(C.smoothed([h["loss"] for h in history(up=1, val=False)], .5))
    assert [line.get_label() for line in fig.axes[2].lines] == ["甲", "乙"]
    assert len(C.curves(history()).axes[2].lines) == 3
    for bad in ([], {}, {"甲": []}, [{"step": 1, "val_hit@1": .5}]):
        with pytest.raises(VembedError): C.curves(bad)


def test_explore_curves():
    live = E.explore_curves({"甲": history(), "乙": history(20, 1)})
    assert live.controls["upto"].max == 20
    old = live.picture.value
    live.set(which=("乙",), smooth=.9, log=True, upto=5)
    assert live.picture.value != old and max(live.figure().axes[0].lines[0].get_xdata()) == 5
    live.controls["which"].value = ()
    assert "没有选" in live.note.value
    for bad in (dict(runs={}), dict(runs=history()), dict(runs={"甲": history()}, smooth=1)):
        with pytest.raises(VembedError): E.explore_curves(**bad)


def test_explore_failures(place, shop):
    encoder, corpus, searcher = place
    records = read_records(shop / "val.jsonl")
    one = evaluate_encoder(encoder, records, corpus, shop, name="模型")
    wrong = sum(r[0] > 1 for r in one.ranks)
    live = E.explore_failures(one, records, searcher, k=3)
    assert wrong and live.controls["page"].max == -(-wrong // 4)
    for order in live.controls["order"].options:
        live.set(order=order, page=live.controls["page"].max)
        assert live.note.value == ""
    right = EvalReport("全对", {}, {}, one.n_queries, one.n_corpus, ranks=[np.array([1.0])] * one.n_queries)
    with pytest.raises(VembedError, match="全对"): E.explore_failures(right, records, searcher)
    with pytest.raises(VembedError): E.explore_failures(one, records[:2], searcher)
