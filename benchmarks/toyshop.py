"玩具店写多大内存都一样：不同的图片数，各在一个新进程里写一遍，量峰值内存和速度，写 assets/results/toyshop.json。用法：python benchmarks/toyshop.py 1000 10000 100000"
import json
import subprocess
import sys
from pathlib import Path

root = Path(__file__).parent.parent
CODE = """
import json, resource, sys, tempfile, time
from vembed_nb.toyshop import write_toyshop
n = int(sys.argv[1])
with tempfile.TemporaryDirectory() as d:
    start = time.perf_counter()
    write_toyshop(d, n_train=n, n_val=100, n_test=100, n_queries=50, captions=3)
    seconds = time.perf_counter() - start
peak = lambda who: resource.getrusage(who).ru_maxrss / 1024
print(json.dumps(dict(pictures=n + 200, seconds=round(seconds, 1), pictures_per_second=round((n + 200) / seconds), peak_mb_main=round(peak(resource.RUSAGE_SELF)), peak_mb_worker=round(peak(resource.RUSAGE_CHILDREN)))))
"""


def main(sizes):
    from vembed_nb.core import machine, versions
    runs = [json.loads(subprocess.run([sys.executable, "-c", CODE, str(n)], check=True, capture_output=True, text=True).stdout) for n in sizes]
    result = dict(runs=runs, seed=42, machine=machine(), versions=versions(["numpy", "pillow"]))
    (root/"assets/results/toyshop.json").write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(runs, indent=2))


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [1000, 10000, 100000])
