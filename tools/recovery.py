"""What masked fine-tuning gives back: held-out loss before and after, problem by problem, on the lab model and SmolLM2.

    python tools/recovery.py CASE WORK [DATA]    # a name of CASES; DATA: folder of benchmark files, for SmolLM2

Every training with one learning rate is a file in a folder of WORK, one a case, and is not measured twice. The end is
a case of figures/recovery/MODEL.json, written anew after every method. Where several rates are tried, the best one is
taken for each method, by validation problems. A first run of the lab at 50 % took for all methods the rate that was
best for magnitude, and its held-out problems were looked at; so these are others. Low-rank changes have ten times
magnitude's rate, untried. CAP_NB_NOTE says what else was running.
"""
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.problems import BENCHMARK_NAMES, LAB_TASKS, Problem
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.evaluation import evaluation_problems, problem_losses
from cap_nb.importance import importance_factors
from cap_nb.jobs.chains import Answering, chain_calibration, own_chains, task_counts
from cap_nb.jobs.job import problems_fingerprint
from cap_nb.jobs.records import environment, mask_fingerprint
from cap_nb.methods.prune import prune
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.portable.fine_tuning import FineTuning, in_evaluation_mode, iterative_magnitude, recover, train_on
from cap_nb.scoring import causal_scores

OUT = Path(__file__).resolve().parent.parent / "figures" / "recovery"
NOTE = os.environ.get("CAP_NB_NOTE", "")  # What else was running
STAGES = (0.2, 0.35, 0.5)  # Of iterative magnitude


@dataclass(frozen=True)
class Case:
    "What is measured."
    methods: tuple[str, ...]  # What prunes
    beside: tuple[str, ...] = ()  # "dense" (the same steps on the dense model), "iterative", "METHOD, rank 8"
    model: str = "lab"
    tasks: tuple[str, ...] = LAB_TASKS
    sparsity: float = 0.5
    settings: FineTuning = FineTuning(steps=150, examples=6)
    pruned_with: int = 64  # Examples a task
    trained_on: int = 500  # Examples a task; of own chains, problems that are answered
    chains: bool = False  # Whether it is trained on the model's own chains instead of gold solutions
    held_out: int = 100  # Problems a task
    validation: int = 40  # Problems a task, to choose rates by
    rates: tuple[float, ...] = (1e-4, 1e-3)
    products: str = "highest"  # Precision of float32 products in training and losses, as torch calls it


FIVE, LONGER = ("magnitude", "alps", "wanda", "sparsegpt", "cap"), FineTuning(steps=200, examples=6)
CASES = {
    "gold, 50 %": Case(methods=FIVE, beside=("dense", "iterative", "magnitude, rank 8")),
    "gold, 60 %": Case(methods=FIVE, sparsity=0.6, settings=LONGER),
    "own chains, 50 %": Case(methods=FIVE, chains=True, settings=LONGER),
    "smollm2, gold, 50 %": Case(
        model="smollm2", tasks=BENCHMARK_NAMES, methods=("magnitude", "wanda"), beside=("dense",),
        settings=FineTuning(steps=100, examples=1), pruned_with=8, trained_on=100, held_out=20, validation=0,
        rates=(1e-4,), products="medium")}
MORE = {("gold, 50 %", "magnitude"): (2.5e-4, 4e-3)}  # Rates that were tried too


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    "Multiply float32 matrices in a precision: 'medium' rounds their numbers to bfloat16, where a processor does so."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Bench:
    "What a case prunes with, trains on, and is measured on."

    def __init__(self, name: str, work: Path, data: str | None):
        self.name, self.case, self.work, self.data = name, CASES[name], work, data
        case, (self.dense, self.tokenizer) = self.case, self.fresh()
        self.pruning, gold = self.gold(case.pruned_with), self.gold(case.trained_on)
        self.training, self.counts = (self.own() if case.chains else (gold, None))
        seen = {example.uid for each in (self.pruning, gold) for example in each.examples}
        drawn = {"validation": self.drawn(case.validation, 0, "validation", seen)}
        seen |= {p.uid for p in self.drawn(case.held_out, 0, "evaluation", seen)}  # those of the first run
        self.problems = drawn | {"evaluation": self.drawn(case.held_out, 1, "evaluation", seen)}

    def fresh(self) -> tuple[nn.Module, object]:
        "The dense model, with its tokenizer."
        return load_model(self.case.model, "float32", "cpu")

    def gold(self, n: int) -> Calibration:
        "Gold solutions, n a task."
        return calibration_set(self.tokenizer, self.case.tasks, n, data_dir=self.data)

    def own(self) -> tuple[Calibration, list[dict]]:
        "The model's own right greedy answers to the same problems; and how many there are, by task."
        asked, answering = self.case.trained_on, Answering(tries=1, file=self.work / "chains.jsonl")
        chains = own_chains(self.dense, self.tokenizer, self.case.tasks, asked, data_dir=self.data, answering=answering)
        solution = {(e.task, e.uid): e.target for e in self.gold(asked).examples}
        calibration = chain_calibration(self.tokenizer, chains)
        same = [e.target == solution[e.task, e.uid] for e in calibration.examples]
        return calibration, [asdict(count) for count in task_counts(chains)] + [{"word for word gold": sum(same)}]

    def drawn(self, n: int, seed: int, split: str, seen: set[str]) -> tuple[Problem, ...]:
        "Problems that were not seen, n a task."
        draw = (evaluation_problems(task, n, seed, self.data, seen, split) for task in self.case.tasks if n)
        return tuple(problem for of_task in draw for problem in of_task)

    def losses(self, model: nn.Module, split: str) -> list[float]:
        "The loss of each problem, with as many digits as anybody reads."
        if not self.problems[split]:
            return []
        with products_in(self.case.products):
            records = problem_losses(model, self.tokenizer, self.problems[split])
        return [float(f"{record.loss:.5g}") for record in records]

    @cached_property
    def factors(self) -> torch.Tensor:
        "CAP's factors."
        return importance_factors(causal_scores(score_heads(self.dense, self.pruning)))

    def trained(self, model: nn.Module, name: str, settings: FineTuning) -> list[float]:
        "Train a model in place; the loss of each step."
        with products_in(self.case.products), in_evaluation_mode(model):
            if name == "iterative":
                reports = iterative_magnitude(model, self.training, STAGES, settings)
                return [loss for report in reports for loss in report.losses]
            if name == "dense":  # the control: the same steps without a zero to hold
                return list(train_on(model, self.training.examples, settings, {}, None, settings.steps))
            return list(recover(model, self.training, settings).losses)


def measured(bench: Bench, name: str, rate: float) -> dict:
    "Losses before and after a training with one rate; before an iterative pruning there is only the dense model."
    model, method = bench.fresh()[0], name.split(",")[0]
    settings = replace(bench.case.settings, lr=rate, rank=8 if name.endswith("rank 8") else None)
    began = time.process_time()
    if method in bench.case.methods:
        prune(model, method, bench.case.sparsity, bench.factors if method == "cap" else None, bench.pruning)
    pruning = time.process_time() - began
    before, mask = {split: bench.losses(model, split) for split in bench.problems}, mask_fingerprint(model)
    began = time.process_time()
    losses = [float(f"{loss:.4g}") for loss in bench.trained(model, name, settings)]
    seconds = {"pruning": round(pruning, 1), "training": round(time.process_time() - began, 1)}
    if method not in ("dense", "iterative") and mask_fingerprint(model) != mask:
        raise ValueError(f"{name} at {rate:g} lost zeros: the training must not be recorded")
    return {"before": before, "after": {split: bench.losses(model, split) for split in bench.problems},
            "training": losses, "settings": asdict(settings), "mask": mask_fingerprint(model),
            "model": model_fingerprint(model), "processor seconds": seconds}


def about(bench: Bench) -> dict:
    "What all rows follow from."
    case, problems = bench.case, bench.problems
    split = {name: {"n": n, "seed": seed, "fingerprint": problems_fingerprint(problems[name])}
             for name, n, seed in (("validation", case.validation, 0), ("evaluation", case.held_out, 1)) if n}
    held_out = problems["evaluation"]
    split["evaluation"] |= {"task": " ".join(p.task for p in held_out), "uid": " ".join(p.uid for p in held_out)}
    model = {"name": case.model, "fingerprint": model_fingerprint(bench.dense), "dtype": "float32", "device": "cpu",
             "products": case.products}
    return {"model": model, "sparsity": case.sparsity, "problems": split,
            "environment": environment(bench.dense.device, NOTE),
            "pruned_with": {"n": case.pruned_with, "seed": 0, "fingerprint": bench.pruning.fingerprint},
            "trained_on": {"n": case.trained_on, "seed": 0, "fingerprint": bench.training.fingerprint,
                           "examples": len(bench.training.examples)}
            | ({"own chains": bench.counts} if bench.counts else {})}


def kept(work: Path, name: str, measure) -> dict:
    "What a file holds, measured if it is not there."
    path = work / f"{name}.json"
    if not path.exists():
        write_checked(path, measure())
        print(name, flush=True)
    return read_checked(path)


def row_of(tries: Mapping[float, dict]) -> tuple[dict, dict]:
    "The training with the best rate, as a row of the record; and what was tried, by rate."
    tried = {f"{rate:g}": {when: mean(found[when]["validation"]) for when in ("before", "after")}
             for rate, found in tries.items() if found["after"]["validation"]}
    best = min(tries, key=lambda rate: tried[f"{rate:g}"]["after"] if tried else 0)
    found = {when: tries[best][when]["evaluation"] for when in ("before", "after")}
    found["training"] = tries[best]["training"]
    return tries[best] | {name: " ".join(map(repr, losses)) for name, losses in found.items()}, tried


def write_case(name: str, model: str, content: dict) -> None:
    "Put a case into the record of its model."
    path = OUT / f"{model}.json"
    cases = read_checked(path)["cases"] if path.exists() else {}
    write_checked(path, {"cases": cases | {name: content}})


def main(name: str, work: Path, data: str | None = None) -> None:
    "Measure what is not there yet, row after row, and write the case anew after each."
    work = work / re.sub(r"\W+", "-", name).strip("-")
    work.mkdir(parents=True, exist_ok=True)
    bench, rows, tried = Bench(name, work, data), {}, {}
    case, content = bench.case, about(bench) | ({"stages": STAGES} if "iterative" in CASES[name].beside else {})
    for row in (*case.methods, *case.beside):
        rates = (*case.rates, *MORE.get((name, row), ()))
        if row.endswith("rank 8"):
            rates = (10 * rows[row.split(",")[0]]["settings"]["lr"],)
        tries = {rate: kept(work, f"{row} {rate:g}", lambda: measured(bench, row, rate)) for rate in rates}
        rows[row], of = row_of(tries)
        tried |= {row: of} if len(of) > 1 else {}
        write_case(name, case.model, content | {"tried": tried, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
