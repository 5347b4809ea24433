"""Masks of heads and neurons on other families than Llama."""

import pytest
import torch
from fixtures import refuses
from proofs import tiny_model

from cap_nb.calibration import Calibration
from cap_nb.data.prompts import collate, made_up_example
from cap_nb.methods.explainable_masks import (
    MaskFit, ThresholdFit, fit_masks, fit_thresholds, gated_units, kept_softly, same_for_units, unit_weights,
    units_to_remove)
from cap_nb.methods.neurons import masked_neurons
from cap_nb.models.anatomy import projections
from cap_nb.models.interventions import hook_count
from cap_nb.scoring import target_losses


def calibration():
    return Calibration.from_examples([made_up_example(n, 8 + n, task=f"task {n % 2}") for n in range(4)], k=1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_each_example_has_its_own_neurons(name):
    """A closed neuron of one example is that neuron masked, and the other examples are intact."""
    model, batch = tiny_model(name), collate(calibration().examples, pad_id=0)
    gates = same_for_units(model, 1.0, 4)
    gates.neurons[1, 1, 5] = 0
    with torch.no_grad():
        with gated_units(model, gates):
            found = target_losses(model, batch)
        intact = target_losses(model, batch)
        with masked_neurons(model, 1, [5]):
            masked = target_losses(model, batch)
    others = [0, 2, 3]
    torch.testing.assert_close(found[1], masked[1])
    torch.testing.assert_close(found[others], intact[others])
    assert found[1] != intact[1] and hook_count(model) == 0


def test_a_mixture_has_masks_of_heads_alone():
    model = tiny_model("mixtral")
    masks = fit_masks(model, calibration(), MaskFit(steps=2))
    assert masks.heads.shape == (2, 3, 6) and masks.neurons.shape == (2, 3, 0)
    assert hook_count(model) == 0 and masks.heads.isfinite().all()


@pytest.mark.parametrize("name", ["mixtral", "olmo2"])
def test_a_budget_is_a_share_of_all_weights_and_units_must_hold_it(name):
    """Experts' weights go with no unit, nor do queries and keys under a norm that spans the heads."""
    model, rng = tiny_model(name), torch.Generator().manual_seed(0)
    weights, scope = unit_weights(model), sum(p.weight.numel() for p in projections(model))
    scores = same_for_units(model, 0.5).mapped(lambda table: torch.rand(table.shape, generator=rng).double())
    kept = kept_softly(scores, fit_thresholds(model, calibration(), scores, 0.1, ThresholdFit(steps=1)), 0.02)
    gone = (weights.heads * (1 - kept.heads)).sum() + (weights.neurons * (1 - kept.neurons)).sum()
    assert abs(gone / scope - 0.1) < 1e-6
    thresholds = torch.zeros(len(scores.heads), 2)
    refuses("expected at most that", units_to_remove, model, scores, thresholds, 0.9)
    refuses("expected at most that", fit_thresholds, model, calibration(), scores, 0.9)
