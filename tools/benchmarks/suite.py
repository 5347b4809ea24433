"""The suite and the demo

> How long `make demo` takes with its installation, and `make test` after it, in a fresh clone.

Out: `figures/benchmarks/suite.json`. Wanted on two cores: six minutes for the demo, ten for the suite. On a machine
that does nothing else, half an hour, once: python -m tools.benchmarks.suite.
"""

import os
import subprocess
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


if __name__ == "__main__":
    print(suite_case(path)["seconds"])
