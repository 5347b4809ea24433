"""What the page of traps cannot measure in seconds: windows, ties, norms and leaks, on the lab's model and SmolLM2.

    python tools/traps.py lab                               # five minutes of one core
    CAP_NB_DATA=FOLDER python tools/traps.py smollm2        # half an hour; CAP_NB_NOTE says what else was running

Writes figures/traps/NAME.json, which nbs/results/10_traps reads, piece by piece: one that is there is not measured again,
and a second word (windows, ties, norms, leak) names the only part to measure. The text is the test part of WikiText-2,
its first 32,768 tokens, cut into windows of each length.

For the leak, problems that judge are cut into disjoint sets; the model is pruned once with each set as its calibration
set, and each of these models is judged on the problems of all sets. So every loss that leaked has its counterparts: the
same problem under models that were calibrated on other problems of the same kind.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.problems import BENCHMARK_NAMES, LAB_TASKS
from cap_nb.data.prompts import encode_problem
from cap_nb.evaluation import evaluation_problems, perplexity, problem_losses
from cap_nb.jobs.records import environment, mask_fingerprint
from cap_nb.methods.criteria import Inputs, measured_for
from cap_nb.methods.prune import prune
from cap_nb.methods.wanda import WANDA
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.methods.selection import zero_within
from cap_nb.threshold import prune_report

FOLDER = Path(__file__).resolve().parents[1] / "figures" / "traps"
TOKENS, LENGTHS, SEED = 32768, (512, 1024, 2048, 4096), 0


@dataclass(frozen=True)
class Case:
    "A model and how much of it is measured."

    name: str
    dtype: str
    tasks: tuple[str, ...]
    n: int  # Calibration examples a task
    problems: int  # Problems a task for losses
    style: str  # Of prompts
    leaks: tuple[tuple[str, float], ...]  # Methods and sparsities
    sets: int  # Sets of problems that leak
    leaked: int  # Problems a task in each
    sparsities: tuple[float, ...]  # Of Wanda, for the norms

    def fresh(self, dtype: str | None = None) -> nn.Module:
        "A fresh model."
        return load_model(self.name, dtype or self.dtype, "cpu")[0]


CASES = {
    "lab": Case(name="lab", dtype="float32", tasks=LAB_TASKS, n=16, problems=60, style="lab", sets=6, leaked=8, sparsities=(0.5, 0.6),
                leaks=(("wanda", 0.6), ("sparsegpt", 0.6), ("alps", 0.6))),
    "smollm2": Case(name="smollm2", dtype="bfloat16", tasks=BENCHMARK_NAMES, n=8, problems=60, style="paper", sets=2, leaked=8,
                    sparsities=(0.5,), leaks=(("sparsegpt", 0.5),))}


def prune_with_dense_norms(model: nn.Module, sparsity: float, calibration: Calibration) -> None:
    "Wanda's scores, all norms from the dense model: the walk through the layers left out."
    known = measured_for(model, WANDA, Inputs(calibration=calibration))
    zero_within(projections(model), WANDA, known, sparsity, "row")


def window(case: Case, tokenizer, data: str, calibration: Calibration, name: str) -> dict:
    "Perplexity by length of window; the name holds method and sparsity."
    method, sparsity = name.split()
    model = case.fresh()
    report, found = prune(model, method, float(sparsity), calibration=calibration), {}
    for length in LENGTHS:
        text = perplexity(model, tokenizer, "wikitext2", data, TOKENS // length, length)
        found[str(length)] = {"value": text.value, "low": text.low, "high": text.high, "windows": text.windows, "length": text.window_tokens,
                              "reached": report.reached, "text": text.text, "fingerprint": text.fingerprint}
    return found


def tied(case: Case, name: str) -> float:
    "What is reached by magnitude; the name holds dtype, sparsity, scope and the treatment of ties."
    dtype, sparsity, scope, kind = name.split()
    return prune(case.fresh(dtype), f"magnitude@{scope}", float(sparsity), ties=kind).reached


def losses_of(model: nn.Module, tokenizer, problems: list, style: str) -> list[float]:
    "The loss of each problem, in their order."
    return [float(f"{one.loss:.7g}") for some in problems for one in problem_losses(model, tokenizer, some, style)]


def named(problems: list) -> list[str]:
    "Task and the first digits of the content hash of each problem."
    return [f"{problem.task} {problem.uid[:12]}" for some in problems for problem in some]


def norm(case: Case, tokenizer, calibration: Calibration, problems: list, name: str) -> dict:
    "Held-out losses of Wanda; the name holds sparsity and where the norms come from."
    sparsity, source = name.split(maxsplit=1)
    model = case.fresh()
    if source == "dense":
        prune_with_dense_norms(model, float(sparsity), calibration)
    else:
        prune(model, "wanda", float(sparsity), calibration=calibration)
    return {"losses": losses_of(model, tokenizer, problems, case.style), "masks": mask_fingerprint(model),
            "reached": prune_report(model, "wanda", float(sparsity)).reached}


def leak(case: Case, tokenizer, sets: list, name: str) -> list[list[float]]:
    "For each set that calibrated, the losses of all problems, set after set; the name holds method and sparsity."
    method, sparsity = name.split()
    found, problems = [], [some for one in sets for some in one]
    for one in sets:
        examples = [encode_problem(tokenizer, problem, case.style) for some in one for problem in some]
        model = case.fresh()
        prune(model, method, float(sparsity), calibration=Calibration.from_examples(examples, k=1))
        found.append(losses_of(model, tokenizer, problems, case.style))
    return found


def pieces(case: Case, tokenizer, data: str | None, calibration: Calibration) -> list[tuple]:
    "Part, name, function: everything that is measured."
    seen = {example.uid for example in calibration.examples}
    held_out = [evaluation_problems(task, case.problems, SEED, data, seen) for task in case.tasks]
    drawn = [evaluation_problems(task, case.sets * case.leaked, SEED, data) for task in case.tasks]
    sets = [[some[i * case.leaked:(i + 1) * case.leaked] for some in drawn] for i in range(case.sets)]
    real = ["dense 0", "wanda 0.1", "wanda 0.2"] if case.name != "lab" else []  # The lab's windows take seconds: on the page
    names = {"windows": real,
             "ties": [f"{dtype} {s:g} {scope} {kind}" for dtype in ("float32", "bfloat16") for s in (0.1, 0.2, 0.5)
                      for scope in ("model", "matrix") for kind in ("all", "exact")] if real else [],
             "norms": [f"{s:g} {source}" for s in case.sparsities for source in ("as pruned so far", "dense")],
             "leak": [f"{method} {s:g}" for method, s in case.leaks]}
    made = {"windows": lambda name: window(case, tokenizer, data, calibration, name), "ties": lambda name: tied(case, name),
            "norms": lambda name: norm(case, tokenizer, calibration, held_out, name), "leak": lambda name: leak(case, tokenizer, sets, name)}
    listed = [("norms", "problems", lambda _: named(held_out)), ("leak", "a set", lambda _: case.leaked * len(case.tasks)),
              ("leak", "problems", lambda _: named([some for one in sets for some in one]))]
    return listed + [(part, name, made[part]) for part, some in names.items() for name in some]


def main() -> None:
    case, data = CASES[sys.argv[1]], os.environ.get("CAP_NB_DATA")
    model, tokenizer = load_model(case.name, case.dtype, "cpu")
    calibration = calibration_set(tokenizer, n=case.n, seed=SEED, data_dir=data)
    settings = {"model": model_fingerprint(model), "calibration": calibration.fingerprint, "n": case.n, "seed": SEED, "dtype": case.dtype,
                "problems a task": case.problems, "tokens of text": TOKENS}
    out = FOLDER / f"{case.name}.json"
    FOLDER.mkdir(parents=True, exist_ok=True)
    kept = read_checked(out) if out.exists() else {"settings": settings, "parts": {}, "environment": {}}
    if kept["settings"] != settings:
        raise SystemExit(f"{out} was made with other settings: move it away.")
    for part, name, measure in pieces(case, tokenizer, data, calibration):
        if (len(sys.argv) > 2 and part != sys.argv[2]) or name in kept["parts"].setdefault(part, {}):
            continue
        kept["parts"][part][name] = measure(name)
        kept["environment"][part] = environment(model.device, os.environ.get("CAP_NB_NOTE", ""))
        write_checked(out, kept)
        print(part, name, flush=True)


if __name__ == "__main__":
    main()
