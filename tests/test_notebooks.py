"""每个 notebook 都要能从头跑到尾。两个子进程同时跑，结果按名字领取。"""
import io
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for d in ("nbs", "tutorials_zh") for p in (ROOT / d).glob("*.ipynb") if not p.name.startswith(("_", ".")))
SKIP = "notest gpu net slow"  # 与 pyproject.toml 的 tst_flags 相同


def run_notebook(path):
    "在子进程里跑一个 notebook；返回 (通过与否, 报错的文字)。"
    import matplotlib.pyplot as plt
    from nbdev.test import test_nb

    err, old, paths, cwd = io.StringIO(), sys.__stderr__, list(sys.path), os.getcwd()
    sys.__stderr__ = err
    try:
        ok, _ = test_nb(path, skip_flags=SKIP.split(), basepath=ROOT, cell_timeout=300)
    finally:
        sys.__stderr__, sys.path[:] = old, paths
        os.chdir(cwd)
        plt.close("all")
    return ok, err.getvalue()


@pytest.fixture(scope="module")
def results(request):
    "选中的 notebook 全部交给两个子进程，各测试按需等待。"
    wanted = [i.callspec.params["path"] for i in request.session.items if i.name.startswith("test_notebook[") and i.path == Path(__file__)]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        yield {p: pool.submit(run_notebook, p) for p in wanted}
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_notebook(path, results):
    ok, err = results[path].result(timeout=1200)
    assert ok, f"{path.name} 跑不通：\n{err[-4000:]}"


def _notebook(folder, *sources):
    "写一个只有代码 cell 的 notebook。"
    import nbformat

    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s) for s in sources])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, folder / "case.ipynb")
    return folder / "case.ipynb"


@pytest.mark.parametrize("sources, ok", [
    (["x = 1", "assert x == 1"], True),
    (["x = 1", "assert x == 2, '坏消息'"], False),
    (["#| notest\nassert False", "#| gpu\nassert False", "#| net\nassert False", "#| slow\nassert False"], True),
    (["import os\nassert os.environ['VEMBED_PROGRESS'] == '0' and os.environ['VEMBED_MODE'] == 'mini'"], True),
], ids=["passes", "fails", "flags", "environment"])
def test_the_runner_itself(tmp_path, sources, ok):
    "坏的 notebook 必须真的失败，并说出原因；带标记的 cell 必须真的跳过。"
    got, err = run_notebook(_notebook(tmp_path, *sources))
    assert got is ok
    assert ok or "坏消息" in err


def test_flags_match_pyproject():
    import tomllib

    assert tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["nbdev"]["tst_flags"] == SKIP
