"""Public functions and commands called wrongly, by the ten thousand: right calls in which one thing is replaced by something else.

    python tests/attack.py python [COUNT]      every public function: an argument, a field of it, or its first item is replaced
    python tests/attack.py commands [COUNT]    every command of `cap`: an option or argument is replaced or added

COUNT calls are drawn by a fixed seed; without it, all are tried. What 1,000 or more came to goes into figures/bad_input/attacked.json, which the page of wrong
uses shows. A wrong call must end in `BadInput` (or exit code 2) with one line; it may be accepted, if what it asks for can be done. Each function and
command is tried in a forked process of its own, with a limit of time for each call and of memory for the process.
"""
import contextlib
import copy
import datetime
import faulthandler
import inspect
import json
import logging
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, fields, is_dataclass, replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
import typer
from typer.testing import CliRunner

import cap_nb.all as public
from cap_nb.command_line import NO_MEMORY, app
from cap_nb.core.errors import BadInput, lacks_memory
from cap_nb.core.files import read_checked, write_checked
from cap_nb.experiments.claims import ModelRecords
from cap_nb.experiments.reasoning_steps import category_shares
from cap_nb.jobs.chains import Answering, write_chains
from cap_nb.jobs.records import commit_of_package
from cap_nb.jobs.settings import SpeedSettings, changed
from cap_nb.jobs.sweeps import read_config, sweep_jobs
from cap_nb.methods.budgets import BudgetSettings
from cap_nb.models.lab import lab_model
from fixtures import tiny_llama

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "figures" / "bad_input" / "attacked.json"
SECONDS = 5  # that a call may take
MEMORY = 6 << 30  # that a process may take on top
ENDS = ("one sentence", "accepted", "too long", "out of memory", "the user's own function", "otherwise")
WRONG_ANYHOW = {"fetch", "harness_answers", "train_lab", "train-lab", "write_ledger", "ledger"}  # The right one would ask the network, want what may not be here, or take too long
NOT_CALLED = {"fetch_smollm2": "asks the network", "cap_naive": "forty lines to be read, which check nothing"}


class TooLong(BaseException):
    """A call takes too long; nobody catches this by accident."""


# ---- what may be wrong ----
def paths(place):
    """Paths of all kinds; what stands there is laid anew."""
    for name in ("folder", "file.txt", "pipe", "dangling"):
        path = place / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    (place / "folder").mkdir()
    (place / "folder" / "something").write_text("here already")
    (place / "file.txt").write_text("a text")
    os.mkfifo(place / "pipe")
    (place / "dangling").symlink_to(place / "nowhere" / "at" / "all")
    return {"nothing there": place / "nothing", "a folder": place / "folder", "a file": place / "file.txt", "a pipe": place / "pipe", "a dangling link": place / "dangling",
            "below a file": place / "file.txt" / "new", "a long name": place / ("n" * 300), "/dev/zero": Path("/dev/zero"), "/dev/null": Path("/dev/null"),
            "/proc/nowhere/new": Path("/proc/nowhere/new")}


WRONG = {
    "None": None, "True": True, "False": False, "0": 0, "-1": -1, "1": 1, "3": 3, "2 ** 31": 2 ** 31, "2 ** 63": 2 ** 63, "10 ** 30": 10 ** 30, "-(10 ** 30)": -(10 ** 30),
    "0.5": 0.5, "-0.5": -0.5, "nan": float("nan"), "inf": float("inf"), "1e308": 1e308, "1j": 1j, "Decimal('0.5')": Decimal("0.5"), "numpy.float32('nan')": np.float32("nan"),
    "''": "", "'nothing'": "nothing", "'a\\0b'": "a\0b", "'\\ud800'": "\ud800", "'a\\nb'": "a\nb", "'3'": "3", "b'bytes'": b"bytes", "object()": object(),
    "SimpleNamespace()": SimpleNamespace(), "()": (), "[]": [], "{}": {}, "set()": set(), "['a']": ["a"], "[None]": [None], "[1, 'a']": [1, "a"], "[[]]": [[]], "{'a': 1}": {"a": 1},
    "{1: None}": {1: None}, "range(3)": range(3), "iter([1])": lambda: iter([1]), "numpy.array(3)": np.array(3), "numpy.ones((2, 2))": np.ones((2, 2)),
    "numpy.array(['a'])": np.array(["a"]), "torch.tensor(3)": torch.tensor(3), "torch.empty(0)": torch.empty(0), "torch.ones(2, 2)": torch.ones(2, 2),
    "torch.ones(2, 2, 2, 2)": torch.ones(2, 2, 2, 2), "torch.ones(2, 2, dtype=int)": torch.ones(2, 2, dtype=int), "torch.ones(2, 2) > 0": torch.ones(2, 2) > 0,
    "torch.full((2, 2), nan)": torch.full((2, 2), float("nan")), "torch.ones(2, 2, device='meta')": torch.ones(2, 2, device="meta"), "torch.eye(2).to_sparse()": torch.eye(2).to_sparse(),
    "torch.ones(2, 2, dtype=torch.complex64)": torch.ones(2, 2, dtype=torch.complex64), "pandas.DataFrame()": pd.DataFrame(), "pandas.DataFrame({'a': [1]})": pd.DataFrame({"a": [1]}),
    "pandas.Series([1.0])": pd.Series([1.0]), "int": int, "...": ..., "lambda: None": lambda: None, "lambda *given: None": lambda *given, **named: None,
    "ValueError('x')": ValueError("x"), "re.compile('a')": re.compile("a"), "datetime.date(2026, 1, 1)": datetime.date(2026, 1, 1), "torch.nn.Linear(2, 2)": torch.nn.Linear(2, 2),
    "torch.float16": torch.float16, "torch.device('meta')": torch.device("meta")}
FUNCTIONS = {"iter([1])"}  # Of these each call gets a new one


def wrong_values(place, path_kinds=True):
    """Name -> value, all that an argument is replaced by."""
    foreign = {"a vision model": VISION, "a model without numbers": NO_NUMBERS}
    return {name: value() if name in FUNCTIONS else value for name, value in WRONG.items()} | foreign | (paths(place) if path_kinds else {})


VISION = transformers.ViTModel(transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4))
with torch.device("meta"):
    NO_NUMBERS = transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9))


# ---- right calls ----
def world(place):
    """What right calls need: a tiny model with the lab's tokenizer, examples, losses, a run, and folders of them."""
    _, tokenizer = lab_model()
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=512, bos_token_id=0, eos_token_id=1)
    w = SimpleNamespace(place=place, tokenizer=tokenizer, model=model)
    public.save_model(model, tokenizer, place / "model")
    w.pruned = copy.deepcopy(model)
    w.report = public.prune(w.pruned, "magnitude", 0.5)
    for words in (f"prune --model {place}/model --method magnitude --sparsity 0.5 --device cpu --out {place}/pruned", f"card {place}/pruned --base owner/name",
                  f"export {place}/pruned --format bitmask --out {place}/small"):
        result = CliRunner().invoke(app, words.split())
        assert result.exit_code == 0, result.output
    w.calibration = public.calibration_set(tokenizer, tasks=("lab-arc",), n=4, k=2)
    w.losses = public.score_heads(model, w.calibration)
    public.save_losses(w.losses, place / "losses.safetensors")
    w.partial = public.screen_heads(model, w.calibration, 0.9)
    w.scores = public.causal_scores(w.losses)
    w.factors = public.importance_factors(w.scores)
    w.norms = public.dense_norms(model, w.calibration)
    public.save_norms(w.norms, place / "norms.safetensors")
    w.job = changed(public.Job(), name=str(place / "model"), tasks=("lab-arc",), accuracy_tasks=("lab-arc",), sparsities=(0.5,), methods=("cap", "wanda", "magnitude"), n=6, k=1, evaluate_n=2,
                    loss_n=2, max_new_tokens=4, windows=1, window_tokens=32, text="lab-text", style="lab", device="cpu")
    public.run_job(w.job, place / "run")
    for seed in (0, 1):
        public.run_job(changed(w.job, calibration_seed=seed, methods=("cap", "wanda"), evaluate_n=4, loss_n=4, windows=2), place / "seeds" / f"{seed}")
    public.pack_run(shutil.copytree(place / "run", place / "packed"))
    w.run = public.load_run(place / "run")
    w.evaluations = tuple(w.run.evaluations)
    w.answers = tuple(answer for one in w.evaluations[:1] for answer in one.answers)
    w.problems = public.evaluation_problems("lab-arc", 2)
    w.comparisons = public.compare_methods(w.evaluations)
    w.seeds = public.read_seeds(place / "seeds")
    w.records = [ModelRecords(name="tiny", cells={(one.method, one.sparsity): one for one in w.evaluations})]
    w.ledger = public.claims_ledger(w.records)
    w.budgets = public.measured_budgets(model, w.calibration, 0.5, BudgetSettings(examples=4))
    w.shares = category_shares({("cap", 0.5): public.reasoning_report(w.answers, w.problems)}, "lab-arc")
    (place / "sweep.yaml").write_text(f"model: {place / 'model'}\nmethods: magnitude\nseed: [0]\n")
    public.write_harness_task(place / "harness", tokenizer, w.problems)
    w.chains = public.own_chains(model, tokenizer, ("lab-arc",), 2, style="lab", answering=Answering(tries=1, max_new_tokens=4))
    right_ones = tuple(replace(chain, answer=chain.gold, cut_off=False) for chain in w.chains.chains)
    write_chains(place / "chains.jsonl", replace(w.chains, chains=right_ones))
    (place / "own.jsonl").write_text("".join(f'{{"question": "How many are {number}?", "answer": "{number}"}}\n' for number in range(40)))
    return w


def right_calls(w):
    """Public function -> the arguments of a right call that takes little; made anew for each call, since some are changed by it."""
    p, new, score, relative = w.place, w.place / "new", lambda known: known.weight.abs(), lambda model, known: [1.0] * 3
    m, c, t = copy.deepcopy(w.model), w.calibration, w.tokenizer
    draw = dict(data_dir=None, style="lab", seed=0)
    mt = dict(model=m, tokenizer=t)
    return {
        "accuracy": lambda: dict(**mt, task="lab-arc", n=1, max_new_tokens=3, **draw), "add_allocation": lambda: dict(name="mine", relative=relative, needs=(), says="x", source="me"),
        "add_attribution": lambda: dict(name="mine", compute=lambda model, calibration, tokens: torch.ones(3, 4), says="x", source="me"),
        "add_criterion": lambda: dict(name="mine", score=score, needs=(), scope="row", says="x", source="me"),
        "add_family": lambda: dict(model_type="mine", family=public.FAMILIES["llama"]),
        "add_task": lambda: dict(name="mine", files={"calibration": p / "own.jsonl", "evaluation": p / "own.jsonl"}, answer=r"\d+", prompt="{question}", line="Answer: {answer}"),
        "add_text": lambda: dict(name="moby", evaluation=p / "file.txt", calibration=p / "file.txt"), "anatomy": lambda: dict(model=m),
        "answer_problems": lambda: dict(**mt, problems=w.problems, style="lab", max_new_tokens=3, shots=(), stop_early=True, decoding=public.Decoding()),
        "arithmetic_check": lambda: dict(text="3 + 4 = 7"),
        "bench_folder": lambda: dict(folder=p / "pruned", against=p / "model", settings=SpeedSettings(batches=(1,), prompt=4, steps=1, rounds=1, backends=("torch",), device="cpu"), note=""),
        "bootstrap_interval": lambda: dict(values=[1.0, 2.0, 3.0], seed=0, confidence=0.95, resamples=50), "by_relative": lambda: dict(relative=relative, needs=(), whose="mine"),
        "calibration_set": lambda: dict(tokenizer=t, tasks=("lab-arc",), n=3, k=1, **draw), "causal_scores": lambda: dict(losses=w.losses, how="paper", k=2),
        "chain_calibration": lambda: dict(tokenizer=t, chains=p / "chains.jsonl", tasks=("lab-arc",), n=1, k=1, seed=0, per_problem=1),
        "check_anatomy": lambda: dict(model=m, layers=(0,)), "checked_scores": lambda: dict(compute=score, whose="mine"), "checkpoint_fingerprint": lambda: dict(folder=p / "model"),
        "claims_ledger": lambda: dict(models=w.records), "compare_methods": lambda: dict(evaluations=w.evaluations, pairs=[("cap", "magnitude")], family="x", seed=0),
        "compare_over_seeds": lambda: dict(runs=w.seeds, pairs=[("cap", "wanda")], family="x"),
        "compare_runs": lambda: dict(runs=[p / "run"], methods=("cap", "magnitude"), against="magnitude", sparsities=(0.5,), seed=0),
        "compare_with_paper": lambda: dict(comparisons=w.comparisons), "comparison_markdown": lambda: dict(comparisons=w.comparisons),
        "dense_norms": lambda: dict(model=m, calibration=c, batch_tokens=4096), "error_category": lambda: dict(answer=w.answers[0], problem=w.problems[0], perplexity=2.0),
        "evaluation_problems": lambda: dict(task="lab-arc", n=2, seed=0, data_dir=None, exclude=frozenset(), split="evaluation"),
        "export_folder": lambda: dict(folder=p / "pruned", out=new, form="delta", base=p / "model"), "export_gguf": lambda: dict(folder=p / "pruned", out=p / "new.gguf", dtype="f16"),
        "extract_answer": lambda: dict(text="Answer: A", task="lab-arc", style="lab", strict=True),
        "generate_greedy": lambda: dict(**mt, prompts=[[1, 2], [3]], max_new_tokens=2, line=re.compile("a"), decoding=public.Decoding()),
        "harness_answers": lambda: dict(**mt, folder=p / "harness", task="lab-arc", batch_size=2), "held_out_losses": lambda: dict(**mt, task="lab-arc", n=2, **draw),
        "held_zeros": lambda: dict(model=copy.deepcopy(w.pruned)), "importance_factors": lambda: dict(scores=w.scores, low=1.0, high=10.0),
        "lab_records": lambda: dict(task="arc", split="calibration", n=3, seed=0), "lab_text": lambda: dict(split="evaluation", n_sentences=20, seed=0),
        "load_losses": lambda: dict(path=p / "losses.safetensors"), "load_model": lambda: dict(name=p / "model", dtype="float32", device="cpu"), "load_norms": lambda: dict(path=p / "norms.safetensors"),
        "load_problems": lambda: dict(task="lab-arc", split="evaluation", data_dir=None), "load_run": lambda: dict(folder=p / "run"),
        "load_text": lambda: dict(name="lab-text", data_dir=None, split="evaluation"),
        "make_example": lambda: dict(tokenizer=t, prompt="What?", target=" This.", task="own", answer="x", uid="1"), "masked_head": lambda: dict(model=m, layer=0, head=0),
        "measured_budgets": lambda: dict(model=m, calibration=c, sparsity=0.5, settings=BudgetSettings(examples=4), store=None, local=None),
        "method_table": lambda: dict(evaluations=w.evaluations), "mixed_calibration": lambda: dict(parts=[c, c], k=2, seed=0),
        "model_card": lambda: dict(folder=p / "pruned", run=p / "run", base_model="owner/name"), "model_fingerprint": lambda: dict(model=m),
        "output_projection": lambda: dict(model=m, layer=0), "overlap": lambda: dict(calibration=c, problems=w.problems),
        "own_chains": lambda: dict(**mt, tasks=("lab-arc",), n=1, **draw, answering=Answering(tries=2, max_new_tokens=3, file=p / "new.jsonl")),
        "pack_run": lambda: dict(folder=shutil.copytree(p / "run", new)),
        "perplexity": lambda: dict(**mt, text="lab-text", data_dir=None, windows=1, window_tokens=16, batch_windows=1, seed=0),
        "plan": lambda: dict(job=w.job, devices=1, probe=None, prompt_tokens=20, target_tokens=20, memory=2 ** 34),
        "plan_text": lambda: dict(planned=public.plan(w.job, prompt_tokens=20, target_tokens=20)), "plot_budgets": lambda: dict(budgets=w.budgets),
        "plot_calibration": lambda: dict(calibration=c), "plot_claims": lambda: dict(ledger=w.ledger), "plot_comparisons": lambda: dict(comparisons=w.comparisons),
        "plot_error_mixture": lambda: dict(shares=w.shares, ax=None, title="x"), "plot_factors": lambda: dict(scores={"a": w.scores}),
        "plot_head_importance": lambda: dict(scores=w.scores, title="x"), "plot_importance_distribution": lambda: dict(scores=w.scores, named=2, title="x"),
        "plot_regions": lambda: dict(model=m, factors=w.factors, layer=0), "plot_score_intervals": lambda: dict(losses=w.losses, how="paper"),
        "plot_seed_spread": lambda: dict(table=public.seed_table(w.seeds), runs=w.seeds, title="x"), "plot_sparsity_curves": lambda: dict(evaluations=w.evaluations, title="x"),
        "plot_threshold": lambda: dict(scores=torch.rand(9), factors=torch.ones(9), tau=0.5, bins=5, names=None), "plot_zeros": lambda: dict(report=w.report),
        "plot_zeros_by_method": lambda: dict(reports=[w.report]), "projections": lambda: dict(model=m),
        "prune": lambda: dict(model=m, method="cap", sparsity=0.5, factors=w.factors, calibration=c, ties="exact", batch_tokens=4096, seed=0),
        "prune_checkpoint": lambda: dict(src=p / "model", dst=new, sparsity=0.5, factors=w.factors, method="wanda", norms=w.norms, ties="exact", at_once=1 << 12),
        "publish": lambda: dict(folder=p / "small", repository="owner/name", dry_run=True, private=False, message="x", api=None),
        "rank_correlation": lambda: dict(a=torch.rand(4), b=torch.rand(4)), "read_seeds": lambda: dict(folder=p / "seeds"),
        "reasoning_report": lambda: dict(answers=w.answers, problems=w.problems, dense=None, perplexities=None), "reasoning_steps": lambda: dict(text="One. Two."),
        "recover": lambda: dict(model=copy.deepcopy(w.pruned), calibration=c, settings=public.FineTuning(steps=1, examples=1), folder=new, save_every=1),
        "region_factors": lambda: dict(model=m, factors=w.factors, device="cpu"),
        "repeat_run": lambda: dict(folder=p / "run", out=new, methods=("magnitude",), sparsities=(0.5,), places={"name": str(p / "model")}),
        "restore_folder": lambda: dict(folder=p / "small", out=new, base=None), "results_frame": lambda: dict(runs=[p / "run"], summary=True, settings=("calibration.n",)),
        "run_job": lambda: dict(job=changed(w.job, methods=("magnitude",)), folder=new, store=p / "new.store", note="x", follow=None),
        "run_sweep": lambda: swept(w), "run_variants": lambda: dict(job=w.job, folder=new, base=p / "run", names=("cap",), store=p / "new.store", note="x", text_windows=1),
        "save_losses": lambda: dict(losses=w.losses, path=new), "save_model": lambda: dict(**mt, folder=new), "save_norms": lambda: dict(norms=w.norms, path=new, meta={"a": 1}),
        "score_heads": lambda: dict(model=m, calibration=c, batch_tokens=4096, store=new, tokenizer_fingerprint="x", heads_at_once=2),
        "score_heads_naive": lambda: dict(model=m, calibration=c, batch_tokens=4096, heads=((0, 0),)), "score_interval": lambda: dict(losses=w.losses, how="paper", draws=9, seed=0, confidence=0.9),
        "screen_heads": lambda: dict(model=m, calibration=c, budget=0.9, seed=0, batch_tokens=4096, store=new, tokenizer_fingerprint="x", heads_at_once=2),
        "screened_scores": lambda: dict(partial=w.partial, confidence=0.9, reach=2.0), "seed_table": lambda: dict(runs=w.seeds),
        "shrink": lambda: dict(model=m, neuron_scores=torch.rand(3, 24), head_scores=torch.rand(3, 4), neurons_kept=8, groups_kept=1),
        "split_half_reliability": lambda: dict(losses=w.losses, splits=3, seed=0), "table_csv": lambda: dict(table=public.method_table(w.evaluations)),
        "table_markdown": lambda: dict(table=public.method_table(w.evaluations), provenance={"a": 1}),
        "target_losses": lambda: dict(model=m, batch={name: torch.ones(2, 5, dtype=int) for name in ("input_ids", "attention_mask", "labels")}),
        "text_calibration": lambda: dict(tokenizer=t, text="lab-text", n=2, tokens=16, k=1, seed=0, data_dir=None),
        "train_lab": lambda: dict(folder=new, steps=1, seed=0, work=p / "new.work", n=1),
        "unpack_run": lambda: dict(folder=p / "packed", target=new), "wilson_interval": lambda: dict(successes=1, n=3, confidence=0.9),
        "write_harness_task": lambda: dict(folder=new, tokenizer=t, problems=w.problems, style="lab", max_new_tokens=3),
        "write_ledger": lambda: dict(figures=shutil.copytree(p / "run", new / "tiny_methods").parent, models=None)}


def swept(w):
    """A sweep of two runs."""
    config = read_config(w.place / "sweep.yaml", sweep_options())
    return dict(config=config, jobs=sweep_jobs(config, sweep_options(), w.job), folder=w.place / "new", store=w.place / "new.store", note="x", track=None)


def sweep_options():
    """The options that a file of options may hold."""
    from cap_nb.command_line import known_options
    return known_options()


# ---- where something may be wrong ----
def is_ours(value):
    """Whether a value is an instance of this package's dataclasses."""
    return is_dataclass(value) and not isinstance(value, type) and type(value).__module__.startswith("cap_nb")


def places(value, deep=3):
    """Where something in a value may be replaced, as a path of names of fields and of 0 for a first item; () is the value itself."""
    yield ()
    if not deep:
        return
    if is_ours(value):
        for field in fields(value):
            yield from ((field.name, *rest) for rest in places(getattr(value, field.name), deep - 1))
    elif isinstance(value, (list, tuple)) and value:
        yield from ((0, *rest) for rest in places(value[0], deep - 1))


def replaced(value, place, new):
    """A value with something else at a place."""
    if not place:
        return new
    first, rest = place[0], place[1:]
    if first == 0:
        return type(value)([replaced(value[0], rest, new), *value[1:]])
    return replace(value, **{first: replaced(getattr(value, first), rest, new)})


@dataclass(frozen=True)
class Call:
    """A wrong call."""
    of: str  # Name of the function or command
    argument: str  # Name of the argument or option
    place: tuple  # Where in it
    wrong: str  # Name of what stands there

    def __str__(self):
        return f"{self.of}({'.'.join(map(str, (self.argument, *self.place)))}={self.wrong})"


def right(of):
    """The call in which nothing is wrong."""
    return Call(of, "", (), "")


def python_calls(w):
    """Every wrong call of every public function."""
    right = right_calls(w)
    names = list(wrong_values(w.place))
    for name, make in right.items():
        for argument, value in make().items():
            for place in places(value):
                yield from (Call(name, argument, place, wrong) for wrong in names)
        clear(w.place)


def called(w, call):
    """Make a wrong call: how it ended, and where if it ended otherwise."""
    clear(w.place)
    given = right_calls(w)[call.of]()
    if call != right(call.of):
        given[call.argument] = replaced(given[call.argument], call.place, wrong_values(w.place)[call.wrong])
    function = getattr(public, call.of)
    wanted = inspect.signature(function).parameters.get(call.argument, inspect.Parameter).annotation
    try:
        with in_time(SECONDS if call.argument else 4 * SECONDS):
            result = function(**given)
            if isinstance(result, contextlib.AbstractContextManager) and call.of in ("held_zeros", "masked_head"):
                with result:
                    pass
        return "accepted", ""
    except TooLong:
        return "too long", ""
    except BadInput as error:
        return ("one sentence", str(error)) if whole_sentence(str(error)) else ("otherwise", f"BadInput: {error}")
    except Exception as error:
        if lacks_memory(error):
            return "out of memory", ""
        if "Callable" in str(wanted) and callable(given.get(call.argument)):
            return "the user's own function", ""
        return "otherwise", where(error)
    finally:
        plt.close("all")


def whole_sentence(text):
    """Whether it says in one line what was wrong, and what was expected."""
    return len(text.splitlines()) == 1 and len(text) < 2_000 and ": expected " in text


def where(error):
    """An error's class, the line of this package where it was raised, and what it says."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}cap_nb{os.sep}" in frame.filename]
    at = f"{Path(frames[-1].filename).name}, {frames[-1].name}" if frames else "no line of cap_nb"
    return f"{type(error).__name__} at {at}: {' '.join(str(error).split())[:120]}"


def clear(place):
    """Remove what a call may have made, the right inputs left alone."""
    for path in place.glob("new*"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def in_time(seconds):
    """Raise `TooLong` where the program is after so many seconds."""
    def too_long(*_):
        raise TooLong

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- the command line ----
WORDS = ["", "nothing", "-1", "0", "1", "0.5", "-0.5", "1.5", "nan", "inf", "1e308", "99999999999999999999", "9" * 400, "a b", "é", "a\nb", "\ud800", "n" * 300, ",", "a,,b", "1,2", "None",
         "true", "@", "cap@1:0", "{}", "--", "PLACE/nothing", "PLACE/folder", "PLACE/file.txt", "PLACE/pipe", "PLACE/dangling", "PLACE/file.txt/new", "/dev/zero", "/dev/null",
         "/proc/nowhere/new", "owner/name", "owner/name@main", "PLACE/model", "PLACE/run", "PLACE/losses.safetensors"]
FEW = "--model PLACE/model --tasks lab-arc --style lab --n 6 --k 1 --device cpu"
MEASURE = "--evaluate-n 2 --loss-n 2 --max-new-tokens 4 --windows 1 --window-tokens 32 --text lab-text --accuracy-tasks lab-arc"
RIGHT = {
    "run": f"{FEW} {MEASURE} --methods magnitude --sparsity 0.5 --out PLACE/new", "claims": f"{FEW} {MEASURE} --base PLACE/run --variants cap --out PLACE/new",
    "score": f"{FEW} --out PLACE/new.safetensors", "chains": "--model PLACE/model --tasks lab-arc --style lab --n 1 --device cpu --tries 1 --max-new-tokens 3 --out PLACE/new.jsonl",
    "hessians": f"{FEW} --out PLACE/new", "prune": f"{FEW} --method magnitude --sparsity 0.5 --out PLACE/new", "export": "PLACE/pruned --format bitmask --out PLACE/new",
    "restore": "PLACE/small --out PLACE/new", "gguf": "PLACE/pruned --out PLACE/new.gguf", "bench": "PLACE/pruned --prompt 4 --steps 1 --rounds 1 --batches 1 --backends torch --device cpu",
    "card": "PLACE/pruned --run PLACE/run --force", "publish": "PLACE/small owner/name --dry-run", "shrink": f"{FEW} --sparsity 0.3 --out PLACE/new",
    "recover": "--model PLACE/pruned --tasks lab-arc --style lab --n 3 --device cpu --steps 1 --examples 1 --out PLACE/new",
    "eval": f"--model PLACE/model --tasks lab-arc --style lab --device cpu {MEASURE} --out PLACE/new", "table": "PLACE/run", "figures": "PLACE/new.run", "compare": "PLACE/run --against magnitude",
    "repeat": "PLACE/run --out PLACE/new --methods magnitude", "ledger": "PLACE/new.figures", "pack": "PLACE/new.run", "unpack": "PLACE/packed PLACE/new", "methods": "",
    "plan": f"{FEW} --no-probe", "fetch": "nothing", "train-lab": "--steps 1 --out PLACE/new"}


def command_calls(w):
    """Every wrong line of every command: each of its options and arguments with each word, and the command without it."""
    for name, command in typer.main.get_command(app).commands.items():
        for parameter in command.params:
            option = next((word for word in parameter.opts if word.startswith("--")), None)
            if option in ("--help",) or getattr(parameter, "is_flag", False):
                continue
            yield from (Call(name, option or parameter.name, (), word) for word in WORDS)


def line_of(call, place):
    """The words of a wrong line."""
    words, wrong = RIGHT[call.of].split(), call.wrong
    if call == right(call.of):
        pass
    elif call.argument.startswith("--"):
        if call.argument in words:
            words[words.index(call.argument) + 1] = wrong
        else:
            words += [call.argument, wrong]
    else:
        arguments = [parameter.name for parameter in typer.main.get_command(app).commands[call.of].params if parameter.param_type_name == "argument"]
        at = arguments.index(call.argument)
        words = [*words[:at], wrong, *words[at + 1:]]
    return [call.of, *(word.replace("PLACE", str(place)) for word in words)]


def commanded(w, call):
    """Try a wrong line: how it ended, and where if it ended otherwise."""
    clear(w.place)
    paths(w.place)
    if "new.run" in RIGHT[call.of]:
        shutil.copytree(w.place / "run", w.place / "new.run")
    if "new.figures" in RIGHT[call.of]:
        shutil.copytree(w.place / "run", w.place / "new.figures" / "tiny_methods")
    try:
        with in_time(SECONDS if call.argument else 4 * SECONDS):
            result = CliRunner().invoke(app, line_of(call, w.place))
    except TooLong:
        return "too long", ""
    finally:
        plt.close("all")
    if isinstance(result.exception, TooLong):
        return "too long", ""
    said = result.stderr.strip()
    if result.exit_code == 0:
        return "accepted", ""
    if result.exit_code == 2 and NO_MEMORY in said or isinstance(result.exception, Exception) and lacks_memory(result.exception):
        return "out of memory", ""
    if result.exit_code == 2 and whole_sentence(said):
        return "one sentence", said
    return "otherwise", f"exit code {result.exit_code}: {said[:160] or where(result.exception)}"


# ---- trying ----
def child_of(w, calls, do, out):
    """The whole life of a forked process that makes some calls and says how each ended."""
    try:
        with open(os.devnull, "r+b") as nothing:
            for channel in (0, 1, 2):
                os.dup2(nothing.fileno(), channel)
        resource.setrlimit(resource.RLIMIT_AS, (virtual_memory() + MEMORY, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        os.chdir(w.place / "here")
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        with os.fdopen(out, "w") as channel:
            for call in calls:
                try:
                    said = do(w, call)
                except BaseException as error:
                    said = "otherwise", where(error)
                channel.write(json.dumps(said) + "\n")
                channel.flush()
    finally:
        os._exit(0)


def virtual_memory():
    """Bytes of address space that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def tried(w, calls, do, seconds=8 * SECONDS):
    """Make calls of one function in a forked process, which is begun anew behind a call that ends it or does not come back: how each ended."""
    ends = []
    while len(ends) < len(calls):
        inner, outer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(inner)
            child_of(w, calls[len(ends):], do, outer)
        os.close(outer)
        before, begun = len(ends), b""
        while select.select([inner], [], [], seconds)[0] and (piece := os.read(inner, 1 << 16)):
            *lines, begun = (begun + piece).split(b"\n")
            ends += [tuple(json.loads(line)) for line in lines]
        os.close(inner)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if len(ends) < len(calls):
            ends.append(("otherwise", "the process did not come back" if status == -signal.SIGKILL else f"the process ended with {status}"))
        assert len(ends) > before
    return ends


@contextlib.contextmanager
def prepared():
    """What calls need, in a folder that is removed."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "place"
        (place / "here").mkdir(parents=True)
        yield world(place)
    logging.disable(disabled)


def attacked(w, kind, count=None, seed=0, rights=True, say=lambda line: None):
    """Make all wrong calls of a kind, or so many of them, of each function behind its right call: call -> how it ended, and where; and how many there are."""
    every, do = {"python": (python_calls, called), "commands": (command_calls, commanded)}[kind]
    found, calls = {}, list(every(w))
    chosen = calls if count is None else [calls[at] for at in sorted(random.Random(seed).sample(range(len(calls)), min(count, len(calls))))]
    for of in dict.fromkeys(call.of for call in chosen):
        mine, start = [call for call in chosen if call.of == of], time.monotonic()
        (first, said), *others = tried(w, [right(of), *mine], do) if rights else [("accepted", ""), *tried(w, mine, do)]
        if first != "accepted" and of not in WRONG_ANYHOW:
            say(f"{of} is left out: its right call ended otherwise ({first}: {said})")
            continue
        found |= dict(zip(mine, others))
        ends, firsts = Counter(found[call][0] for call in mine), {}
        for call in mine:
            if found[call][0] == "otherwise":
                firsts.setdefault(found[call][1], []).append(call)
        say(f"{of}: {len(mine):,} calls, {', '.join(f'{ends[end]:,} {end}' for end in ENDS if ends[end])}; {time.monotonic() - start:.0f} s")
        for said, those in firsts.items():
            say(f"    {len(those)} times {said}\n        {those[0]}")
    return found, len(calls)


def noted(kind, found, known_calls):
    """Keep what calls of a kind came to."""
    kept = read_checked(RECORD) if RECORD.exists() else {}
    ends, of = Counter(end for end, _ in found.values()), Counter(call.of for call in found)
    otherwise = Counter(f"{call.of}: {said}" for call, (end, said) in found.items() if end == "otherwise")
    known = set(public.__all__) if kind == "python" else set(typer.main.get_command(app).commands)
    functions = {name for name in known if inspect.isfunction(getattr(public, name, None))} if kind == "python" else known
    kept[kind] = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": commit_of_package(), "python": platform.python_version(), "torch": torch.__version__,
                  "transformers": transformers.__version__, "calls": len(found), "known": known_calls, "reached": len(of), "ends": {end: ends[end] for end in ENDS},
                  "not called": {name: NOT_CALLED.get(name, "its right call ended otherwise") for name in sorted(functions - set(of))}, "otherwise": dict(otherwise.most_common(40))}
    write_checked(RECORD, kept)


def main(kind, count=None):
    """Attack, say what ended otherwise, and keep the counts of many calls."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with prepared() as w:
        found, known = attacked(w, kind, count, say=lambda line: print(ascii(line)[1:-1], flush=True))
    print(f"{len(found):,} calls, {dict(Counter(end for end, _ in found.values()))}")
    if count is None or count >= 1_000:
        noted(kind, found, known)
    sys.exit(any(end == "otherwise" for end, _ in found.values()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None)
