"""What masked fine-tuning gives back: the lab model at 50 %, held-out loss before and after, problem by problem.

    python tools/recovery.py WORK

Every piece (a learning rate on validation problems, a row) is a file in WORK and is not measured twice; the end is
figures/recovery/lab.json. For each method the better of two learning rates is taken, by validation problems. A first
run took for all of them the rate that was best for magnitude, and its held-out problems were looked at; so these are
others. Low-rank changes have ten times magnitude's rate, untried.
"""
import functools
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

from torch import nn

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.problems import LAB_TASKS, Problem
from cap_nb.engine.resumed_scoring import score_heads
from cap_nb.evaluation import evaluation_problems, problem_losses
from cap_nb.importance import importance_factors
from cap_nb.jobs.job import problems_fingerprint
from cap_nb.jobs.records import environment, mask_fingerprint
from cap_nb.methods.prune import prune
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.portable.fine_tuning import FineTuning, in_evaluation_mode, iterative_magnitude, recover, train_on
from cap_nb.scoring import causal_scores

METHODS = ("magnitude", "alps", "wanda", "sparsegpt", "cap")
SPARSITY, STAGES = 0.5, (0.2, 0.35, 0.5)
SETTINGS = FineTuning(steps=150, examples=6)
PRUNED_WITH, TRAINED_ON, HELD_OUT, VALIDATION = 64, 500, 100, 40  # Examples and problems a task
RATES = (1e-4, 1e-3)
MORE = {"magnitude": (2.5e-4, 4e-3)}  # Tried too
ROWS = (*METHODS, "dense", "iterative", "magnitude, rank 8")
OUT = Path(__file__).resolve().parent.parent / "figures" / "recovery" / "lab.json"


def lab():
    "A fresh lab model, with its tokenizer."
    return load_model("lab", "float32", "cpu")


@functools.cache
def data() -> tuple[Calibration, Calibration, dict[str, tuple[Problem, ...]]]:
    "What is pruned with, what is trained on, and problems that are neither."
    _, tokenizer = lab()
    sets = calibration_set(tokenizer, n=PRUNED_WITH), calibration_set(tokenizer, n=TRAINED_ON)
    seen = {example.uid for each in sets for example in each.examples}
    def drawn(n: int, seed: int, split: str) -> tuple[Problem, ...]:
        return tuple(p for task in LAB_TASKS for p in evaluation_problems(task, n, seed, None, seen, split))
    seen |= {problem.uid for problem in drawn(HELD_OUT, 0, "evaluation")}  # those of the first run
    return *sets, {"validation": drawn(VALIDATION, 0, "validation"), "evaluation": drawn(HELD_OUT, 1, "evaluation")}


def pruned(model: nn.Module, method: str) -> None:
    "Prune a model in place."
    factors = importance_factors(causal_scores(score_heads(model, data()[0]))) if method == "cap" else None
    prune(model, method, SPARSITY, factors, data()[0])


def losses_of(model: nn.Module, tokenizer, split: str) -> list[float]:
    "The loss of each problem, with as many digits as anybody reads."
    return [float(f"{record.loss:.5g}") for record in problem_losses(model, tokenizer, data()[2][split])]


def settings_of(name: str, rates: dict[str, float]) -> FineTuning:
    "How a row is trained."
    if name.endswith("rank 8"):
        return replace(SETTINGS, lr=10 * rates["magnitude"], rank=8)
    return replace(SETTINGS, lr=rates[name])


def trained(model: nn.Module, name: str, settings: FineTuning, work: Path) -> Sequence[float]:
    "Train a row's model in place, unless that was done when its rate was tried; the loss of each step."
    folder = work / (f"try {settings.lr:g} {name}" if name in (*METHODS, "iterative") else name)
    if name == "iterative":
        reports = iterative_magnitude(model, data()[1], STAGES, settings, folder)
        return [loss for report in reports for loss in report.losses]
    if name != "dense":
        return recover(model, data()[1], settings, folder).losses
    with in_evaluation_mode(model):  # the control: the same steps without a zero to hold
        return train_on(model, data()[1].examples, settings, {}, None, settings.steps)


def tried(rate: float, method: str, work: Path) -> dict:
    "Mean losses of validation problems before and after a training with one learning rate."
    model, tokenizer = lab()
    if method in METHODS:
        pruned(model, method)
    before = losses_of(model, tokenizer, "validation")
    trained(model, method, replace(SETTINGS, lr=rate), work)
    return {"before": mean(before), "after": mean(losses_of(model, tokenizer, "validation"))}


def row(name: str, rates: dict[str, float], work: Path) -> dict:
    "Held-out losses before and after; before an iterative pruning there is nothing but the dense model."
    model, tokenizer = lab()
    method, settings = name.split(",")[0], settings_of(name, rates)
    if method in METHODS:
        pruned(model, method)
    before, mask = losses_of(model, tokenizer, "evaluation"), mask_fingerprint(model)
    losses = [float(f"{loss:.4g}") for loss in trained(model, name, settings, work)]
    assert method == "iterative" or mask_fingerprint(model) == mask
    return {"before": before, "after": losses_of(model, tokenizer, "evaluation"), "training": losses,
            "settings": asdict(settings), "mask": mask_fingerprint(model), "model": model_fingerprint(model)}


def about() -> dict:
    "What all rows follow from."
    model, _ = lab()
    pruning, training, problems = data()
    split = {name: {"n": n, "seed": seed, "fingerprint": problems_fingerprint(problems[name])}
             for name, n, seed in (("validation", VALIDATION, 0), ("evaluation", HELD_OUT, 1))}
    held_out = problems["evaluation"]
    split["evaluation"] |= {"task": [p.task for p in held_out], "uid": [p.uid for p in held_out]}
    return {"model": {"name": "lab", "fingerprint": model_fingerprint(model), "dtype": "float32", "device": "cpu"},
            "sparsity": SPARSITY, "stages": STAGES, "problems": split, "environment": environment(model.device),
            "pruned_with": {"n": PRUNED_WITH, "seed": 0, "fingerprint": pruning.fingerprint},
            "trained_on": {"n": TRAINED_ON, "seed": 0, "fingerprint": training.fingerprint}}


def kept(work: Path, name: str, measure) -> dict:
    "What a file holds, measured if it is not there."
    path = work / f"{name}.json"
    if not path.exists():
        write_checked(path, measure())
        print(name, flush=True)
    return read_checked(path)


def main(work: Path) -> None:
    "Measure what is not there yet, and write it all."
    tries = {m: {rate: kept(work, f"try {rate:g} {m}", lambda: tried(rate, m, work))
                 for rate in (*RATES, *MORE.get(m, ()))} for m in (*METHODS, "dense", "iterative")}
    rates = {m: min(of, key=lambda rate: of[rate]["after"]) for m, of in tries.items()}
    rows = {name: kept(work, name, lambda: row(name, rates, work)) for name in ROWS}
    content = about() | {"tried": {m: {f"{r:g}": v for r, v in of.items()} for m, of in tries.items()}, "rows": rows}
    write_checked(OUT, content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
