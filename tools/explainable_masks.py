"""Explainable masks on the lab's model: what they know of tasks, and what thresholds learned for each layer are worth.

    python tools/explainable_masks.py

About five minutes on one core. Writes figures/explainable_masks/lab.json, which nbs/methods/19_explainable_masks reads.
Held-out problems are those on which the run of all methods of the same model is judged.
"""
import copy
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch

from cap_nb.analysis import compare, correct_family
from cap_nb.calibration import calibration_set
from cap_nb.core.files import write_checked
from cap_nb.data.problems import LAB_TASKS
from cap_nb.evaluation import LossRecord, evaluation_problems, problem_losses
from cap_nb.jobs.records import environment, load_run
from cap_nb.methods.explainable_masks import (
    MaskFit, ThresholdFit, UnitTable, aggregated, fit_masks, fit_thresholds, prune_units, tasks_of, text_passes,
    unit_weights, units_to_remove)
from cap_nb.methods.neurons import neuron_estimates
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.scoring import causal_scores, rank_correlation

FIGURES = Path(__file__).resolve().parent.parent / "figures"
N, HELD_OUT, SPARSITIES = 32, 100, (0.2, 0.5)  # a task, a task, shares of the weights in scope


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


def main() -> None:
    model, tokenizer = load_model("lab", "float32", "cpu")
    calibration = calibration_set(tokenizer, n=N, k=1)
    tasks, task_of = tasks_of(calibration)
    passes, count = text_passes(model, calibration), len(calibration.examples)
    losses = load_run(FIGURES / "lab").losses
    record = {"tasks": tasks, "n": N, "held out": HELD_OUT, "fit": asdict(MaskFit()),
              "thresholds fit": asdict(ThresholdFit()),
              "calibration": calibration.fingerprint, "model": model_fingerprint(model), "seed": 0,
              "environment": environment("cpu", os.environ.get("CAP_NB_NOTE", "")) | {"dtype": "float32"}}
    began = time.time()
    masks = fit_masks(model, passes, task_of)
    record["seconds"] = round(time.time() - began, 1)
    again = fit_masks(model, passes, task_of, MaskFit(seed=1))
    scores = aggregated(masks)
    record["masks"] = {"heads": rounded(masks.heads), "neurons": rounded(masks.neurons, 3)}
    record["causal"] = rounded(torch.stack([of_task(losses, task) for task in tasks]), 6)
    record["agreement"] = {
        "of tasks": [[round(rank_correlation(row, of_task(losses, task)), 3) for task in tasks] for row in masks.heads],
        "aggregated": round(rank_correlation(scores.heads, causal_scores(losses)), 3),
        "two seeds, heads": round(rank_correlation(scores.heads, aggregated(again).heads), 3),
        "two seeds, neurons": round(rank_correlation(scores.neurons, aggregated(again).neurons), 3)}
    print(record["agreement"], record["seconds"], flush=True)

    uids = {example.uid for example in calibration.examples}
    problems = [p for task in LAB_TASKS for p in evaluation_problems(task, HELD_OUT, exclude=uids)]
    zero, rng = torch.zeros(len(scores.heads), 2, dtype=torch.float64), torch.Generator().manual_seed(0)
    drawn = scores.mapped(lambda table: torch.rand(table.shape, generator=rng, dtype=torch.float64))
    causal = per_weight(model, causal_scores(losses), neuron_estimates(model, calibration, signed=True))
    record["problems"] = [(p.task, p.uid) for p in problems]
    record["dense"] = [round(r.loss, 6) for r in problem_losses(model, tokenizer, problems)]
    record["removed"] = {}
    for sparsity in SPARSITIES:
        learned = fit_thresholds(model, passes, count, scores, sparsity)
        ways = {"learned": (scores, learned), "one": (scores, zero), "level": (scores, level(scores, sparsity)),
                "causal": (causal, zero), "random": (drawn, zero)}
        for name, (table, thresholds) in ways.items():
            pruned, gone = copy.deepcopy(model), units_to_remove(model, table, thresholds, sparsity)
            report = prune_units(pruned, gone, sparsity)
            found = problem_losses(pruned, tokenizer, problems)
            record["removed"][f"{name} {sparsity}"] = {
                "reached": report.reached, "heads": gone.heads.sum(1).tolist(), "neurons": gone.neurons.sum(1).tolist(),
                "thresholds": rounded(thresholds), "losses": [round(r.loss, 5) for r in found]}
            print(name, sparsity, report.reached, gone.heads.sum(1).tolist(), gone.neurons.sum(1).tolist(),
                  [round(sum(r.loss for r in found if r.task == task) / HELD_OUT, 3) for task in LAB_TASKS], flush=True)
    record["compared"] = compared(record)
    folder = FIGURES / "explainable_masks"
    folder.mkdir(exist_ok=True)
    write_checked(folder / "lab.json", record)


if __name__ == "__main__":
    main()
