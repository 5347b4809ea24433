"""What shrinking costs and gains: held-out losses, size and speed of models with whole neurons and heads cut out.

    python tools/shrink.py lab WORK
    python tools/shrink.py smollm2 WORK DATA    # DATA: folder of benchmark files
    python tools/shrink.py speed WORK

Every row is a file in WORK and is not measured twice; the ends are figures/shrink/lab.json, smollm2.json and
speed.json. Unstructured zeros (CAP, Wanda) stand beside it at the same share of the same weights. What chooses the
neurons by default was taken from these very tables, so among the choices there is no held-out winner: the page says it.
"""
import copy
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from recovery import kept
from torch import nn

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import write_checked
from cap_nb.data.problems import LAB_TASKS, Problem
from cap_nb.evaluation import evaluation_problems, problem_losses
from cap_nb.importance import importance_factors
from cap_nb.jobs.job import problems_fingerprint
from cap_nb.jobs.records import environment, load_run
from cap_nb.methods.prune import prune
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import load_model, model_fingerprint, save_model
from cap_nb.portable.fine_tuning import FineTuning, in_evaluation_mode, train_on
from cap_nb.portable.shrink import NEURON_SCORES, neurons_to_keep, shrink, staying, take_over, widths_of
from cap_nb.portable.speed import Side, SpeedSettings, speeds_of
from cap_nb.scoring import causal_scores

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "figures" / "shrink"
SPARSITIES = (0.1, 0.2)
CHOICES = (*NEURON_SCORES, "random")
EXAMPLES, PROBLEMS = {"lab": 64, "smollm2": 8}, {"lab": 100, "smollm2": 10}  # A task
DTYPES = {"lab": "float32", "smollm2": "bfloat16"}
TASKS = {"lab": LAB_TASKS, "smollm2": ("gsm8k", "strategyqa", "arc")}
TRAINING = FineTuning(steps=150, examples=6, lr=1e-3)  # Of the lab model, on other examples
NOTE = "other processes were running on both of the machine's cores"


class Bench:
    "A model, what it is calibrated on, and the problems that it is measured on."

    def __init__(self, name: str, data: str | None):
        self.name, self.data = name, data
        self.model, self.tokenizer = load_model(name, DTYPES[name], "cpu")
        self.run = load_run(ROOT / "figures" / name)
        self.calibration = self.drawn(EXAMPLES[name])
        seen = {e.uid for e in self.calibration.examples} | set(self.run.losses.uid)
        seen |= {e.uid for e in self.training().examples} if name == "lab" else set()
        self.problems = tuple(p for task in TASKS[name] for p in self.held_out(task, seen))

    def drawn(self, n: int) -> Calibration:
        return calibration_set(self.tokenizer, TASKS[self.name], n, data_dir=self.data)

    @cache
    def training(self) -> Calibration:
        return self.drawn(500)

    def held_out(self, task: str, seen: set[str]) -> list[Problem]:
        return evaluation_problems(task, PROBLEMS[self.name], 2, self.data, seen, "evaluation")

    @cache
    def scores(self, choice: str) -> torch.Tensor:
        if choice != "random":
            return NEURON_SCORES[choice](self.model, self.calibration)
        shape = len(self.run.losses.masked), widths_of(self.model)[0]
        return torch.rand(shape, generator=torch.Generator().manual_seed(0))

    def smaller(self, choice: str, sparsity: float, fit: bool, groups: int | None = None) -> nn.Module:
        "The model with neurons chosen in one way, and heads by their causal scores."
        heads = causal_scores(self.run.losses)
        parts = self.scores(choice), heads, neurons_to_keep(self.model, sparsity, groups), groups
        model = copy.deepcopy(self.model) if fit else self.model
        if fit:
            take_over(model, *staying(model, *parts), self.calibration)
        return shrink(model, *parts)

    def zeroed(self, method: str, sparsity: float) -> nn.Module:
        "The model with unstructured zeros."
        model = copy.deepcopy(self.model)
        prune(model, method, sparsity, importance_factors(self.run.scores), self.calibration)
        return model

    def row(self, make: Callable[[], nn.Module]) -> dict:
        "Losses problem by problem, and the size of the folder."
        model = make()
        losses = [float(f"{record.loss:.4g}") for record in problem_losses(model, self.tokenizer, self.problems)]
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, self.tokenizer, Path(folder) / "m")
            size = sum(path.stat().st_size for path in (Path(folder) / "m").iterdir())
        return {"losses": losses, "bytes": size, "parameters": sum(w.numel() for w in model.parameters()),
                "in_scope": sum(p.weight.numel() for p in projections(model)),
                "widths": [model.config.intermediate_size, model.config.num_key_value_heads],
                "model": model_fingerprint(model)}

    def trained(self, model: nn.Module) -> nn.Module:
        with in_evaluation_mode(model):
            train_on(model, self.training().examples, TRAINING, {}, None, TRAINING.steps)
        return model

    def rows(self) -> dict[str, Callable[[], nn.Module]]:
        "Name of a row -> makes its model."
        rows, fewer = {"dense": lambda: self.model}, widths_of(self.model)[1] - 1
        for s in SPARSITIES:
            for method in ("cap", "wanda"):
                rows[f"{method} {s:g}"] = lambda method=method, s=s: self.zeroed(method, s)
        for fit in (False, True):
            for choice in CHOICES:
                for s in SPARSITIES:
                    name = f"{choice}, fit {s:g}" if fit else f"{choice} {s:g}"
                    rows[name] = lambda choice=choice, s=s, fit=fit: self.smaller(choice, s, fit)
        rows["contribution, a head, fit 0.2"] = lambda: self.smaller("contribution", 0.2, True, fewer)
        for s in SPARSITIES if self.name == "lab" else ():
            rows[f"contribution, fit, trained {s:g}"] = lambda s=s: self.trained(self.smaller("contribution", s, True))
        return rows

    def about(self) -> dict:
        "What all rows follow from."
        on = {"n": EXAMPLES[self.name], "seed": 0, "fingerprint": self.calibration.fingerprint}
        problems = {"n": PROBLEMS[self.name], "seed": 2, "fingerprint": problems_fingerprint(self.problems),
                    "task": [p.task for p in self.problems]}
        model = {"name": self.name, "fingerprint": model_fingerprint(self.model), "dtype": DTYPES[self.name],
                 "device": "cpu"}
        return {"model": model, "calibration": on, "problems": problems, "training": asdict(TRAINING),
                "heads": {"table": f"figures/{self.name}", "n": len(self.run.losses.intact)},
                "environment": environment(self.model.device, NOTE)}


def losses(name: str, work: Path, data: str | None) -> None:
    "Measure what is not there yet; what there is by then is written after every row."
    bench, rows = Bench(name, data), {}
    for row, make in bench.rows().items():
        rows[row] = kept(work, f"{name} {row}", lambda: bench.row(make))
        write_checked(OUT / f"{name}.json", bench.about() | {"rows": rows})


def speed(work: Path) -> None:
    "Tokens a second of dense and shrunk models, taking turns."
    cases = {}
    for name in ("lab", "smollm2"):
        model, _ = load_model(name, "float32", "cpu")
        neurons, _ = widths_of(model)
        any_scores = torch.rand(model.config.num_hidden_layers, neurons, generator=torch.Generator().manual_seed(0))
        sides = {"dense": model} | {f"{s:g}": shrink(model, any_scores, None, neurons_to_keep(model, s))
                                    for s in (*SPARSITIES, 0.5)}
        settings = SpeedSettings(batches=(1,), prompt=128, steps=16, rounds=5)
        taken = kept(work, f"speed {name}", lambda: speeds_of({k: Side(m, {}) for k, m in sides.items()}, settings))
        cases[name] = {"seconds": taken, "settings": asdict(settings),
                       "environment": environment(model.device, NOTE)}
        write_checked(OUT / "speed.json", {"cases": cases})


if __name__ == "__main__":
    what, folder, *more = sys.argv[1:]
    OUT.mkdir(parents=True, exist_ok=True)
    if what == "speed":
        speed(Path(folder))
    else:
        losses(what, Path(folder), *(more or [None]))
