"""The forty lines of `on_one_page` are the oracle: scoring, pruning in memory and pruning on disk give what they give."""
import copy

import pytest
import torch
from fixtures import made_up_calibration, tiny_llama
from transformers import AutoModelForCausalLM

from cap_nb.calibration import calibration_set
from cap_nb.importance import importance_factors
from cap_nb.methods.prune import prune
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.methods.streaming import prune_checkpoint
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import load_model
from cap_nb.on_one_page import cap_naive
from cap_nb.scoring import causal_scores, score_heads_naive

SPARSITY = 0.5


def tiny():
    return tiny_llama(), made_up_calibration()


def lab():
    model, tokenizer = load_model("lab", "float32", "cpu")
    return model, calibration_set(tokenizer, n=1, k=3)


@pytest.fixture(scope="module", params=[tiny, lab], ids=["a tiny Llama", "the lab model"])
def case(request):
    """A dense model, its calibration set, and the same model pruned by `cap_naive`."""
    model, calibration = request.param()
    subsets = [[calibration.examples[i] for i in (calibration.subset == k).nonzero()[:, 0]] for k in range(3)]
    pruned = copy.deepcopy(model)
    return model, calibration, pruned, cap_naive(pruned, subsets, SPARSITY, tolerance=0)


def differing(one, other):
    """Share of the weights in which two models differ."""
    pairs = [(p.weight, q.weight) for p, q in zip(projections(one), projections(other), strict=True)]
    return sum(int((p != q).sum()) for p, q in pairs) / sum(p.numel() for p, _ in pairs)


@pytest.mark.parametrize("score", [score_heads_naive, score_heads])
def test_scores(case, score):
    model, calibration, _, result = case
    scores = causal_scores(score(model, calibration))
    assert torch.allclose(scores, result.scores, atol=1e-5)
    assert torch.allclose(importance_factors(scores), result.factors, atol=1e-4)


def test_pruning_in_memory(case):
    model, _, pruned, result = case
    fast = copy.deepcopy(model)
    report = prune(fast, "cap", SPARSITY, result.factors)
    assert differing(fast, pruned) == 0 and report.threshold == pytest.approx(result.threshold, rel=1e-3)


def test_pruning_on_disk(case, tmp_path):
    model, _, pruned, result = case
    model.save_pretrained(tmp_path/"dense")
    prune_checkpoint(tmp_path/"dense", tmp_path/"pruned", SPARSITY, result.factors)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path/"pruned", dtype="auto")
    assert differing(streamed, pruned) == 0
