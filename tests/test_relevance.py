"""Relevance on tiny models of every family: no value changes, and with constant attention nothing is lost."""
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from proofs import TINY_MODELS, tiny_calibration, tiny_model

from fixtures import refuses
from cap_nb.methods.attributions import (
    PRODUCT_RULES, clamped_rule, differentiable, gold_logits, head_relevance, relevance_rules, watched_heads)
from cap_nb.models.anatomy import decoder_layers, final_norm
from cap_nb.models.families import clamped_product
from cap_nb.models.interventions import changed_input, hook_count, watching
from cap_nb.scoring import batches_of

CPU = torch.device("cpu")


def first_batch(name):
    model = tiny_model(name)
    torch.manual_seed(1)
    for weight in (w for key, w in model.named_parameters() if key.endswith("bias")):
        torch.nn.init.normal_(weight, std=0.3)
    _, batch = next(batches_of(tiny_calibration().examples, 4096, model))
    return model, batch


def arriving(model, batch, attention, monkeypatch):
    """Relevance at the input of the first layer, what biases hold, and the sum of the logits that are explained.

    The 1 that gpt-oss adds to up is a bias that is no parameter: the rule is given one."""
    inputs, parts = [], [*decoder_layers(model), final_norm(model), model.get_output_embeddings()]
    biases = [w for part in parts for key, w in part.named_parameters() if key.endswith("bias")]
    biases.append(torch.ones((), requires_grad=True))
    monkeypatch.setitem(PRODUCT_RULES, clamped_product, partial(clamped_rule, one=biases[-1]))
    with relevance_rules(model, attention), differentiable(model):
        with changed_input(decoder_layers(model)[0], watching(inputs.append)):
            logits = gold_logits(model, batch).sum()
        slopes = torch.autograd.grad(logits, inputs + biases, allow_unused=True)
    held = sum((w * s).sum() for w, s in zip(inputs + biases, slopes) if s is not None)
    return held.item(), logits.item()


def test_products_of_16_bits_are_made_in_32():
    """Products of two float16 are exact in float32; made in float16 they are rounded, and below 3e-8 they are 0."""
    model, batch = first_batch("llama")
    model.half()
    with relevance_rules(model, "attnlrp"), differentiable(model), watched_heads(model) as outputs:
        slopes = torch.autograd.grad(gold_logits(model, batch).sum(), outputs)
    by_head = [(z.detach().double() * slope.double()).unflatten(-1, (6, -1)).sum((1, 3)) for z, slope in zip(outputs, slopes)]
    torch.testing.assert_close(head_relevance(model, batch), torch.stack(by_head, 1), rtol=1e-9, atol=1e-12)


def test_a_product_without_a_rule_is_refused(monkeypatch):
    model, batch = first_batch("gpt_oss")
    monkeypatch.delitem(PRODUCT_RULES, clamped_product)
    refuses("model.layers.0.mlp multiplies gate and up in its own way", head_relevance, model, batch)
    assert hook_count(model) == 0


@pytest.mark.parametrize("name", TINY_MODELS)
def test_nothing_is_lost_with_constant_attention_and_rules_change_no_value(name, monkeypatch):
    model, batch = first_batch(name)
    arrived, logits = arriving(model, batch, "constant", monkeypatch)
    assert abs(arrived - logits) <= 1e-4 * max(1.0, abs(logits))
    assert hook_count(model) == 0
    monkeypatch.undo()  # the rule without a bias of its own
    with torch.no_grad():
        before = gold_logits(model, batch)
        with relevance_rules(model):
            assert torch.equal(gold_logits(model, batch), before)


def test_a_forgotten_rule_is_noticed(monkeypatch):
    """The sum can fail: without the half at the product of gate and up it does."""
    model, batch = first_batch("llama")
    monkeypatch.setattr("cap_nb.methods.attributions.halved_input", lambda module: nullcontext())
    arrived, logits = arriving(model, batch, "constant", monkeypatch)
    assert abs(arrived - logits) > 1e-2
