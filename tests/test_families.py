"""Every claim about every family, on tiny random models of the true classes; and models that are refused."""
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cap_nb.methods.whole_heads import prune_heads, weights_removed
from cap_nb.models.anatomy import anatomy, check_anatomy, expert_counts, projections
from cap_nb.models.routing import masked_expert, recorded_routes
from cap_nb.core.errors import BadInput
from cap_nb.models.families import FAMILIES, family_of
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.jobs.planning import read_sizes
from cap_nb.experiments import proofs
from cap_nb.jobs.records import mask_fingerprint
from cap_nb.jobs.job import copied_weights, put_back
from cap_nb.methods.prune import prune
from cap_nb.experiments.proofs import (
    PROOFS, TINY_MODELS, measured_proof, proofs_of, tiny_calibration, tiny_factors, tiny_model)
from cap_nb.methods.streaming import checkpoint_fingerprint, prune_checkpoint
from cap_nb.scoring import masked_head
from cap_nb.regions import Factors
from cap_nb.threshold import plot_zeros, prune_cap
from conftest import ROOT


def test_every_family_is_proved():
    assert {kind for kind, _ in TINY_MODELS.values()} == set(FAMILIES)


MIXTURES = [name for name, (kind, _) in TINY_MODELS.items() if FAMILIES[kind].experts]


@pytest.mark.parametrize("name, proof", [(name, proof) for name in TINY_MODELS for proof in PROOFS if name in MIXTURES or not PROOFS[proof].of_experts])
def test_claim(name, proof):
    assert measured_proof(name, proof) <= PROOFS[proof].limit


@pytest.mark.parametrize("name, forgotten", [("gemma2", "capped_at"), ("gemma3", "capped_at"), ("cohere", "multiplied_by"), ("granite", "divided_by"),
                                             ("opt, narrow embedding, no last norm", "after_norm")])
def test_a_description_that_forgets_what_is_done_to_the_logits_is_noticed(monkeypatch, name, forgotten):
    kind = TINY_MODELS[name][0]
    monkeypatch.setitem(FAMILIES, kind, replace(FAMILIES[kind], **{forgotten: ""}))
    for proof in ("resuming", "perplexity") if forgotten != "after_norm" else ("resuming",):
        try:
            assert measured_proof(name, proof) > 100 * PROOFS[proof].limit
        except RuntimeError as error:  # the width of the head is another
            assert "shapes cannot be multiplied" in str(error)


@pytest.mark.parametrize("name", ["gpt_neox", "bloom", "falcon, three key-value heads", "phi3", "gpt2"])
def test_the_other_order_is_noticed(monkeypatch, name):
    kind = TINY_MODELS[name][0]
    monkeypatch.setitem(FAMILIES, kind, replace(FAMILIES[kind], by_group=not FAMILIES[kind].by_group))
    with pytest.raises(BadInput, match="the order described is not this model's"):
        measured_proof(name, "order")


def test_the_table_in_the_documentation_is_of_today():
    """It stands in a slow cell, so its output is kept; every variant and every proof must be in it, and nothing that failed."""
    notebook = json.loads((ROOT / "nbs/results/05_supported_families.ipynb").read_text(encoding="utf-8"))
    shown = [o for c in notebook["cells"] if c["id"] == "s007" for o in c["outputs"]]
    table = "".join(shown[0]["data"]["text/html"])
    assert "no (" not in table
    assert [f"<th>{word}</th>" in table for word in [*TINY_MODELS, *PROOFS]] == [True] * (len(TINY_MODELS) + len(PROOFS))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "falcon, three key-value heads", "opt"])
def test_removing_heads_leaves_no_trace_of_them(name):
    """With the lowest heads gone, the model is the one in which they are masked."""
    model, ids = tiny_model(name), torch.arange(3, 12)[None]
    scores = tiny_factors(model)
    scores[1, 4] = 0.0
    own = weights_removed(anatomy(model), [(1, 4)])
    report = prune_heads(model, scores, own / sum(p.weight.numel() for p in projections(model)))
    assert report.zeros == own
    masked = tiny_model(name)
    with torch.no_grad(), masked_head(masked, 1, 4):
        assert torch.allclose(model(ids).logits, masked(ids).logits, atol=1e-5)


@pytest.mark.parametrize("name, prefix", [("gpt2", "transformer."), ("bloom", "transformer."), ("opt", "model.")])
def test_a_checkpoint_of_the_decoder_alone_can_be_streamed(tmp_path, name, prefix):
    """On the hub, GPT-2 and Bloom are stored without the first part of their names."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "src")
    file = tmp_path / "src" / "model.safetensors"
    save_file({key.removeprefix(prefix): t for key, t in load_file(file).items()}, file, metadata={"format": "pt"})
    factors = tiny_factors(model)
    wanted = prune_cap(model, factors, 0.4)
    assert prune_checkpoint(tmp_path / "src", tmp_path / "new", 0.4, factors, at_once=64) == wanted
    assert len(checkpoint_fingerprint(tmp_path / "new")) == 64
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval(), torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["deepseek_v3", "granitemoe"])
def test_other_mixtures_of_experts_are_refused(kind):
    with pytest.raises(BadInput, match=f"'{kind}' is a mixture of experts that is not described: expected one of llama"):
        family_of(AutoConfig.for_model(kind))


def test_experts_are_claimed_of_mixtures_only():
    assert MIXTURES and {"experts", "routed"} <= set(proofs_of("mixtral"))
    assert not {"experts", "routed"} & set(proofs_of("llama"))


@pytest.mark.parametrize("name", MIXTURES)
def test_a_wrong_hand_is_noticed_in_a_moe(monkeypatch, name):
    """The proofs of experts can fail: a router that is believed to choose the neighbour of each expert."""
    right = proofs.weighed_by_hand
    monkeypatch.setattr(proofs, "weighed_by_hand", lambda *given: right(*given).roll(1, -1))
    assert measured_proof(name, "experts") > 0.1
    assert measured_proof(name, "routed") > 0.1


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_of_a_moe_are_never_pruned(name):
    """Everything in a layer with two axes or more is pruned, except routers and the gate of an expert that all tokens pass."""
    model, dense = tiny_model(name), tiny_model(name)
    report = prune(model, "magnitude", 0.5)
    kept = [own for own, weight in model.named_parameters() if ".layers." in own and weight.ndim > 1 and not (weight == 0).any()]
    sparse = sum(count > 0 for count in expert_counts(model))
    assert all(own.endswith((".gate.weight", "shared_expert_gate.weight")) for own in kept) and len(kept) == sparse * (2 if "qwen2" in name else 1)
    assert report.weights == sum(w.numel() for own, w in dense.named_parameters() if ".layers." in own and w.ndim > 1 and own not in kept)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_a_moe_have_factors_of_their_own(name):
    """A low factor for one expert makes it lose more, in memory and in the checkpoint alike; its layer's others lose less."""
    model = tiny_model(name)
    counts, factors = expert_counts(model), tiny_factors(model)
    own = torch.full((len(counts), 4), 5.0)
    own[counts.index(4), 2] = 1.0
    report = prune(model, "cap", 0.5, Factors(factors, own))
    shares = {(p.layer, p.expert): row[3] / row[4] for p, row in zip(projections(model), report.table) if p.role == "down"}
    first = counts.index(4)
    assert shares[first, 2] > max(shares[first, other] for other in (0, 1, 3)) + 0.2
    with pytest.raises(BadInput, match="expected \\[3, 4\\], one an expert"):
        prune(tiny_model(name), "cap", 0.5, Factors(factors, own[:, :3]))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe, two dense layers"])
def test_every_method_prunes_a_moe_and_can_be_undone(name):
    model = tiny_model(name)
    dense, copies, before = model_fingerprint(model), copied_weights(model), mask_fingerprint(model)
    for method in ("cap", "cap@matrix", "wanda@2:4", "cap_wanda@layer", "random", "gradient@row", "heads", "wanda+owl", "sparsegpt+causal", "sparsegpt@2:4", "cap.signed_gradient"):
        sparsity = 0.5 if ":" in method else 0.1 if method == "heads" else 0.25
        report = prune(model, method, sparsity, None if "." in method else tiny_factors(model), tiny_calibration())
        assert abs(report.reached - sparsity) < 0.1, method
        assert mask_fingerprint(model) != before
        put_back(model, copies)
        assert model_fingerprint(model) == dense
    plot_zeros(report)


def test_a_masked_expert_of_a_moe_gives_nothing_and_its_neighbours_give_the_same():
    model, ids = tiny_model("olmoe"), torch.arange(3, 12)[None]
    with torch.no_grad():
        with recorded_routes(model) as routes:
            whole = model(ids).logits
        last = routes[-1]
        expert = int(last.indices[0, 1])
        with masked_expert(model, last.layer, expert):
            masked = model(ids).logits
        kept = (last.indices != expert).all(-1)
        assert torch.equal(masked[0, kept], whole[0, kept]) and not kept.all()
        for p in projections(model):  # taking away its last matrix is the same
            if p.layer == last.layer and p.expert == expert and p.role == "down":
                p.weight.zero_()
        assert torch.allclose(model(ids).logits, masked, atol=1e-6)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_planning_a_moe_is_refused_with_a_sentence(tmp_path, kind):
    tiny_model(kind).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match=f"cost of model type '{kind}' is not counted yet"):
        read_sizes(str(tmp_path))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_fingerprint_of_a_stored_moe_is_that_of_the_loaded_one(tmp_path, name):
    model = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert checkpoint_fingerprint(tmp_path) == model_fingerprint(model) == model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path))


def test_what_is_quantised_in_memory_is_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))
    for change in (lambda mlp: setattr(mlp, "up_proj", Packed()), lambda mlp: setattr(mlp.up_proj, "weight", nn.Parameter(torch.zeros(26, 18, dtype=torch.uint8), False))):
        model = tiny_model("llama")
        change(model.model.layers[2].mlp)
        with pytest.raises(BadInput, match="model.layers.2.mlp.up_proj holds no weight in float32"):
            anatomy(model)


def test_a_projection_that_is_passed_by_is_refused():
    """Bloom has a slow path that multiplies by the weight without calling the module: nothing could be masked there."""
    model = tiny_model("bloom")
    for layer in model.transformer.h:
        layer.self_attention.pretraining_tp, layer.self_attention.slow_but_exact = 2, True
    with pytest.raises(BadInput, match="layer 0 was called 0 times"):
        check_anatomy(model)


def test_planning_says_which_families_it_counts(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="cost of model type 'gpt2' is not counted yet: expected one of llama, mistral, qwen2"):
        read_sizes(str(tmp_path))


def test_a_gguf_file_is_dequantised_with_a_note(tmp_path, caplog):
    gguf = pytest.importorskip("gguf", reason="the extra smollm2 is not installed")
    if transformers.__version__ < "5":
        pytest.importorskip("google.protobuf", reason="transformers 4 reads tokenizers from GGUF through it")
    file, model = tmp_path / "tiny.gguf", write_gguf(gguf, tmp_path / "tiny.gguf")
    with caplog.at_level(logging.WARNING, "cap_nb"):
        loaded, tokenizer = load_model(str(file))
    assert "tiny.gguf was dequantised" in caplog.text and "not those of the original" in caplog.text
    assert anatomy(loaded) == anatomy(model) and loaded.dtype == torch.float32
    up, wanted = loaded.model.layers[1].mlp.up_proj.weight, model.model.layers[1].mlp.up_proj.weight
    assert 0 < (up - wanted).abs().max() < 0.02 * wanted.abs().max()
    loaded.save_pretrained(tmp_path / "plain")


def write_gguf(gguf, file):
    """A tiny Llama whose matrices are stored in 8 bits; returns the model that they are of."""
    torch.manual_seed(0)
    tokens = ["<unk>", "<s>", "</s>"] + [chr(97 + i) for i in range(26)] + ["ab"]
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokens), max_position_embeddings=64)).eval()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64), writer.add_block_count(2), writer.add_feed_forward_length(96), writer.add_embedding_length(64), writer.add_rope_dimension_count(16)
    writer.add_head_count(4), writer.add_head_count_kv(2), writer.add_layer_norm_rms_eps(1e-6), writer.add_vocab_size(len(tokens)), writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2"), writer.add_token_list(tokens), writer.add_token_merges(["a b"]), writer.add_token_types([1] * len(tokens))
    writer.add_bos_token_id(1), writer.add_eos_token_id(2), writer.add_unk_token_id(0)
    short = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for name, weight in model.named_parameters():
        if name in whole:
            writer.add_tensor(whole[name], weight.detach().numpy().astype(np.float32))
            continue
        layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        kind, own = gguf.GGMLQuantizationType.Q8_0, weight.detach().numpy().astype(np.float32)
        if own.ndim == 1:
            writer.add_tensor(f"blk.{layer}.{short[part]}.weight", own)
        else:
            writer.add_tensor(f"blk.{layer}.{short[part]}.weight", gguf.quants.quantize(own, kind), raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    return model
