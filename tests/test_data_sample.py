"""采样器：一批里没有重复、几个进程合起来正是一个大批、报的长度是真的、从任何一批接着来都一样、极端的重复也不会慢下来。"""
import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vembed_nb.core import VembedError
from vembed_nb.data.sample import GroupedBatches, Joined, LengthGroupedBatches, MixedBatches, NoDuplicateBatches, ids_of, lengths_of, pack
from vembed_nb.data.tasks import Item, Record



def record(q, ds, g=""): return Record(Item(q), [Item(image=f"{d}.jpg") for d in ds], group=g)


small = st.integers(0, 6)
some = st.lists(st.builds(lambda q, ds, g: record(f"q{q}", ds, f"g{g}" if g > 2 else ""), small, st.lists(small, min_size=1, max_size=3), small), min_size=1, max_size=50)
fast = settings(max_examples=60, deadline=None)


def build(make):
    "造不出来（一批也凑不出）时是 None。"
    try: return make()
    except VembedError as e: assert "凑不出" in str(e) or "group" in str(e); return None


def owned(records, pair):
    i, p = pair
    r = records[i]
    return {("q", r.query_id), ("d", r.positive_ids[p])} | ({("g", r.group)} if r.group else set())


def clean(records, batch): return sum(len(owned(records, x)) for x in batch) == len(set().union(*(owned(records, x) for x in batch)))


def old_pack(pairs, keys, size):
    "最初的写法：每一批都从头看一遍。"
    todo, batches = list(zip(pairs, keys)), []
    while True:
        batch, used, later = [], set(), []
        for x, k in todo:
            if len(batch) < size and used.isdisjoint(k): batch.append(x); used |= k
            else: later.append((x, k))
        if len(batch) < size: return batches, len(batch)
        batches.append(batch); todo = later


@fast
@given(some, st.integers(1, 5), st.integers(0, 3), st.booleans())
def test_the_same_batches_as_looking_at_everything(records, size, seed, shuffle):
    "与最初的写法一批不差：排队只是省时间。0.1.0 之前的种子仍给出同样的批。"
    s = build(lambda: NoDuplicateBatches(records, size, seed, shuffle))
    for epoch in (0, 1):
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(records)) if shuffle else np.arange(len(records))
        picks = rng.random(len(records))
        pairs = [(int(i), int(picks[i] * len(records[i].positives))) for i in order]
        batches, largest = old_pack(pairs, [owned(records, p) for p in pairs], size)
        if s is None: assert epoch or not batches; return
        s.set_epoch(epoch)
        assert list(s) == batches and len(s) == len(batches) and s.left == len(records) - size * len(batches)


@fast
@given(some, st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_ranks_make_one_big_batch(records, size, world, epoch):
    one = build(lambda: NoDuplicateBatches(records, size * world))
    ranks = [build(lambda r=r: NoDuplicateBatches(records, size, rank=r, world_size=world)) for r in range(world)]
    if one is None: assert ranks == [None] * world; return
    for s in [one, *ranks]: s.set_epoch(epoch)
    assert {len(s) for s in ranks} == {len(one)}
    assert [sum(bs, []) for bs in zip(*ranks)] == list(one)
    assert all(clean(records, b) for b in one)
    assert len({i for b in one for i, _ in b}) == sum(map(len, one)), "一轮里每条至多一次"


@fast
@given(some, st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))
def test_grouped(records, P, K, world):
    one = build(lambda: GroupedBatches(records, P * world, K, seed=1))
    ranks = [build(lambda r=r: GroupedBatches(records, P, K, seed=1, rank=r, world_size=world)) for r in range(world)]
    if one is None: assert ranks == [None] * world; return
    for epoch in (0, 1):
        for s in [one, *ranks]: s.set_epoch(epoch)
        whole = list(one)
        assert len(whole) == len(one) and [sum(bs, []) for bs in zip(*ranks)] == whole
        assert len({i for b in whole for i, _ in b}) == sum(map(len, whole)) == len(records) - one.left
        for b in whole:
            names = [records[i].group for i, _ in b]
            assert "" not in names and len(set(names)) == P * world and all(names.count(n) == K for n in names)
            for (i, p), n in zip(b, names):
                for (j, q), m in zip(b, names): assert n == m or records[i].query_id != records[j].query_id and records[i].positive_ids[p] != records[j].positive_ids[q]


@fast
@given(some, st.integers(1, 4), st.integers(1, 4), st.integers(1, 2))
def test_length_grouped(records, size, window, world):
    lengths = [len(r.query.text) * i % 7 for i, r in enumerate(records)]
    ranks = [build(lambda r=r: LengthGroupedBatches(records, size, 3, window, lengths, r, world)) for r in range(world)]
    if ranks[0] is None: return
    for epoch in (0, 1):
        for s in ranks: s.set_epoch(epoch)
        whole = [sum(bs, []) for bs in zip(*ranks)]
        assert len(whole) == len(ranks[0]) and all(len(b) == size * world and clean(records, b) for b in whole)
        assert len({i for b in whole for i, _ in b}) == sum(map(len, whole))
        longest = [max(lengths[i] for i, _ in b) for b in whole]
        assert not whole or longest[0] == max(longest), "最长的一批最先"


@fast
@given(st.lists(some, min_size=1, max_size=3), st.sampled_from(["first", "all"]), st.booleans(), st.integers(0, 2), st.data())
def test_mixed(parts, stop, weighted, epoch, data):
    sources = {f"s{n}": s for n, p in enumerate(parts) if (s := build(lambda p=p: NoDuplicateBatches(p, 2)))}
    if not sources: return
    weights = {n: data.draw(st.sampled_from([1, .5, 3])) for n in sources} if weighted else None
    m = MixedBatches(sources, weights, stop, seed=5)
    m.set_epoch(epoch)
    whole = list(m)
    assert len(whole) == len(m) == m.counts.sum()
    total = [len(s.make(epoch)[0]) for s in sources.values()]
    part = [{int(np.searchsorted(m.records.starts, i, side="right")) - 1 for i, _ in b} for b in whole]
    assert all(len(p) == 1 for p in part), "一批只来自一个来源"
    count = [part.count({n}) for n in range(len(sources))]
    assert count == m.counts.tolist()
    if not weighted: assert count == total
    elif stop == "first": assert all(c <= t for c, t in zip(count, total)) and (0 in total or any(c == t for c, t in zip(count, total)))
    else: assert all(c >= t for c, t in zip(count, total))
    rows = [i for b in whole for i, _ in b]
    if stop == "first" or not weighted: assert len(set(rows)) == len(rows) and m.left == len(m.records) - len(rows)
    else: assert m.left == len(m.records) - len({i for n, s in enumerate(sources.values()) for i in s.make(epoch)[0].ravel() + int(m.records.starts[n])})
    k = data.draw(st.integers(0, len(m)))
    m.set_epoch(epoch, k)
    assert list(m) == whole[k:] and len(m) == len(whole) - k


N = 240
plain = [record(f"q{i}" + "字" * (i % 17), [i // 3, i // 3 + 1000][: 1 + i % 2], f"g{i // 6}") for i in range(N)]
loose = [record(f"q{i}", [i // 5]) for i in range(N)]
MAKERS = {
    "no-duplicates": lambda r=0, w=1, b=8, **kw: NoDuplicateBatches(plain, b // w, rank=r, world_size=w, **kw),
    "grouped": lambda r=0, w=1, b=8, **kw: GroupedBatches(plain, b // w // 2, 2, rank=r, world_size=w, **kw),
    "lengths": lambda r=0, w=1, b=8, **kw: LengthGroupedBatches(plain, b // w, rank=r, world_size=w, **kw),
    "mixed": lambda r=0, w=1, b=8, **kw: MixedBatches({"a": NoDuplicateBatches(plain, b // w, rank=r, world_size=w, **kw), "b": NoDuplicateBatches(loose, b // w, rank=r, world_size=w)}, {"a": 1, "b": 2}, "all"),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_resume_in_mid_epoch(make):
    "任何一批之后存下来，换一个新的采样器接上，剩下的一条不差；状态能写成 JSON，也能被 torch 安全地读。"
    s = make()
    for epoch in (0, 2):
        s.set_epoch(epoch)
        whole = list(s)
        assert whole == list(s) and len(whole) > 3
        for k in {0, 1, len(whole) // 2, len(whole) - 1, len(whole)}:
            s.set_epoch(epoch)
            it = iter(s)
            for _ in range(k): next(it)
            state = json.loads(json.dumps(s.state_dict()))
            assert state["epoch"] == epoch and state["batch"] == k
            new = make()
            new.load_state_dict(state)
            assert list(new) == whole[k:] and len(new) == len(whole) - k
            wide = [make(r, 2) for r in range(2)]
            for w in wide: w.load_state_dict(state)
            assert [sum(bs, []) for bs in zip(*wide)] == whole[k:], "进程数变了，大批没有变"
    again = make()
    again.load_state_dict(new.state_dict())
    assert again.state_dict() == new.state_dict()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_seeds_and_epochs_differ(make):
    s = make()
    first = list(s)
    s.set_epoch(1)
    assert list(s) != first != list(make(seed=7))
    s.set_epoch(0)
    assert list(s) == first


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("change", [dict(b=16), dict(seed=3)], ids=["batch", "seed"])
def test_a_different_sampler_does_not_resume(make, change):
    state = make().state_dict()
    with pytest.raises(VembedError, match="续不上"): make(**change).load_state_dict(state)


def test_different_data_does_not_resume():
    state = NoDuplicateBatches(plain, 8).state_dict()
    swapped = [plain[1], plain[0], *plain[2:]]
    assert NoDuplicateBatches([*plain], 8).identity() == {k: v for k, v in state.items() if k not in ("epoch", "batch")}
    for other in (plain[:-1], swapped, [*plain[:-1], record("q0", [999])], [*plain[:-1], Record(plain[-1].query, plain[-1].positives)]):
        with pytest.raises(VembedError, match="续不上"): NoDuplicateBatches(other, 8).load_state_dict(state)
    with pytest.raises(VembedError, match="续不上"): GroupedBatches(plain, 4, 2).load_state_dict(state)
    with pytest.raises(VembedError, match="不能从第"): NoDuplicateBatches(plain, 8).set_epoch(0, 10_000)


def test_a_loader_with_workers_asks_ahead():
    "子进程会提前来取：采样器交出去的比训练用掉的多，所以要自己数。"
    class Rows(torch.utils.data.Dataset):
        def __getitem__(self, pair): return pair

    s = NoDuplicateBatches(plain, 8)
    whole, got = list(s), []
    s.set_epoch(0)
    for used, batch in enumerate(torch.utils.data.DataLoader(Rows(), batch_sampler=s, collate_fn=list, num_workers=2), 1):
        got.append(batch)
        if used == 3: break
    assert got == whole[:3] and s.state_dict()["batch"] > 3
    new = NoDuplicateBatches(plain, 8)
    new.load_state_dict(s.state_dict(done=3))
    assert list(new) == whole[3:]


def test_records_with_their_own_keys():
    "自己会编号的数据用它自己的号；号怎么编、密不密，结果和指纹都一样。"
    class Own(list):
        def keys(self):
            k = ids_of(list(self))
            return type(k)(k.query * 10**9 + 5, k.positive * 10**12 + 1, k.offsets, np.where(k.group < 0, -1, 10**6 - k.group))

        def lengths(self): return lengths_of(list(self))

    for make in (lambda r: NoDuplicateBatches(r, 8), lambda r: GroupedBatches(r, 4, 2), lambda r: LengthGroupedBatches(r, 8)):
        a, b = make(plain), make(Own(plain))
        assert a.identity() == b.identity()
        if not isinstance(a, GroupedBatches): assert list(a) == list(b)


@pytest.mark.parametrize("keys", ["half", "two-sided", "unique", "one"])
def test_heavy_duplicates_are_not_quadratic(keys):
    "一半是同一张图、二部图、没有重复、全是同一张图：二十万条都在几秒内。"
    n, rng = 200_000, np.random.default_rng(0)
    columns = {"half": [np.where(rng.random(n) < .5, 0, np.arange(n))], "two-sided": [rng.integers(0, 300, n), rng.integers(0, 300, n)], "unique": [np.arange(n)], "one": [np.zeros(n, np.int64)]}[keys]
    start = time.perf_counter()
    batches, largest = pack([c[:, None] for c in columns], 128)
    assert time.perf_counter() - start < 20
    assert all(len(np.unique(c[b])) == 128 for c in columns for b in batches[:: max(1, len(batches) // 50)])
    assert len(np.unique(batches)) == batches.size and largest == (1 if keys == "one" else 128)
    assert len(batches) == (0 if keys == "one" else len(batches)) and (keys == "one" or len(batches) > n // 128 * .4)


def test_leftovers_change_every_epoch():
    s = NoDuplicateBatches(loose, 32)
    seen = np.zeros(N, int)
    for epoch in range(12):
        s.set_epoch(epoch)
        seen[s.plan[0].ravel()] += 1
        assert s.left == N - 32 * len(s)
    assert seen.min() > 0


def test_members_differ_when_they_can():
    "同组里先取不同的正例：6 条共用 2 张图，K=2 时每组的两条是不同的图。"
    records = [record(f"q{i}", [i // 3], f"g{i // 6}") for i in range(60)]
    first = next(iter(GroupedBatches(records, 10, 2)))
    assert all(records[a[0]].positive_ids[a[1]] != records[b[0]].positive_ids[b[1]] for a, b in zip(first[::2], first[1::2]))


def test_joined():
    j = Joined([plain, loose[:3], loose[:1]])
    assert len(j) == N + 4 and j[0] is plain[0] and j[N] is loose[0] and j[-1] is loose[0] and j[np.int64(N + 2)] is loose[2] and list(j)[N + 3] is loose[0]
    for i in (N + 4, -N - 5):
        with pytest.raises(IndexError): j[i]


NDB = NoDuplicateBatches
BAD = {
    "no-records": (lambda: NDB([], 4), "没有记录"),
    "no-positive": (lambda: NDB([plain[0], Record(Item("x"), [], where="a.jsonl 第 2 行")], 1), "a.jsonl 第 2 行"),
    "batch-zero": (lambda: NDB(plain, 0), "batch_size=0"),
    "batch-float": (lambda: NDB(plain, 8.0), "batch_size=8.0"),
    "batch-bool": (lambda: NDB(plain, True), "batch_size=True"),
    "seed-negative": (lambda: NDB(plain, 8, -1), "seed=-1"),
    "rank": (lambda: NDB(plain, 8, rank=2, world_size=2), "rank=2"),
    "world-zero": (lambda: NDB(plain, 8, world_size=0), "world_size=0"),
    "too-big": (lambda: NDB(loose, 64), "最大 batch_size 是 48"),
    "too-big-ranks": (lambda: NDB(loose, 32, world_size=2), "最大 batch_size 是 24"),
    "epoch": (lambda: NDB(plain, 8).set_epoch(-1), "epoch=-1"),
    "start": (lambda: NDB(plain, 8).set_epoch(0, -1), "start=-1"),
    "no-groups": (lambda: GroupedBatches(loose), "没有 group"),
    "groups-too-many": (lambda: GroupedBatches(plain, 41, 2), "至多 40 组"),
    "members-too-many": (lambda: GroupedBatches(plain, 4, 7), "只有 0 组够 7 条"),
    "members-zero": (lambda: GroupedBatches(plain, 4, 0), "members=0"),
    "window": (lambda: LengthGroupedBatches(plain, 8, window=0), "window=0"),
    "lengths": (lambda: LengthGroupedBatches(plain, 8, lengths=[1, 2]), "lengths 有 2 个"),
    "no-sources": (lambda: MixedBatches({}), "sources 要是"),
    "stop": (lambda: MixedBatches({"a": NDB(plain, 8)}, stop="never"), "stop='never'"),
    "weights-missing": (lambda: MixedBatches({"a": NDB(plain, 8), "b": NDB(loose, 8)}, {"a": 1}), "恰好有一个正数"),
    "weights-zero": (lambda: MixedBatches({"a": NDB(plain, 8)}, {"a": 0}), "恰好有一个正数"),
    "weights-nan": (lambda: MixedBatches({"a": NDB(plain, 8)}, {"a": float("nan")}), "恰好有一个正数"),
    "ranks-differ": (lambda: MixedBatches({"a": NDB(plain, 8, rank=0, world_size=2), "b": NDB(plain, 8, rank=1, world_size=2)}), "要一致"),
}


@pytest.mark.parametrize("make, words", BAD.values(), ids=BAD)
def test_bad_input(make, words):
    with pytest.raises(VembedError) as e: make()
    assert words in str(e.value) and "\n" not in str(e.value)
