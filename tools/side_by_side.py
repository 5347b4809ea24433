"""Time several ways of one computation in turn, and keep what was measured with the machine that measured it.

A case that is on disk is not measured again. `CAP_NB_NOTE` says what else was running.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

import cap_nb
from cap_nb.calibration import Calibration, calibration_set, default_style
from cap_nb.core.devices import device_name, finish, memory_of
from cap_nb.core.errors import BadInput, check_at_least
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.problems import BENCHMARK_NAMES
from cap_nb.data.prompts import IGNORED, Example
from cap_nb.jobs.planning import ExampleLength, batch_shapes, flops_of, hook_loop_work, lengths_of, sizes_of
from cap_nb.jobs.records import environment
from cap_nb.methods.resumed_scoring import after_prefix, score_heads, shared_prefix
from cap_nb.models.anatomy import anatomy, projections
from cap_nb.models.families import HOLDS
from cap_nb.models.loading import model_fingerprint
from cap_nb.portable.speed import in_turns, processor_says
from cap_nb.scoring import score_heads_naive

CPU = torch.device("cpu")
RECORDS = Path(__file__).resolve().parents[1] / "figures" / "benchmarks"
Seconds = dict[str, tuple[float, ...]]  # Name of a side -> seconds of every round
Heads = Sequence[tuple[int, int]]  # (layer, head) of a sample
Side = Callable[[Heads], torch.Tensor]  # Gives masked losses [L, H, N], NaN for heads that are not in the sample


# Clocks


def stopwatch(call: Callable[[], object], device=CPU, clock=time.perf_counter) -> Callable[[], float]:
    "The same call; it gives its seconds."

    def timed() -> float:
        finish(device)
        start = clock()
        call()
        finish(device)
        return clock() - start

    return timed


def measured_rounds(measures: Mapping[str, Callable[[], float]], repeats: int = 5, warmups: int = 1) -> Seconds:
    "Run all measures round after round, each once a round, every second round backwards; warm-ups are not kept."
    check_at_least(repeats, 1, "repeats")
    return {name: tuple(seconds) for name, seconds in in_turns(measures, repeats, warmups).items()}


def wanted_text(values: Sequence[float], wanted: float, more: bool = True) -> str:
    "What was wanted of some rounds, and whether their median is that."
    reached = statistics.median(values) >= wanted if more else statistics.median(values) <= wanted
    return f", wanted {wanted:g} or {'more' if more else 'less'}: {'reached' if reached else 'MISSED'}"


def matrix_product(size: int, device, dtype, times: int = 1) -> tuple[Callable[[], None], int]:
    "A call that multiplies two square matrices of random numbers, and its floating-point operations."
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def product() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return product, 2 * size**3 * times


def fastest_product(device, dtype, sizes: Sequence[int], repeats: int = 3, clock=time.perf_counter) -> int:
    "The size of the square product with most operations a second."
    rates = {}
    for size in sizes:
        product, flops = matrix_product(size, device, dtype)
        rates[size] = flops / min(measured_rounds({"product": stopwatch(product, device, clock)}, repeats)["product"])
    return max(rates, key=rates.get)


IN_PROCESS = """
import importlib, json, sys, time
from cap_nb.core.devices import PEAK, resident
path, given = json.loads(sys.argv[1])
function = getattr(importlib.import_module(path.split(":")[0]), path.split(":")[1])
start = time.perf_counter()
function(**given)
seconds = time.perf_counter() - start
print("\\n" + json.dumps([seconds, resident("VmHWM") if PEAK.exists() else None]))
"""


def in_own_process(function: str, **given: object) -> tuple[float, int | None]:
    "Call a function, as in shutil:copytree, in a process of its own: its seconds, and its bytes of main memory at most."
    above = Path(cap_nb.__file__).parent.parent
    paths = os.pathsep.join(filter(None, [str(above), os.environ.get("PYTHONPATH", "")]))
    words = [sys.executable, "-c", IN_PROCESS, json.dumps([function, given])]
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] # none of a process that was killed
        raise BadInput(f"{function} failed in its own process, {last}: expected it to end well; repair what it says.")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


# Records


def named_machine(device: torch.device, note: str = "") -> dict:
    "What `environment` says of a machine, its processor, cores, memory and load, and a note on what else was running."
    return environment(device, note) | {"processor": processor_says("model name") or device_name(CPU),
                                        "cores": os.cpu_count(),
                                        "instructions": torch.backends.cpu.get_cpu_capability(),
                                        "memory": memory_of(CPU)[1], "load": round(os.getloadavg()[0], 2)}


def read_cases(path: str | Path) -> dict[str, dict]:
    "The cases of a benchmark by name, none if nothing was measured yet; a damaged file raises `BadInput`."
    if not Path(path).exists():
        return {}
    kept = read_checked(path)
    if isinstance(kept, dict) and isinstance(kept.get("cases"), dict):
        return kept["cases"]
    raise BadInput(f"{path} holds no cases: expected a file that a benchmark wrote; remove it and measure again.")


def measured_case(path, name: str, settings: Mapping, measure: Callable[[], dict], device=CPU) -> dict:
    "The record of a case, with seconds of every round and what they are about: read if it is there, else measured."
    cases, wanted = read_cases(path), json.loads(json.dumps(settings))  # a tuple is a list in JSON
    if name in cases and cases[name]["settings"] != wanted:
        raise BadInput(
            f"{path} holds {name!r} with other settings, {cases[name]['settings']}: expected {wanted}; "
            "remove the case to measure it again."
        )
    if name not in cases:
        machine = named_machine(device, os.environ.get("CAP_NB_NOTE", ""))
        cases[name] = {"settings": wanted, "machine": machine, **measure()}
        write_checked(path, {"cases": cases})
    return read_cases(path)[name]


# Examples, models and samples of heads


def balanced_heads(layers: int, heads: int, chosen: int, each: int) -> Heads:
    "Some heads of an even number of layers, or of all, whose resumed passes run as many layers as those of all heads."
    if not (2 <= chosen <= layers and (chosen % 2 == 0 or chosen == layers) and 1 <= each <= heads):
        raise BadInput(
            f"{each} heads of {chosen} layers were asked for: expected 2 to {layers} layers, an even number or all, "
            f"and 1 to {heads} heads of each; change the two."
        )
    below = [index * (layers - 1) // (chosen - 1) for index in range(chosen // 2)]
    middle = list(range(layers)) if chosen == layers else below + [layers - 1 - layer for layer in reversed(below)]
    return tuple((layer, index * heads // each) for layer in middle for index in range(each))


def all_heads(model: nn.Module) -> Heads:
    a = anatomy(model)
    return tuple((layer, head) for layer in range(a.layers) for head in range(a.heads))


def examples_at_hand(tokenizer, n: int, data_dir=None, seed: int = 0) -> tuple[Calibration, str]:
    "Examples without a network, and which they are: the benchmarks' from a folder, else of the lab's tasks."
    from_files = data_dir is not None and default_style(tokenizer) != "lab"
    tasks = BENCHMARK_NAMES if from_files else tuple(f"lab-{name}" for name in BENCHMARK_NAMES)
    source = "from the authors files" if from_files else "generated"
    said = f"{n} examples each of {', '.join(tasks)}, {source}, seed {seed}"
    return calibration_set(tokenizer, tasks, n, 1, seed, data_dir if from_files else None), said


def behind_worked_examples(calibration: Calibration, worked: Sequence[Example]) -> Calibration:
    "Put worked examples before every prompt, as chain-of-thought prompting does; they are read and do not count."
    before = tuple(token for example in worked for token in example.input_ids)
    longer = [replace(e, input_ids=before + e.input_ids, labels=(IGNORED,) * len(before) + e.labels)
              for e in calibration.examples]
    return Calibration.from_examples(longer, calibration.k, calibration.seed)


def examples_of_lengths(lengths: Sequence[ExampleLength], vocabulary: int, seed: int = 0) -> Calibration:
    "Examples of random tokens with given lengths."
    rng, examples = random.Random(seed), []
    for index, length in enumerate(lengths):
        tokens = tuple(rng.randrange(vocabulary) for _ in length.input_ids)
        labels = (IGNORED,) * length.prompt + tokens[length.prompt :]
        uid = f"random-{seed}-{index}"
        examples.append(Example(task=length.task, uid=uid, prompt="", target="", answer="", input_ids=tokens,
                                labels=labels))
    return Calibration.from_examples(examples, k=1)


def random_model(config, device=CPU, dtype=torch.float32, seed: int = 0) -> nn.Module:
    "A model with random weights, in evaluation mode; how long its passes take does not depend on them."
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


# Operations, counted to the last product, unlike those of a plan


def counted_work(model: nn.Module, calibration: Calibration, batch_tokens: int, heads: Heads) -> dict[str, int]:
    "Operations of scoring some heads by the hook loop, and resumed: the shared prefix once a head, the rest by batch."
    sizes, prefix = sizes_of(model.config, "", ""), shared_prefix(calibration.examples)
    keys = sum(2 * p.weight.numel() for p in projections(model) if p.role in HOLDS and p.role != "output")
    layer, keys = 2 * sizes.met / sizes.layers, keys / sizes.layers  # of one token
    pair, last = 4 * sizes.heads * sizes.head_size, sizes.layers - 1
    at_last = sum(layer == last for layer, _ in heads)
    before, later = len(heads) - at_last, sum(last - 1 - layer for layer, _ in heads if layer < last)
    rest = lengths_of(replace(calibration, examples=tuple(after_prefix(e, prefix) for e in calibration.examples)))
    shared = sizes.layers + later  # whole layers that the prefix runs; masked ones start behind their heads
    resumed = prefix * layer * (shared + before) + prefix**2 * pair * shared
    for b in batch_shapes(rest, batch_tokens):  # the last layer runs at targets only, its keys everywhere
        whole = (last + later) * b.width + (1 + before) * b.most
        behind_heads = before * b.width + at_last * b.most
        resumed += b.rows * (layer * (whole + behind_heads) - keys * behind_heads + keys * (1 + before) * b.width)
        resumed += b.rows * pair * (prefix + b.width) * whole
        resumed += 2 * sizes.vocabulary * sizes.hidden_size * (1 + len(heads)) * b.targets
    hook_loop = flops_of(hook_loop_work(sizes, batch_shapes(lengths_of(calibration), batch_tokens)), sizes)
    share = (1 + len(heads)) / (1 + sizes.layers * sizes.heads)
    return {"hook loop": round(hook_loop * share), "resumed": round(resumed)}


# Scoring, compared


@dataclass(frozen=True)
class ScoringRounds:
    "How a scoring is compared with others."

    squares: tuple[int, ...]  # Sizes of the matrix product to try
    batch_tokens: int = 4096  # Padded tokens a batch
    repeats: int = 5  # Rounds
    tolerance: float = 1e-4  # How far the sides may be apart, in nats
    times: int = 3  # Matrix products in one call
    profiled: bool = False  # Whether a profile of both sides is kept


def about_scoring(model: nn.Module, calibration: Calibration, batch_tokens: int, heads: Heads) -> dict:
    "What is to be kept about a scoring that is timed."
    a, every = anatomy(model), all_heads(model)
    return {"model": model_fingerprint(model), "sizes": {**vars(a), "vocabulary": model.config.vocab_size},
            "dtype": str(model.dtype).removeprefix("torch."), "calibration": calibration.fingerprint,
            "examples": len(calibration.examples), "tokens": sum(len(e.input_ids) for e in calibration.examples),
            "targets": sum(length.target for length in lengths_of(calibration)),
            "beginning": shared_prefix(calibration.examples), "batch_tokens": batch_tokens,
            "heads": [list(head) for head in heads], "total": len(every),
            "mean_resumed": statistics.fmean(a.layers - layer for layer, _ in heads),
            "flops": counted_work(model, calibration, batch_tokens, heads),
            "flops_of_all": counted_work(model, calibration, batch_tokens, every)}


def scoring_sides(model: nn.Module, calibration: Calibration, batch_tokens: int) -> dict[str, Side]:
    "The hook loop and the resumed passes, on the same model, examples and batches."
    return {"hook loop": lambda heads: score_heads_naive(model, calibration, batch_tokens, heads=heads).masked,
            "resumed": lambda heads: score_heads(model, calibration, batch_tokens, heads=heads).masked}


def largest_difference(tables: Mapping[str, torch.Tensor], tolerance: float) -> float:
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


def compared_scoring(sides: Mapping[str, Side], heads: Heads, product, rounds: ScoringRounds, device=CPU,
                     clock=time.perf_counter) -> dict:
    "Time several ways of scoring the same heads in turn, and what `matrix_product` gave, after a check that they agree."
    apart = largest_difference({name: side(heads) for name, side in sides.items()}, rounds.tolerance)
    for side in sides.values():
        side([])
    measures = {}
    for suffix, some in (("", heads), (", intact", [])):
        for name, side in sides.items():
            measures[name + suffix] = stopwatch(lambda side=side, some=some: side(some), device, clock)
    measures["matrix product"] = stopwatch(product[0], device, clock)
    product[0]()
    about = {"difference": apart, "product_flops": product[1]}
    return {"seconds": measured_rounds(measures, rounds.repeats, warmups=0), "about": about}


def seconds_for_all(case: Mapping, side: str) -> tuple[float, ...]:
    "The time that a side would take for all heads, by what the sample took beyond the intact model."
    seconds, share = case["seconds"], len(case["about"]["heads"]) / case["about"]["total"]
    return tuple(alone + (taken - alone) / share for alone, taken in zip(seconds[f"{side}, intact"], seconds[side],
        strict=True))


def gain_for_all(case: Mapping, slow: str = "hook loop", fast: str = "resumed") -> tuple[float, ...]:
    "How many times as long one side would take as another for all heads, round by round."
    return tuple(a / b for a, b in zip(seconds_for_all(case, slow), seconds_for_all(case, fast), strict=True))


def share_reached(case: Mapping, side: str = "resumed") -> tuple[float, ...]:
    "Which share of the matrix product's operations a second a side reaches over all heads, round by round."
    about, products = case["about"], case["seconds"]["matrix product"]
    flops = about["flops_of_all"][side]
    return tuple((flops / taken) / (about["product_flops"] / product)
                 for taken, product in zip(seconds_for_all(case, side), products, strict=True))


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "cross-entropy": ("aten::_log_softmax", "aten::nll_loss"),
    "norms, rotary, MLP, residuals": tuple(
        f"aten::{name}" for name in "mul add silu pow mean rsqrt neg sum div gelu".split()
    ),
    "copies": tuple(f"aten::{name}" for name in "cat copy_ index where gather fill_ repeat".split()),
}  # Kind -> how the names of torch's operations begin; what else there is is "all else"


def profiled_seconds(call: Callable[[], object], vocabulary: int) -> dict[str, float]:
    "Where the time of a call goes, kind by kind, by torch's profiler; products with the vocabulary are the output head's."
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        call()
    seconds = dict.fromkeys((*KINDS, "output head", "all else"), 0.0)
    for event in profiled.key_averages(group_by_input_shape=True):
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "all else")
        wide = any(vocabulary in shape for shape in event.input_shapes if isinstance(shape, (list, tuple)))
        seconds["output head" if kind == "matrix products" and wide else kind] += event.self_cpu_time_total / 1e6
    return seconds


def scoring_profile(sides: Mapping[str, Side], heads: Heads, total: int, vocabulary: int) -> dict[str, dict[str, float]]:
    "Where the time of every side goes, scaled from the sample to all heads."
    found = {}
    for name, side in sides.items():
        intact, sample = (profiled_seconds(lambda some=some: side(some), vocabulary) for some in ([], heads))
        found[name] = {kind: intact[kind] + (sample[kind] - intact[kind]) * total / len(heads) for kind in sample}
    return found


def measured_scoring(
    path: str | Path,  # File of the benchmark
    name: str,  # Name of the case
    model: nn.Module,  # A causal language model of a known family
    calibration: Calibration,  # The examples
    heads: Heads,  # The sample, or all
    rounds: ScoringRounds,  # How the sides are compared
    more: Mapping[str, Side] | None = None,  # Further sides, as in `scoring_sides`
    **said: str,  # What else is to be kept: which data, which weights
) -> dict:  # The record of the case
    "The record of a scoring that is compared: read if it is there, else measured."
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype

    def measure() -> dict:
        product = matrix_product(fastest_product(device, dtype, rounds.squares), device, dtype, rounds.times)
        sides = scoring_sides(model, calibration, rounds.batch_tokens) | dict(more or {})
        compared = compared_scoring(sides, heads, product, rounds, device)
        about = about_scoring(model, calibration, rounds.batch_tokens, heads) | said
        if rounds.profiled:
            about["profile"] = scoring_profile(sides, heads, about["total"], about["sizes"]["vocabulary"])
        return compared | {"about": compared["about"] | about}

    asked = {"repeats": rounds.repeats, "batch_tokens": rounds.batch_tokens}
    asked |= {"heads": len(heads), "examples": len(calibration.examples)}
    return measured_case(path, name, asked, measure, device)
