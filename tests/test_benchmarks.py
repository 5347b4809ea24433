"""The benchmarks in small, where nothing is said of time: what they compare agrees, and what differs is noticed."""
import threading
from multiprocessing import Pipe

import numpy as np
import pytest
import torch

from cap_nb.core.errors import BadInput
from cap_nb.data.problems import load_problems
from cap_nb.engine.resumed_scoring import score_heads
from cap_nb.methods.streaming import open_checkpoint
from cap_nb.models.loading import load_model
from tools.benchmarks import generation, gpu, layer_problem, scaling, scoring, streaming, threshold
from tools.side_by_side import ScoringRounds, balanced_heads, examples_at_hand, largest_difference


def test_a_masked_head_is_not_lost_in_compiled_layers():
    """Compiling is not tried, since not every machine has a C++ compiler: the backend "eager" traces layers and runs them as they are."""
    lab, tokenizer = load_model("lab", "float32", "cpu")
    heads, examples = balanced_heads(6, 6, 2, 1), examples_at_hand(tokenizer, 1)[0]
    traced = scoring.compile_layers(load_model("lab", "float32", "cpu")[0], backend="eager")
    tables = {name: score_heads(model, examples, heads=heads).masked for name, model in (("plain", lab), ("compiled", traced))}
    assert largest_difference(tables, 1e-5) < 1e-5


@pytest.mark.parametrize("axis, more", [("heads", 2), ("layers", 3), ("tokens", 16), ("examples", 4)])
def test_work_grows_along_every_axis(axis, more):
    toy = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1, head_dim=8, vocab_size=50)
    small = dict(layers=2, heads=1, tokens=8, examples=2)
    (_, larger), (call, work) = scaling.point(**small | {axis: more}, shape=toy), scaling.point(**small, shape=toy)
    call()
    assert larger > work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_ways_to_a_threshold_agree(dtype):
    scores = threshold.made_scores(4, 2000, dtype)
    assert threshold.check_ways(threshold.ways(scores, 0.2), scores, 0.2)["threshold"] > 0
    wrong = threshold.ways(scores, 0.2) | {"sort": lambda: 0.0}
    with pytest.raises(BadInput, match="disagree"):
        threshold.check_ways(wrong, scores, 0.2)


def test_a_checkpoint_in_shards_is_made_and_pruned(tmp_path):
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=100)
    streaming.random_checkpoint(_folder(tmp_path / "src"), streaming.llama | sizes, 50_000)
    peaks = {}
    streaming.streaming_sides(tmp_path / "src", tmp_path / "dst", peaks)["prune"]()
    assert len(open_checkpoint(tmp_path / "src").shards) > 3 and len(peaks["prune"]) == 1 and open_checkpoint(tmp_path / "dst")


def _folder(path):
    path.mkdir()
    return path


def test_the_device_benchmark_in_small(tmp_path):
    toy = gpu.llama | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=60)
    rounds = ScoringRounds((8,), repeats=1, tolerance=0.05, times=1)
    small = gpu.DeviceCase(shape=toy, n=1, chosen=2, each=1, rounds=rounds)
    case = gpu.device_case(tmp_path / "toy.json", torch.device("cpu"), small)
    assert {len(values) for values in case["seconds"].values()} == {1}


def test_other_texts_are_noticed(tmp_path):
    """Another side of ours stands in for the harness, so that this runs where the harness is not installed."""
    small = generation.GenerationCase(weights="lab", task="lab-strategyqa", n=3, limit=50, rows=2, repeats=1)
    case = generation.generation_case(tmp_path / "tried.json", "lab", small, other=generation.ours)
    assert [len(values) for values in case["seconds"].values()] == [1] * 6 and len(set(case["about"]["tokens"].values())) == 1
    assert generation.check_texts({"harness": ["a", "b"], "stop tokens": ["a", "b"], "answer lines": ["a", ""]}) == 1
    for wrong in (["a", "c"], ["a", "b more"]):
        with pytest.raises(BadInput, match="texts differ"):
            generation.check_texts({"harness": ["a", "b"], "stop tokens": ["a", "b"], "answer lines": wrong})
    problems = load_problems("lab-arc", "evaluation")[:1]
    right, wrong = (f"Answer: {letter}\n" for letter in (problems[0].answer, "H"))
    assert generation.right_answers({"harness": [right], "stop tokens": [right]}, problems, "lab") == 1
    with pytest.raises(BadInput, match="verdicts of stop tokens"):
        generation.right_answers({"harness": [right], "stop tokens": [wrong]}, problems, "lab")


TINY = layer_problem.llama | dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=60)
CASES = {"a model": dict(shape=TINY, rows=2, tokens=40, threads=1), "a matrix": dict(matrix=(12, 32), tokens=64, threads=1)}


@pytest.mark.parametrize("case", CASES)
def test_the_layer_problem_in_small(case):
    """Every side, over the pipe by which it is asked: half of the weights are zero, and each round begins with the old ones."""
    for side in layer_problem.solvers:
        ours, theirs = Pipe()
        worker = threading.Thread(target=layer_problem.live, args=(CASES[case], side, theirs))
        worker.start()
        memory, zeros, about = layer_problem.received(ours, side)
        ours.send(True)
        assert layer_problem.received(ours, side) > 0 and about and abs(np.unpackbits(zeros).mean() - 0.5) < 0.02
        ours.send(False)
        worker.join()
    with pytest.raises(BadInput, match="holds no lib/prune.py"):
        layer_problem.published_code("nowhere")
