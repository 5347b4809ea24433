"""Packed folders from outside: awkward checkpoints come back byte for byte, kills and damage do no harm, memory stays small, and mistakes are a sentence."""
import hashlib
import json
import os
import re
import signal
from collections import namedtuple
from dataclasses import replace
from io import FileIO
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures import contents, linked, refuses, tiny_llama, write_large
from programs import finished
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MixtralConfig

from cap_nb.core import files as files_module
from cap_nb.core.errors import BadInput
from cap_nb.core.devices import memory_taken
from cap_nb.methods.prune import prune
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.portable import format as format_module
from cap_nb.portable.format import CHECKSUM, MANIFEST, Manifest, export_folder, read_manifest, restore_folder, write_manifest

PACKED = ".packed.safetensors"


def comes_back(src, place, *base):
    """Packed, as a delta where a base is given, and restored a folder is the same, byte for byte."""
    export_folder(src, place / "small", *(("delta", *base) if base else ()))
    restore_folder(place / "small", place / "back", *base)
    assert contents(place / "back") == contents(src)


def state(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def saved(folder, dtype=torch.bfloat16, kind=LlamaConfig, shards="16KB", sparsity=0.5, **shape):
    """A small checkpoint with half of its weights zero, some of them negative zeros, and a NaN with a payload outside the scope."""
    model = tiny_llama(kind, **shape).to(dtype)
    model.save_pretrained(folder.with_name("base"), max_shard_size=shards)
    if sparsity:
        prune(model, "magnitude", sparsity)
    model.save_pretrained(folder, max_shard_size=shards)
    (folder / "tokenizer.json").write_text('{"made": "up"}\n')
    return folder


def made_awkward(folder):
    """Negative zeros, NaN, and a header with padding of its own, in every shard."""
    for shard in folder.glob("*.safetensors"):
        data = shard.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header, body = data[8:begin] + b" " * 24, bytearray(data[begin:])
        width = {"BF16": 2, "F16": 2, "F32": 4}[next(t["dtype"] for name, t in json.loads(header).items() if name != "__metadata__")]
        body[:width] = b"\0" * (width - 1) + b"\x80"
        body[width:2 * width] = b"\x05" + b"\0" * (width - 3) + b"\xc0\x7f" if width == 4 else b"\xa5\x7f"
        shard.write_bytes(len(header).to_bytes(8, "little") + header + body)


CASES = {
    "bfloat16": dict(), "float16": dict(dtype=torch.float16), "float32": dict(dtype=torch.float32), "one file": dict(shards="1GB"),
    "tied": dict(tie_word_embeddings=True), "experts": dict(kind=MixtralConfig, num_local_experts=4), "dense": dict(sparsity=0),
    "odd sizes": dict(hidden_size=21, num_attention_heads=3, num_key_value_heads=3, intermediate_size=23, vocab_size=51),
}


@pytest.mark.parametrize("case, piece", [*((case, 1 << 23) for case in CASES), ("odd sizes", 64), ("float32", 192)])
def test_the_round_trip_is_byte_equal(tmp_path, monkeypatch, case, piece):
    """Whole, and in pieces that are far smaller than the tensors."""
    for module in (files_module, format_module):
        monkeypatch.setattr(module, "PIECE", piece)
    src = saved(tmp_path / "src", **CASES[case])
    comes_back(src, tmp_path / "delta", tmp_path / "base")
    made_awkward(src)
    comes_back(src, tmp_path)
    packed = load_file(next((tmp_path / "small").glob(f"*{PACKED}")))
    assert (b"kept" in b" ".join(name.encode() for path in (tmp_path / "small").glob(f"*{PACKED}") for name in load_file(path))) == (case != "dense")
    assert "header" in packed


def test_a_folder_that_packing_does_not_make_smaller_is_told(tmp_path, caplog):
    """With both sizes, before it is packed; what is written is a little more, and of a pruned folder nothing is said."""
    src = saved(tmp_path / "src", sparsity=0)
    packed = export_folder(src, tmp_path / "small").files
    size = sum(path.stat().st_size for path in src.iterdir())
    [told] = [record.message for record in caplog.records]
    least = int(re.search(r"packed ([\d,]+) or a little more", told)[1].replace(",", ""))
    assert told.startswith(f"{src} takes {size:,} bytes") and "few of its weights are zero; prune it first with 'cap prune'." in told
    assert size < sum(entry.stored_bytes for entry in packed) and 0.99 * size < least < sum(entry.stored_bytes for entry in packed)
    caplog.clear()
    export_folder(saved(tmp_path / "pruned"), tmp_path / "pruned_small")
    export_folder(src, tmp_path / "masks", "delta", tmp_path / "base")
    assert not caplog.records


def test_strange_tensors_come_back(tmp_path):
    """Empty tensors, single numbers, odd counts, every dtype, names that safetensors allows, and numbers that are all zero."""
    draw = torch.Generator().manual_seed(0)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
             torch.float8_e4m3fn, torch.complex64]
    tensors = {f"{kind}/{count} ü": (torch.randn(count, generator=draw) * (torch.rand(count, generator=draw) < 0.3)).to(kind)
               for kind in kinds for count in (0, 1, 7, 8, 9, 130)}
    tensors |= {"plain/header": torch.zeros(40), "header": torch.zeros(3, 0, 5), "mask/x": torch.zeros(()), "kept/x": torch.ones(2, 3)}
    src = tmp_path / "src"
    (src / "deep" / "er").mkdir(parents=True)
    (src / "config.json").write_text("{}")
    (src / "deep" / "er" / "empty").touch()
    save_file(tensors, src / "model.safetensors", metadata={"b": "2", "a": "1"})
    comes_back(src, tmp_path)
    comes_back(src, tmp_path / "delta", src)


def test_a_folder_of_links_becomes_a_folder_of_files(tmp_path):
    blobs, src = saved(tmp_path / "blobs"), tmp_path / "src"
    linked(blobs, src)
    export_folder(src, tmp_path / "small")
    linked(tmp_path / "small", tmp_path / "linked")
    restore_folder(tmp_path / "linked", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(blobs) and not any(path.is_symlink() for path in (tmp_path / "back").iterdir())


@pytest.mark.parametrize("case", ["bfloat16", "tied", "experts"])
def test_loaded_as_it_is(tmp_path, case):
    """The weights, the dtype and the generation configuration of the folder; on one device or spread."""
    from cap_nb.models.lab import lab_tokenizer
    src = saved(tmp_path / "src", **CASES[case] | {"vocab_size": len(lab_tokenizer())})
    lab_tokenizer().save_pretrained(src)
    (src / "generation_config.json").write_text('{"max_new_tokens": 7}')
    export_folder(src, tmp_path / "small")
    wanted, _ = load_model(str(src), device="cpu")
    for options in (dict(device="cpu"), dict(device="auto"), dict(device="cpu", dtype="float32")):
        model, tokenizer = load_model(str(tmp_path / "small"), **options)
        plain, _ = load_model(str(src), **options)
        assert model_fingerprint(model) == model_fingerprint(plain) and not model.training
        assert model.generation_config.max_new_tokens == plain.generation_config.max_new_tokens == 7
    assert len(tokenizer) == len(lab_tokenizer()) and model_fingerprint(wanted) != model_fingerprint(model)


# Kills, and disks that break

def killed_at(number, step):
    """Work: a step that dies at its n-th write, three bytes into it; the files of the forked process alone are such."""
    left = iter(range(number))

    class Dying(FileIO):
        def write(self, data):
            if next(left, None) is None:
                super().write(bytes(data)[:3])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(data)

    def work():
        format_module.open = lambda path, mode="r", *rest: Dying(path, mode) if mode == "wb" else open(path, mode, *rest)
        step()
    return work


@pytest.mark.parametrize("step, form", [("export", "bitmask"), ("export", "delta"), ("restore", "bitmask"), ("restore", "delta")])
def test_a_killed_process_loses_one_file_at_most(tmp_path, step, form):
    """At a random write: nothing under the final name, finished files are not written again, and the end is the same."""
    src, base = saved(tmp_path / "src"), tmp_path / "base" if form == "delta" else None
    export_folder(src, tmp_path / "small", form, base)
    wanted = contents(tmp_path / "small" if step == "export" else src)

    def whole():
        export_folder(src, tmp_path / "out", form, base) if step == "export" else restore_folder(tmp_path / "small", tmp_path / "out", base)
    for at in np.random.default_rng(len(step + form)).integers(0, 16, 2):
        done = finished(killed_at(at, whole), draws=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (tmp_path / "out").exists()
        left = contents(tmp_path / "out.unfinished")
        assert all(wanted[name] == data for name, data in left.items() if not name.endswith(".part")), "half written under a final name"
        assert any(name.endswith(".part") for name in left)
    kept = {name: each for name, each in state(tmp_path / "out.unfinished").items() if not name.endswith(".part")}
    whole()
    assert contents(tmp_path / "out") == wanted and not (tmp_path / "out.unfinished").exists()
    assert kept.items() <= state(tmp_path / "out").items(), "a finished file was written again"


def test_a_source_that_changed_between_two_attempts_is_packed_again(tmp_path, monkeypatch):
    src = saved(tmp_path / "src")
    monkeypatch.setattr(format_module, "write_manifest", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_folder(src, tmp_path / "small")
    monkeypatch.undo()
    shard = sorted(src.glob("*.safetensors"))[1]
    save_file({name: tensor * 2 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    (src / "tokenizer.json").write_text("another")
    comes_back(src, tmp_path)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    src, first_reading = saved(tmp_path / "src", shards="1GB"), format_module.first_reading

    def changing(shard, *arguments):
        found = first_reading(shard, *arguments)
        save_file({name: torch.ones_like(tensor) for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
        return found
    monkeypatch.setattr(format_module, "first_reading", changing)
    refuses("changed while it was read", export_folder, src, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_too_little_disk_is_refused_before_work_begins(tmp_path, monkeypatch):
    src, usage = saved(tmp_path / "src"), namedtuple("usage", "total used free")
    export_folder(src, tmp_path / "small")
    monkeypatch.setattr(format_module.shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
    for step in (lambda: export_folder(src, tmp_path / "new"), lambda: restore_folder(tmp_path / "small", tmp_path / "new")):
        refuses("the disk has 1,000 left", step)
        assert not [path for path in tmp_path.iterdir() if "new" in path.name]


# Damage, and folders that were made to do harm

def test_every_flipped_bit_is_named(tmp_path):
    """In every file of a packed folder, at the start, in the middle, at the end."""
    src = saved(tmp_path / "src", shards="8KB", num_hidden_layers=1)
    export_folder(src, tmp_path / "small")
    for path in sorted((tmp_path / "small").iterdir()):
        good = path.read_bytes()
        for at in (0, len(good) // 2, len(good) - (2 if path.name == CHECKSUM else 1)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1:])
            if path.name == CHECKSUM and at > 64:
                continue  # the name beside the hash is for people
            with pytest.raises(BadInput) as error:
                restore_folder(tmp_path / "small", tmp_path / "new")
            assert path.name.removesuffix(".sha256") in str(error.value) and "\n" not in str(error.value)
            assert not [left for left in tmp_path.iterdir() if "new" in left.name]
        path.write_bytes(good)
    restore_folder(tmp_path / "small", tmp_path / "new")


def hashed(folder, files, **changes):
    """Write a list with a good hash, whatever it says."""
    write_manifest(folder, replace(Manifest(kind="bitmask", base=None, files=tuple(files)), **changes))


@pytest.mark.parametrize("name", ["../out", "/tmp/cap_nb_out", "..\\out"])
def test_no_name_leads_out(tmp_path, name):
    src = saved(tmp_path / "src")
    manifest = export_folder(src, tmp_path / "small")
    hashed(tmp_path / "small", (replace(entry, name=name) if entry.name == "tokenizer.json" else entry for entry in manifest.files))
    before = sorted(tmp_path.iterdir())
    for step in (lambda: restore_folder(tmp_path / "small", tmp_path / "new"), lambda: load_model(str(tmp_path / "small"))):
        with pytest.raises(BadInput, match="names a file") as error:
            step()
        assert "\n" not in str(error.value) and sorted(tmp_path.iterdir()) == before


def test_lists_that_do_not_fit_together(tmp_path):
    src = saved(tmp_path / "src")
    first, *rest = export_folder(src, tmp_path / "small").files
    lists = ([first, first, *rest], [replace(first, name=f"{first.name}/x", stored=f"{first.name}/x"), first, *rest],
             [replace(first, stored="../src/config.json"), *rest], [replace(first, bytes="many"), *rest], [replace(first, name=3), *rest])
    kinds = (dict(kind="delta"), dict(kind="delta", base={}), dict(base={"name": "a", "sha256": "b"}), dict(kind=["bitmask"]))
    for files, changes in (*((files, {}) for files in lists), *(([first, *rest], changes) for changes in kinds)):
        hashed(tmp_path / "small", files, **changes)
        refuses("packed.json is damaged", restore_folder, tmp_path / "small", tmp_path / "new")
    for text in ("[]", "3", "null", '{"format": "cap_nb packed folder", "version": 1}', "{", ""):
        (tmp_path / "small" / MANIFEST).write_text(text)
        (tmp_path / "small" / CHECKSUM).write_text(hashlib.sha256(text.encode()).hexdigest())
        refuses("packed.json", restore_folder, tmp_path / "small", tmp_path / "new")
    assert not [left for left in tmp_path.iterdir() if "new" in left.name]


def test_a_delta_inside_a_bitmask_is_damage(tmp_path):
    """The hashes are right, the list says bitmask, and the shard needs a base."""
    src = saved(tmp_path / "src", shards="1GB")
    export_folder(src, tmp_path / "delta", "delta", tmp_path / "base")
    manifest = read_manifest(tmp_path / "delta")
    hashed(tmp_path / "delta", manifest.files)
    refuses("is damaged", restore_folder, tmp_path / "delta", tmp_path / "new")
    refuses("is damaged", load_model, str(tmp_path / "delta"))


# Memory

@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak memory, and lets it be set back")
@pytest.mark.parametrize("form", ["bitmask", "delta"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, form):
    """A single file, three quarters of each matrix zero, one tensor of 100 MB among them; in a process of its own."""
    src, small, back, cpu = tmp_path / "src", tmp_path / "small", tmp_path / "back", torch.device("cpu")
    src.mkdir()
    (src / "config.json").write_text("{}")
    shapes, rng = {"embed": (12000, 4096)} | {f"layers.{layer}.{name}": (1536, 4096) for layer in range(2) for name in "abc"}, torch.Generator().manual_seed(0)
    noise = torch.where(torch.rand(1 << 20, generator=rng) < 0.25, torch.randn(1 << 20, generator=rng), 0.0).bfloat16()
    size, base = write_large(src / "model.safetensors", shapes, noise), src if form == "delta" else None

    def measured():
        with memory_taken(cpu) as packing:
            export_folder(src, small, form, base)
        with memory_taken(cpu) as restoring:
            restore_folder(small, back, base)
        print(packing[0], restoring[0])
    done = finished(measured, draws=False)
    assert done.returncode == 0, done.stderr
    for taken in map(int, done.stdout.split()):
        assert size > 170e6 and taken < 80e6, f"{taken / 1e6:.0f} MB for a checkpoint of {size / 1e6:.0f} MB"
    assert len({files_module.sha256_of_file(folder / "model.safetensors") for folder in (src, back)}) == 1
