"""Do heads add up? Pairs and growing sets of heads masked together, and what first order says of single ones.

    python -m tools.additivity lab             # or lab_moe
    python -m tools.additivity smollm2 DATA    # DATA: folder of benchmark files
    python -m tools.additivity qwen DATA       # the model lies in models/qwen-coder-0.5b

Writes figures/additivity/MODEL.json, part by part; a part that is there is not measured again. On the lab models all
pairs, and what CAP zeroes in one unit (a head, a key-value head, an MLP) alone, against all of it together; on
SmolLM2 the pairs within the 12 heads with the highest scores, and within 12 drawn at random, on Qwen within 8 of each.
CAP_NB_NOTE says what else was running.
"""
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.problems import LAB_TASKS
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.importance import importance_factors
from cap_nb.jobs.records import environment, load_run
from cap_nb.methods.additivity import graddrop, growing, interactions, pair_losses, set_losses
from cap_nb.methods.attributions import gate_slopes
from cap_nb.methods.prune import prune
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.scoring import batches_of, causal_scores, target_losses
from tools.studied import NOTE, STYLES, source

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "figures" / "additivity"
PAPER_TASKS = ("gsm8k", "strategyqa", "arc")
TASKS = {"lab": LAB_TASKS, "lab_moe": LAB_TASKS, "smollm2": PAPER_TASKS, "qwen": PAPER_TASKS}
EXAMPLES = {"lab": 16, "lab_moe": 16, "smollm2": 2, "qwen": 2}  # A task
FEW = {"smollm2": 12, "qwen": 8}  # Heads whose pairs are masked, where not all are


def rounded(values: torch.Tensor, digits: int = 4) -> list:
    "Nested lists with as many digits as anybody reads."
    if values.ndim:
        return [rounded(value, digits) for value in values]
    return float(f"{float(values):.{digits}g}")


def mean_and_error(values: torch.Tensor) -> dict:
    "Mean over examples and its standard error."
    return {"mean": rounded(values.mean(-1)), "error": rounded(values.std(-1) / values.shape[-1] ** 0.5, 2)}


def pairs_of(model, calibration: Calibration, heads: list) -> dict:
    "Interactions of all pairs of some heads."
    table, intact = pair_losses(model, calibration, heads)
    singles = (table.diagonal(dim1=0, dim2=1).T - intact)
    return {"heads": heads, "n": len(intact), "calibration": calibration.fingerprint,
            "single": mean_and_error(singles), "interaction": mean_and_error(interactions(table, intact))}


def singles_of(model, calibration: Calibration) -> dict:
    "Rises with every head masked alone: example by example, head after head, and their means and mean sizes."
    scored = score_heads(model, calibration)
    rises = scored.masked - scored.intact[None, None]
    return {"rises": rounded(rises.flatten(0, 1)), "mean": rounded(rises.mean(-1)),
            "size": rounded(rises.abs().mean(-1)), "intact": rounded(scored.intact.mean())}


def grown(model, calibration: Calibration, orders: dict, singles: torch.Tensor) -> dict:
    "Rises of growing sets, measured together and summed, example by example."
    found = {}
    for name, order in orders.items():
        sets = growing(order)
        table, intact = set_losses(model, calibration, sets)
        summed = torch.stack([sum(singles[head] for head in heads) for heads in sets])
        found[name] = {"sizes": [len(heads) for heads in sets], "order": order,
                       "measured": rounded(table - intact), "summed": rounded(summed)}
    return found


def first_order(model, calibration: Calibration) -> dict:
    "Signed means and mean sizes of the first-order estimates, and GradDrop's."
    slopes = torch.cat([-gate_slopes(model, batch) for _, batch in batches_of(calibration, 4096, model.device)])
    return {"signed": rounded(slopes.mean(0)), "size": rounded(slopes.abs().mean(0)),
            "graddrop": rounded(graddrop(model, calibration))}


def units_of(projection, zeroed: torch.Tensor):
    "What is zeroed of a matrix, by unit: its query heads, its key-value heads, or the layer's MLP."
    if not projection.parts:
        yield ("MLP", projection.layer, 0), zeroed
    for part in projection.parts:
        where, only = slice(part.start, part.stop), torch.zeros_like(zeroed)
        rows = (slice(None), where) if projection.role == "output" else (where,)
        only[rows] = zeroed[rows]
        yield ("head" if part.kind == "query" else "key-value head", projection.layer, part.index), only


def zeroed_by_cap(model, factors: torch.Tensor, sparsity: float) -> dict:
    "Unit -> the weights of it that CAP zeroes, module by module."
    pruned, units = copy.deepcopy(model), {}
    prune(pruned, "cap", sparsity, factors)
    for before, after in zip(projections(model), projections(pruned)):
        for unit, zeroed in units_of(before, (after.weight == 0) & (before.weight != 0)):
            units.setdefault(unit, []).append((before, zeroed))
    return units


@torch.no_grad()
def rise_of(model, calibration: Calibration, zeroed: list) -> torch.Tensor:
    "Rise of every example's loss with some weights at zero, which are put back."
    def losses() -> torch.Tensor:
        found = torch.zeros(len(calibration.examples), dtype=torch.float64)
        for indices, batch in batches_of(calibration, 4096, model.device):
            found[indices] = target_losses(model, batch)
        return found
    intact, kept = losses(), [(p, p.weight.clone()) for p, _ in zeroed]
    for p, where in zeroed:
        p.weight[where] = 0.0
    found = losses() - intact
    for p, weight in reversed(kept):
        p.weight.copy_(weight)
    return found


def thinned(model, calibration: Calibration, factors: torch.Tensor, sparsity: float) -> dict:
    "What CAP zeroes in each unit alone, summed, against the same together: query heads, attention, everything."
    units = zeroed_by_cap(model, factors, sparsity)
    alone, found = {unit: rise_of(model, calibration, zeroed) for unit, zeroed in units.items()}, {}
    for name, kinds in {"heads": ("head",), "attention": ("head", "key-value head"), "MLPs": ("MLP",),
                        "all": ("head", "key-value head", "MLP")}.items():
        chosen = [unit for unit in units if unit[0] in kinds]
        together = rise_of(model, calibration, [pair for unit in chosen for pair in units[unit]])
        summed = sum(alone[unit] for unit in chosen)
        found[name] = {"units": len(chosen), "measured": rounded(together), "summed": rounded(summed)}
    return found


def main(name: str, data: str | None) -> None:
    "Measure and write, part by part."
    model, tokenizer = load_model(source(name), "float32", "cpu")
    layers, heads = load_run(ROOT / "figures" / name).losses.masked.shape[:2]
    every, start = [(layer, head) for layer in range(layers) for head in range(heads)], time.monotonic()
    calibration = calibration_set(tokenizer, TASKS[name], EXAMPLES[name], data_dir=data, style=STYLES.get(name))
    about = {"model": {"name": name, "fingerprint": model_fingerprint(model), "dtype": "float32", "device": "cpu"},
             "calibration": {"n": EXAMPLES[name], "seed": 0, "fingerprint": calibration.fingerprint}}
    path = OUT / f"{name}.json"
    content = read_checked(path) if path.exists() else about
    if {key: content[key] for key in about} != about:
        raise SystemExit(f"{path} is about something else: move it away")
    content |= {"task": [e.task for e in calibration.examples], "environment": environment(model.device, NOTE)}

    def kept(part: str, measure: Callable[[], dict]) -> dict:
        if part not in content:
            content[part] = measure()
            write_checked(path, content)
            print(part, round(time.monotonic() - start), flush=True)
        return content[part]

    rises = torch.tensor(kept("single", lambda: singles_of(model, calibration))["rises"], dtype=torch.float64)
    singles, by_score = dict(zip(every, rises)), [every[index] for index in rises.mean(-1).argsort().tolist()]
    shuffled = [every[index] for index in torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    orders = {"lowest scores first": by_score, "random order": shuffled, "highest scores first": by_score[::-1]}
    kept("grown", lambda: grown(model, calibration, orders, singles))
    few = sorted(by_score[-FEW[name]:]) if name in FEW else every
    kept("pairs", lambda: pairs_of(model, calibration, few))
    if name in FEW:
        kept("random_pairs", lambda: pairs_of(model, calibration, sorted(shuffled[:FEW[name]])))
    else:
        factors = importance_factors(causal_scores(load_run(ROOT / "figures" / name).losses))
        kept("thinned", lambda: {f"{s:g}": thinned(model, calibration, factors, s) for s in (0.2, 0.5)})
    kept("first_order", lambda: first_order(model, calibration))


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], *(sys.argv[2:] or [None]))
