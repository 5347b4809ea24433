"""Checkpoints larger than memory

> Prune a checkpoint of Llama-3-8B's shape, and compare time and memory with a plain copy of its files; pack it, and restore it.

In: a checkpoint of exactly that shape with random bfloat16 weights, 16 GB, made here shard by shard. Out:
`figures/benchmarks/streaming.json`. Wanted: at most twice the time of a plain copy, and at most 3 GiB resident, for CAP and for Wanda
with given norms. Then, once: half of the weights zero by magnitude, packed as a bitmask and as a delta, and restored from both, for
`figures/benchmarks/small_files.json`. Wanted: every byte again, and at most 3 GiB resident in each step. The records are made, on a
machine that does nothing else and has 50 GB of free disk, by `python -m tools.benchmarks.streaming` or `make benchmarks LARGE=1`.
`CAP_NB_SCRATCH` names the folder in which the checkpoint is made and deleted again.

Each side runs in a process of its own, which tells its seconds and its resident memory at most. A plain copy leaves its bytes to the
system, which writes them later; pruning returns when all is on the disk, and so does a second copy. Before each call the last result
is deleted, the disk is brought to rest, and the source is taken out of the system's memory; none of this is timed.
"""
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cap_nb.core.errors import BadInput
from cap_nb.core.files import sha256_of_file, sha256_of_text, stored_tensors
from cap_nb.jobs.planning import PUBLISHED
from cap_nb.methods.streaming import SHARD_INDEX, open_checkpoint, prune_checkpoint
from cap_nb.models.anatomy import anatomy, projections
from cap_nb.portable.format import PACKED
from tools.side_by_side import RECORDS, in_own_process, measured_case, measured_rounds, read_cases

path, small = RECORDS / "streaming.json", RECORDS / "small_files.json"
llama = PUBLISHED["meta-llama/Meta-Llama-3-8B-Instruct"]


def random_checkpoint(folder, settings, most=2**30, seed=0):
    config, rng = AutoConfig.for_model(**settings), torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        tensors = dict(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).named_parameters())
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=most)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for file, held in shards.filename_to_tensors.items():
        made = {name: torch.empty(tensors[name].shape).normal_(0, 0.02, generator=rng).bfloat16() for name in held}
        save_file(made, folder / file, metadata={"format": "pt"})
    index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
    (folder / SHARD_INDEX).write_text(json.dumps(index))


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


def copied_to_disk(src, dst):
    "Copy a folder, and wait until the disk has it."
    shutil.copytree(src, dst)
    for file in Path(dst).iterdir():
        with open(file, "rb+") as opened:
            os.fsync(opened.fileno())


def pruned_by_made_factors(src, dst, sparsity):
    "Prune by CAP with random factors between 1 and 10."
    sizes = anatomy(open_checkpoint(src).model)
    factors = 1 + 9 * torch.rand(sizes.layers, sizes.heads, generator=torch.Generator().manual_seed(0))
    prune_checkpoint(src, dst, sparsity, factors)


def streaming_sides(src, dst, peaks, sparsity=0.2):
    here = "tools.benchmarks.streaming"
    return {"copy": lambda: fresh("shutil:copytree", src, dst, peaks, "copy"),
            "copy to disk": lambda: fresh(f"{here}:copied_to_disk", src, dst, peaks, "copy to disk"),
            "prune": lambda: fresh(f"{here}:pruned_by_made_factors", src, dst, peaks, "prune", sparsity=sparsity)}


def streaming_case(path, name, settings, scratch=None, repeats=5, most=2**30):
    def measure():
        with tempfile.TemporaryDirectory(prefix="cap_nb-", dir=scratch) as place:
            peaks, folder = {}, Path(place)
            random_checkpoint(folder / "src", settings, most)
            sides = streaming_sides(folder / "src", folder / "dst", peaks)
            seconds = measured_rounds(sides, repeats, warmups=0)
            checkpoint = open_checkpoint(folder / "src")
            about = {"bytes": sum(shard.stat().st_size for shard in checkpoint.shards),
                     "shards": len(checkpoint.shards),
                     "weights": sum(p.numel() for p in checkpoint.model.parameters()), "seed": 0}
            return {"seconds": seconds, "about": about | {"peaks": peaks}}

    asked = {"repeats": repeats, "sparsity": 0.2, "method": "cap", "model": settings, "source": "on the disk"}
    return measured_case(path, name, asked, measure)


def hashes_of(folder):
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {file.relative_to(folder).as_posix(): sha256_of_file(file) for file in files}


def packed_sizes(packed):
    "Bytes of all files, and of what stands for the packed matrices: masks, kept numbers and all headers."
    sizes = {file: file.stat().st_size for file in packed.rglob("*") if file.is_file()}
    weights = [file for file in sizes if file.name.endswith(PACKED)]
    tensors = [pair for file in weights for pair in stored_tensors(file).items()]
    plain = sum(stored.end - stored.start for name, stored in tensors if name.startswith("plain/"))
    return {"bytes": sum(sizes.values()), "matrices": sum(sizes[file] for file in weights) - plain}


def packed_steps(folder, sparsity):
    "Prune, pack and restore; gives seconds and peaks of every step, and what came of it."
    base, pruned = str(folder / "base"), folder / "pruned"
    bases, files = {"bitmask": None, "delta": base}, "cap_nb.portable.format"
    seconds, peaks, forms = {}, {}, {}

    def step(name, function, **given):
        taken, peaks[name] = in_own_process(function, **given)
        seconds[name] = (taken,)

    pruning = dict(src=base, dst=str(pruned), sparsity=sparsity, method="magnitude")
    step("prune", "cap_nb.methods.streaming:prune_checkpoint", **pruning)
    wanted, scope = hashes_of(pruned), projections(open_checkpoint(pruned).model)
    about = {"bytes": sum(file.stat().st_size for file in pruned.iterdir()), "files": len(wanted), "seed": 0,
             "matrices": 2 * sum(p.weight.numel() for p in scope), "sha256": sha256_of_text(json.dumps(wanted))}
    for form, given in bases.items():
        packed = str(folder / form)
        step(f"export, {form}", f"{files}:export_folder", folder=str(pruned), out=packed, form=form, base=given)
        forms[form] = packed_sizes(folder / form)
    shutil.rmtree(pruned)
    for form, given in bases.items():
        step(f"restore, {form}", f"{files}:restore_folder", folder=str(folder / form), out=str(pruned), base=given)
        if hashes_of(pruned) != wanted:
            raise BadInput(f"What came back from the {form} differs: expected every byte again; do not record it.")
        for done in (pruned, folder / form):
            shutil.rmtree(done)
    return {"seconds": seconds, "about": about | {"peaks": peaks, "packed": forms}}


def packed_case(path, name, settings, scratch=None, most=2**30, sparsity=0.5):
    def measure():
        with tempfile.TemporaryDirectory(prefix="cap_nb-", dir=scratch) as folder:
            random_checkpoint(Path(folder) / "base", settings, most)
            return packed_steps(Path(folder), sparsity)

    asked = {"sparsity": sparsity, "method": "magnitude", "dtype": "bfloat16", "model": settings}
    return measured_case(path, name, asked, measure)


def check_room(folder, wanted=50 * 10**9):
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise BadInput(f"{folder} has {free / 1e9:.0f} GB of free disk: expected {wanted / 1e9:.0f} GB; "
                       "name another folder with CAP_NB_SCRATCH.")


if __name__ == "__main__":
    scratch = os.environ.get("CAP_NB_SCRATCH") or tempfile.gettempdir()
    if "llama-3-8b" not in read_cases(path) or "llama-3-8b" not in read_cases(small):
        check_room(scratch)
    streaming_case(path, "llama-3-8b", llama, scratch)
    packed_case(small, "llama-3-8b", llama, scratch)

