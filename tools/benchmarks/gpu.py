"""A graphics processor

> Scoring a model of Llama-3-8B's shape on one device: heads a minute, the time for all 1,024, and how far that is from
> the floor that the operations set.

Paper: section 3.4 speaks of hours on an A100 for calibration sets of 128 examples a task. In: random bfloat16 weights,
384 examples of real lengths. Out: `figures/benchmarks/gpu.json`. Wanted on one H100: the full scoring in under 45
minutes, at least 1.9 times as fast as the hook loop, at 45 % or more of the matrix-product peak.

The record is made, on a machine with one CUDA device of 40 GB or more, by

    python -m tools.benchmarks.gpu

`CAP_NB_DATA` names the folder of the benchmarks' own files; lengths are counted with SmolLM2's tokenizer where it is
fetched. Without them the lengths are those of the lab's tasks, and the record says so. `CAP_NB_NOTE` says what else was
running.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig

from cap_nb.jobs.costs import PUBLISHED, lengths_of
from cap_nb.models.anatomy import anatomy
from cap_nb.models.loading import load_model, model_cache
from tools.side_by_side import (
    ScoringRounds,
    balanced_heads,
    examples_at_hand,
    examples_of_lengths,
    measured_scoring,
    random_model,
    read_cases,
)

# Both sides get eight heads of each of four layers, the first and the last among them, so that a resumed pass runs as
# many layers as over all heads. Eight heads of a layer can be masked in one pass where memory allows, as in a full
# scoring. In bfloat16 two ways of computing one loss differ by rounding, because their batches have other shapes; 0.05
# nats are allowed.

ROOT = Path(__file__).resolve().parents[2]
path = ROOT / "figures" / "benchmarks" / "gpu.json"
data_dir, note = os.environ.get("CAP_NB_DATA"), os.environ.get("CAP_NB_NOTE", "")
llama = PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"]


@dataclass(frozen=True)
class DeviceCase:
    "What is scored on a device, and how often."

    shape: dict = field(default_factory=lambda: llama)  # Configuration of the model
    dtype: torch.dtype = torch.bfloat16  # Of its weights
    n: int = 128  # Examples a task
    chosen: int = 4  # Layers to take heads from
    each: int = 8  # Heads of each of them
    rounds: ScoringRounds = ScoringRounds((4096, 8192, 16384), tolerance=0.05, times=20)


def device_case(path, device, case=DeviceCase()):
    tokenizer = load_model("smollm2" if (model_cache() / "smollm2").is_dir() else "lab", "float32", "cpu")[1]
    real, said = examples_at_hand(tokenizer, case.n, data_dir)
    model = random_model(AutoConfig.for_model(**case.shape), device, case.dtype)
    examples = examples_of_lengths(lengths_of(real), model.config.vocab_size)
    heads = balanced_heads(anatomy(model).layers, anatomy(model).heads, case.chosen, case.each)
    return measured_scoring(
        path,
        "llama-3-8b",
        model,
        examples,
        heads,
        case.rounds,
        data=f"random tokens, as long as {said}",
        weights="random, seed 0",
        note=note,
    )


def main() -> None:
    if "llama-3-8b" in read_cases(path):
        print("measured already")
    elif torch.cuda.is_available():
        print(device_case(path, torch.device("cuda"))["seconds"])
    else:
        print("There is no CUDA device here, and nothing was measured.")


if __name__ == "__main__":
    main()
