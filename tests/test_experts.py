"""Routing-aware factors where routing is odd: experts that nothing reaches, dense layers in between, broken weights,
other examples; and the sibling of the lab model."""

import logging

import pytest
import torch
from fixtures import made_up_calibration, refuses, tiny_llama
from transformers import MixtralConfig, Qwen3MoeConfig

from cap_nb.calibration import default_style, default_tasks
from cap_nb.core.files import read_checked, read_tensors
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.jobs.job import run_job
from cap_nb.jobs.settings import Job, changed
from cap_nb.methods.experts import (
    conditional_scores, expert_losses, expert_use, masked_expert_factors, routed_factors, routed_losses)
from cap_nb.methods.neurons import unit_aware_factors
from cap_nb.methods.prune import prune
from cap_nb.models.anatomy import projections, routing_of
from cap_nb.models.lab import ExpertsRecipe, lab_tokenizer, new_experts_model, save_tokenizer
from cap_nb.models.loading import load_model

CALIBRATION = made_up_calibration()


def mixtral():
    """Five experts, two a token; the router's weights are scaled up, so that its choices are clear ones."""
    model = tiny_llama(MixtralConfig, intermediate_size=12, num_local_experts=5, num_experts_per_tok=2)
    for layer in range(3):
        routing_of(model, layer).router.weight.data *= 4
    return model


def partly_dense():
    """Three layers, the middle one without experts."""
    return tiny_llama(Qwen3MoeConfig, intermediate_size=16, moe_intermediate_size=12, num_experts=6,
                      num_experts_per_tok=3, norm_topk_prob=True, mlp_only_layers=[1], decoder_sparse_step=1)


# odd routing


def test_an_expert_that_nothing_reaches_has_no_score_and_its_layer_s_mean():
    model = mixtral()
    router = routing_of(model, 1).router.weight.data
    # two of the first four have logits above zero, so the last is never among the two largest
    router[1], router[3], router[4] = -router[0], -router[2], 0
    routed, losses = routed_losses(model, CALIBRATION), score_heads(model, CALIBRATION)
    missing = (routed.used.transpose(1, 2) @ torch.nn.functional.one_hot(losses.subset, 3) == 0).any(-1)
    assert missing[1, 4] and routed.used[1, :, 4].sum() == 0
    given = conditional_scores(routed, losses)
    assert torch.equal(given.isnan().any(1), missing) and torch.equal(given.isnan().all(1), missing)
    factors = routed_factors(routed, losses)
    assert factors.experts.isfinite().all()
    assert torch.equal(factors.experts[missing], factors.heads.mean(1, keepdim=True).expand(-1, 5)[missing])


def test_dense_layers_between_sparse_ones():
    model = partly_dense()
    routed, losses = routed_losses(model, CALIBRATION), score_heads(model, CALIBRATION)
    assert routed.used[1].sum() == 0 and (routed.used[[0, 2]].sum(-1) == 3 * routed.tokens).all()
    by_experts = routed.masked[[0, 2]].sum(-1) / (3 * routed.tokens)
    torch.testing.assert_close(by_experts, losses.masked[[0, 2]], atol=1e-5, rtol=0)
    assert expert_use(routed)[1].sum() == 0
    by_unit = expert_losses(model, CALIBRATION)
    assert by_unit.masked[1].isnan().all() and by_unit.masked[[0, 2]].isfinite().all()
    for factors in (routed_factors(routed, losses), masked_expert_factors(by_unit, losses)):
        assert (factors.experts[1] == factors.heads[1].mean()).all()


# refusals


def test_a_loss_that_is_no_number_names_the_expert():
    model = mixtral()
    model.model.embed_tokens.weight.data[7] = float("nan")
    refuses("The loss with expert 0 of layer 0 masked is nan on example", expert_losses, model, CALIBRATION)


def test_a_run_of_a_dense_model_is_refused_before_any_work(tmp_path):
    refuses("Method 'cap.routed' was asked for, and LlamaForCausalLM has no routed experts", run_job, changed(Job(), methods=("cap.routed",), n=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# by name


def test_by_name_is_by_hand():
    named, by_hand = mixtral(), mixtral()
    factors = unit_aware_factors(by_hand, "masked_experts", CALIBRATION)
    prune(named, "cap.masked_experts", 0.4, calibration=CALIBRATION)
    report = prune(by_hand, "cap", 0.4, factors)
    assert abs(report.reached - 0.4) < 1e-3
    assert all(torch.equal(p.weight, q.weight) for p, q in zip(projections(named), projections(by_hand)))
    plain = mixtral()
    prune(plain, "cap", 0.4, factors.heads)
    pairs = [(p, q) for p, q in zip(projections(named), projections(plain)) if p.expert is not None]
    assert any(not torch.equal(p.weight, q.weight) for p, q in pairs)


def test_the_sibling_s_rotary_angles_have_the_base_it_was_trained_with():
    """Read from the loaded model: transformers 4 and 5 know the number by two names and fall back to different ones."""
    model, _ = load_model("lab-moe", device="cpu")
    frequencies = model.model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 10_000.0 ** (-torch.arange(0, 32, 2) / 32), atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def tiny_lab(tmp_path_factory):
    """A mixture that knows the lab's words and nothing else."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "tiny", lab_tokenizer()
    new_experts_model(ExpertsRecipe(hidden=24, mlp=16, layers=2, experts=4), tokenizer).save_pretrained(folder)
    save_tokenizer(folder, tokenizer)
    return folder


def test_a_run_keeps_both_tables_of_factors_and_takes_them_up_again(tiny_lab, tmp_path):
    job = changed(Job(), name=str(tiny_lab), methods=("cap", "cap.routed", "cap.masked_experts"), sparsities=(0.5,),
                  n=3, k=1, accuracy_tasks=(), loss_n=2, windows=0)
    run_job(job, tmp_path / "run")
    files = [tmp_path / "run" / "attributions" / f"{name}.safetensors" for name in ("routed", "masked_experts")]
    for tensors in (read_tensors(file)[0] for file in files):
        assert tensors["experts"].shape == (2, 4) and tensors["factors"].shape == (2, 6)
        assert tensors["factors"].dtype == torch.float64 and tensors["masked"].dtype == torch.float32, "what no zero follows from takes half the room"
    timings = read_checked(tmp_path / "run" / "timings.json")
    run_job(job, tmp_path / "run")
    assert read_checked(tmp_path / "run" / "timings.json") == timings
    costs = (tmp_path / "run" / "tables" / "costs.csv").read_text().splitlines()
    seconds = {line.split(",")[0]: float(line.split(",")[1]) for line in costs[1:]}
    assert seconds["cap.routed"] == pytest.approx(timings["scoring"] + timings["attribution/routed"])


# the sibling


def test_the_sibling_loads_as_float32_and_is_a_lab_model(caplog):
    with caplog.at_level(logging.WARNING):
        model, tokenizer = load_model("lab-moe", device="cpu")
    assert next(model.parameters()).dtype == torch.float32 and not caplog.records
    assert all(torch.equal(p, p.bfloat16().float()) for p in model.parameters())
    assert default_style(tokenizer) == "lab" and all(task.startswith("lab-") for task in default_tasks(tokenizer))
    assert tokenizer.get_vocab() == lab_tokenizer().get_vocab()
