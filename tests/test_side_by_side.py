"""What is measured side by side: nothing is measured twice or lost, memory is a process's own, and the records that are kept say where they come from."""
import json
import re

import pytest

from cap_nb.core.errors import BadInput
from cap_nb.core.memory import PEAK
from cap_nb.experiments.side_by_side import in_own_process, measured_case, measured_rounds, read_cases, told_missing
from conftest import ROOT
from notebooks_on_disk import NOTEBOOKS, cells, label

BENCHMARKS = [path for path in NOTEBOOKS if path.parent.name == "benchmarks"]
RECORDS = sorted((ROOT / "figures" / "benchmarks").glob("*.json"))


def made(seconds=1.0):
    return {"seconds": {"a": (seconds, 2.0)}, "about": {}}


def test_a_benchmark_that_was_stopped_goes_on(tmp_path):
    path = tmp_path / "made.json"

    def stopped():
        raise KeyboardInterrupt

    measured_case(path, "one", {"repeats": 2}, made)
    with pytest.raises(KeyboardInterrupt):
        measured_case(path, "two", {"repeats": 2}, stopped)
    assert list(read_cases(path)) == ["one"] and "two" in told_missing(read_cases(path), ("one", "two"), "again")
    measured_case(path, "two", {"repeats": 2}, lambda: made(5.0))
    assert measured_case(path, "one", {"repeats": 2}, stopped)["seconds"]["a"] == [1.0, 2.0]
    assert [case["seconds"]["a"][0] for case in read_cases(path).values()] == [1.0, 5.0]


def test_other_settings_are_not_taken_for_these(tmp_path):
    measured_case(tmp_path / "made.json", "one", {"values": (1, 2)}, made)
    measured_case(tmp_path / "made.json", "one", {"values": [1, 2]}, made)  # a tuple is a list in JSON
    with pytest.raises(BadInput, match="other settings"):
        measured_case(tmp_path / "made.json", "one", {"values": (1, 3)}, made)


def test_every_side_is_measured_once_a_round():
    order = []
    sides = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    seconds = measured_rounds(sides, repeats=4, warmups=2)
    assert [sorted(order[place:place + 3]) for place in range(0, 18, 3)] == [["a", "b", "c"]] * 6
    assert [len(values) for values in seconds.values()] == [4] * 3 and min(map(min, seconds.values())) == 7


@pytest.mark.skipif(not PEAK.exists(), reason="this system does not tell its peak memory")
def test_memory_is_that_of_the_own_process():
    """400 MB held here do not count there; 200 MB held there do, though they are given back before the end."""
    _, little = in_own_process("builtins:bytearray")
    held = bytearray(400 * 2**20)
    _, beside = in_own_process("builtins:bytearray")
    _, large = in_own_process("numpy:ones", shape=200 * 2**17)  # of 8 bytes each
    assert len(held) and abs(beside - little) < 100 * 2**20 < large - little


@pytest.mark.parametrize("path", BENCHMARKS, ids=label)
def test_a_benchmark_begins_with_its_command(path):
    first, slow = cells(path)[0].source, [c for c in cells(path) if "slow" in c.directives]
    command = f"python tools/notebooks.py --flags slow {path.relative_to(ROOT).as_posix()}"
    assert command in first and slow
    assert re.search(r"figures/benchmarks/\w+\.json", first)


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.name)
def test_kept_records_say_where_they_come_from(path):
    for name, case in read_cases(path).items():
        assert min(len(values) for values in case["seconds"].values()) >= 5, f"{path.name}, {name}: fewer than five rounds"
        machine = case["machine"]
        assert machine["processor"] and machine["threads"] and machine["memory"] and machine["commit"], f"{path.name}, {name}: no machine"
        assert {"load", "note"} <= machine.keys(), f"{path.name}, {name}: what else was running is not told"
        assert str(ROOT) not in json.dumps(case)


def test_there_are_benchmarks():
    assert [label(path) for path in BENCHMARKS] == [f"benchmarks/{name}.ipynb" for name in ("00_scoring", "01_scaling", "02_threshold", "03_streaming", "04_gpu", "05_generation")]
