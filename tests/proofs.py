"""What is claimed of every family of transformers, measured on a tiny random model of the true class.

    python tests/proofs.py          writes figures/families/proofs.json, which the page of supported models reads

`TINY_MODELS` are the models, `PROOFS` the claims, each with the limit under which it counts as proved;
tests/test_families.py measures every claim on every model. The attention and the experts are written out once more by
hand, in float64 and without anything that the package knows about layouts: fused matrices are cut by reshaping, as the
papers of these models describe them.
"""
import copy
import datetime
import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import SkipTest

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from cap_nb.calibration import Calibration
from cap_nb.core.files import write_checked
from cap_nb.data.prompts import IGNORED, Example
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.evaluation import window_losses
from cap_nb.methods.criteria import dense_norms
from cap_nb.methods.prune import needs_of, parse_method, prune
from cap_nb.methods.streaming import prune_checkpoint
from cap_nb.models.anatomy import anatomy, expert_counts, output_projection, projections
from cap_nb.models.checks import check_anatomy
from cap_nb.models.loading import save_model
from cap_nb.models.interventions import masked_expert
from cap_nb.regions import as_factors, blocks, region_factors, region_factors_naive
from cap_nb.scoring import masked_head, score_heads_naive

RECORD = Path(__file__).resolve().parent.parent / "figures" / "families" / "proofs.json"

# Tiny models of the true classes: three layers, a vocabulary of 97, six query heads, and wherever the class allows it
# three key-value heads and a head size of 4 although hidden size over heads is 3, sizes that go wrong when something is
# assumed. Windows are shorter than the sequences. Every switch that makes a family what it is, is on. Mixtures have
# four experts, two for each token, and some have dense layers among the sparse ones; their widths are multiples of
# four, because the kernel by which transformers 5 multiplies experts wants rows of whole 16 bytes.

# some families' default tokens lie outside so small a vocabulary
ENDS = dict(vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GROUPED = dict(hidden_size=18, intermediate_size=26, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
               head_dim=4, max_position_embeddings=64)
# for classes in which hidden size is heads times head size
SQUARE = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=6)
OLD = dict(n_embd=24, n_layer=3, n_head=6, n_inner=28, n_positions=64)
FEW = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
MIXED = GROUPED | FEW | dict(hidden_size=20, intermediate_size=28)
SQUARE_MIXED = GROUPED | FEW | dict(hidden_size=24, intermediate_size=28)
WINDOWS = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
NEOX = SQUARE | dict(intermediate_size=28, rotary_pct=0.5)
OPT = SQUARE | dict(ffn_dim=28, max_position_embeddings=64)
SHARED = SQUARE_MIXED | dict(shared_expert_intermediate_size=16)
STABLE = SQUARE | dict(intermediate_size=26, num_key_value_heads=3, partial_rotary_factor=0.5)
GRANITE = dict(logits_scaling=3.0, attention_multiplier=0.4, residual_multiplier=0.5, embedding_multiplier=2.0)
# plain rotary angles, in the words of transformers 4 and 5: the default's grow with the length
SINKS = GROUPED | WINDOWS | dict(hidden_size=20, intermediate_size=12, num_local_experts=4, num_experts_per_tok=2,
                                 rope_scaling=None, rope_parameters=dict(rope_type="default", rope_theta=150_000.0))
# a query has 6 rows, 4 of them rotated, a key of its own 2, a value 3
LATENT = SQUARE | dict(
    intermediate_size=28, num_key_value_heads=6, q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=2,
    v_head_dim=3, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=12,
    routed_scaling_factor=1.5, max_position_embeddings=64)

TINY_MODELS: dict[str, tuple[str, dict]] = {  # name of a variant -> its model_type and settings
    "llama": ("llama", GROUPED),
    "llama, one key-value head": ("llama", GROUPED | dict(num_key_value_heads=1)),
    "llama, full attention": ("llama", GROUPED | dict(num_key_value_heads=6)),
    "mistral": ("mistral", GROUPED | dict(sliding_window=4)),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED),
    "olmo": ("olmo", GROUPED),
    "olmo2": ("olmo2", GROUPED),
    "smollm3": ("smollm3", GROUPED | dict(no_rope_layer_interval=2)),
    "gemma": ("gemma", GROUPED | dict(num_key_value_heads=1)),
    "gemma2": ("gemma2", GROUPED | WINDOWS | dict(query_pre_attn_scalar=8, attn_logit_softcapping=2.0,
                                                  final_logit_softcapping=5.0)),
    "gemma3": ("gemma3_text", GROUPED | WINDOWS | dict(query_pre_attn_scalar=8, final_logit_softcapping=5.0)),
    "granite": ("granite", GROUPED | GRANITE),
    "cohere": ("cohere", GROUPED | dict(use_qk_norm=True, logit_scale=0.3)),
    "cohere2": ("cohere2", GROUPED | WINDOWS | dict(hidden_size=24, logit_scale=0.3)),
    "starcoder2": ("starcoder2", GROUPED | dict(sliding_window=4)),
    "stablelm": ("stablelm", STABLE | dict(qk_layernorm=True)),
    "stablelm, parallel": ("stablelm", STABLE | dict(use_parallel_residual=True, use_qkv_bias=True)),
    "nemotron": ("nemotron", GROUPED | dict(partial_rotary_factor=0.5)),
    "glm4": ("glm4", GROUPED | dict(head_dim=8, partial_rotary_factor=0.5, attention_bias=True)),
    "arcee": ("arcee", GROUPED),
    "ernie4_5": ("ernie4_5", GROUPED | dict(use_bias=True)),
    "olmo3": ("olmo3", GROUPED | WINDOWS),
    "seed_oss": ("seed_oss", GROUPED),
    "phi": ("phi", GROUPED),
    "phi3": ("phi3", GROUPED),
    "gpt2": ("gpt2", OLD),
    "gptj": ("gptj", OLD | dict(rotary_dim=4)),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox, one after the other": ("gpt_neox", NEOX | dict(use_parallel_residual=False)),
    "opt": ("opt", OPT | dict(word_embed_proj_dim=24)),
    "opt, narrow embedding, no last norm": ("opt", OPT | dict(word_embed_proj_dim=10, do_layer_norm_before=False)),
    "bloom": ("bloom", dict(hidden_size=24, n_layer=3, n_head=6)),
    "falcon, one key-value head": ("falcon", SQUARE | dict(multi_query=True)),
    "falcon, three key-value heads": ("falcon", SQUARE | dict(new_decoder_architecture=True, num_kv_heads=3)),
    "falcon, full attention, linear bias": ("falcon", SQUARE | dict(multi_query=False, alibi=True,
                                                                    parallel_attn=False, bias=True)),
    "mixtral": ("mixtral", MIXED | dict(num_local_experts=4, sliding_window=4)),
    "olmoe": ("olmoe", SQUARE_MIXED),
    "qwen3_moe": ("qwen3_moe", MIXED | dict(norm_topk_prob=True)),
    "qwen3_moe, one dense layer": ("qwen3_moe", MIXED | dict(mlp_only_layers=[1])),
    "qwen2_moe": ("qwen2_moe", SHARED),
    "qwen2_moe, two dense layers": ("qwen2_moe", SHARED | dict(decoder_sparse_step=2)),
    "granitemoe": ("granitemoe", GRANITE | SQUARE | dict(intermediate_size=12, num_key_value_heads=3,
                                                         num_local_experts=4, num_experts_per_tok=2)),
    "gpt_oss": ("gpt_oss", SINKS),
    "glm4_moe, one dense layer": ("glm4_moe", LATENT | GROUPED | dict(
        hidden_size=20, use_qk_norm=True, partial_rotary_factor=0.5, first_k_dense_replace=1, n_group=2, topk_group=1)),
    "deepseek_v2, queries without a latent": ("deepseek_v2", LATENT | dict(q_lora_rank=None)),
    "deepseek_v2, queries from a latent": ("deepseek_v2", LATENT),
    "deepseek_v3, one dense layer": ("deepseek_v3", LATENT | dict(first_k_dense_replace=1, n_group=2, topk_group=1)),
}


NEEDS_5 = {  # name of a variant -> what transformers 4 does
    "stablelm": "expects a bias of norms that have none when it draws weights",
    "granitemoe": "keeps the experts of Granite-MoE elsewhere"}


def tiny_model(name, dtype=torch.float32):
    """A copy of a model that is drawn once in a process."""
    return copy.deepcopy(drawn_model(name)).to(dtype)


@functools.cache
@torch.no_grad()
def drawn_model(name):
    """A tiny model of a family's true class; every parameter is random, biases and norms too, so that none can be
    forgotten unseen."""
    kind, settings = TINY_MODELS[name]
    if name in NEEDS_5 and transformers.__version__ < "5":
        raise SkipTest(f"transformers {transformers.__version__} {NEEDS_5[name]}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ENDS | settings)).float().eval()
    rng = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.add_(0.2 * torch.randn(weight.shape, generator=rng))
    for correction in (each for key, each in model.named_buffers() if key.endswith("e_score_correction_bias")):
        # positive, because transformers 4 gives the experts of the worse half 0
        correction.add_(0.2 * torch.randn(correction.shape, generator=rng).abs())
    return model


def in_float64(name):
    """A tiny model that computes in float64; experts one by one, because the kernel for groups has no float64."""
    model = tiny_model(name, torch.float64)
    if any(expert_counts(model)) and hasattr(model, "set_experts_implementation"):  # transformers 5
        model.set_experts_implementation("eager")
    elif name.startswith(("deepseek_v3", "glm4_moe")):
        # transformers 4 adds up in the dtype of the experts' weights, which is float32
        for module in (each for each in model.modules() if type(each).__name__.endswith("TopkRouter")):
            module.register_forward_hook(lambda module, args, output: (output[0], output[1].double()))
    return model


def random_examples(lengths, seed, begin=()):
    """Random sequences of these lengths, which may begin with the same tokens; the loss counts from the fourth on."""
    rng, examples = torch.Generator().manual_seed(seed), []
    for number, length in enumerate(lengths):
        ids = tuple(torch.randint(3, 97, (length,), generator=rng).tolist())
        examples.append(Example(task="own", uid=str(number), prompt="", target="", answer="", input_ids=(*begin, *ids),
                                labels=(IGNORED,) * (len(begin) + 3) + ids[3:]))
    return examples


def tiny_calibration(begin=()):
    """Five sequences of 5 to 9 tokens: the batch is padded, and longer than the windows."""
    return Calibration.from_examples(random_examples(range(5, 10), 1, begin), k=1)


def tiny_factors(model):
    """A random importance factor for every head, [L, H], in [1, 10]."""
    a = anatomy(model)
    return 1 + 9 * torch.rand(a.layers, a.heads, generator=torch.Generator().manual_seed(2))


def factors_read(method, factors):
    """Factors for a method that reads them, else none."""
    return factors if "factors" in needs_of(parse_method(method)) else None


# The attention by hand: what a head adds to the attention's output is W_o[:, h] softmax(q_h k_g^T s + m) v_g


# their fused rows are [its queries, key, value] for each key-value head
BY_KEY_VALUE_HEAD = ("gpt_neox", "bloom", "falcon")
NEVER_TURNED = ("gpt2", "opt", "bloom")
NEIGHBOURS = ("gptj", "cohere", "cohere2", "glm4", "ernie4_5", "deepseek_v2", "deepseek_v3")
# of the linear bias of six heads
SLOPES = torch.tensor([2, 4, 6, 8, 1, 3], dtype=torch.float64).neg().exp2()[:, None, None]


def cut_by_hand(model, layer, x):
    """Query [T, H, d], key and value [T, G, d] of every head, from what enters the attention, x [T, hidden]."""
    a, outputs = anatomy(model), {}
    for p in projections(model):
        if p.layer == layer and p.role in ("query", "key", "value", "query_key_value"):
            # GPT-2 stores [in, out]
            outputs[p.role] = x @ (p.stored.double() if a.family == "gpt2" else p.stored.double().T)
            if p.module.bias is not None:
                outputs[p.role] += p.module.bias.double()
    if "query" in outputs:
        return tuple(outputs[role].reshape(len(x), -1, a.head_size) for role in ("query", "key", "value"))
    fused = outputs["query_key_value"]
    if a.family not in BY_KEY_VALUE_HEAD:
        sizes = [a.heads * a.head_size] + 2 * [a.key_value_heads * a.head_size]
        return tuple(part.reshape(len(x), -1, a.head_size) for part in fused.split(sizes, dim=1))
    grouped = fused.reshape(len(x), a.key_value_heads, -1, a.head_size)
    return grouped[:, :, :-2].flatten(1, 2), grouped[:, :, -2], grouped[:, :, -1]


def normed_by_hand(model, layer, x, which):
    """Queries or keys, x [T, heads, d], after the norm `which` ("q_norm" or "k_norm"), if the family has it.

    Qwen3 and Gemma 3 norm each head by its root mean square (Gemma's weight is what is added to 1), OLMo-2, 3 and OLMoE
    all heads together; Cohere and StableLM standardise each head and have a weight for every one of them.
    """
    kind, named = model.config.model_type, dict(model.named_parameters())
    if kind == "stablelm" and model.config.qk_layernorm:
        name = f"model.layers.{layer}.self_attn.{which[0]}_layernorm.norms"
        weights = [named[f"{name}.{head}.weight"].double() for head in range(x.shape[1])]
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + model.config.layer_norm_eps).sqrt() * torch.stack(weights)
    weight = named.get(f"model.layers.{layer}.self_attn.{which}.weight")
    if weight is None:
        return x
    weight, eps = weight.double(), getattr(model.config, "layer_norm_eps", None) or model.config.rms_norm_eps
    if kind == "cohere":
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    if kind in ("olmo2", "olmo3", "olmoe"):
        flat = x.flatten(1)
        return (flat / (flat.square().mean(-1, keepdim=True) + eps).sqrt() * weight).view_as(x)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (weight + 1 if kind == "gemma3_text" else weight)


def has_window(config, layer):
    """Whether a layer sees only the last few tokens."""
    kinds = getattr(config, "layer_types", None)
    return bool(getattr(config, "sliding_window", None)) and (kinds is None or kinds[layer] == "sliding_attention")


def base_and_share(config, layer):
    """Base of the rotary angles, and the share of a head's coordinates that are turned, as transformers 4 and 5 keep
    them."""
    kept, local = getattr(config, "rope_parameters", None), has_window(config, layer)
    if kept is None:  # transformers 4, and GPT-J
        setting = "rope_local_base_freq" if local and config.model_type == "gemma3_text" else "rope_theta"
        base = getattr(config, "rotary_emb_base", getattr(config, setting, 10_000.0))
        return base, getattr(config, "rotary_pct", getattr(config, "partial_rotary_factor", 1.0))
    if "full_attention" in kept:
        kept = kept["sliding_attention" if local else "full_attention"]
    return kept["rope_theta"], kept.get("partial_rotary_factor", 1.0)


def is_turned(config, layer):
    """Whether a layer has a rotary embedding: SmolLM3 leaves some layers without, Cohere 2 those without a window."""
    kind = config.model_type
    if kind in NEVER_TURNED or getattr(config, "alibi", False):
        return False
    if kind == "smollm3":
        return bool(config.no_rope_layers[layer])
    return kind != "cohere2" or has_window(config, layer)


def turned_by_hand(model, layer, x):
    """Queries or keys, x [T, heads, d], after the rotary embedding.

    Pairs of coordinates are turned by an angle that grows with the position.

    Most families pair coordinate i with i + r/2 among the first r; GPT-J, Cohere and some later ones pair neighbours.
    """
    config, kind = model.config, model.config.model_type
    if not is_turned(config, layer):
        return x
    base, share = base_and_share(config, layer)
    width = config.rotary_dim if kind == "gptj" else int(x.shape[-1] * share)
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequency
    first, second = slice(0, width // 2), slice(width // 2, width)
    if kind in NEIGHBOURS:
        first, second = slice(0, width, 2), slice(1, width, 2)
    turned = x.clone()
    turned[..., first] = x[..., first] * angle.cos() - x[..., second] * angle.sin()
    turned[..., second] = x[..., second] * angle.cos() + x[..., first] * angle.sin()
    return turned


def scores_by_hand(model, layer, query, key):
    """What goes into the softmax, [H, T, T], from queries and repeated keys, [T, H, d] each.

    The scale is 1 / sqrt(d) unless the configuration has another; Gemma 2 bends the scores; Bloom and one Falcon add a
    bias that grows linearly with the key's position, with one slope a head; a window hides what is further back.
    """
    config, kind, size, position = model.config, model.config.model_type, query.shape[-1], torch.arange(len(query))
    scale = getattr(config, "query_pre_attn_scalar", size) ** -0.5
    scale = config.attention_multiplier if "granite" in kind else scale
    scores = torch.einsum("thd,shd->hts", query, key) * scale
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap and config._attn_implementation == "eager":  # the other kernels of transformers 4 have no cap
        scores = cap * (scores / cap).tanh()
    if kind == "bloom":
        scores = scores + SLOPES * position
    if getattr(config, "alibi", False):
        scores = scores + SLOPES * position * size ** -0.5
    hidden = position[None, :] > position[:, None]
    if has_window(config, layer):
        hidden = hidden | (position[None, :] <= position[:, None] - config.sliding_window)
    return scores.masked_fill(hidden, -math.inf)


def latent_by_hand(model, layer, x):
    """Query, key and value of every head, [T, H, ...] each, in latent attention: the rotated key is all heads'."""
    config, prefix = model.config, f"model.layers.{layer}.self_attn."
    named = {key.removeprefix(prefix): w.double() for key, w in model.named_parameters() if key.startswith(prefix)}

    def from_latent(latent, which):
        return latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * named[f"{which}_a_layernorm.weight"]

    heads, rank, plain = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    query = x @ named["q_proj.weight"].T if config.q_lora_rank is None else (
        from_latent(x @ named["q_a_proj.weight"].T, "q") @ named["q_b_proj.weight"].T)
    query, down = query.unflatten(-1, (heads, -1)), x @ named["kv_a_proj_with_mqa.weight"].T
    rotated = turned_by_hand(model, layer, down[:, None, rank:]).expand(-1, heads, -1)
    both = (from_latent(down[:, :rank], "kv") @ named["kv_b_proj.weight"].T).unflatten(-1, (heads, -1))
    query = torch.cat([query[..., :plain], turned_by_hand(model, layer, query[..., plain:])], -1)
    return query, torch.cat([both[..., :plain], rotated], -1), both[..., plain:]


def heads_by_hand(model, layer, x):
    """What each head adds to the attention's output, [H, T, hidden], from what enters the attention, x [T, hidden]
    (paper section 3.2). In gpt-oss a sink takes part in the softmax as a key without a value."""
    a = anatomy(model)
    repeats = a.heads // a.key_value_heads
    if a.family in ("deepseek_v2", "deepseek_v3"):
        query, key, value = latent_by_hand(model, layer, x)
    else:
        query, key, value = cut_by_hand(model, layer, x)
        query = turned_by_hand(model, layer, normed_by_hand(model, layer, query, "q_norm"))
        # Cohere's norm has a weight for every key-value head, so keys are normed before they are repeated
        key = turned_by_hand(model, layer, normed_by_hand(model, layer, key, "k_norm").repeat_interleave(repeats, 1))
    scores = scores_by_hand(model, layer, query, key)
    sinks = dict(model.named_parameters()).get(f"model.layers.{layer}.self_attn.sinks")
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(x), 1)], -1)
    weights = scores.softmax(-1)[..., :len(x)]
    read = torch.einsum("hts,shd->htd", weights, value.repeat_interleave(repeats, 1))
    weight = output_projection(model, layer).weight.double()
    columns = (weight.T if model.config.model_type == "gpt2" else weight).reshape(-1, a.heads, a.head_size)
    return torch.einsum("htd,ohd->hto", read, columns)


def input_and_output(model, module, ids):
    """What enters and what leaves a module that is called once, [T, ...] each, for ids [1, T]."""
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append((args[0][0], output[0])))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def masking_error(name, folder):
    """How far masking a head is from taking away what it adds, by hand.

    A bias of the output projection stays in both outputs and drops out of their difference.
    What is left is float32: transformers computes angles and softmax in it, whatever the dtype of the weights.
    """
    model, ids, errors = in_float64(name), torch.arange(3, 12)[None], []
    for layer in range(anatomy(model).layers):
        first, out = next(p for p in projections(model) if p.layer == layer).module, output_projection(model, layer)
        added = heads_by_hand(model, layer, input_and_output(model, first, ids)[0])
        intact = input_and_output(model, out, ids)[1]
        for head, by_hand in enumerate(added):
            with masked_head(model, layer, head):
                masked = input_and_output(model, out, ids)[1]
            errors.append((intact - masked - by_hand).abs().max() / added.abs().max())
    return torch.stack(errors).max().item()  # NaN where one is


# Experts by hand: the router's logits become probabilities, the two largest are kept, and made to sum to 1 where the
# configuration says so (some always do); an expert multiplies what gate and up give, gate through x sigmoid(x), and
# down leads back. gpt-oss has another product, and biases. DeepSeek multiplies the weights by a number; V3 and GLM-4.5
# take sigmoids, not a softmax, and both experts of the better half, chosen with a correction that weights do not have.


def sparse_blocks(model):
    """Layer -> the block that sends tokens to experts, for sparse layers."""
    counts = expert_counts(model)
    return {layer: getattr(module, "block_sparse_moe", None) or module.mlp
            for layer, module in enumerate(model.model.layers) if counts[layer]}


def expert_by_hand(model, layer, expert, x):
    """What enters the down projection of an expert and what leaves it, [n, ...] each; weights are looked up as
    either version names them."""
    named, block = dict(model.named_parameters()), f"model.layers.{layer}.mlp"
    if model.config.model_type == "gpt_oss":
        both, b, down, c = (named[f"{block}.experts.{each}"][expert] for each in (
            "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"))
        gate, up = (x @ both + b).unflatten(-1, (-1, 2)).unbind(-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        inner = (up + 1) * gate * (1.702 * gate).sigmoid()
        return inner, inner @ down + c
    if model.config.model_type == "granitemoe":
        block = f"model.layers.{layer}.block_sparse_moe"
    if f"{block}.experts.down_proj" in named:
        gate, up = named[f"{block}.experts.gate_up_proj"][expert].chunk(2)
        down = named[f"{block}.experts.down_proj"][expert]
    else:
        names, home = ("gate_proj", "up_proj", "down_proj"), block
        if model.config.model_type == "mixtral":
            names, home = ("w1", "w3", "w2"), block.replace("mlp", "block_sparse_moe")
        gate, up, down = (named[f"{home}.experts.{expert}.{each}.weight"] for each in names)
    inner = x @ gate.T * (x @ gate.T).sigmoid() * (x @ up.T)
    return inner, inner @ down.T


def weighed_by_hand(model, layer, x):
    """Weight of every expert for every token, 0 for those that were not chosen, [n, E]."""
    named, config, kind = dict(model.named_parameters()), model.config, model.config.model_type
    names = [f"model.layers.{layer}.{block}" for block in ("mlp.gate", "block_sparse_moe.gate", "mlp.router",
                                                           "block_sparse_moe.router")]
    router = next(name for name in names if f"{name}.weight" in named)
    logits = x @ named[f"{router}.weight"].T
    if kind == "gpt_oss":
        logits = logits + named[f"{router}.bias"]
    if kind in ("deepseek_v3", "glm4_moe"):
        correction = model.get_buffer(f"{router}.e_score_correction_bias")
        halves = (logits.sigmoid() + correction).unflatten(-1, (2, 2)).sum(-1)
        kept = logits.sigmoid() * (halves == halves.amax(-1, keepdim=True)).repeat_interleave(2, -1)
        return config.routed_scaling_factor * kept / kept.sum(-1, keepdim=True)
    probabilities = logits.softmax(-1)
    second = probabilities.sort(-1, descending=True).values[:, 1:2]
    kept = probabilities.where(probabilities >= second, 0.0)
    if kind == "deepseek_v2":
        return config.routed_scaling_factor * kept
    normed = kind in ("mixtral", "granitemoe", "gpt_oss") or config.norm_topk_prob
    return kept / kept.sum(-1, keepdim=True) if normed else kept


@torch.no_grad()
def experts_error(name, folder):
    """How far masking an expert is from taking away what it adds, by hand."""
    model, ids, errors = in_float64(name), torch.arange(3, 12)[None], []
    for layer, block in sparse_blocks(model).items():
        x, intact = (t.reshape(ids.shape[1], -1) for t in input_and_output(model, block, ids))
        weights = weighed_by_hand(model, layer, x)
        added = torch.stack([weights[:, expert, None] * expert_by_hand(model, layer, expert, x)[1]
                             for expert in range(weights.shape[1])])
        for expert, by_hand in enumerate(added):
            with masked_expert(model, layer, expert):
                masked = input_and_output(model, block, ids)[1].reshape(intact.shape)
            errors.append((intact - masked - by_hand).abs().max() / added.abs().max())
    return torch.stack(errors).max().item()


def squares_by_hand(model, examples):
    """(layer, expert, whether down) -> sum of squares of what is read there; every example alone, token after token."""
    squares = {}
    for example in examples:
        for layer, block in sparse_blocks(model).items():
            for token in input_and_output(model, block, torch.tensor([example.input_ids]))[0]:
                for expert in weighed_by_hand(model, layer, token[None])[0].nonzero()[:, 0].tolist():
                    inner = expert_by_hand(model, layer, expert, token[None])[0][0]
                    for is_down, read in ((False, token), (True, inner)):
                        key = layer, expert, is_down
                        squares[key] = squares.get(key, 0) + read.square()
    return squares


@torch.no_grad()
def routed_error(name, folder):
    """How far the input norms of experts, as Wanda takes them, are from sums over the tokens that were sent to them,
    without padding."""
    model, calibration, errors = in_float64(name), tiny_calibration(), []
    norms, squares = dense_norms(model, calibration, batch_tokens=30), squares_by_hand(model, calibration.examples)
    for p in projections(model):
        if p.expert is not None:
            wanted = (squares[p.layer, p.expert, p.role == "down"] / len(calibration.examples)).sqrt()
            errors.append((norms[p.name] - wanted).abs().max() / wanted.max())
    return torch.stack(errors).max().item()


# Losses, regions, and what becomes of a pruned model


def order_error(name, folder):
    """0 if the live model answers as its family describes it, in every layer; otherwise `BadInput` is raised."""
    model = tiny_model(name)
    check_anatomy(model, range(anatomy(model).layers))
    return 0.0


def resuming_error(name, folder):
    """How far resumed losses are from those of the hook loop, in nats; infinite if masking changes nothing."""
    model, calibration = tiny_model(name), tiny_calibration()
    naive, resumed = score_heads_naive(model, calibration), score_heads(model, calibration)
    if (naive.masked - naive.intact).abs().amax(-1).min() < 1e-4:
        return math.inf
    return (naive.masked - resumed.masked).abs().max().item()


@torch.no_grad()
def perplexity_error(name, folder):
    """How far the loss that perplexity is made of is from that of the model's own logits, in nats."""
    model, ids = tiny_model(name), torch.arange(3, 12)[None]
    logits = model(input_ids=ids, use_cache=False).logits
    return abs(window_losses(model, ids, 4).item() - F.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).item())


def tiling_error(name, folder):
    """How many weights the regions leave out, take twice, or give another factor than the form written out."""
    model, wrong = tiny_model(name), 0
    factors, groups = tiny_factors(model), anatomy(model).key_value_heads
    short, written = region_factors(model, factors), region_factors_naive(model, factors)
    for p in projections(model):
        times = torch.zeros(p.weight.shape)
        for rows, columns, _ in blocks(p, as_factors(factors), groups):
            times[rows, columns] += 1
        wrong += int((times != 1).sum()) + int((short[p.name].expand_as(times) != written[p.name]).sum())
    return float(wrong)


@torch.no_grad()
def saving_error(name, folder):
    """How far the logits of a pruned model, saved and loaded again, are from what they were.

    Infinite if a weight differs, or if the loaded model cannot write.
    Where in memory a weight lies may change the last bit of a logit.
    """
    model, ids = tiny_model(name), torch.arange(3, 12)[None]
    prune(model, "cap", 0.3, tiny_factors(model))
    save_model(model, None, folder / "pruned")
    again = AutoModelForCausalLM.from_pretrained(folder / "pruned").eval()
    if not all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True)):
        return math.inf
    if again.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape != (1, 12):
        return math.inf
    return (again(ids).logits - model(ids).logits).abs().max().item()


def tensors_in(folder):
    """Every tensor of a checkpoint by name."""
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}


def streaming_error(name, folder):
    """How many weights differ between pruning a checkpoint and pruning the model, in bfloat16, where ties are many;
    infinite if reports do."""
    model = tiny_model(name, torch.bfloat16)
    factors = tiny_factors(model)
    model.save_pretrained(folder / "dense", max_shard_size="4KB")
    wanted = prune(model, "cap", 0.4, factors)
    if prune_checkpoint(folder / "dense", folder / "streamed", 0.4, factors, at_once=100) != wanted:
        return math.inf
    model.save_pretrained(folder / "memory", max_shard_size="4KB")
    streamed, in_memory = tensors_in(folder / "streamed"), tensors_in(folder / "memory")
    return float(sum((streamed[key] != in_memory[key]).sum().item() for key in in_memory))


def methods_error(name, folder):
    """How far the other methods are from their sparsity; a row of 18 weights cannot lose exactly a quarter."""
    worst = 0.0
    for method in ("magnitude", "wanda", "ria", "gradient", "sparsegpt"):
        report = prune(tiny_model(name), method, 0.25, calibration=tiny_calibration())
        worst = max(worst, abs(report.reached - 0.25))
    return worst


# The claims


@dataclass(frozen=True)
class Proof:
    """A claim that can be measured."""
    says: str  # the claim
    limit: float  # it holds up to here
    measure: Callable[[str, Path], float]  # (name of a tiny model, empty folder) -> how far it is from holding
    of_experts: bool = False  # whether it says something of mixtures of experts only


PROOFS: dict[str, Proof] = {
    "order": Proof("rows change the heads that they are said to change, and masking all heads parts the tokens",
                   0, order_error),
    "masking": Proof("masking a head takes away what it adds, by hand in float64", 1e-5, masking_error),
    "resuming": Proof("resumed losses are those of the hook loop", 1e-5, resuming_error),
    "perplexity": Proof("the loss in pieces is that of the model's logits", 1e-5, perplexity_error),
    "experts": Proof(says="masking an expert takes away what it adds, by hand in float64",
                     limit=1e-5, measure=experts_error, of_experts=True),
    "routed": Proof(says="Wanda's norms of an expert count the tokens sent to it, by hand in float64",
                    limit=1e-5, measure=routed_error, of_experts=True),
    "tiling": Proof("every weight in scope belongs to one region", 0, tiling_error),
    "saving": Proof("a pruned model that is saved and loaded has the same weights, gives the same logits, and writes",
                    1e-5, saving_error),
    "streaming": Proof("pruning the checkpoint gives the bits of pruning the model", 0, streaming_error),
    "methods": Proof("magnitude, Wanda, RIA, gradient and SparseGPT reach the sparsity asked for", 0.06, methods_error),
}


def proofs_of(name):
    """The claims that are made of a tiny model: those of experts only where there are some."""
    mixture = any(expert_counts(tiny_model(name)))
    return tuple(claim for claim, proof in PROOFS.items() if mixture or not proof.of_experts)


def proof_error(name, claim):
    """How far one claim is from holding on one tiny model."""
    with tempfile.TemporaryDirectory() as folder:
        return PROOFS[claim].measure(name, Path(folder))


def write_record(path=RECORD):
    """Measure every claim on every tiny model, and keep what was measured, with the claims and the versions of the
    libraries."""
    errors = {name: {claim: proof_error(name, claim) for claim in proofs_of(name)} for name in TINY_MODELS}
    claims = {claim: {"says": proof.says, "limit": proof.limit} for claim, proof in PROOFS.items()}
    families = {name: kind for name, (kind, _) in TINY_MODELS.items()}
    made = {"date": datetime.date.today().isoformat(), "torch": torch.__version__,
            "transformers": transformers.__version__}
    in_order = {"claims": list(claims), "families": list(families)}
    write_checked(path, {"made": made, "claims": claims, "families": families, "errors": errors, "in order": in_order})


if __name__ == "__main__":
    write_record()
