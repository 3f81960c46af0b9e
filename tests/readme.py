"""从 nbs/index.ipynb 生成 README.md，不需要 Quarto。用法：python tests/readme.py"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {"hide", "exporti", "default_exp"}  # 带这些标记的 cell 不进 README
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def directives(source):
    "一个 cell 的 `#| …` 标记和去掉标记之后的正文。"
    lines = source.splitlines()
    marks = [m[1].split() for line in lines if (m := re.match(r"\s*#\|\s*(.+)", line))]
    return {m[0].rstrip(":"): m[1:] for m in marks if m}, "\n".join(line for line in lines if not re.match(r"\s*#\|", line)).strip("\n")


def fence(text, language=""):
    "围栏代码块；正文里有三个反引号时用更长的围栏。"
    bar = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{bar}{language}\n{text}\n{bar}"


def output(out):
    "一个输出变成 Markdown；图片和小部件不进 README（正文用 assets 里的图）。"
    if out["output_type"] == "stream": text = "".join(out["text"]) if out.get("name") == "stdout" else ""
    elif out["output_type"] in ("execute_result", "display_data"):
        data = out.get("data", {})
        if "text/markdown" in data: return "".join(data["text/markdown"]).strip()
        text = "" if any(k.startswith(("image/", "application/", "text/html")) for k in data) else "".join(data.get("text/plain", ""))
    else: text = ""
    text = ANSI.sub("", text).rstrip()
    return fence(text) if text else ""


def code_cell(cell):
    "一个代码 cell：代码，然后是它的文字输出。遵守 hide、echo: false 和 output: false。"
    marks, source = directives("".join(cell["source"]))
    if SKIPPED & set(marks): return ""
    off = lambda name: marks.get(name, [""])[0] == "false"
    shell = source.startswith("%%bash") or source.startswith("!")
    body = source.removeprefix("%%bash").strip("\n") if source.startswith("%%bash") else re.sub(r"^!", "", source, flags=re.M) if shell else source
    parts = [] if off("echo") or "hide_input" in marks or not body else [fence(body, "sh" if shell else "python")]
    if not off("output") and "hide_output" not in marks: parts += [output(o) for o in cell.get("outputs", [])]
    return "\n\n".join(filter(None, parts))


def markdown_cell(cell):
    "Markdown cell；指向上一层的相对链接改成从仓库根目录出发。"
    marks, source = directives("".join(cell["source"]))
    if SKIPPED & set(marks): return ""
    source = re.sub(r"(\]\(|src=\"|href=\")\.\./", r"\1", source)
    return re.sub(r"(\]\()(?!https?:|#|/|mailto:)([\w.\-]+\.ipynb)", r"\1nbs/\2", source).strip()


def render(index_nb) -> str:
    "README 的全文。第一个 cell 要以一级标题开头。"
    cells = json.loads(Path(index_nb).read_text(encoding="utf-8"))["cells"]
    parts = [{"markdown": markdown_cell, "code": code_cell}.get(c["cell_type"], lambda _: "")(c) for c in cells]
    text = "\n\n".join(filter(None, parts)) + "\n"
    if not text.startswith("# "): raise SystemExit(f"{index_nb} 的第一个 cell 要以「# 标题」开头")
    return text + "\n<!-- 由 nbs/index.ipynb 生成（python tests/readme.py），不要手改。 -->\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(render(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
    print("README.md 已更新", file=sys.stderr)
