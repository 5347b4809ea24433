"""Explainable masks on the lab's model and on SmolLM2: what they know of tasks, and what learned thresholds are worth.

    python tools/explainable_masks.py lab
    CAP_NB_DATA=FOLDER python tools/explainable_masks.py smollm2

About five minutes on one core for the lab, a quarter of an hour for SmolLM2. Writes
figures/explainable_masks/NAME.json, which nbs/methods/19_explainable_masks reads; CAP_NB_NOTE says what else was
running. Held-out problems are those on which the run of all methods of the same model is judged.
"""
import copy
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from cap_nb.analysis import compare, correct_family
from cap_nb.calibration import calibration_set
from cap_nb.core.files import write_checked
from cap_nb.evaluation import LossRecord, evaluation_problems, problem_losses
from cap_nb.jobs.records import environment, load_run
from cap_nb.methods.explainable_masks import (
    MaskFit, ThresholdFit, UnitTable, aggregated, fit_masks, fit_thresholds, prune_units, tasks_of, text_passes,
    unit_weights, units_to_remove)
from cap_nb.methods.neurons import neuron_estimates
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.scoring import causal_scores, rank_correlation

FIGURES = Path(__file__).resolve().parent.parent / "figures"
SPARSITIES = (0.2, 0.5)  # shares of the weights in scope
MANY = 20_000  # masks of neurons beyond which a record keeps quantiles of each layer


@dataclass(frozen=True)
class Setting:
    "How a model is measured."
    run: str  # folder under figures/ whose table of losses has its causal scores
    dtype: str
    n: int  # calibration examples a task
    k: int  # subsets of the calibration set; they play no part here but in its fingerprint
    held_out: int  # problems a task
    masks: MaskFit = MaskFit()
    thresholds: ThresholdFit = ThresholdFit()
    again: bool = True  # whether the masks are fitted a second time, with their examples in another order


SETTINGS = {
    "lab": Setting("lab", "float32", 32, 1, 100),
    # the calibration set of its run of all methods; fewer examples a step, so that it takes minutes
    "smollm2": Setting("smollm2_methods", "bfloat16", 16, 3, 20, MaskFit(examples=8), ThresholdFit(steps=8, examples=8),
                       again=False)}


def rounded(table: torch.Tensor, digits: int = 4) -> list:
    "A table with as many digits as anybody reads."
    return [rounded(row, digits) if row.ndim else round(row.item(), digits) for row in table]


def of_task(losses, task):
    "Causal scores from the examples of one task: the plain mean."
    mine = torch.tensor([name == task for name in losses.task])
    return (losses.masked[..., mine] - losses.intact[mine]).mean(-1)


def level(scores: UnitTable, sparsity: float) -> torch.Tensor:
    "Thresholds that take the same share of heads, and of neurons, from every layer."
    return torch.stack([part.quantile(sparsity, dim=1) for part in (scores.heads, scores.neurons)], 1)


def per_weight(model, causal: torch.Tensor, estimates: torch.Tensor) -> UnitTable:
    "Causal scores of heads and first-order estimates of neurons, for each weight that goes with them."
    weights = unit_weights(model)
    return UnitTable(causal / weights.heads, estimates / weights.neurons)


def kept_neurons(masks: UnitTable) -> list:
    "The masks of neurons, [C, L, M]; of many, quantiles of their aggregate in each layer, [L, 21]."
    if masks.neurons.numel() <= MANY:
        return rounded(masks.neurons, 3)
    return rounded(aggregated(masks).neurons.quantile(torch.linspace(0, 1, 21).double(), dim=1).T, 3)


def compared(record: dict) -> dict:
    "Ways of removing units, beside each other on the same problems: difference of mean losses, interval, corrected p."
    def losses_of(cell: str) -> list[LossRecord]:
        return [LossRecord(task=task, uid=uid, loss=loss, tokens=1)
                for (task, uid), loss in zip(record["problems"], record["removed"][cell]["losses"])]
    pairs = [(f"{first} {s}", f"{second} {s}") for s in SPARSITIES
             for first, second in (("learned", "one"), ("one", "level"), ("one", "causal"), ("one", "random"))]
    found = correct_family({f"{a} - {b}": compare(losses_of(a), losses_of(b)) for a, b in pairs}, "these ways")
    return {name: {key: getattr(c, key) for key in ("value", "low", "high", "n", "holm", "family")}
            for name, c in found.items()}


def main(name: str) -> None:
    setting, data = SETTINGS[name], os.environ.get("CAP_NB_DATA")
    model, tokenizer = load_model(name, setting.dtype, "cpu")
    calibration = calibration_set(tokenizer, n=setting.n, k=setting.k, data_dir=data)
    tasks, task_of = tasks_of(calibration)
    passes, count = text_passes(model, calibration), len(calibration.examples)
    losses = load_run(FIGURES / setting.run).losses
    record = {"tasks": tasks, "n": setting.n, "held out": setting.held_out, "fit": asdict(setting.masks),
              "thresholds fit": asdict(setting.thresholds),
              "calibration": calibration.fingerprint, "model": model_fingerprint(model), "seed": 0,
              "environment": environment("cpu", os.environ.get("CAP_NB_NOTE", "")) | {"dtype": setting.dtype}}
    began = time.time()
    masks = fit_masks(model, passes, task_of, setting.masks)
    record["seconds"] = round(time.time() - began, 1)
    scores = aggregated(masks)
    record["masks"] = {"heads": rounded(masks.heads), "neurons": kept_neurons(masks)}
    record["causal"] = rounded(torch.stack([of_task(losses, task) for task in tasks]), 6)
    record["agreement"] = {
        "of tasks": [[round(rank_correlation(row, of_task(losses, task)), 3) for task in tasks] for row in masks.heads],
        "between tasks": [[round(rank_correlation(row, other), 3) for other in masks.heads] for row in masks.heads],
        "aggregated": round(rank_correlation(scores.heads, causal_scores(losses)), 3)}
    if setting.again:
        again = aggregated(fit_masks(model, passes, task_of, replace(setting.masks, seed=1)))
        record["agreement"] |= {
            "two seeds, heads": round(rank_correlation(scores.heads, again.heads), 3),
            "two seeds, neurons": round(rank_correlation(scores.neurons, again.neurons), 3)}
    target = FIGURES / "explainable_masks" / f"{name}.json"
    target.parent.mkdir(exist_ok=True)
    write_checked(target, record)  # what a run that is stopped here has found
    print(record["agreement"], record["seconds"], flush=True)

    uids = {example.uid for example in calibration.examples}
    problems = [p for task in tasks
                for p in evaluation_problems(task, setting.held_out, data_dir=data, exclude=uids)]
    zero, rng = torch.zeros(len(scores.heads), 2, dtype=torch.float64), torch.Generator().manual_seed(0)
    drawn = scores.mapped(lambda table: torch.rand(table.shape, generator=rng, dtype=torch.float64))
    causal = per_weight(model, causal_scores(losses), neuron_estimates(model, calibration, signed=True))
    record["problems"] = [(p.task, p.uid) for p in problems]
    record["dense"] = [round(r.loss, 6) for r in problem_losses(model, tokenizer, problems)]
    record["removed"] = {}
    for sparsity in SPARSITIES:
        learned = fit_thresholds(model, passes, count, scores, sparsity, setting.thresholds)
        ways = {"learned": (scores, learned), "one": (scores, zero), "level": (scores, level(scores, sparsity)),
                "causal": (causal, zero), "random": (drawn, zero)}
        for way, (table, thresholds) in ways.items():
            pruned, gone = copy.deepcopy(model), units_to_remove(model, table, thresholds, sparsity)
            report = prune_units(pruned, gone, sparsity)
            found = problem_losses(pruned, tokenizer, problems)
            record["removed"][f"{way} {sparsity}"] = {
                "reached": report.reached, "heads": gone.heads.sum(1).tolist(), "neurons": gone.neurons.sum(1).tolist(),
                "thresholds": rounded(thresholds), "losses": [round(r.loss, 5) for r in found]}
            means = [sum(r.loss for r in found if r.task == task) / setting.held_out for task in tasks]
            print(way, sparsity, report.reached, gone.heads.sum(1).tolist(), gone.neurons.sum(1).tolist(),
                  [round(mean, 3) for mean in means], flush=True)
    record["compared"] = compared(record)
    write_checked(target, record)


if __name__ == "__main__":
    main(sys.argv[1])
