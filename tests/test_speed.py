"""Dense and pruned side by side, where nothing is said of time: products agree in every shape, and what is measured is what was asked for."""
import itertools

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fixtures import refuses, tiny_llama
from cap_nb.core.files import read_checked
from cap_nb.models.checks import zeros_of
from cap_nb.models.loading import load_model, save_model
from cap_nb.portable.speed import BACKENDS, SpeedSettings, bench_folder, check_same_sizes, filled, linears_of, speed_rows, speed_text
from programs import output_of

CPU = torch.device("cpu")
SPARSE = [name for name in ("csr", "scipy") if not BACKENDS[name].missing(CPU)]


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("shape", [(7, 5), (1, 9), (16, 16)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sparse_product_is_the_dense_one(name, shape, sparsity, dtype):
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=rng).to(dtype) * (torch.rand(shape, generator=rng) >= sparsity)
    for rows in (1, 2, 33):
        x = torch.randn(rows, shape[1], generator=rng).to(dtype)
        got = BACKENDS[name].product(weight)(x)
        assert got.dtype == dtype and torch.allclose(got.float(), x.float() @ weight.float().T, atol=1e-5 if dtype is torch.float32 else 0.05)


def test_zeros_are_filled_and_nothing_else():
    lab, _ = load_model("lab", "float32", "cpu")
    first = linears_of(lab)[0]
    with torch.no_grad():
        first.weight[:, ::2] = 0
    dense = filled(lab)
    there, here = linears_of(dense)[0].weight, first.weight
    assert zeros_of(dense)[0] == 0 < zeros_of(lab)[0] and torch.equal(there[:, 1::2], here[:, 1::2])


def test_a_model_without_linear_modules_is_a_sentence():
    refuses("elsewhere than in linear modules", linears_of, GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)).eval())


def test_prefill_and_decode_compute_what_they_should(monkeypatch):
    """The tokens that a model is given, in order: the prompt at once, then each token with the keys and values of those before it."""
    seen, lab = [], load_model("lab", "float32", "cpu")[0]
    lab.register_forward_pre_hook(lambda module, args, kwargs: seen.append((args[0].shape, any("cache" == name or "past" in name for name in kwargs))), with_kwargs=True)
    monkeypatch.setattr("cap_nb.portable.speed.load_model", lambda name, dtype, device: (lab, None))
    bench_folder("x", "y", SpeedSettings(batches=(3,), prompt=7, steps=2, rounds=1, backends=("torch",), device="cpu"), clock=itertools.count().__next__)
    prefill, decode = ((3, 7), False), [((3, 1), True)] * 2
    assert [(tuple(shape), past) for shape, past in seen] == [prefill] * 4 + [prefill] * 2 + decode * 4


def test_the_program_measures(tmp_path):
    words = ["bench", "lab", "--batches", "1,2", "--prompt", "4", "--steps", "1", "--rounds", "2", "--backends", "torch", "--device", "cpu", "--note", "a test"]
    assert "also running: a test" in output_of(*words, "--out", tmp_path / "r.json")
    record = read_checked(tmp_path / "r.json")
    assert set(record["seconds"]) == {f"{phase}, batch {batch}" for phase in ("prefill", "decode") for batch in (1, 2)}
    assert all(len(rounds) == 2 and min(rounds) > 0 for sides in record["seconds"].values() for rounds in sides.values())


@pytest.mark.parametrize("stored, asked", [("float32", None), ("bfloat16", None), ("bfloat16", "float32")])
def test_both_sides_have_one_dtype(stored, asked, tmp_path):
    """However the pruned folder is stored, beside a model in float32; every row and the record name the dtype, and another where a way computes in it."""
    model, tokenizer = load_model("lab", stored, "cpu")
    save_model(model, tokenizer, tmp_path / "half")
    settings = SpeedSettings(batches=(1, 2), prompt=4, steps=2, rounds=1, backends=("torch", "csr"), device="cpu", dtype=asked)
    record = bench_folder(tmp_path / "half", "lab", settings)
    dtype = asked or stored
    assert record["dtypes"] == {"dense, torch": dtype, "pruned, torch": dtype, "pruned, csr": "float32"}
    assert [about["dtype"] for about in record["models"].values()] == [dtype, dtype]
    alone = record | {"seconds": {case: {"pruned, csr": [1.0]} for case in record["seconds"]}}
    assert {row[-1] for row in speed_rows(alone)} == {""}, "nothing dense beside it"
    assert {row[1:3] for row in speed_rows(record)} == set(record["dtypes"].items()) and speed_text(record).count(f"in {dtype}") == 2


def test_a_shrunk_model_that_is_pruned_afterwards_may_be_smaller():
    """Than the model that it was cut from, and than no other."""
    small, whole, other = tiny_llama(intermediate_size=20), tiny_llama(intermediate_size=24), tiny_llama(intermediate_size=24, vocab_size=90)
    small.config.cap_nb = {"method": "magnitude", "before": {"removed": 2}}
    check_same_sizes(small, whole)
    refuses("differ in model.embed_tokens.weight", check_same_sizes, small, other)
    refuses("differ in", check_same_sizes, small, tiny_llama(intermediate_size=24, num_hidden_layers=1))
    small.config.cap_nb = {"method": "magnitude", "before": {"method": "wanda"}}
    refuses("differ in model.layers.0.mlp.gate_proj.weight", check_same_sizes, small, whole)
