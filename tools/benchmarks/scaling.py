"""How time grows

> The time of scoring against the number of heads, layers, tokens and examples, and against the count of its operations.

In: random weights in the shape of SmolLM2, since the time does not depend on their values. Out: `figures/benchmarks/scaling.json`,
and the share of the machine's own matrix-product peak that is reached. The records are made, on a machine that does nothing
else, by `python -m tools.benchmarks.scaling`.

A point has a number of layers, of heads scored in each layer, of tokens an example (three quarters of them prompt) and of
examples. One of the four is varied at a time. All points of an axis, and the matrix product, take turns in the same rounds.
The seconds of a point are those that its heads take: the same call with no heads, right after it, is subtracted, in its time
as in its operations.
"""
import torch
from transformers import AutoConfig

from cap_nb.jobs.planning import ExampleLength
from cap_nb.methods.resumed_scoring import score_heads
from tools.side_by_side import (
    RECORDS, balanced_heads, counted_work, examples_of_lengths, fastest_product, matrix_product, measured_case, measured_rounds, random_model, stopwatch)

path, cpu, squares = RECORDS / "scaling.json", torch.device("cpu"), (1024, 2048, 4096)
shape = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64, vocab_size=49152, tie_word_embeddings=True)
middle = dict(layers=6, heads=2, tokens=128, examples=6)
axes = {"heads": (1, 3, 9), "layers": (3, 6, 12), "tokens": (64, 128, 256), "examples": (3, 6, 12)}


def point(layers, heads, tokens, examples, chosen=None, shape=shape):
    model = random_model(AutoConfig.for_model("llama", num_hidden_layers=layers, **shape))
    lengths = [ExampleLength("made", tokens - tokens // 4, tokens // 4)] * examples
    calibration = examples_of_lengths(lengths, model.config.vocab_size)
    sample = balanced_heads(layers, model.config.num_attention_heads, chosen or layers, heads)
    whole, intact = (counted_work(model, calibration, 4096, scored)["resumed"] for scored in (sample, ()))
    return lambda scored=sample: score_heads(model, calibration, 4096, heads=scored), whole - intact


def of_heads(call):
    def timed():
        return stopwatch(call)() - stopwatch(lambda: call(()))()

    return timed


def measured_points(points, repeats=5):
    product, product_flops = matrix_product(fastest_product(cpu, torch.float32, squares), cpu, torch.float32, 3)
    measures = {name: of_heads(call) for name, (call, _) in points.items()} | {"matrix product": stopwatch(product)}
    about = {"flops": {name: work for name, (_, work) in points.items()}, "product_flops": product_flops}
    return {"seconds": measured_rounds(measures, repeats), "about": about}


def axis_case(path, axis, values, middle=middle, repeats=5, shape=shape):
    def measure():
        return measured_points({str(value): point(**middle | {axis: value}, shape=shape) for value in values}, repeats)

    return measured_case(path, axis, {"repeats": repeats, "middle": middle, "values": values, "shape": shape}, measure)


def full_case(path, repeats=5, name="full batches", layers=30, **sizes):
    """All 30 layers and batches as large as `batch_tokens` allows: 16 examples of 256 tokens, one head of each of six layers."""
    sizes = dict(heads=1, tokens=256, examples=16, chosen=6) | sizes
    settings = {"repeats": repeats, "layers": layers, **sizes, "shape": sizes.get("shape", shape)}
    return measured_case(path, name, settings, lambda: measured_points({name: point(layers, **sizes)}, repeats))


if __name__ == "__main__":
    for axis, values in axes.items():
        print(axis, axis_case(path, axis, values)["seconds"])
    full_case(path)
