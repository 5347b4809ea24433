"""Scoring

> Resumed passes against the hook loop, against the same loop in TransformerLens, and with compiled layers.

Paper: section 3.2 asks for the loss with every head masked; section 3.4 gives the hours. In: the lab model, SmolLM2, a
Mistral cut to four layers. Out: `figures/benchmarks/scoring.json`, and what is said about it below.

The records are made, on a machine that does nothing else, by

    python -m tools.benchmarks.scoring

`CAP_NB_DATA` names the folder of the benchmarks' own files, if it is at hand; without it the lab's tasks are read.
SmolLM2 is fetched with `cap fetch smollm2`. For the comparison with TransformerLens, install it into the environment
that runs the command: `pip install "transformer_lens>=3.9,<4"`. Version 3.9 is the last that has `HookedTransformer`,
and it wants transformers 5.9 or newer.
"""

import importlib.metadata
import importlib.util
import os
import shutil

import torch
from torch.nn import functional as F
from transformers import AutoConfig, Cache

from cap_nb.calibration import Calibration
from cap_nb.data.prompts import IGNORED
from cap_nb.methods.resumed_scoring import after_prefix, masked_prefix, prepare_batch, score_heads, shared_prefix
from cap_nb.importance import importance_factors
from cap_nb.jobs.planning import PUBLISHED, ExampleLength, batch_shapes, lengths_of
from cap_nb.methods.screening import screen_heads, screened_scores
from cap_nb.models.anatomy import anatomy, decoder_layers, output_projection
from cap_nb.models.loading import bfloat16_gain, load_model, model_cache, model_fingerprint
from cap_nb.models.replay import read_prefix, run_layer
from cap_nb.scoring import batches_of, causal_scores, mean_by_example, rank_correlation, score_heads_naive
from tools.side_by_side import (RECORDS, ScoringRounds, about_scoring, all_heads, balanced_heads,
                                behind_worked_examples, examples_at_hand, examples_of_lengths, measured_case,
                                measured_rounds, measured_scoring, random_model, read_cases, stopwatch)

# The settings. Squares are the sizes of the matrix product that are tried for the machine's peak. Everything is in
# float32 on the processor, with 4,096 padded tokens a batch on both sides.

path, data_dir, squares = RECORDS / "scoring.json", os.environ.get("CAP_NB_DATA"), (1024, 2048, 4096)


# The lab model is small enough to score all of its 36 heads in every round. SmolLM2-135M-Instruct has 270 heads. Both
# sides get the same four, one of each of four layers spread from the first to the last; the mean number of layers that
# a resumed pass runs is that of all heads. The time without any head is measured beside, and what the sample took
# beyond it is scaled to 270 heads. A profile says where the time goes.


def smollm2_case(path, repeats=5, n=4, chosen=4, name="smollm2"):
    model, tokenizer = load_model("smollm2", "float32", "cpu")
    examples, said = examples_at_hand(tokenizer, n, data_dir)
    a, rounds = anatomy(model), ScoringRounds(squares, repeats=repeats, profiled=True)
    heads = balanced_heads(a.layers, a.heads, chosen, 1)
    return measured_scoring(path, name, model, examples, heads, rounds, data=said, weights="SmolLM2-135M-Instruct")


# A call of a layer has a price of its own, whatever the number of tokens. So layers in the middle are timed on batches
# of one example each, of growing length, and on the shared beginning, for one masked head and for nine at once. The
# batches that both sides make of the examples above are kept beside, as rows and tokens.


def layer_call_case(path, repeats=5, n=4, tokens=(24, 48, 96, 192, 384, 768, 1536, 3072), between=(5, 11)):
    model, tokenizer = load_model("smollm2", "float32", "cpu")
    examples, said = examples_at_hand(tokenizer, n, data_dir)
    length, layers = shared_prefix(examples.examples), decoder_layers(model)
    prefix = read_prefix(model, examples.examples[0].input_ids[:length])
    rest = Calibration.from_examples((after_prefix(e, length) for e in examples.examples), k=1)
    shapes = {"hook loop": batch_shapes(lengths_of(examples)), "resumed": batch_shapes(lengths_of(rest))}

    @torch.no_grad()
    def through(state):
        hidden = state.hidden
        for index in range(*between):
            hidden = run_layer(layers[index], hidden, state.calls[index])

    def of_tokens(count):
        made = examples_of_lengths([ExampleLength("made", count - 10, 10)], model.config.vocab_size)
        state, _ = prepare_batch(model, made, [0], None)
        return stopwatch(lambda: through(state))

    @torch.no_grad()
    def beginning(heads):
        masked_prefix(model, prefix, between[0], heads)

    def measure():
        sides = {f"{count} tokens": of_tokens(count) for count in tokens}
        for count in (1, 9):
            sides[f"beginning, {count} heads"] = stopwatch(lambda count=count: beginning(range(count)))
        about = {"layers": between[1] - between[0], "layers of the beginning": len(layers) - 1 - between[0]}
        about |= {"prefix": length, "batches": {side: [[b.rows, b.width] for b in batches] for side, batches in shapes.items()}}
        about |= {"model": model_fingerprint(model), "calibration": examples.fingerprint, "data": said}
        return {"seconds": measured_rounds(sides, repeats), "about": about}

    settings = {"repeats": repeats, "tokens": list(tokens), "between": list(between), "examples": n}
    return measured_case(path.with_name("layer_calls.json"), "smollm2", settings, measure)


# Few-shot: the same worked examples stand before every prompt, as chain-of-thought prompting puts them there. The ratio
# grows with the number of examples, since the hook loop reads the prefix once for every example. Here there are three
# examples and two heads, for a hook loop over long prompts takes its time; so the ratio is a lower bound for a
# calibration set of 384.


def few_shot_case(path, repeats=5, n=1, shots=4):
    model, tokenizer = load_model("smollm2", "float32", "cpu")
    worked = examples_at_hand(tokenizer, shots, data_dir, seed=1)[0].examples[:shots]
    fewer, said = examples_at_hand(tokenizer, n, data_dir)
    a, rounds = anatomy(model), ScoringRounds(squares, repeats=repeats)
    return measured_scoring(path, f"smollm2, {shots} worked examples", model, behind_worked_examples(fewer, worked),
                            balanced_heads(a.layers, a.heads, 2, 1), rounds,
                            data=f"{said}, each behind {shots} worked examples of {worked[0].task}",
                            weights="SmolLM2-135M-Instruct")


# Screened: a quarter of the masked passes, with slopes for all heads, against both whole tables. On the lab
# model all heads are scored by every side, and what a quarter costs in accuracy is kept beside: against the whole table
# measured here, ranks of the scores and the largest relative error of a factor.


def screening_errors(model, examples, budget):
    true = causal_scores(score_heads(model, examples), "mean")
    found, _, _ = screened_scores(screen_heads(model, examples, budget))
    off = (importance_factors(found) / importance_factors(true) - 1).abs()
    return {"spearman": rank_correlation(found, true), "largest": off.max().item(), "median": off.median().item()}


def screened_case(path, weights, examples, said, repeats=5, budget=0.25):
    model, _ = load_model(weights, "float32", "cpu")
    sides = {"hook loop": lambda: score_heads_naive(model, examples), "resumed": lambda: score_heads(model, examples),
             "screened": lambda: screen_heads(model, examples, budget)}

    def measure():
        about = about_scoring(model, examples, 4096, all_heads(model)) | dict(budget=budget, data=said, weights=weights)
        about["errors"] = screening_errors(model, examples, budget)
        seconds = measured_rounds({name: stopwatch(side) for name, side in sides.items()}, repeats, warmups=0)
        return {"seconds": seconds, "about": about}

    settings = {"repeats": repeats, "examples": len(examples.examples), "budget": budget}
    return measured_case(path, f"{weights}, screened", settings, measure)


# bfloat16 against float32, both resumed, on the same heads, each side with a model of its own; losses are in float32 on
# both. How far they are apart is kept: the loss of an example with a head masked, and how much it rises by that.


def bfloat16_case(path, repeats=5, n=2, chosen=4):
    models = {dtype: load_model("smollm2", dtype, "cpu")[0] for dtype in ("float32", "bfloat16")}
    examples, said = examples_at_hand(load_model("smollm2", "float32", "cpu")[1], n, data_dir)
    a = anatomy(models["float32"])
    heads = balanced_heads(a.layers, a.heads, chosen, 1)

    def measure():
        tables = {dtype: score_heads(model, examples, heads=heads) for dtype, model in models.items()}
        apart = tables["bfloat16"].masked - tables["float32"].masked
        rises = apart - (tables["bfloat16"].intact - tables["float32"].intact)
        times = {}
        for dtype, model in models.items():
            for name, some in ((dtype, heads), (f"{dtype}, intact", [])):
                times[name] = stopwatch(lambda model=model, some=some: score_heads(model, examples, heads=some))
        about = about_scoring(models["float32"], examples, 4096, heads)
        about |= {"data": said, "weights": "SmolLM2-135M-Instruct"}
        found = {name: values.nan_to_num().abs().max().item() for name, values in (("loss", apart), ("rise", rises))}
        about |= {"probe": bfloat16_gain(torch.device("cpu")), "differences": found}
        return {"seconds": measured_rounds(times, repeats, warmups=0), "about": about}

    settings = {"repeats": repeats, "examples": len(examples.examples), "heads": len(heads)}
    return measured_case(path, "smollm2, bfloat16", settings, measure)


# A Mistral of full width, cut to four layers, with random weights: the largest model here, 1.1 billion weights. It
# reads random tokens with the lengths of real examples. The sample is one head of every layer.


def mistral_case(path, repeats=5, n=1, layers=4, each=1, **changes):
    published = PUBLISHED["mistralai/Mistral-7B-Instruct-v0.2"]
    model = random_model(AutoConfig.for_model(**published | {"num_hidden_layers": layers} | changes))
    tokenizer = load_model("smollm2" if (model_cache() / "smollm2").is_dir() else "lab", "float32", "cpu")[1]
    real, said = examples_at_hand(tokenizer, n, data_dir)
    examples = examples_of_lengths(lengths_of(real), model.config.vocab_size)
    heads = balanced_heads(layers, anatomy(model).heads, layers, each)
    return measured_scoring(path, "mistral, 4 layers", model, examples, heads, ScoringRounds(squares, repeats=repeats),
                            data=f"random tokens, as long as {said}", weights="random, seed 0")


# Its users write the ablation of a head as a hook on `blocks.L.attn.hook_z` that sets one head's output to zero, and
# run the whole model with it. The lab model and SmolLM2 are Llamas, so the library's own converter of Llama weights
# makes a `HookedTransformer` of either, from the sizes in the configuration. The other side, `TransformerBridge`, wraps
# the model of transformers as it is; it is what the library offers from version 4 on. Padding is on the right, where
# nothing that counts can see it, so no mask is needed.


def hooked_transformer(model):
    lens, llama = (importlib.import_module("transformer_lens"),
                   importlib.import_module("transformer_lens.pretrained.weight_conversions"))
    c, a = model.config, anatomy(model)
    sizes = lens.HookedTransformerConfig(n_layers=a.layers, n_heads=a.heads, n_key_value_heads=a.key_value_heads,
                                         d_head=a.head_size, d_model=a.hidden_size, d_mlp=c.intermediate_size,
                                         d_vocab=c.vocab_size, n_ctx=min(2048, c.max_position_embeddings),
                                         act_fn="silu", gated_mlp=True, normalization_type="RMS", final_rms=True,
                                         eps=c.rms_norm_eps, positional_embedding_type="rotary",
                                         rotary_dim=a.head_size, rotary_base=c.rope_parameters["rope_theta"],
                                         rotary_adjacent_pairs=False, dtype=torch.float32, device="cpu")
    hooked = lens.HookedTransformer(sizes)
    hooked.load_state_dict(llama.convert_llama_weights(model, sizes), strict=False)
    return hooked.eval()


def loss_with_hooks(hooked, batch, hooks):
    logits = hooked.run_with_hooks(batch["input_ids"], return_type="logits", fwd_hooks=hooks)[:, :-1]
    labels = batch["labels"][:, 1:]
    counts = labels != IGNORED
    return mean_by_example(F.cross_entropy(logits[counts].float(), labels[counts], reduction="none"),
                           counts.sum(1).tolist())


def zeroing(head):
    def zero(z, hook):
        z[:, :, head] = 0
        return z

    return zero


@torch.no_grad()
def lens_loop(hooked, model, calibration, batch_tokens, heads):
    table = torch.full((anatomy(model).layers, anatomy(model).heads, len(calibration.examples)), torch.nan,
                       dtype=torch.float64)
    for indices, batch in batches_of(calibration.examples, batch_tokens, model):
        loss_with_hooks(hooked, batch, [])  # the intact model
        for layer, head in heads:
            table[layer, head, indices] = loss_with_hooks(hooked, batch,
                                                          [(f"blocks.{layer}.attn.hook_z", zeroing(head))])
    return table


# All sides must agree to 1e-4 nats before any is timed, which `measured_scoring` checks. The bridge changes the model
# that it wraps, so it gets a second copy.


def lens_case(path, name, repeats=5, n=4, chosen=10, each=1):
    model, tokenizer = load_model(name, "float32", "cpu")
    examples, said = examples_at_hand(tokenizer, n, data_dir)
    bridge = importlib.import_module("transformer_lens.model_bridge").TransformerBridge.boot_transformers(name,
        hf_model=load_model(name, "float32", "cpu")[0], tokenizer=tokenizer)
    sides = {"HookedTransformer": hooked_transformer(model), "TransformerBridge": bridge}
    more = {side: lambda heads, hooked=hooked: lens_loop(hooked, model, examples, 4096, heads)
            for side, hooked in sides.items()}
    heads = balanced_heads(anatomy(model).layers, anatomy(model).heads, chosen, each)
    return measured_scoring(path, f"{name}, TransformerLens", model, examples, heads,
                            ScoringRounds(squares, repeats=repeats), more=more, data=said, weights=name,
                            transformer_lens=importlib.metadata.version("transformer_lens"))


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
        chosen(layer, output_projection(model, number), layer.forward,
               torch.compile(layer.forward, dynamic=True, **options))
    return model


def compiled_case(path, name, repeats=5, n=4, chosen=10, each=1):
    model, tokenizer = load_model(name, "float32", "cpu")
    compiled = compile_layers(load_model(name, "float32", "cpu")[0])
    real, said = examples_at_hand(tokenizer, n, data_dir)
    examples, heads = (examples_of_lengths(lengths_of(real), model.config.vocab_size),
                       balanced_heads(anatomy(model).layers, anatomy(model).heads, chosen, each))

    def once(heads):
        return score_heads(compiled, examples, 4096, heads=heads).masked

    return measured_scoring(path, f"{name}, compiled", model, examples, heads, ScoringRounds(squares, repeats=repeats),
                            more={"compiled": once}, data=f"random tokens, as long as {said}", weights=name)


def main() -> None:
    model, tokenizer = load_model("lab", "float32", "cpu")
    examples, said = examples_at_hand(tokenizer, 16)
    kept, rounds = dict(data=said, weights="lab"), ScoringRounds(squares, profiled=True)
    print(measured_scoring(path, "lab", model, examples, all_heads(model), rounds, **kept)["seconds"])
    print(screened_case(path, "lab", examples, said)["seconds"])
    if (model_cache() / "smollm2").is_dir():
        for case in (layer_call_case, smollm2_case, few_shot_case, bfloat16_case):
            print(case(path)["seconds"])
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
