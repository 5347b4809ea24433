"""What a neuron is worth, in the problem that a solver solves: held-out losses with errors weighed and not weighed.

    python -m tools.weighing WORK [SECONDS]

On the lab model, three calibration seeds. Every pruned model is a file in WORK and is not measured twice; none is begun
after SECONDS. What is there by then is written to figures/neurons/weighed.json. Factors are those of `.neurons`, from 1
to 10, and nothing is chosen here.
"""
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cap_nb.analysis import correct_family
from cap_nb.calibration import calibration_set
from cap_nb.core.files import write_checked
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.experiments.seeds import split_variance
from cap_nb.jobs.records import environment
from cap_nb.methods.neurons import unit_aware_factors
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.methods.experts import UnitFactors
from cap_nb.regions import Factors
from tools.calibration_sets import Pieces, Study, about, cell, row
from tools.studied import NOTE

OUT = Path(__file__).resolve().parent.parent / "figures" / "neurons" / "weighed.json"
STUDY = Study(dtype="float32", tasks=("lab-gsm8k", "lab-strategyqa", "lab-arc"), text="lab-text", n=16, judged=60,
              answered=0, chains=None, methods=("alps", "sparsegpt", "cap_wanda"), sparsities=(0.5, 0.2))
SCOPES = {"cap_wanda": "@row"}  # As Wanda has it; the solvers have their own


def factors_of(model, calibration, seed: int, pieces: Pieces) -> Factors | None:
    "Factors of heads and neurons, measured once a seed."
    def measure() -> dict:
        found = unit_aware_factors(model, "neurons", calibration, score_heads(model, calibration))
        return {"heads": found.heads.tolist(), "neurons": found.neurons.tolist()}
    found = pieces.get(f"factors {seed}", measure)
    return found and UnitFactors(torch.tensor(found["heads"]), neurons=torch.tensor(found["neurons"]))


def differences(content: dict) -> list:
    "Weighed less not weighed, over seeds and problems: [method, sparsity, on, means, value, low, high, p, decided]."
    cells = {(method, sparsity, seed): losses for method, sparsity, _, seed, losses, _ in content["cells"]}
    found, means = {}, {}
    for method, sparsity in dict.fromkeys(key[:2] for key in cells if "." in key[0]):
        both = [(name, sparsity) for name in (method.replace(".neurons", ""), method)]
        whole = [seed for seed in range(STUDY.seeds) if all((*key, seed) in cells for key in both)]
        for on in cells[method, sparsity, whole[0]] if len(whole) > 1 else ():
            plain, weighed = (np.array([cells[(*key, seed)][on] for seed in whole]) for key in both)
            key = (method, sparsity, on)
            found[key], means[key] = split_variance(weighed - plain).comparison("nats"), (plain.mean(), weighed.mean())
    told = correct_family(found, "figures/neurons/weighed")
    return [[*key, *(float(f"{number:.4g}") for number in (*means[key], c.value, c.low, c.high, c.holm)), c.decided]
            for key, c in told.items()]


def main(work: Path, seconds: float = 1e9) -> None:
    "Measure cell after cell, and write what is there."
    pieces, found, sets = Pieces(work, time.time() + float(seconds)), [], {}
    work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("lab", STUDY.dtype, "cpu")
    for seed in range(STUDY.seeds):
        calibration = calibration_set(tokenizer, STUDY.tasks, STUDY.n, 3, seed)
        sets[seed], factors = about(calibration), factors_of(model, calibration, seed, pieces)
        for sparsity in STUDY.sparsities if factors else ():
            for method in [f"{base}{way}{SCOPES.get(base, '')}" for base in STUDY.methods for way in ("", ".neurons")]:
                given = Factors(factors.heads) if method == "cap_wanda@row" else factors if "." in method else None
                measured = pieces.get(f"{method} {sparsity:g} {seed}",
                                      lambda: cell("lab", STUDY, (method, sparsity, calibration), given, None))
                found += [((method, sparsity, "gold", seed), measured)] if measured else []
    content = {"model": {"name": "lab", "fingerprint": model_fingerprint(model), "dtype": STUDY.dtype, "device": "cpu"},
               "n": STUDY.n, "judged": STUDY.judged, "windows": STUDY.windows, "sets": sets, "problems": {}}
    content["cells"] = [row(content, *each) for each in found]
    content["differences"] = differences(content)
    write_checked(OUT, content | {"environment": environment(model.device, NOTE)})


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
