"""What zeros are worth in time

> One projection of Llama-3-8B's width at many sparsities, and whole models, dense and pruned side by side.

Paper: says nothing of speed. In: random weights, the lab model, and SmolLM2 where it was fetched. Out:
`figures/speed/layers.json` and `figures/speed/models.json`, which nbs/portable/05_speed reads.

The records are made, on a machine that does nothing else, by

    python -m tools.benchmarks.speed            # minutes; CAP_NB_NOTE says what else was running

A case that is on disk is not measured again. What OpenVINO makes of zeros is measured where the processor has AMX, by
the processor time of one thread, so that other work on the machine counts less.
"""

import hashlib
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from cap_nb.methods.prune import prune
from cap_nb.models.loading import load_model, model_cache
from cap_nb.portable.speed import BACKENDS, SpeedSettings, bench_folder, openvino_kernel
from tools.side_by_side import measured_case, measured_rounds, stopwatch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "figures" / "speed"
cpu, note = torch.device("cpu"), os.environ.get("CAP_NB_NOTE", "")
SPARSITIES = (0.2, 0.5, 0.7, 0.9, 0.95, 0.99)
OPENVINO = ("openvino", "openvino-dense")

# A projection alone: random weights, of which the smallest are zero. Dense products in 32 and 16 bits are measured
# beside the sparse ones in the same rounds. A call computes the product several times, so that it takes long enough.


def layer_weights(shape, sparsities, seed=0):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    sizes = weight.abs().flatten().sort().values
    zeroed = {s: weight * (weight.abs() > sizes[int(s * len(sizes)) - 1]) for s in sparsities}
    return {0.0: weight} | zeroed


def layer_sides(weights, batch, times, backends, seed=0):
    x = torch.randn(batch, weights[0.0].shape[1], generator=torch.Generator().manual_seed(seed))
    products = {"torch": BACKENDS["torch"].product(weights[0.0])}
    for name in backends:
        some = {name: weights[0.0]} if BACKENDS[name].dense else {f"{name}, {s:g}": w for s, w in weights.items() if s}
        products |= {side: BACKENDS[name].product(weight) for side, weight in some.items()}
    half, few = BACKENDS["torch"].product(weights[0.0].bfloat16()), x.bfloat16()
    calls = {name: (product, x) for name, product in products.items()} | {"torch, bfloat16": (half, few)}

    def repeated(product, inputs):
        def call():
            for _ in range(times):
                product(inputs)

        return call

    return {name: repeated(*pair) for name, pair in calls.items()}, x


def check_products(weights, x, backends):
    "The sparse products agree with the dense ones, before anything is timed."
    for name in backends:
        for s, weight in weights.items():
            wanted, got = x @ weight.T, BACKENDS[name].product(weight)(x)
            near = 0.1 if name.startswith("openvino") else 1e-3  # the one rounds weights and inputs to 8 bits
            if not torch.allclose(got, wanted, rtol=1e-3, atol=near * float(wanted.abs().max())):
                raise ValueError(f"{name} at {s} does not give the dense product: it is not timed")


def kernels(weights):
    "What OpenVINO calls the kernels that it multiplies by, with its packing and without."
    sparse = weights[max(weights)]
    return {name: openvino_kernel(sparse, packed) for name, packed in (("openvino", True), ("openvino-dense", False))}


def layer_case(path, name, shape, batch, times, sparsities=SPARSITIES, repeats=5, backends=("csr", "scipy")):
    backends = [b for b in backends if not BACKENDS[b].missing(cpu)]
    clock = time.process_time if "openvino" in backends else time.perf_counter

    def measure():
        weights = layer_weights(shape, sparsities)
        calls, x = layer_sides(weights, batch, times, backends)
        check_products(weights, x, backends)
        timers = {side: stopwatch(call, cpu, clock) for side, call in calls.items()}
        seconds = measured_rounds(timers, repeats)
        digest = hashlib.sha256(weights[0.0].numpy()).hexdigest()
        about = {"weights": digest} | ({"kernels": kernels(weights)} if "openvino" in backends else {})
        return {"seconds": {k: [s / times for s in v] for k, v in seconds.items()}, "about": about}

    asked = {"shape": list(shape), "batch": batch, "sparsities": list(sparsities), "repeats": repeats}
    asked |= {"clock": "process_time"} if clock is time.process_time else {}
    with torch.inference_mode():
        return measured_case(path, name, asked, measure, note=note)


# A whole model, pruned by magnitude, beside itself before that.


def model_case(path, name, model, sparsity, settings, clock=None):
    def measure():
        with tempfile.TemporaryDirectory() as place:
            pruned, tokenizer = load_model(model, settings.dtype, "cpu")
            prune(pruned, "magnitude", sparsity)
            pruned.save_pretrained(place)
            tokenizer.save_pretrained(place)
            del pruned
            record = bench_folder(place, model, settings, note, clock or time.perf_counter)
        return {"seconds": record["seconds"], "about": {k: record[k] for k in ("settings", "models", "not here")}}

    asked = {"sparsity": sparsity} | asdict(settings) | ({"clock": clock.__name__} if clock else {})
    return measured_case(path, name, asked, measure, note=note)


def main() -> None:
    layers, models = FOLDER / "layers.json", FOLDER / "models.json"
    for batch, times in ((1, 20), (16, 5)):
        for shape in ((4096, 4096), (14336, 4096)):
            print(layer_case(layers, f"{shape[0]} x {shape[1]}, batch {batch}", shape, batch, times)["seconds"])
    every = SpeedSettings(device="cpu", dtype="float32")
    print(model_case(models, "lab", "lab", 0.5, every)["seconds"])
    if (model_cache() / "smollm2").exists():
        fewer = SpeedSettings(device="cpu", dtype="float32", prompt=64, steps=16, backends=("torch", "csr"))
        for sparsity in (0.5, 0.9):
            print(model_case(models, f"smollm2, {sparsity:.0%}", "smollm2", sparsity, fewer)["seconds"])
    if not BACKENDS["openvino"].missing(cpu):
        torch.set_num_threads(1)
        openvino_cases(layers, models)


def openvino_cases(layers, models):
    "OpenVINO with packed zeros and without, on projections and on SmolLM2."
    for batch, times in ((1, 20), (16, 20), (256, 4)):
        for shape in ((4096, 4096), (14336, 4096)):
            case, given = f"{shape[0]} x {shape[1]}, batch {batch}, OpenVINO", (batch, times, SPARSITIES[:4])
            print(layer_case(layers, case, shape, *given, backends=OPENVINO)["seconds"])
    settings = SpeedSettings(
        device="cpu", dtype="float32", prompt=64, steps=16, rounds=3, backends=("torch", *OPENVINO))
    for sparsity in (0.5, 0.9) if (model_cache() / "smollm2").exists() else ():
        case = f"smollm2, {sparsity:.0%}, OpenVINO"
        print(model_case(models, case, "smollm2", sparsity, settings, time.process_time)["seconds"])


if __name__ == "__main__":
    main()
