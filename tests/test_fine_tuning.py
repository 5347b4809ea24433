"""Masked fine-tuning from outside: other families, a training that breaks, peft, and the command."""
import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fixtures import made_up_calibration, refuses, tiny_llama, zeros_of
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, Qwen2Config, Trainer, TrainerCallback, TrainingArguments

from programs import called as cap, output_of
from cap_nb.calibration import Calibration
from cap_nb.core.files import read_json, sealed
from cap_nb.data.prompts import IGNORED
from cap_nb.methods.prune import prune
from cap_nb.models.anatomy import projections
from cap_nb.models.lab import STATE
from cap_nb.models.loading import load_model, model_fingerprint
from cap_nb.portable import fine_tuning
from cap_nb.portable.fine_tuning import REPORT, FineTuning, HeldZeros, check_room_to_train, mask_adapters, recover

FEW = FineTuning(steps=3, lr=1e-2, examples=4, weight_decay=0.1)


def tiny(kind):
    if kind is GPT2Config:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=60, n_positions=64)).eval()
    return tiny_llama(kind)


def assert_held(model, before):
    for p in projections(model):
        assert not p.weight[before[p.name]].any(), p.name


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Qwen2Config, GPT2Config, MixtralConfig], ids=lambda kind: kind.model_type)
def test_every_family_keeps_its_zeros_and_what_it_was(kind, dtype, rank):
    """Biases, transposed weights, stacks of experts; names, order, dtypes, buffers and flags are those of before, and other weights have moved."""
    model = tiny(kind).to(dtype)
    if kind is MixtralConfig and dtype is torch.bfloat16 and rank:
        pytest.skip("transformers multiplies stacks of experts in bfloat16 only if their sizes are multiples of 8")
    prune(model, "magnitude", 0.5)
    frozen = next(model.parameters()).requires_grad_(False)
    before, weights = zeros_of(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    flags, buffers = [p.requires_grad for p in model.parameters()], {name: b.clone() for name, b in model.named_buffers()}
    report = recover(model.train(), made_up_calibration(), replace(FEW, rank=rank))  # as a loop would have it, GPT-2 with dropout
    assert all(module.training for module in model.modules())
    assert_held(model.eval(), before)
    after = dict(model.named_parameters())
    assert list(after) == list(weights) and all(after[name].dtype == dtype for name in after)
    assert [p.requires_grad for p in after.values()] == flags and all(p.grad is None for p in after.values())
    assert all(torch.equal(b, buffers[name]) and b.dtype == buffers[name].dtype for name, b in model.named_buffers())
    assert torch.equal(frozen, next(iter(weights.values())))
    assert all(not torch.equal(after[p.parameter_name], weights[p.parameter_name]) for p in projections(model))
    assert report.before != report.after == model_fingerprint(model)


def test_slow_steps_are_saved_by_the_clock(monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(fine_tuning, "save_state", lambda *_: saved.append(_))
    for seconds, times in ((600, 1), (-1, FEW.steps)):
        monkeypatch.setattr(fine_tuning, "SAVE_SECONDS", seconds)
        prune(model := tiny(Qwen2Config), "magnitude", 0.5)
        recover(model, made_up_calibration(), FEW, tmp_path / str(seconds))
        assert len(saved) == times, seconds
        saved.clear()


def test_what_is_zero_once_it_is_cast_back_is_counted(monkeypatch):
    """The least number of float16 is 6e-8, and one of float32 may be less."""
    def trained(model, *_):
        projections(model)[0].weight.data.mul_(1e-12)
        return (1.0,)
    model = tiny_llama().half()
    prune(model, "magnitude", 0.5)
    monkeypatch.setattr(fine_tuning, "train_on", trained)
    report = recover(model, made_up_calibration(), FEW)
    assert report.zeros == sum(int(zeros.sum()) for zeros in zeros_of(model).values()) > 0.5 * report.weights


def test_the_room_that_a_training_takes(monkeypatch):
    """A gradient and two moments of each weight, a mask within the scope, and float32 for what is not trained; with a rank, each changed weight."""
    model, device = tiny_llama().half(), SimpleNamespace(room=0)
    frozen = model.get_input_embeddings().weight.requires_grad_(False).numel()
    scope, weights = sum(p.weight.numel() for p in projections(model)), sum(p.numel() for p in model.parameters())
    needed = (17 - 2) * scope + (16 - 2) * (weights - scope - frozen) + (4 - 2) * frozen
    monkeypatch.setattr(fine_tuning, "module_of", lambda _: torch)
    monkeypatch.setattr(fine_tuning, "memory_of", lambda _: (device.room, device.room))
    device.room = needed
    check_room_to_train(model.train(), None)
    device.room -= 1
    refuses("Training every weight takes", check_room_to_train, model, None)
    device.room = (1 + 2) * scope + 16 * 8 * sum(sum(p.weight.shape) for p in projections(model))
    check_room_to_train(model, 8)
    device.room -= 1
    refuses("Training with rank 8 takes", check_room_to_train, model, 8)
    device.room += 1 + sum(p.nbytes for p in model.parameters())
    check_room_to_train(model, 8, teacher=True)
    device.room -= 1
    refuses("Training with rank 8 takes", check_room_to_train, model, 8, teacher=True)


def test_every_module_keeps_its_mode():
    """A part that the caller had in evaluation mode is in it afterwards."""
    model = tiny_llama().train()
    model.get_input_embeddings().eval()
    prune(model, "magnitude", 0.5)
    recover(model, made_up_calibration(), FEW)
    assert model.training and not model.get_input_embeddings().training


def test_what_the_caller_left_changes_nothing():
    """Gradients that were there, and a teacher whose dropout is on, which stays on."""
    model, again, teacher = (tiny(GPT2Config) for _ in range(3))
    for each in (model, again):
        prune(each, "magnitude", 0.5)
    for p in again.parameters():
        p.grad = torch.ones_like(p)
    first = recover(model, made_up_calibration(), FEW, teacher=teacher)
    assert recover(again, made_up_calibration(), FEW, teacher=teacher.train()).after == first.after
    assert all(module.training for module in teacher.modules())


def test_small_changes_outlive_the_cast():
    """In bfloat16 few weights change at such a rate; their sum along the change of float32 is nearly its whole length."""
    whole, half = (tiny_llama().to(torch.bfloat16).to(dtype) for dtype in (torch.float32, torch.bfloat16))
    for each in (whole, half):
        prune(each, "magnitude", 0.5)
    before = [p.detach().float() for p in half.parameters()]
    for each in (whole, half):
        recover(each, made_up_calibration(), replace(FEW, lr=1e-5))
    there, here = (torch.cat([(p.detach().float() - old).flatten() for p, old in zip(each.parameters(), before)]) for each in (whole, half))
    assert (here != 0).float().mean() < 0.2 * (there != 0).float().mean()
    assert 0.8 < there @ here / (there @ there) < 1.2


def test_a_gradient_that_is_not_finite_moves_nothing(monkeypatch):
    model, losses = tiny_llama(), fine_tuning.target_losses
    prune(model, "magnitude", 0.5)
    before = model_fingerprint(model)
    monkeypatch.setattr(fine_tuning, "target_losses", lambda model, batch: losses(model, batch) + (0 * model.lm_head.weight).sum().sqrt())
    refuses("The gradient of a step is not finite", recover, model, made_up_calibration(), FEW)
    assert model_fingerprint(model) == before


def test_an_example_without_a_target_is_named():
    model, examples = tiny_llama(), made_up_calibration().examples
    prune(model, "magnitude", 0.5)
    without = replace(examples[0], uid="without", labels=(IGNORED,) * len(examples[0].labels))
    refuses("Example without of .* has no target", recover, model, Calibration.from_examples([*examples, without], k=1), FEW)


def test_a_broken_low_rank_training_leaves_the_model_as_it_was():
    model = tiny_llama()
    prune(model, "magnitude", 0.5)
    before = model_fingerprint(model)
    refuses("not a finite number", recover, model, made_up_calibration(), FineTuning(steps=40, lr=1e30, examples=4, rank=2))
    assert model_fingerprint(model) == before


@pytest.mark.parametrize("rank", [None, 2])
def test_a_teacher(rank, tmp_path):
    """The divergence falls and zeros hold; it goes on to the same bits from its own state alone, and the teacher stays as it was."""
    settings, (model, again, other), dense = replace(FEW, steps=8, lr=1e-3, rank=rank), (tiny_llama() for _ in range(3)), tiny_llama()
    for each in (model, again, other):
        prune(each, "magnitude", 0.5)
    before, fingerprint = zeros_of(model), model_fingerprint(dense)
    report = recover(model, made_up_calibration(), settings, tmp_path, 3, dense)
    assert_held(model, before)
    assert report.losses[-1] < report.losses[0] and report.teacher == fingerprint == model_fingerprint(dense)
    assert all(p.grad is None for p in dense.parameters())
    assert recover(again, made_up_calibration(), settings, tmp_path, 3, dense).after == report.after
    refuses(r"another training \(teacher\)", recover, other, made_up_calibration(), settings, tmp_path)
    refuses("The teacher is the model itself", recover, other, made_up_calibration(), settings, teacher=other)


class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, **others):
        raise RuntimeError("the power went")


def test_a_trainer_that_breaks_lets_go_with_its_callback(tmp_path):
    """With gradients added up over batches and a learning rate for which everything moves."""
    model, hooks = tiny_llama(), len(_global_optimizer_post_hooks)
    prune(model, "magnitude", 0.5)
    before, rows = zeros_of(model), [{"input_ids": list(e.input_ids), "labels": list(e.labels)} for e in made_up_calibration(step=0).examples]
    arguments = TrainingArguments(tmp_path, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, learning_rate=0.1,
                                  weight_decay=0.1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[HeldZeros(), Breaks()])
    with pytest.raises(RuntimeError, match="the power went"):
        trainer.train()
    assert len(_global_optimizer_post_hooks) == hooks + 1
    assert_held(model, before)
    trainer.callback_handler.callbacks = [c for c in trainer.callback_handler.callbacks if not isinstance(c, Breaks)]
    trainer.train()
    assert_held(model, before)
    assert len(_global_optimizer_post_hooks) == hooks
    trainer.add_callback(Breaks())
    with pytest.raises(RuntimeError, match="the power went"):
        trainer.train()
    del trainer
    gc.collect()
    assert len(_global_optimizer_post_hooks) == hooks


@pytest.mark.parametrize("kind", [Qwen2Config, GPT2Config], ids=lambda kind: kind.model_type)
def test_peft(kind):
    """Trained by AdamW with dropout and decay, merged safely or not, unmerged again: zeros are zeros; adapters of another kind are refused."""
    peft = pytest.importorskip("peft", reason="the extra 'recover' is not installed")
    names = ["c_attn", "c_proj"] if kind is GPT2Config else ["q_proj", "down_proj"]
    for safe in (False, True):
        model = tiny(kind)
        prune(model, "magnitude", 0.5)
        before = zeros_of(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, lora_dropout=0.1, fan_in_fan_out=kind is GPT2Config))
        assert mask_adapters(adapted) == 6
        optimiser, ids = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.1), torch.arange(8)[None]
        for _ in range(3):
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimiser.step()
        adapted.eval()
        with torch.no_grad():
            trained = adapted(input_ids=ids).logits
            adapted.merge_adapter()
            assert torch.allclose(adapted(input_ids=ids).logits, trained, atol=1e-4)
            adapted.unmerge_adapter()
            merged = adapted.merge_and_unload(safe_merge=safe)
            assert torch.allclose(merged(input_ids=ids).logits, trained, atol=1e-4)
        assert_held(merged, before)
    for extra in ({"use_dora": True}, {"lora_bias": True}):
        model = tiny(kind)
        prune(model, "magnitude", 0.5)
        refuses("without DoRA", mask_adapters, peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, fan_in_fan_out=kind is GPT2Config, **extra)))


def test_the_command(tmp_path):
    """In bfloat16, by rank and in full; what is said of the pruning stays, and mistakes are a sentence that leaves nothing behind."""
    data = ("--device", "cpu", "--tasks", "lab-strategyqa", "--n", 2, "--k", 1)
    assert cap("prune", "--method", "wanda", "--sparsity", 0.5, "--dtype", "bfloat16", *data, "--out", tmp_path / "pruned").exit_code == 0
    words = ("recover", "--model", tmp_path / "pruned", *data, "--steps", 2, "--examples", 2)
    for name, more in (("full", ()), ("rank", ("--rank", 2, "--lr", 0.01)), ("taught", ("--teacher", "lab"))):
        output_of(*words, *more, "--out", tmp_path / name)
        model, _ = load_model(str(tmp_path / name), device="cpu")
        assert_held(model, zeros_of(load_model(str(tmp_path / "pruned"), device="cpu")[0]))
        assert model.dtype == torch.bfloat16
        assert read_json(tmp_path / name / REPORT)["after"] == model_fingerprint(model)
        before, after = (read_json(tmp_path / folder / "config.json")["cap_nb"] for folder in ("pruned", name))
        tuning = after.pop("fine-tuning")
        assert tuning["trained on"]["examples"] == {"lab-strategyqa": 2} and tuning["trained on"]["fingerprint"] == tuning["calibration"]
        assert tuning["steps"] == 2 and sealed(after) == before and ("teacher" in tuning) == (name == "taught")
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == ["full", "pruned", "rank", "taught"]
    (tmp_path / "full.unfinished").mkdir()
    (tmp_path / "full.unfinished" / STATE).touch()  # of a training that was killed when its folder had its name
    for more, part in ((("--out", tmp_path / "full"), "exists already"),
                       (("--teacher", tmp_path / "pruned", "--out", tmp_path / "x"), "The teacher is the model itself")):
        done = cap(*words, *more)
        assert done.exit_code == 2 and part in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.output
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(there)
