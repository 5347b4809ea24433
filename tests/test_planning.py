"""Plans from a configuration alone: parameters exactly, operations and memory within a small factor of what torch counts and holds."""
import copy
import functools
import json
import math
import re
import weakref
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import typer

from conftest import ROOT
from fixtures import counted, made_up_calibration, refuses, tiny_config, tiny_llama
from proofs import factors_read
from programs import assert_one_sentence, called as cap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from cap_nb.analysis import FEWEST_PAIRS
from cap_nb.jobs.results import least_told, problems_needed
from cap_nb.calibration import calibration_set
from cap_nb.command_line import app
from cap_nb.data.prompts import collate, made_up_example
from cap_nb.jobs import planning
from cap_nb.jobs.planning import (
    ExampleLength, Rates, Workload, at_once, evaluation_memory, flops_of, hook_loop_work, lengths_of, plan, plan_advice, plan_text,
    planned_stages, range_text, read_sizes, run_seconds, scoring_work, sizes_of, spectra_flops, timed_rates, wanda_work, writing_work)
from cap_nb.jobs.settings import Job, Planning, changed, check_ranges
from cap_nb.methods import budgets
from cap_nb.methods.prune import prune
from cap_nb.methods.resumed_scoring import score_heads
from cap_nb.methods.screening import screen_heads
from cap_nb.models.decoding import Decoding, generate_greedy
from cap_nb.models.lab import LABS, lab_tokenizer
from cap_nb.models.loading import load_model
from cap_nb.scoring import score_heads_naive, target_losses

GIB = 2**30


@pytest.fixture(scope="module", autouse=True)
def sizes_counted_once():
    """A plan builds its model on the meta device; here many plans have the same one."""
    with patch.object(planning, "read_sizes", functools.cache(planning.read_sizes)):
        yield


# Wider than `tiny_llama` is by itself: the plan counts what grows with the model, and so little else may weigh anything
WIDER = dict(hidden_size=48, intermediate_size=160, head_dim=16, vocab_size=90, max_position_embeddings=2048)
RATES = Rates(memory=80, peak=0.1, bandwidth=100, link=10, name="made up", timed=True)


@functools.lru_cache(maxsize=1)  # of up to 22 million weights
def drawn_model(kind, **shape):
    return tiny_llama(kind, **WIDER | shape)


def random_model(kind=LlamaConfig, **shape):
    return copy.deepcopy(drawn_model(kind, **shape))


def load_of(model, calibration, batch_tokens=60, dtype="float32", **settings):
    job = changed(Job(), batch_tokens=batch_tokens, tasks=("gsm8k",), **dict(accuracy_tasks=(), loss_n=0, windows=0) | settings)
    return Workload(sizes=sizes_of(model.config, "random", "a test"), job=job, lengths=lengths_of(calibration), dtype=dtype)


def stage(load, name):
    return next(stage for stage in planned_stages(load) if stage.name == name)


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
        given = [leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)]
        for tensor in filter(torch.is_tensor, tree_leaves(made)):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.seen or key in given:
                continue
            self.seen[key] = storage.nbytes()
            self.alive += storage.nbytes()
            weakref.finalize(storage, self.freed, key, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return made


def peak(work):
    with torch.no_grad(), PeakMemory() as memory:
        work()
    return memory.peak


# sizes: every family of the package is counted in test_families


def test_published_models_need_no_network_and_have_their_published_sizes(monkeypatch):
    monkeypatch.setattr(planning, "config_on_hub", lambda name: pytest.fail("the hub was asked"))
    counts = {"meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248, "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
              "llama-3-70b": 70_553_706_496, "mixtral-8x22b": 140_620_634_112, "llama-2-7b": 6_738_415_616}
    assert {name: read_sizes(name).parameters for name in counts} == counts
    for short in ("llama-3-8b", "LLAMA-3-8B-Instruct", "meta-llama-3-8b-instruct"):
        sizes = read_sizes(short)
        assert (sizes.name, sizes.scope, sizes.dtype) == ("meta-llama/Meta-Llama-3-8B-Instruct", 6_979_321_856, "bfloat16") and "published" in sizes.source


@pytest.mark.parametrize("name", LABS)
def test_a_lab_is_planned_as_it_is_loaded(name):
    """In float32, also where its file holds bfloat16."""
    assert f"torch.{read_sizes(name).dtype}" == str(load_model(name, device="cpu")[0].dtype)


def test_names_that_lead_nowhere_get_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("CAP_NB_CACHE", str(tmp_path / "cache"))
    for name, said in (("owner/none", "owner/none is not in the cache, and HF_HUB_OFFLINE.*lab, smollm2, meta-llama/Meta-Llama-3-8B-Instruct"),
                       ("smollm2", "cap fetch smollm2"), ("./nothing/here", "There is no folder"), (str(tmp_path), "holds no config.json")):
        refuses(said, read_sizes, name)
    quantised = tiny_config().to_dict() | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    unknown = tiny_config().to_dict() | {"hidden_act": "nonsense"}
    for text, said in (("{", "is not JSON"), (json.dumps({"model_type": "mamba"}), "anatomy of model type 'mamba'"), (json.dumps(quantised), "is quantised"),
                       (json.dumps(unknown), "fetch it again|transformers")):
        (tmp_path / "config.json").write_text(text)
        refuses(said, read_sizes, str(tmp_path))


# tokens


def test_the_labs_lengths_are_counted_and_others_are_assumed_or_told():
    found = plan(changed(Job(), n=6), memory=GIB)
    assert found.load.lengths == lengths_of(calibration_set(lab_tokenizer(), n=6)) and "counted" in found.lengths_from
    assumed = plan(changed(Job(), name="mistral-7b", n=6), memory=GIB)
    assert "assumed" in assumed.lengths_from and len(assumed.load.lengths) == 18 and assumed.load.job.calibrate.tasks == ("gsm8k", "strategyqa", "arc")
    for name in ("mistral-7b", "lab"):
        told = plan(changed(Job(), name=name, n=6), prompt_tokens=800, target_tokens=70, memory=GIB)
        assert {(length.prompt, length.target) for length in told.load.lengths} == {(800, 70)}


def test_a_named_device_has_its_own_memory():
    job = changed(Job(), name="llama-3-8b", n=6)
    refuses("expected one of the two; write h100,memory=40 ", plan, job, rates="h100", memory=40 * 10**9)
    assert plan(job, rates="h100,memory=40").free == 40 * 10**9


# operations


def test_operations_of_passes_agree_with_torchs_counter():
    """The hook loop to the last product; what resumes, or ends before the last layer, from above."""
    model, calibration = random_model(attn_implementation="eager", num_hidden_layers=4), made_up_calibration(9, shortest=10, step=2, vocabulary=90)
    load = load_of(model, calibration)
    assert flops_of(hook_loop_work(load.sizes, load.batches), load.sizes) == counted(lambda: score_heads_naive(model, calibration, batch_tokens=60))
    resumed = flops_of(scoring_work(load.sizes, load.batches), load.sizes) / counted(lambda: score_heads(model, calibration, batch_tokens=60))
    screened = flops_of(scoring_work(load.sizes, load.batches, 0.5), load.sizes) / counted(lambda: screen_heads(model, calibration, 0.5, batch_tokens=60))
    walked = flops_of(wanda_work(load.batches), load.sizes) / counted(lambda: prune(model, "wanda", 0.5, calibration=calibration, batch_tokens=60))
    assert 1 <= resumed < 1.2 and 1 <= walked < 1.5 and 0.7 < screened < 1.4


def test_regional_gradients_are_counted_beside_the_walk():
    """Forward and back through one layer after the other, one sequence at a time: operations and memory by torch's own counts."""
    model, calibration = random_model(attn_implementation="eager", num_hidden_layers=8), made_up_calibration(9, shortest=10, step=2, vocabulary=90)
    load = load_of(model, calibration, methods=("rgs",))
    found, walk = stage(load, "regional gradients"), stage(load, "pruning layer by layer")
    assert 1 <= (found.flops + walk.flops) / counted(lambda: prune(model, "rgs", 0.5, calibration=calibration)) < 1.4
    model = random_model(hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
    load = load_of(model, calibration, methods=("rgs",))
    held = peak(lambda: prune(model, "rgs", 0.5, calibration=calibration))
    assert 0.5 < held / max(at_once(stage(load, name).memory) for name in ("regional gradients", "pruning layer by layer")) < 1.6


def test_operations_of_answers_agree_with_torchs_counter():
    model, ids = random_model(attn_implementation="eager"), torch.randint(1, 89, (3, 7))
    load = load_of(model, made_up_calibration(3, shortest=10, step=0, vocabulary=90), accuracy_tasks=("gsm8k",), evaluate_n=3, max_new_tokens=6)
    load = replace(load, lengths=(ExampleLength("gsm8k", 7, 5),) * 3)
    written = dict(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        count = counted(lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **written))
    assert 1 <= flops_of(writing_work(load.answers), load.sizes) / count < 1.2


def test_operations_of_solvers_are_of_the_right_size():
    """Hessians and products; factorisations are not in torch's count, and the plan allows for them."""
    model, calibration = random_model(hidden_size=256, intermediate_size=512, num_hidden_layers=2), made_up_calibration(9, shortest=10, step=2, vocabulary=90)
    for method in ("sparsegpt", "alps", "wanda^update"):
        found = stage(load_of(model, calibration, methods=(method,)), f"pruning by {method}")
        count = counted(functools.partial(prune, random_model(hidden_size=256, intermediate_size=512, num_hidden_layers=2), method, 0.5, None, calibration, batch_tokens=60))
        assert 0.5 < found.flops / count < 5, method


def test_dense_masks_of_a_gpu_wait_in_main_memory():
    """A copy of the weights in scope for `cap run`; where a walk recovers what dense masks leave, the masks and the dense weights beside."""
    def waiting(method, on_cpu):
        load = load_of(tiny_llama(), made_up_calibration(3), methods=(method,))
        return planning.waiting_memory(replace(load, on_cpu=on_cpu)) / (load.sizes.scope * load.width)
    masks = 1 / 4 # a byte a weight of float32
    assert waiting("magnitude^update", False) == 2 + masks and waiting("magnitude^update", True) == waiting("wanda^update", False) == waiting("cap", False) == 1


@pytest.mark.parametrize("name", ["lab", "lab-moe"])
def test_eigenvalues_are_counted_for_every_matrix_that_is_there(name, monkeypatch):
    seen, exponent = [], budgets.hill_exponent
    monkeypatch.setattr(budgets, "hill_exponent", lambda matrix: seen.append(sorted(matrix.shape)) or exponent(matrix))
    prune(load_model(name)[0], "magnitude@layer+alpha", 0.5)
    assert 0.9 < sum(4 * m * n**2 + 8 / 3 * n**3 for n, m in seen) / spectra_flops(read_sizes(name)) < 1.1


# memory


@pytest.mark.parametrize("shape, dtype", [(dict(), torch.float32), (dict(num_hidden_layers=8), torch.bfloat16), (dict(vocab_size=3000), torch.float32),
                                          (dict(intermediate_size=64, num_attention_heads=8), torch.bfloat16)])
def test_the_memory_of_screening_is_about_what_is_held(shape, dtype):
    model, calibration = random_model(**shape).to(dtype), made_up_calibration(8, shortest=47, k=1, step=0, vocabulary=90)
    load = load_of(model, calibration, 400, str(dtype).removeprefix("torch."), budget=0.5)
    held = peak(lambda: screen_heads(model, calibration, 0.5, batch_tokens=400))
    assert 0.5 < held / at_once(stage(load, "scoring").memory) < 2


SHAPES = {"SmolLM2-135M": (576, 1536, 9, 3), "Qwen2.5-0.5B": (896, 4864, 14, 2)} # hidden, MLP, heads, key-value heads


@pytest.mark.parametrize("name, work", [(name, work) for name in ("lab", *SHAPES) for work in ("scoring", "cap", "wanda", "sparsegpt")
                                         if work != "sparsegpt" or name in ("lab", "SmolLM2-135M")])
def test_planned_memory_is_within_15_percent_of_the_tensors_held(name, work):
    """Real shapes, one layer of all but the lab; SparseGPT on the largest would take longest of all tests here."""
    if name == "lab":
        model = load_model("lab")[0]
    else:
        hidden, mlp, heads, key_value_heads = SHAPES[name]
        model = random_model(hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_key_value_heads=key_value_heads,
                             head_dim=64, num_hidden_layers=1, vocab_size=4000).to(torch.bfloat16)
    calibration = made_up_calibration(6, shortest=60, step=2, vocabulary=90)
    methods = dict(methods=(work,)) if work != "scoring" else {}
    load = replace(load_of(model, calibration, 256, str(model.dtype).removeprefix("torch."), **methods), on_cpu=True)
    found = stage(load, {"scoring": "scoring", "cap": planning.THRESHOLD, "wanda": planning.WALK}.get(work, f"pruning by {work}"))
    factors = torch.ones(model.config.num_hidden_layers, model.config.num_attention_heads)
    some = [(layer, 0) for layer in range(model.config.num_hidden_layers)]  # every head's pass holds as much
    held = peak(lambda: score_heads(model, calibration, 256, heads=some) if work == "scoring" else prune(model, work, 0.5, factors_read(work, factors), calibration, batch_tokens=256))
    assert 0.85 < at_once(found.memory) / held < 1.15


@pytest.mark.parametrize("method, dtype", [*((method, torch.float32) for method in ("alps", "wanda^swaps", "wanda^update", "wanda^block")),
                                           ("cap^swaps^update", torch.bfloat16)])
def test_the_memory_of_pruning_is_about_what_is_held(method, dtype):
    model = random_model(hidden_size=192, intermediate_size=768, num_hidden_layers=2).to(dtype)
    calibration = made_up_calibration(12, shortest=10, step=2, vocabulary=90)
    load = load_of(model, calibration, 200, str(dtype).removeprefix("torch."), methods=(method,))
    found = stage(load, f"pruning by {method}")
    held = peak(lambda: prune(model, method, 0.5, factors_read(method, torch.ones(2, 4)), calibration, batch_tokens=200))
    assert 0.5 < held / at_once(found.memory) < 1.6


class NoStop:
    """As much of a tokenizer as decoding asks for; no token ends an answer."""
    eos_token_id = pad_token_id = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_evaluation_is_about_what_is_held(dtype):
    model, batch = random_model(vocab_size=1000).to(dtype), collate([made_up_example(index, 40, 20, vocabulary=90) for index in range(8)], pad_id=0)
    load = load_of(model, made_up_calibration(3, shortest=10, step=0, vocabulary=90), 4096, str(dtype).removeprefix("torch."), loss_n=8)
    losses = at_once(evaluation_memory(replace(load, lengths=(ExampleLength("gsm8k", 20, 20),) * 8)))
    assert 0.7 < peak(lambda: target_losses(model, batch)) / losses < 1.3
    model.generation_config.eos_token_id = None
    answers = load_of(model, made_up_calibration(3, shortest=10, step=0, vocabulary=90), 4096, load.dtype, accuracy_tasks=("gsm8k",), evaluate_n=8, max_new_tokens=100)
    planned = at_once(evaluation_memory(replace(answers, lengths=(ExampleLength("gsm8k", 40, 1),) * 8)))
    held = peak(lambda: generate_greedy(model, NoStop, batch["input_ids"].tolist(), 100, decoding=Decoding(batch_tokens=2 * 4096)))
    assert 0.5 < held / planned < 1.5


def test_parts_take_turns():
    assert at_once({"hidden states": 5, "one layer at work": 7, "logits": 9}) == 14
    assert at_once({"scores of one matrix": 3}) == 3 and at_once({}) == 0


# what fits


def gpu(gibibytes, devices=1, main=512, **job):
    """A plan for a device that need not be here, beside plenty of main memory."""
    found = plan(changed(Job(), **dict(name="llama-3-8b") | job), devices, memory=int(gibibytes * GIB))
    return replace(found, main=main * GIB)


def test_what_does_not_fit_is_met_by_an_option():
    assert plan_advice(gpu(80)) == () and "Everything fits." in plan_text(gpu(80)) and "What will not fit" not in plan_text(gpu(80))
    for found, part in ((gpu(20, dtype="float32"), "--dtype bfloat16 makes them fit"), (gpu(10), "2 such devices or more")):
        assert len(plan_advice(found)) == 1 and part in plan_advice(found)[0] and "--stream" in plan_advice(found)[0]
    spread = gpu(10, devices=2)
    assert (spread.each, spread.sharing) == (spread.weights // 2, 1) and gpu(80, devices=2).sharing == 2
    evaluation = spread.stage("evaluating one model")  # keys and values lie with their layers
    assert spread.needed(evaluation) == pytest.approx(spread.each + planning.at_once(evaluation.memory) - evaluation.memory["keys and values"] / 2, abs=1)
    assert any("copy of the weights in scope in main memory" in sentence for sentence in plan_advice(gpu(80, main=8)))
    assert any("--max-new-tokens 8062 makes them fit" in sentence for sentence in plan_advice(gpu(80, max_new_tokens=9000)))
    found = plan(changed(Job(), name="llama-3-8b", batch_tokens=20_000), prompt_tokens=9000, memory=200 * GIB)
    assert any("longest example has 9,095 tokens" in sentence for sentence in plan_advice(found))


def test_smaller_batches_and_fewer_examples_that_are_named_do_fit():
    advice = [sentence for sentence in plan_advice(gpu(17)) if "--batch-tokens" in sentence]
    assert advice
    for sentence in advice:
        tokens = int(sentence.split("--batch-tokens ")[1].split()[0])
        def needed(batch_tokens):
            again = gpu(17, batch_tokens=batch_tokens)
            return again.needed(next(stage for stage in again.stages if sentence.lower().startswith(stage.name.lower())))
        assert needed(tokens) <= 17 * GIB < needed(2 * tokens)
    assert any("; beside the weights the largest part is keys and values: " in sentence for sentence in advice), "weights take more"
    sentence = next(sentence for sentence in plan_advice(gpu(19, n=4000, batch_tokens=512, tasks=("gsm8k",))) if sentence.startswith("Pruning layer by layer"))
    n = int(sentence.split("--n ")[1].split()[0])
    assert 0 < n < 4000 and not any(sentence.startswith("Pruning layer by layer") for sentence in plan_advice(gpu(19, n=n, batch_tokens=512, tasks=("gsm8k",))))


def test_main_memory_is_shared_by_processes(monkeypatch):
    monkeypatch.setattr(planning, "memory_of", lambda device: (20 * GIB, 20 * GIB))
    one, two = (plan(changed(Job(), name="llama-3-8b", device="cpu"), devices, RATES) for devices in (1, 2))
    assert (one.free, two.free) == (20 * GIB, 10 * GIB) and one.bound(one.stages[1]) == two.bound(two.stages[1])
    assert any("--devices 1 makes them fit" in sentence for sentence in plan_advice(two))


# time


def test_a_timed_batch_gives_rates_whatever_the_family(monkeypatch):
    for kind, dtype in ((LlamaConfig, "float32"), (MistralConfig, "float32"), (Qwen2Config, "bfloat16")):
        rates = timed_rates(sizes_of(random_model(kind).config, "random", "a test"), "cpu", dtype, tokens=300)
        assert rates.timed and all(0 < value < math.inf for value in (rates.peak, rates.bandwidth))
    assert timed_rates(read_sizes("lab-moe"), "cpu", tokens=64).peak > 0
    monkeypatch.setattr(planning, "memory_of", lambda device: (1000, 1000))
    refuses("expected room for it", timed_rates, read_sizes("lab"), "cpu")


def test_times_grow_with_the_work_and_a_run_is_its_parts():
    job = changed(Job(), name="mistral-7b", n=120, methods=("cap", "wanda", "sparsegpt+kl", "magnitude@layer+alpha"), sparsities=(0.1, 0.2))
    once, twice = (plan(changed(job, n=n), rates=RATES, memory=80 * GIB) for n in (120, 240))
    seconds = {stage.name: once.bound(stage)[1] for stage in once.stages}
    assert [stage.name for stage in once.stages] == ["loading the weights", "scoring", planning.THRESHOLD, planning.WALK, "pruning by sparsegpt", planning.SPECTRA,
                                                     planning.BUDGETS, "evaluating one model"]
    assert all(0 < best <= worst for best, worst in seconds.values()) and twice.bound(twice.stage("scoring"))[1] == pytest.approx([2 * s for s in seconds["scoring"]], rel=0.01)
    for end in (0, 1):
        s = {name: ends[end] for name, ends in seconds.items()}
        wanted = (s["scoring"] + 2 * (s[planning.THRESHOLD] + s[planning.WALK] + s["pruning by sparsegpt"]) + 2 * (s[planning.SPECTRA] + s[planning.THRESHOLD])
                  + s[planning.BUDGETS] + 9 * s["evaluating one model"])
        assert len(once.cells) == 9 and run_seconds(once)[end] == pytest.approx(wanted)
    shared = plan(job, 3, RATES, memory=80 * GIB)
    assert 1 < shared.bound(shared.stage("scoring"))[1][1] / (seconds["scoring"][1] / 3) < 1.02
    within = plan(changed(job, methods=("cap",), budget=0.5, aggregation="mean"), rates=RATES, memory=80 * GIB)
    assert 0.5 < within.stage("scoring").flops / once.stage("scoring").flops < 0.55 and "slopes and intact passes included" in plan_text(within)


# what is asked, and nothing else


@pytest.mark.parametrize("methods, rows", [
    (("wanda",), {"pruning layer by layer (wanda)"}),
    (("magnitude", "wanda", "ria"), {"pruning all at once (magnitude)", "pruning layer by layer (wanda, ria)"}),
    (("cap", "magnitude"), {"scoring", "pruning all at once (cap, magnitude)"}),
    (("sparsegpt",), {"pruning by sparsegpt"}),
    (("magnitude@layer+owl",), {"pruning all at once (magnitude@layer+owl)", "pruning layer by layer (magnitude@layer+owl)"}),
    (("cap.integrated_gradients",), {"pruning all at once (cap.integrated_gradients)"}),
])
def test_a_plan_has_the_rows_of_what_its_methods_need(methods, rows):
    text = plan_text(plan(changed(Job(), n=4, methods=methods), rates=RATES, memory=GIB))
    found = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")} - {"Stage", "---", "loading the weights", "evaluating one model"}
    assert found == rows
    assert ("Scoring" in text) == ("a scoring" in text) == ("scoring" in rows)


def test_answers_make_a_range_from_short_ones_to_the_limit():
    found = plan(changed(Job(), name="llama-3-8b", methods=("wanda",), max_new_tokens=400, windows=0, loss_n=0), rates=RATES, memory=80 * GIB)
    assert [(a.steps, b.steps) for a, b in zip(replace(found.load, short=True).answers, found.load.answers)] == [(100, 400)] * 3  # gsm8k's solutions have 95 tokens
    short = plan(changed(found.load.job, max_new_tokens=80), rates=RATES, memory=80 * GIB)
    assert [a.steps for a in replace(short.load, short=True).answers] == [80, 50, 20]  # the solution's, and a quarter of the limit
    best, worst = found.bound(found.stage("evaluating one model"))[1]
    assert worst > 2.5 * best and "every answer takes all of its 400 tokens" in plan_text(found)
    read = plan(changed(found.load.job, accuracy_tasks=(), windows=9), rates=RATES, memory=80 * GIB)
    best, worst = read.bound(read.stage("evaluating one model"))[1]
    assert worst < 1.5 * best


LLAMA_2_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, vocab_size=32000, max_position_embeddings=4096)
LLAMA_3_8B = LLAMA_2_7B | dict(intermediate_size=14336, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)


@pytest.mark.parametrize("shape, dtype, parameters", [(LLAMA_2_7B, "float16", 6_738_415_616), (LLAMA_3_8B, "bfloat16", 8_030_261_248)])
def test_a_folder_with_a_7b_config_gets_hours_on_a_gpu(tmp_path, shape, dtype, parameters):
    (tmp_path / "config.json").write_text(json.dumps(shape | {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": dtype}))
    job = changed(Job(), name=str(tmp_path), methods=("cap", "wanda", "sparsegpt"), sparsities=(0.5,))
    found = plan(job, rates="h100")
    assert (found.load.sizes.parameters, found.load.dtype) == (parameters, dtype) and not plan_advice(replace(found, main=64 * GIB))
    hours = [seconds / 3600 for seconds in run_seconds(found)]
    assert 0.1 < hours[0] < hours[1] < 10
    text = plan_text(found)
    for part in ("Not measured here", "data sheet of 1 x h100", "67 in float32", "50% and 90%", "20% and 50%", range_text(run_seconds(found))):
        assert part in text
    for stage in found.stages:
        assert re.search(rf"\| {re.escape(stage.title)} \| [^|]+ \| {re.escape(range_text(found.bound(stage)[1]))} \|", text)


def test_the_readmes_minutes_are_planned():
    """Scoring all heads of a 7B or 8B on one H100: a quarter of an hour to 45 minutes."""
    assert "takes a quarter of an hour to 45 minutes on one H100" in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for name in ("llama-2-7b", "llama-3-8b"):
        found = plan(changed(Job(), name=name), rates="h100")
        best, worst = (seconds / 60 for seconds in found.bound(found.stage("scoring"))[1])
        assert 13.5 < best < 16.5 and 40 < worst < 46


def test_a_gpus_range_is_from_shares_of_its_data_sheet():
    found = plan(changed(Job(), name="llama-3-8b", methods=("cap", "sparsegpt"), accuracy_tasks=()), rates="h100")
    scoring = found.stage("scoring")
    best, worst = found.bound(scoring)[1]
    assert best == pytest.approx(scoring.flops / 989e12 / 0.5)
    assert worst == pytest.approx(scoring.flops / 989e12 / 0.2 + scoring.read / 3350e9 / 0.5 + scoring.launches * 25e-6)
    solver = found.stage("pruning by sparsegpt")
    assert 0 < solver.single < solver.flops and found.seconds(solver, 0)["compute"] == pytest.approx((solver.single / 67e12 + (solver.flops - solver.single) / 989e12) / 0.5)
    assert solver.launches > solver.own_launches >= 4 * found.load.sizes.columns > 32 * (6 * 4096 + 14336)
    timed = replace(found, rates=replace(found.rates, timed=True))  # a layer that was timed launched its own
    assert timed.seconds(scoring, 1)["launches"] == 0 < timed.seconds(solver, 1)["launches"] == solver.own_launches * 25e-6


def test_own_chains_are_a_stage_of_their_own():
    job = changed(Job(), name="mistral-7b")
    chains, one = plan(job, tries=3, memory=80 * GIB), plan(changed(job, evaluate_n=128, loss_n=0, windows=0), memory=80 * GIB)
    assert chains.stages[-1].flops == pytest.approx(3 * one.stage("evaluating one model").flops, rel=0.01)
    assert "1,152 answers to 384 problems" in plan_text(chains) and "Own chains" not in plan_text(one)


def test_a_plan_by_tokens():
    """As many examples as hold them; chains for as many problems, with the tokens that they may take; tokens for a column of the widest Hessian."""
    job = changed(Job(), name="mistral-7b", calibration_tokens=131_072, tasks=("gsm8k",), methods=("wanda", "sparsegpt"))
    found = plan(job, tries=2, memory=80 * GIB)
    assert len(found.load.lengths) == -(-131_072 // (120 + 95)) == 610 and found.load.tokens == 610 * 215
    said = plan_text(found)
    assert f"- Hessians: sums over up to {610 * 215:,} tokens, at least {610 * 215 / 14336:.1f} for each column." in said
    assert f"1,220 answers to 610 problems, enough if every chain is kept and as long as these examples, by 'cap chains' before any run, of at most 512 tokens: {1220 * 128:,} to {1220 * 512:,} tokens written" in said
    assert "Hessians" not in plan_text(plan(changed(job, methods=("wanda",)), memory=80 * GIB))
    half = plan(changed(job, text_share=0.5, text_tokens=256), memory=80 * GIB).load
    assert sum(length.task == "text" for length in half.lengths) == 256 and half.asked == {"gsm8k": 305}


def test_the_text_says_where_the_numbers_come_from():
    said = plan_text(gpu(80))
    for part in ("published configuration, not read from a file", "no weights were read", "1,024 heads", "assumed", "No times: this device was not timed", "estimate",
                 "8,030,261,248, of which 6,979,321,856 are in scope", "80.0 GiB on a device"):
        assert part in said
    assert "every answer takes" not in said, "a range of times needs times"
    timed = plan_text(plan(changed(Job(), name="lab", n=2, batch_tokens=512), rates="timed"))
    assert "counted on the calibration set itself" in timed and "one batch through one layer" in timed and "not timed" not in timed
    assert "all of its 192 tokens; at the least as many as the worked solution, or a quarter of the limit where that is more." in timed


def test_devices_that_are_not_here_bound_every_stage():
    for name, devices, shape in (("llama-3-8b", 8, (1, 8)), ("llama-3-70b", 8, (2, 4)), ("mixtral-8x22b", 8, (4, 2)), ("mixtral-8x22b", 2, (2, 1)), ("llama-3-70b", 7, (2, 3))):
        h = plan(changed(Job(), name=name), devices, "h100")
        assert (h.group, h.sharing) == shape and (h.group == devices or h.each <= 80 * 10**9)
    found = plan(changed(Job(), name="llama-3-8b"), 8, "h100")
    bounds = {stage.name: found.bound(stage)[0] for stage in found.stages}
    assert (bounds["loading the weights"], bounds["scoring"], bounds[planning.THRESHOLD], bounds["evaluating one model"]) == ("disk", "compute", "memory", "launches")
    slow = plan(changed(Job(), name="llama-3-70b"), 2, "h100,link=0.001")
    assert slow.bound(slow.stage("scoring"))[0] == "link" and "data sheet of 2 x h100,link=0.001" in plan_text(slow)


# how many problems tell a difference


def test_too_few_problems_or_discordant_ones_tell_nothing():
    assert math.isnan(least_told(200, 0)) and math.isnan(least_told(200, 0.02)) and math.isnan(least_told(19, 0.6)) and least_told(200, 0.05) < 5
    assert problems_needed(100, 1.0) == FEWEST_PAIRS, "fewer are never decided"
    for points, discordant, said in ((0, 0.1, "--detect is 0"), (1e-160, 0.1, "from 0.001 to 100"), (math.nan, 0.1, "--detect is nan"), (101, 0.5, "--detect is 101"), (3, 0.02, "--discordant is 0.02"),
                                     (3, 1.5, "--discordant is 1.5"), (3, math.nan, "--discordant is nan"), (20, None, "write 0.2"), (None, 0.2, "without --detect")):
        refuses(said, check_ranges, {"settings": Planning(detect=points, discordant=discordant)})
    check_ranges({"settings": Planning()})


def test_the_plan_says_how_many_problems_and_a_comparison_what_it_could_tell():
    asked_for = ("plan", "--no-probe", "--methods", "wanda", "--n", "4")
    plain, asked = cap(*asked_for).stdout, cap(*asked_for, "--detect", "3", "--discordant", "0.2").stdout
    assert "could" not in plain and f"--evaluate-n {problems_needed(3, 0.2)}" in asked and "solves 20 % of them" in asked
    assert f"--evaluate-n {problems_needed(3, 0.15)}" in cap(*asked_for, "--detect", "3").stdout  # the share that jobs/07_results finds
    assert_one_sentence(cap("plan", "--no-probe", "--discordant", "0.2"), "without --detect", "write --detect 3")
    lab = str(ROOT / "figures" / "lab")
    text = cap("compare", lab, "--methods", "cap", "--against", "wanda", "--sparsity", "0.5").stdout
    alone = {"Lab GSM8K": 24.5, "Lab StrategyQA": 29.5, "Lab ARC-C.": 10.0}
    for task, share in alone.items():
        assert f"- {task}: 200 problems, of which exactly one of the two methods solves {share} %; a difference of {least_told(200, share / 100):.1f} points is decided with about 80 % probability (" in text
    assert "is decided with" not in cap("compare", lab, "--methods", "cap", "--against", "wanda", "--form", "csv").stdout
    assert ".\n\nPublished perplexities are of Llama-2-7B" in cap("compare", lab, "--methods", "cap", "--against", "wanda", "--with", "published").stdout


def test_the_page_on_a_7b_shows_commands_that_there_are():
    cells = json.loads((ROOT / "nbs" / "results" / "12_your_7b.ipynb").read_text(encoding="utf-8"))["cells"]
    commands = [line.split("#")[0].split() for cell in cells for line in "".join(cell["source"]).splitlines() if line.startswith("    cap ")]
    assert {words[1] for words in commands} == {"plan", "run", "compare", "prune", "eval", "export"}
    for _, command, *words in commands:
        options = {word for each in typer.main.get_command(app).commands[command].params for word in each.opts}
        assert {word for word in words if word.startswith("--")} <= options, command
