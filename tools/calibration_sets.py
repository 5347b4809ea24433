"""Gold solutions, own chains and plain text as calibration sets of equal size: what each does to a method's losses.

    python -m tools.calibration_sets lab WORK [SECONDS]
    python -m tools.calibration_sets smollm2 WORK [SECONDS] [DATA]    # DATA: folder of benchmark files
    python -m tools.calibration_sets qwen WORK [SECONDS] [DATA]       # the model lies in models/qwen-coder-0.5b

Every pruned model is a file in WORK and is not measured twice; none is begun after SECONDS. What is there by then is
written to figures/calibration_sets/MODEL.json. All sets of a seed have the tokens of the smallest one, to within one
example. SmolLM2 answers too few problems to have chains, so it is given gold and text, and not CAP. Qwen's chains are
read leniently, since it seldom writes the line it is asked for; CAP's scores would take it hours a set, so it is given
the two other methods, at 50 % alone.
"""
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.prompts import Example, make_example
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.evaluation import accuracy, evaluation_problems, perplexity, problem_losses
from cap_nb.importance import importance_factors
from cap_nb.jobs.chains import Answering, Chain, kept_chains, own_chains, text_calibration
from cap_nb.jobs.records import environment
from cap_nb.methods.prune import prune
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.scoring import causal_scores
from tools.studied import NOTE, source

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "figures" / "calibration_sets"


@dataclass(frozen=True)
class Study:
    "What is measured on a model."
    dtype: str  # In which the model runs
    tasks: tuple[str, ...]  # Tasks of calibration and evaluation
    text: str  # Plain text, of calibration and of the perplexity
    methods: tuple[str, ...]  # What prunes
    n: int  # Problems a task that are calibrated on, or answered for chains
    judged: int  # Held-out problems a task for losses
    answered: int  # Held-out problems a task that are answered
    chains: Answering | None  # How the model answers training problems; None: not asked
    style: str | None = None  # Prompt style; None is the model's own
    answers: tuple[str, float, int] | None = None  # Method and sparsity after which so many GSM8K problems are answered
    seeds: int = 3  # Calibration seeds
    sparsities: tuple[float, ...] = (0.2, 0.5)
    windows: tuple[int, int] = (20, 128)  # Windows of held-out text, and tokens in each


STUDIES = {
    "lab": Study(dtype="float32", tasks=("lab-gsm8k", "lab-strategyqa", "lab-arc"), text="lab-text",
                 methods=("wanda", "sparsegpt", "cap"), n=12, judged=40, answered=0,
                 chains=Answering(temperature=1.75, tries=4)),
    "smollm2": Study(dtype="bfloat16", tasks=("gsm8k", "strategyqa", "arc"), text="wikitext2",
                     methods=("wanda", "sparsegpt"), n=12, judged=30, answered=0, chains=None,
                     sparsities=(0.5,), windows=(20, 128)),
    "qwen": Study(dtype="bfloat16", tasks=("gsm8k", "strategyqa", "arc"), text="wikitext2",
                  methods=("sparsegpt", "wanda"), n=64, judged=30, answered=0, style="answer-line",
                  chains=Answering(tries=3, max_new_tokens=320, lenient=True), seeds=1, sparsities=(0.5,),
                  windows=(20, 512),
                  answers=("sparsegpt", 0.5, 100))}


def as_examples(tokenizer: object, chains: tuple[Chain, ...]) -> list[Example]:
    "Chains as examples."
    return [make_example(tokenizer, c.prompt, c.text.rstrip(), c.task, c.gold, c.uid) for c in chains]


def trimmed(examples: list[Example], tokens: int, seed: int) -> list[Example]:
    "Examples drawn in random order for as long as they fit into so many tokens."
    taken, left = [], tokens
    for example in random.Random(f"{seed}/trim").sample(examples, len(examples)):
        if len(example.input_ids) <= left:
            taken.append(example)
            left -= len(example.input_ids)
    return taken


def calibration_sets(model, tokenizer, study: Study, seed: int, data: str | None, work: Path) -> dict[str, Calibration]:
    "The calibration sets of a seed, all of about the same number of tokens."
    gold, found = calibration_set(tokenizer, study.tasks, study.n, 3, seed, data, study.style).examples, {}
    if study.chains:
        answering = Answering(**vars(study.chains) | {"file": work / f"chains {seed}.jsonl"})
        chains = own_chains(model, tokenizer, study.tasks, study.n, seed, data, study.style, answering)
        kept = kept_chains(chains.chains)
        gold = [e for e in gold if (e.task, e.uid) in {(c.task, c.uid) for c in kept}]
        found["chains"] = as_examples(tokenizer, kept)
    tokens = sum(len(e.input_ids) for e in gold)
    length = round(tokens / len(gold))
    found = {"gold": list(gold)} | found
    found["text"] = list(text_calibration(tokenizer, study.text, tokens // length, length, 3, seed, data).examples)
    least = min(sum(len(e.input_ids) for e in examples) for examples in found.values())
    return {name: Calibration.from_examples(trimmed(examples, least, seed), 3, seed)
            for name, examples in found.items()}


def measured(model, tokenizer, study: Study, data: str | None) -> dict:
    "Losses of held-out problems and of windows of text, and which answers are right."
    losses, right = {}, {}
    for task in study.tasks:
        problems = evaluation_problems(task, study.judged, data_dir=data)
        records = problem_losses(model, tokenizer, problems, study.style)
        losses[task] = {"uid": [r.uid[:8] for r in records], "loss": [float(f"{r.loss:.4g}") for r in records]}
        if study.answered:
            answers = accuracy(model, tokenizer, task, study.answered, data_dir=data, style=study.style)
            right[task] = "".join(str(int(a.correct)) for a in answers)
    text = perplexity(model, tokenizer, study.text, data, *study.windows)
    return {"losses": losses, "right": right, "windows": [float(f"{loss:.5g}") for loss in text.losses]}


def cell(name: str, study: Study, chosen: tuple[str, float, Calibration], factors, data: str | None) -> dict:
    "One pruned model, measured."
    model, tokenizer = load_model(source(name), study.dtype, "cpu")
    if chosen:
        method, sparsity, calibration = chosen
        prune(model, method, sparsity, factors=factors, calibration=calibration)
    return measured(model, tokenizer, study, data)


def answers(name: str, study: Study, calibration: Calibration, data: str | None) -> dict:
    "GSM8K problems answered by a pruned model: which are right, strictly and leniently, which cut off, and tokens."
    model, tokenizer = load_model(source(name), study.dtype, "cpu")
    method, sparsity, n = study.answers
    prune(model, method, sparsity, calibration=calibration)
    limit = study.chains.max_new_tokens
    records = accuracy(model, tokenizer, "gsm8k", n, data_dir=data, style=study.style, max_new_tokens=limit)
    kinds = ("correct", "lenient_correct", "cut_off")
    found = {kind: "".join(str(int(getattr(r, kind))) for r in records) for kind in kinds}
    return found | {"uid": [r.uid[:8] for r in records], "tokens": [r.tokens for r in records]}


@dataclass(frozen=True)
class Pieces:
    "Files of finished cells."
    work: Path  # Their folder
    until: float  # Time after which none is begun

    def get(self, name: str, measure: Callable[[], dict]) -> dict | None:
        "What a file holds, measured if it is not there; None when it is too late to begin."
        path = self.work / f"{name}.json"
        if not path.exists():
            if time.time() > self.until:
                return None
            began = time.process_time()
            write_checked(path, measure())
            print(f"{name}: {time.process_time() - began:.0f} s", flush=True)
        return read_checked(path)


def row(content: dict, key: tuple, found: dict) -> list:
    "A cell of the record; all cells have the problems of the first."
    for task, values in found["losses"].items():
        assert content["problems"].setdefault(task, values["uid"]) == values["uid"]
    losses = {task: values["loss"] for task, values in found["losses"].items()}
    return [*key, losses | {"text": found["windows"]}, found["right"]]


def about(calibration: Calibration) -> dict:
    "What a calibration set holds."
    examples = calibration.examples
    return {"examples": len(examples), "fingerprint": calibration.fingerprint,
            "tokens": sum(len(e.input_ids) for e in examples),
            "targets": sum(label >= 0 for e in examples for label in e.labels)}


def cells_of_set(name: str, model, chosen: tuple[str, str, int, Calibration], pieces: Pieces, data: str | None) -> list:
    "A method at every sparsity with one calibration set: keys and what was measured."
    (method, how, seed, calibration), study, found = chosen, STUDIES[name], []

    def factors():
        def measure() -> dict:
            return {"scores": causal_scores(score_heads(model, calibration)).tolist()}
        scores = pieces.get(f"scores {how} {seed}", measure)
        return scores and importance_factors(torch.tensor(scores["scores"], dtype=torch.float64))

    given = factors() if method == "cap" else None
    for sparsity in study.sparsities if method != "cap" or given is not None else ():
        measured = pieces.get(f"{method} {sparsity:g} {how} {seed}",
                              lambda: cell(name, study, (method, sparsity, calibration), given, data))
        found += [((method, sparsity, how, seed), measured)] if measured else []
    return found


def main(name: str, work: Path, seconds: float = 1e9, data: str | None = None) -> None:
    "Measure cell after cell, and write what is there."
    study, pieces = STUDIES[name], Pieces(work, time.time() + float(seconds))
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(source(name), study.dtype, "cpu")
    content = {"model": {"name": name, "fingerprint": model_fingerprint(model), "dtype": study.dtype, "device": "cpu"},
               "n": study.n, "judged": study.judged, "answered": study.answered, "chains": repr(study.chains),
               "windows": study.windows, "sets": {}, "problems": {}, "cells": [], "answers": {}}
    dense = pieces.get("dense", lambda: cell(name, study, None, None, data))
    found = [(("dense", 0.0, "", 0), dense)] if dense else []
    for seed in range(study.seeds):
        if time.time() > pieces.until and not any(work.glob(f"* {seed}.json")):
            continue
        sets = calibration_sets(model, tokenizer, study, seed, data, work)
        content["sets"] |= {f"{how} {seed}": about(calibration) for how, calibration in sets.items()}
        if study.answers:
            for how, chosen in sets.items():
                given = pieces.get(f"answers {how} {seed}", lambda chosen=chosen: answers(name, study, chosen, data))
                content["answers"] |= {f"{how} {seed}": given} if given else {}
        for method in study.methods:
            for how, calibration in sets.items():
                found += cells_of_set(name, model, (method, how, seed, calibration), pieces, data)
    content["cells"] = [row(content, *each) for each in found]
    OUT.mkdir(parents=True, exist_ok=True)
    write_checked(OUT / f"{name}.json", content | {"environment": environment(model.device, NOTE)})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
