"""The threshold

> One number among a hundred million scores: histograms of bit patterns against sorting, selecting and bisecting.

Paper: section 3.3 finds the threshold by a binary search over all scores. In: made-up scores of 100 million weights, in
pieces as a model has them. Out: `figures/benchmarks/threshold.json` with seconds and memory of four ways that lead to
the same zeros.

The records are made, on a machine that does nothing else and has 3 GB of memory to spare, by

    python -m tools.benchmarks.threshold
"""

import hashlib

import torch

from cap_nb.core.errors import BadInput
from cap_nb.core.devices import memory_taken
from cap_nb.methods.selection import find_threshold
from cap_nb.threshold import bisect_threshold, zero_count
from tools.side_by_side import RECORDS, measured_case, measured_rounds, stopwatch

# Scores are magnitudes of normal numbers, times a factor between 1 and 10 for each piece. The histogram reads the
# pieces twice; the other three are given all scores in one vector, whose making is not in their time.

path, cpu = RECORDS / "threshold.json", torch.device("cpu")


def made_scores(pieces, each, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [(torch.randn(each, generator=rng).to(dtype).float().abs() * (1 + 9 * torch.rand(1, generator=rng)))
            for _ in range(pieces)]


def ways(pieces, sparsity):
    whole, count = torch.cat(pieces), zero_count(sum(map(len, pieces)), sparsity)
    return {"histogram": lambda: find_threshold([lambda piece=piece: piece for piece in pieces], count).value,
            "sort": lambda: whole.sort().values[count - 1].item(),
            "select": lambda: whole.kthvalue(count).values.item(), "bisect": lambda: bisect_threshold(whole, sparsity)}


# The first three give the same threshold to the last bit; bisection ends within a ten-thousandth of the sparsity, as
# the paper's procedure does. Both are checked before anything is timed, and memory is what a way takes at most beyond
# what was in use before it.


def check_ways(found, pieces, sparsity):
    values = {name: way() for name, way in found.items()}
    if len({values[name] for name in ("histogram", "sort", "select")}) != 1:
        raise BadInput(f"The ways disagree, {values}: expected one threshold; they are not compared.")
    share = (torch.cat(pieces) <= values["bisect"]).double().mean().item()
    if abs(share - sparsity) > 1e-3:
        raise BadInput(f"Bisection ended at {share:.4f}: expected {sparsity}; it is not compared.")
    return {"threshold": values["histogram"], "bisected": values["bisect"]}


def taken_by(way):
    with memory_taken(cpu) as taken:
        way()
    return taken[0]


def threshold_case(path, name, dtype, pieces=100, each=10**6, sparsity=0.2, repeats=5):
    def measure():
        scores = made_scores(pieces, each, dtype)
        found, digest = ways(scores, sparsity), hashlib.sha256(torch.cat(scores).numpy()).hexdigest()
        about = check_ways(found, scores, sparsity) | {"scores": digest,
                                                       "memory": {name: taken_by(way) for name, way in found.items()}}
        return {"seconds": measured_rounds({name: stopwatch(way) for name, way in found.items()}, repeats),
                "about": about}

    return measured_case(path, name, {"repeats": repeats, "pieces": pieces, "each": each, "sparsity": sparsity},
                         measure)


def main() -> None:
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        print(threshold_case(path, name, dtype)["seconds"])


if __name__ == "__main__":
    main()
