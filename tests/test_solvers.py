"""On every family: budgets measured by resuming equal those of whole passes, and solvers, recoveries and budgets prune by name."""
import pytest
import torch

from cap_nb.data.prompts import IGNORED
from cap_nb.methods.layer_walk import layer_by_layer
from cap_nb.methods import wanda
from cap_nb.methods.budgets import measured_divergences, pruned_regions, sublayers, wanda_local
from cap_nb.methods.prune import prune
from cap_nb.models.anatomy import projections
from cap_nb.scoring import batches_of
from proofs import TINY_MODELS, tiny_calibration, tiny_model

LEVELS = (0.3, 0.6)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_nothing_is_missed_where_statistics_end_a_pass(name, monkeypatch):
    """A pass that ends at the last projection's input gives the sums of a whole one: no projection is called twice."""
    for step in layer_by_layer(tiny_model(name), tiny_calibration(), 30):
        short = wanda.input_sums(step, wanda.squares)
        with monkeypatch.context() as patched:
            patched.setattr(wanda, "until_known", lambda record, names: record)
            whole = wanda.input_sums(step, wanda.squares)
        assert all(torch.equal(short[p.name], whole[p.name]) for p in step.projections)


@torch.no_grad()
def predictions(model, calibration):
    """Log-probabilities at the targets of every example, by whole passes."""
    found = {}
    for indices, batch in batches_of(calibration, 30, model.device):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        for index, row, labels in zip(indices, logits, batch["labels"][:, 1:]):
            found[index] = row[labels != IGNORED].log_softmax(-1)
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_divergences_equal_those_of_whole_passes(name):
    model, calibration = tiny_model(name), tiny_calibration()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    local, intact = wanda_local(model, calibration), predictions(model, calibration)
    fast = measured_divergences(model, calibration, LEVELS, local, 30)
    for r, region in enumerate(sublayers(model)):
        with pruned_regions(model, [region], local) as set_shares:
            set_shares([LEVELS[1]])
            changed = predictions(model, calibration)
        slow = torch.stack([(p.exp() * (p - q)).sum(-1).double().mean() for p, q in zip(intact, changed)])
        torch.testing.assert_close(fast[r, 1].float(), slow.float(), atol=2e-6, rtol=1e-4)
    assert fast.max() > 1e-6, "pruning must move some prediction"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


FEW = ("llama", "gpt2", "mixtral", "phi3") # grouped heads, transposed weights, experts, fused projections
METHODS = ("wanda^swaps^update", "cap@row^swaps", "sparsegpt+kl", "magnitude^update")


@pytest.mark.parametrize("name, method", [(name, "alps") for name in TINY_MODELS] + [(n, m) for n in FEW for m in METHODS])
def test_solvers_prune_every_family(name, method):
    """The share is met but for rounding within rows, no weight is NaN, and no hook is left."""
    model, calibration = tiny_model(name), tiny_calibration()
    heads = model.config.num_attention_heads if hasattr(model.config, "num_attention_heads") else model.config.n_head
    layers = projections(model)[-1].layer + 1
    report = prune(model, method, 0.5, torch.linspace(1, 10, layers * heads).view(layers, heads), calibration)
    assert report.method == method and abs(report.reached - 0.5) < 0.06, report.reached
    assert all(p.weight.isfinite().all() for p in projections(model))
    assert not sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
