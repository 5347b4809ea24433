"""Shrinking, family by family: what may go, that the smaller model is the larger one with something masked, and that
its folder loads again."""
import re

import pytest
import torch
import transformers
from fixtures import refuses, tiny_llama
from proofs import TINY_MODELS, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from cap_nb.jobs.settings import Shrinking
from cap_nb.models.anatomy import anatomy
from cap_nb.models.families import FAMILIES
from cap_nb.portable import shrink as shrink_module
from cap_nb.portable.shrink import check_shrinking, group_scores, highest, logits_masked, shrink, widths_of
from conftest import ROOT

MIXTURES = {kind for kind, family in FAMILIES.items() if family.experts}
HEADS_STAY = {"olmo2", "olmo3", "gpt2", "gptj", "gpt_neox", "opt", "falcon", "bloom", "stablelm"} | MIXTURES
NEURONS_STAY = {"bloom"} | MIXTURES


def kind_of(name):
    return TINY_MODELS[name][0]


def drawn_scores(model):
    rng, a = torch.Generator().manual_seed(1), anatomy(model)
    return (torch.rand(a.layers, units, generator=rng) for units in (widths_of(model)[0], a.heads))


def assert_masking(model, kept, groups_kept, folder):
    """The smaller model, and the one that plain transformers loads from its folder, give the logits of masking."""
    of_neurons, of_heads = drawn_scores(model)
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    groups = highest(group_scores(of_heads, widths_of(model)[1]), groups_kept)
    wanted = logits_masked(model, highest(of_neurons, kept), groups, ids)
    small = shrink(model, of_neurons, of_heads, kept, groups_kept)
    small.save_pretrained(folder)
    for each in (small, AutoModelForCausalLM.from_pretrained(folder).eval()):
        assert widths_of(each) == (kept, groups_kept)
        with torch.no_grad():
            torch.testing.assert_close(each(ids).logits, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_neurons_go(name, tmp_path):
    model = tiny_model(name)
    if kind_of(name) in MIXTURES:
        refuses("with experts cannot be shrunk|has latent attention and cannot be shrunk", widths_of, model)
        return
    neurons, groups = widths_of(model)
    if kind_of(name) in NEURONS_STAY:
        refuses("no setting for the width of its MLP", shrink, model, *drawn_scores(model), neurons - 3)
    else:
        assert_masking(model, neurons - 3, groups, tmp_path / "small")


@pytest.mark.parametrize("name", [name for name in TINY_MODELS if kind_of(name) not in MIXTURES])
def test_key_value_heads_go(name, tmp_path):
    model = tiny_model(name)
    neurons, groups = widths_of(model)
    if groups == 1:
        pytest.skip("there is one key-value head, and it stays")
    if kind_of(name) in HEADS_STAY or kind_of(name) == "cohere" and model.config.use_qk_norm:
        refuses("key-value heads", shrink, model, *drawn_scores(model), neurons, 1)
        if kind_of(name) not in NEURONS_STAY: # told before anything is scored, too
            refuses("key-value heads", check_shrinking, model, Shrinking(sparsity=0.5, groups=1))
    else:
        assert_masking(model, neurons, 1, tmp_path / "small")


def test_what_may_go_is_looked_up_without_weights(monkeypatch):
    """Of eight billion a copy, to compare shapes, would take as much again."""
    model, cut, devices = tiny_llama(), shrink_module.cut_weights, []
    monkeypatch.setattr(shrink_module, "cut_weights", lambda model, *stay: devices.append(model.device.type) or cut(model, *stay))
    check_shrinking(model, Shrinking(sparsity=0.2))
    assert devices == ["meta"]
    model.loaded_from = ROOT
    assert shrink(model, *drawn_scores(model), 3).loaded_from == ROOT, "where its licence lies"
    assert devices == ["meta", "meta", "cpu"], "and before anything is copied"


def test_the_page_names_these_families():
    table = (ROOT / "nbs" / "portable" / "06_shrink.ipynb").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.split("|")[1:4]] for row in re.findall(r"\|[^\n]*\|", table)]
    said = {cells[0]: cells[1:] for cells in rows if len(cells) == 3 and set(cells[1:]) <= {"yes", "no"}}
    names = {"llama": "Llama", "olmo2": "OLMo-2", "olmo3": "OLMo-3", "stablelm": "StableLM", "nemotron": "Nemotron",
             "glm4": "GLM-4", "gpt2": "GPT-2", "gptj": "GPT-J", "gpt_neox": "GPT-NeoX",
             "opt": "OPT", "falcon": "Falcon", "bloom": "Bloom",
             "qwen3": "Qwen3", "phi3": "Phi-3", "starcoder2": "Starcoder2"}
    for kind, name in names.items():
        [answers] = [answers for row, answers in said.items() if re.search(rf"(^|, ){re.escape(name)}(,|:|$)", row)]
        assert answers == ["no" if kind in which else "yes" for which in (NEURONS_STAY, HEADS_STAY)], name


def test_a_number_of_heads_that_a_configuration_does_not_take_is_a_sentence():
    """Llama's configuration wants the hidden size to be a multiple of the heads; transformers 4 does not ask."""
    model = tiny_llama(hidden_size=24, num_attention_heads=6, num_key_value_heads=6)
    if int(transformers.__version__.split(".")[0]) >= 5:
        refuses("cannot have 5 of 6 key-value heads", shrink, model, *drawn_scores(model), 20, 5)
    else:
        assert widths_of(shrink(model, *drawn_scores(model), 20, 5)) == (20, 5)


def test_a_number_of_heads_that_a_class_does_not_take_is_a_sentence():
    """GPT-2 asks only when the model is made."""
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=20, n_head=4, vocab_size=9)).eval()
    refuses(r"A plain gpt2 cannot have these widths \(.*\): expected a number", check_shrinking, model, Shrinking(sparsity=0.3, groups=3))
