"""What is measured side by side: nothing is measured twice or lost, memory is a process's own, and the records that are kept say where they come from."""
import functools
import json
import re

import pytest
import torch
from fixtures import counted, refuses, tiny_config

from cap_nb.core.files import write_checked
from cap_nb.core.devices import PEAK
from cap_nb.methods.resumed_scoring import shared_prefix
from cap_nb.jobs.planning import ExampleLength, lengths_of
from cap_nb.models.loading import load_model
from cap_nb.portable.speed import span_text
from conftest import ROOT
from tools.side_by_side import (
    ScoringRounds, about_scoring, balanced_heads, behind_worked_examples, compared_scoring, counted_work, examples_at_hand, examples_of_lengths,
    fastest_product, gain_for_all, in_own_process, matrix_product, measured_case, measured_rounds, measured_scoring, named_machine,
    random_model, read_cases, scoring_sides, seconds_for_all, share_reached, stopwatch, wanted_text)

CPU = torch.device("cpu")
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
    assert list(read_cases(path)) == ["one"]
    measured_case(path, "two", {"repeats": 2}, lambda: made(5.0))
    assert measured_case(path, "one", {"repeats": 2}, stopped)["seconds"]["a"] == [1.0, 2.0]
    assert [case["seconds"]["a"][0] for case in read_cases(path).values()] == [1.0, 5.0]


def test_other_settings_are_not_taken_for_these(tmp_path):
    measured_case(tmp_path / "made.json", "one", {"values": (1, 2)}, made)
    measured_case(tmp_path / "made.json", "one", {"values": [1, 2]}, made)  # a tuple is a list in JSON
    refuses("other settings", measured_case, tmp_path / "made.json", "one", {"values": (1, 3)}, made)


@pytest.mark.skipif(not PEAK.exists(), reason="this system does not report its peak memory")
def test_memory_is_that_of_the_own_process():
    """400 MB held here do not count there; 200 MB held there do, though they are given back before the end."""
    _, little = in_own_process("builtins:bytearray")
    held = bytearray(400 * 2**20)
    _, large = in_own_process("numpy:ones", shape=200 * 2**17)  # of 8 bytes each
    assert len(held) and 100 * 2**20 < large - little < 350 * 2**20


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.name)
def test_kept_records_say_where_they_come_from(path):
    for name, case in read_cases(path).items():
        rounds = 1 if path.name in ("small_files.json", "suite.json", "gpu.json") else 5  # those compare no times
        assert min(len(values) for values in case["seconds"].values()) >= rounds, f"{path.name}, {name}: fewer than {rounds} rounds"
        machine = case["machine"]
        assert machine["processor"] and machine["threads"] and machine["memory"] and machine["commit"], f"{path.name}, {name}: no machine"
        assert {"load", "note"} <= machine.keys(), f"{path.name}, {name}: what else was running is not noted"
        assert not re.search(r"(?<![\w.])/(?:home|root|Users|work|tmp)/|" + re.escape(f"{ROOT}/"), json.dumps(case))


def test_sides_take_turns_and_change_who_begins():
    now, order = [0.0], []

    def moves(name, seconds):
        order.append(name)
        now[0] += seconds + len(order) // 2  # two calls make a round

    sides = {name: stopwatch(lambda name=name, seconds=seconds: moves(name, seconds), clock=lambda: now[0]) for name, seconds in (("fast", 1), ("slow", 3))}
    assert measured_rounds(sides, repeats=3) == {"fast": (2.0, 4.0, 4.0), "slow": (5.0, 5.0, 7.0)}
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    refuses("repeats", measured_rounds, sides, repeats=0)


def test_rounds_in_words():
    assert span_text((2.5, 1.25, 1.75)) == "1.75 (1.25 to 2.50)" and span_text((3.0,), 0) == "3 (3 to 3)"
    assert [wanted_text((2.5, 1.25, 1.75), value) for value in (1.75, 1.8)] == [", wanted 1.75 or more: reached", ", wanted 1.8 or more: MISSED"]
    assert [wanted_text((3.0,), value, more=False) for value in (3, 2.5)] == [", wanted 3 or less: reached", ", wanted 2.5 or less: MISSED"]


def test_the_matrix_products_peak():
    ticks = iter(range(1000))
    assert fastest_product(CPU, torch.float32, (2, 8, 4), clock=lambda: next(ticks)) == 8
    product, flops = matrix_product(3, CPU, torch.float32, times=2)
    product()
    assert flops == 2 * 2 * 27


def test_a_machine_has_a_name_and_a_damaged_record_is_refused(tmp_path):
    machine = named_machine(CPU, "tests")
    assert machine["processor"] and machine["cores"] and machine["note"] == "tests"
    write_checked(tmp_path / "bad.json", [])
    refuses("holds no cases", read_cases, tmp_path / "bad.json")
    assert read_cases(tmp_path / "none.json") == {}


@pytest.mark.parametrize("shape", [(30, 9, 6, 1), (30, 9, 10, 2), (4, 32, 4, 2), (32, 32, 4, 8), (5, 3, 5, 3), (7, 4, 2, 4)])
def test_a_sample_of_heads_resumes_as_all_heads_do(shape):
    layers, heads, chosen, each = shape
    sample = balanced_heads(layers, heads, chosen, each)
    assert sum(layers - layer for layer, _ in sample) / len(sample) == (layers + 1) / 2
    assert (len(set(sample)), min(sample)[0], max(sample)[0]) == (chosen * each, 0, layers - 1)


@pytest.mark.parametrize("wrong", [(30, 9, 3, 1), (30, 9, 31, 1), (4, 2, 2, 3), (1, 1, 1, 1)])
def test_a_sample_that_cannot_be_balanced_is_refused(wrong):
    refuses("were asked for", balanced_heads, *wrong)


@pytest.fixture(scope="module")
def lab():
    return load_model("lab", "float32", "cpu")


@pytest.mark.parametrize("sample", [[(layer, head) for layer in range(3) for head in range(4)], [(0, 1), (2, 3)], []])
def test_operations_of_a_sample_are_those_that_torch_counts(sample):
    """To the last product, with and without a prefix that all examples share."""
    model = random_model(tiny_config(max_position_embeddings=256, attn_implementation="eager"))
    plain = examples_of_lengths([ExampleLength("made", 9 + 2 * index, 5) for index in range(6)], 50)
    for examples in (plain, behind_worked_examples(plain, plain.examples[:2])):
        for name, side in scoring_sides(model, examples, 60).items():
            assert counted_work(model, examples, 60, sample)[name] == pytest.approx(counted(functools.partial(side, sample)), rel=0.02), name


def test_examples_behind_worked_ones_and_of_given_lengths(lab):
    real, _ = examples_at_hand(lab[1], 2)
    worked = examples_at_hand(lab[1], 3, seed=1)[0].examples[:8]
    longer = behind_worked_examples(real, worked)
    assert shared_prefix(longer.examples) >= sum(len(example.input_ids) for example in worked)
    assert lengths_of(examples_of_lengths(lengths_of(real), 50)) == lengths_of(real)


def test_scoring_is_compared_before_it_is_timed(lab, tmp_path):
    model, (real, said), ticks = lab[0], examples_at_hand(lab[1], 2), iter(range(10**6))
    few, sides, product = balanced_heads(6, 6, 2, 1), scoring_sides(model, real, 4096), matrix_product(8, CPU, torch.float32)
    found = compared_scoring(sides, few, product, ScoringRounds((8,), repeats=2), clock=lambda: next(ticks))
    case = {"seconds": found["seconds"], "about": found["about"] | about_scoring(model, real, 4096, few)}
    assert gain_for_all(case) == (1.0, 1.0) and seconds_for_all(case, "resumed") == (1, 1) and case["about"]["difference"] < 1e-5
    assert share_reached(case)[0] == pytest.approx(case["about"]["flops_of_all"]["resumed"] / 1024)
    kept = measured_scoring(tmp_path / "lab.json", "lab", model, real, few, ScoringRounds((8,), repeats=1), data=said)
    assert (kept["about"]["data"], len(kept["seconds"]), read_cases(tmp_path / "lab.json")["lab"]) == (said, 5, kept)
    for other, why in ((lambda heads: sides["resumed"](heads) + 0.01, "is not compared"), (lambda heads: sides["resumed"](few[:1]), "in their heads")):
        refuses(why, compared_scoring, sides | {"other": other}, few, product, ScoringRounds((8,)))
