"""Plans from a configuration alone: counts against real models, operations against torch's counter, memory against what is really held at once."""
import functools
import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from fixtures import made_up, made_up_calibration, tiny_config, tiny_llama
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from cap_nb.methods.criteria import Inputs, prune_by
from cap_nb.methods.prune import prune
from cap_nb.methods.screening import screen_heads
from cap_nb.data.prompts import IGNORED
from cap_nb.calibration import calibration_set
from cap_nb.data.batches import collate, token_batches
from cap_nb.models.anatomy import projections
from cap_nb.core.errors import BadInput
from cap_nb.models.lab import lab_tokenizer
from cap_nb.models.loading import load_model
from cap_nb.jobs import costs, planning
from cap_nb.jobs.costs import (
    ExampleLength, at_once, batch_shapes, chains_work, decode_work, evaluation_memory, flops_of, layer_weights,
    lengths_of, naive_work, parameter_count, prefill_work, projection_shapes, read_sizes, resumed_work, scoring_memory,
    sizes_of, solver_memory, spectra_flops, spectrum_flops, threshold_memory, wanda_memory, wanda_work)
from cap_nb.jobs.planning import Probe, free_memory, measured_plan, plan, plan_advice, plan_text, probe_device
from cap_nb.jobs.scale import Claimer, claims, scale_text, unit_flops
from cap_nb.jobs.settings import Job, changed
from cap_nb.models.decoding import Decoding, generate_greedy, generate_noted
from cap_nb.methods.resumed_scoring import score_divergences, score_heads
from cap_nb.scoring import score_heads_naive, target_losses

GIB = 2**30
# Wider than `tiny_llama` is by itself: the plan counts what grows with the model, and so little else may weigh anything
WIDER = dict(hidden_size=48, intermediate_size=160, head_dim=16, vocab_size=90, max_position_embeddings=2048)
PROBE = Probe(device="cpu", device_name="made up", dtype="float32", tokens=256, layer=1e-6, head=1e-7, rows=8, step=1e-4, step_rest=1e-5, threshold=1e-9, sort=1e-8, flops=1e9, seconds=1.0)


def random_model(kind=LlamaConfig, **shape):
    return tiny_llama(kind, **WIDER | shape)


def examples(count=9):
    return made_up_calibration(count, shortest=10, step=2, vocabulary=90)


class PeakMemory(TorchDispatchMode):
    """Adds up the tensors that torch makes while it is on, and notes the most that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.seen = 0, 0, {}

    def freed(self, key, size):
        self.alive -= size
        self.seen.pop(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tensors_in((made,)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.seen or any(key == t.untyped_storage()._cdata for t in tensors_in((args, kwargs or {}))):
                continue
            self.seen[key] = storage.nbytes()
            self.alive += storage.nbytes()
            weakref.finalize(storage, self.freed, key, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return made


def tensors_in(values):
    """The tensors among the arguments of an operation, which nests nothing but tuples, lists and its named arguments."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list, dict)):
            yield from tensors_in(value.values() if isinstance(value, dict) else value)


def peak(work):
    with torch.no_grad(), PeakMemory() as memory:
        work()
    return memory.peak


# sizes


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config])
@pytest.mark.parametrize("tied", [True, False])
def test_sizes_agree_with_a_real_model_read_from_a_folder(tmp_path, kind, tied):
    model = random_model(kind, tie_word_embeddings=tied)
    model.config.save_pretrained(tmp_path)
    sizes = read_sizes(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]  # there are no weights to read
    assert sizes.layers * layer_weights(sizes) == sum(p.module.weight.numel() for p in projections(model))
    assert parameter_count(sizes) == sum(p.numel() for p in model.parameters())
    assert {p.role: tuple(p.module.weight.shape) for p in projections(model)[:7]} == projection_shapes(sizes)
    assert sizes.biased == tuple(p.role for p in projections(model)[:7] if p.module.bias is not None)


def test_the_published_models_need_no_network(monkeypatch):
    monkeypatch.setattr(costs, "config_on_hub", lambda name: pytest.fail("the hub was asked"))
    counts = {"meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248, "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096}
    for name, count in counts.items():
        sizes = read_sizes(name)
        assert (sizes.name, parameter_count(sizes), sizes.layers * layer_weights(sizes)) == (name, count, 6_979_321_856)
        assert "published" in sizes.source and sizes.dtype == "bfloat16"
    for short in ("llama-3-8b", "LLAMA-3-8B-Instruct", "meta-llama-3-8b-instruct"):
        assert read_sizes(short) == read_sizes("meta-llama/Meta-Llama-3-8B-Instruct")
    for short in ("mistral-7b", "Mistral-7B-Instruct-v0.2"):
        assert read_sizes(short) == read_sizes("mistralai/Mistral-7B-Instruct-v0.2")


def test_names_that_lead_nowhere_get_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("CAP_NB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BadInput, match="owner/none is not in the cache, and HF_HUB_OFFLINE.*lab, smollm2, meta-llama/Meta-Llama-3-8B-Instruct"):
        read_sizes("owner/none")
    with pytest.raises(BadInput, match="cap fetch smollm2"):
        read_sizes("smollm2")
    with pytest.raises(BadInput, match="There is no folder"):
        read_sizes("./nothing/here")
    with pytest.raises(BadInput, match="holds no config.json"):
        read_sizes(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match="is not JSON"):
        read_sizes(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(BadInput, match="anatomy of model type 'mamba'"):
        read_sizes(str(tmp_path))
    quantised = tiny_config().to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(BadInput, match="is quantised"):
        read_sizes(str(tmp_path))


# tokens


def test_the_labs_lengths_are_counted_and_others_are_assumed_or_given():
    tokenizer = lab_tokenizer()
    found = plan(changed(Job(), n=6), memory=GIB)
    calibration = calibration_set(tokenizer, n=6)
    assert [len(length.input_ids) for length in found.load.lengths] == [len(e.input_ids) for e in calibration.examples]
    assert [length.target for length in found.load.lengths] == [sum(label != IGNORED for label in e.labels) for e in calibration.examples]
    assert "counted" in found.lengths_from and [b.rows for b in found.load.batches] == [len(b) for b in token_batches(calibration.examples, 4096)]
    assumed = plan(changed(Job(), name="mistral-7b", n=6), memory=GIB)
    assert "assumed" in assumed.lengths_from and len(assumed.load.lengths) == 18 and assumed.load.job.calibrate.tasks == ("gsm8k", "strategyqa", "arc")
    given = plan(changed(Job(), name="mistral-7b", n=6), prompt_tokens=800, target_tokens=70, memory=GIB)
    assert {(length.prompt, length.target) for length in given.load.lengths} == {(800, 70)}
    assert {(length.prompt, length.target) for length in plan(changed(Job(), n=6), prompt_tokens=50, target_tokens=9, memory=GIB).load.lengths} == {(50, 9)}


def test_counts_that_cannot_be_are_refused():
    for wrong in (dict(devices=0), dict(prompt_tokens=0), dict(target_tokens=0), dict(memory=0), dict(tries=0)):
        with pytest.raises(BadInput, match="at least 1"):
            plan(changed(Job(), name="llama-3-8b"), **wrong)
    with pytest.raises(BadInput, match="k = 7 subsets of 6 examples"):
        plan(changed(Job(), name="llama-3-8b", n=2, k=7))
    with pytest.raises(BadInput, match="Unknown task"):
        plan(changed(Job(), name="llama-3-8b", tasks=("nonsense",)))


# work


def test_operations_of_both_ways_of_scoring_agree_with_torchs_counter():
    model, calibration = random_model(attn_implementation="eager"), examples()
    sizes, batches = sizes_of(model.config, "random", "a test"), batch_shapes(lengths_of(examples()), 60)
    for score, work in ((score_heads_naive, naive_work), (score_heads, resumed_work)):
        with FlopCounterMode(display=False) as counter:
            score(model, calibration, batch_tokens=60)
        assert flops_of(work(sizes, batches), sizes) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_operations_of_pruning_by_wanda_agree_with_torchs_counter():
    model, calibration = random_model(attn_implementation="eager"), examples()
    sizes = sizes_of(model.config, "random", "a test")
    with FlopCounterMode(display=False) as counter:
        prune_by(model, "wanda", 0.5, None, Inputs(calibration=calibration, batch_tokens=60))
    assert flops_of(wanda_work(sizes, batch_shapes(lengths_of(calibration), 60)), sizes) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_passes_of_scoring_are_counted_layer_by_layer():
    """Every call of every layer's MLP in a real scoring, against the plan's count of tokens through a layer."""
    model, calibration, calls = random_model(), examples(), []
    handles = [layer.mlp.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[:2].numel())) for layer in model.model.layers]
    head = []
    handles.append(model.lm_head.register_forward_hook(lambda module, args, output: head.append(args[0].shape[:-1].numel())))
    sizes, batches = sizes_of(model.config, "random", "a test"), batch_shapes(lengths_of(calibration), 60)
    of_divergences = functools.partial(resumed_work, target="divergence")
    for score, work in ((score_heads, resumed_work), (score_heads_naive, naive_work), (score_divergences, of_divergences)):
        calls.clear(), head.clear()
        score(model, calibration, batch_tokens=60)
        assert (work(sizes, batches).layer_tokens, work(sizes, batches).head_tokens) == (sum(calls), sum(head))
    for handle in handles:
        handle.remove()


def test_generation_and_losses_are_counted():
    model = random_model(attn_implementation="eager", max_position_embeddings=64)
    sizes, ids = sizes_of(model.config, "random", "a test"), torch.randint(1, 89, (3, 7))
    job = changed(Job(), tasks=("gsm8k",), accuracy_tasks=("gsm8k",), evaluate_n=3, loss_n=3, windows=2, window_tokens=100, max_new_tokens=6)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        target_losses(model, collate([made_up(index, 12, 7, 90) for index in range(3)], pad_id=0))
        for _ in range(2):
            model(input_ids=torch.randint(1, 89, (1, 64)), use_cache=False)  # the context is shorter than the window asked for
    lengths = [ExampleLength("gsm8k", 7, 5)] * 3
    work = prefill_work(sizes, job, lengths) + decode_work(sizes, job, lengths)
    assert flops_of(work, sizes) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_own_chains_are_counted_as_cap_chains_decodes_them():
    """Prompts of one length, so that nothing is padded, read anew in each of three tries, the first of them greedy."""
    model, limit, tries = random_model(attn_implementation="eager"), 12, 3
    model.generation_config.eos_token_id = None
    prompts = torch.randint(1, 89, (5, 9)).tolist()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for attempt in range(tries):
            generate_noted(model, NoStop, prompts, limit, names=[f"{row}/{attempt}" if attempt else None for row in range(5)])
    sizes = sizes_of(model.config, "random", "a test")
    job = changed(Job(), tasks=("gsm8k",), accuracy_tasks=(), n=5, max_new_tokens=limit)
    read, written = chains_work(sizes, job, [ExampleLength("gsm8k", 9, 5)] * 5, tries)
    assert flops_of(read + written, sizes) == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("name", ["lab", "lab-moe"])
def test_singular_values_are_counted_for_every_matrix_that_is_there(name, monkeypatch):
    """AlphaPruning takes the singular values of these matrices once a pruning, and of no others."""
    seen, svdvals = [], torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: seen.append(tuple(matrix.shape)) or svdvals(matrix))
    prune(load_model(name)[0], "magnitude@layer+alpha", 0.5)
    assert sum(spectrum_flops(*shape) for shape in seen) == spectra_flops(read_sizes(name))


# memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [dict(), dict(num_hidden_layers=8), dict(vocab_size=3000), dict(intermediate_size=64, num_attention_heads=8)])
def test_the_memory_of_scoring_is_what_is_really_held(dtype, shape):
    model = random_model(**shape).to(dtype)
    calibration = made_up_calibration(8, shortest=47, k=1, step=0, vocabulary=90)
    sizes, shapes = sizes_of(model.config, "random", "a test"), batch_shapes(lengths_of(calibration), 400)
    assert len(shapes) == 1
    planned = at_once(scoring_memory(sizes, dtype.itemsize, shapes))
    assert 0.75 < peak(lambda: score_heads(model, calibration, batch_tokens=400)) / planned < 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["cap", "wanda"])
def test_the_memory_of_pruning_is_what_is_really_held(dtype, method):
    model, calibration = random_model(hidden_size=256, intermediate_size=1024).to(dtype), examples(30)
    given = Inputs(torch.ones(3, 4), calibration, batch_tokens=200)
    sizes = sizes_of(model.config, "random", "a test")
    batches = batch_shapes(lengths_of(calibration), 200)
    planned = at_once({"cap": threshold_memory(sizes, dtype.itemsize), "wanda": wanda_memory(sizes, dtype.itemsize, batches)}[method])
    assert 0.7 < peak(lambda: prune_by(model, method, 0.5, None, given)) / planned < 1.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["sparsegpt", "alps", "wanda^swaps", "wanda^update", "cap^swaps^update"])
def test_the_memory_of_solving_is_what_is_really_held(dtype, method):
    model, calibration = random_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=2).to(dtype), examples(12)
    sizes, batches = sizes_of(model.config, "random", "a test"), batch_shapes(lengths_of(calibration), 200)
    planned = at_once(solver_memory(sizes, dtype.itemsize, batches, planning.solved_parts(method), planning.on_dense(method)))
    held = peak(lambda: prune(model, method, 0.5, torch.ones(2, 4), calibration, batch_tokens=200))
    assert 0.6 < held / planned < 1.1


class NoStop:
    """As much of a tokenizer as decoding asks for; no token ends an answer."""
    eos_token_id = pad_token_id = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_evaluation_is_what_is_really_held(dtype):
    model = random_model(vocab_size=1000).to(dtype)
    sizes = sizes_of(model.config, "random", "a test")
    batch = collate([made_up(index, 40, 20, 90) for index in range(8)], pad_id=0)
    job = changed(Job(), tasks=("gsm8k",), accuracy_tasks=(), loss_n=8, windows=0)
    planned = at_once(evaluation_memory(sizes, dtype.itemsize, job, [ExampleLength("gsm8k", 20, 20)] * 8))
    assert 0.8 < peak(lambda: target_losses(model, batch)) / planned < 1.05
    job = changed(Job(), tasks=("gsm8k",), accuracy_tasks=("gsm8k",), evaluate_n=8, loss_n=0, windows=0, max_new_tokens=100)
    planned = at_once(evaluation_memory(sizes, dtype.itemsize, job, [ExampleLength("gsm8k", 40, 1)] * 8))
    prompts, decoding = batch["input_ids"].tolist(), Decoding(batch_tokens=2 * job.model.batch_tokens)
    model.generation_config.eos_token_id = None
    assert 0.6 < peak(lambda: generate_greedy(model, NoStop, prompts, 100, decoding=decoding)) / planned < 1.1


def test_scoring_within_a_budget_is_planned_as_it_runs():
    """Stage, time, memory and what fits are those of screening, whose backward pass holds every layer of a batch."""
    model, calibration = random_model(attn_implementation="eager"), examples(12)
    within = changed(Job(), name="llama-3-8b", budget=0.5, aggregation="mean")
    part, whole = (plan(job, probe=PROBE, memory=80 * GIB) for job in (within, changed(Job(), name="llama-3-8b")))
    load = replace(part.load, sizes=sizes_of(model.config, "random", "a test"), lengths=tuple(lengths_of(calibration)))
    for dtype in (torch.float32, torch.bfloat16):
        run = functools.partial(screen_heads, random_model().to(dtype), calibration, 0.5)
        held = at_once(planning.screened_memory(replace(load, dtype=str(dtype).removeprefix("torch."))))
        assert 0.8 < peak(run) / held < 1.05
    with FlopCounterMode(display=False) as counter:
        screen_heads(model, calibration, 0.5)
    assert 0.85 < flops_of(planning.screened_work(load), load.sizes) / counter.get_total_flops() < 1.1
    saved = whole.stages[0].seconds - part.stages[0].seconds
    assert saved > 0.4 * whole.stages[0].seconds and part.run_seconds == pytest.approx(whole.run_seconds - saved)
    tight = (whole.hardware.each + at_once(whole.stages[0].memory)) / GIB + 1
    assert not any(said.startswith("Scoring") for said in plan_advice(gpu(tight)))
    assert any(said.startswith("Scoring needs") for said in plan_advice(gpu(tight, budget=0.5, aggregation="mean")))
    assert "slopes and intact passes included" in plan_text(part) and "Scoring with --budget" not in plan_text(whole)


def test_parts_take_turns():
    assert at_once({"hidden states": 5, "one layer at work": 7, "logits": 9}) == 14
    assert at_once({"scores of one matrix": 3}) == 3 and at_once({}) == 0


def test_memory_that_the_system_does_not_report_is_said_to_be_unknown(monkeypatch):
    assert free_memory(torch.device("cpu")) > 0 and free_memory(torch.device("meta")) is None
    monkeypatch.setattr(planning, "free_memory", lambda device: None)
    found = plan(changed(Job(), name="llama-3-8b"))
    assert found.hardware.free is None and plan_advice(found) == ()
    assert "unknown: this system does not report it" in plan_text(found) and "Whether it fits is not known." in plan_text(found)


def gpu(gibibytes, devices=1, main=512, **job):
    """A plan for a device that need not be here, beside plenty of main memory."""
    found = plan(changed(Job(), **dict(name="llama-3-8b") | job), devices, memory=int(gibibytes * GIB))
    return replace(found, hardware=replace(found.hardware, main=main * GIB))


def test_what_fits_gets_no_advice():
    assert plan_advice(gpu(80)) == () and "Everything fits." in plan_text(gpu(80))
    assert "What will not fit" not in plan_text(gpu(80))


def test_smaller_batches_are_named_and_do_fit():
    found = gpu(18)
    advice = [sentence for sentence in plan_advice(found) if "--batch-tokens" in sentence]
    assert advice
    for sentence in advice:
        tokens = int(sentence.split("--batch-tokens ")[1].split()[0])
        name = next(stage.name for stage in found.stages if sentence.lower().startswith(stage.name.lower()))
        def needed(batch_tokens):
            again = gpu(18, batch_tokens=batch_tokens)
            return again.hardware.each + at_once(next(stage for stage in again.stages if stage.name == name).memory)
        assert needed(tokens) <= 18 * GIB < needed(2 * tokens)


def test_weights_that_do_not_fit_are_met_by_dtype_devices_or_streaming():
    only = plan_advice(gpu(20, dtype="float32"))
    assert len(only) == 1 and "--dtype bfloat16 makes them fit" in only[0] and "--stream" in only[0]
    only = plan_advice(gpu(10))
    assert len(only) == 1 and "2 such devices or more" in only[0] and "--stream" in only[0]
    spread = gpu(10, devices=2)
    assert spread.hardware.each == spread.hardware.weights // 2 and spread.hardware.sharing == 1 and not any("weights take" in sentence for sentence in plan_advice(spread))
    assert gpu(80, devices=2).hardware.sharing == 2 and gpu(80, devices=2).hardware.each == gpu(80).hardware.weights


def test_processes_on_one_cpu_share_its_memory_and_are_no_faster(monkeypatch):
    monkeypatch.setattr(planning, "free_memory", lambda device: 20 * GIB)
    one, two = (plan(changed(Job(), name="llama-3-8b", device="cpu"), devices, PROBE) for devices in (1, 2))
    assert (one.hardware.free, two.hardware.free) == (20 * GIB, 10 * GIB)
    assert one.stages[0].seconds == two.stages[0].seconds
    assert any("--devices 1 makes them fit" in sentence for sentence in plan_advice(two))


def test_wandas_hidden_states_are_met_by_fewer_examples():
    found = gpu(19, n=4000, batch_tokens=512)
    sentence = next(sentence for sentence in plan_advice(found) if sentence.startswith("Pruning by Wanda"))
    n = int(sentence.split("--n ")[1].split()[0])
    fewer = gpu(19, n=n, batch_tokens=512)
    assert 0 < n < 4000 and not any(sentence.startswith("Pruning by Wanda") for sentence in plan_advice(fewer))


def test_the_copy_in_main_memory_and_the_context_are_watched():
    assert any("copy of the weights in scope in main memory" in sentence for sentence in plan_advice(gpu(80, main=8)))
    assert any("--max-new-tokens 8062 makes them fit" in sentence for sentence in plan_advice(gpu(80, max_new_tokens=9000)))
    found = plan(changed(Job(), name="llama-3-8b", batch_tokens=20_000), prompt_tokens=9000, memory=200 * GIB)
    assert any("longest example has 9,095 tokens" in sentence for sentence in plan_advice(found))


# time


def test_the_probe_gives_positive_times_whatever_the_dtype():
    sizes = sizes_of(random_model(max_position_embeddings=64).config, "random", "a test")
    for kind in (sizes, replace(sizes, family="mistral"), replace(sizes, family="qwen2", dtype="bfloat16"), replace(sizes, vocabulary=40_000)):
        probe = probe_device(kind, "cpu", tokens=300, seconds=0.1)
        assert all(0 < value < math.inf for value in (probe.layer, probe.head, probe.step, probe.threshold, probe.sort, probe.flops))
        assert probe.step_rest >= 0 and 0 < probe.tokens <= 300 and probe.dtype == kind.dtype and probe.rows == 8


def test_the_probe_is_bounded_and_refuses_what_does_not_fit(monkeypatch):
    """However fast the device, no more tokens than asked for; however slow, at least a few; a layer that is too large is refused before it is made."""
    sizes = sizes_of(random_model().config, "random", "a test")
    model = planning.random_layer_model(sizes, torch.device("cpu"), torch.float32)
    assert planning.timed_layer(model, 4096, 0.0)[0] == 64
    assert planning.timed_layer(model, 100, 1000.0)[0] == 100
    monkeypatch.setattr(planning, "free_memory", lambda device: 1000)
    monkeypatch.setattr(planning, "random_layer_model", lambda *args: pytest.fail("the layer was made"))
    with pytest.raises(BadInput, match="expected room for one layer"):
        probe_device(sizes, "cpu")


def test_times_grow_with_the_work():
    job = changed(Job(), name="mistral-7b", n=120)
    once, twice = (plan(changed(job, n=n), probe=PROBE, memory=80 * GIB) for n in (120, 240))
    assert twice.stages[0].seconds == pytest.approx(2 * once.stages[0].seconds, rel=0.01)
    assert once.stages[1].seconds > 1.8 * once.stages[0].seconds > 0
    more = plan(changed(job, max_new_tokens=1024), probe=PROBE, memory=80 * GIB)
    assert more.stages[4].seconds > 1.5 * once.stages[4].seconds
    assert plan(job, devices=3, probe=PROBE, memory=80 * GIB).stages[0].seconds == pytest.approx(once.stages[0].seconds / 3)
    assert all(stage.seconds is None for stage in plan(job, memory=80 * GIB).stages) and plan(job, memory=80 * GIB).run_seconds is None


def test_the_whole_run_is_its_parts():
    found = plan(changed(Job(), name="mistral-7b", methods=("cap", "wanda", "magnitude"), sparsities=(0.1, 0.2)), probe=PROBE, memory=80 * GIB)
    scoring, _, threshold, wanda, evaluating = (stage.seconds for stage in found.stages)
    assert found.models == 7
    assert found.run_seconds == pytest.approx(scoring + 4 * threshold + 2 * wanda + 7 * evaluating)
    assert plan(changed(Job(), name="mistral-7b", methods=("magnitude",)), probe=PROBE, memory=80 * GIB).run_seconds == pytest.approx(3 * threshold + 4 * evaluating)


SOLVING = planning.SolverSpeed(hessian=1e-12, sparsegpt=1e-10, joint=1e-11, swaps=1e-7, spectrum=1e-10)


def test_solvers_recoveries_and_budgets_are_stages_of_their_own():
    methods = ("wanda", "sparsegpt", "sparsegpt+kl", "alps+kl", "wanda^swaps^update")
    job = changed(Job(), name="mistral-7b", methods=methods, sparsities=(0.1, 0.2))
    found = plan(job, probe=replace(PROBE, solving=SOLVING), memory=200 * GIB)
    named = {stage.name: stage for stage in found.stages}
    added = ["pruning by sparsegpt", "pruning by alps", "pruning by wanda^swaps^update", "budgets from interventions"]
    assert list(named)[5:] == added
    wanda, evaluating = found.stages[3:5]
    assert all(named[name].seconds > wanda.seconds and named[name].flops > wanda.flops for name in added)
    sparsegpt, alps, recovered, budgets = (named[name].seconds for name in added)
    assert found.run_seconds == pytest.approx(2 * (wanda.seconds + 2 * sparsegpt + alps + recovered) + budgets + found.models * evaluating.seconds)
    assert "budgets from interventions" in plan_text(found)


def test_singular_values_and_own_chains_are_stages_of_their_own():
    """The first are part of a run, once a pruning; the others are not, and there are as many as tries."""
    job = changed(Job(), name="mistral-7b", methods=("magnitude@layer", "magnitude@layer+alpha"), sparsities=(0.1, 0.2), batch_tokens=512)
    asked = dict(probe=replace(PROBE, solving=SOLVING), memory=200 * GIB)
    found, without = plan(job, tries=3, **asked), plan(changed(job, methods=("magnitude@layer",)), **asked)
    assert [stage.name for stage in found.stages[5:]] == ["singular values of every matrix", "own chains"] and len(without.stages) == 5
    _, _, threshold, _, evaluating, spectra, chains = found.stages
    assert spectra.flops == spectra_flops(found.load.sizes) and spectra.seconds == pytest.approx(1e-10 * spectra.flops)
    assert found.run_seconds == pytest.approx(4 * threshold.seconds + 2 * spectra.seconds + 5 * evaluating.seconds)
    answers = changed(job, evaluate_n=128, loss_n=0, windows=0)
    one = plan(answers, **asked).stages[4]
    assert (chains.flops, chains.seconds, chains.memory) == (3 * one.flops, pytest.approx(3 * one.seconds), one.memory)
    longer = plan(changed(job, max_new_tokens=9000, accuracy_tasks=(), name="llama-3-8b"), tries=1, **asked)
    assert any("--max-new-tokens 8062 makes them fit" in sentence for sentence in plan_advice(longer))
    assert "1,152 answers to 384 problems" in plan_text(found) and "Own chains" not in plan_text(without)
    assert plan(job, memory=200 * GIB, probe=PROBE).stages[5].seconds is None


def test_solvers_have_no_time_if_they_were_not_probed():
    found = plan(changed(Job(), name="mistral-7b", methods=("alps",)), probe=PROBE, memory=200 * GIB)
    assert found.stages[5].seconds is None and found.stages[0].seconds > 0 and found.run_seconds is None
    assert "| pruning by alps |" in plan_text(found) and "not probed" in plan_text(found)


# text


def test_the_text_says_where_the_numbers_come_from():
    said = plan_text(gpu(80))
    for part in ("published configuration, not read from a file", "no weights were read", "1,024 heads", "assumed", "No times: this device was not probed", "estimate",
                 "8,030,261,248, 6,979,321,856 of them in scope", "80.0 GiB on a device"):
        assert part in said
    timed = plan_text(plan(changed(Job(), name="lab", n=4), probe=PROBE))
    assert "counted on the calibration set itself" in timed and "Times are estimates from a probe of one layer on made up" in timed and "not probed" not in timed


def test_plan_and_probe_in_one_call():
    found = measured_plan(changed(Job(), name="lab", n=2, evaluate_n=3, loss_n=3, windows=1, batch_tokens=512))
    assert all(stage.seconds > 0 for stage in found.stages) and found.probe.rows == max(a.rows for a in found.load.answers)
    assert measured_plan(changed(Job(), name="lab", n=2, accuracy_tasks=(), loss_n=3, windows=0, batch_tokens=512)).probe.rows == 1


# scale


def test_a_model_too_large_for_a_device_is_spread_over_as_few_as_hold_it():
    for name, devices, shape in (("llama-3-8b", 8, (1, 8)), ("llama-3-70b", 8, (2, 4)), ("mixtral-8x22b", 8, (4, 2)), ("mixtral-8x22b", 2, (2, 1)), ("llama-3-70b", 7, (2, 3))):
        h = plan(changed(Job(), name=name), devices, memory=80 * 10**9).hardware
        assert (h.group, h.sharing) == shape and (h.group == devices or h.each <= 80 * 10**9)


def test_published_shapes_have_their_published_sizes():
    assert parameter_count(read_sizes("llama-3-70b")) == 70_553_706_496 and parameter_count(read_sizes("mixtral-8x22b")) == 140_620_634_112
    with pytest.raises(BadInput, match="gradient on a mixture of experts is not counted"):
        plan(changed(Job(), name="mixtral-8x22b", methods=("gradient",)), memory=80 * GIB)


def test_what_bounds_each_stage_is_said():
    found = plan(changed(Job(), name="llama-3-8b"), 8, memory=80 * 10**9)
    rows = {cells[1].strip(): cells[-2].strip() for cells in (line.split("|") for line in scale_text(found, "h100").splitlines()) if len(cells) > 3}
    assert {name: rows[name] for name in ("loading the weights", "scoring", "pruning by CAP", "writing answers")} == {
        "loading the weights": "disk", "scoring": "compute", "pruning by CAP": "memory", "writing answers": "memory"}
    slow = plan(changed(Job(), name="llama-3-70b"), 2, memory=80 * 10**9)
    assert " link |" in scale_text(slow, "h100,link=0.001")
    with pytest.raises(BadInput, match="is that of 16 bits"):
        scale_text(plan(changed(Job(), name="llama-3-8b", dtype="float32"), memory=80 * 10**9), "h100")


def test_more_copies_finish_earlier_and_less_efficiently():
    found = plan(changed(Job(), name="llama-3-8b"), memory=80 * 10**9).load
    units = unit_flops(found.sizes, found.batches)
    ends = [claims(units, [Claimer()] * count)[0] for count in (1, 2, 8, 64)]
    assert ends[0] == sum(units) and ends == sorted(ends, reverse=True) and all(end * count >= sum(units) for end, count in zip(ends, (1, 2, 8, 64)))
    half, done = claims(units, [Claimer(), Claimer(speed=0.5)])
    assert half < 1.02 * sum(units) / 1.5 and done[1] < done[0] and sum(done) == len(units)
