"""Do heads add up? Pairs and growing sets of heads masked together, and what first order says of single ones.

    python tools/additivity.py lab
    python tools/additivity.py smollm2 DATA    # DATA: folder of benchmark files

Writes figures/additivity/MODEL.json, part by part. On the lab model all pairs; on SmolLM2 the pairs within the 12 heads
with the highest scores, and within 12 drawn at random.
"""
import sys
import time
from pathlib import Path

import torch

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import write_checked
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
EXAMPLES = {"lab": 32, "smollm2": 4}  # A task, for single heads and growing sets
PAIR_EXAMPLES = {"lab": 32, "smollm2": 4}  # A task, for pairs
FEW = 12  # Heads whose pairs are masked on SmolLM2
NOTE = "other processes were running on the machine's other core"


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
    def drawn(n: int) -> Calibration:
        return calibration_set(tokenizer, TASKS[name], n, data_dir=data)
    calibration = drawn(EXAMPLES[name])
    content = {"model": {"name": name, "fingerprint": model_fingerprint(model), "dtype": "float32", "device": "cpu"},
               "calibration": {"n": EXAMPLES[name], "seed": 0, "fingerprint": calibration.fingerprint},
               "task": [e.task for e in calibration.examples], "environment": environment(model.device, NOTE)}

    def keep(part: str, value: object) -> None:
        content[part] = value
        content["seconds"] = content.get("seconds", {}) | {part: round(time.monotonic() - start)}
        write_checked(OUT / f"{name}.json", content)
        print(part, content["seconds"][part], flush=True)

    scored = score_heads(model, calibration)
    rises = (scored.masked - scored.intact).flatten(0, 1)
    singles, rise = dict(zip(every, rises)), rises.mean(-1)
    keep("single", {"mean": rounded(rise.view(layers, heads)), "intact": rounded(scored.intact.mean()),
                    "size": rounded(rises.abs().mean(-1).view(layers, heads))})
    by_score = [every[index] for index in rise.argsort().tolist()]
    shuffled = [every[index] for index in torch.randperm(len(every), generator=torch.Generator().manual_seed(0))]
    keep("grown", grown(model, calibration, {"lowest scores first": by_score, "random order": shuffled,
                                             "highest scores first": by_score[::-1]}, singles))
    few = drawn(PAIR_EXAMPLES[name])
    if len(every) <= 40:
        keep("pairs", pairs_of(model, few, every))
    else:
        keep("pairs", pairs_of(model, few, sorted(by_score[-FEW:])))
        keep("random_pairs", pairs_of(model, few, sorted(shuffled[:FEW])))
    keep("first_order", first_order(model, calibration))


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    main(sys.argv[1], *(sys.argv[2:] or [None]))
