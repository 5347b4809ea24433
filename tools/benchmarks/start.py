"""Start

> How long it takes until the package has begun: an import, the help, the list of methods.

In: the package as it is installed. Out: `figures/benchmarks/start.json`. Wanted, on the wall: the import within 0.3 s, `cap --help`
within 0.5 s, `cap methods` within 1 s. The record is made in half a minute, on a machine that does nothing else, by
`python -m tools.benchmarks.start`. Each command is a process of its own, Python alone beside them. One round before the others is
not kept: it brings the files into memory and keeps what Python compiles, as it does for a user.
"""
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from cap_nb.core.errors import BadInput
from cap_nb.portable.speed import span_text
from tools.side_by_side import RECORDS, measured_case, measured_rounds, wanted_text

path = RECORDS / "start.json"
PYTHON, CAP = sys.executable, str(Path(sys.executable).with_name("cap"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
COMMANDS = {"python alone": [PYTHON, "-c", "pass"], "import cap_nb": [PYTHON, "-c", "import cap_nb"], "cap --help": [CAP, "--help"],
            "cap methods": [CAP, "methods"]}
WANTED = {"import cap_nb": 0.3, "cap --help": 0.5, "cap methods": 1.0}


def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed_process(command, spent):
    "A call that runs a command in a process and gives its seconds; those of the processor are added to `spent`."

    def timed():
        before, start = processor_seconds(), time.perf_counter()
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise BadInput(f"{' '.join(command)} failed, {done.stderr[-200:]!r}: expected it to end well.")
        spent.append(processor_seconds() - before)
        return seconds

    return timed


def start_case(path, commands=COMMANDS, repeats=5):
    def measure():
        spent = {name: [] for name in commands}
        calls = {name: timed_process(command, spent[name]) for name, command in commands.items()}
        seconds = measured_rounds(calls, repeats, warmups=1)
        processor = {f"{name}, processor": tuple(each[-repeats:]) for name, each in spent.items()}
        return {"seconds": seconds | processor, "about": {"wanted": WANTED}}

    return measured_case(path, "start", {"repeats": repeats, "commands": list(commands)}, measure)


if __name__ == "__main__":
    seconds = start_case(path)["seconds"]
    for name in COMMANDS:
        more = wanted_text(seconds[name], WANTED[name], more=False) if name in WANTED else ""
        print(f"{name}: {span_text(seconds[name])} s, processor {span_text(seconds[f'{name}, processor'])} s{more}")
