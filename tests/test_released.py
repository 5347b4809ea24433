"""A model is released when its last name goes: no call leaves it to Python's collector, which does not know that a device is full."""
import gc
import weakref

import pytest
from fixtures import made_up_calibration, tiny_llama
from proofs import factors_read, tiny_factors

from cap_nb.methods.attributions import gate_slopes, head_relevance
from cap_nb.methods.layer_walk import batches_of
from cap_nb.methods.prune import prune
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.models.decoding import generate_greedy
from cap_nb.models.lab import lab_tokenizer
from cap_nb.portable.fine_tuning import FineTuning, recover

PRUNED = ("cap", "wanda", "gradient", "rgs", "sparsegpt", "alps", "magnitude^update", "wanda^swaps", "wanda^block", "wanda+kl", "wanda+owl", "wanda@2:4")


def written(model):
    generate_greedy(model, lab_tokenizer(), [[1, 2, 3], [4, 5]], 4)


def scored(model):
    score_heads(model, made_up_calibration(count=3))


def differentiated(model):
    for _, batch in batches_of(made_up_calibration(count=3).examples, 4096, model):
        gate_slopes(model, batch)
        head_relevance(model, batch)


def trained(model):
    prune(model, "magnitude", 0.5)
    recover(model, made_up_calibration(count=3), FineTuning(steps=1))


def pruned(method):
    return lambda model: prune(model, method, 0.5, factors_read(method, tiny_factors(model)), made_up_calibration(count=3))


@pytest.fixture(autouse=True, scope="module")
def what_was_there_before_is_not_looked_at():
    """Each collection would go through the millions of objects of a long session."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("work", [written, scored, differentiated, trained, *map(pruned, PRUNED)], ids=lambda work: getattr(work, "__name__", "pruned"))
def test_a_model_goes_with_its_last_name(work):
    model = tiny_llama()
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        work(model)
        del model
        assert gone() is None
    finally:
        gc.enable()
