"""A graphics processor

> Everything that the benchmarks leave open for want of a device, in one command of less than 20 minutes: a run from end
> to end, scoring of a model of Llama-3-8B's shape, agreement of number formats, writing.

Paper: section 3.4 speaks of hours on an A100 for calibration sets of 128 examples a task. In: one CUDA device of 40 GB
or more. Out: `figures/benchmarks/gpu.json`, a case for each measurement. Wanted on one H100: the full scoring in under
45 minutes, at least 1.9 times as fast as the hook loop, at 45 % or more of the matrix-product peak.

    make gpu                # python -m tools.benchmarks.gpu
    make gpu DRY=1          # the same with tiny sizes on the processor, into a folder that is thrown away

Each case is written, and named, as soon as it is measured; one that fails is named and the next one begins, and one that
is on disk is not measured again: the same command goes on where it was stopped, within the run too. `--out` names
another folder for record and run, `--seconds` another limit, and `--only` the cases to measure, as after one that broke
the CUDA context for the others; to use a machine's own torch, start the module there. The model is Qwen's 0.5B if `models/qwen-coder-0.5b` holds it, else SmolLM2 if
it was fetched, else the lab's, and the record says which. `CAP_NB_DATA` names the folder of the benchmarks' own files;
without it the examples are the lab's.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import torch
from transformers import AutoConfig

from cap_nb.core.devices import device_named
from cap_nb.core.errors import BadInput
from cap_nb.jobs.planning import PUBLISHED, lengths_of
from cap_nb.jobs.records import load_run
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.models.anatomy import anatomy
from cap_nb.models.decoding import Decoding, generate_greedy
from cap_nb.models.lab import lab_tokenizer
from cap_nb.models.loading import load_model, load_tokenizer, model_cache, model_fingerprint
from cap_nb.portable.speed import span_text
from tools.side_by_side import (RECORDS, ScoringRounds, balanced_heads, examples_at_hand, examples_of_lengths,
                                gain_for_all, largest_difference, measured_case, measured_rounds, measured_scoring,
                                random_model, read_cases, seconds_for_all, share_reached, stopwatch, wanted_text)

ROOT = Path(__file__).resolve().parents[2]
path, data_dir = RECORDS / "gpu.json", os.environ.get("CAP_NB_DATA")
llama = PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"]
LIMIT = 20 * 60  # Seconds that the command may take; a measurement that would not end in time is not begun


def weights_at_hand():
    "The largest real model that is on this machine."
    qwen = ROOT / "models" / "qwen-coder-0.5b"
    return str(qwen) if qwen.is_dir() else "smollm2" if (model_cache() / "smollm2").is_dir() else "lab"


# A run from end to end by the program: the seconds and the memory of its stages, and its table.

QUICK = ("--quick", "--dtype", "float32", "--methods", "cap,wanda,sparsegpt,magnitude", "--accuracy-tasks")
DATA = ("--data-dir", data_dir) if data_dir else ("--tasks", "lab-gsm8k,lab-arc", "--text", "lab-text")


def run_case(path, device, weights, folder, words=(*QUICK, "none")):
    def measure():
        asked = ["run", "--model", weights, "--device", str(device), "--out", str(folder), *DATA, *words]
        done = subprocess.run([sys.executable, "-m", "cap_nb", *asked], cwd=ROOT)  # what it says is seen as it runs
        if done.returncode:
            raise BadInput(f"cap {' '.join(asked)} ended with exit code {done.returncode}: expected a run.")
        run, table = load_run(folder), pd.read_csv(folder / "tables" / "table.csv")
        values = table[[name for name in table if not name.endswith((" low", " high", " n"))]]
        return {"seconds": {stage: (seconds,) for stage, seconds in run.timings.items()}, "about": {"memory": run.memory, "table": values.to_dict("records")}}

    return measured_case(path, "run", {"model": Path(weights).name, "words": words, "data": "of the benchmarks" if data_dir else "of the lab"}, measure, device)


# Losses of some heads of the same model on the processor, in float32, and on the device in three formats.


FORMATS = ("float32", "bfloat16", "float16")


def agreement_case(path, device, weights, dtype, n=4, chosen=4, repeats=3):
    def measure():
        tables, seconds, about = {}, {}, {"model": {}}
        for name, dtype_of, place in (("processor", "float32", torch.device("cpu")), ("device", dtype, device)):
            model, tokenizer = load_model(weights, dtype_of, place)
            examples, about["data"] = examples_at_hand(tokenizer, n, data_dir)
            heads = balanced_heads(anatomy(model).layers, anatomy(model).heads, chosen, 1)
            about["calibration"], about["model"][name] = examples.fingerprint, model_fingerprint(model)

            def score(model=model, examples=examples, name=name, heads=heads):
                tables[name] = score_heads(model, examples, heads=heads).masked

            seconds |= measured_rounds({name: stopwatch(score, place)}, repeats if name != "processor" else 1, warmups=0)
        return {"seconds": seconds, "about": about | {"agreement": largest_difference(tables, float("inf"))}}

    asked = {"weights": Path(weights).name, "n": n, "heads": chosen, "repeats": repeats, "dtype": dtype}
    return measured_case(path, f"agreement in {dtype}", asked, measure, device)


# Both sides of a scoring get some heads of each of four layers, the first and the last among them, so that a resumed
# pass runs as many layers as over all heads. Several heads of a layer can be masked in one pass where memory allows, as
# in a full scoring. In bfloat16 two ways of computing one loss differ by rounding, because their batches have other
# shapes: the record says by how much, and 0.05 nats are wanted. The fingerprint of 16 GB of weights is taken once, and
# not in every call: in the seconds of the few heads it would count 64 times.


ROUNDS = ScoringRounds((4096, 8192, 16384), repeats=3, tolerance=float("inf"), times=20)
HASHING = ("cap_nb.scoring.model_fingerprint", "cap_nb.methods.resumed_scoring.model_fingerprint")


def device_case(path, device, shape=llama, n=128, chosen=4, each=4, rounds=ROUNDS):
    fetched = model_cache() / "smollm2"
    tokenizer = load_tokenizer(str(fetched)) if fetched.is_dir() else lab_tokenizer()
    real, said = examples_at_hand(tokenizer, n, data_dir)
    model = random_model(AutoConfig.for_model(**shape), device, torch.bfloat16)
    examples = examples_of_lengths(lengths_of(real), model.config.vocab_size)
    heads = balanced_heads(anatomy(model).layers, anatomy(model).heads, chosen, each)
    with ExitStack() as patches:
        for name in HASHING:
            patches.enter_context(patch(name, lambda model: "taken once"))
        return measured_scoring(path, "llama-3-8b", model, examples, heads, rounds, weights="random, seed 0",
                                data=f"random tokens, as long as {said}")


# Writing: as many answers at once as `rows` says, each of so many tokens after a prompt of so many. Every step reads all
# weights, so tokens a second also say which share of the memory's bandwidth is reached.


def writing_case(path, device, shape=llama, rows=(1, 8, 32), prompt=128, steps=64, repeats=3):
    def measure():
        tokenizer = lab_tokenizer()
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
    return measured_case(path, "writing", asked, measure, device)


# What is measured, in order, with the seconds that each is expected to take at most on one H100. The run comes first: it
# alone meets every stage, and the speed of what does not work is worth nothing. Then the timings for which there is no
# other source; formats and writing last.


@dataclass(frozen=True)
class Measurement:
    "One case of the record."

    name: str  # Of the case
    seconds: int  # That it may take
    measure: Callable  # (path, device) -> record


def agreements(weights, **few):
    return [Measurement(f"agreement in {dtype}", 60, lambda path, device, dtype=dtype: agreement_case(path, device, weights, dtype, **few))
            for dtype in FORMATS]


def measurements(weights, folder):
    return [Measurement("run", 420, lambda path, device: run_case(path, device, weights, folder / f"gpu-{Path(weights).name}")),
            Measurement("llama-3-8b", 420, device_case), *agreements(weights), Measurement("writing", 120, writing_case)]


def measure_all(cases, path, device, limit=LIMIT, clock=time.monotonic):
    "Measure what is not on disk yet and ends in time, and say what was left out, or failed; the others go on."
    start, said = clock(), []
    for case in cases:
        if case.name in read_cases(path):
            said.append(f"{case.name}: on disk already.")
        elif clock() - start + case.seconds > limit:
            said.append(f"{case.name}: not begun, it would not have ended within {limit} seconds; start again, or give more --seconds.")
        else:
            try:
                case.measure(path, device)
                said.append(f"{case.name}: measured.")
            except Exception as error:
                said.append(f"{case.name}: failed, {type(error).__name__}: {error}")
                traceback.print_exc()
        print(said[-1], flush=True)
    return said


# What the records say, in a line each.


def summary(cases):
    lines = []
    if run := cases.get("run"):
        lines.append(f"run of {run['settings']['model']}: {sum(each[0] for each in run['seconds'].values()) / 60:.1f} minutes")
        lines += [", ".join(f"{name} {value}" for name, value in row.items()) for row in run["about"]["table"]]
    if scoring := cases.get("llama-3-8b"):
        whole = seconds_for_all(scoring, "resumed")
        minutes, heads, total = [each / 60 for each in whole], len(scoring["about"]["heads"]), scoring["about"]["total"]
        lines += [
            f"all {total} heads, from {heads}: {span_text(minutes, 1)} minutes{wanted_text(minutes, 45, more=False)}",
            f"heads a minute: {span_text([total / each for each in minutes], 1)}",
            f"over the hook loop: {span_text(gain_for_all(scoring))}{wanted_text(gain_for_all(scoring), 1.9)}",
            f"share of the peak: {span_text(share_reached(scoring))}{wanted_text(share_reached(scoring), 0.45)}",
            f"resumed from the hook loop: {scoring['about']['difference']:.2e} nats (wanted 0.05)",
        ]
    lines += [f"{name}, from the processor: {case['about']['agreement']:.2e} nats"
              for name, case in cases.items() if name.startswith("agreement")]
    if writing := cases.get("writing"):
        for rows, seconds in writing["seconds"].items():
            rates = [writing["about"]["tokens"][rows] / each for each in seconds]
            lines.append(f"writing, {rows} answers at once: {span_text(rates, 1)} tokens a second")
    return lines


# The same with tiny sizes on the processor, so that every line above has run before a device is paid for.


def dry_run(folder):
    "Every measurement with tiny sizes on the processor, which is slow in float16: the records, and what is said of them."
    toy = llama | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                       num_key_value_heads=2, vocab_size=720)
    rounds = ScoringRounds((8,), repeats=1, tolerance=0.05, times=1)
    words = (*QUICK, "none", "--methods", "magnitude", "--n", "2", "--loss-n", "1", "--windows", "1")
    cases = [Measurement("run", 1, lambda path, device: run_case(path, device, "lab", folder / "run", words)),
             Measurement("llama-3-8b", 1, lambda path, device: device_case(path, device, toy, 1, 2, 1, rounds)),
             *agreements("lab", n=1, chosen=2, repeats=1)[:2],
             Measurement("writing", 1, lambda path, device: writing_case(path, device, toy, (1, 2), 8, 4, 1))]
    said = measure_all(cases, folder / "gpu.json", torch.device("cpu"))
    return said, summary(read_cases(folder / "gpu.json"))


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--dry-run", action="store_true", help="tiny sizes on the processor; nothing is kept")
    asked.add_argument("--out", type=Path, help="folder of record and run; figures/benchmarks and runs if none is named")
    asked.add_argument("--seconds", type=int, default=LIMIT, help="what would not end within so many is not begun")
    asked.add_argument("--only", nargs="+", help="names of the cases to measure; all if none is named")
    asked = asked.parse_args()
    if asked.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            said, sums = dry_run(Path(folder))
        print(*sums, sep="\n")
        sys.exit(any(": failed," in line for line in said))
    elif not torch.cuda.is_available():
        sys.exit("There is no CUDA device here, and nothing was measured; make gpu DRY=1 tries every measurement.")
    else:
        record = asked.out / "gpu.json" if asked.out else path
        weights = weights_at_hand()
        print(f"The model is {weights}.", flush=True)
        cases = measurements(weights, asked.out or ROOT / "runs")
        if unknown := {*(asked.only or ())} - {case.name for case in cases}:
            sys.exit(f"No case is called {', '.join(sorted(unknown))}: expected {', '.join(case.name for case in cases)}.")
        some = [case for case in cases if not asked.only or case.name in asked.only]
        said = measure_all(some, record, device_named("cuda"), asked.seconds)  # with cap's own settings of torch
        print(*summary(read_cases(record)), sep="\n")
        sys.exit(any(": failed," in line for line in said))


if __name__ == "__main__":
    main()
