"""Budgets from interventions, measured with the method that they are for, and moved: validation losses, for results/07.

    python -m tools.budgets lab WORK [SECONDS]
    python -m tools.budgets smollm2 WORK [SECONDS] [DATA]    # DATA: folder of benchmark files

A budget is measured with Wanda's masks, as `+kl` does, or with the masks and weights of the criterion itself; then it
is corrected by moves on the whole pruned model, and as a control the moved shares are permuted among regions of a kind.
Each allocation is pruned by the criterion in its own walk and judged on validation problems, never on held-out ones.
Every budget and every pruned model is a file in WORK and is not measured twice; no model is pruned after SECONDS. What
is there by then is written to figures/budgets/MODEL.json. CAP_NB_NOTE says what else was running.
"""
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cap_nb.analysis import Comparison, correct_family, sign_flip_test
from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import write_checked
from cap_nb.data.problems import load_text
from cap_nb.methods.layer_walk import layer_by_layer
from cap_nb.evaluation import bootstrap_interval, evaluation_problems, perplexity, problem_losses
from cap_nb.jobs.chains import mixed_calibration, text_calibration
from cap_nb.jobs.records import environment
from cap_nb.methods.budgets import Budgets, BudgetSettings, Local, measured_budgets, modules_of, permuted_shares
from cap_nb.methods.criteria import Given
from cap_nb.methods.joint import joint_update
from cap_nb.methods.prune import apply_method, parse_method
from cap_nb.methods.sparsegpt import input_hessians, sparsegpt_update
from cap_nb.models.loading import load_model, model_fingerprint
from tools.studied import Pieces

OUT = Path(__file__).resolve().parent.parent / "figures" / "budgets"
UPDATES = {"sparsegpt": sparsegpt_update, "alps": joint_update}


@dataclass(frozen=True)
class Study:
    "What is measured on a model."
    dtype: str  # In which the model runs
    tasks: tuple[str, ...]  # Tasks of calibration and validation
    text: str  # Plain text, a tenth of the calibration set and of the judges
    n: int  # Calibration examples a task
    judged: int  # Validation problems a task
    criteria: tuple[str, ...]  # What prunes
    sparsities: tuple[float, ...]
    settings: BudgetSettings  # How budgets are measured and moved
    windows: tuple[int, int]  # Windows of validation text, and tokens in each
    seed: int = 0  # Calibration seed


STUDIES = {
    "lab": Study(dtype="float32", tasks=("lab-gsm8k", "lab-strategyqa", "lab-arc"), text="lab-text", n=64, judged=100,
                 criteria=("wanda", "sparsegpt", "alps"), sparsities=(0.5, 0.6), windows=(20, 2048),
                 settings=BudgetSettings(levels=(0.4, 0.7), examples=24, moves=150)),
    "smollm2": Study(dtype="bfloat16", tasks=("gsm8k", "strategyqa", "arc"), text="wikitext2", n=24, judged=60,
                     criteria=("wanda", "sparsegpt"), sparsities=(0.5,), windows=(20, 512),
                     settings=BudgetSettings(levels=(0.4, 0.7), examples=24, moves=60))}


def calibrated(tokenizer: object, study: Study, data: str | None) -> Calibration:
    "Gold solutions, a tenth of them replaced by windows of text, as `--text-share 0.1` has it."
    a_task = round(0.1 * study.n)
    gold = calibration_set(tokenizer, study.tasks, study.n - a_task, 3, study.seed, data)
    text = text_calibration(tokenizer, study.text, a_task * len(study.tasks), 256, 3, study.seed, data)
    return mixed_calibration((gold, text), 3, study.seed)


def solver_local(name: str, model: torch.nn.Module, calibration: Calibration) -> Local:
    "A solver with the Hessians of the dense model; the last four weights of a matrix are kept, since moves go back."
    walk = layer_by_layer(model, calibration)
    hessians = {key: hessian.clone() for step in walk for key, hessian in input_hessians(step).items()}
    kept = {key: {} for key in hessians}

    def weight(p: object, share: float) -> torch.Tensor:
        known = kept[p.name]
        if share not in known:
            known[share] = UPDATES[name](p.weight, hessians[p.name], share)[0]
        known[share] = known.pop(share)  # The newest stands last
        while len(known) > 4:
            del known[next(iter(known))]
        return known[share]
    return Local(name, weight)


def budget(name: str, chosen: tuple[Study, str, float, int], calibration: Calibration, work: Path) -> Budgets:
    "A budget measured with a local criterion, after so many moves."
    study, local, sparsity, moves = chosen
    model, _ = load_model(name, study.dtype, "cpu")
    own = None if local == "wanda" else solver_local(local, model.eval(), calibration)
    return measured_budgets(model.eval(), calibration, sparsity, replace(study.settings, moves=moves), work, own)


def allocations(name: str, chosen: tuple[Study, str, float], calibration: Calibration, work: Path) -> Iterator[tuple]:
    "Name of an allocation, and a function that gives the share of every projection (None: all alike)."
    study, criterion, sparsity = chosen

    def measured(local: str, moves: int) -> Callable[[], dict]:
        return lambda: budget(name, (study, local, sparsity, moves), calibration, work).modules

    def permuted() -> dict:
        moved = budget(name, (study, criterion, sparsity, study.settings.moves), calibration, work)
        return modules_of(moved.table.regions, permuted_shares(moved.table.regions, moved.shares, 0))
    yield "equal", lambda: None
    yield "Wanda's", measured("wanda", 0)
    if criterion != "wanda":
        yield "own", measured(criterion, 0)
    yield "own, moved", measured(criterion, study.settings.moves)
    yield "own, moved, permuted", permuted


def judged(name: str, study: Study, how: tuple[str, float, dict | None, Calibration], data: str | None) -> dict:
    "Validation losses of one pruned model."
    criterion, sparsity, shares, calibration = how
    model, tokenizer = load_model(name, study.dtype, "cpu")
    exclude = frozenset(example.uid for example in calibration.examples)
    if sparsity:
        apply_method(model.eval(), parse_method(criterion), sparsity, Given(calibration=calibration, shares=shares))
    found = {}
    for task in study.tasks:
        problems = evaluation_problems(task, study.judged, 0, data, exclude, "validation")
        records = problem_losses(model, tokenizer, problems)
        found[task] = {"uid": [r.uid[:8] for r in records], "loss": [float(f"{r.loss:.4g}") for r in records]}
    text = perplexity(model, tokenizer, load_text(study.text, data, "validation"), None, *study.windows)
    return found | {"text": {"loss": [float(f"{loss:.5g}") for loss in text.losses]}}


def compared(one: list, other: list) -> Comparison:
    "Losses less others on the same problems, a family of one."
    less = [a - b for a, b in zip(one, other, strict=True)]
    (low, high), p = bootstrap_interval(less, 0), sign_flip_test(less, 0, 99_999)
    return Comparison(value=sum(less) / len(less), low=low, high=high, unit="nats", n=len(less), p=p, holm=p)


def differences(cells: dict) -> list:
    """Allocations less equal shares, and the moved ones less the permuted ones, in one family: [criterion, sparsity,
    allocation, the other one, on, value, low, high, p after Holm, decided]."""
    found = {}
    for (criterion, sparsity, how), losses in cells.items():
        for other in ("equal", "own, moved, permuted"):
            asked = how != other and (other == "equal" or how == "own, moved")
            for on, beside in cells.get((criterion, sparsity, other), {}).items() if asked else ():
                found[criterion, sparsity, how, other, on] = compared(losses[on]["loss"], beside["loss"])
    told = correct_family(found, "figures/budgets")
    return [[*key, *(float(f"{number:.4g}") for number in (c.value, c.low, c.high, c.holm)), c.decided]
            for key, c in told.items()]


def main(name: str, work: Path, seconds: float = 1e9, data: str | None = None) -> None:
    "Measure cell after cell, and write what is there."
    study, work, cells = STUDIES[name], work / name, {}
    pieces = Pieces(work, time.time() + float(seconds))
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model(name, study.dtype, "cpu")
    calibration = calibrated(tokenizer, study, data)
    found = pieces.get("dense", lambda: judged(name, study, ("dense", 0.0, None, calibration), data))
    cells |= {("dense", 0.0, "equal"): found} if found else {}
    for sparsity in study.sparsities:
        for criterion in study.criteria:
            for how, shares in allocations(name, (study, criterion, sparsity), calibration, work):
                found = pieces.get(f"{criterion} {sparsity:g} {how}",
                                   lambda: judged(name, study, (criterion, sparsity, shares(), calibration), data))
                cells |= {(criterion, sparsity, how): found} if found else {}
    content = {"model": {"name": name, "fingerprint": model_fingerprint(model), "dtype": study.dtype, "device": "cpu"},
               "calibration": {"n": study.n, "seed": study.seed, "fingerprint": calibration.fingerprint},
               "settings": vars(study.settings), "judged": study.judged, "windows": study.windows,
               "losses": [[*key, {on: values["loss"] for on, values in each.items()}] for key, each in cells.items()],
               "differences": differences(cells)}
    OUT.mkdir(parents=True, exist_ok=True)
    made = environment(model.device, os.environ.get("CAP_NB_NOTE", ""))
    write_checked(OUT / f"{name}.json", content | {"environment": made})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
