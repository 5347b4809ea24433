"""Scoring

> Resumed passes against the hook loop, against the same loop in TransformerLens, and with compiled layers.

Paper: section 3.2 asks for the loss with every head masked; section 3.4 gives the hours. In: the lab model, SmolLM2, a
Mistral cut to four layers. Out: `figures/benchmarks/scoring.json`, and what is said about it below.

The records are made, on a machine that does nothing else, by

    python -m tools.benchmarks.scoring

A case that is on disk is not measured again. `CAP_NB_DATA` names the folder of the benchmarks' own files, if it is at
hand; without it the lab's tasks are read. `CAP_NB_NOTE` says what else was running. SmolLM2 is fetched with
`cap fetch smollm2`. For the comparison with TransformerLens, install it into the environment that runs the command:
`pip install "transformer_lens>=3.9,<4"`. Version 3.9 is the last that has `HookedTransformer`, and it wants
transformers 5.9 or newer.
"""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoConfig, Cache

from cap_nb.data.prompts import IGNORED
from cap_nb.engine.resumed_scoring import score_heads
from cap_nb.jobs.costs import PUBLISHED, lengths_of
from cap_nb.models.anatomy import anatomy, decoder_layers, output_projection
from cap_nb.models.loading import load_model, model_cache
from cap_nb.scoring import batches_of, mean_by_example
from tools.side_by_side import (
    ScoringRounds,
    balanced_heads,
    behind_worked_examples,
    examples_at_hand,
    examples_of_lengths,
    measured_scoring,
    random_model,
    read_cases,
)

# The settings. Squares are the sizes of the matrix product that are tried for the machine's peak. Everything is in
# float32 on the processor, with 4,096 padded tokens a batch on both sides.

ROOT = Path(__file__).resolve().parents[2]
path = ROOT / "figures" / "benchmarks" / "scoring.json"
data_dir, note, squares = os.environ.get("CAP_NB_DATA"), os.environ.get("CAP_NB_NOTE", ""), (1024, 2048, 4096)


def all_heads(model):
    return [(layer, head) for layer in range(anatomy(model).layers) for head in range(anatomy(model).heads)]


# The hook loop is the paper's procedure, written plainly: a whole pass for every head. `score_heads` resumes at the
# masked layer, runs the last layer and the output head at target positions only, and reads a prefix that all examples
# share once for each head. The lab model is small enough to score all of its 36 heads in every round.

# SmolLM2-135M-Instruct has 270 heads. Both sides get the same six, one of each of six layers spread from the first to
# the last; the mean number of layers that a resumed pass runs is that of all heads. The time without any head is
# measured beside, and what the sample took beyond it is scaled to 270 heads.
#
# The second case puts the same eight worked examples before every prompt, as chain-of-thought prompting does. Its ratio
# grows with the number of examples, since the hook loop reads the prefix once for every example. Here there are six
# examples and two heads, for a hook loop over long prompts takes its time; so the ratio is a lower bound for a
# calibration set of 384.


def smollm2_cases(path, repeats=5, n=12, shots=8, chosen=6):
    model, tokenizer = load_model("smollm2", "float32", "cpu")
    examples, said = examples_at_hand(tokenizer, n, data_dir)
    a, kept = anatomy(model), dict(weights="SmolLM2-135M-Instruct", note=note)
    measured_scoring(
        path,
        "smollm2",
        model,
        examples,
        balanced_heads(a.layers, a.heads, chosen, 1),
        ScoringRounds(squares, repeats=repeats),
        data=said,
        **kept,
    )
    worked = examples_at_hand(tokenizer, shots, data_dir, seed=1)[0].examples[:shots]
    fewer, said = examples_at_hand(tokenizer, max(1, n // 6), data_dir)
    longer = behind_worked_examples(fewer, worked)
    return measured_scoring(
        path,
        "smollm2, 8 worked examples",
        model,
        longer,
        balanced_heads(a.layers, a.heads, 2, 1),
        ScoringRounds(squares, repeats=repeats),
        data=f"{said}, each behind {shots} worked examples of {worked[0].task}",
        **kept,
    )


# A Mistral of full width, cut to four layers, with random weights: the largest model here, 1.1 billion weights. It
# reads random tokens with the lengths of real examples. The sample is one head of every layer.


def mistral_case(path, repeats=5, n=1, layers=4, each=1, **changes):
    published = PUBLISHED["mistralai/Mistral-7B-Instruct-v0.2"]
    model = random_model(AutoConfig.for_model(**published | {"num_hidden_layers": layers} | changes))
    tokenizer = load_model("smollm2" if (model_cache() / "smollm2").is_dir() else "lab", "float32", "cpu")[1]
    real, said = examples_at_hand(tokenizer, n, data_dir)
    examples = examples_of_lengths(lengths_of(real), model.config.vocab_size)
    heads = balanced_heads(layers, anatomy(model).heads, layers, each)
    return measured_scoring(
        path,
        "mistral, 4 layers",
        model,
        examples,
        heads,
        ScoringRounds(squares, repeats=repeats),
        data=f"random tokens, as long as {said}",
        weights="random, seed 0",
        note=note,
    )


# Its users write the ablation of a head as a hook on `blocks.L.attn.hook_z` that sets one head's output to zero, and
# run the whole model with it. The lab model and SmolLM2 are Llamas, so the library's own converter of Llama weights
# makes a `HookedTransformer` of either, from the sizes in the configuration. The other side, `TransformerBridge`, wraps
# the model of transformers as it is; it is what the library offers from version 4 on. Padding is on the right, where
# nothing that counts can see it, so no mask is needed.


def hooked_transformer(model):
    lens, llama = (
        importlib.import_module("transformer_lens"),
        importlib.import_module("transformer_lens.pretrained.weight_conversions"),
    )
    c, a = model.config, anatomy(model)
    sizes = lens.HookedTransformerConfig(
        n_layers=a.layers,
        n_heads=a.heads,
        n_key_value_heads=a.key_value_heads,
        d_head=a.head_size,
        d_model=a.hidden_size,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        n_ctx=min(2048, c.max_position_embeddings),
        act_fn="silu",
        gated_mlp=True,
        normalization_type="RMS",
        final_rms=True,
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=a.head_size,
        rotary_base=c.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        dtype=torch.float32,
        device="cpu",
    )
    hooked = lens.HookedTransformer(sizes)
    hooked.load_state_dict(llama.convert_llama_weights(model, sizes), strict=False)
    return hooked.eval()


def loss_with_hooks(hooked, batch, hooks):
    logits = hooked.run_with_hooks(batch["input_ids"], return_type="logits", fwd_hooks=hooks)[:, :-1]
    labels = batch["labels"][:, 1:]
    counts = labels != IGNORED
    return mean_by_example(
        F.cross_entropy(logits[counts].float(), labels[counts], reduction="none"), counts.sum(1).tolist()
    )


def zeroing(head):
    def zero(z, hook):
        z[:, :, head] = 0
        return z

    return zero


@torch.no_grad()
def lens_loop(hooked, model, calibration, batch_tokens, heads):
    table = torch.full(
        (anatomy(model).layers, anatomy(model).heads, len(calibration.examples)), torch.nan, dtype=torch.float64
    )
    for indices, batch in batches_of(calibration, batch_tokens, torch.device("cpu")):
        loss_with_hooks(hooked, batch, [])  # the intact model
        for layer, head in heads:
            table[layer, head, indices] = loss_with_hooks(
                hooked, batch, [(f"blocks.{layer}.attn.hook_z", zeroing(head))]
            )
    return table


# All sides must agree to 1e-4 nats before any is timed, which `measured_scoring` checks. The bridge changes the model
# that it wraps, so it gets a second copy.


def lens_case(path, name, repeats=5, n=4, chosen=10, each=1):
    model, tokenizer = load_model(name, "float32", "cpu")
    examples, said = examples_at_hand(tokenizer, n, data_dir)
    bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge.boot_transformers(
        name, hf_model=load_model(name, "float32", "cpu")[0], tokenizer=tokenizer
    )
    sides = {"HookedTransformer": hooked_transformer(model), "TransformerBridge": bridge}
    more = {
        side: lambda heads, hooked=hooked: lens_loop(hooked, model, examples, 4096, heads)
        for side, hooked in sides.items()
    }
    heads = balanced_heads(anatomy(model).layers, anatomy(model).heads, chosen, each)
    return measured_scoring(
        path,
        f"{name}, TransformerLens",
        model,
        examples,
        heads,
        ScoringRounds(squares, repeats=repeats),
        more=more,
        data=said,
        weights=name,
        note=note,
        transformer_lens=importlib.metadata.version("transformer_lens"),
    )


# `torch.compile` may make a layer faster. A compiled layer does not see a hook that was registered after it was
# compiled, so the masked layer must run as it is, and so must the recorded pass, whose cache would have every layer
# compiled anew; only the layers after the masked one run compiled. The last layer, which is asked for its keys alone,
# also runs as it is. What is compiled once serves all layers and batches, since lengths are left open; it is compiled
# during the first calls, which are not timed. Random tokens of real lengths share no prefix, and so bring no cache.


def compile_layers(model, **options):
    def chosen(layer, projection, plain, fast):
        def forward(*args, **given):
            hooked = projection._forward_pre_hooks or projection._forward_hooks
            as_it_is = hooked or any(isinstance(value, Cache) for value in given.values())
            return (plain if as_it_is else fast)(*args, **given)

        layer.forward = forward

    for number, layer in enumerate(decoder_layers(model)[:-1]):
        chosen(
            layer,
            output_projection(model, number),
            layer.forward,
            torch.compile(layer.forward, dynamic=True, **options),
        )
    return model


def compiled_case(path, name, repeats=5, n=4, chosen=10, each=1):
    model, tokenizer = load_model(name, "float32", "cpu")
    compiled = compile_layers(load_model(name, "float32", "cpu")[0])
    real, said = examples_at_hand(tokenizer, n, data_dir)
    examples, heads = (
        examples_of_lengths(lengths_of(real), model.config.vocab_size),
        balanced_heads(anatomy(model).layers, anatomy(model).heads, chosen, each),
    )

    def once(heads):
        return score_heads(compiled, examples, 4096, heads=heads).masked

    return measured_scoring(
        path,
        f"{name}, compiled",
        model,
        examples,
        heads,
        ScoringRounds(squares, repeats=repeats),
        more={"compiled": once},
        data=f"random tokens, as long as {said}",
        weights=name,
        note=note,
    )


# The two copies agree, checked on a few lab examples where no clock runs. Compiling is not tried here, because not
# every machine has a C++ compiler: `backend="eager"` traces the layers and runs them as they are, which is enough to
# see that a masked head is not lost.


def main() -> None:
    model, tokenizer = load_model("lab", "float32", "cpu")
    examples, said = examples_at_hand(tokenizer, 16)
    kept = dict(data=said, weights="lab", note=note)
    print(measured_scoring(path, "lab", model, examples, all_heads(model), ScoringRounds(squares), **kept)["seconds"])
    if (model_cache() / "smollm2").is_dir():
        print(smollm2_cases(path)["seconds"])
    else:
        print("SmolLM2 is not fetched: run 'cap fetch smollm2' first.")
    print("measured already" if "mistral, 4 layers" in read_cases(path) else mistral_case(path)["seconds"])
    if importlib.util.find_spec("transformer_lens"):
        print(lens_case(path, "lab", n=16, chosen=6, each=6)["seconds"])
        if (model_cache() / "smollm2").is_dir():
            print(lens_case(path, "smollm2", n=2, chosen=6)["seconds"])
    else:
        print("TransformerLens is not installed here: see the top of this file.")
    if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        print("There is no C++ compiler here, and torch.compile needs one.")
    else:
        print(compiled_case(path, "lab", n=16, chosen=6, each=6)["seconds"])
        if (model_cache() / "smollm2").is_dir():
            print(compiled_case(path, "smollm2", n=2, chosen=6)["seconds"])


if __name__ == "__main__":
    main()
