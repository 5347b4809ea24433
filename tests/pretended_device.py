"""Every kind of work on a device that is not the processor, pretended: the processor's results, no mixed devices, and little that crosses.

Attention is written out (eager) where zeros are compared: torch's fused kernel on the processor rounds otherwise than the formula that the pretended
device follows, and no other operation of a forward pass does.
"""
import copy
import functools
import math
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pretend
import pytest
import torch
from accelerate import dispatch_model
from conftest import ROOT
from fixtures import made_up_calibration, refuses, tiny_config, tiny_llama
from programs import FEW, output_of
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, MixtralConfig, ViTConfig, ViTForImageClassification

from cap_nb.calibration import Calibration
from cap_nb.core.devices import device_name, finish, make_current, memory_of, memory_taken
from cap_nb.core.files import write_checked
from cap_nb.core.registry import ATTRIBUTIONS
from cap_nb.evaluation import accuracy, held_out_losses, perplexity
from cap_nb.data.problems import load_problems
from cap_nb.data.prompts import IGNORED
from cap_nb.experiments.vision import ImageReader
from cap_nb.jobs.chains import Answering, own_chains
from cap_nb.jobs.settings import FineTuning, SpeedSettings
from cap_nb.methods import resumed_scoring
from cap_nb.methods.attributions import GateFit
from cap_nb.core.plots import plot_threshold
from cap_nb.methods.criteria import Inputs
from cap_nb.methods.experts import expert_losses, routed_losses
from cap_nb.methods.explainable_masks import MaskFit
from cap_nb.methods.layers_on_disk import prune_layers
from cap_nb.methods.neurons import neuron_estimates
from cap_nb.methods.prune import prune, sparsities_of, table_methods
from cap_nb.methods.resumed_scoring import load_losses, score_heads
from cap_nb.methods.screening import screen_heads
from cap_nb.methods.streaming import save_hessians, solve_checkpoint
from cap_nb.models.anatomy import projections
from cap_nb.models.choices import choice_records
from cap_nb.models.lab import lab_tokenizer
from cap_nb.models.loading import load_model, save_model
from cap_nb.portable.fine_tuning import recover
from cap_nb.portable.format import export_folder
from cap_nb.portable.shrink import contributions, shrink
from cap_nb.portable.speed import bench_folder
from cap_nb.scoring import score_heads_naive

PROCESSOR, DEVICE = "cpu", "pretend:0"
FITTED = {"retained_gates": GateFit(steps=2), "removed_gates": GateFit(steps=2), "explainable_masks": MaskFit(steps=2)}
ATTRIBUTED = {f"cap.{name}" for name in ATTRIBUTIONS}  # attributions are tried by themselves
JOINED = {"cap@row", "cap@layer", "cap@matrix", "wanda@model", "cap_wanda@row", "ria@model", "gradient@row", "integrated_gradients@row", "relevance@row", "cap@2:4", "ria@2:4",
          "sparsegpt+kl", "alps+kl", "sparsegpt+owl", "wanda@2:4", "wanda^swaps^update", "sparsegpt^update",
          # of a score or solver, and a scope, pattern, budget or recovery, that are tried with others; and, pruned among the kinds of work below:
          "cap", "wanda", "gradient", "sparsegpt", "wanda^update", "wanda+kl"}
LEFT_OUT = ATTRIBUTED | (set() if os.environ.get("CAP_NB_SOAK") else JOINED)
METHODS = ["dense", *(name for name in table_methods() if name not in LEFT_OUT), "wanda^block", "cap.pooled", "cap.neurons", "alps.neurons"]
EXAMPLES = made_up_calibration(5)


@pytest.fixture(scope="module", autouse=True)
def device():
    with pretend.present() as lacking:
        if lacking:
            pytest.skip(lacking)
        yield


def weights_of(model):
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def flat(value, name=""):
    """Everything that a result holds, by the path to it: tensors on the processor, and numbers and words."""
    if isinstance(value, torch.Tensor):
        return {name: value.detach().cpu()}
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, (tuple, list)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {path: leaf for key, each in value.items() if key != "device" for path, leaf in flat(each, f"{name}/{key}").items()}


def assert_same(there, here):
    there, here = flat(there), flat(here)
    assert list(there) == list(here)
    for name, value in here.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(there[name], value, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda said, name=name: f"{name}: {said}")
        else:
            assert there[name] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value), name


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_as_on_the_processor(method):
    """The same zeros, and weights that differ by the rounding of a backward pass at most."""
    dense, pruned = tiny_llama(num_hidden_layers=2, attn_implementation="eager"), []
    factors = torch.linspace(1, 10, 8).view(2, 4) if method.startswith(("cap", "heads", "wanda+causal")) and "." not in method else None
    sparsity = 0.0 if method == "dense" else 0.25 if method == "heads" else sparsities_of(method, [0.5])[0]
    for device in (PROCESSOR, DEVICE):
        model = copy.deepcopy(dense).to(device)
        report = prune(model, method, sparsity, factors, EXAMPLES)
        pruned.append((report, weights_of(model)))
        assert {p.device for p in model.parameters()} == {torch.device(device)}
    assert_same(*reversed(pruned))
    assert all(torch.equal(there == 0, here == 0) for there, here in zip(pruned[1][1].values(), pruned[0][1].values()))


def attributed(name):
    options = {"fit": FITTED[name]} if name in FITTED else {"steps": 2} if name == "integrated_gradients" else {}
    return lambda model, *_: ATTRIBUTIONS[name].compute(model, EXAMPLES, **options)


@pytest.mark.parametrize("name", ATTRIBUTIONS)
def test_every_attribution_is_the_processor_s(name):
    model = tiny_llama(num_hidden_layers=2, attn_implementation="eager")
    here, there = (attributed(name)(copy.deepcopy(model).to(device)) for device in (PROCESSOR, DEVICE))
    assert_same(there, here)


# Kinds of work: what gets a model, its tokenizer, its device and an empty folder, and gives what is compared.


def pruned_and(work):
    def both(model, tokenizer, device, folder):
        prune(model, "magnitude@row", 0.5)
        return work(model, tokenizer, device, folder)
    return both


def by_method(name):
    def pruned(model, tokenizer, device, folder):
        factors = torch.linspace(1, 10, 8).view(2, 4) if name == "cap" else None
        return prune(model, name, 0.5, factors, EXAMPLES), weights_of_scope(model)
    return pruned


def weights_of_scope(model):
    """A sum for each projection, so that comparing moves nothing large."""
    return {p.name: (p.weight.detach().double().sum().item(), (p.weight == 0).sum().item()) for p in projections(model)}


def on_devices(model, device):
    """A model on one device; "half" of it on the pretended one, and the last of two layers on the processor."""
    if device != "half":
        return model.to(device)
    there, here = ("model.embed_tokens", "model.rotary_emb", "model.layers.0"), ("model.layers.1", "model.norm", "lm_head")
    return dispatch_model(model, dict.fromkeys(there, DEVICE) | dict.fromkeys(here, PROCESSOR), main_device=PROCESSOR)


def experts(model, tokenizer, device, folder):
    mixture = AutoModelForCausalLM.from_config(tiny_config(MixtralConfig, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2)).float().eval()
    with torch.no_grad():
        for number, p in enumerate(mixture.parameters()):
            p.copy_(torch.linspace(-0.3, 0.3, p.numel()).sin().mul(number + 1).cos().view_as(p) * 0.3)
    mixture = on_devices(mixture, device)
    return routed_losses(mixture, EXAMPLES), expert_losses(mixture, EXAMPLES)


def smaller(model, tokenizer, device, folder):
    small = shrink(model, torch.linspace(0, 1, 2 * 512).sin().view(2, 512), torch.linspace(0, 1, 8).cos().view(2, 4), 384, 1)
    return contributions(model, EXAMPLES), weights_of_scope(small)


def trained(model, tokenizer, device, folder):
    with patch.object(torch.pretend, "mem_get_info", lambda *_: (1 << 30, 1 << 30)):  # room for four numbers a weight
        report = recover(model, EXAMPLES, FineTuning(steps=2, examples=2))
    return report.losses, weights_of_scope(model)


def streamed(model, tokenizer, device, folder):
    save_model(model, tokenizer, folder / "dense")
    save_hessians(model, EXAMPLES, folder / "hessians")
    place = PROCESSOR if device in ("half", "auto") else device
    report = solve_checkpoint(folder / "dense", folder / "pruned", 0.5, folder / "hessians", device=place)
    return report, load_file(folder / "pruned" / "model.safetensors")


def layers_from_disk(model, tokenizer, device, folder):
    save_model(model, tokenizer, folder / "dense")
    report = prune_layers(folder / "dense", folder / "pruned", "wanda^block", 0.5, Inputs(calibration=EXAMPLES), device)
    return report, load_file(folder / "pruned" / "model.safetensors")


def exported(model, tokenizer, device, folder):
    save_model(model, tokenizer, folder / "pruned")
    return [(file.name, file.sha256) for file in export_folder(folder / "pruned", folder / "packed").files]


def benched(model, tokenizer, device, folder):
    save_model(model, tokenizer, folder / "pruned")
    settings = SpeedSettings(batches=(1,), prompt=4, steps=1, rounds=1, backends=("torch",), device=device)
    return bench_folder(folder / "pruned", settings=settings)["models"]


def answered(model, tokenizer, device, folder):
    return accuracy(model, tokenizer, "lab-gsm8k", 2, max_new_tokens=6)


def chains(model, tokenizer, device, folder):
    return own_chains(model, tokenizer, ("lab-gsm8k",), n=1, answering=Answering(tries=2, max_new_tokens=6)).chains


WORK = {  # kind of work -> how many times the whole model is read for a fingerprint or a file, and what is done
    "scoring, hook loop": (1, lambda model, *_: score_heads_naive(model, EXAMPLES)),
    "scoring, resumed": (1, lambda model, *_: score_heads(model, EXAMPLES)),
    "screening": (1, lambda model, *_: screen_heads(model, EXAMPLES, 0.5)),
    "neurons": (0, lambda model, *_: neuron_estimates(model, EXAMPLES)),
    "experts": (0, experts),
    "prune: cap": (0, by_method("cap")),
    "prune: wanda": (0, by_method("wanda")),
    "prune: gradient": (0, by_method("gradient")),
    "prune: sparsegpt": (0, by_method("sparsegpt")),
    "prune: wanda^update": (0, by_method("wanda^update")),
    "prune: wanda+kl": (0, by_method("wanda+kl")),
    "answers": (0, answered),
    "choices": (0, lambda model, tokenizer, *_: choice_records(model, tokenizer, load_problems("lab-arc", "evaluation")[:2])),
    "held-out losses": (0, lambda model, tokenizer, *_: held_out_losses(model, tokenizer, "lab-arc", 2)),
    "perplexity": (0, lambda model, tokenizer, *_: perplexity(model, tokenizer, "lab-text", windows=2, window_tokens=48)),
    "chains": (1, chains),
    "recover": (2, pruned_and(trained)),
    "shrink": (0, smaller),
    "Hessians for streaming": (5, streamed),
    "layers from disk": (3, layers_from_disk),
    "export": (1, pruned_and(exported)),
    "bench": (5, pruned_and(benched)),
}


def wide_model(device, folder):
    """Weights by the megabyte, so that what crosses can be told from them; `auto` spreads them over two devices."""
    model = tiny_llama(num_hidden_layers=2, hidden_size=192, intermediate_size=512, head_dim=48, initializer_range=0.05, vocab_size=len(lab_tokenizer()),
                       max_position_embeddings=512, attn_implementation="eager")
    if device == "auto":
        save_model(model, lab_tokenizer(), folder / "spread")
        model, _ = load_model(folder / "spread", device="auto")
        model.set_attn_implementation("eager")
        return model
    return on_devices(model, device)


PLACES = {PROCESSOR: {PROCESSOR}, DEVICE: {DEVICE}, "auto": {DEVICE, "pretend:1"}, "half": {DEVICE, PROCESSOR}}


def work_done(kind, device, folder):
    """The result of a kind of work, the bytes of the model, and the bytes that crossed meanwhile: to devices, and from them to the processor."""
    folder.mkdir()
    model = wide_model(device, folder)
    assert {str(p.device) for p in model.parameters()} == PLACES[device]
    with pretend.counting() as crossings:
        result = (attributed(kind) if kind in ATTRIBUTIONS else WORK[kind][1])(model, lab_tokenizer(), device, folder)
    back = sum(moved for _, target, moved in crossings if target == PROCESSOR)
    return result, sum(p.numel() * p.element_size() for p in model.parameters()), (sum(moved for *_, moved in crossings) - back, back)


@functools.cache
def on_the_processor(kind):
    """What the same work gives there, done once for all devices."""
    with tempfile.TemporaryDirectory() as place:
        return work_done(kind, PROCESSOR, Path(place) / "here")


@pytest.mark.parametrize("kind", WORK)
def test_a_kind_of_work_gives_the_same_and_moves_little(kind, tmp_path):
    here, _, nothing = on_the_processor(kind)
    there, size, (to, back) = work_done(kind, DEVICE, tmp_path / "there")
    assert_same(there, here)
    assert nothing == (0, 0) and to + back < (WORK[kind][0] + 0.5) * size, (to, back, size)


def test_a_training_finds_room_or_says_so():
    model = wide_model(DEVICE, None)
    refuses("Training every weight takes .* more on pretend:0, which has 0.0 GiB free", recover, model, EXAMPLES)


def test_scores_that_lie_there_are_drawn():
    scores, factors = torch.linspace(0.1, 1, 20), torch.arange(20.0) % 2 + 1
    assert len(plot_threshold(scores.to(DEVICE), factors.to(DEVICE), 0.5).axes) == 2


def test_a_head_may_lie_with_the_embeddings():
    """As accelerate puts one that is tied to them, while the last layer is elsewhere."""
    wanted, model = score_heads(made := tiny_llama(num_hidden_layers=2), EXAMPLES), copy.deepcopy(made)
    there, here = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "lm_head"), ("model.layers.1", "model.norm")
    spread = dispatch_model(model, dict.fromkeys(there, DEVICE) | dict.fromkeys(here, PROCESSOR), main_device=PROCESSOR)
    assert_same(score_heads(spread, EXAMPLES).masked, wanted.masked)


BACKWARD = ("screening", "neurons", "prune: gradient", "recover")
ELSEWHERE = ("experts", "bench", "layers from disk")  # these make a model of their own, on one device


@pytest.fixture
def two_devices(monkeypatch):
    """What accelerate is told of the memory: it asks the makers that it knows, and no other."""
    accelerate = pytest.importorskip("transformers.integrations.accelerate")
    if not hasattr(accelerate, "accelerate_max_memory"):
        pytest.skip("this transformers asks for the memory of devices in another way")
    monkeypatch.setattr(accelerate, "accelerate_max_memory", lambda given=None: {0: 3_000_000, 1: 10_000_000, "cpu": 1})


@pytest.mark.parametrize("kind", [kind for kind in WORK if kind not in (*BACKWARD, *ELSEWHERE)])
def test_a_model_spread_over_two_devices_gives_the_same(kind, two_devices, tmp_path):
    assert_same(work_done(kind, "auto", tmp_path / "auto")[0], on_the_processor(kind)[0])


@pytest.mark.parametrize("kind", [*BACKWARD, "experts", *ATTRIBUTIONS])
def test_the_way_back_through_two_devices_gives_the_same(kind, tmp_path):
    """The second is the processor: torch's engine makes a queue for each device that the device's guard counts, and a guard in Python cannot count
    beyond one; a way back through pretend:1 ends in the engine's own error."""
    assert_same(work_done(kind, "half", tmp_path / "half")[0], on_the_processor(kind)[0])


def test_a_deliberate_mix_is_caught():
    here, there, second = torch.ones(3), torch.ones(3, device=DEVICE), torch.ones(3, device="pretend:1")
    for one, other in ((here, there), (there, here), (there, second)):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two devices, "):
            torch.dot(one, other)
    model, ids = tiny_llama().to(DEVICE), torch.tensor([[1, 2, 3]])
    for inside in (torch.no_grad(), torch.inference_mode()):
        with inside, pytest.raises(RuntimeError, match="same device"):
            model(ids)
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        here[there > 0]
    with pytest.raises(RuntimeError, match="same device"):
        there[torch.tensor([0, 1])] = torch.zeros(2)
    for reading in (there.numpy, lambda: np.asarray(there)):
        with pytest.raises(TypeError, match=r"can't convert pretend:0 device type tensor to numpy. Use Tensor.cpu\(\)"):
            reading()
    assert (there + torch.tensor(2.0)).tolist() == [3.0] * 3 and there[here > 0].device == there.device  # as on CUDA, these may mix


def test_what_crosses_is_counted():
    with pretend.counting() as crossings:
        there = torch.ones(3).to(DEVICE)
        there.copy_(torch.zeros(3)), there.cpu(), there.sum().item(), there.tolist(), there.to("pretend:1"), torch.tensor([1.0], device=DEVICE)
        there + 1, there.clone(), torch.zeros(9, device=DEVICE), torch.ones(3)
    here, second = PROCESSOR, "pretend:1"
    assert crossings == [(here, DEVICE, 12), (here, DEVICE, 12), (DEVICE, here, 12), (DEVICE, here, 4), (DEVICE, here, 12), (DEVICE, second, 12), (here, DEVICE, 4)]


def test_the_device_is_asked_as_cuda_is(monkeypatch):
    """Name, memory and waiting, by functions that have CUDA's names; as many heads in one pass as fit into the memory."""
    device, waited = torch.device(DEVICE), []
    monkeypatch.setattr(torch.pretend, "synchronize", waited.append)
    with memory_taken(device) as taken:
        finish(device), make_current(device)
    assert (taken, memory_of(device), device_name(device), waited) == ([1 << 20], (3 << 20, 4 << 20), DEVICE, [device])
    at_once, masked = [], resumed_scoring.masked_losses
    monkeypatch.setattr(resumed_scoring, "masked_losses", lambda *given: (at_once.append(len(given[4])), masked(*given))[1])
    score_heads(tiny_llama().to(DEVICE), EXAMPLES)
    assert at_once == [1] + [2] * (len(at_once) - 1), "after the trial pass, two heads at once"


def test_the_prefixes_of_all_heads_find_room_too(monkeypatch):
    """With free memory for five of the parts, of which a head's prefix takes one and its pass another: four prefixes and one pass, not two."""
    kept, seen, masked = 2 * 2 * (2 * 20 * 6 * 4), [], resumed_scoring.masked_losses  # two layers' keys and values: groups, tokens, size, bytes
    shared = [replace(e, input_ids=(*range(1, 21), *e.input_ids), labels=(IGNORED,) * 20 + e.labels) for e in EXAMPLES.examples]
    monkeypatch.setattr(torch.pretend, "max_memory_allocated", lambda *_: (1 << 20) + 2 * kept)
    monkeypatch.setattr(torch.pretend, "mem_get_info", lambda *_: (math.ceil(5 * kept / 0.8), 1 << 30))
    monkeypatch.setattr(resumed_scoring, "masked_losses", lambda *given: (seen.append(len(given[4])), masked(*given))[1])
    score_heads(tiny_llama().to(DEVICE), Calibration.from_examples(shared, k=3))
    assert set(seen) == {1}


def test_images_stay_where_they_are():
    """The model alone is on the device; its images are in main memory, or there too."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 36, "image_size": 16, "patch_size": 8, "num_channels": 1}
    model, images, ids = ViTForImageClassification(ViTConfig(**sizes)).eval(), torch.randn(4, 1, 16, 16), torch.arange(3)[:, None].expand(3, 5)
    with torch.no_grad():
        here = ImageReader(model, images)(ids).logits
        model.to(DEVICE)
        for place in (PROCESSOR, DEVICE):
            torch.testing.assert_close(ImageReader(model, images.to(place))(ids.to(DEVICE)).logits.cpu(), here)


def test_only_attention_rounds_otherwise():
    """The joint solver and the update follow the last bits of a Hessian; with the formula for attention on the processor too, no bit differs."""
    dense, weights = tiny_llama(num_hidden_layers=2, attn_implementation="sdpa"), []
    for device in (PROCESSOR, DEVICE):
        with sdpa_kernel(SDPBackend.MATH):
            prune(model := copy.deepcopy(dense).to(device), "alps", 0.5, calibration=EXAMPLES)
        weights.append(weights_of(model))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_program_runs_on_it_from_end_to_end(tmp_path):
    save_model(tiny_llama(num_hidden_layers=2, vocab_size=len(lab_tokenizer()), max_position_embeddings=512), lab_tokenizer(), tmp_path / "model")
    for device in (PROCESSOR, DEVICE):
        words = ["run", "--model", tmp_path / "model", "--methods", "cap", "--sparsity", "0.5", *FEW]
        output_of(*words, "--device", device, "--out", tmp_path / device)
    here, there = (tmp_path / device for device in (PROCESSOR, DEVICE))
    torch.testing.assert_close(load_losses(there / "losses.safetensors").masked, load_losses(here / "losses.safetensors").masked, atol=1e-5, rtol=0)
    assert '"device": "pretend"' in (there / "environment.json").read_text()
    for name in ("table.csv", "scores.csv"):
        pd.testing.assert_frame_equal(*(pd.read_csv(folder / "tables" / name) for folder in (there, here)), rtol=1e-5, atol=1e-6)


def write_crossings():
    """What the page of benchmarks shows: the bytes that cross in each kind of work, in sizes of its model."""
    cases = {}
    with pretend.present(), tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(WORK):
            _, size, (to, back) = work_done(kind, DEVICE, Path(folder) / f"{number}")
            cases[kind] = {"to the device": round(to / size, 3), "from it": round(back / size, 3), "read whole": WORK[kind][0]}
    write_checked(ROOT / "figures" / "devices" / "crossings.json", {"torch": torch.__version__, "model's bytes": size, "cases": cases})


if __name__ == "__main__":
    write_crossings()
