"""房屋规则：楼层、装载的代价、说明、大小。违反的全部列出来，而不是只报第一个。"""
import ast
import inspect
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "vembed_nb"
NBS = sorted(p for p in (ROOT / "nbs").glob("*.ipynb"))
ALL = [*NBS, *sorted((ROOT / "tutorials_zh").glob("*.ipynb"))]
TOP = {"__init__", "cli"}  # 顶楼：可以装载任何房间，而没有房间装载它们


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]
def source(cell): return "".join(cell["source"])


def rooms():
    "模块名 → (楼层编号, notebook)。"
    out = {}
    for p in NBS:
        names = [m[1] for c in cells(p) if c["cell_type"] == "code" and (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M))]
        assert len(names) <= 1, f"{p.name} 有 {len(names)} 个 default_exp"
        if names: out[names[0]] = (int(p.name[:2]), p)
    return out


ROOMS = rooms()
MODULES = {".".join(p.relative_to(LIB).with_suffix("").parts): p for p in LIB.rglob("*.py") if p.name not in ("_modidx.py",) and p.read_text(encoding="utf-8").strip()}


def imported(module, path):
    "一个模块装载的本库模块，函数里面的和写成字符串的也算。"
    package = ["vembed_nb", *module.split(".")][:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1] + ([node.module] if node.module else [])) if node.level else node.module
            names = [f"{base}.{a.name}" if f"{base}.{a.name}".removeprefix("vembed_nb.") in ROOMS else base for a in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"vembed_nb(\.\w+)+", node.value): names = [node.value]
        else: continue
        found |= {n.removeprefix("vembed_nb.") for n in names if n.startswith("vembed_nb.") and n.removeprefix("vembed_nb.") in ROOMS}
        found |= {"__init__" for n in names if n == "vembed_nb"}
    return found - {module}


GRAPH = {m: imported(m, p) for m, p in MODULES.items()}


def test_every_notebook_is_a_room():
    "每个带编号的 notebook 恰好一个模块，名字与文件名相同，编号不重复。"
    numbered = [p for p in NBS if re.match(r"\d\d_", p.name)]
    names = {p.stem[3:]: p for p in numbered}
    rename = {"init": "__init__"}
    assert {rename.get(n, n) for n in names} == set(ROOMS)
    assert len({p.name[:2] for p in numbered}) == len(numbered)
    assert set(MODULES) == set(ROOMS)


def test_floors():
    "只能装载编号更小的房间。"
    wrong = [f"{m}（{ROOMS[m][0]:02d}）装载了 {d}（{ROOMS[d][0]:02d}）" for m, deps in GRAPH.items() if m not in TOP for d in deps if d in TOP or ROOMS[d][0] >= ROOMS[m][0]]
    assert not wrong, "\n".join(wrong)
    assert "core" in GRAPH["config"] and "train.trainer" in GRAPH["quickstart"] and "search.searcher" in GRAPH["cli"], "解析装载关系的代码坏了"


def test_directions():
    "data 不知道模型，损失只知道向量和别的损失，模型不知道训练。"
    floor = lambda m: m.split(".")[0]
    wrong = [f"{m} → {d}" for m, deps in GRAPH.items() for d in deps
             if (floor(m) == "data" and floor(d) in ("models", "losses", "train", "search", "evaluate")) or (floor(m) == "losses" and floor(d) != "losses" and d not in ("core", "vectors"))
             or (floor(m) == "models" and floor(d) in ("losses", "train", "search", "evaluate"))]
    assert not wrong, wrong


def test_no_cycles():
    from graphlib import TopologicalSorter

    list(TopologicalSorter({m: d for m, d in GRAPH.items() if m not in TOP}).static_order())


def test_no_module_named_like_an_export():
    "`from vembed_nb import launch` 是函数，不能同时是一个子模块。"
    import vembed_nb

    assert not {n for n in vembed_nb._ROOMS if n in {m.split(".")[0] for m in MODULES}}


HEAVY = "torch transformers gradio faiss matplotlib datasets peft accelerate PIL numpy pandas rich typer".split()


def test_import_is_cheap():
    "`import vembed_nb` 至多 0.3 秒（三次里最快的一次），不带上任何大包。"
    seconds = []
    for _ in range(3):
        err = subprocess.run([sys.executable, "-X", "importtime", "-c", "import vembed_nb"], capture_output=True, text=True, check=True, cwd=ROOT).stderr
        lines = {m[2]: int(m[1]) for m in re.finditer(r"^import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)$", err, re.M)}
        seconds.append(lines["vembed_nb"] / 1e6)
        assert not [h for h in HEAVY if h in lines], [h for h in HEAVY if h in lines]
    assert min(seconds) <= 0.3, seconds


def test_every_export_at_the_top_works():
    "顶层的每个名字都在，也都写进了 dir()。"
    code = "import vembed_nb as v; print([n for n in v._ROOMS if getattr(v, n, None) is None or n not in dir(v)])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip() == "[]"


DRAWING = "toydraw"  # 画笔一类的小函数有几十个；这个房间里只要求被别的房间用到的那些写全说明


def used_elsewhere(module):
    "别的房间（和顶层）从一个模块里取用的名字。"
    import vembed_nb

    names = {n for n, m in vembed_nb._ROOMS.items() if m == module}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").removeprefix("vembed_nb.") == module: names |= {a.name for a in node.names}
    return names


def undocumented(module):
    "一个模块里没有说明的公开的函数、类和参数。"
    from fastcore.docments import docments

    mod, out = import_module(f"vembed_nb.{module}"), []
    wanted = used_elsewhere(module) if module == DRAWING else mod.__all__
    for name in wanted:
        obj = getattr(mod, name)
        if not (inspect.isfunction(obj) or inspect.isclass(obj)) or not obj.__module__.startswith("vembed_nb"): continue
        if not obj.__doc__: out.append(f"{module}.{name} 没有 docstring")
        if module == "cli" or (inspect.isclass(obj) and "__init__" not in vars(obj)): continue  # 命令的参数由 --help 说明，见 test_cli
        named = [k for k, p in inspect.signature(obj).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and k not in ("self", "cls")]
        docs = docments(obj)
        out += [f"{module}.{name} 的参数 {k} 没有说明" for k in named if not docs.get(k)]
    return out


@pytest.mark.parametrize("module", sorted(m for m in ROOMS if m != "__init__"))
def test_documented(module):
    "公开的函数和类有 docstring，参数各有一行说明。"
    missing = undocumented(module)
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("path", [p for _, p in ROOMS.values()], ids=lambda p: p.stem)
def test_exported_cells(path):
    "导出的 cell 不超过 60 行；装载自成一格。"
    for c in cells(path):
        text = source(c)
        if c["cell_type"] != "code" or not re.search(r"^#\|\s*export\s*$", text, re.M): continue
        lines = [line for line in text.splitlines() if not line.startswith("#|")]
        assert len(lines) <= 60, f"{path.name} 有一个 {len(lines)} 行的导出 cell：{lines[0]}"
        kinds = {isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse("\n".join(lines)).body}
        assert len(kinds) <= 1, f"{path.name} 的 cell {lines[0]!r} 把装载和别的代码写在一起，文档构建会坏"


PRIVATE = re.compile(r"/work/|/root/|/home/\w+/|/Users/\w+/|/tmp/\w|[A-Z]:\\\\Users")
EMOJI = re.compile("[\U0001F000-\U0001FAFF\u2600-\u27BF\uFE0F]")


@pytest.mark.parametrize("path", ALL, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_notebook_form(path):
    "开头、机器上的路径、标题里的 emoji、输出的大小、存下来的错误。"
    body = cells(path)
    first = source(body[0])
    assert body[0]["cell_type"] == "markdown" and first.startswith("# ") and "\n> " in first, "第一格要是「# 标题」和「> 一句话」"
    for c in body:
        text = source(c)
        outputs = json.dumps(c.get("outputs", []), ensure_ascii=False)
        for what, where in (("正文", text), ("输出", outputs)):
            assert not PRIVATE.search(where), f"{what}里有这台机器的路径：{PRIVATE.search(where)[0]!r}，在 {text[:60]!r}"
        if c["cell_type"] == "markdown":
            bad = [line for line in text.splitlines() if re.match(r"#{1,6} ", line) and EMOJI.search(line)]
            assert not bad, bad
        assert len(outputs.encode()) <= 150_000, f"一个 cell 的输出有 {len(outputs.encode())} 字节：{text[:60]!r}"
        errors = [o for o in c.get("outputs", []) if o["output_type"] == "error"]
        assert not errors, f"存下了错误输出：{errors[0]['ename']}，在 {text[:60]!r}"
    assert path.stat().st_size <= 1_000_000


@pytest.mark.parametrize("path", sorted(p for d in ("vembed_nb", "tests", "configs", "assets/results", "benchmarks") for p in (ROOT / d).rglob("*") if p.suffix in (".py", ".yaml", ".json", ".md") and "__pycache__" not in p.parts and p != Path(__file__)),
                         ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_machine_paths(path):
    found = PRIVATE.search(path.read_text(encoding="utf-8"))
    assert not found, found[0]


def test_tiny_weights():
    "随包的小模型：每个 ≤ 8 MB，一共 ≤ 30 MB，fp16，说明里写着出处。"
    from safetensors import safe_open

    from vembed_nb.tiny import TINY, tiny_facts, tiny_path

    total = 0
    for name in TINY:
        folder = tiny_path(name)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        total += size
        assert size <= 8_000_000, f"{name} 有 {size} 字节"
        kinds = set()
        for path in folder.rglob("*.safetensors"):
            with safe_open(path, "pt") as f: kinds |= {f.get_slice(k).get_dtype() for k in f.keys()}
        assert kinds <= {"F16", "I64"} and "F16" in kinds, f"{name}：{kinds}"
        facts = tiny_facts(name)
        assert {"seed", "steps", "machine", "versions"} <= set(facts), f"{name} 的 vembed.json 没有写明种子、步数、机器和版本：{sorted(facts)}"
    assert total <= 30_000_000, total
    assert {p.name for p in (LIB / "_data" / "tiny").iterdir()} == set(TINY), "文件夹与 TINY 这张表不一致"


def test_package_data_is_readable():
    "随包文件对所有用户可读。"
    assert not [p for p in (LIB / "_data").rglob("*") if p.is_file() and p.stat().st_mode & 0o044 != 0o044]


def test_requirements_have_lower_bounds():
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    meta = cfg["DEFAULT"]
    needs = [r for k, v in meta.items() if k in ("requirements", "dev_requirements") or k.startswith("extra_") for r in v.split()]
    loose = [r for r in needs if not re.fullmatch(r"[\w.\-\[\]]+>=\d[\w.]*", r)]
    assert not loose, loose
    assert "torchvision" not in " ".join(needs), "PyPI 的 torchvision 与 CPU 的 torch 合不来"
    assert {"torch", "transformers", "peft", "accelerate", "datasets", "faiss-cpu", "matplotlib", "ipywidgets", "gradio"} <= {r.split(">")[0] for r in meta["requirements"].split()}


def test_constraints_cover_requirements():
    "constraints.txt 给每个基础依赖一个试过的版本，而且满足下限。"
    from packaging.requirements import Requirement

    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()]
    norm = lambda n: re.sub(r"[-_.]+", "-", n).lower()
    pinned = {norm(r.name): str(r.specifier).removeprefix("==") for r in (Requirement(line) for line in lines if line)}
    for text in cfg["DEFAULT"]["requirements"].split():
        r = Requirement(text)
        assert norm(r.name) in pinned and r.specifier.contains(pinned[norm(r.name)]), f"{r} 与 constraints.txt 的 {pinned.get(norm(r.name))}"


@pytest.mark.parametrize("path", sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "tutorials_zh").glob("*.ipynb")]) + [ROOT / n for n in ("README.md", "STYLE.md", "CONTRIBUTING.md", "CHANGELOG.md")], ids=lambda p: p.stem)
def test_chinese_typography(path):
    "中文与拉丁字母之间空一格，标点用全角：autocorrect 不该有要改的。"
    autocorrect = pytest.importorskip("autocorrect_py")
    texts = ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"] if path.suffix == ".ipynb" else [path.read_text(encoding="utf-8")]
    wrong = [(a, b) for t in texts for a, b in zip(t.splitlines(), autocorrect.format_for(t, "markdown").splitlines()) if a != b]
    assert not wrong, f"{path.name}：{wrong[:3]}"
