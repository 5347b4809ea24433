"""A GGUF file from outside: what `load_model`, the program and llama.cpp make of it."""
import importlib.util
import logging

import pytest
import torch
import transformers
from hub import byte_tokenizer
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cap_nb.core import files
from fixtures import refuses, with_settings
from cap_nb.models.anatomy import anatomy
from cap_nb.models.lab import lab_tokenizer
from cap_nb.models.loading import load_model, load_tokenizer
from cap_nb.portable import quantised
from cap_nb.portable.quantised import export_gguf, planned_tensors, rows_of

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("gguf"), reason="the package gguf is not installed")
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}


def saved(folder, kind="llama", tokenizer=None, shards="100KB", **more):
    """A random model in float16, half of it zero, in several files."""
    torch.manual_seed(0)
    tokenizer = tokenizer or byte_tokenizer(("<|endoftext|>",), [("Ġ", "2")])
    model = KINDS[kind][0](KINDS[kind][1](**SIZES | {"vocab_size": 258} | more))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 * (torch.rand_like(weight) < 0.5) if weight.dim() > 1 else 1.0)
    model.half().save_pretrained(folder, max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tensor_is_read_some_rows_at_a_time(tmp_path, monkeypatch):
    folder = saved(tmp_path / "src")
    config = LlamaConfig.from_pretrained(folder)
    monkeypatch.setattr(files, "PIECE", 2048)
    for planned in planned_tensors(folder, config, "f16"):
        pieces = list(rows_of(planned))
        assert max(piece.size for piece in pieces) <= max(1024, planned.shape[-1] * (planned.head_size or 1))
        assert len(pieces) > 1 or len(planned.shape) == 1


def test_a_licence_is_named(tmp_path, caplog):
    """The one that the record of a pruning has; files are named in a warning, since none fits in."""
    from gguf import GGUFReader
    folder = saved(tmp_path / "src")
    with_settings(folder / "config.json", cap_nb=files.sealed({"base": {"license": "apache-2.0"}}))
    (folder / "Licence.txt").write_text("free")
    with caplog.at_level(logging.WARNING, "cap_nb"):
        export_gguf(folder, file := tmp_path / "x.gguf")
    assert "x.gguf cannot hold Licence.txt of the checkpoint" in caplog.text
    field = GGUFReader(file).get_field("general.license")
    assert bytes(field.parts[field.data[0]]) == b"apache-2.0"


@pytest.mark.parametrize("kind, tied", [("llama", True), ("qwen2", False)])
def test_load_model_reads_it(tmp_path, kind, tied):
    folder = saved(tmp_path / "src", kind, tie_word_embeddings=tied)
    export_gguf(folder, file := tmp_path / "src" / "x.gguf")
    (there, own), (back, tokenizer) = load_model(str(folder), "float32", "cpu"), load_model(str(file), device="cpu")
    assert tokenizer.eos_token == own.eos_token is not None, "the file's own tokenizer, not what lies beside it"
    ids = tokenizer("1 +", return_tensors="pt").input_ids # not " 2", which transformers cuts as Qwen2 does in a Qwen2
    assert ids.tolist() == load_tokenizer(str(folder))("1 +", return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        assert torch.equal(there(ids).logits, back(ids).logits)
    short, _ = load_model(str(file), "bfloat16", "cpu")
    assert {weight.dtype for weight in short.parameters()} == {torch.bfloat16}
    assert short.model.rotary_emb.inv_freq.dtype == torch.float32, "rotations are as exact as in a model that was saved"


@pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 4 ties whatever is stored")
@pytest.mark.parametrize("changed", [False, True])
def test_a_head_of_its_own_is_written_though_the_configuration_ties_it(tmp_path, changed):
    folder = saved(tmp_path / "src", shards="1GB", tie_word_embeddings=True)
    tensors = load_file(file := folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (-1 if changed else 1)
    save_file(tensors, file, metadata={"format": "pt"})
    export_gguf(folder, tmp_path / "x.gguf")
    there, back = (load_model(str(path), "float32", "cpu")[0](torch.arange(9)[None]).logits for path in (folder, tmp_path / "x.gguf"))
    assert torch.equal(there, back)
    assert len(planned_tensors(folder, LlamaConfig.from_pretrained(folder), "f16")) == len(tensors) - (not changed)


def test_rotations_that_transformers_does_not_read_are_refused(tmp_path):
    """It would read them as plain ones, and every logit would be another model's."""
    kind = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    new = transformers.__version__ >= "5"
    rotation = {"rope_parameters": kind | {"rope_theta": 10000.0}} if new else {"rope_theta": 10000.0, "rope_scaling": kind}
    export_gguf(saved(tmp_path / "src", **rotation), tmp_path / "x.gguf")
    refuses("has scaled rotations", load_model, str(tmp_path / "x.gguf"), device="cpu")


def test_eight_bits_are_dequantised_with_a_note(tmp_path, caplog):
    folder = saved(tmp_path / "src")
    export_gguf(folder, tmp_path / "tiny.gguf", "q8_0")
    with caplog.at_level(logging.WARNING, "cap_nb"):
        loaded, _ = load_model(str(tmp_path / "tiny.gguf"), device="cpu")
    assert "tiny.gguf was dequantised" in caplog.text and "not those of the original" in caplog.text
    there, _ = load_model(str(folder), "float32", "cpu")
    assert anatomy(loaded) == anatomy(there) and loaded.dtype == torch.float32
    up, wanted = (model.model.layers[1].mlp.up_proj.weight for model in (loaded, there))
    assert 0 < (up - wanted).abs().max() < 0.02 * wanted.abs().max()
    loaded.save_pretrained(tmp_path / "plain")


def test_a_file_without_a_tokenizer_is_a_sentence(tmp_path):
    export_gguf(saved(tmp_path / "src", tokenizer=lab_tokenizer(), vocab_size=711), tmp_path / "x.gguf")
    refuses("has no tokenizer", load_model, str(tmp_path / "x.gguf"), device="cpu")


SLOWED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10_000.0}


@pytest.mark.parametrize("case", ["llama", "qwen2", "slowed", "forgotten"])
def test_llama_cpp_writes_the_same(tmp_path, monkeypatch, case):
    """The next token's five likeliest, with their log-probabilities; with slowed rotations too, and not if these are forgotten."""
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp is not at hand (package xllamacpp)")
    kind = case if case in KINDS else "llama"
    folder = saved(tmp_path / "src", kind, **({} if case in KINDS else {"rope_scaling": SLOWED}))
    if case == "forgotten":
        monkeypatch.setattr(quantised, "rotation_divisors", lambda config: None)
    export_gguf(folder, tmp_path / "x.gguf")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup, settings.verbosity = str(tmp_path / "x.gguf"), 64, 1, False, 0
    model, ids = load_model(str(folder), "float32", "cpu")[0], [5, 80, 33, 120, 7, 61] * 5
    asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "logprobs": 5}
    answer = llama.Server(settings).handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    apart = max(abs(token["logprob"] - float(ours[token["id"]])) for token in answer)
    assert (apart < 0.02 and answer[0]["id"] == int(ours.argmax())) == (case != "forgotten")
