"""Checkpoints larger than memory

> Prune a checkpoint of Llama-3-8B's shape, and compare time and memory with a plain copy of its files.

Paper: sections 3.3 and 3.4. In: a checkpoint of exactly that shape with random bfloat16 weights, 16 GB, made here shard
by shard. Out: `figures/benchmarks/streaming.json`. Wanted: at most twice the time of a plain copy, and at most 3 GiB
resident. Five rounds take some eight minutes.

The records are made, on a machine that does nothing else and has 40 GB of free disk, by

    python -m tools.benchmarks.streaming

or by `make benchmarks LARGE=1`. `CAP_NB_SCRATCH` names the folder in which the checkpoint is made and deleted again;
without it, it is the system's folder for temporary files. `CAP_NB_NOTE` says what else was running.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cap_nb.core.errors import BadInput
from cap_nb.jobs.costs import PUBLISHED
from cap_nb.methods.streaming import SHARD_INDEX, open_checkpoint
from tools.side_by_side import in_own_process, measured_case, measured_rounds, read_cases

# Names and shapes come from the model on the meta device, which holds no numbers. Tensors fill a shard up to its size,
# then the next; only one shard is held at a time.

ROOT = Path(__file__).resolve().parents[2]
path = ROOT / "figures" / "benchmarks" / "streaming.json"
note, llama = os.environ.get("CAP_NB_NOTE", ""), PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"]


def shards_of(tensors, most):
    shards, held = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and held + 2 * tensor.numel() > most:
            shards, held = shards + [[]], 0
        shards[-1].append(name)
        held += 2 * tensor.numel()
    return shards


def random_checkpoint(folder, settings, most=2**30, seed=0):
    config, rng = AutoConfig.for_model(**settings), torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        tensors = dict(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).named_parameters())
    shards = shards_of(tensors, most)
    names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for file, held in zip(names, shards):
        made = {name: torch.empty(tensors[name].shape).normal_(0, 0.02, generator=rng).bfloat16() for name in held}
        save_file(made, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": 2 * sum(t.numel() for t in tensors.values())},
        "weight_map": {name: file for file, held in zip(names, shards) for name in held},
    }
    (folder / SHARD_INDEX).write_text(json.dumps(index))


# Each side runs in a process of its own, which tells its seconds and its resident memory at most. A plain copy leaves
# its bytes to the system, which writes them to the disk later; pruning returns when all is on the disk. So there are
# two copies: the plain one, and one that also waits for the disk. Before each call the result of the last call is
# deleted, the disk is brought to rest, and the source is taken out of the system's memory, so that every side finds it
# on the disk; none of this is timed.


def forget(folder):
    for file in Path(folder).iterdir():
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fresh(function, src, dst, peaks, name, **given):
    shutil.rmtree(dst, ignore_errors=True)
    os.sync()
    forget(src)
    seconds, peak = in_own_process(function, src=str(src), dst=str(dst), **given)
    peaks.setdefault(name, []).append(peak)
    return seconds


def streaming_sides(src, dst, peaks, sparsity=0.2):
    here = "tools.side_by_side"
    return {
        "copy": lambda: fresh("shutil:copytree", src, dst, peaks, "copy"),
        "copy to disk": lambda: fresh(f"{here}:copied_to_disk", src, dst, peaks, "copy to disk"),
        "prune": lambda: fresh(f"{here}:pruned_by_made_factors", src, dst, peaks, "prune", sparsity=sparsity),
    }


# The method is CAP with made-up factors between 1 and 10, since a random model has no causal scores worth measuring.
# The folder needs room for the checkpoint and one result, with a quarter to spare.


def streaming_case(path, name, settings, scratch=None, repeats=5, most=2**30):
    def measure():
        peaks, folder = {}, Path(tempfile.mkdtemp(prefix="cap_nb-", dir=scratch))
        try:
            random_checkpoint(folder / "src", settings, most)
            seconds = measured_rounds(streaming_sides(folder / "src", folder / "dst", peaks), repeats, warmups=0)
            checkpoint = open_checkpoint(folder / "src")
            about = {
                "bytes": sum(shard.stat().st_size for shard in checkpoint.shards),
                "shards": len(checkpoint.shards),
                "weights": sum(p.numel() for p in checkpoint.model.parameters()),
                "seed": 0,
            }
            return {"seconds": seconds, "about": about | {"peaks": peaks}}
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return measured_case(
        path,
        name,
        {"repeats": repeats, "sparsity": 0.2, "method": "cap", "model": settings, "source": "on the disk"},
        measure,
        note=note,
    )


def check_room(folder, wanted=40 * 10**9):
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise BadInput(
            f"{folder} has {free / 1e9:.0f} GB of free disk: expected {wanted / 1e9:.0f} GB; "
            "name another folder with CAP_NB_SCRATCH."
        )


# The whole procedure on a toy of two layers, whose times say nothing: what is made can be opened, is cut into shards,
# and is pruned.


def main() -> None:
    scratch = os.environ.get("CAP_NB_SCRATCH") or tempfile.gettempdir()
    if "llama-3-8b" not in read_cases(path):
        check_room(scratch)
    streaming_case(path, "llama-3-8b", llama, scratch)["seconds"]


if __name__ == "__main__":
    main()
