"""生成的东西和它的来源一致：导出的模块、清理过的 notebook、README。"""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import readme

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NB_DIRS = ("nbs", "tutorials_zh")


def snapshot(folder, pattern):
    "文件夹里匹配的文件：相对路径 → 内容。"
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob(pattern) if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "仓库里与导出、清理有关的部分的一份拷贝。"
    to = tmp_path_factory.mktemp("repo") / ROOT.name
    to.mkdir()
    for name in ("pyproject.toml", "settings.ini", "setup.py"): shutil.copy(ROOT / name, to)
    for name in (*NB_DIRS, "vembed_nb"):
        if (ROOT / name).is_dir(): shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("_data", "__pycache__", ".ipynb_checkpoints"))
    return to


def differing(before, after):
    return sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))


def test_export_changes_nothing(copy):
    before = snapshot(ROOT / "vembed_nb", "*.py")
    subprocess.run([str(BIN / "nbdev-export")], cwd=copy, check=True, capture_output=True, text=True)
    stale = differing(before, snapshot(copy / "vembed_nb", "*.py"))
    assert not stale, f"先在仓库里运行 nbdev-export：{stale}"


def test_every_module_has_a_notebook():
    "vembed_nb 里没有手写的模块：每个非空的 .py 都说出自己的 notebook，而那个 notebook 在。"
    for path in (ROOT / "vembed_nb").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name == "_modidx.py" or not text.strip(): continue
        name = text.split("File to edit: ", 1)[1].split(".ipynb", 1)[0] + ".ipynb"
        assert (path.parent / name).resolve().exists(), f"{path} 说它来自 {name}，但没有这个文件"


def test_clean_changes_nothing(copy):
    for folder in NB_DIRS:
        before = snapshot(ROOT / folder, "*.ipynb")
        if not before: continue
        subprocess.run([str(BIN / "nbdev-clean"), "--fname", folder], cwd=copy, check=True, capture_output=True, text=True)
        dirty = differing(before, snapshot(copy / folder, "*.ipynb"))
        assert not dirty, f"先在仓库里运行 nbdev-clean --fname {folder}：{dirty}"


def test_readme_is_generated():
    fresh = (ROOT / "README.md").read_text(encoding="utf-8") == readme.render(ROOT / "nbs" / "index.ipynb")
    assert fresh, "先运行 python tests/readme.py"


def test_readme_links_exist():
    "README 里的相对链接都指向仓库里的文件。"
    import re

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text) + re.findall(r"(?:src|href)=\"(?!https?:|#)([^\"]+)\"", text)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, missing


def test_render(tmp_path):
    "生成器自己：标题、代码、输出、隐藏的 cell、链接。"
    import nbformat
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

    cells = [
        new_markdown_cell("# 名字\n\n> 一句话\n\n![图](../assets/a.png) [课](10_x.ipynb) [外](https://e.org/../a)"),
        new_code_cell("#| hide\nsecret = 1"),
        new_code_cell("#| eval: false\nprint('你好')", outputs=[new_output("stream", name="stdout", text="你好\n"), new_output("stream", name="stderr", text="warning\n")]),
        new_code_cell("#| echo: false\n1", outputs=[new_output("execute_result", data={"text/markdown": "| a |\n|---|", "text/plain": "x"})]),
        new_code_cell("!pip install -e ."),
        new_markdown_cell("<!-- 注释 -->\n尾"),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "index.ipynb")
    text = readme.render(tmp_path / "index.ipynb")
    head = text.splitlines()
    assert head[0] == "# 名字" and head[-1].startswith("<!-- 由 nbs/index.ipynb 生成")
    assert "secret" not in text and "warning" not in text and "#|" not in text
    assert "```python\nprint('你好')\n```\n\n```\n你好\n```" in text
    assert "| a |\n|---|" in text and "```python\n1\n```" not in text
    assert "```sh\npip install -e .\n```" in text
    assert "](assets/a.png)" in text and "](nbs/10_x.ipynb)" in text and "https://e.org/../a" in text
    nbformat.write(new_notebook(cells=cells[1:]), tmp_path / "bad.ipynb")
    with pytest.raises(SystemExit): readme.render(tmp_path / "bad.ipynb")
