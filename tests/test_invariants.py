"""What holds whatever the model: random tiny models of the true classes, drawn by hypothesis.

A few models of a few families here; with CAP_NB_FUZZ (`make soak`), of every family, and many: sixty times as many from CAP_NB_FUZZ=1000 on.
"""
import copy
import os

import torch
from fixtures import zeros_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from proofs import ENDS, TINY_MODELS, random_examples, tiny_factors
from transformers import AutoConfig, AutoModelForCausalLM

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.data.problems import load_problems
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.evaluation import problem_losses
from cap_nb.importance import importance_factors
from cap_nb.methods.prune import prune
from cap_nb.models.anatomy import anatomy, decoder_layers, expert_counts, projections
from cap_nb.models.lab import lab_model
from cap_nb.methods.experts import UnitFactors
from cap_nb.regions import blocks
from cap_nb.scoring import causal_scores
from cap_nb.threshold import zero_count

MANY = int(os.environ.get("CAP_NB_FUZZ", 0))
FEW = ("llama", "gpt2", "gpt_neox", "phi3", "mixtral", "falcon, three key-value heads")
NAMES = tuple(TINY_MODELS) if MANY else FEW


def tries(few):
    """So many random models; in the soak so many more for every 16 that are asked for, up to sixty times as many."""
    return settings(max_examples=few * min(60, 1 + MANY // 16), deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=not MANY)


# ---- random models ----
def sizes(wanted, layers, groups, a_group, head, width):
    """The settings of a variant with other sizes, as far as its class leaves a choice; latent attention has sizes of its own kind, which stay."""
    if "kv_lora_rank" in wanted:
        return wanted
    heads, square = groups * a_group, "head_dim" not in wanted or wanted.get("hidden_size") == 24
    hidden = heads * head if square else -(-2 * width // heads) * 2 * heads  # some classes want a multiple of the heads
    layers = 3 if "layer_types" in wanted or "mlp_only_layers" in wanted else layers
    new = {"num_hidden_layers": layers, "n_layer": layers, "num_attention_heads": heads, "n_head": heads, "num_key_value_heads": groups, "num_kv_heads": groups,
           "head_dim": head, "hidden_size": hidden, "n_embd": hidden, "intermediate_size": 4 * width + 4, "ffn_dim": 4 * width + 4, "n_inner": 4 * width + 4}
    if wanted.get("word_embed_proj_dim") == wanted.get("hidden_size"):
        new["word_embed_proj_dim"] = hidden
    return wanted | {key: value for key, value in new.items() if key in wanted}


@torch.no_grad()
def built(name, seed, *shape):
    """A model with random numbers in every parameter."""
    kind, wanted = TINY_MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ENDS | sizes(wanted, *shape))).float().eval()
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


MODELS = st.builds(built, st.sampled_from(NAMES), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 8]), st.integers(3, 9))
LLAMAS = st.builds(built, st.just("llama"), st.integers(0, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.sampled_from([4, 8]), st.integers(3, 9))
SHARES = st.floats(0, 0.99)
SCOPES = st.sampled_from(["model", "layer", "matrix", "row"])


def copied(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def examples(count, seed):
    """Random token sequences, each of another length."""
    return random_examples(range(12, 12 - count, -1), seed)


# ---- regions tile ----
@tries(8)
@given(MODELS, st.booleans())
def test_every_weight_in_scope_lies_in_one_region(model, by_neuron):
    """Counted weight by weight in a shadow of every parameter: once in scope, never outside, and only routers and gates of the layers are outside."""
    a, mixture, neurons = anatomy(model), any(expert_counts(model)), None
    if by_neuron and not mixture:
        neurons = torch.ones(a.layers, next(p for p in projections(model) if p.role == "down").weight.shape[1])
    shadow = {id(weight): torch.zeros(weight.shape, dtype=torch.int8) for weight in model.parameters()}
    for p in projections(model):
        counts = p.oriented(p.cut(shadow[id(p.parameter)]))
        for rows, columns, _ in blocks(p, UnitFactors(heads=tiny_factors(model), neurons=neurons), a.key_value_heads):
            counts[rows, columns] += 1
    inside = {id(weight) for weight in decoder_layers(model).parameters()}
    for name, weight in model.named_parameters():
        counts = shadow[id(weight)]
        outside = id(weight) not in inside or weight.ndim < 2 or name.endswith(("gate.weight", "router.weight", "norm.weight", "bias"))
        assert (counts == (0 if outside else 1)).all(), f"{name}: {counts.unique().tolist()} regions"


# ---- the count is exact ----
@torch.no_grad()
def coarse(model):
    """Weights of a few values, zero among them, so that most scores are ties."""
    for p in projections(model):
        p.stored.copy_((4 * p.stored).round() / 4)


@tries(10)
@given(MODELS, SHARES, SCOPES)
def test_the_count_is_exact_among_ties(model, sparsity, scope):
    """As many zeros as were asked for where they were counted, and no fewer than there were."""
    coarse(model)
    matrices = projections(model)
    groups = {"model": [matrices], "layer": [[p for p in matrices if p.layer == layer] for layer in range(len(decoder_layers(model)))],
              "matrix": [[p] for p in matrices], "row": []}[scope]
    expected = [max(zero_count(sum(p.weight.numel() for p in group), sparsity), sum(int((p.weight == 0).sum()) for p in group)) for group in groups]
    rows = [(p, (p.weight == 0).sum(1).clamp(min=int(p.weight.shape[1] * sparsity + 1e-9))) for p in matrices] if scope == "row" else []
    report = prune(model, f"magnitude@{scope}", sparsity)
    assert [sum(int((p.weight == 0).sum()) for p in group) for group in groups] == expected
    assert all(torch.equal((p.weight == 0).sum(1), wanted) for p, wanted in rows)
    assert report.zeros == sum(int((p.weight == 0).sum()) for p in matrices)


# ---- more is more ----
@tries(6)
@given(MODELS, st.lists(SHARES, min_size=3, max_size=3), SCOPES, st.sampled_from(["magnitude", "cap", "random"]))
def test_more_sparsity_never_fewer_zeros(model, shares, scope, criterion):
    """Where a score does not depend on what was pruned before, the zeros of less are among the zeros of more."""
    dense, before = copied(model), None
    for share in sorted(shares):
        model.load_state_dict(dense)
        prune(model, f"{criterion}@{scope}", share, tiny_factors(model) if criterion == "cap" else None)
        after = zeros_of(model)
        assert before is None or all((after[name] | ~mask).all() for name, mask in before.items())
        before = after


@tries(2)
@given(MODELS, st.lists(SHARES, min_size=2, max_size=2))
def test_more_sparsity_never_fewer_zeros_in_a_walk(model, shares):
    """Wanda scores a layer behind pruned ones: other weights may go, never fewer."""
    dense, zeros = copied(model), []
    for share in sorted(shares):
        model.load_state_dict(dense)
        zeros.append(prune(model, "wanda", share, calibration=Calibration.from_examples(examples(3, 0), k=1)).zeros)
    assert zeros == sorted(zeros)


# ---- scoring ----
def scored(model, drawn, batch_tokens=4096):
    """The table of losses, in the order of the examples' names."""
    losses = score_heads(model, Calibration.from_examples(drawn, k=1), batch_tokens)
    order = sorted(range(len(drawn)), key=lambda index: drawn[index].uid)
    return losses.masked[..., order], losses.intact[order]


def apart(one, other):
    """The largest difference of two tables, in nats."""
    return max((a - b).abs().max().item() for a, b in zip(one, other))


ACROSS = 1e-4  # Nats, in float32, between batches of different sizes; losses are about 5


@tries(4)
@given(MODELS, st.permutations(range(5)), st.integers(0, 9))
def test_the_order_of_examples_does_not_matter(model, order, seed):
    """Batches are made by length: the same ones in whatever order examples come, so the same bits; other batches give the same within a bound."""
    drawn = examples(5, seed)
    whole = scored(model, drawn, 24)
    assert apart(whole, scored(model, [drawn[index] for index in order], 24)) == 0
    assert apart(whole, scored(model, drawn, 4096)) < ACROSS
    assert apart(whole, scored(model, drawn, 1)) < ACROSS


DTYPES = {torch.float64: 1e-4, torch.float32: 0, torch.bfloat16: 0.5, torch.float16: 0.1}  # Nats from float32


@tries(1)
@given(LLAMAS, st.integers(0, 9))
def test_dtypes_and_threads_differ_within_bounds(model, seed):
    drawn, threads = examples(4, seed), torch.get_num_threads()
    whole = scored(model, drawn)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert apart(whole, scored(model, drawn)) < ACROSS
    finally:
        torch.set_num_threads(threads)
    for dtype, bound in DTYPES.items():
        assert apart(whole, scored(copy.deepcopy(model).to(dtype), drawn)) <= bound, dtype


PRUNED_ALIKE = {torch.float64: 0.999, torch.float32: 0.999, torch.float16: 0.95, torch.bfloat16: 0.9}  # Least share of weights that are zero in both or in none


def held_out_and_masks(model, tokenizer, problems, batch_tokens):
    """Held-out losses, and which weights CAP and Wanda set to zero in copies, all computed in batches of a size."""
    held, drawn = [one.loss for one in problem_losses(model, tokenizer, problems, batch_tokens=batch_tokens)], calibration_set(tokenizer, tasks=("lab-arc",), n=4 if MANY else 2, k=1)
    factors, zeros = importance_factors(causal_scores(score_heads(model, drawn, batch_tokens))), []
    for method in ("cap", "wanda"):
        pruned = copy.deepcopy(model)
        prune(pruned, method, 0.5, factors if method == "cap" else None, calibration=drawn, batch_tokens=batch_tokens)
        zeros.append(torch.cat([mask.flatten() for mask in zeros_of(pruned).values()]))
    return torch.tensor(held), zeros


def test_held_out_losses_and_masks_stay_within_the_stated_bounds():
    """Batches, threads and dtypes, as the page on repeating states them, on the lab's model."""
    model, tokenizer = lab_model()
    problems, threads = load_problems("lab-arc", "evaluation")[:6 if MANY else 3], torch.get_num_threads()
    held, zeros = held_out_and_masks(model, tokenizer, problems, 4096)

    def check(found, bound, alike, what):
        assert (found[0] - held).abs().max() <= bound, what
        assert min((one == other).double().mean() for one, other in zip(found[1], zeros)) >= alike, what

    check(held_out_and_masks(model, tokenizer, problems, 1), ACROSS, PRUNED_ALIKE[torch.float32], "batches")
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        check(held_out_and_masks(model, tokenizer, problems, 4096), ACROSS, PRUNED_ALIKE[torch.float32], "threads")
    finally:
        torch.set_num_threads(threads)
    for dtype in DTYPES if MANY else (torch.bfloat16,):
        check(held_out_and_masks(copy.deepcopy(model).to(dtype), tokenizer, problems, 4096), DTYPES[dtype], PRUNED_ALIKE[dtype], dtype)


def test_the_sizes_are_really_drawn():
    """Each family is built with sizes of its own, and none is refused by its class."""
    for name in [name for name in NAMES if "kv_lora_rank" not in TINY_MODELS[name][1]]:
        for shape in ((1, 1, 1, 4, 3), (3, 2, 3, 8, 9)):
            a = anatomy(built(name, 0, *shape))
            assert (a.heads, a.head_size) == (shape[1] * shape[2], shape[3]), name
            assert a.key_value_heads in (shape[1], a.heads, 1), name
