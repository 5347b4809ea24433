"""The layer problem

> Wanda, SparseGPT, swaps, the update and the joint solver, side by side with the published code of Wanda and SparseGPT.

Sources: Sun et al. 2024 and Frantar and Alistarh 2023. In: layers of SmolLM2, and one layer and single matrices of
Llama-3-8B's width with random weights, all with random tokens. Out: `figures/benchmarks/layer_problem.json`. Wanted: at
most 0.8 of the processor time of the published code at no more memory, swaps and the update in at most twice the time
of SparseGPT, and Wanda as a whole in at most 1.35 times two plain passes of its tokens.

The records are made, on a machine that does nothing else, by

    CAP_NB_PEER=FOLDER python -m tools.benchmarks.layer_problem

where the folder holds the published code, a checkout of github.com/locuslab/wanda; without it, only our own sides are
measured. Nothing of that code is kept here.
"""

import functools
import importlib
import multiprocessing
import os
import sys
import time
import types
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from cap_nb.calibration import Calibration
from cap_nb.core.errors import BadInput
from cap_nb.core.devices import memory_taken
from cap_nb.data.prompts import IGNORED, Example
from cap_nb.jobs.planning import PUBLISHED
from cap_nb.methods.update import joint_update
from cap_nb.methods.prune import prune
from cap_nb.methods.prune import recovered_weight
from cap_nb.methods.sparsegpt import sparsegpt_update
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.methods.selection import smallest_in_rows
from tools.side_by_side import RECORDS, measured_case, measured_rounds

path, peer_folder = RECORDS / "layer_problem.json", os.environ.get("CAP_NB_PEER", "")
llama = PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"] | dict(num_hidden_layers=1, vocab_size=1000)
solvers = ("sparsegpt", "wanda^swaps", "wanda^update", "alps")

# The cases. A model is pruned whole, layer after layer; a matrix has random weights and the Hessian of random inputs
# that depend on each other. The published code prunes "published wanda" and "published sparsegpt".

CASES = {"smollm2": dict(layers=6, rows=8, tokens=512, sides=("wanda", "sparsegpt")),
         "smollm2, 24 short examples": dict(layers=30, rows=24, tokens=32, sides=("wanda", "two plain passes")),
         "smollm2, solvers": dict(layers=2, rows=8, tokens=512, sides=solvers),
         "llama-3-8b, one layer": dict(shape=llama, rows=2, tokens=256, sides=("wanda",)),
         "llama-3-8b, 512 rows of 4096": dict(matrix=(512, 4096), tokens=1024, sides=solvers),
         "llama-3-8b, 512 rows of 14336": dict(matrix=(512, 14336), tokens=1024, sides=("sparsegpt",))}
PUBLISHED_SIDES = ("wanda", "sparsegpt")


# The published code asks for CUDA, for a data set from the hub, and for layers that take no rotary embeddings. It is
# given the tokens of the case, and layers that know their embeddings.


def published_code(folder):
    if not (Path(folder) / "lib" / "prune.py").is_file():
        raise BadInput(f"{folder} holds no lib/prune.py: expected a checkout of the published code in CAP_NB_PEER.")
    sys.path.insert(0, str(folder))
    sys.modules.setdefault("datasets", types.SimpleNamespace(load_dataset=None))
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *given: None
    code = importlib.import_module("lib.prune")
    code.print = lambda *given: None
    return code


def with_embeddings(forward, embeddings):
    def call(hidden, attention_mask=None, position_ids=None, **others):
        known = dict(attention_mask=attention_mask, position_ids=position_ids, position_embeddings=embeddings)
        return forward(hidden, **known)

    return call


def prune_as_published(code, model, windows, method):
    model.seqlen, model.hf_device_map = windows.shape[1], {}
    code.get_loaders = lambda *given, **named: ([(window[None], None) for window in windows], None)
    settings = types.SimpleNamespace(nsamples=len(windows), seed=0, sparsity_ratio=0.5, use_variant=False)
    with torch.no_grad():
        hidden = model.get_input_embeddings()(windows[:1])
        embeddings = model.model.rotary_emb(hidden, torch.arange(windows.shape[1])[None])
    for layer in model.model.layers:
        layer.forward = with_embeddings(layer.forward, embeddings)
    try:
        getattr(code, f"prune_{method}")(settings, model, None, torch.device("cpu"))
    finally:
        for layer in model.model.layers:
            del layer.forward


def solve_as_published(code, linear, hessian):
    solver = code.SparseGPT(linear)
    solver.H = hessian.clone()
    solver.fasterprune(0.5, blocksize=128, percdamp=0.01)


# What a side does: "reset" puts the old weights back, "call" prunes, "zeros" gives what is zero.


def model_of(case):
    if "shape" not in case:
        model, _ = load_model("smollm2", "float32", "cpu")
        model.model.layers, model.config.num_hidden_layers = model.model.layers[: case["layers"]], case["layers"]
        return model
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**case["shape"]), dtype=torch.float32).eval()


def calibration_of(windows):
    rows = [tuple(row) for row in windows.tolist()]
    common = dict(task="random", prompt="", target="", answer="")
    return Calibration.from_examples((Example(uid=str(i), input_ids=row, labels=(IGNORED,) + row[1:], **common)
                                      for i, row in enumerate(rows)), k=1)


def on_model(case, side):
    model, rng = model_of(case), torch.Generator().manual_seed(0)
    windows = torch.randint(0, model.config.vocab_size, (case["rows"], case["tokens"]), generator=rng)
    dense = {p.name: p.weight.detach().clone() for p in projections(model)}
    method = side.removeprefix("published ")
    code = published_code(case["peer"]) if method != side else None

    @torch.no_grad()
    def reset():
        for p in projections(model):
            p.weight.copy_(dense[p.name])

    @torch.no_grad()
    def call():
        if code:
            prune_as_published(code, model, windows, method)
        elif side == "two plain passes":
            for _ in range(2):
                model(windows, use_cache=False)
        else:
            prune(model, method, 0.5, calibration=calibration_of(windows))

    with torch.no_grad():  # libraries take their memory here, not in what is measured
        model.model(windows[:, :32], use_cache=False)
    zeros = lambda: torch.cat([(p.weight == 0).flatten() for p in projections(model)])
    return reset, call, zeros, {"weights": model_fingerprint(model)}


def random_matrix(rows, width, tokens, seed=0):
    rng = torch.Generator().manual_seed(seed)
    shared, own = torch.randn(tokens, width // 8, generator=rng), torch.randn(tokens, width, generator=rng)
    inputs = shared @ torch.randn(width // 8, width, generator=rng) / (width // 8) ** 0.5 + 0.5 * own
    return torch.randn(rows, width, generator=rng) / width**0.5, inputs.T @ inputs


def on_matrix(case, side):
    weight, hessian = random_matrix(*case["matrix"], case["tokens"])
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    code = published_code(case["peer"]) if side.startswith("published ") else None

    def reset():
        linear.weight.data = weight.clone()

    def new():
        if side == "sparsegpt":
            return sparsegpt_update(weight, hessian, 0.5)[0]
        if side == "alps":
            return joint_update(weight, hessian, 0.5)[0]
        mask = smallest_in_rows(weight.abs() * hessian.diagonal().sqrt(), 0.5)
        return recovered_weight(weight, mask, hessian, tuple(side.split("^")[1:]), None)

    def call():
        if code:
            solve_as_published(code, linear, hessian)
        else:
            linear.weight.data = new()

    reset()
    return reset, call, lambda: linear.weight == 0, {"seed": 0}


# Each side lives in a process of its own, which is made once. Its first call tells its memory and its zeros and does not
# count for time; then all take turns, a call a round.

LIVE = {}  # in the process of a side: its reset and its call, for all rounds


def first_call(case, side):
    torch.set_num_threads(case["threads"])
    LIVE["reset"], LIVE["call"], zeros, about = (on_matrix if "matrix" in case else on_model)(case, side)
    with memory_taken(torch.device("cpu")) as taken:
        LIVE["call"]()
    return taken[0], np.packbits(zeros().numpy()), about


def timed_call():
    LIVE["reset"]()
    start = time.process_time()
    LIVE["call"]()
    return time.process_time() - start


def told_by(process, side, work, *given):
    try:
        return process.submit(work, *given).result()
    except BrokenProcessPool as ended:
        raise BadInput(f"The process of {side!r} ended: expected it to go on; it may need more memory.") from ended


def differing(first):
    "How many zeros of our side differ from those of the published code, and of how many weights."
    kept = {}
    for name in PUBLISHED_SIDES:
        if f"published {name}" in first:
            ours, theirs = first[name][1], first[f"published {name}"][1]
            kept[name] = {"differ": int(np.unpackbits(ours ^ theirs).sum()), "of": 8 * len(ours)}
    return kept


def layer_case(path, name, case, repeats=5, threads=1, peer=""):
    def measure():
        given = case | {"threads": threads, "peer": peer}
        whole = "two plain passes" in case["sides"]  # compared with nothing else
        others = [f"published {side}" for side in case["sides"] if side in PUBLISHED_SIDES and peer and not whole]
        with ExitStack() as ended:
            alone = {side: ended.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
                     for side in [*case["sides"], *others]}
            first = {side: told_by(process, side, first_call, given, side) for side, process in alone.items()}
            calls = {side: functools.partial(told_by, process, side, timed_call) for side, process in alone.items()}
            seconds = measured_rounds(calls, repeats, warmups=0)
        about = {"memory": {side: told[0] for side, told in first.items()}, "zeros": differing(first)}
        return {"seconds": seconds, "about": about | first[case["sides"][0]][2]}

    settings = {"repeats": repeats, "sparsity": 0.5, "threads": threads, "dtype": "float32", **case}
    return measured_case(path, name, settings, measure)


def main() -> None:
    for name, case in CASES.items():
        start, record = time.perf_counter(), layer_case(path, name, case, peer=peer_folder)
        print(name, {side: min(values) for side, values in record["seconds"].items()}, record["about"]["memory"])
        print(record["about"]["zeros"], f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
