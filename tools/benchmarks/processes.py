"""Several processes

> How much faster two processes of one thread each score than one, and that two, four and eight give the same bytes.

In: random weights in the shape of SmolLM2 with six layers, four examples of 128 tokens, each a batch. Out:
`figures/benchmarks/processes.json`. Wanted: 0.85 of twice the speed of one. The record is made in about three minutes, on a
machine of two cores or more that does nothing else, by `python -m tools.benchmarks.processes`. Each process makes the model anew
from the seed; the clock runs from the moment when all have it to the moment when the first one has the whole table.
"""
import hashlib
import multiprocessing
import os
import socket
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig

from cap_nb.core.errors import BadInput
from cap_nb.jobs.planning import ExampleLength
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.methods.layer_walk import joined
from cap_nb.models.loading import model_fingerprint
from cap_nb.portable.speed import span_text
from tools.benchmarks.scaling import shape
from tools.side_by_side import RECORDS, all_heads, counted_work, examples_of_lengths, measured_case, random_model, wanted_text

path = RECORDS / "processes.json"
sizes = dict(layers=6, tokens=128, examples=4, shape=shape)


def scored(layers, tokens, examples, shape):
    "The model and its examples."
    model = random_model(AutoConfig.for_model("llama", num_hidden_layers=layers, **shape))
    return model, examples_of_lengths([ExampleLength("made", tokens - tokens // 4, tokens // 4)] * examples, model.config.vocab_size)


def process(rank, count, port, store, sizes, said):
    "One of several processes: the first one says how long it took, and the hash of the table."
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    model, examples = scored(**sizes)
    with joined(torch.device("cpu")) as share:
        share.wait()
        start = time.perf_counter()
        score_heads(model, examples, sizes["tokens"], store, share=share)
        seconds = time.perf_counter() - start
    if rank == 0:
        said.put((seconds, hashlib.sha256(next(Path(store).glob("*.safetensors")).read_bytes()).hexdigest()))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(count, sizes, context="spawn"):
    "Seconds that so many processes take, and the hash of their table."
    start = multiprocessing.get_context(context)
    said = start.Queue()
    port = free_port()
    with tempfile.TemporaryDirectory() as store:
        ranks = [start.Process(target=process, args=(rank, count, port, store, sizes, said)) for rank in range(count)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    if any(rank.exitcode for rank in ranks):
        raise BadInput(f"One of {count} processes failed: expected all to end well; see what it said above.")
    return said.get()


def predicted(sizes, count):
    "The efficiency that the operations allow: the masked passes are shared, and every process walks the intact model."
    model, examples = scored(**sizes)
    alone, whole = (counted_work(model, examples, sizes["tokens"], heads)["resumed"] for heads in ((), all_heads(model)))
    predicted = whole / (count * alone + whole - alone)
    return {"model": model_fingerprint(model), "calibration": examples.fingerprint, "predicted": predicted}


def processes_case(path, repeats=5, sizes=sizes, same=(4, 8), context="spawn"):
    def measure():
        seconds, hashes = {"1": [], "2": []}, {}
        for number in range(repeats):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                taken, hashes[str(count)] = together(count, sizes, context)
                seconds[str(count)].append(taken)
        hashes |= {str(count): together(count, sizes, context)[1] for count in same}
        if len(set(hashes.values())) != 1:
            raise BadInput(f"The tables differ, {hashes}: expected the same bytes from any number of processes.")
        about = predicted(sizes, 2) | {"table": hashes["1"], "same bytes": [int(count) for count in hashes]}
        return {"seconds": {name: tuple(each) for name, each in seconds.items()}, "about": about}

    return measured_case(path, "two of one thread", {"repeats": repeats, "same": same, **sizes}, measure)


def efficiency(case):
    return tuple(one / (2 * two) for one, two in zip(case["seconds"]["1"], case["seconds"]["2"], strict=True))


if __name__ == "__main__":
    case = processes_case(path)
    print(f"efficiency of two: {span_text(efficiency(case))}{wanted_text(efficiency(case), 0.85)}")
    print(f"the operations allow {case['about']['predicted']:.2f}; same bytes: {case['about']['same bytes']}")
