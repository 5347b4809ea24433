"""What the joint solver leaves of SparseGPT's error in every projection of SmolLM2 at 50 %, for methods/06.

    python tools/joint_errors.py DATA    # folder of benchmark files; about ten minutes of one core

Both get the same weights and the same Hessian, of the dense model's inputs. Out: figures/solvers/joint_errors.json.
CAP_NB_NOTE says what else was running.
"""
import os
import sys
from pathlib import Path

import torch

from cap_nb.calibration import calibration_set
from cap_nb.core.files import write_checked
from cap_nb.data.problems import BENCHMARK_NAMES
from cap_nb.engine.layer_walk import layer_by_layer
from cap_nb.jobs.records import environment
from cap_nb.methods.joint import joint_update
from cap_nb.methods.sparsegpt import input_hessians, sparsegpt_update
from cap_nb.methods.sparsegpt import layer_output_error
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import load_model, model_fingerprint

OUT = Path(__file__).resolve().parent.parent / "figures" / "solvers" / "joint_errors.json"
N, SEED, SPARSITY = 12, 0, 0.5


@torch.no_grad()
def shares_of_sparsegpt(model: torch.nn.Module, calibration: object) -> dict[str, float]:
    "The joint solver's error over SparseGPT's, by projection."
    weights, found = {p.name: p.weight.detach() for p in projections(model)}, {}
    for step in layer_by_layer(model, calibration):
        for name, hessian in input_hessians(step).items():
            ours, theirs = (solve(weights[name], hessian, SPARSITY)[0] for solve in (joint_update, sparsegpt_update))
            errors = [layer_output_error(weights[name], new, hessian) for new in (ours, theirs)]
            found[name] = float(f"{errors[0] / errors[1]:.4g}")
            print(name, found[name], flush=True)
    return found


def main(data: str) -> None:
    "Measure, and write the record."
    model, tokenizer = load_model("smollm2", "float32", "cpu")
    calibration = calibration_set(tokenizer, BENCHMARK_NAMES, N, 3, SEED, data)
    about = {"name": "SmolLM2-135M-Instruct", "fingerprint": model_fingerprint(model), "dtype": "float32"}
    data = {"n": N, "seed": SEED, "fingerprint": calibration.fingerprint,
            "tokens": sum(len(e.input_ids) for e in calibration.examples)}
    shares = shares_of_sparsegpt(model, calibration)
    content = {"model": about, "calibration": data, "sparsity": SPARSITY, "shares": shares}
    write_checked(OUT, content | {"environment": environment(model.device, os.environ.get("CAP_NB_NOTE", ""))})


if __name__ == "__main__":
    main(sys.argv[1])
