"""Masks of heads and neurons on other families than Llama, and as a method by name."""
import pytest
import torch
from transformers import (
    LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, OPTConfig, OPTForCausalLM)

from cap_nb.calibration import Calibration
from cap_nb.data.prompts import IGNORED, Example, collate
from cap_nb.methods.explainable_masks import MaskFit, UnitTable, fit_masks, gated_units, tasks_of, text_passes
from cap_nb.methods.neurons import masked_neurons
from cap_nb.methods.prune import method_line, prune
from cap_nb.models.anatomy import dimensions
from cap_nb.models.interventions import hook_count
from cap_nb.scoring import target_losses

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}


def made(name):
    torch.manual_seed(0)
    if name == "mixtral":
        config = MixtralConfig(**SIZES, intermediate_size=12, num_key_value_heads=2, num_local_experts=3)
        return MixtralForCausalLM(config).eval()
    if name == "opt":
        return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=12, word_embed_proj_dim=16, max_position_embeddings=40)).eval()
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=12, num_key_value_heads=2)).eval()


def calibration():
    rows = [tuple((5 * n + 3 * t) % 39 + 1 for t in range(8 + n)) for n in range(4)]
    return Calibration.from_examples([
        Example(task=f"task {n % 2}", uid=f"{n}", prompt="", target="", answer="", input_ids=ids,
                labels=(IGNORED,) * 4 + ids[4:]) for n, ids in enumerate(rows)], k=1)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_each_example_has_its_own_neurons(name):
    """A closed neuron of one example is that neuron masked, and the other examples are intact."""
    model, batch = made(name), collate(calibration().examples, pad_id=0)
    a, gates = dimensions(model.config), torch.ones(4, 2, 12, dtype=torch.float64)
    gates[1, 1, 5] = 0
    with torch.no_grad():
        with gated_units(model, UnitTable(torch.ones(4, a.layers, a.heads), gates)):
            found = target_losses(model, batch)
        intact = target_losses(model, batch)
        with masked_neurons(model, 1, [5]):
            masked = target_losses(model, batch)
    others = [0, 2, 3]
    torch.testing.assert_close(found[1], masked[1])
    torch.testing.assert_close(found[others], intact[others])
    assert found[1] != intact[1] and hook_count(model) == 0


def test_a_mixture_has_masks_of_heads_alone():
    model, examples = made("mixtral"), calibration()
    masks = fit_masks(model, text_passes(model, examples), tasks_of(examples)[1], MaskFit(steps=2))
    assert masks.heads.shape == (2, 2, 4) and masks.neurons.shape == (2, 2, 0)
    assert hook_count(model) == 0 and masks.heads.isfinite().all()


def test_masks_are_an_attribution_by_name():
    model = made("llama")
    report = prune(model, "cap.explainable_masks", 0.3, calibration=calibration())
    assert abs(report.reached - 0.3) < 1e-3 and report.method == "cap.explainable_masks"
    assert "Yu and Xiang" in " ".join(method_line("heads.explainable_masks"))
