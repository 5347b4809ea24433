"""Sparse and quantised: the records behind nbs/portable/03_quantised.

In: the lab model, and real models that are at hand. Out: `figures/quantised/order.json`, the held-out losses of every
order of pruning and rounding; `figures/quantised/int8.json`, the same in the int8 arithmetic of torchao and beside it;
and `figures/quantised/files.json`, what became of real models in GGUF files.

    python -m tools.quantised order                      # minutes
    python -m tools.quantised int8                       # minutes; wants torchao, in an environment of its own
    python -m tools.quantised files smollm2 FOLDER ...   # each model a minute; a case that is there is not made again

Where the package xllamacpp is installed (llama.cpp with an interface for Python), the second also lets llama.cpp go on
with three texts from each file, and counts the tokens that it has in common with transformers.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from cap_nb.calibration import calibration_set
from cap_nb.core.files import read_checked, sha256_of_text, write_checked
from cap_nb.evaluation import evaluation_problems, problem_losses
from cap_nb.jobs.records import environment
from cap_nb.methods.prune import prune
from cap_nb.models.anatomy import projections
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.portable.quantised import export_gguf, rounded_to_nearest
from transformers import AutoModelForCausalLM

OUT = Path(__file__).resolve().parents[1] / "figures" / "quantised"
TASKS = ("lab-gsm8k", "lab-strategyqa", "lab-arc")
TEXTS = ("Question: Tom has 12 apples and buys 35 more. How many", "def add(a, b):\n    return", "The capital of France is")


ROWS, TORCHAO = "8, rows", ("torchao", "torchao, inputs too")  # Our own 8 bits with a scale a row; torchao's int8


def by_torchao(model, inputs):
    "Let torchao compute the projections in int8: weights with a scale a row, and inputs with one a token if asked for."
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

    linears = {projection.module for projection in projections(model)}
    config = Int8DynamicActivationInt8WeightConfig() if inputs else Int8WeightOnlyConfig()
    quantize_(model, config, filter_fn=lambda module, name: module in linears)


@torch.no_grad()
def read_back(model):
    "Put plain numbers in the place of codes, in place; weights that are plain stay as they are."
    for projection in projections(model):
        if type(projection.module.weight) is not torch.nn.Parameter:
            projection.module.weight = torch.nn.Parameter(projection.module.weight.dequantize())


@torch.no_grad()
def rounded(model, bits, group=32):
    "Round every weight in scope, in place."
    if bits in TORCHAO:
        by_torchao(model, inputs=bits != TORCHAO[0])
        return
    for projection in projections(model):
        of = (8, projection.weight.shape[1]) if bits == ROWS else (bits, group)
        projection.weight.copy_(rounded_to_nearest(projection.weight, *of))


@torch.no_grad()
def shaken(model, bits, seed, group=32):
    "Move every weight in scope by at most half a step of the grid, at random, in place."
    rng = torch.Generator().manual_seed(seed)
    for projection in projections(model):
        weight = projection.weight
        step = weight.unflatten(-1, (-1, group)).abs().amax(-1).repeat_interleave(group, -1) / (2 ** (bits - 1) - 1)
        weight.add_(step * (torch.rand(weight.shape, generator=rng) - 0.5))


def steps_of(cell, sparsity, calibration):
    "What is done to a model, one after another."
    order, method, bits, seed = cell
    prune_it, round_it = lambda m: prune(m, method, sparsity, calibration=calibration), lambda m: rounded(m, bits)
    return {
        "dense": (),
        "rounded": (round_it,),
        "pruned": (prune_it,),
        "prune, round": (prune_it, round_it),
        "round, prune": (round_it, read_back, prune_it, round_it),
        "shake, prune": (lambda m: shaken(m, bits, seed), prune_it),
    }[order]


def order_cells(methods, bits, shakes):
    "Every (order, method, bits, seed) that is measured."
    yield "dense", None, None, None
    for b in bits:
        yield "rounded", None, b, None
    for method in methods:
        yield "pruned", method, None, None
        for b in bits:
            yield "prune, round", method, b, None
            yield "round, prune", method, b, None
        for seed in range(shakes):
            yield "shake, prune", method, 8, seed


def in_hundred_thousandths(losses):
    "Losses as whole numbers of 0.00001 nats, in one line of text."
    return " ".join(str(round(100_000 * loss)) for loss in losses)


def measure_order(path, n=300, sparsity=0.5, methods=("magnitude", "wanda", "alps"), bits=(8, 4), calibrate=64, shakes=5):
    "Held-out losses of the lab model in every cell, problem by problem; a cell that is there is not measured again."
    tokenizer = load_model("lab", "float32", "cpu")[1]
    calibration = calibration_set(tokenizer, TASKS, calibrate, 3, 0)
    exclude = frozenset(example.uid for example in calibration.examples)
    problems = [p for task in TASKS for p in evaluation_problems(task, n, 0, exclude=exclude)]
    settings = {"n": n, "sparsity": sparsity, "group": 32, "calibrate": calibrate, "seed": 0, "tasks": list(TASKS)}
    about = {"settings": settings, "calibration": calibration.fingerprint}
    about |= {"problems": sha256_of_text(" ".join(p.uid for p in problems))}
    cells = read_checked(path)["cells"] if path.exists() else []
    for cell in order_cells(methods, bits, shakes):
        if any((c["order"], c["method"], c["bits"], c["seed"]) == cell for c in cells):
            continue
        model = load_model("lab", "float32", "cpu")[0]
        for step in steps_of(cell, sparsity, calibration):
            step(model)
        losses = [record.loss for record in problem_losses(model, tokenizer, problems, "lab")]
        read_back(model)
        zeros = [(p.weight == 0).float().mean().item() for p in projections(model)]
        kept = dict(zip(("order", "method", "bits", "seed"), cell)) | {"zeros": sum(zeros) / len(zeros), "losses": in_hundred_thousandths(losses)}
        cells.append(kept | {"model": model_fingerprint(model)[:16]})
        machine = environment(torch.device("cpu"), os.environ.get("CAP_NB_NOTE", ""))
        machine |= {"torchao": importlib.metadata.version("torchao")} if set(bits) & set(TORCHAO) else {}
        write_checked(path, about | {"machine": machine, "cells": cells})
        print(*cell, round(sum(losses) / len(losses), 4), flush=True)


def continued(model, tokenizer, tokens):
    "What transformers writes after each text, greedily."
    written = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        whole = model.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        written.append((ids[0].tolist(), whole[0, ids.shape[1] :].tolist()))
    return written


def common_with_llama_cpp(file, written, tokens):
    "How many tokens llama.cpp writes before its first other one, text by text; and whether it cuts texts alike."
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = str(file), 512, 1, False
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.verbosity = 0
    server, common, alike = xllamacpp.Server(settings), [], True
    for text, (ids, wanted) in zip(TEXTS, written):
        asked = {"prompt": ids, "n_predict": tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        answer = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
        got = [token["id"] for token in answer]
        common.append(next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), len(wanted)))
        counted = server.handle_completions({"prompt": text, "n_predict": 1})["usage"]["prompt_tokens"]
        alike = alike and counted == len(ids)
    return {"common": common, "of": tokens, "counts prompt tokens alike": alike}


@torch.no_grad()
def mean_kl(model, other, tokenizer):
    "Mean divergence of the next token, over the positions of the texts, in nats."
    kept = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        p, q = (m(ids).logits.float().log_softmax(-1) for m in (model, other))
        kept.append((p.exp() * (p - q)).sum(-1).flatten())
    return torch.cat(kept).mean().item()


def measure_files(name, sparsity=0.2, dtypes=("f16", "q8_0"), tokens=24):
    "One model, pruned by magnitude in float16: its files, their zeros, and what is read from them."
    model, tokenizer = load_model(name, "float32", "cpu")
    prune(model, "magnitude", sparsity)
    with tempfile.TemporaryDirectory() as place:
        model.half().save_pretrained(Path(place) / "pruned")
        tokenizer.save_pretrained(Path(place) / "pruned")
        del model
        model, tokenizer = load_model(f"{place}/pruned", "float32", "cpu")  # what float16 holds
        kept = {"fingerprint": model_fingerprint(model)[:16], "sparsity": sparsity, "files": {}}
        written = continued(model, tokenizer, tokens)
        kept["folder bytes"] = sum(path.stat().st_size for path in (Path(place) / "pruned").glob("*.safetensors"))
        for dtype in dtypes:
            report = export_gguf(Path(place) / "pruned", Path(place) / f"{dtype}.gguf", dtype)
            back = AutoModelForCausalLM.from_pretrained(place, gguf_file=report.file.name, dtype=torch.float32).eval()
            ids = torch.tensor([written[0][0]])
            with torch.no_grad():
                apart = (back(ids).logits - model(ids).logits).abs().max().item()
            about = {"bytes": report.bytes, "tokenizer": report.tokenizer, "zeros": vars(report.zeros)}
            about |= {"largest logit difference": apart, "mean KL": mean_kl(model, back, tokenizer)}
            del back
            if report.tokenizer and importlib.util.find_spec("xllamacpp"):
                about["llama.cpp"] = common_with_llama_cpp(report.file, written, tokens)
            kept["files"][dtype] = about
    return kept


def main(words):
    "The command."
    if words[:1] == ["order"]:
        measure_order(OUT / "order.json")
        return
    if words[:1] == ["int8"]:
        measure_order(OUT / "int8.json", n=100, bits=(ROWS, *TORCHAO), shakes=0)
        return
    path = OUT / "files.json"
    for name in words[1:]:
        cases = read_checked(path) if path.exists() else {}
        label = Path(name).name
        if label not in cases:
            machine = environment(torch.device("cpu"), os.environ.get("CAP_NB_NOTE", ""))
            write_checked(path, cases | {label: measure_files(name) | {"machine": machine}})
        print(json.dumps(read_checked(path)[label], indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
