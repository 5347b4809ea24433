"""Time several ways of one computation in turn, and keep what was measured with the machine that measured it."""

import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import cap_nb
from cap_nb.calibration import Calibration, calibration_set, default_style
from cap_nb.core.errors import BadInput, check_at_least
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.problems import BENCHMARK_NAMES
from cap_nb.data.prompts import IGNORED, Example
from cap_nb.methods.resumed_scoring import after_prefix, score_heads, shared_prefix
from cap_nb.jobs.costs import BatchShape, ExampleLength, Sizes, Work, batch_shapes, flops_of, lengths_of, sizes_of
from cap_nb.jobs.records import environment
from cap_nb.methods.streaming import open_checkpoint, prune_checkpoint
from cap_nb.models.anatomy import dimensions, projections
from cap_nb.models.loading import model_fingerprint
from cap_nb.scoring import score_heads_naive


def finish(
    device: torch.device,  # A device
) -> None:
    "Wait until a device has done what it was given."
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


def stopwatch(
    call: Callable[[], object],  # What is timed
    device: torch.device = torch.device("cpu"),  # Where it computes
    clock: Callable[[], float] = time.perf_counter,  # Gives the time in seconds
) -> Callable[[], float]:  # The same call; it gives its seconds
    "Put a stopwatch on a call."

    def timed() -> float:
        finish(device)
        start = clock()
        call()
        finish(device)
        return clock() - start

    return timed


def measured_rounds(
    measures: Mapping[str, Callable[[], float]],  # Name -> what gives its seconds
    repeats: int = 5,  # Rounds that are kept
    warmups: int = 1,  # Rounds before them that are not
) -> dict[str, tuple[float, ...]]:  # Name -> seconds of every round
    "Run all measures round after round, each once a round, every second round backwards."
    check_at_least(repeats, 1, "repeats")
    kept: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(-warmups, repeats):
        for name in list(measures)[:: 1 if number % 2 == 0 else -1]:
            seconds = measures[name]()
            if number >= 0:
                kept[name].append(seconds)
    return {name: tuple(seconds) for name, seconds in kept.items()}


def round_ratios(
    seconds: Mapping[str, Sequence[float]],  # Name -> seconds of every round
    slow: str,  # The side above the line
    fast: str,  # The side below it
) -> tuple[float, ...]:  # Ratio of every round
    "How many times as long one side took as another, round by round."
    return tuple(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def range_text(
    values: Sequence[float],  # A value of every round
    digits: int = 2,  # Digits after the point
) -> str:  # As in "2.61 (2.55 to 2.70)"
    "Median, lowest and highest of some rounds."
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def wanted_text(
    values: Sequence[float],  # A value of every round
    wanted: float,  # What the median should be at least
    more: bool = True,  # False: at most
) -> str:  # As in ", wanted 2.5 or more: reached"
    "What was wanted of some rounds, and whether their median is that."
    reached = statistics.median(values) >= wanted if more else statistics.median(values) <= wanted
    return f", wanted {wanted:g} or {'more' if more else 'less'}: {'reached' if reached else 'MISSED'}"


def matrix_product(
    size: int,  # Rows and columns of the two square matrices
    device: torch.device,  # Where it is computed
    dtype: torch.dtype,  # Of the matrices
    times: int = 1,  # Products in one call
) -> tuple[Callable[[], None], int]:  # The call, and its floating-point operations
    "A call that multiplies two square matrices of random numbers."
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return product, 2 * size**3 * times


def fastest_product(
    device: torch.device,  # Where it is computed
    dtype: torch.dtype,  # Of the matrices
    sizes: Sequence[int],  # Sizes to try
    repeats: int = 3,  # Calls of each, after one that does not count
    clock: Callable[[], float] = time.perf_counter,  # Gives the time in seconds
) -> int:  # The size with most operations a second
    "The size of the square product that a device does fastest."
    rates = {}
    for size in sizes:
        product, flops = matrix_product(size, device, dtype)
        rates[size] = flops / min(measured_rounds({"product": stopwatch(product, device, clock)}, repeats)["product"])
    return max(rates, key=rates.get)


def peak_shares(
    seconds: Sequence[float],  # Of a computation, for every round
    flops: int,  # Its floating-point operations
    product_seconds: Sequence[float],  # Of the matrix product, in the same rounds
    product_flops: int,  # Its floating-point operations
) -> tuple[float, ...]:  # Share of every round
    "Which share of the matrix-product peak a computation reached."
    return tuple(
        (flops / taken) / (product_flops / product) for taken, product in zip(seconds, product_seconds, strict=True)
    )


IN_PROCESS = """
import importlib, json, sys, time
from cap_nb.core.files import PEAK, resident
path, given = json.loads(sys.argv[1])
function = getattr(importlib.import_module(path.split(":")[0]), path.split(":")[1])
start = time.perf_counter()
function(**given)
seconds = time.perf_counter() - start
print("\\n" + json.dumps([seconds, resident("VmHWM") if PEAK.exists() else None]))
"""


def in_own_process(
    function: str,  # As in "shutil:copytree"
    **given: object,  # Its arguments by name; what JSON can hold
) -> tuple[float, int | None]:  # Seconds, and bytes of main memory at most; None where the system does not report it
    "Call a function in a process of its own; one that fails there raises `BadInput`."
    above = Path(cap_nb.__file__).parent.parent
    paths = os.pathsep.join(filter(None, [str(above), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-c", IN_PROCESS, json.dumps([function, given])],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise BadInput(
            f"{function} failed in its own process, {done.stderr.strip().splitlines()[-1]}: expected it to end well; "
            "repair what it says."
        )
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def copied_to_disk(
    src: str | Path,  # A folder of files
    dst: str | Path,  # The copy; must not exist
) -> None:
    "Copy a folder, and wait until the disk has it."
    shutil.copytree(src, dst)
    for file in Path(dst).iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def pruned_by_made_factors(
    src: str | Path,  # A checkpoint folder
    dst: str | Path,  # New folder
    sparsity: float,  # Share of the weights in scope to zero, in [0, 1)
    seed: int = 0,  # Seed of the factors
) -> None:
    "Prune a checkpoint by CAP with random factors between 1 and 10."
    sizes = dimensions(open_checkpoint(src).model.config)
    factors = 1 + 9 * torch.rand(sizes.layers, sizes.heads, generator=torch.Generator().manual_seed(seed))
    prune_checkpoint(src, dst, sparsity, factors)


def pruned_by_made_norms(
    src: str | Path,  # A checkpoint folder
    dst: str | Path,  # New folder
    sparsity: float,  # Share of the weights in scope to zero, in [0, 1)
    seed: int = 0,  # Seed of the norms
) -> None:
    "Prune a checkpoint by Wanda with random input norms between 1 and 2."
    rng, scope = torch.Generator().manual_seed(seed), projections(open_checkpoint(src).model)
    norms = {p.name: 1 + torch.rand(p.weight.shape[1], generator=rng) for p in scope}
    prune_checkpoint(src, dst, sparsity, method="wanda", norms=norms)


def processor_name(
    listing: Path = Path("/proc/cpuinfo"),  # Where Linux describes its processors
) -> str:  # As its maker calls it, where that can be read
    "The name of the processor."
    lines = listing.read_text().splitlines() if listing.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def named_machine(
    device: torch.device,  # Where is computed
    note: str = "",  # What else was running
) -> dict:  # What `environment` says, and more of the machine
    "The machine, named, with its threads, memory and load."
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        memory = None  # a system that does not report it
    return environment(device, note) | {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory": memory,
        "load": round(os.getloadavg()[0], 2),
    }


def machine_text(
    machine: Mapping,  # What `named_machine` gave
) -> str:  # A sentence
    "A machine in words."
    graphics = f"{machine['device_name']}, beside " if machine["device"] == "cuda" else ""
    memory = f"{machine['memory'] / 2**30:.0f} GiB" if machine["memory"] else "unknown memory"
    commit, _, changes = (machine["commit"] or "unknown").partition("+")
    return (
        f"{graphics}{machine['processor']} ({machine['instructions']}), {machine['cores']} cores, "
        f"{machine['threads']} threads, {memory}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"commit {commit[:12]}{' with changes' if changes else ''}; also running: {machine['note'] or 'not noted'}."
    )


def read_cases(
    path: str | Path,  # File of a benchmark
) -> dict[str, dict]:  # Name of the case -> its record; empty if nothing was measured yet
    "The cases of a benchmark; a damaged file raises `BadInput`."
    if not Path(path).exists():
        return {}
    kept = read_checked(path)
    if isinstance(kept, dict) and isinstance(kept.get("cases"), dict):
        return kept["cases"]
    raise BadInput(f"{path} holds no cases: expected a file that a benchmark wrote; remove it and measure again.")


def measured_case(
    path: str | Path,  # File of the benchmark; made if it is not there
    name: str,  # Name of the case
    settings: Mapping,  # What is asked; what JSON can hold
    measure: Callable[[], dict],  # Gives "seconds" of every round by name, and "about"
    device: torch.device = torch.device("cpu"),  # Where it computes
    note: str = "",  # What else was running
) -> dict:  # The record
    "The record of a case: read if it is there, else measured and written at once."
    cases, wanted = read_cases(path), json.loads(json.dumps(settings))  # a tuple is a list in JSON
    if name in cases and cases[name]["settings"] != wanted:
        raise BadInput(
            f"{path} holds {name!r} with other settings, {cases[name]['settings']}: expected {wanted}; "
            "remove the case to measure it again."
        )
    if name not in cases:
        machine = named_machine(device, note)
        cases[name] = {"settings": wanted, "machine": machine, **measure()}
        write_checked(path, {"cases": cases})
    return read_cases(path)[name]


def missing_text(
    cases: Mapping[str, dict],  # The cases that are there
    wanted: Sequence[str],  # Names of those that are wanted
    command: str,  # What measures them
) -> str:  # A sentence
    "Which cases are still to be measured, and how."
    missing = [name for name in wanted if name not in cases]
    if not missing:
        return f"All {len(wanted)} cases are measured."
    return f"Not measured yet: {'; '.join(missing)}. To measure: {command}"


def plot_rounds(
    values: Mapping[str, Sequence[float]],  # Name -> a value of every round
    label: str,  # What the values are
    wanted: Mapping[str, float] | None = None,  # Name -> the value that is wanted
) -> Figure:  # Names down, values across
    "Every round as a dot, the median as a bar, the wanted value as a cross."
    figure, axis = plt.subplots(figsize=(7, 1 + 0.4 * len(values)), layout="constrained")
    for row, (name, rounds) in enumerate(values.items()):
        axis.plot(rounds, [row] * len(rounds), "o", color="tab:blue", alpha=0.5)
        axis.plot([statistics.median(rounds)], [row], "|", color="black", markersize=18)
        if wanted and name in wanted:
            axis.plot([wanted[name]], [row], "x", color="tab:red")
    axis.set(
        yticks=range(len(values)),
        yticklabels=list(values),
        ylim=(len(values) - 0.5, -0.5),
        xlabel=label,
        xlim=(0, None),
    )
    return figure


def balanced_heads(
    layers: int,  # L, layers of the model
    heads: int,  # H, heads a layer
    chosen: int,  # Layers to take heads from; an even number, or all
    each: int,  # Heads to take of each
) -> tuple[tuple[int, int], ...]:  # (layer, head) of the sample
    "Some heads, fair to the layers; numbers that cannot be so raise `BadInput`."
    if not (2 <= chosen <= layers and (chosen % 2 == 0 or chosen == layers) and 1 <= each <= heads):
        raise BadInput(
            f"{each} heads of {chosen} layers were asked for: expected 2 to {layers} layers, an even number or all, "
            f"and 1 to {heads} heads of each; change the two."
        )
    below = [index * (layers - 1) // (chosen - 1) for index in range(chosen // 2)]
    middle = list(range(layers)) if chosen == layers else below + [layers - 1 - layer for layer in reversed(below)]
    return tuple((layer, index * heads // each) for layer in middle for index in range(each))


def mean_resumed(
    layers: int,  # L, layers of the model
    heads: Sequence[tuple[int, int]],  # (layer, head) of the sample
) -> float:  # Layers, of L
    "How many layers a resumed pass runs, on average over some heads."
    return statistics.fmean(layers - layer for layer, _ in heads)


def whole_seconds(
    intact: Sequence[float],  # Seconds without any head, for every round
    sample: Sequence[float],  # Seconds with the sample's heads, in the same rounds
    count: int,  # Heads of the sample
    total: int,  # Heads of the model
) -> tuple[float, ...]:  # Seconds for all heads
    "What a sample says of the time for all heads."
    return tuple(alone + (taken - alone) * total / count for alone, taken in zip(intact, sample, strict=True))


def sampled_naive_work(
    sizes: Sizes,  # The sizes of the model
    batches: Sequence[BatchShape],  # The batches
    heads: Sequence[tuple[int, int]],  # (layer, head) of the sample
) -> Work:  # The work of the hook loop
    "One whole pass for the intact model and one for every head of the sample."
    passes, layers = 1 + len(heads), sizes.layers
    return sum(
        (
            Work(
                passes=passes,
                layer_tokens=passes * layers * b.rows * b.width,
                head_tokens=passes * b.rows * b.width,
                pairs=passes * layers * b.rows * b.width**2,
            )
            for b in batches
        ),
        Work(),
    )


def sampled_resumed_work(
    sizes: Sizes,  # The sizes of the model
    batches: Sequence[BatchShape],  # The batches, without the shared prefix
    heads: Sequence[tuple[int, int]],  # (layer, head) of the sample
    prefix: int = 0,  # P, tokens of the shared prefix
) -> Work:  # The work of `score_heads`, one head at a time
    "The same losses, resumed behind the masked attention, the last layer at targets only, the prefix once a head."
    passes, last = 1 + len(heads), sizes.layers - 1
    at_last = sum(layer == last for layer, _ in heads)
    before, later = len(heads) - at_last, sum(last - 1 - layer for layer, _ in heads if layer < last)
    first = Work(
        layer_tokens=prefix * (2 * sizes.layers + later + before),
        given_tokens=prefix * before,
        pairs=prefix**2 * (2 * sizes.layers + later),
        key_tokens=prefix * before,
    )

    def of_batch(b: BatchShape) -> Work:
        attending = (sizes.layers + later) * b.width + (passes - at_last) * b.most
        given = before * b.width + at_last * b.most
        return Work(
            passes=passes,
            layer_tokens=b.rows * (attending + given),
            given_tokens=b.rows * given,
            head_tokens=passes * b.targets,
            pairs=b.rows * (prefix + b.width) * attending,
            key_tokens=(passes - at_last) * b.rows * b.width,
        )

    return sum((of_batch(b) for b in batches), first)


def examples_at_hand(
    tokenizer,  # Tokenizer of transformers
    n: int,  # Examples a task
    data_dir: str | Path | None = None,  # Folder of the benchmarks' files, if it is at hand
    seed: int = 0,  # Seed of the draw
) -> tuple[Calibration, str]:  # The examples, and which they are
    "Real examples without a network: the paper's benchmarks from a folder, else the lab's tasks."
    from_files = data_dir is not None and default_style(tokenizer) != "lab"
    tasks = BENCHMARK_NAMES if from_files else tuple(f"lab-{name}" for name in BENCHMARK_NAMES)
    source = "from the authors files" if from_files else "generated"
    said = f"{n} examples each of {', '.join(tasks)}, {source}, seed {seed}"
    return calibration_set(tokenizer, tasks, n, 1, seed, data_dir if from_files else None), said


def behind_worked_examples(
    calibration: Calibration,  # The examples
    worked: Sequence[Example],  # Worked examples that come before each of them
) -> Calibration:  # The same examples, each with the worked ones before its prompt
    "Put worked examples before every prompt, as chain-of-thought prompting does; they are read and do not count."
    before = tuple(token for example in worked for token in example.input_ids)
    return Calibration.from_examples(
        (
            replace(e, input_ids=before + e.input_ids, labels=(IGNORED,) * len(before) + e.labels)
            for e in calibration.examples
        ),
        calibration.k,
        calibration.seed,
    )


def examples_of_lengths(
    lengths: Sequence[ExampleLength],  # Prompt and target tokens of each example
    vocabulary: int,  # Tokens that the model knows
    seed: int = 0,  # Seed of the draw
) -> Calibration:  # As many examples, in one subset
    "Examples of random tokens with given lengths."
    rng, examples = random.Random(seed), []
    for index, length in enumerate(lengths):
        tokens = tuple(rng.randrange(vocabulary) for _ in length.input_ids)
        examples.append(
            Example(
                task=length.task,
                uid=f"random-{seed}-{index}",
                prompt="",
                target="",
                answer="",
                input_ids=tokens,
                labels=(IGNORED,) * length.prompt + tokens[length.prompt :],
            )
        )
    return Calibration.from_examples(examples, k=1)


def random_model(
    config: object,  # Configuration of a causal language model of transformers
    device: torch.device = torch.device("cpu"),  # Where it goes
    dtype: torch.dtype = torch.float32,  # Of its weights
    seed: int = 0,  # Seed of the weights
) -> nn.Module:  # In evaluation mode
    "A model with random weights; how long its passes take does not depend on them."
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def counted_work(
    sizes: Sizes,  # The sizes of the model
    calibration: Calibration,  # The examples
    batch_tokens: int,  # Padded tokens a batch
    heads: Sequence[tuple[int, int]],  # (layer, head) of the sample
) -> dict[str, int]:  # "hook loop" and "resumed" -> floating-point operations
    "The work of scoring some heads both ways, in floating-point operations."
    prefix = shared_prefix(calibration.examples)
    rest = replace(calibration, examples=tuple(after_prefix(e, prefix) for e in calibration.examples))
    return {
        "hook loop": flops_of(
            sampled_naive_work(sizes, batch_shapes(lengths_of(calibration), batch_tokens), heads), sizes
        ),
        "resumed": flops_of(
            sampled_resumed_work(sizes, batch_shapes(lengths_of(rest), batch_tokens), heads, prefix), sizes
        ),
    }


def about_scoring(
    model: nn.Module,  # A causal language model of a known family
    calibration: Calibration,  # The examples
    batch_tokens: int,  # Padded tokens a batch
    heads: Sequence[tuple[int, int]],  # (layer, head) of the sample
) -> dict:  # What JSON can hold
    "What is to be known of a scoring that is timed."
    sizes, weight = sizes_of(model.config, type(model).__name__, "its configuration"), next(model.parameters())
    every = [(layer, head) for layer in range(sizes.layers) for head in range(sizes.heads)]
    return {
        "model": model_fingerprint(model),
        "sizes": asdict(sizes),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "calibration": calibration.fingerprint,
        "examples": len(calibration.examples),
        "tokens": sum(len(e.input_ids) for e in calibration.examples),
        "targets": sum(length.target for length in lengths_of(calibration)),
        "beginning": shared_prefix(calibration.examples),
        "batch_tokens": batch_tokens,
        "heads": [list(head) for head in heads],
        "total": len(every),
        "mean_resumed": mean_resumed(sizes.layers, heads),
        "flops": counted_work(sizes, calibration, batch_tokens, heads),
        "flops_of_all": counted_work(sizes, calibration, batch_tokens, every),
    }


def scoring_sides(
    model: nn.Module,  # A causal language model of a known family
    calibration: Calibration,  # The examples
    batch_tokens: int,  # Padded tokens a batch
) -> dict[str, Callable[[Sequence], torch.Tensor]]:  # Name -> (heads -> masked losses [L, H, N], NaN elsewhere)
    "The hook loop and the resumed passes, on the same model, examples and batches."
    return {
        "hook loop": lambda heads: score_heads_naive(model, calibration, batch_tokens, heads=heads).masked,
        "resumed": lambda heads: score_heads(model, calibration, batch_tokens, heads=heads).masked,
    }


def largest_difference(
    tables: Mapping[str, torch.Tensor],  # Name -> masked losses [L, H, N], NaN for heads that were not scored
    tolerance: float,  # What is allowed, in nats
) -> float:  # Nats
    "The largest difference of any table from the first; one above the tolerance, or other heads, raises `BadInput`."
    first, *others = tables
    for name in others:
        apart = (tables[name] - tables[first])[~tables[first].isnan()].abs()
        if not torch.equal(tables[name].isnan(), tables[first].isnan()) or apart.max() > tolerance:
            raise BadInput(
                f"{name} and {first} differ by {apart.max():.2e} nats or in their heads: expected at most "
                f"{tolerance:g}; what computes something else is not compared."
            )
    return max(((tables[name] - tables[first]).nan_to_num().abs().max().item() for name in others), default=0.0)


def compared_scoring(
    sides: Mapping[str, Callable[[Sequence], torch.Tensor]],  # Name -> (heads -> masked losses)
    heads: Sequence[tuple[int, int]],  # (layer, head) of the sample
    product: tuple[Callable[[], None], int],  # What `matrix_product` gave
    repeats: int = 5,  # Rounds
    device: torch.device = torch.device("cpu"),  # Where it computes
    tolerance: float = 1e-4,  # How far the sides may be apart, in nats
    clock: Callable[[], float] = time.perf_counter,  # Gives the time in seconds
) -> dict:  # "seconds" of every round, "about" the comparison
    "Time several ways of scoring the same heads in turn, after a check that they agree."
    apart = largest_difference({name: side(heads) for name, side in sides.items()}, tolerance)
    for side in sides.values():
        side([])
    measures = {name: stopwatch(lambda side=side: side(heads), device, clock) for name, side in sides.items()}
    measures |= {
        f"{name}, intact": stopwatch(lambda side=side: side([]), device, clock) for name, side in sides.items()
    }
    measures["matrix product"] = stopwatch(product[0], device, clock)
    product[0]()
    return {
        "seconds": measured_rounds(measures, repeats, warmups=0),
        "about": {"difference": apart, "product_flops": product[1]},
    }


def seconds_for_all(
    case: Mapping,  # A record of `compared_scoring` with what `about_scoring` says
    side: str,  # Name of the side
) -> tuple[float, ...]:  # Seconds of every round
    "The time that a side would take for all heads."
    return whole_seconds(
        case["seconds"][f"{side}, intact"], case["seconds"][side], len(case["about"]["heads"]), case["about"]["total"]
    )


def gain_for_all(
    case: Mapping,  # The same
    slow: str = "hook loop",  # The side above the line
    fast: str = "resumed",  # The side below it
) -> tuple[float, ...]:  # Ratio of every round
    "How many times as long one side would take as another, for all heads."
    return round_ratios({side: seconds_for_all(case, side) for side in (slow, fast)}, slow, fast)


def share_reached(
    case: Mapping,  # The same
    side: str = "resumed",  # "resumed" or "hook loop"
) -> tuple[float, ...]:  # Share of every round
    "Which share of the matrix-product peak a side reaches over all heads."
    return peak_shares(
        seconds_for_all(case, side),
        case["about"]["flops_of_all"][side],
        case["seconds"]["matrix product"],
        case["about"]["product_flops"],
    )


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "cross-entropy": ("aten::_log_softmax", "aten::nll_loss"),
    "norms, rotary, MLP, residuals": (
        *("aten::mul", "aten::add", "aten::silu", "aten::pow", "aten::mean", "aten::rsqrt", "aten::neg", "aten::sum"),
        *("aten::div", "aten::gelu"),
    ),
    "copies": ("aten::cat", "aten::copy_", "aten::index", "aten::where", "aten::gather", "aten::fill_", "aten::repeat"),
}  # Kind -> how the names of torch's operations begin; what else there is is "all else"


def kind_of(
    operation: str,  # Name of an operation of torch
    shapes: Sequence,  # Shapes of what it is given
    vocabulary: int,  # Tokens that the model knows
) -> str:  # One of `KINDS`, "output head" or "all else"
    "What an operation is a part of; a matrix product with the vocabulary in its shape is the output head's."
    kind = next((kind for kind, names in KINDS.items() if operation.startswith(names)), "all else")
    wide = any(vocabulary in shape for shape in shapes if isinstance(shape, (list, tuple)))
    return "output head" if kind == "matrix products" and wide else kind


def profiled_seconds(
    call: Callable[[], object],  # What is profiled
    vocabulary: int,  # Tokens that the model knows
) -> dict[str, float]:  # Kind of work -> seconds of the calling thread
    "Where the time of a call goes, by torch's profiler; a profile slows what it measures down."
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        call()
    seconds = dict.fromkeys((*KINDS, "output head", "all else"), 0.0)
    for event in profiled.key_averages(group_by_input_shape=True):
        seconds[kind_of(event.key, event.input_shapes, vocabulary)] += event.self_cpu_time_total / 1e6
    return seconds


def scoring_profile(
    sides: Mapping[str, Callable[[Sequence], torch.Tensor]],  # Name -> (heads -> masked losses)
    heads: Sequence[tuple[int, int]],  # (layer, head) of the sample
    total: int,  # Heads of the model
    vocabulary: int,  # Tokens that the model knows
) -> dict[str, dict[str, float]]:  # Name -> kind of work -> seconds for all heads
    "Where the time of every side goes, scaled from the sample to all heads."
    found = {}
    for name, side in sides.items():
        intact, sample = (profiled_seconds(lambda some=some: side(some), vocabulary) for some in ([], heads))
        found[name] = {
            kind: whole_seconds((intact[kind],), (taken,), len(heads), total)[0] for kind, taken in sample.items()
        }
    return found


@dataclass(frozen=True)
class ScoringRounds:
    "How a scoring is compared with others."

    squares: tuple[int, ...]  # Sizes of the matrix product to try
    batch_tokens: int = 4096  # Padded tokens a batch
    repeats: int = 5  # Rounds
    tolerance: float = 1e-4  # How far the sides may be apart, in nats
    times: int = 3  # Matrix products in one call
    profiled: bool = False  # Whether a profile of both sides is kept


def measured_scoring(
    path: str | Path,  # File of the benchmark
    name: str,  # Name of the case
    model: nn.Module,  # A causal language model of a known family
    calibration: Calibration,  # The examples
    heads: Sequence[tuple[int, int]],  # (layer, head) of the sample, or all
    rounds: ScoringRounds,  # How the sides are compared
    more: Mapping[str, Callable[[Sequence], torch.Tensor]] | None = None,  # Further sides, as in `scoring_sides`
    **said: str,  # What else is to be kept: which data, which weights, "note" for what else was running
) -> dict:  # The record of the case
    "The record of a scoring that is compared: read if it is there, else measured."
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype

    def measure() -> dict:
        product = matrix_product(fastest_product(device, dtype, rounds.squares), device, dtype, rounds.times)
        sides = scoring_sides(model, calibration, rounds.batch_tokens) | dict(more or {})
        compared = compared_scoring(sides, heads, product, rounds.repeats, device, rounds.tolerance)
        about = about_scoring(model, calibration, rounds.batch_tokens, heads) | said
        if rounds.profiled:
            about["profile"] = scoring_profile(sides, heads, about["total"], about["sizes"]["vocabulary"])
        return compared | {"about": compared["about"] | about}

    settings = {
        "repeats": rounds.repeats,
        "batch_tokens": rounds.batch_tokens,
        "heads": len(heads),
        "examples": len(calibration.examples),
    }
    return measured_case(path, name, settings, measure, device, said.get("note", ""))
