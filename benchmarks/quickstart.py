"三个种子各跑一次 `vembed quickstart`，写 assets/results/quickstart.json 和首页的画廊。用法：python benchmarks/quickstart.py"
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SEEDS = (42, 43, 44)
root = Path(__file__).parent.parent


def main():
    reports = []
    with tempfile.TemporaryDirectory() as d:
        for seed in SEEDS:
            out = Path(d)/str(seed)
            subprocess.run([sys.executable, "-c", "from vembed_nb.cli import main; raise SystemExit(main())", "quickstart", "--out", str(out), "--seed", str(seed)], check=True)
            reports.append(json.loads((out/"report.json").read_text(encoding="utf-8")))
        shutil.copy(Path(d)/str(SEEDS[0])/"gallery.png", root/"assets/img/quickstart_gallery.png")
    middle = sorted(reports, key=lambda r: r["after"]["hit@1"])[len(SEEDS) // 2]
    median = lambda f: statistics.median(f(r) for r in reports)
    first = reports[0]
    result = dict(
        seeds=list(SEEDS), n_queries=first["n_queries"], n_corpus=first["n_corpus"], machine=first["machine"], versions=first["versions"], mode=first["mode"],
        median=dict({side: {k: median(lambda r: r[side][k]) for k in first[side]} for side in ("before", "after")}, seconds=median(lambda r: r["seconds"]),
                    train_seconds=median(lambda r: r["stages"]["train"]), peak_memory_mb=median(lambda r: r["peak_memory_mb"]),
                    gain=median(lambda r: r["after"]["hit@1"] - r["before"]["hit@1"]), ci_before=middle["ci"]["before"]["hit@1"], ci_after=middle["ci"]["after"]["hit@1"]),
        runs=[{k: r[k] for k in ("seed", "seconds", "stages", "peak_memory_mb", "before", "after", "ci", "training")} for r in reports])
    (root/"assets/results").mkdir(parents=True, exist_ok=True)
    (root/"assets/results/quickstart.json").write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result["median"], ensure_ascii=False, indent=2))


if __name__ == "__main__":
    main()
