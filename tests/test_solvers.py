"""On every family: budgets measured by resuming equal those of whole passes, and solvers, recoveries and budgets prune by name."""
import pytest
import torch

from cap_nb.calibration import Calibration
from cap_nb.data.prompts import IGNORED
from cap_nb.methods.block import FORMS, output_of, rebuild, targets_of
from cap_nb.methods.layer_walk import layer_by_layer
from cap_nb.methods import wanda
from cap_nb.methods.budgets import measured_divergences, pruned_regions, sublayers, wanda_local
from cap_nb.methods.criteria import Inputs
from cap_nb.methods.experts import UnitFactors
from cap_nb.methods.prune import ALLOCATIONS, prune
from cap_nb.methods.sparsegpt import input_hessians
from cap_nb.models.anatomy import decoder_layers, projections
from cap_nb.models.replay import attention_of
from cap_nb.regions import region_factors
from cap_nb.scoring import batches_of
from fixtures import refuses
from proofs import factors_read, random_examples, TINY_MODELS, tiny_calibration, tiny_factors, tiny_model

LEVELS = (0.3, 0.6)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_nothing_is_missed_where_statistics_end_a_pass(name, monkeypatch):
    """A pass that ends at the last projection's input gives the sums of a whole one: no projection is called twice."""
    for step in layer_by_layer(tiny_model(name), tiny_calibration(), 30):
        short, ended = wanda.input_sums(step, wanda.squares), []
        with monkeypatch.context() as patched:
            patched.setattr(wanda, "until_known", lambda record, names: ended.append(names) or record)
            whole = wanda.input_sums(step, wanda.squares)
        assert ended and all(torch.equal(short[p.name], whole[p.name]) for p in step.projections)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_an_expert_without_tokens_has_the_same_norm_by_hessians(name):
    """It is as small as the smallest of another expert, so under a layer's threshold a recovery starts from the zeros of plain Wanda."""
    few = Calibration.from_examples(random_examples([4], 1), k=1)
    silent = 0
    for step in layer_by_layer(tiny_model(name), few):
        norms, hessians = wanda.input_norms(step), input_hessians(step)
        silent += sum(p.expert is not None and bool((norms[p.name] == norms[p.name][0]).all()) for p in step.projections)
        for p in step.projections:
            torch.testing.assert_close((hessians[p.name].diagonal() / step.sequences).sqrt(), norms[p.name])
    assert silent
    plain, recovered = tiny_model(name), tiny_model(name)
    prune(plain, "wanda@layer", 0.5, calibration=few)
    prune(recovered, "wanda@layer^update", 0.5, calibration=few)
    assert all(torch.equal(p.weight == 0, q.weight == 0) for p, q in zip(projections(plain), projections(recovered)) if p.layer == 0)


@torch.no_grad()
def predictions(model, calibration):
    """Log-probabilities at the targets of every example, by whole passes."""
    found = {}
    for indices, batch in batches_of(calibration.examples, 30, model):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
        for index, row, labels in zip(indices, logits, batch["labels"][:, 1:]):
            found[index] = row[labels != IGNORED].log_softmax(-1)
    return [found[index] for index in sorted(found)]


SHAPES = ("llama", "gpt2", "mixtral", "phi3", "gpt_neox", "gemma2", "bloom", "gpt_oss", "deepseek_v3, one dense layer")  # one of each layout


@pytest.mark.parametrize("name, apart", [*((name, False) for name in SHAPES), ("llama", True), ("mixtral", True)])
def test_divergences_equal_those_of_whole_passes(name, apart):
    model, calibration = tiny_model(name), tiny_calibration()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    local, intact = wanda_local(model, calibration), predictions(model, calibration)
    fast = measured_divergences(model, calibration, LEVELS, local, 30, apart=apart)
    for r, region in enumerate(sublayers(model, apart)):
        with pruned_regions(model, [region], local) as set_shares:
            set_shares([LEVELS[1]])
            changed = predictions(model, calibration)
        slow = torch.stack([(p.exp() * (p - q)).sum(-1).double().mean() for p, q in zip(intact, changed)])
        torch.testing.assert_close(fast[r, 1].float(), slow.float(), atol=2e-6, rtol=1e-4)
    assert fast.max() > 1e-6, "pruning must move some prediction"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


FEW = ("llama", "gpt2", "mixtral", "phi3") # grouped heads, transposed weights, experts, fused projections
METHODS = ("alps", "wanda^swaps^update", "cap@row^swaps", "sparsegpt+kl", "magnitude^update", "wanda^update^block_apart", "magnitude^block_own")


@pytest.mark.parametrize("method", ["sparsegpt+causal", "alps+causal", "wanda+causal^update"])
def test_budgets_reach_solvers_and_recoveries(method):
    """Every projection loses the share that the allocation gives it."""
    model, factors = tiny_model("llama"), tiny_factors(tiny_model("llama"))
    wanted = ALLOCATIONS["causal"].shares(model, Inputs(factors=factors), 0.5)
    assert max(wanted.values()) - min(wanted.values()) > 0.15
    for _, _, name, zeros, weights in prune(model, method, 0.5, factors, tiny_calibration()).table:
        assert abs(zeros / weights - wanted[name]) < 0.06, name  # a row has 18 weights


@pytest.mark.parametrize("change", [lambda factors: factors.repeat(1, 2), lambda factors: factors[:1], lambda factors: factors[0], torch.neg])
def test_factors_of_another_model_give_no_budgets(change):
    refuses("factors? .*: expected", prune, model := tiny_model("llama"), "magnitude@row+causal", 0.5, change(tiny_factors(model)))


def test_budgets_of_a_model_that_is_half_zeros(caplog):
    """Zeros move no prediction and have no score: kl is refused, dlp says that it gives all layers the same."""
    prune(model := tiny_model("llama"), "wanda", 0.5, calibration=tiny_calibration())
    refuses("50.0% of the weights are zero already", prune, model, "wanda+kl", 0.6, calibration=tiny_calibration())
    prune(model, "wanda+dlp", 0.6, calibration=tiny_calibration())
    assert "dlp gives all layers the same share" in caplog.text


@pytest.mark.parametrize("recovery", ["update", "swaps^update"])
def test_a_recovery_keeps_the_weights_that_a_solver_was_given(recovery):
    """The error with a neuron's or a head's factor on its column, which the solver lowers, falls further."""
    model, calibration = tiny_model("llama"), tiny_calibration()
    neurons = 1 + 9 * torch.rand(len(decoder_layers(model)), projections(model)[6].weight.shape[1], generator=torch.Generator().manual_seed(0))
    factors, hessians = UnitFactors(tiny_factors(model), neurons=neurons), input_hessians(next(layer_by_layer(model, calibration)))
    solved, recovered = tiny_model("llama"), tiny_model("llama")
    prune(solved, "sparsegpt.neurons", 0.5, factors, calibration)
    prune(recovered, f"sparsegpt.neurons^{recovery}", 0.5, factors, calibration)
    for p, *after in zip(projections(model), projections(solved), projections(recovered)):
        if p.layer == 0 and p.role in ("output", "down"):
            gone = [(p.weight - q.weight).detach().double() * region_factors(model, factors)[p.name] for q in after]
            before, now = (((error @ hessians[p.name].double()) * error).sum() for error in gone)
            assert now < before, (p.name, before, now)


def test_apart_is_attention_first():
    model = tiny_model("llama")
    for step in layer_by_layer(model, tiny_calibration(), 30, dense=True):
        targets = targets_of(model, step, FORMS["block_apart"])
        attention = output_of(attention_of(model, step.index), step, step.dense[0])
        assert len(targets) == 2 and torch.equal(targets[0][0], attention) and not torch.equal(targets[1][0], attention)
        with torch.no_grad():
            for p in step.projections:
                p.weight[:, ::2] = 0
        assert len(rebuild(model, step, FORMS["block_apart"], targets)) == 2


@pytest.mark.parametrize("name, method", [(name, method) for name in FEW for method in METHODS])
def test_solvers_prune_every_layout(name, method):
    """The share is met but for rounding within rows, no weight is NaN, and no hook is left."""
    model, calibration = tiny_model(name), tiny_calibration()
    report = prune(model, method, 0.5, factors_read(method, tiny_factors(model)), calibration)
    assert report.method == method and abs(report.reached - 0.5) < 0.005, report.reached
    assert all(p.weight.isfinite().all() for p in projections(model))
    assert not sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("name, dtype", [*((name, torch.float32) for name in (*FEW, "opt")), ("llama", torch.bfloat16), ("gpt2", torch.bfloat16)])
def test_block_reconstruction_moves_what_it_may_and_nothing_else(name, dtype):
    """Zeros, dtypes, flags and whatever lies outside of the layers, or is a router, are those of the mask alone; the same seed gives the same bits."""
    (masked, first, second), calibration = (tiny_model(name).to(dtype) for _ in range(3)), tiny_calibration()
    frozen = next(decoder_layers(first)[0].parameters()).requires_grad_(False)
    prune(masked, "magnitude", 0.5)
    for model in (first, second):
        prune(model, "magnitude^block", 0.5, calibration=calibration)
    assert not frozen.requires_grad and all(p.grad is None for p in first.parameters())
    scope, layers = {p.parameter_name for p in projections(masked)}, tuple(f"{n}." for n, m in masked.named_modules() if m in set(decoder_layers(masked)))
    moved = set()
    for (parameter, old), new, again in zip(masked.named_parameters(), first.parameters(), second.parameters()):
        assert new.dtype == dtype and torch.equal(new, again)
        if parameter in scope:
            assert torch.equal(new == 0, old == 0)
        if not torch.equal(new, old):
            moved.add(parameter)
    assert moved & scope and all(parameter.startswith(layers) and (parameter in scope or masked.get_parameter(parameter).ndim == 1) for parameter in moved)


def test_block_reconstruction_leaves_a_layer_that_is_right():
    """Nothing was pruned, so nothing is trained: no error, no step, the same bits."""
    model, calibration = tiny_model("llama"), tiny_calibration()
    before = [p.clone() for p in model.parameters()]
    for step in layer_by_layer(model, calibration, 30, dense=True):
        targets = targets_of(model, step, FORMS["block"])
        assert rebuild(model, step, FORMS["block"], targets)[0][0] < 1e-8
        assert len(step.dense) == len(step.batches) and all(torch.equal(a.hidden, b.hidden) for a, b in zip(step.dense, step.batches))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


@torch.no_grad()
def test_targets_are_those_of_whole_passes():
    """After the pruning of earlier layers the dense stream is still that of the dense model, and a form's own targets are not."""
    model, calibration = tiny_model("llama"), tiny_calibration()
    dense = tiny_model("llama")
    for step in layer_by_layer(model, calibration, 30, dense=True):
        both = [targets_of(model, step, FORMS[form])[-1] for form in ("block", "block_own")]
        for state, target, own in zip(step.batches, *both):
            ids = [calibration.examples[index].input_ids for index in state.indices]
            whole = [dense.model(torch.tensor([each]), output_hidden_states=True).hidden_states for each in ids]
            last = step.index + 1 == len(decoder_layers(model))
            if not last:
                torch.testing.assert_close(target, torch.cat([states[step.index + 1][0] for states in whole]), atol=1e-5, rtol=1e-4)
            assert torch.equal(target, own) == (step.index == 0)
        for p in step.projections:
            p.weight[:, ::2] = 0


def test_masks_of_the_dense_model_leave_it_dense_where_they_fail():
    """A weight of the last layer is no number, which is found after the layers before it were pruned."""
    model = tiny_model("llama")
    projections(model)[-1].weight.data[0, 0] = torch.nan
    before = [p.clone() for p in model.parameters()]
    refuses("not finite", prune, model, "magnitude@row^update", 0.5, calibration=tiny_calibration())
    assert all(torch.equal(p.nan_to_num(), q.nan_to_num()) for p, q in zip(model.parameters(), before))
