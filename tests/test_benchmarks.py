"""The benchmarks in small, where nothing is said of time: what they compare agrees, and what differs is noticed."""
import importlib
import itertools
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cap_nb.data.problems import load_problems
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.methods.streaming import open_checkpoint
from cap_nb.models.loading import load_model
from fixtures import made_up_calibration, refuses
from programs import cap, finished
from tools.benchmarks import generation, gpu, layer_problem, processes, scaling, scoring, start, streaming, suite, threshold
from tools.side_by_side import balanced_heads, examples_at_hand, largest_difference, measured_case, read_cases

TOY = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=50)


def test_a_masked_head_is_not_lost_in_compiled_layers():
    """Compiling is not tried, since not every machine has a C++ compiler: this backend counts what is traced and runs it as it is."""
    lab, tokenizer = load_model("lab", "float32", "cpu")
    heads, examples = balanced_heads(6, 6, 2, 1), examples_at_hand(tokenizer, 1)[0]
    graphs = []
    traced = scoring.compile_layers(load_model("lab", "float32", "cpu")[0], backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    tables = {name: score_heads(model, examples, heads=heads).masked for name, model in (("plain", lab), ("compiled", traced))}
    assert graphs and largest_difference(tables, 1e-5) < 1e-5


@pytest.mark.parametrize("axis, more", [("heads", 2), ("layers", 3), ("tokens", 16), ("examples", 4)])
def test_work_grows_along_every_axis(axis, more):
    small = dict(layers=2, heads=1, tokens=8, examples=2)
    (_, larger), (call, work) = scaling.point(**small | {axis: more}, shape=TOY), scaling.point(**small, shape=TOY)
    call()
    assert larger > work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_ways_to_a_threshold_agree(dtype):
    scores = threshold.made_scores(4, 2000, dtype)
    assert threshold.check_ways(threshold.ways(scores, 0.2), scores, 0.2)["threshold"] > 0
    wrong = threshold.ways(scores, 0.2) | {"sort": lambda: 0.0}
    refuses("disagree", threshold.check_ways, wrong, scores, 0.2)


def in_this_process(function, **given):
    module, name = function.split(":")
    getattr(importlib.import_module(module), name)(**given)
    return 0.0, 1


def test_a_checkpoint_in_shards_is_made_pruned_packed_and_restored(tmp_path, monkeypatch):
    """A folder that comes back with another hash is no record."""
    monkeypatch.setattr(streaming, "in_own_process", in_this_process)
    llama = streaming.llama | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
    streaming.random_checkpoint(tmp_path / "src", llama, 50_000)
    peaks = {}
    streaming.streaming_sides(tmp_path / "src", tmp_path / "dst", peaks)["prune"]()
    assert len(open_checkpoint(tmp_path / "src").shards) > 3 and len(peaks["prune"]) == 1 and open_checkpoint(tmp_path / "dst")
    case = streaming.packed_case(tmp_path / "s.json", "toy", llama, tmp_path, 50_000)
    about, packed = case["about"], case["about"]["packed"]
    assert set(about["peaks"]) == {"prune", *(f"{step}, {form}" for step in ("export", "restore") for form in packed)}
    assert packed["delta"]["bytes"] < packed["bitmask"]["bytes"] < about["bytes"] and about["matrices"] / 2 < packed["bitmask"]["matrices"]
    different = itertools.count()
    monkeypatch.setattr(streaming, "hashes_of", lambda folder: {"a": next(different)})
    refuses("bitmask differs", streaming.packed_case, tmp_path / "s.json", "other", llama, tmp_path, 50_000)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("cap_nb-")] == [] and set(read_cases(tmp_path / "s.json")) == {"toy"}


def test_processes_are_timed_and_their_tables_compared(tmp_path):
    case = processes.processes_case(tmp_path / "toy.json", 1, dict(layers=2, tokens=8, examples=2, shape=TOY), same=(), context="fork")
    assert case["about"]["same bytes"] == [1, 2] and len(processes.efficiency(case)) == 1 and 0.5 < case["about"]["predicted"] < 1


def test_every_measurement_of_a_device_in_small(tmp_path, monkeypatch):
    """`make gpu DRY=1`: all cases are measured and summed up, and the real ones have their names and fit into the limit."""
    monkeypatch.setattr(gpu, "subprocess", SimpleNamespace(run=lambda words, **given: finished(cap(*words[3:]))))
    said = sum(gpu.dry_run(tmp_path), [])
    cases, real = read_cases(tmp_path / "gpu.json"), gpu.measurements("lab", tmp_path)
    assert {*cases, "agreement in float16"} == {case.name for case in real} and sum(case.seconds for case in real) < gpu.LIMIT
    assert sum(line.endswith(": measured.") for line in said) == 5 and len(said) == 5 + 3 + 5 + 2 + 2
    assert [row["Method"] for row in cases["run"]["about"]["table"]] == ["Dense", "Magnitude"] and cases["writing"]["about"]["tokens"]["2"] > 0
    exact, rounded = (cases[f"agreement in {dtype}"]["about"]["agreement"] for dtype in ("float32", "bfloat16"))
    assert exact == 0 < rounded < 0.1
    assert all(isinstance(values, list) and values for case in cases.values() for values in case["seconds"].values())  # as the page reads them


def test_measurements_that_are_cut_go_on(tmp_path):
    """What is on disk is not measured again, what would end too late is not begun, and one that fails stops no other."""
    def measured(path, device):
        return measured_case(path, "first", {}, lambda: {"seconds": {}})

    def cut(path, device):
        raise KeyboardInterrupt

    path, cpu = tmp_path / "gpu.json", torch.device("cpu")
    with pytest.raises(KeyboardInterrupt):
        gpu.measure_all([gpu.Measurement("first", 1, measured), gpu.Measurement("second", 1, cut)], path, cpu)
    again = gpu.measure_all([gpu.Measurement("first", 1, cut), gpu.Measurement("long", 9999, cut)], path, cpu)
    assert list(read_cases(path)) == ["first"] and "on disk already" in again[0] and "not begun" in again[1]

    def broken(path, device):
        raise RuntimeError("no memory")

    path.unlink()
    failed = gpu.measure_all([gpu.Measurement("broken", 1, broken), gpu.Measurement("first", 1, measured)], path, cpu)
    assert failed == ["broken: failed, RuntimeError: no memory", "first: measured."]


def test_some_cases_of_a_device_within_another_limit(monkeypatch):
    """By name, with the settings of torch that `cap` has there; a name that is not known is said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = []
    monkeypatch.setattr(gpu, "measure_all", lambda cases, path, device, limit: asked.append(([case.name for case in cases], device, limit)) or ["measured."])
    monkeypatch.setattr(gpu, "device_named", lambda name: asked.append(name) or torch.device(name))  # which changes torch's settings
    monkeypatch.setattr("sys.argv", ["gpu", "--only", "writing", "llama-3-8b", "--seconds", "540"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert asked == ["cuda", (["llama-3-8b", "writing"], torch.device("cuda"), 540)] and not ended.value.code
    monkeypatch.setattr("sys.argv", ["gpu", "--only", "written"])
    with pytest.raises(SystemExit, match="No case is called written: expected run, llama-3-8b, "):
        gpu.main()


def test_other_texts_are_noticed(tmp_path):
    """Another side of ours stands in for the harness, so that this runs where the harness is not installed."""
    small = generation.GenerationCase(weights="lab", task="lab-strategyqa", n=3, limit=50, rows=2, repeats=1)
    case = generation.generation_case(tmp_path / "tried.json", "lab", small, other=generation.ours)
    assert [len(values) for values in case["seconds"].values()] == [1] * 6 and len(set(case["about"]["tokens"].values())) == 1
    assert generation.check_texts({"harness": ["a", "b"], "stop tokens": ["a", "b"], "answer lines": ["a", ""]}) == 1
    for wrong in (["a", "c"], ["a", "b more"]):
        refuses("texts differ", generation.check_texts, {"harness": ["a", "b"], "stop tokens": ["a", "b"], "answer lines": wrong})
    problems = load_problems("lab-arc", "evaluation")[:1]
    right, wrong = (f"Answer: {letter}\n" for letter in (problems[0].answer, "H"))
    assert generation.right_answers({"harness": [right], "stop tokens": [right]}, problems, "lab") == 1
    refuses("verdicts of stop tokens", generation.right_answers, {"harness": [right], "stop tokens": [wrong]}, problems, "lab")


def test_commands_are_timed_each_in_a_process_of_its_own(tmp_path):
    commands = {"a": [start.PYTHON, "-c", "sum(range(10**6))"], "b": [start.PYTHON, "-c", "pass"]}
    assert [len(values) for values in start.start_case(tmp_path / "s.json", commands, 1)["seconds"].values()] == [1] * 4
    refuses("expected it to end well", start.start_case, tmp_path / "t.json", {"wrong": [start.PYTHON, "-c", "1/0"]}, 1)


def test_the_suite_is_timed_in_a_fresh_clone(tmp_path):
    (tmp_path / "Makefile").write_text("demo:\n\t@echo done > made; echo shown\ntest:\n\t@cat made\n")
    for name in ("nbs/00_one.ipynb", "nbs/06_two.ipynb", "nbs/index.ipynb", "tools/notebooks.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    for words in (["init", "--quiet"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "-m", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    assert suite.suite_case(tmp_path / "s.json", tmp_path)["about"]["last line"] == {"demo": ["shown"], "test": ["done"]}
    refuses("make lint failed", suite.suite_case, tmp_path / "t.json", tmp_path, ("lint",))
    assert list(suite.chapters_case(tmp_path / "c.json", tmp_path)["seconds"]) == ["00_one", "06_two"]


def test_a_pruned_model_is_asked_in_the_order_of_the_dense_answers(tmp_path):
    case = generation.ordered_case(tmp_path / "o.json", "lab-strategyqa", 0.5, n=6, limit=30, repeats=1)
    assert case["about"]["differ"] == 0 and case["about"]["tokens"] > 0 and set(case["about"]["calls"]) == {"by prompts", "by dense answers"}


def test_a_screening_is_timed_against_the_other_sides(small_lab, tmp_path):
    """With all passes allowed it gives the whole table's scores."""
    case = scoring.screened_case(tmp_path / "s.json", str(small_lab), made_up_calibration(9), "made", repeats=1, budget=1.0)
    assert set(case["seconds"]) == {"hook loop", "resumed", "screened"}
    assert case["about"]["errors"]["spearman"] > 0.99 and case["about"]["errors"]["largest"] < 1e-2


TINY = layer_problem.llama | dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=60)
CASES = {"a model": dict(shape=TINY, rows=2, tokens=40, threads=1), "a matrix": dict(matrix=(12, 32), tokens=64, threads=1)}


@pytest.mark.parametrize("case", CASES)
def test_the_layer_problem_in_small(case):
    """Every side: half of the weights are zero, and each round begins with the old ones."""
    for side in layer_problem.solvers:
        _, zeros, about = layer_problem.first_call(CASES[case], side)
        assert layer_problem.timed_call() > 0 and about and abs(np.unpackbits(zeros).mean() - 0.5) < 0.02
    refuses("holds no lib/prune.py", layer_problem.published_code, "nowhere")
