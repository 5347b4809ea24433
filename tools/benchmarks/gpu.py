"""A graphics processor

> Everything that the benchmarks leave open for want of a device, in one command of less than 20 minutes: the peak of
> matrix products, agreement of number formats, scoring of a model of Llama-3-8B's shape, writing, and one published
> figure.

Paper: section 3.4 speaks of hours on an A100 for calibration sets of 128 examples a task. In: one CUDA device of 40 GB
or more. Out: `figures/benchmarks/gpu.json`, a case for each measurement. Wanted on one H100: the full scoring in under
45 minutes, at least 1.9 times as fast as the hook loop, at 45 % or more of the matrix-product peak.

    make gpu                # python -m tools.benchmarks.gpu
    make gpu DRY=1          # the same with tiny sizes on the processor, into a folder that is thrown away

Each case is written as soon as it is measured, and a case that is on disk is not measured again: the same command goes
on where it was stopped. `CAP_NB_DATA` names the folder of the benchmarks' own files; lengths are counted with SmolLM2's
tokenizer where it is fetched. Without them the lengths are those of the lab's tasks, and the record says so. The
published figure wants `CAP_NB_LLAMA2`, a folder with Llama-2-7B, and `CAP_NB_C4`, a file of C4's documents as lines of
JSON (`.json` or `.json.gz`). `CAP_NB_NOTE` says what else was running.
"""

import argparse
import gzip
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoConfig

from cap_nb.calibration import Calibration
from cap_nb.core.errors import BadInput
from cap_nb.data.problems import Text, load_text
from cap_nb.data.prompts import IGNORED, Example
from cap_nb.models.decoding import Decoding, generate_greedy
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.evaluation import perplexity
from cap_nb.jobs.planning import PUBLISHED, lengths_of
from cap_nb.methods.prune import prune
from cap_nb.models.anatomy import anatomy
from cap_nb.models.loading import load_model, model_cache, model_fingerprint
from cap_nb.portable.speed import span_text
from cap_nb.scoring import causal_scores, rank_correlation
from tools.side_by_side import (ScoringRounds, balanced_heads, examples_at_hand, examples_of_lengths, fastest_product,
                                finish, gain_for_all, matrix_product, measured_case, measured_rounds, measured_scoring,
                                random_model, read_cases, seconds_for_all, share_reached, stopwatch,
                                wanted_text)

ROOT = Path(__file__).resolve().parents[2]
path = ROOT / "figures" / "benchmarks" / "gpu.json"
data_dir, note = os.environ.get("CAP_NB_DATA"), os.environ.get("CAP_NB_NOTE", "")
llama = PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"]
LIMIT = 20 * 60  # Seconds that the command may take; a measurement that would not end in time is not begun


# The peak of matrix products, in every format, at the size that the device does fastest.


def peak_case(path, device, squares=(4096, 8192, 16384), times=20, repeats=5):
    def measure():
        seconds, about = {}, {"flops": {}, "size": {}}
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            about["size"][name] = fastest_product(device, dtype, squares)
            product, about["flops"][name] = matrix_product(about["size"][name], device, dtype, times)
            seconds |= measured_rounds({name: stopwatch(product, device)}, repeats)
        return {"seconds": seconds, "about": about}

    asked = {"squares": squares, "times": times, "repeats": repeats}
    return measured_case(path, "peak", asked, measure, device, note)


# Losses of every head of a trained model in three formats: how far the 16-bit ones are from float32, and whether they
# rank heads alike.


FORMATS = ("float32", "bfloat16", "float16")  # The first one is what the others are compared with


def agreement_case(path, device, weights="smollm2", n=8, repeats=3, formats=FORMATS):
    def measure():
        tables, seconds, about = {}, {}, {"model": {}}
        for dtype in formats:
            model, tokenizer = load_model(weights, dtype, device)
            examples, about["data"] = examples_at_hand(tokenizer, n, data_dir)
            about["calibration"], about["model"][dtype] = examples.fingerprint, model_fingerprint(model)

            def score(model=model, examples=examples, dtype=dtype):
                tables[dtype] = score_heads(model, examples)

            seconds |= measured_rounds({dtype: stopwatch(score, device)}, repeats, warmups=0)
        about["agreement"] = {name: apart(tables["float32"], tables[name]) for name in formats[1:]}
        return {"seconds": seconds, "about": about}

    name, asked = f"agreement, {weights}", {"weights": weights, "n": n, "repeats": repeats, "formats": formats}
    return measured_case(path, name, asked, measure, device, note)


def apart(exact, other):
    difference = (other.masked - exact.masked).abs()
    ranks = rank_correlation(causal_scores(exact, "paired"), causal_scores(other, "paired"))
    return {"largest, nats": float(difference.max()), "mean, nats": float(difference.mean()), "ranks": float(ranks)}


# Both sides of a scoring get some heads of each of four layers, the first and the last among them, so that a resumed
# pass runs as many layers as over all heads. Several heads of a layer can be masked in one pass where memory allows, as
# in a full scoring. In bfloat16 two ways of computing one loss differ by rounding, because their batches have other
# shapes; 0.05 nats are allowed.


@dataclass(frozen=True)
class DeviceCase:
    "What is scored on a device, and how often."

    shape: dict = field(default_factory=lambda: llama)  # Configuration of the model
    dtype: torch.dtype = torch.bfloat16  # Of its weights
    n: int = 128  # Examples a task
    chosen: int = 4  # Layers to take heads from
    each: int = 4  # Heads of each of them
    rounds: ScoringRounds = ScoringRounds((4096, 8192, 16384), repeats=3, tolerance=0.05, times=20)


def device_case(path, device, case=DeviceCase(), name="llama-3-8b"):
    tokenizer = load_model("smollm2" if (model_cache() / "smollm2").is_dir() else "lab", "float32", "cpu")[1]
    real, said = examples_at_hand(tokenizer, case.n, data_dir)
    model = random_model(AutoConfig.for_model(**case.shape), device, case.dtype)
    examples = examples_of_lengths(lengths_of(real), model.config.vocab_size)
    heads = balanced_heads(anatomy(model).layers, anatomy(model).heads, case.chosen, case.each)
    return measured_scoring(path, name, model, examples, heads, case.rounds, data=f"random tokens, as long as {said}",
                            weights="random, seed 0", note=note)


# Writing: as many answers at once as `rows` says, each of so many tokens after a prompt of so many. Every step reads all
# weights, so tokens a second also say which share of the memory's bandwidth is reached.


def writing_case(path, device, shape=llama, rows=(1, 8, 32), prompt=128, steps=64, repeats=3):
    def measure():
        tokenizer = load_model("lab", "float32", "cpu")[1]
        model = random_model(AutoConfig.for_model(**shape), device, torch.bfloat16)
        made = {}

        def side(count):
            rng = random.Random(0)
            prompts = [[rng.randrange(5, len(tokenizer)) for _ in range(prompt)] for _ in range(count)]

            def write():
                texts = generate_greedy(model, tokenizer, prompts, steps, decoding=Decoding(batch_tokens=count * (prompt + steps)))
                made[str(count)] = sum(len(text.tokens) for text in texts)

            return stopwatch(write, device)

        seconds = measured_rounds({str(count): side(count) for count in rows}, repeats)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        return {"seconds": seconds, "about": {"tokens": made, "bytes": weights, "weights": "random, seed 0"}}

    asked = {"rows": rows, "prompt": prompt, "steps": steps, "repeats": repeats}
    return measured_case(path, "writing", asked, measure, device, note)


# The published figure: Wanda at 50 % on Llama-2-7B, with 128 sequences of 4,096 tokens of C4, on the whole of WikiText-2
# in windows of 4,096 tokens (Sun et al. 2024: 5.12 dense, 6.42 pruned). Which sequences are drawn is not theirs, so a few
# hundredths may lie between the figures.


@dataclass(frozen=True)
class PublishedFigure:
    "What is reproduced, from what."

    weights: str  # Folder of the model
    documents: str  # C4, lines of JSON
    text: str | Text = "wikitext2"  # What is measured on
    tokens: int = 4096  # Of a sequence, and of a window
    sequences: int = 128  # To calibrate on
    published: tuple[float, float] | None = (5.12, 6.42)  # Dense and pruned


def text_sequences(tokenizer, documents, count, tokens, seed=0):
    "Windows of so many tokens, one from each of `count` random documents that are long enough."
    opened = gzip.open if documents.endswith(".gz") else open
    with opened(documents, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in islice(lines, 100_000)]
    rng = random.Random(seed)
    rng.shuffle(texts)
    encoded = (tokenizer(text, verbose=False)["input_ids"] for text in texts if len(text) > tokens)
    long = list(islice((ids for ids in encoded if len(ids) > tokens), count))
    if len(long) < count:
        raise BadInput(f"{documents} has {len(long)} documents of more than {tokens} tokens: expected {count}.")
    windows = [ids[(start := rng.randrange(len(ids) - tokens)) : start + tokens] for ids in long]
    return Calibration.from_examples([as_example(index, ids) for index, ids in enumerate(windows)], k=1)


def as_example(index, ids):
    return Example(task="text", uid=f"text-{index}", prompt="", target="", answer="", input_ids=tuple(ids),
                   labels=(IGNORED, *ids[1:]))


def published_case(path, device, figure, dtype="float16"):
    def measure():
        model, tokenizer = load_model(figure.weights, dtype, device)
        examples = text_sequences(tokenizer, figure.documents, figure.sequences, figure.tokens)
        text = figure.text if isinstance(figure.text, Text) else load_text(figure.text, data_dir)
        about = {"model": model_fingerprint(model), "dtype": dtype, "calibration": examples.fingerprint}
        windows = len(tokenizer(text.text, verbose=False)["input_ids"]) // figure.tokens

        def measured():
            return perplexity(model, tokenizer, text, windows=windows, window_tokens=figure.tokens)

        dense, start = measured(), time.perf_counter()
        report = prune(model, "wanda", 0.5, calibration=examples, batch_tokens=figure.tokens)
        finish(device)
        seconds, pruned = time.perf_counter() - start, measured()
        about |= {name: [p.value, p.low, p.high] for name, p in (("dense", dense), ("pruned", pruned))}
        about |= {"windows": windows, "text": dense.fingerprint, "reached": report.reached}
        return {"seconds": {"pruning": (seconds,)}, "about": about | {"published": figure.published}}

    asked = {"tokens": figure.tokens, "sequences": figure.sequences, "method": "wanda", "sparsity": 0.5, "seed": 0}
    return measured_case(path, "published figure", asked, measure, device, note)


# What is measured, in order, with the seconds that each is expected to take at most on one H100.


@dataclass(frozen=True)
class Measurement:
    "One case of the record."

    name: str  # Of the case
    seconds: int  # That it may take
    measure: Callable  # (path, device) -> record


def at_hand():
    "The folder of Llama-2-7B and the file of C4, or a sentence that says what is missing."
    weights, documents = os.environ.get("CAP_NB_LLAMA2", ""), os.environ.get("CAP_NB_C4", "")
    if not (Path(weights) / "config.json").is_file() or not Path(documents).is_file():
        return (
            "Not measured: the published figure. CAP_NB_LLAMA2 must name a folder with Llama-2-7B, and CAP_NB_C4 a file "
            "of C4's documents."
        )
    return PublishedFigure(weights, documents)


def measurements():
    "The cases that this machine can measure, and sentences about those that it cannot."
    found, missing = at_hand(), []
    weights = "smollm2" if (model_cache() / "smollm2").is_dir() else "lab"
    cases = [Measurement("peak", 60, peak_case),
             Measurement(f"agreement, {weights}", 120, lambda path, device: agreement_case(path, device, weights)),
             Measurement("llama-3-8b", 420, device_case), Measurement("writing", 120, writing_case)]
    if isinstance(found, str):
        missing.append(found)
    else:
        cases.append(Measurement("published figure", 360, lambda path, device: published_case(path, device, found)))
    return cases, missing


def measure_all(cases, path, device, limit=LIMIT, clock=time.monotonic):
    "Measure what is not on disk yet and ends in time, and say what was left out."
    start, said = clock(), []
    for case in cases:
        if case.name in read_cases(path):
            said.append(f"{case.name}: on disk already.")
        elif clock() - start + case.seconds > limit:
            said.append(f"{case.name}: not begun, it would not have ended within {limit // 60} minutes; start again.")
        else:
            case.measure(path, device)
            said.append(f"{case.name}: measured.")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return said


# What the records say, in a line each.


def summary(cases):
    lines = []
    if peak := cases.get("peak"):
        flops, seconds = peak["about"]["flops"], peak["seconds"]
        rates = {name: [flops[name] / each / 1e12 for each in seconds[name]] for name in flops}
        lines += [f"peak, {name}: {span_text(rate, 1)} TFLOP/s" for name, rate in rates.items()]
    for name, case in cases.items():
        if name.startswith("agreement"):
            lines += [f"{name}, {dtype}: {found}" for dtype, found in case["about"]["agreement"].items()]
    if scoring := cases.get("llama-3-8b"):
        whole = seconds_for_all(scoring, "resumed")
        minutes, heads, total = [each / 60 for each in whole], len(scoring["about"]["heads"]), scoring["about"]["total"]
        lines += [
            f"all {total} heads, from {heads}: {span_text(minutes, 1)} minutes{wanted_text(minutes, 45, more=False)}",
            f"heads a minute: {span_text([total / each for each in minutes], 1)}",
            f"over the hook loop: {span_text(gain_for_all(scoring))}{wanted_text(gain_for_all(scoring), 1.9)}",
            f"share of the peak: {span_text(share_reached(scoring))}{wanted_text(share_reached(scoring), 0.45)}",
        ]
    if writing := cases.get("writing"):
        for rows, seconds in writing["seconds"].items():
            rates = [writing["about"]["tokens"][rows] / each for each in seconds]
            lines.append(f"writing, {rows} answers at once: {span_text(rates, 1)} tokens a second")
    if published := cases.get("published figure"):
        about = published["about"]
        lines.append(f"perplexity dense {about['dense'][0]:.3f}, pruned {about['pruned'][0]:.3f}; {about['published']}")
    return lines


# The same with tiny sizes on the processor, so that every line above has run before a device is paid for.


def tiny_figure(folder):
    "A small model, documents and a text in place of the published ones."
    model, tokenizer = load_model("lab", "float32", "cpu")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = "Tom has 3 apples and buys 4 more apples . "
    documents = folder / "documents.json"
    documents.write_text("\n".join(json.dumps({"text": words * (5 + index)}) for index in range(6)), encoding="utf-8")
    return PublishedFigure(str(folder / "model"), str(documents), Text("made up", words * 40), tokens=24, sequences=3, published=None)


def dry_run(folder):
    "Every measurement with tiny sizes on the processor, which is slow in float16: the records, and what is said of them."
    toy = llama | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=720)
    rounds = ScoringRounds((8,), repeats=1, tolerance=0.05, times=1)
    small = DeviceCase(shape=toy, n=1, chosen=2, each=1, rounds=rounds)
    figure = tiny_figure(folder)
    cases = [Measurement("peak", 1, lambda path, device: peak_case(path, device, (8, 16), 1, 1)),
             Measurement("agreement, lab", 1, lambda path,
                         device: agreement_case(path, device, "lab", 1, 1, FORMATS[:2])),
             Measurement("llama-3-8b", 1, lambda path, device: device_case(path, device, small)),
             Measurement("writing", 1, lambda path, device: writing_case(path, device, toy, (1, 2), 8, 4, 1)),
             Measurement("published figure", 1, lambda path, device: published_case(path, device, figure, "float32"))]
    said = measure_all(cases, folder / "gpu.json", torch.device("cpu"))
    return said + summary(read_cases(folder / "gpu.json"))


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--dry-run", action="store_true", help="tiny sizes on the processor; nothing is kept")
    if asked.parse_args().dry_run:
        with tempfile.TemporaryDirectory() as folder:
            print(*dry_run(Path(folder)), sep="\n")
    elif not torch.cuda.is_available():
        print("There is no CUDA device here, and nothing was measured; make gpu DRY=1 tries every measurement.")
    else:
        cases, missing = measurements()
        print(*measure_all(cases, path, torch.device("cuda")), *missing, *summary(read_cases(path)), sep="\n")


if __name__ == "__main__":
    main()
