"""Every claim about every family, on tiny random models of the true classes; and models that are refused."""
import copy
from dataclasses import replace

import proofs
import pytest
import torch
import transformers
from proofs import PROOFS, RECORD, TINY_MODELS, factors_read, proof_error, proofs_of, tiny_calibration, tiny_factors, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, GPTNeoConfig, GPTNeoForCausalLM

from cap_nb.calibration import Calibration, calibration_set
from fixtures import made_up_calibration, refuses, tiny_llama
from hub import byte_tokenizer
from cap_nb.core.files import read_checked
from cap_nb.core.registry import ADDED, additions_undone
from cap_nb.data.prompts import collate
from cap_nb.methods.resumed_scoring import score_divergences, score_heads, shared_prefix
from cap_nb.jobs.job import copied_weights, put_back
from cap_nb.jobs.planning import read_sizes
from cap_nb.jobs.records import mask_fingerprint
from cap_nb.methods.prune import prune
from cap_nb.methods.streaming import checkpoint_fingerprint, prune_checkpoint
from cap_nb.methods.attributions import gated_heads
from cap_nb.methods.experts import expert_losses, whole_passes
from cap_nb.methods.neurons import down_projection, masked_neurons, neuron_estimates, remove_neurons
from cap_nb.methods.screening import screen_heads
from cap_nb.methods.explainable_masks import prune_heads, sizes_of_heads, weights_removed
from cap_nb.models import anatomy as anatomies
from cap_nb.models.anatomy import anatomy, check_computes_the_same, expert_counts, projections
from cap_nb.models.decoding import generate_greedy
from cap_nb.models.checks import check_anatomy, check_tokens_independent
from cap_nb.models.families import ATTENTION, FAMILIES, HOLDS, HYBRIDS, LLAMA, Family, add_family, family_of, under
from cap_nb.models.interventions import masked_expert
from cap_nb.models.lab import state_rotation
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.models.replay import PrefixCache
from cap_nb.methods.experts import UnitFactors
from cap_nb.regions import region_factors
from cap_nb.scoring import masked_head, score_heads_naive, target_losses
from cap_nb.threshold import plot_zeros

MIXTURES = [name for name, (kind, _) in TINY_MODELS.items() if FAMILIES[kind].experts]
CLAIMS = [(name, claim) for name in TINY_MODELS for claim in PROOFS if name in MIXTURES or not PROOFS[claim].of_experts]


def test_every_family_is_proved():
    assert {kind for kind, _ in TINY_MODELS.values()} == {kind for kind in FAMILIES if not kind.endswith("-reader")}


@pytest.mark.parametrize("name, claim", CLAIMS)
def test_claim(name, claim):
    assert proof_error(name, claim) <= PROOFS[claim].limit


def test_the_record_that_the_documentation_shows_is_of_these_claims():
    """The page of supported models reads the record: every variant and every claim is in it, and nothing that
    failed."""
    record = read_checked(RECORD)
    assert record["families"] == {name: kind for name, (kind, _) in TINY_MODELS.items()}
    assert record["claims"] == {claim: {"says": proof.says, "limit": proof.limit} for claim, proof in PROOFS.items()}
    assert record["in order"] == {"claims": list(PROOFS), "families": list(TINY_MODELS)}
    assert {(name, claim) for name, errors in record["errors"].items() for claim in errors} == {*CLAIMS}
    assert all(record["errors"][name][claim] <= PROOFS[claim].limit for name, claim in CLAIMS)


FORGOTTEN = [("gemma2", "capped_at"), ("gemma3", "capped_at"), ("cohere", "multiplied_by"), ("granite", "divided_by"),
             ("opt, narrow embedding, no last norm", "after_norm")]


@pytest.mark.parametrize("name, forgotten", FORGOTTEN)
def test_a_description_that_forgets_what_is_done_to_the_logits_is_noticed(monkeypatch, name, forgotten):
    kind = TINY_MODELS[name][0]
    monkeypatch.setitem(FAMILIES, kind, replace(FAMILIES[kind], **{forgotten: ""}))
    for claim in ("resuming", "perplexity") if forgotten != "after_norm" else ("resuming",):
        try:
            assert proof_error(name, claim) > 100 * PROOFS[claim].limit
        except RuntimeError as error:  # the width of the head is another
            assert "shapes cannot be multiplied" in str(error)
    if forgotten != "after_norm":
        refuses("do not give the model's own logits", check_anatomy, tiny_model(name))


@pytest.mark.parametrize("name", ["gpt_neox", "bloom", "falcon, three key-value heads", "phi3", "gpt2",
                                  "deepseek_v3, one dense layer"])
def test_the_other_order_is_noticed(monkeypatch, name):
    """All shapes agree and every weight lies in one region; only the live model tells that the rows are another
    head's."""
    kind = TINY_MODELS[name][0]
    monkeypatch.setitem(FAMILIES, kind, replace(FAMILIES[kind], by_group=not FAMILIES[kind].by_group))
    assert proof_error(name, "tiling") == 0
    refuses("the order described is not this model's", proof_error, name, "order")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "falcon, three key-value heads", "opt", "gpt_oss",
                                  "deepseek_v3, one dense layer", "olmo2", "olmo3", "olmoe", "qwen3"])
def test_removing_heads_leaves_no_trace_of_them(name):
    """With the lowest heads gone, the model is the one in which they are masked."""
    model, ids = tiny_model(name), torch.arange(3, 12)[None]
    scores = tiny_factors(model)
    scores[1, 4] = 0.0
    removed = weights_removed(anatomy(model), sizes_of_heads(model), [(1, 4)])
    report = prune_heads(model, scores, removed / sum(p.weight.numel() for p in projections(model)))
    assert report.zeros == removed
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
    wanted = prune(model, "cap", 0.4, factors)
    assert prune_checkpoint(tmp_path / "src", tmp_path / "new", 0.4, factors, at_once=64) == wanted
    assert checkpoint_fingerprint(tmp_path / "new") == model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "new", dtype="auto"))
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval(), torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 keeps the experts beside the router")
def test_granite_moe_of_transformers_4_is_refused():
    kind, settings = TINY_MODELS["granitemoe"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **proofs.ENDS | settings))
    refuses("block_sparse_moe holds no experts: expected them beside the router", anatomy, model)


def test_what_a_falcon_h1_is_refused_for_is_true(monkeypatch):
    """Its heads could be found; with all of them masked, its tokens still meet."""
    monkeypatch.delitem(HYBRIDS, "falcon_h1")
    roles = ATTENTION | under("feed_forward", gate="gate_proj", up="up_proj", down="down_proj")
    monkeypatch.setitem(FAMILIES, "falcon_h1", Family("model.layers", "model.final_layernorm", roles))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "falcon_h1", **proofs.ENDS, **proofs.GROUPED, mamba_d_ssm=24, mamba_n_heads=6, mamba_d_head=4,
            mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=4)).float().eval()
    refuses("mamba.conv1d is a weight that the description of 'falcon_h1' leaves out", anatomy, model)
    refuses("the tokens still learn of each other", check_tokens_independent, model, torch.arange(3, 9)[None])


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe"])
def test_a_neuron_of_fused_experts_has_its_rows_of_gate_and_up(name):
    """In gpt-oss they alternate, in Granite-MoE gate lies above up; removing neurons is masking them."""
    model, ids = tiny_model(name), torch.arange(3, 12)[None]
    both = next(p for p in projections(model) if p.role == "gate_up" and p.expert == 1)
    neurons = torch.arange(3 * 4 * 12).view(3, 4, 12) + 1.0
    rows = region_factors(model, UnitFactors(tiny_factors(model), neurons=neurons))[both.name][:, 0]
    pairs = rows.view(12, 2).T if name == "gpt_oss" else rows.view(2, 12)
    assert torch.equal(pairs, neurons[0, 1].expand(2, 12))
    down = next(p for p in projections(model) if p.role == "down").weight
    remove_neurons(model, neurons <= 5)
    assert sum(int((p.weight == 0).sum()) for p in projections(model)) == 5 * 3 * down.shape[0]
    masked = tiny_model(name)
    with torch.no_grad(), masked_neurons(masked, 0, range(5), expert=0):
        assert torch.allclose(model(ids).logits, masked(ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "bloom", "gemma", "mixtral"])
def test_neurons_and_screening_agree_with_the_long_way(name):
    """First order against a change of one per cent (in an earlier layer it would send tokens to other experts), and every resumed loss against a whole pass."""
    model, examples = tiny_model(name), tiny_calibration()
    batch = collate(examples.examples, pad_id=0)
    column = down_projection(model, 1, 2 if name in MIXTURES else None).weight.detach()[:, 3]
    def by_differences(scaled):
        with torch.no_grad():
            return ((scaled(0.99) - scaled(1.01)) / 0.02).item()
    def of_neuron(factor):
        kept = column.clone()
        column.mul_(factor)
        loss = target_losses(model, batch).mean()
        column.copy_(kept)
        return loss
    def of_head(factor):
        gates = torch.ones(3, 6, dtype=torch.float64).index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(factor).double())
        with gated_heads(model, gates):
            return target_losses(model, batch).mean()
    estimate = neuron_estimates(model, examples)[(1, 2, 3) if name in MIXTURES else (1, 3)].item()
    assert estimate == pytest.approx(by_differences(of_neuron), abs=5e-4)
    naive, screened = score_heads_naive(model, examples), screen_heads(model, examples, 0.7)
    assert screened.slopes[2, 1].mean().item() == pytest.approx(by_differences(of_head), abs=5e-4)
    assert 0 < screened.measured.double().mean() < 1
    torch.testing.assert_close(screened.losses.masked[screened.measured], naive.masked[screened.measured], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["bloom", "gpt_oss", "deepseek_v2, queries without a latent"])
def test_sinks_and_latents_bear_a_shared_beginning_and_heads_at_once(name):
    """Resumed scoring runs what all examples begin with once; here that is longer than a window. BLOOM's attention does not
    return what its output projection gives, so a masked layer runs its attention."""
    model, calibration = tiny_model(name), tiny_calibration(begin=range(20, 40))
    naive = score_heads_naive(model, calibration)
    assert shared_prefix(calibration.examples) == 20
    for together in (1, 3):
        fast = score_heads(model, calibration, batch_tokens=60, heads_at_once=together)
        assert (fast.masked - naive.masked).abs().max() < 1e-5
    if name != "bloom":
        naive, fast = expert_losses(model, calibration, 60, whole_passes), expert_losses(model, calibration)
        assert torch.allclose(naive.masked, fast.masked, atol=1e-5, equal_nan=True)


def test_one_example_bears_several_heads_at_once_where_rows_of_alibi_are_counted():
    model = tiny_model("falcon, full attention, linear bias")
    model.set_attn_implementation("eager")
    one = Calibration.from_examples(tiny_calibration().examples[:1], k=1)
    naive = score_heads_naive(model, one)
    assert (score_heads(model, one, heads_at_once=3).masked - naive.masked).abs().max() < 1e-5


def test_latents_belong_to_the_layer_and_what_they_become_to_heads():
    """The matrices that make the latents have the mean factor of their layer's heads, as its MLP has."""
    model = tiny_model("deepseek_v3, one dense layer")
    factors = tiny_factors(model)
    regions = region_factors(model, factors)
    for p in (p for p in projections(model) if p.layer == 1 and p.role in HOLDS):
        width = {"query": 6, "key_value": 2 + 3, "output": 3}.get(p.role)
        by_hand = factors[1].repeat_interleave(width) if width else factors[1].mean()
        assert torch.allclose(regions[p.name].flatten(), by_hand), p.name


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_model_has_one_fingerprint_in_memory_loaded_and_in_its_files(tmp_path, name):
    """Weights, stored buffers and settings; GPT-NeoX's files call the head otherwise."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    state_rotation(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model_fingerprint(model) == model_fingerprint(loaded) == checkpoint_fingerprint(tmp_path)


@pytest.mark.parametrize("name", ["deepseek_v3, one dense layer", "glm4_moe, one dense layer", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_loaded_in_float32_whatever_its_file_says_has_one_fingerprint(tmp_path, name, dtype):
    """The gates of some routers, stored in the dtype of all else, as the hub's are."""
    tiny_model(name).to(dtype).save_pretrained(tmp_path)
    assert checkpoint_fingerprint(tmp_path) == model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"))


COMPILED = {"wrapped": lambda model: torch.compile(model, backend="eager"), "in place": lambda model: model.compile(backend="eager") or model,
            "a layer": lambda model: model.model.layers[0].compile(backend="eager") or model,
            "forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")) or model}


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_model_is_refused(how):
    """A graph that was compiled without a hook is used again when a mask has put one there, and every head would score zero."""
    refuses("compiled code runs past the hooks", anatomy, COMPILED[how](tiny_model("llama")))


def test_a_model_that_a_mask_or_a_replay_would_be_wrong_for_is_refused():
    for name, changed, said in (("llama", {"is_causal": False}, "attends to later tokens"), ("gemma3", {"use_bidirectional_attention": True}, "attends to later tokens"),
                                ("llama", {"num_hidden_layers": 2}, "3 layers and its configuration 2")):
        model = tiny_model(name)
        vars(model.config).update(changed)
        refuses(said, anatomy, model)


@pytest.mark.parametrize("work", [score_heads, screen_heads])
@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_that_takes_no_mask_for_a_position_is_refused(attention, work):
    model = tiny_llama()
    model.config._attn_implementation = attention
    refuses(f"The model asks for {attention}: .* call model.set_attn_implementation", work, model, made_up_calibration(9))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_mixture_that_would_return_its_balancing_loss_writes_all_the_same(name):
    model, prompts = tiny_model(name), [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    wanted = generate_greedy(model, byte_tokenizer(), prompts, 4)
    model.config.output_router_logits = True
    assert generate_greedy(model, byte_tokenizer(), prompts, 4) == wanted


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3, one dense layer"])
def test_a_wrong_hand_is_noticed_in_a_moe(monkeypatch, name):
    """The proofs of experts can fail: a router that is believed to choose the neighbour of each expert."""
    right = proofs.weighed_by_hand
    monkeypatch.setattr(proofs, "weighed_by_hand", lambda *given: right(*given).roll(1, -1))
    assert proof_error(name, "experts") > 0.1
    assert proof_error(name, "routed") > 0.1


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_of_a_moe_are_never_pruned(name):
    """All that has two axes in a layer is pruned, except routers and the gate of an expert that all tokens pass."""
    model = tiny_model(name)
    matrices = {key: weight for key, weight in model.named_parameters()
                if ".layers." in key and weight.ndim > 1 and not key.endswith("bias")}
    report = prune(model, "magnitude", 0.5)
    kept = [key for key, weight in matrices.items() if not (weight == 0).any()]
    sparse = sum(count > 0 for count in expert_counts(model))
    assert all(key.endswith((".gate.weight", "router.weight", "shared_expert_gate.weight")) for key in kept)
    assert len(kept) == sparse * (2 if "qwen2" in name else 1)
    assert report.weights == sum(weight.numel() for key, weight in matrices.items() if key not in kept)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_of_a_moe_have_factors_of_their_own(name):
    """A low factor for one expert makes it lose more; its layer's others lose less."""
    model = tiny_model(name)
    counts, factors = expert_counts(model), tiny_factors(model)
    first = counts.index(4)
    experts = torch.full((len(counts), 4), 5.0)
    experts[first, 2] = 1.0
    report = prune(model, "cap", 0.5, UnitFactors(factors, experts=experts))
    table = zip(projections(model), report.table)
    shares = {(p.layer, p.expert): row[3] / row[4] for p, row in table if p.role == "down"}
    assert shares[first, 2] > max(shares[first, other] for other in (0, 1, 3)) + 0.2
    refuses("expected \\[3, 4\\], one an expert", prune, tiny_model(name), "cap", 0.5, UnitFactors(factors, experts=experts[:, :3]))


SPARSITIES = dict.fromkeys(("cap", "cap@matrix", "cap_wanda@layer", "random", "gradient@row", "wanda+owl",
                            "sparsegpt+causal", "cap.signed_gradient"), 0.25)
SPARSITIES |= {"wanda@2:4": 0.5, "sparsegpt@2:4": 0.5, "heads": 0.1, "wanda^block": 0.25}


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe, two dense layers", "gpt_oss"])
def test_every_method_prunes_a_moe_and_can_be_undone(name):
    model = tiny_model(name)
    dense, copies, before = model_fingerprint(model), copied_weights(model), mask_fingerprint(model)
    for method, sparsity in SPARSITIES.items():
        report = prune(model, method, sparsity, None if "." in method else factors_read(method, tiny_factors(model)), tiny_calibration())
        assert abs(report.reached - sparsity) < (0.06 if method in ("heads", "wanda+owl") else 0.01), method
        assert mask_fingerprint(model) != before
        put_back(model, copies)
        assert model_fingerprint(model) == dense
    plot_zeros(report)


def test_a_projection_that_is_passed_by_is_refused(monkeypatch):
    """Bloom has a slow path that multiplies by the weight without calling the module: nothing could be masked there."""
    model = tiny_model("bloom")
    for layer in model.transformer.h:
        layer.self_attention.pretraining_tp, layer.self_attention.slow_but_exact = 2, True
    refuses("no mask reaches a head", anatomy, model)
    monkeypatch.setattr(anatomies, "check_computes_the_same", lambda model: None)  # as for one that is not known yet
    refuses("layer 0 was called 0 times", check_anatomy, model)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_plan_counts_the_weights_of_every_family(tmp_path, name):
    """From the configuration alone, to the last weight."""
    model = tiny_model(name)
    model.config.save_pretrained(tmp_path)
    sizes = read_sizes(str(tmp_path))
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.scope == sum(p.weight.numel() for p in projections(model)) >= sizes.met > 0


def test_a_family_of_one_s_own_passes_the_claims(monkeypatch):
    """MPT is described only here; `masking` is left out, because the attention by hand does not know MPT's bias."""
    roles = under("attn", query_key_value="Wqkv", output="out_proj") | under("ffn", up="up_proj", down="down_proj")
    family = Family(layers="transformer.blocks", final_norm="transformer.norm_f", roles=roles)
    monkeypatch.setitem(FAMILIES, "mpt", family)
    monkeypatch.setitem(TINY_MODELS, "mpt", ("mpt", dict(d_model=24, n_heads=6, n_layers=3, max_seq_len=64)))
    for claim in proofs_of("mpt"):
        if claim != "masking":
            assert proof_error("mpt", claim) <= PROOFS[claim].limit, claim


def test_an_error_of_one_s_own_family_is_not_called_damage(monkeypatch, tmp_path):
    model = tiny_llama()
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setitem(FAMILIES, "llama", replace(FAMILIES["llama"], groups=lambda config: config.no_such_heads))
    with pytest.raises(AttributeError, match="no_such_heads"):
        load_model(tmp_path)


def test_a_prefix_tells_how_long_it_is():
    """MPT's attention asks its cache for that."""
    cache, keys = PrefixCache(), torch.ones(1, 2, 3, 4)
    assert cache.get_seq_length(1) == 0
    cache.update(keys, keys, 1)
    assert cache.get_seq_length(1) == 3


GPT_NEO = Family("transformer.h", "transformer.ln_f",
                 under("attn.attention", query="q_proj", key="k_proj", value="v_proj", output="out_proj") | under("mlp", up="c_fc", down="c_proj"))


@pytest.mark.parametrize("score", [score_heads, score_divergences])
def test_a_family_whose_layers_do_not_give_the_model_s_loss_one_by_one_is_not_scored(score):
    """GPT-Neo places its window by the number of positions that it is handed, and the last layer is handed targets only."""
    def tiny(window):
        torch.manual_seed(0)
        return GPTNeoForCausalLM(GPTNeoConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
                                              window_size=window, max_position_embeddings=64, bos_token_id=1, eos_token_id=2)).eval()

    with additions_undone():
        add_family("gpt_neo", GPT_NEO)
        check_anatomy(tiny(4))  # six tokens do not show it
        score(tiny(64), tiny_calibration())
        refuses("miss the model's own loss by", score, tiny(4), tiny_calibration())
        model = tiny(64)
        attention = model.transformer.h[0].attn.attention
        attention.register_forward_hook(lambda module, args, output: (module.out_proj(output[0]), *output[1:]))
        refuses("calls 2 layers and 3 output projections", score, model, tiny_calibration())


def test_a_description_is_looked_at_before_the_work(monkeypatch):
    model = tiny_llama()
    def described(**changes):
        monkeypatch.setitem(FAMILIES, "llama", replace(LLAMA, **changes))
        return model
    refuses("no attribute 'last_norm': expected a module, or None", anatomy, described(final_norm="model.last_norm"))
    refuses("has no logits_scale: expected the number", anatomy, described(multiplied_by="logits_scale"))
    swapped = LLAMA.roles | {"up": LLAMA.roles["down"], "down": LLAMA.roles["up"]}
    refuses("the MLP does not lie as described", anatomy, described(roles=swapped))
    anatomy(described())
    layers = model.model.layers
    layers[1].self_attn.q_proj.weight = layers[0].self_attn.q_proj.weight
    refuses("model.layers.0.self_attn.q_proj and model.layers.1.self_attn.q_proj share one weight", anatomy, model)


def test_experts_have_gate_up_and_down_and_their_functions_are_noted():
    experts, codes = FAMILIES["gpt_oss"].experts, []
    for stacked in ({"gate_up": "w13"}, {"up": "u", "down": "d"}, {"gate": "g", "gate_up": "gu", "down": "d"}):
        refuses("of experts: expected gate, up and down once each", add_family, "other", replace(FAMILIES["gpt_oss"], experts=replace(experts, stacked=stacked)))
    def times(holder, gate, up): return gate * up
    def plus(holder, gate, up): return gate + up
    plus.__qualname__ = times.__qualname__
    for product in (times, plus):
        with additions_undone():
            add_family("other", replace(FAMILIES["gpt_oss"], experts=replace(experts, product=product)))
            codes.append(ADDED[-1].code)
    assert codes[0] != codes[1]
    broken = replace(LLAMA, roles={"query": "q"})
    refuses("query, key and value once each", add_family, "other", replace(LLAMA, where_none=("q_lora_rank", broken)))


def test_a_model_with_compiled_code_of_the_hub_is_refused_on_a_gpu(monkeypatch):
    """transformers 5.25 replaces norms, activations and rotations there unasked, by code that no backward pass goes through."""
    model = tiny_llama()
    model._use_kernels = True
    anatomy(model)
    monkeypatch.setattr(anatomies, "module_of", lambda device: torch.cuda)
    refuses("load it with use_kernels=False", anatomy, model)


def test_dropout_is_seen_that_no_setting_names():
    model = tiny_llama()
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.1))
    refuses("has dropout: expected evaluation mode", check_computes_the_same, model.train())
    check_computes_the_same(model.eval())


def test_a_model_with_its_language_model_inside_is_not_told_to_describe_it():
    refuses("holds its language model's settings inside its own: expected a language model alone", family_of, Gemma3Config())


def test_factors_are_float32_whatever_torch_s_default_is():
    model, factors = tiny_llama(), tiny_factors(tiny_llama())
    expected = region_factors(model, factors)
    torch.set_default_dtype(torch.bfloat16)
    try: found = region_factors(model, factors)
    finally: torch.set_default_dtype(torch.float32)
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == torch.float32 for name in expected)


@pytest.mark.parametrize("method", ["random", "rgs"])
def test_zeros_do_not_depend_on_torch_s_default_dtype(method):
    masks, (lab, tokenizer) = [], load_model("lab", "float32", "cpu")
    calibration = calibration_set(tokenizer, ("lab-arc",), n=2, k=1)
    for default in (torch.float32, torch.bfloat16):
        model = copy.deepcopy(lab)
        torch.set_default_dtype(default)
        try: prune(model, method, 0.5, calibration=calibration)
        finally: torch.set_default_dtype(torch.float32)
        masks.append(mask_fingerprint(model))
    assert masks[0] == masks[1]


def test_a_router_that_returns_logits_alone_is_refused():
    model = tiny_model("mixtral")
    router = model.model.layers[0].mlp.gate
    with router.register_forward_hook(lambda module, args, output: output[0]), masked_expert(model, 0, 1):
        refuses("does not return weights and indices", router, torch.ones(3, router.weight.shape[1]))


def test_a_family_holds_query_key_and_value_once_each():
    described = {id(each): each for family in FAMILIES.values() for each in (family, *(family.where_none or ())[1:])}
    with additions_undone():
        for number, family in enumerate(described.values()):
            add_family(f"again-{number}", family)
    attention, rest = under("a", query="q", key="k", value="v", output="o"), under("m", up="u", down="d")
    for roles in ({role: path for role, path in attention.items() if role != "key"}, {"query": "q", "output": "o"}, attention | {"query_key_value": "all"},
                  attention | {"key_value": "kv"}, {"query_latent": "q", "key_value": "kv", "output": "o"}):
        refuses("query, key and value once each", add_family, "other", Family("a", "b", roles | rest))
    refuses("cannot name a family: expected letters, digits, - and _, and none of llama, mistral", add_family, "my family", FAMILIES["llama"])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_layers_one_at_a_time_give_what_the_whole_model_gives(name):
    """A layer's arguments are recorded while only the first layer computes: they must not depend on what layers compute."""
    from cap_nb.methods.layer_walk import advanced, initial_state
    from cap_nb.models.anatomy import decoder_layers, decoder_of, final_norm

    model, ids = proofs.in_float64(name), torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        state = initial_state(model, {"input_ids": ids, "attention_mask": mask})
        for layer in range(len(decoder_layers(model))):
            state = advanced(model, state, layer)
        whole = decoder_of(model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(final_norm(model)(state.hidden)[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-12)
