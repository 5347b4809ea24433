"""Layer errors of SmolLM2's projections at 50 %: the joint solver's for methods/06, of masks and updates for 04 and 05.

    python tools/joint_errors.py DATA          # DATA: folder of benchmark files; about ten minutes of one core
    python tools/joint_errors.py DATA masks    # the same; after a stop it goes on from the last layer

All get the same weights and the same Hessian, of the dense model's inputs. Out: figures/solvers/joint_errors.json, what
the joint solver leaves of SparseGPT's error, or mask_errors.json, errors as shares of the squared outputs: of Wanda's
mask, of the same after swaps, of SparseGPT, and of the update on the masks of both. CAP_NB_NOTE says what else ran.
"""
import os
import sys
from pathlib import Path

import torch

from cap_nb.calibration import Calibration, calibration_set
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.problems import BENCHMARK_NAMES
from cap_nb.methods.layer_walk import layer_by_layer
from cap_nb.jobs.records import environment
from cap_nb.methods.joint import joint_update
from cap_nb.methods.prune import recovered_weight
from cap_nb.methods.sparsegpt import MadeOnce, input_hessians, layer_output_error, sparsegpt_update
from cap_nb.methods.swaps import row_errors
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.methods.selection import smallest_in_rows

ROOT = Path(__file__).resolve().parent.parent
OUT, UNFINISHED = ROOT / "figures" / "solvers", ROOT / "runs" / "mask_errors.json"
N, SEED, SPARSITY = 12, 0, 0.5


def rounded(value: float) -> float:
    "Four significant digits."
    return float(f"{value:.4g}")


@torch.no_grad()
def shares_of_sparsegpt(model: torch.nn.Module, calibration: Calibration) -> dict[str, float]:
    "The joint solver's error over SparseGPT's, by projection."
    weights, found = {p.name: p.weight.detach() for p in projections(model)}, {}
    for step in layer_by_layer(model, calibration):
        for name, hessian in input_hessians(step).items():
            ours, theirs = (solve(weights[name], hessian, SPARSITY)[0] for solve in (joint_update, sparsegpt_update))
            errors = [layer_output_error(weights[name], new, hessian) for new in (ours, theirs)]
            found[name] = rounded(errors[0] / errors[1])
            print(name, found[name], flush=True)
    return found


def errors_of(weight: torch.Tensor, hessian: torch.Tensor, once: MadeOnce) -> dict[str, float]:
    "Errors of a projection, as shares of its squared outputs; and what swaps leave of Wanda's in the median row."
    mask = smallest_in_rows(weight.abs() * hessian.diagonal().sqrt(), SPARSITY)
    sparsegpt, theirs = sparsegpt_update(weight, hessian, SPARSITY, once=once)
    new = {"wanda": weight.masked_fill(mask, 0.0), "swaps": recovered_weight(weight, mask, hessian, ("swaps",), None),
           "sparsegpt": sparsegpt, "sparsegpt^update": recovered_weight(weight, theirs, hessian, ("update",), None),
           "wanda^update": recovered_weight(weight, mask, hessian, ("update",), None)}
    whole = layer_output_error(weight, torch.zeros_like(weight), hessian)
    rows = [row_errors(weight, new[name] == 0, hessian) for name in ("swaps", "wanda")]
    return {name: rounded(layer_output_error(weight, pruned, hessian) / whole) for name, pruned in new.items()} | {
        "row of wanda": rounded(float((rows[0] / rows[1])[rows[1] > 0].median()))}


@torch.no_grad()
def mask_errors(model: torch.nn.Module, calibration: Calibration, about: dict, kept: Path) -> dict[str, dict]:
    "Errors of every projection; a file of finished layers is read if it is of the same run, and grows layer by layer."
    known = read_checked(kept) if kept.exists() else {}
    found = dict(known["errors"]) if known.get("about") == about else {}
    for step in layer_by_layer(model, calibration):
        if all(p.name in found for p in step.projections):
            continue
        hessians, once = input_hessians(step), MadeOnce()
        for p in step.projections:
            found[p.name] = errors_of(p.weight.detach(), hessians[p.name], once)
            print(p.name, found[p.name], flush=True)
        write_checked(kept, {"about": about, "errors": found})
    return found


def main(data: str, what: str = "joint") -> None:
    "Measure, and write the record."
    model, tokenizer = load_model("smollm2", "float32", "cpu")
    calibration = calibration_set(tokenizer, BENCHMARK_NAMES, N, 3, SEED, data)
    about = {"name": "SmolLM2-135M-Instruct", "fingerprint": model_fingerprint(model), "dtype": "float32"}
    tokens = sum(len(e.input_ids) for e in calibration.examples)
    known = {"n": N, "seed": SEED, "fingerprint": calibration.fingerprint, "tokens": tokens}
    content = {"model": about, "calibration": known, "sparsity": SPARSITY}
    where = environment(model.device, os.environ.get("CAP_NB_NOTE", ""))
    if what == "joint":
        write_checked(OUT / "joint_errors.json",
                      content | {"shares": shares_of_sparsegpt(model, calibration), "environment": where})
        return
    UNFINISHED.parent.mkdir(exist_ok=True)
    content |= {"environment": where}
    errors = mask_errors(model, calibration, content, UNFINISHED)
    write_checked(OUT / "mask_errors.json", content | {"errors": errors})
    UNFINISHED.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
