"""MLP neurons, causally: estimates against exact masking, groups as they are split, pruning with a factor a neuron.

    python -m tools.neurons MODEL WORK [SECONDS] [DATA]

MODEL is lab, lab_moe, smollm2 or qwen (in models/qwen-coder-0.5b). Every piece is a file in WORK and is not measured
twice; no new piece is begun after SECONDS, and what is there by then is written to figures/neurons/MODEL.json.
CAP_NB_NOTE says what else ran. Held-out problems and text are those of the run of all methods of the same model, so
that its records can stand beside these, problem by problem.
"""
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from torch import nn

from cap_nb.analysis import compare_methods
from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import read_checked, write_checked
from cap_nb.evaluation import (
    Evaluation, LossRecord, Perplexity, bootstrap_interval, evaluation_problems, perplexity, problem_losses)
from cap_nb.importance import importance_factors
from cap_nb.jobs.job import problems_fingerprint
from cap_nb.jobs.records import Run, environment, load_run
from cap_nb.methods.neurons import (
    NEURON_AWARE, GroupRises, MaskedGroup, NeuronGroup, group_rises, neuron_activations, neuron_estimates,
    neuron_factors, neuron_groups, neuron_order, split_where_it_matters)
from cap_nb.methods.prune import parse_method, prune
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.methods.experts import UnitFactors
from cap_nb.regions import Factors
from cap_nb.scoring import causal_scores
from tools.studied import FOLDERS, NOTE, source

FIGURES = Path(__file__).resolve().parent.parent / "figures"


@dataclass(frozen=True)
class Study:
    "What is measured on a model."
    dtype: str  # In which the model runs
    tasks: tuple[str, ...]  # Tasks of calibration and evaluation
    text: str  # Text of the perplexity
    validation: int  # Problems a task to choose on
    judged: int  # Examples a task on which neurons and groups are masked
    singles: int  # Neurons a layer that are masked alone, drawn at random
    last: int  # Of so many layers, the last ones, whose passes are short
    budget: int  # Masked groups of each search
    orders: tuple[str, ...]  # Orders of the searches
    cells: tuple[tuple[str, float], ...]  # Methods and sparsities
    again: tuple[str, ...] = ()  # Methods without neurons that are measured here once more
    experts: int = 0  # Experts of a layer; their neurons stand behind one another in the tables of the pieces


CELLS = tuple((method, sparsity) for method in ("cap.neurons_wide", "cap.neurons", "cap_wanda.neurons_wide@row")
              for sparsity in (0.5, 0.2))
ORDERS = ("contiguous", "random", "coactivation", "estimate")
# In bfloat16 the same pruning on another processor has other zeros and losses, so what is compared is measured together
STUDIES = {
    "lab": Study(dtype="float32", tasks=("lab-gsm8k", "lab-strategyqa", "lab-arc"), text="lab-text", validation=40,
                 judged=8, singles=24, last=6, budget=96, orders=ORDERS, cells=CELLS),
    "smollm2": Study(dtype="bfloat16", tasks=("gsm8k", "strategyqa", "arc"), text="wikitext2", validation=5,
                     judged=2, singles=2, last=7, budget=50, orders=ORDERS, cells=CELLS,
                     again=("wanda", "cap", "cap_wanda@row"))}
STUDIES["qwen"] = replace(STUDIES["smollm2"], last=5, budget=36, orders=("contiguous", "estimate"), cells=CELLS[:4],
                          again=("wanda", "cap"))
STUDIES["lab_moe"] = replace(STUDIES["lab"], experts=8, cells=CELLS[:4])  # No run of it has cap_wanda


@dataclass(frozen=True)
class Ready:
    "A study with its model."
    name: str  # Name of the model
    study: Study  # What is measured
    model: nn.Module  # The model
    tokenizer: object  # Its tokenizer
    data: str | None  # Folder of benchmark files
    settings: dict  # Configuration of the run whose examples are taken
    calibration: Calibration  # That run's calibration set
    work: Path  # Folder of the pieces
    until: float  # Time after which no piece is begun

    def piece(self, name: str, measure: Callable[[], object]) -> object:
        "What a file holds, measured if it is not there; None when it is too late to begin."
        path = self.work / f"{name.replace('/', ' ')}.json"
        if not path.exists():
            if time.time() > self.until:
                return None
            began = time.time()
            write_checked(path, measure())
            print(f"{name}: {time.time() - began:.0f} s", flush=True)
        return read_checked(path)


def run_of(name: str) -> Run:
    "The run of all methods; a mixture has but one."
    folder = FIGURES / f"{name}_methods"
    return load_run(folder if folder.exists() else FIGURES / name)


def style(name: str) -> str | None:
    "The prompt style of that run; None is the model's own."
    return run_of(name).configuration["style"]["called"] if name in FOLDERS else None


def ready(name: str, work: Path, seconds: float, data: str | None) -> Ready:
    "Load the model and the calibration set of the run of all methods."
    study, until = STUDIES[name], time.time() + seconds
    model, tokenizer = load_model(source(name), study.dtype, "cpu")
    settings = run_of(name).configuration
    n = settings["calibration"]["n"]
    calibration = calibration_set(tokenizer, study.tasks, n, data_dir=data, style=style(name))
    assert calibration.fingerprint == settings["calibration"]["fingerprint"]
    assert model_fingerprint(model) == settings["model"]["fingerprint"]
    return Ready(name=name, study=study, model=model, tokenizer=tokenizer, data=data, settings=settings,
                 calibration=calibration, work=work, until=until)


def table(values: torch.Tensor) -> list:
    "A table with as many digits as anybody reads, [L, M] or [L, E M]."
    return [[float(f"{value:.5g}") for value in row] for row in values.flatten(1).tolist()]


def by_expert(r: Ready, values: torch.Tensor) -> torch.Tensor:
    "A table as the package has it: in a mixture, [L, E, M]."
    return values.unflatten(1, (r.study.experts, -1)) if r.study.experts else values


def masked_alone(r: Ready, layer: int, place: int, width: int) -> NeuronGroup:
    "A neuron by its place among a layer's neurons; in a mixture, among those of all its experts."
    each = width // r.study.experts if r.study.experts else width
    return NeuronGroup(layer, (place % each,), place // each if r.study.experts else None)


def judges(r: Ready) -> Calibration:
    "The few examples on which neurons and groups are masked."
    wanted = [[e for e in r.calibration.examples if e.task == task][:r.study.judged] for task in r.study.tasks]
    return Calibration.from_examples([example for examples in wanted for example in examples], k=1)


def estimates(r: Ready, on: str, signed: bool) -> torch.Tensor | None:
    "First-order estimates on all calibration examples, or on those of the judge."
    examples = r.calibration if on == "all" else judges(r)
    found = r.piece(f"estimates {on} {'signed' if signed else 'sizes'}",
                    lambda: table(neuron_estimates(r.model, examples, signed=signed)))
    return found and torch.tensor(found, dtype=torch.float64)


def singles(r: Ready, rises: GroupRises, width: int) -> list:
    "The exact rise of neurons drawn at random in every layer: [layer, neuron, rise]."
    rng, rows = torch.Generator().manual_seed(0), []
    for layer in range(r.model.config.num_hidden_layers):
        for neuron in torch.randperm(width, generator=rng)[:r.study.singles].sort().values.tolist():
            if layer >= r.model.config.num_hidden_layers - r.study.last:
                rise = rises(masked_alone(r, layer, neuron, width)).mean().item()
                rows.append([layer, neuron, float(f"{rise:.5g}")])
    return rows


def search(r: Ready, rises: GroupRises, how: str, signed: torch.Tensor) -> list:
    "A search that begins with whole MLPs or experts: [layer, size, rise, sum of the estimates, parent]."
    groups, parts = [], signed.unflatten(1, (r.study.experts or 1, -1))
    for layer, expert in ((layer, expert) for layer in range(len(parts)) for expert in range(parts.shape[1])):
        where = (layer, expert if r.study.experts else None)
        activations = neuron_activations(r.model, judges(r), *where) if how == "coactivation" else None
        groups += neuron_groups(neuron_order(how, parts[layer, expert], activations), 1, *where)
    def row_of(each: MaskedGroup) -> list:
        estimate = parts[each.group.layer, each.group.expert or 0][list(each.group.neurons)].sum().item()
        numbers = [float(f"{number:.5g}") for number in (each.rise, estimate)]
        return [each.group.layer, len(each.group.neurons), *numbers, each.parent]
    return [row_of(each) for each in split_where_it_matters(rises, groups, r.study.budget)]


def remembered(r: Ready) -> GroupRises:
    "Exact masking in float32 (bfloat16 rounds one neuron away), prepared when first asked; masks no group twice."
    known, prepared = {}, []
    def rises(group: NeuronGroup) -> torch.Tensor:
        key = (group.layer, group.expert, frozenset(group.neurons))
        if key not in known:
            if not prepared:
                exact = r.model if r.study.dtype == "float32" else load_model(source(r.name), "float32", "cpu")[0]
                prepared.append(group_rises(exact, judges(r)))
            known[key] = prepared[0](group)
        return known[key]
    return rises


def head_factors(r: Ready) -> torch.Tensor:
    "Equation 3 from that run's table of head losses."
    return importance_factors(causal_scores(load_run(FIGURES / r.name).losses))


def factors_of(r: Ready, method: str) -> Factors:
    "The factors that a method uses."
    heads, attribution = head_factors(r), parse_method(method).attribution
    if not attribution:
        return Factors(heads=heads)
    named = NEURON_AWARE[attribution]
    return UnitFactors(heads=heads, neurons=neuron_factors(by_expert(r, estimates(r, "all", False)), named.high))


def permuted(factors: torch.Tensor) -> torch.Tensor:
    "The control: the factors of each MLP on other neurons of it."
    order = torch.rand(factors.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    return factors.gather(1, order)


def ways(r: Ready) -> dict[str, torch.Tensor | None]:
    "What was tried: names of ways to neurons' factors."
    signed, sizes = estimates(r, "all", True), estimates(r, "all", False)
    heads = causal_scores(load_run(FIGURES / r.name).losses)
    on_line = importance_factors(torch.cat([heads, sizes], 1))[:, heads.shape[1]:]
    found = {"the layer's mean": None, "1 to 30": neuron_factors(sizes, 30.0), "1 to 10": neuron_factors(sizes),
             "1 to 30, permuted": permuted(neuron_factors(sizes, 30.0)),
             "1 to 10, permuted": permuted(neuron_factors(sizes)), "1 to 100": neuron_factors(sizes, 100.0),
             "1 to 10, signed": neuron_factors(signed), "one line with the heads": on_line}
    for spread in (2.0, 10.0):
        found[f"the layer's mean, by rank, {spread:g}:1"] = by_rank(sizes, head_factors(r), spread)
    return found


def by_rank(sizes: torch.Tensor, heads: torch.Tensor, spread: float) -> torch.Tensor:
    "The mean factor of a layer's heads, shared out among its neurons by rank."
    rank = sizes.argsort(dim=1, stable=True).argsort(1).double() / (sizes.shape[1] - 1)
    return heads.mean(1, keepdim=True) * 2 * (1 + (spread - 1) * rank) / (1 + spread)


def after_cap(r: Ready, method: str, neurons: torch.Tensor | None, dense: dict[str, torch.Tensor]) -> dict:
    "Losses of validation problems after pruning half of the weights."
    exclude = {example.uid for example in r.calibration.examples}
    problems = [p for task in r.study.tasks
                for p in evaluation_problems(task, r.study.validation, 0, r.data, exclude, "validation")]
    prune(r.model, method, 0.5, UnitFactors(heads=head_factors(r), neurons=neurons), r.calibration)
    losses = [float(f"{record.loss:.5g}") for record in problem_losses(r.model, r.tokenizer, problems, style(r.name))]
    r.model.load_state_dict(dense)
    return {"fingerprint": problems_fingerprint(problems), "losses": losses}


def tried(r: Ready, dense: dict[str, torch.Tensor]) -> dict[str, dict]:
    "CAP with each way to neurons' factors, and Wanda, on validation problems."
    if r.study.experts or estimates(r, "all", True) is None or estimates(r, "all", False) is None:
        return {}
    cases = {"wanda": ("wanda", None), **{name: ("cap", neurons) for name, neurons in ways(r).items()}}
    found = {name: r.piece(f"tried {name}", lambda: after_cap(r, *case, dense)) for name, case in cases.items()}
    return {name: each for name, each in found.items() if each}


def cell(r: Ready, method: str, sparsity: float, dense: dict[str, torch.Tensor]) -> dict:
    "Prune, measure on the held-out problems and text of that run, and put the weights back."
    report = prune(r.model, method, sparsity, factors_of(r, method), r.calibration)
    evaluation, exclude = r.settings["evaluation"], {example.uid for example in r.calibration.examples}
    losses = []
    for task in r.study.tasks:
        problems = evaluation_problems(task, evaluation["loss_n"], 0, r.data, exclude)
        assert problems_fingerprint(problems) == evaluation["data"]["loss"][task]
        records = problem_losses(r.model, r.tokenizer, problems, style(r.name))
        losses += [[o.task, o.uid, float(f"{o.loss:.6g}"), o.tokens] for o in records]
    text = perplexity(r.model, r.tokenizer, r.study.text, r.data, evaluation["windows"], evaluation["window_tokens"])
    assert text.fingerprint in evaluation["data"]["text"].values()
    r.model.load_state_dict(dense)
    return {"reached": report.reached, "losses": losses, "windows": [float(f"{loss:.6g}") for loss in text.losses]}


def evaluation_of(method: str, sparsity: float, found: dict, like: Perplexity) -> Evaluation:
    "A cell as the evaluations of that run are, its perplexity on the same windows."
    losses = tuple(LossRecord(task=task, uid=uid, loss=loss, tokens=tokens)
                   for task, uid, loss, tokens in found["losses"])
    ends = bootstrap_interval(found["windows"])
    value, low, high = torch.tensor([mean(found["windows"]), *ends], dtype=torch.float64).exp().tolist()
    text = replace(like, value=value, low=low, high=high, losses=tuple(found["windows"]))
    return Evaluation(method=method, sparsity=sparsity, reached=found["reached"], losses=losses, perplexity=text)


def row_of(evaluation: Evaluation) -> list:
    "Method, sparsity, mean loss and perplexity."
    numbers = mean(o.loss for o in evaluation.losses), evaluation.perplexity.value
    return [evaluation.method, evaluation.sparsity, *(float(f"{number:.5g}") for number in numbers)]


def beside_that_run(r: Ready, cells: dict[str, dict]) -> dict:
    "Means of our cells and of that run's, and every paired difference to Wanda and to the method without neurons."
    known = run_of(r.name).evaluations
    like = next(each.perplexity for each in known if each.method == "dense")
    ours = [evaluation_of(key.split("/")[0], float(key.split("/")[1]), found, like) for key, found in cells.items()]
    names = list(dict.fromkeys(each.method for each in ours if each.method not in r.study.again))
    pairs = [(method, other) for method in names for other in sorted({"wanda", re.sub(r"\.\w+", "", method)})]
    theirs = [each for each in known if each.method in {"dense"}.union(*pairs)]
    measured = [each for each in theirs if f"{each.method}/{each.sparsity}" not in cells] + ours
    found = compare_methods(measured, pairs, f"the comparisons of {r.name}'s neurons")
    elsewhere = [each for each in theirs if each not in measured]
    return {"rows": [row_of(each) for each in measured], "measured elsewhere": [row_of(each) for each in elsewhere],
            "differences": [[*key, *(float(f"{number:.4g}") for number in (c.value, c.low, c.high)), c.decided, c.n]
                            for key, c in found.items()]}


def main(name: str, work: Path, seconds: float, data: str | None) -> None:
    "Measure what is not there yet, and write it all."
    r = ready(name, work, seconds, data)
    dense = {key: value.clone() for key, value in r.model.state_dict().items()}
    content = {"model": {"name": name, "fingerprint": r.settings["model"]["fingerprint"], "dtype": r.study.dtype},
               "calibration": {name: r.settings["calibration"][name] for name in ("n", "seed", "fingerprint")},
               "judged": {"n": r.study.judged, "fingerprint": judges(r).fingerprint}, "budget": r.study.budget,
               "environment": environment(r.model.device, NOTE)}
    rises, signed, sizes = remembered(r), estimates(r, "judged", True), estimates(r, "judged", False)
    content["singles"] = r.piece("singles", lambda: singles(r, rises, signed.shape[1]))
    content["estimates"] = [[float(f"{t[layer, neuron]:.5g}") for t in (signed, sizes)]
                            for layer, neuron, _ in content["singles"] or ()]
    again = [(method, sparsity) for method in r.study.again for sparsity in (0.2, 0.5)]
    found = {f"{method}/{sparsity}": r.piece(f"{method}/{sparsity}", lambda: cell(r, method, sparsity, dense))
             for method, sparsity in [*r.study.cells, *again]}
    cells = {key: value for key, value in found.items() if value}
    content["beside"] = beside_that_run(r, cells) if cells else None
    content["cells"] = {key: value | {"losses": [row[2] for row in value["losses"]]}  # in the order of that run
                        for key, value in cells.items()}
    content["searches"] = {how: r.piece(f"search {how}", lambda: search(r, rises, how, signed))
                           for how in r.study.orders}
    content["tried"] = tried(r, dense)
    write_checked(FIGURES / "neurons" / f"{name}.json", content)


if __name__ == "__main__":
    name, work, seconds, data = [*sys.argv[1:], *("1e9", None)[len(sys.argv) - 3:]]
    main(name, Path(work), float(seconds), data)
