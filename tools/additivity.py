"""Do heads add up? Pairs and growing sets of heads masked together, and what first order says of single ones.

    python tools/additivity.py lab
    python tools/additivity.py smollm2 DATA    # DATA: folder of benchmark files

Writes figures/additivity/MODEL.json, part by part; a part that is there is not measured again. On the lab model all
pairs; on SmolLM2 the pairs within the 12 heads with the highest scores, and within 12 drawn at random.
"""
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.problems import LAB_TASKS
from cap_nb.engine.resumed_scoring import score_heads
from cap_nb.jobs.records import environment, load_run
from cap_nb.methods.additivity import graddrop, growing, interactions, pair_losses, set_losses
from cap_nb.methods.attributions import gate_slopes
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.scoring import batches_of

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "figures" / "additivity"
TASKS = {"lab": LAB_TASKS, "smollm2": ("gsm8k", "strategyqa", "arc")}
EXAMPLES = {"lab": 16, "smollm2": 2}  # A task
FEW = 12  # Heads whose pairs are masked on SmolLM2
NOTE = "other processes were running on both of the machine's cores"


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


def main(name: str, data: str | None) -> None:
    "Measure and write, part by part."
    model, tokenizer = load_model(name, "float32", "cpu")
    layers, heads = load_run(ROOT / "figures" / name).losses.masked.shape[:2]
    every, start = [(layer, head) for layer in range(layers) for head in range(heads)], time.monotonic()
    calibration = calibration_set(tokenizer, TASKS[name], EXAMPLES[name], data_dir=data)
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
    few = every if len(every) <= 40 else sorted(by_score[-FEW:])
    kept("pairs", lambda: pairs_of(model, calibration, few))
    if len(every) > 40:
        kept("random_pairs", lambda: pairs_of(model, calibration, sorted(shuffled[:FEW])))
    kept("first_order", lambda: first_order(model, calibration))


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], *(sys.argv[2:] or [None]))
