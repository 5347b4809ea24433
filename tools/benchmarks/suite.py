"""The suite, the demo and the chapters

> How long `make demo` takes with its installation, and `make test` after it, in a fresh clone; and each chapter alone.

Out: `figures/benchmarks/suite.json`. Wanted on two cores: six minutes for the demo, ten for the suite, twenty seconds
for a chapter. On a machine that does nothing else, half an hour, once: python -m tools.benchmarks.suite.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cap_nb.core.errors import BadInput
from tools.side_by_side import RECORDS, measured_case

ROOT = Path(__file__).resolve().parents[2]
path = RECORDS / "suite.json"


def suite_case(path, source=ROOT, targets=("demo", "test")):
    def measure():
        seconds, last = {}, {}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder).chmod(0o755)  # some tests are another user's, who must read the clone
            subprocess.run(["git", "clone", "--quiet", str(source), folder], check=True)
            clean = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS")}
            for target in targets:
                start = time.perf_counter()
                done = subprocess.run(["make", "--no-print-directory", target], cwd=folder, env=clean, capture_output=True, text=True)
                seconds[target], last[target] = (time.perf_counter() - start,), done.stdout.strip().splitlines()[-1:]
                if done.returncode:
                    raise BadInput(f"make {target} failed: expected it to end well; it said {(done.stdout + done.stderr)[-3000:]!r}.")
        return {"seconds": seconds, "about": {"last line": last}}

    return measured_case(path, "fresh clone", {"repeats": 1, "targets": list(targets)}, measure)


def chapters_case(path, source=ROOT):
    "Each chapter executed alone, by a process and a kernel of its own."
    def measure():
        seconds = {}
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["git", "clone", "--quiet", str(source), folder], check=True)
            for chapter in sorted(Path(folder, "nbs").glob("0?_*.ipynb")):
                words = [sys.executable, str(Path(folder, "tools", "notebooks.py")), str(chapter)]
                start = time.perf_counter()
                done = subprocess.run(words, cwd=folder, env=os.environ | {"PYTHONPATH": folder}, capture_output=True, text=True)
                seconds[chapter.stem] = (time.perf_counter() - start,)
                if done.returncode:
                    raise BadInput(f"{chapter.name} failed: expected it to end well; it said {done.stderr[-3000:]!r}.")
        return {"seconds": seconds, "about": {}}

    return measured_case(path, "chapters alone", {"repeats": 1}, measure)


if __name__ == "__main__":
    print(chapters_case(path)["seconds"], suite_case(path)["seconds"])
