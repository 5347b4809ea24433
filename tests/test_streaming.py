"""Pruning a checkpoint folder piece by piece: the bits and the report of pruning in memory, whole or not at all, in little memory."""
import errno
import json
import os
import shutil
import signal
import weakref
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from fixtures import contents as files_of, linked, made_up_calibration, refuses, tiny_llama, with_settings, write_large
from programs import finished
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig

from cap_nb.methods.criteria import CRITERIA, dense_norms, Inputs
from cap_nb.models.anatomy import anatomy, decoder_layers, projections
from cap_nb.models.loading import in_memory
from cap_nb.core.errors import BadInput
from cap_nb.core.devices import memory_taken
from cap_nb.jobs.settings import changed, Job, SinglePruning
from cap_nb.regions import Factors, region_factors
from cap_nb.methods import streaming
from cap_nb.methods.layer_walk import layer_here
from cap_nb.methods.layers_on_disk import OnDisk, model_on_disk, prune_layers
from cap_nb.methods.prune import check_method, prune, prune_with
from cap_nb.methods.streaming import layer_file, measurements_for, open_hessians, save_hessians, solve_checkpoint, solved_weight
from cap_nb.methods.sparsegpt import MadeOnce
from cap_nb.methods.streaming import checkpoint_fingerprint, load_norms, open_checkpoint, prune_checkpoint, save_norms, write_rows
from cap_nb.methods.selection import CAP, Measurements, scores_of, zero_within
from cap_nb.methods.update import joint_update
from cap_nb.single_steps import prune_into
from cap_nb.threshold import prune_report
from proofs import TINY_MODELS, factors_read, tiny_calibration, tiny_model

IDS = torch.arange(12)[None]


def saved(folder, dtype=torch.bfloat16, kind=LlamaConfig, shards="4KB", change=None, **shape):
    """A small random checkpoint; its head size is not hidden size over heads."""
    model = tiny_llama(kind, **shape).to(dtype)
    if change:
        with torch.no_grad():
            for p in projections(model):
                change(p.module.weight)
    model.save_pretrained(folder, max_shard_size=shards)
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def factors_of(folder):
    config = json.loads((folder / "config.json").read_text())
    return 1 + 9 * torch.rand(config["num_hidden_layers"], config["num_attention_heads"], generator=torch.Generator().manual_seed(1))


def norms_of(folder):
    draw = torch.Generator().manual_seed(2)
    return {p.name: torch.rand(p.module.in_features, generator=draw) for p in projections(load(folder))}


def contents(folder):
    """Every tensor of a checkpoint as its dtype, shape and bytes."""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= {name: (t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in load_file(shard).items()}
    return found


def same(streamed, model, tmp_path, shards="4KB"):
    """The streamed folder holds the bits of the pruned model, and loads to the same logits."""
    model.save_pretrained(tmp_path / "memory", max_shard_size=shards)
    assert contents(streamed) == contents(tmp_path / "memory")
    with torch.no_grad():
        assert torch.equal(load(streamed)(IDS).logits, model(IDS).logits)


def left_behind(folder):
    return [path.name for path in folder.iterdir() if "new" in path.name]


@pytest.mark.parametrize("shape, sparsity, dtype", [
    ({}, 0.5, torch.bfloat16), ({}, 0.5, torch.float16), ({}, 0.5, torch.float32), ({}, 0.0, torch.bfloat16), ({}, 0.1, torch.bfloat16),
    ({"num_key_value_heads": 1, "tie_word_embeddings": True}, 0.5, torch.bfloat16), ({"num_hidden_layers": 12}, 0.1, torch.bfloat16)],
    ids=["half", "half, float16", "half, float32", "nothing", "a tenth", "1 group, tied", "12 layers"])
def test_cap_equals_pruning_in_memory(tmp_path, shape, sparsity, dtype):
    src = saved(tmp_path / "src", dtype, **shape)
    before, model = files_of(src), load(src)
    wanted = prune(model, "cap", sparsity, factors_of(src))
    assert prune_checkpoint(src, tmp_path / "new", sparsity, factors_of(src)) == wanted
    assert len(list(src.glob("*.safetensors"))) > 3 and files_of(src) == before
    same(tmp_path / "new", model, tmp_path)


@pytest.mark.parametrize("method", ["wanda@model", "cap_wanda"])
def test_measured_norms_give_what_prune_gives(tmp_path, method):
    """Under scope model `prune` uses the norms of the dense model, and so the two agree from the calibration set on."""
    src = saved(tmp_path / "src")
    model = load(src)
    calibration = made_up_calibration(5, shortest=8, k=1, step=0, prompt=3)
    save_norms(dense_norms(model, calibration), tmp_path / "norms.safetensors")
    factors = factors_read(method, factors_of(src))
    wanted = prune(model, method, 0.4, factors, calibration)
    assert prune_checkpoint(src, tmp_path / "new", 0.4, factors, method, tmp_path / "norms.safetensors") == wanted
    same(tmp_path / "new", model, tmp_path)


@pytest.mark.parametrize("ties", ["exact", "all"])
@pytest.mark.parametrize("key_value", ["mean", "max"])
def test_ties_are_taken_in_the_order_of_the_layers_not_of_the_shards(tmp_path, ties, key_value):
    """Weights of few values, zeros of both signs among them; in the shards layer 10 comes before layer 2."""
    def few(weight):
        weight.copy_((weight / 0.15).round() / 64)
        weight[0, :3] = torch.tensor([0.0, -0.0, -0.0])
    src = saved(tmp_path / "src", change=few, num_hidden_layers=12, shards="1GB")
    factors = torch.ones_like(factors_of(src))
    factors[5:, ::2] = 2.0
    model = load(src)
    wanted = prune(model, "cap", 0.6, Factors(factors, key_value=key_value), ties=ties)
    assert wanted.ties > 1000
    report = prune_checkpoint(src, tmp_path / "new", 0.6, Factors(factors, key_value=key_value), ties=ties, at_once=300)
    assert report == wanted
    dense = load(src)
    known = Measurements(regions=region_factors(dense, Factors(factors, key_value=key_value)))
    below = sum(int((scores_of(CAP, p, known) < wanted.threshold).sum()) for p in projections(dense))
    assert 0 < report.zeros - below < wanted.ties if ties == "exact" else report.zeros - below == wanted.ties
    same(tmp_path / "new", model, tmp_path, "1GB")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("method", ["magnitude", "magnitude@row"])
def test_zeros_that_are_there_already_count_and_keep_their_sign_if_they_stay(tmp_path, method, dtype):
    def sparse(weight):
        weight[:, 4:] = -0.0
        weight[1, 5:7] = torch.tensor([0.0, torch.finfo(dtype).smallest_normal / 4])
    src = saved(tmp_path / "src", dtype, change=sparse)
    model = load(src)
    wanted = prune(model, method, 0.3)
    assert wanted.reached > 0.7 and any(bool((p.module.weight.signbit() & (p.module.weight == 0)).any()) for p in projections(model))
    assert prune_checkpoint(src, tmp_path / "new", 0.3, method=method) == wanted
    same(tmp_path / "new", model, tmp_path)


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_the_size_of_a_piece_does_not_matter(tmp_path, at_once):
    src = saved(tmp_path / "src", change=lambda weight: weight.copy_((weight * 200).round() / 64))
    a = prune_checkpoint(src, tmp_path / "new", 0.4, factors_of(src), at_once=at_once)
    b = prune_checkpoint(src, tmp_path / "other", 0.4, factors_of(src))
    assert a == b and files_of(tmp_path / "new") == files_of(tmp_path / "other")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["cap", "magnitude@layer"])
def test_counted_magnitudes_and_counted_scores_give_the_same(tmp_path, monkeypatch, dtype, method):
    src = saved(tmp_path / "src", dtype)
    factors = factors_read(method, factors_of(src))
    counted = prune_checkpoint(src, tmp_path / "counted", 0.4, factors, method)
    monkeypatch.setattr(streaming, "REGIONS_AT_MOST", 0)
    monkeypatch.setattr(streaming, "counted_threshold", None)  # nothing may call it
    assert prune_checkpoint(src, tmp_path / "scored", 0.4, factors, method) == counted
    assert files_of(tmp_path / "scored") == files_of(tmp_path / "counted")


def test_weights_of_two_kinds_are_scored(tmp_path):
    src = saved(tmp_path / "src", torch.float32, shards="1GB")
    tensors = {name: t if "layers.0" in name else t.to(torch.bfloat16) for name, t in load_file(src / "model.safetensors").items()}
    save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
    report = prune_checkpoint(src, tmp_path / "streamed", 0.4, factors_of(src))
    model = AutoModelForCausalLM.from_pretrained(src, dtype=torch.float32)
    assert prune(model, "cap", 0.4, factors_of(src)) == report
    kept = load_file(tmp_path / "streamed" / "model.safetensors")
    assert all(torch.equal(p.module.weight, kept[f"{p.name}.weight"].float()) for p in projections(model))


def test_a_score_beyond_float32_is_refused(tmp_path):
    src = saved(tmp_path / "src", change=lambda weight: weight.view(-1)[:1].fill_(3e38))
    refuses("is not finite", prune_checkpoint, src, tmp_path / "streamed", 0.4, torch.full((3, 4), 10.0))
    assert prune_checkpoint(src, tmp_path / "plain", 0.4, method="magnitude").reached == pytest.approx(0.4, abs=1e-3)


def test_one_file_keeps_its_header(tmp_path):
    src = saved(tmp_path / "src", shards="1GB")
    assert [path.name for path in src.glob("*.safetensors*")] == ["model.safetensors"]
    prune_checkpoint(src, tmp_path / "new", 0.3, factors_of(src))
    assert [path.name for path in (tmp_path / "new").glob("*.safetensors*")] == ["model.safetensors"]
    old, new = ((folder / "model.safetensors").read_bytes() for folder in (src, tmp_path / "new"))
    begin = 8 + int.from_bytes(old[:8], "little")
    assert old[:begin] == new[:begin] and len(old) == len(new) and old != new
    with safe_open(tmp_path / "new" / "model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_what_belongs_to_the_model_comes_along_and_nothing_else(tmp_path):
    src = saved(tmp_path / "src")
    along = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE"]
    stays = ["README.md", "SHA256SUMS.json", "prune_report.json", "pytorch_model.bin", "modeling_own.py"]
    for name in along + stays:
        (src / name).write_text(name)
    (src / "additional_chat_templates").mkdir()
    (src / "additional_chat_templates" / "tools.jinja").write_text("tools")
    prune_checkpoint(src, tmp_path / "new", 0.3, factors_of(src))
    shards = [path.name for path in src.glob("*.safetensors")]
    made = {path.relative_to(tmp_path / "new").as_posix() for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert made == {*along, *shards, "config.json", "generation_config.json", "model.safetensors.index.json", "additional_chat_templates/tools.jinja"}
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert (tmp_path / "new" / name).read_bytes() == (src / name).read_bytes()


def test_a_folder_of_links_becomes_a_folder_of_files(tmp_path):
    blobs, src = saved(tmp_path / "blobs"), tmp_path / "src"
    linked(blobs, src)
    before = files_of(blobs)
    prune_checkpoint(src, tmp_path / "new", 0.3, factors_of(src))
    assert files_of(blobs) == before and not any(path.is_symlink() for path in (tmp_path / "new").iterdir())


def without(tensor, value=None):
    def change(src):
        shard = next(shard for shard in src.glob("*.safetensors") if tensor in load_file(shard))
        tensors = load_file(shard)
        old = tensors.pop(tensor)
        save_file(tensors if value is None else tensors | {tensor: value(old)}, shard, metadata={"format": "pt"})
    return change


def cut_off(src):
    shard = sorted(src.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-3])


KEY = "model.layers.1.self_attn.k_proj.weight"


def with_nan(weight):
    weight[0, 0] = torch.nan
    return weight


DAMAGE = {
    "quantised": (lambda src: with_settings(src / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "is quantised"),
    "missing shard": (lambda src: sorted(src.glob("*.safetensors"))[2].unlink(), "a shard that the index names"),
    "cut off": (cut_off, "is damaged"),
    "missing weight": (without(KEY), KEY),
    "8 bits": (without(KEY, lambda w: w.to(torch.int8)), f"{KEY} is stored as I8"),
    "other shape": (without(KEY, lambda w: w[:-1].contiguous()), f"{KEY} has shape [11, 20]: expected [12, 20]"),
    "not a number": (without(KEY, with_nan), "is not finite"),
}


def refused(place, sentence, sparsity=0.3, **options):
    with pytest.raises(BadInput) as error:
        prune_checkpoint(place / "src", place / "new", sparsity, **options)
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert left_behind(place) == []


@pytest.mark.parametrize("what", DAMAGE)
def test_a_checkpoint_that_cannot_be_pruned_is_refused_in_one_sentence(tmp_path, what):
    src = saved(tmp_path / "src")
    factors, (change, sentence) = factors_of(src), DAMAGE[what]
    change(src)
    refused(tmp_path, sentence, factors=factors)


def test_a_wrong_call_is_refused_in_one_sentence(tmp_path):
    src = saved(tmp_path / "src")
    factors, norms = factors_of(src), norms_of(src)
    name = next(iter(norms))
    wrong = [(dict(factors=-factors), "not a positive finite number"), (dict(factors=factors, sparsity=1.0), "outside [0, 1)"),
             (dict(method="wanda", norms={k: v for k, v in norms.items() if k != name}), f"The input norms of {name}"),
             (dict(method="wanda", norms=norms | {name: norms[name][1:]}), f"The input norms of {name}"),
             (dict(method="wanda", norms=norms | {name: -norms[name]}), f"The input norms of {name}"),
             (dict(factors=factors, method="cap@3:8", sparsity=0.375), "does not divide into groups of 8")]
    for options, sentence in wrong:
        refused(tmp_path, sentence, **options)
    for taken in (src, src / "config.json"):
        before = files_of(src)
        refuses("exists already", prune_checkpoint, src, taken, 0.3, factors)
        assert files_of(src) == before


def test_norms_say_where_they_come_from(tmp_path):
    save_norms({"a": torch.ones(3, dtype=torch.float64)}, tmp_path / "norms.safetensors", {"model": "abc"})
    norms, meta = load_norms(tmp_path / "norms.safetensors")
    assert meta == {"model": "abc"} and norms["a"].tolist() == [1, 1, 1] and norms["a"].dtype == torch.float32


def test_a_checkpoint_that_is_replaced_while_it_is_pruned_is_noticed(tmp_path, monkeypatch):
    """By one of the same size, which no length tells."""
    src, write_pruned = saved(tmp_path / "src"), streaming.write_pruned
    shard, *_ = sorted(src.glob("*.safetensors"))

    def replaced(*arguments):
        (tmp_path / "other").write_bytes(shard.read_bytes())
        (tmp_path / "other").replace(shard)
        return write_pruned(*arguments)
    monkeypatch.setattr(streaming, "write_pruned", replaced)
    refuses("was changed while it was pruned", prune_checkpoint, src, tmp_path / "new", 0.3, factors_of(src))
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize("step", ["prune", "solve"])
@pytest.mark.parametrize("error, seen", [(OSError(errno.ENOSPC, "No space left on device"), BadInput), (OSError(errno.EIO, "Input/output error"), OSError),
                                         (KeyboardInterrupt(), KeyboardInterrupt)], ids=["full disk", "broken disk", "Ctrl-C"])
def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch, error, seen, step):
    src, calls, write_rows = saved(tmp_path / "src"), [], streaming.write_rows
    if step == "solve":
        save_hessians(load(src), made_up_calibration(12, shortest=8), tmp_path / "G")
    before = files_of(src)

    def failing(*arguments):
        calls.append(left_behind(tmp_path))
        if len(calls) >= 5:  # several threads write
            raise error
        write_rows(*arguments)
    monkeypatch.setattr(streaming, "write_rows", failing)
    with pytest.raises(seen) as raised:
        prune_checkpoint(src, tmp_path / "new", 0.3, factors_of(src)) if step == "prune" else solve_checkpoint(src, tmp_path / "new", 0.5, tmp_path / "G")
    assert len(calls) >= 5 and calls[4] and "new" not in calls[4]  # there was a temporary folder, under another name
    assert left_behind(tmp_path) == [] and files_of(src) == before
    assert seen is not BadInput or "There was no room to write" in str(raised.value) and "nothing of it was left behind" in str(raised.value)


def test_too_little_disk_is_refused_before_work_begins(tmp_path, monkeypatch):
    src, usage = saved(tmp_path / "src"), namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 0, 10_000))
    monkeypatch.setattr(streaming, "read_rows", lambda piece: pytest.fail("work began"))
    refuses("the disk has 10,000 left", prune_checkpoint, src, tmp_path / "new", 0.3, factors_of(src))
    assert left_behind(tmp_path) == []


def test_a_killed_process_leaves_nothing_under_the_final_name(tmp_path):
    src, calls = saved(tmp_path / "src"), []

    def killed():
        def dying(*arguments):
            calls.append(arguments)
            if len(calls) >= 9:
                os.kill(os.getpid(), signal.SIGKILL)
            write_rows(*arguments)
        streaming.write_rows = dying  # of the forked process alone
        prune_checkpoint(src, tmp_path / "new", 0.3, method="magnitude")
    assert finished(killed, draws=False).returncode == -signal.SIGKILL and not (tmp_path / "new").exists()
    model = load(src)
    assert prune_checkpoint(src, tmp_path / "new", 0.3, method="magnitude") == prune(model, "magnitude", 0.3)
    same(tmp_path / "new", model, tmp_path)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak memory, and lets it be set back")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A single file of about 230 MB, in a process of its own."""
    config = LlamaConfig(hidden_size=1536, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=4, vocab_size=4000)
    with torch.device("meta"):
        shapes = {name: tuple(w.shape) for name, w in AutoModelForCausalLM.from_config(config).named_parameters()}
    config.save_pretrained(tmp_path / "src")
    size = write_large(tmp_path / "src" / "model.safetensors", shapes, torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16())

    def measured():
        with memory_taken(torch.device("cpu")) as taken:
            report = prune_checkpoint(tmp_path / "src", tmp_path / "new", 0.5, torch.ones(4, 12))
        print(report.reached, report.weights, taken[0])
    done = finished(measured, draws=False)
    assert done.returncode == 0, done.stderr
    reached, weights, taken = done.stdout.split()
    assert size > 220e6 and 2 * int(weights) > 0.8 * size and abs(float(reached) - 0.5) < 1e-6
    assert 1e6 < int(taken) < 150e6, f"{int(taken) / 1e6:.0f} MB for a checkpoint of {size / 1e6:.0f} MB"
    open_checkpoint(tmp_path / "new")
    for folder in ("src", "new"):
        shutil.rmtree(tmp_path / folder)


# Hessians from a folder


@pytest.mark.parametrize("kind, method", [*((kind, "sparsegpt") for kind in ("gpt2", "phi3", "mixtral", "qwen2_moe")), # a Llama: on the page
                                          ("gpt2", "alps"), ("mixtral", "alps"), ("phi3", "wanda^swaps^update"), ("mixtral", "wanda^swaps^update")])
def test_every_layout_is_solved_as_in_memory(tmp_path, kind, method):
    """Fused and transposed weights, experts in stacks: each matrix as a contiguous copy of the loaded model's, solved by itself."""
    name = next(name for name, (model_type, _) in TINY_MODELS.items() if model_type == kind)
    tiny_model(name).save_pretrained(tmp_path / "src", max_shard_size="8KB")
    calibration = tiny_calibration()
    save_hessians(load(tmp_path / "src"), calibration, tmp_path / "G")
    report = solve_checkpoint(tmp_path / "src", tmp_path / "new", 0.5, tmp_path / "G", method)
    model, new, parts, once = load(tmp_path / "src"), load(tmp_path / "new"), check_method(method), MadeOnce()
    given = open_hessians(tmp_path / "G", open_checkpoint(tmp_path / "src"), checkpoint_fingerprint(tmp_path / "src"))
    dense = {p.name: p.weight.detach().clone().contiguous() for p in projections(model)}
    if parts.base == "wanda":
        measured = measurements_for(open_checkpoint(tmp_path / "src"), "wanda", None, given.norms())
        zero_within(projections(model), CRITERIA["wanda"], measured, 0.5, "row")
    with torch.no_grad():
        for p in projections(model):
            pruned = p.weight.clone().contiguous() if parts.base == "wanda" else None
            p.weight.copy_(solved_weight(dense[p.name], pruned, given.read(p.name), parts, 0.5, p.name, once))
    assert all(torch.equal(p.weight, q.weight) for p, q in zip(projections(new), projections(model), strict=True))
    assert report == prune_report(model, method, 0.5)
    outside = {id(p.parameter) for p in projections(new)}
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), load(tmp_path / "src").parameters()) if id(a) not in outside)


def test_wanda_takes_the_norms_that_hessians_hold(tmp_path):
    src = saved(tmp_path / "src")
    save_hessians(load(src), made_up_calibration(12, shortest=8), tmp_path / "G")
    norms = open_hessians(tmp_path / "G", open_checkpoint(src), checkpoint_fingerprint(src)).norms()
    by_hessians = solve_checkpoint(src, tmp_path / "new", 0.5, tmp_path / "G", "wanda")
    assert by_hessians == prune_checkpoint(src, tmp_path / "other", 0.5, method="wanda", norms=norms)
    assert all(torch.equal(p.weight, q.weight) for p, q in zip(projections(load(tmp_path / "new")), projections(load(tmp_path / "other")), strict=True))


def test_hessians_of_another_model_or_half_a_folder_are_refused(tmp_path):
    src, other = saved(tmp_path / "src"), saved(tmp_path / "other", torch.float32)
    save_hessians(load(src), made_up_calibration(12, shortest=8), tmp_path / "G")
    refuses("a model with other weights, or of another dtype", solve_checkpoint, other, tmp_path / "new", 0.5, tmp_path / "G")
    refuses("another model or other examples", save_hessians, load(other), made_up_calibration(12, shortest=8), tmp_path / "G")
    for damage in (layer_file(tmp_path / "G", 1).read_bytes()[:-1], b""):
        layer_file(tmp_path / "G", 1).write_bytes(damage)
        refuses("layer-00001.safetensors holds no Hessians", solve_checkpoint, src, tmp_path / "new", 0.5, tmp_path / "G")
    layer_file(tmp_path / "G", 1).unlink()
    refuses("holds no Hessians", solve_checkpoint, src, tmp_path / "new", 0.5, tmp_path / "G")
    assert left_behind(tmp_path) == []


# A layer at a time


def in_memory_and_from_disk(tmp_path, name, method, **given):
    """The model as pruned in memory, and a report and model as pruned from a folder."""
    tiny_model(name).save_pretrained(tmp_path / "src", max_shard_size="8KB")
    model = in_memory(load(tmp_path / "src")) # weights that are mapped from a file lie otherwise, and products round otherwise
    heads = anatomy(model)
    inputs = Inputs(calibration=tiny_calibration(), factors=1 + 9 * torch.rand(heads.layers, heads.heads, generator=torch.Generator().manual_seed(0)), **given)
    return model, prune_with(model, method, 0.5, inputs), prune_layers(tmp_path / "src", tmp_path / "new", method, 0.5, inputs), inputs


@pytest.mark.parametrize("name, method", [
    ("llama", "alps^block"), ("gpt2", "cap^block_apart"), ("mixtral", "wanda"), ("phi3", "wanda@model^update"), ("qwen2_moe", "sparsegpt^block_own"),
    ("granitemoe", "cap^block"), ("opt", "cap_wanda@row"), ("falcon, full attention, linear bias", "ria"), ("deepseek_v3, one dense layer", "wanda^block"), ("gemma3", "rgs")])
def test_a_layer_at_a_time_is_pruned_as_in_memory(tmp_path, name, method):
    """Fused and transposed weights, stacks of experts, learned positions, two rotary embeddings: every parameter and the report."""
    model, wanted, report, _ = in_memory_and_from_disk(tmp_path, name, method)
    assert report == wanted and wanted.zeros > 0
    for (key, pruned), (_, kept) in zip(load(tmp_path / "new").named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(pruned, kept) and pruned.dtype == kept.dtype, key


@pytest.mark.parametrize("dtype, said", [(torch.bfloat16, "bfloat16"), (torch.float16, "float16"), (torch.float32, "bfloat16")])
@pytest.mark.parametrize("name", ["gptj", "gemma3", "gemma", "glm4_moe, one dense layer", "opt", "phi3", "falcon, full attention, linear bias"])
def test_buffers_are_those_of_the_loaded_model(tmp_path, name, dtype, said):
    """Angles and scales that are not saved are computed in some dtype, whatever the configuration says of the weights."""
    tiny_model(name).to(dtype).save_pretrained(tmp_path / "src")
    with_settings(tmp_path / "src" / "config.json", dtype=said)
    loaded, checkpoint = AutoModelForCausalLM.from_pretrained(tmp_path / "src", dtype=dtype).eval(), open_checkpoint(tmp_path / "src")
    model = model_on_disk(checkpoint, tmp_path, torch.device("cpu"))
    for (key, here), (_, there) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
        assert here.dtype == there.dtype and torch.equal(here, there), key
    for index, layer in enumerate(decoder_layers(loaded)):
        with layer_here(model, index, changed=False):
            for (key, here), (_, there) in zip(decoder_layers(model)[index].named_parameters(), layer.named_parameters(), strict=True):
                assert here.dtype == there.dtype and torch.equal(here, there), key


@pytest.mark.parametrize("dtype, method", [(torch.bfloat16, "alps^block"), (torch.float16, "cap^block")])
@pytest.mark.parametrize("kind", [LlamaConfig, Gemma3TextConfig])
def test_layers_of_16_bits_are_pruned_as_in_memory(tmp_path, kind, dtype, method):
    src = saved(tmp_path / "src", dtype, kind)
    model, inputs = in_memory(load(src)), Inputs(calibration=made_up_calibration(8, shortest=8), factors=factors_of(src))
    assert prune_layers(src, tmp_path / "new", method, 0.5, inputs) == prune_with(model, method, 0.5, inputs)
    same(tmp_path / "new", model, tmp_path)


@pytest.mark.parametrize("method", ["wanda", "alps^block"])
def test_no_more_than_one_layer_is_in_memory(tmp_path, monkeypatch, method):
    """When a layer is read, nothing holds a parameter of another one any more."""
    read, alive, src = OnDisk.read, [], saved(tmp_path / "src")

    def watched(disk, index):
        assert not [reference for reference in alive if reference() is not None]
        alive[:] = []
        scope, others = read(disk, index)
        alive.extend(weakref.ref(weight) for weight in decoder_layers(disk.model)[index].parameters())
        return scope, others

    monkeypatch.setattr(OnDisk, "read", watched)
    prune_layers(src, tmp_path / "new", method, 0.5, Inputs(calibration=made_up_calibration(5, shortest=8)))
    assert len(alive) == 9


def test_what_would_not_be_the_bytes_of_memory_is_refused(tmp_path):
    """Weights that loading casts to the dtype of most; a word for ties that memory does not know; one example to train a layer on."""
    inputs = Inputs(calibration=made_up_calibration(5, shortest=8))
    src = saved(tmp_path / "src", shards="1GB")
    weights = load_file(src / "model.safetensors")
    wide = {name: tensor.float() if "down_proj" in name else tensor for name, tensor in weights.items()}
    mixed = shutil.copytree(src, tmp_path / "mixed")
    save_file(wide, mixed / "model.safetensors", metadata={"format": "pt"})
    refuses("down_proj is stored in another dtype than most weights", prune_layers, mixed, tmp_path / "new", "wanda", 0.5, inputs)
    refuses("Unknown treatment of ties", prune_layers, src, tmp_path / "new", "wanda", 0.5, replace(inputs, ties="some"))
    one = replace(inputs, calibration=made_up_calibration(1, shortest=8, k=1))
    refuses("There is one calibration example", prune_layers, src, tmp_path / "new", "cap^block", 0.5, replace(one, factors=factors_of(src)))
    assert left_behind(tmp_path) == [] and not (tmp_path / "new").exists()


def test_room_is_asked_for_the_finished_layers_too(small_lab, tmp_path, monkeypatch):
    """Those of a solver lie beside the new folder until it is whole; Wanda keeps none."""
    size = sum(shard.stat().st_size for shard in small_lab.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda place: namedtuple("usage", "total used free")(0, 0, int(1.5 * size)))
    job = changed(Job(), name=str(small_lab), tasks=("lab-arc",), n=2, k=1)
    how = SinglePruning(method="alps", stream=True)
    refuses("with its finished layers until then, takes", prune_into, job, how, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    prune_into(job, replace(how, method="wanda"), tmp_path / "new")


def test_a_walk_from_disk_that_is_stopped_goes_on(tmp_path, monkeypatch):
    """Layers that are finished are not solved again; before the end there is no folder, and afterwards it is what it would have been."""
    src, calls = saved(tmp_path / "src"), []

    def until_third(weight, *rest, **named):
        calls.append(named["name"])
        if "layers.2" in named["name"] and len(calls) < 20: raise KeyboardInterrupt
        return joint_update(weight, *rest, **named)

    monkeypatch.setattr("cap_nb.methods.prune.joint_update", until_third)
    inputs = Inputs(calibration=made_up_calibration(12, shortest=8), unfinished=tmp_path / "unfinished")
    with pytest.raises(KeyboardInterrupt):
        prune_layers(src, tmp_path / "new", "alps", 0.5, inputs)
    assert not (tmp_path / "new").exists() and left_behind(tmp_path) == [] and len(calls) == 15
    calls[:] = [None] * 20
    report = prune_layers(src, tmp_path / "new", "alps", 0.5, replace(inputs, fingerprint=checkpoint_fingerprint(src)))
    assert all("layers.2" in name for name in calls[20:]) and len(calls) == 27
    model = in_memory(load(src))
    assert prune_with(model, "alps", 0.5, Inputs(calibration=inputs.calibration)) == report
    same(tmp_path / "new", model, tmp_path)
