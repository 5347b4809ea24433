"""How well a fraction of the masked passes gives the scores of all heads, on models whose whole tables are known.

    python -m tools.screening WORK [DATA]

First the first-order estimates of all heads on the examples of four committed runs (DATA: the folder of benchmark files,
for SmolLM2 and Qwen), kept in WORK; then, from the tables alone, errors against cost and the coverage of intervals. The
end is figures/screening/errors.json and figures/screening/coverage.json, and draws.json for the claims ledger.
"""
import sys
from pathlib import Path

import torch

from cap_nb.calibration import calibration_set
from cap_nb.core.files import read_checked, read_tensors, write_checked, write_tensors
from cap_nb.data.batches import collate, token_batches
from cap_nb.importance import importance_factors
from cap_nb.jobs.records import environment, load_run
from cap_nb.methods.screening import (
    FACTOR_GOAL, ROUNDS, bernstein_half, betting_bounds, by_task, each_cell, estimated, first_counts, guessed_bounds,
    hoeffding_half, in_rounds, losses_and_slopes, places, prefixes, share_spent, task_indices)
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.scoring import rank_correlation
from tools.studied import FOLDERS

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "figures" / "screening"
RUNS = ("lab", "lab_moe", "smollm2", "qwen")
GROWN = {"smollm2": 8, "qwen": 16}  # How often a small table is repeated, for 384 examples
BUDGETS, DRAWS, REPEATED_DRAWS, COVERAGE_DRAWS, COVERAGE_BUDGET = (0.05, 0.1, 0.25, 0.5), 20, 10, 200, 0.25


def slopes_of(name: str, work: Path, data: str | None) -> torch.Tensor:
    "First-order estimates for the examples of a committed run, [L, H, N]; model and examples are checked to be the run's."
    path, run = work / f"slopes-{name}.safetensors", load_run(ROOT / "figures" / name)
    if not path.exists():
        asked, losses = run.configuration, run.losses
        model, tokenizer = load_model(FOLDERS.get(name, asked["model"]["name"]), asked["model"]["dtype"], "cpu")
        settings = {key: asked["calibration"][key] for key in ("tasks", "n", "k", "seed")}
        if not name.startswith("lab"):
            settings |= {"data_dir": data, "style": asked["style"]["called"]}
        examples = calibration_set(tokenizer, **settings)
        found = {"model": model_fingerprint(model), "calibration": examples.fingerprint}
        assert found == {key: losses.meta[key] for key in found}, f"{name}: another model or calibration set"
        slopes = torch.zeros_like(losses.masked)
        for batch in token_batches(examples.examples, 4096 if name.startswith("lab") else 1024):
            part = losses_and_slopes(model, collate([examples.examples[i] for i in batch], pad_id=0))
            slopes[..., batch] = part["slopes"]
        write_tensors(path, {"slopes": slopes}, found)
        print(path, flush=True)
    return read_tensors(path)[0]["slopes"]


def table(name: str, work: Path, data: str | None, times: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Rises and slopes [L, H, N] and task indices [N] of a run, perhaps with every example repeated."
    losses = load_run(ROOT / "figures" / name).losses
    rise, slopes = losses.masked - losses.intact, slopes_of(name, work, data)
    return rise.repeat(1, 1, times), slopes.repeat(1, 1, times), task_indices(losses.task).repeat(times)


def heavy(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    "Made-up tables of 384 examples in three tasks: lognormal residuals, or one example in a hundred that holds it all."
    rng, task = torch.Generator().manual_seed(0), torch.arange(384) % 3
    size = 10 ** (3 * torch.rand(6, 6, 1, generator=rng).double() - 3)
    noise = torch.randn(6, 6, 384, generator=rng).double()
    rare = (torch.rand(6, 6, 384, generator=rng) < 0.01).double()
    rise = size * (1.5 * noise).exp() if kind == "lognormal" else size * (0.1 * noise + 30 * rare)
    return rise, 0.5 * rise, task


def uniform(rise, slopes, task, share: float, seed: int):
    "All heads on the same random examples of each task, one at least."
    sizes = by_task(task).sum(0)
    counts = (share * sizes).round().clamp_min(1).expand(*rise.shape[:2], -1)
    return torch.where(prefixes(counts, task, places(task, seed)), rise, torch.nan)


def undecided(found) -> torch.Tensor:
    "Heads whose interval of two standard errors meets another's, or whose factor may be off by more than 5 %, [L, H]."
    scores, half = found.scores.flatten(), 2 * found.variance.sqrt().flatten()
    meets = (scores[:, None] - scores).abs() <= half[:, None] + half
    factors = 1 + 9 * (scores - scores.min()) / (scores.max() - scores.min())
    off = 9 * half / (scores.max() - scores.min()) / factors
    return ((meets.sum(1) > 1) | (off > FACTOR_GOAL)).view(found.scores.shape)


def eliminated(rise, slopes, task, budget: float, seed: int):
    "Successive elimination: after the common first round, the undecided heads get equally many more examples."
    sizes, place, (layers, heads, n) = by_task(task).sum(0), places(task, seed), slopes.shape
    cost = torch.arange(layers, 0, -1).double()[:, None].expand(layers, heads)
    counts = first_counts(sizes, budget).expand(layers, heads, -1)
    for left in range(ROUNDS, 0, -1):
        part = torch.where(prefixes(counts, task, place), rise, torch.nan)
        active = undecided(estimated(part, slopes, task)) & (counts < sizes).any(-1)
        spend = (budget * n * cost.sum() - (counts.sum(-1) * cost).sum()) / left
        more = spend / (active * cost).sum().clamp_min(1) * sizes / n
        counts = torch.minimum(sizes, counts + (active[..., None] * more).floor())
    return torch.where(prefixes(counts, task, place), rise, torch.nan)


def ways(rise, slopes, task, budget: float, seed: int) -> dict:
    "Name -> what makes the table with gaps, and the slopes that its estimate uses."
    none = torch.zeros_like(slopes)
    def at_random():
        return uniform(rise, slopes, task, budget, seed)
    rows = {"examples at random": (at_random, none), "with slopes": (at_random, slopes)}
    try:
        first_counts(by_task(task).sum(0), budget)
    except ValueError:
        return rows
    return rows | {"with slopes, elimination": (lambda: eliminated(rise, slopes, task, budget, seed), slopes),
                   "with slopes, adaptive": (lambda: in_rounds(lambda _: rise, slopes, task, budget, seed), slopes),
                   "adaptive without slopes": (lambda: in_rounds(lambda _: rise, none, task, budget, seed), none)}


def errors(scores: torch.Tensor, true: torch.Tensor) -> dict:
    "How wrong scores are: ranks, and the largest and median relative error of the factors."
    off = (importance_factors(scores) / importance_factors(true) - 1).abs()
    return {"spearman": rank_correlation(scores, true), "largest": off.max().item(), "median": off.median().item()}


def curve(rise, slopes, task, draws_wanted: int = DRAWS, only: tuple[str, ...] | None = None) -> dict:
    "Errors of every way, or of some, at every budget, means over draws."
    true, rows = rise.mean(-1), {"slopes alone": [{"spent": 0.0} | errors(slopes.mean(-1), rise.mean(-1))]}
    for budget in BUDGETS:
        draws = {}
        for seed in range(draws_wanted):
            chosen = ways(rise, slopes, task, budget, seed)
            for name, (make, used) in ((name, chosen[name]) for name in only or chosen if name in chosen):
                part = make()
                found = {"spent": share_spent(~part.isnan())} | errors(estimated(part, used, task).scores, true)
                draws.setdefault(name, []).append(found)
        for name, all_of in draws.items():
            middle = {key: sum(one[key] for one in all_of) / len(all_of) for key in all_of[0]}
            tail = sorted(one["largest"] for one in all_of)[round(0.9 * (len(all_of) - 1))]
            rows.setdefault(name, []).append({"budget": budget, "largest, 9 of 10": tail} | middle)
    return rows


def student_quantile(tail: float, freedom: torch.Tensor) -> torch.Tensor:
    "Student's quantile, expanded about the normal one in 1/freedom (Abramowitz and Stegun 26.7.5); 3 degrees or more."
    z = -torch.special.ndtri(torch.tensor(tail, dtype=torch.float64))
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def known_range(rise, part, slopes, task, place, tail: float) -> dict:
    "Bounds of the mean residual of every head and task, told the range of its residuals; the error is shared by the tasks."
    residual, there = each_cell(rise - slopes, task, place).flatten(0, 2), each_cell(torch.ones_like(rise), task, place)
    there = there.flatten(0, 2) > 0
    n, size = each_cell((~part.isnan()).double(), task, place).flatten(0, 2).sum(1), there.sum(1).double()
    least = residual.where(there, torch.inf).amin(1)
    width = residual.where(there, -torch.inf).amax(1) - least
    tail, looks, drawn = tail / (int(task.max()) + 1), ROUNDS + 1, torch.arange(residual.shape[1]) < n[:, None]
    mean = (residual * drawn).sum(1) / n
    spread = (((residual - mean[:, None]) * drawn) ** 2).sum(1) / n
    halves = {"Hoeffding, range known": hoeffding_half(n, size, width, tail / looks),
              "Bernstein, range known": bernstein_half(n, size, width, tail / looks, spread)}
    bets = {"betting, range known": betting_bounds(residual, n, size, least, width, tail)}
    return bets | {k: (mean - h, mean + h) for k, h in halves.items()}


def intervals(rise, part, slopes, task, place, confidence: float = 0.95) -> dict:
    "Name -> lower and upper bound of every score, [L, H] each."
    found, tail = estimated(part, slopes, task), (1 - confidence) / 2
    share, freedom = found.sizes / found.sizes.sum(), (found.counts - 1).sum(-1).clamp_min(3)
    known = (slopes @ by_task(task) / found.sizes * share).sum(-1)
    halves = {"Student": student_quantile(tail, freedom) * found.variance.sqrt(),
              "Student, corrected for looks": student_quantile(tail / (ROUNDS + 1), freedom) * found.variance.sqrt()}
    bounds = known_range(rise, part, slopes, task, place, tail)
    summed = {k: tuple(known + (b.view(found.counts.shape) * share).sum(-1) for b in v) for k, v in bounds.items()}
    guessed = {"betting": guessed_bounds(part, slopes, task, place, tail)}
    return {k: (found.scores - h, found.scores + h) for k, h in halves.items()} | guessed | summed


def coverage(rise, slopes, task) -> dict:
    "For every interval: the share of heads and draws that it covers, the worst head's, and its width over the span."
    true, rows = rise.mean(-1), {}
    for seed in range(COVERAGE_DRAWS):
        part = in_rounds(lambda _: rise, slopes, task, COVERAGE_BUDGET, seed)
        for name, (low, high) in intervals(rise, part, slopes, task, places(task, seed)).items():
            slack = 1e-9 * (true.max() - true.min())
            inside = ((low - slack <= true) & (true <= high + slack)).double()
            hits, widths = rows.setdefault(name, ([], []))
            hits.append(inside)
            widths.append((high - low) / (true.max() - true.min()))
    return {name: {"covered": torch.stack(hits).mean().item(), "worst head": torch.stack(hits).mean(0).min().item(),
                   "all heads": torch.stack(hits).flatten(1).amin(1).mean().item(),
                   "width": torch.stack(widths).mean().item()} for name, (hits, widths) in rows.items()}


def kept(work: Path, name: str, measure) -> dict:
    "What a file holds, measured if it is not there."
    path = work / f"{name}.json"
    if not path.exists():
        write_checked(path, measure())
        print(name, flush=True)
    return read_checked(path)


def write_draws(work: Path, names: tuple[str, ...], data: str | None) -> None:
    "The rank correlation of every draw at a quarter of the passes, model by model; models that are there are kept."
    path = OUT / "draws.json"
    rows = read_checked(path)["rows"] if path.exists() else {}
    for name in names:
        rise, slopes, task = table(name, work, data)
        found = [in_rounds(lambda _: rise, slopes, task, COVERAGE_BUDGET, seed) for seed in range(DRAWS)]
        values = [rank_correlation(estimated(part, slopes, task).scores, rise.mean(-1)) for part in found]
        rows[name] = [float(f"{value:.5g}") for value in values]
    about = {n: {"shape": list(load_run(ROOT / "figures" / n).losses.masked.shape)}
             | load_run(ROOT / "figures" / n).losses.meta for n in rows}
    write_checked(path, {"budget": COVERAGE_BUDGET, "draws": DRAWS, "rows": rows, "tables": about,
                         "environment": environment(torch.device("cpu"))})


def write_elimination(work: Path, names: tuple[str, ...], data: str | None) -> None:
    "Adds successive elimination to tables of errors.json that were measured without it."
    content = read_checked(OUT / "errors.json")
    for name in names:
        content["rows"][name] |= curve(*table(name, work, data), only=("with slopes, elimination",))
    write_checked(OUT / "errors.json", content)


def main(work: Path, data: str | None) -> None:
    "Measure what is not there yet, and write it all."
    work.mkdir(parents=True, exist_ok=True)
    tables = {name: table(name, work, data) for name in RUNS}
    tables |= {f"{name} x {times}": table(name, work, data, times) for name, times in GROWN.items()}
    made_up = {f"{kind}, made up": heavy(kind) for kind in ("lognormal", "rare")}
    about = {"environment": environment(torch.device("cpu")), "note": "other work ran on the same machine; no times here",
             "tables": {n: {"shape": list(t[0].shape)} | load_run(ROOT / "figures" / n).losses.meta
                        for n, t in tables.items() if n in RUNS}}
    rows = {name: kept(work, f"errors {name}", lambda: curve(*parts, DRAWS if name in RUNS else REPEATED_DRAWS))
            for name, parts in tables.items()}
    draws = {"draws": DRAWS, "draws of repeated tables": REPEATED_DRAWS}
    write_checked(OUT / "errors.json", about | draws | {"rows": rows})
    chosen = {name: tables[name] for name in ("lab", "lab_moe", "smollm2")} | made_up
    rows = {name: kept(work, f"coverage {name}", lambda: coverage(*parts)) for name, parts in chosen.items()}
    settings = {"draws": COVERAGE_DRAWS, "budget": COVERAGE_BUDGET, "confidence": 0.95}
    write_checked(OUT / "coverage.json", about | settings | {"rows": rows})
    write_draws(work, RUNS, data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
