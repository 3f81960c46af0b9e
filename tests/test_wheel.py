"""装好的包：轮子里什么都不缺，不在仓库里也能用。"""
import configparser
import json
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "从一份干净的拷贝造轮子（仓库里不留 build/）。"
    import shutil

    source, out = tmp_path_factory.mktemp("source") / "repo", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "settings.ini", "README.md", "LICENSE"): shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "vembed_nb", source / "vembed_nb", ignore=shutil.ignore_patterns("__pycache__"))
    isolate = [] if int(version("setuptools").split(".")[0]) < 77 else ["--no-build-isolation"]  # 环境里的 setuptools 够新就不必再下载一份
    r = subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", *isolate, "-q", "-w", str(out), str(source)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    to = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as z: z.extractall(to)
    return to


def names(wheel):
    with zipfile.ZipFile(wheel) as z: return set(z.namelist())


def test_every_module_and_every_data_file(wheel):
    files = names(wheel)
    want = {p.relative_to(ROOT).as_posix() for p in (ROOT / "vembed_nb").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert not want - files, sorted(want - files)
    for kind in ("_data/tiny/tiny-clip/model.safetensors", "_data/fonts/OFL.txt", "_data/splits/emoji.json", "data/read.py", "cli.py"): assert f"vembed_nb/{kind}" in files
    assert any(f.startswith("vembed_nb/_data/fonts/") and f.endswith((".otf", ".ttf")) for f in files)


def test_every_tiny_model_is_inside(wheel):
    from vembed_nb.tiny import TINY

    files = names(wheel)
    for name in TINY:
        want = [p.relative_to(ROOT).as_posix() for p in (ROOT / "vembed_nb/_data/tiny" / name).rglob("*") if p.is_file()]
        assert f"vembed_nb/_data/tiny/{name}/vembed.json" in want and any(f.endswith(".safetensors") for f in want) and any(f.endswith("tokenizer.json") for f in want)
        missing = [f for f in want if f not in files]
        assert not missing, f"{name} 缺 {missing}"


def test_nothing_else_is_inside(wheel):
    "只有本包和它的元数据；不到 25 MB。"
    tops = {f.split("/")[0] for f in names(wheel)}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"vembed_nb"}
    assert not [f for f in names(wheel) if "__pycache__" in f or f.endswith((".ipynb", ".pyc"))]
    assert wheel.stat().st_size < 25_000_000


def test_metadata(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    meta = Parser().parsestr((info / "METADATA").read_text(encoding="utf-8"))
    cfg = configparser.ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    import vembed_nb

    assert meta["Name"] == "vembed-nb" and meta["Version"] == vembed_nb.__version__ and meta["Requires-Python"] == f">={cfg['DEFAULT']['min_python']}"
    base = [r for r in meta.get_all("Requires-Dist") if "extra ==" not in r]
    assert sorted(base) == sorted(cfg["DEFAULT"]["requirements"].split())
    assert {"dev", *(k.removeprefix("extra_").replace("_", "-") for k in cfg["DEFAULT"] if k.startswith("extra_"))} == set(meta.get_all("Provides-Extra"))
    dev = [r.split(";")[0].strip() for r in meta.get_all("Requires-Dist") if r.endswith('extra == "dev"')]
    assert sorted(dev) == sorted(cfg["DEFAULT"]["dev_requirements"].split()) and any(r.startswith("sentence-transformers>=") for r in dev)
    assert not [r for r in meta.get_all("Requires-Dist") if r.startswith("torchvision")]
    entry = configparser.ConfigParser(delimiters=["="])
    entry.read(info / "entry_points.txt")
    assert entry["console_scripts"]["vembed"] == "vembed_nb.cli:main" and entry["nbdev"]["vembed_nb"] == "vembed_nb._modidx:d"
    assert list(info.rglob("LICENSE*"))


CODE = """
import json, sys
import vembed_nb
light = "torch" not in sys.modules
from vembed_nb import Predictor, load_encoder
from vembed_nb.fonts import font_for
v = Predictor("tiny-clip").encode_text("一只猫")
print(json.dumps({"where": vembed_nb.__file__, "light": light, "shape": list(v.shape), "font": str(font_for("红色的杯子", 20).getname()[0])}))
"""


def test_works_outside_the_repository(unpacked, tmp_path):
    "从解开的轮子里用：随包的模型和字体都找得到。"
    env = {**os.environ, "PYTHONPATH": str(unpacked)}
    r = subprocess.run([sys.executable, "-c", CODE], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    got = json.loads(r.stdout)
    assert Path(got["where"]).is_relative_to(unpacked) and got["light"] and got["shape"] == [128] and got["font"]
    r = subprocess.run([sys.executable, "-c", "import sys; from vembed_nb.cli import main; sys.exit(main(['train', '--help']))"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert r.returncode == 0 and "learning_rate" in r.stdout
