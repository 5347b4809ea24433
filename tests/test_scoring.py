"""Scoring that is killed, shared between processes, or refused; and its savings on every family."""

import ctypes
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
import typer
import yaml
from conftest import ROOT
from fixtures import refuses, tiny_llama
from notebooks_on_disk import cells
from programs import Program, cap, finished
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from cap_nb.command_line import app
from cap_nb.data.prompts import IGNORED, made_up_example
from cap_nb.calibration import Calibration
from cap_nb.core.files import locked
from cap_nb.methods.layer_walk import CLAIMS, losses_key
from cap_nb.methods import resumed_scoring
from cap_nb.methods.resumed_scoring import OWNER, Request, help_scoring, make_plan, score_heads, shared_prefix
from cap_nb.methods.screening import PartialLosses, Screening, by_task, first_counts, in_rounds, rank_weights, read_scores, save_partial, screen_heads, share_spent
from cap_nb.scoring import HeadLosses, causal_scores, score_heads_naive, score_interval, split_half_reliability
from tools.benchmarks.processes import free_port

# two processes with two threads each would wait for one another
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
SMALL = ["score", "--model", "lab", "--n", "2", "--batch-tokens", "256"]


def units(out, kind="batch"):
    return sorted(out.with_name(out.name + ".unfinished").rglob(f"{kind}-*.safetensors"))


def wait_for_units(out, process, number, kind="batch"):
    """Until so many units are finished; a process that ends before is a failure of the test."""
    while len(units(out, kind)) < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("scores")/"S.safetensors"
    done = finished(cap(*SMALL, "--out", out))
    assert done.returncode == 0, done.stderr
    return out.read_bytes()


# killed


def test_a_killed_screening_goes_on_and_gives_the_same_bytes(tmp_path):
    """Killed among the slopes, and in a later round, whose choice follows from what is kept."""
    once, out = tmp_path/"once.safetensors", tmp_path/"S.safetensors"
    few = [*SMALL, "--n", "4", "--batch-tokens", "512", "--tasks", "lab-arc", "--budget", "0.7", "--out"]
    assert finished(cap(*few, once)).returncode == 0
    for kind, number in (("slopes", 1), ("masked", 4)):
        process = Program(cap(*few, out))
        wait_for_units(out, process, number, kind)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in (*units(out, "slopes"), *units(out, "masked"))}
    process = Program(cap(*few, out))
    wait_for_units(out, process, len(units(out, "masked")) + 1, "masked")
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert process.wait() == 0 and out.read_bytes() == once.read_bytes()


def test_a_damaged_unit_is_named_and_measured_anew(tmp_path, undisturbed):
    out = tmp_path/"S.safetensors"
    process = Program(cap(*SMALL, "--out", out))
    wait_for_units(out, process, 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    damaged = units(out)[0]
    damaged.write_bytes(damaged.read_bytes()[:40])
    done = finished(cap(*SMALL, "--out", out))
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert f"{damaged.name} is damaged" in done.stderr and f"set aside as {damaged.name}.damaged" in done.stderr
    assert out.read_bytes() == undisturbed


# two at once


def test_a_second_process_on_the_same_store_is_refused_or_helps(tmp_path, undisturbed):
    out = tmp_path/"S.safetensors"
    first = Program(cap(*SMALL, "--out", out))
    wait_for_units(out, first, 1)
    first.send_signal(signal.SIGSTOP)
    second, helper = finished(cap(*SMALL, "--out", out)), finished(cap(*SMALL, "--out", out, "--join"))
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2 and "Another process is at work" in second.stderr
    assert helper.returncode == 0 and "units of" in helper.stdout and not helper.stdout.startswith("0 units"), helper.stderr
    assert first.wait(timeout=900) == 0
    assert out.read_bytes() == undisturbed


def test_two_processes_give_the_bytes_of_one(tmp_path, undisturbed):
    out, port = tmp_path/"S.safetensors", str(free_port())

    def work(rank):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        return cap(*SMALL, "--device", "cpu", "--out", out)()
    said = [rank.communicate(900) for rank in [Program(partial(work, rank)) for rank in range(2)]]
    assert out.read_bytes() == undisturbed, said
    assert "".join(shown for shown, _ in said).count("losses of 6 examples") == 1  # only one process speaks


@pytest.mark.skipif(not os.environ.get("CAP_NB_SOAK"), reason="starts three interpreters; make matrix does")
def test_two_processes_of_the_launcher_give_the_bytes_of_one(tmp_path, undisturbed):
    out = tmp_path/"S.safetensors"
    launcher = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
                "--dynamo_backend", "no", "--main_process_port", "0"]
    scoring = ["-m", "cap_nb", *SMALL, "--device", "cpu", "--out", str(out)]
    words = [sys.executable, "-m", "accelerate.commands.launch", *launcher, *scoring]
    done = subprocess.run(words, env=ONE_THREAD, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == undisturbed
    assert done.stdout.count("losses of 6 examples") == 1  # only one process speaks


@pytest.fixture
def hosts():
    """Two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2: hosts that share folders and nothing else."""
    names = [f"cap{os.getpid()}{end}" for end in "ab"]
    commands = [f"netns add {names[0]}", f"netns add {names[1]}",
                f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}"]
    for number, name in enumerate(names, 1):
        commands += [f"-n {name} addr add 10.77.0.{number}/24 dev cable", f"-n {name} link set cable up", f"-n {name} link set lo up"]
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: iproute2 is not installed")
    try:
        for words in commands:
            done = subprocess.run(["ip", *words.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: ip {words}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def on_hosts(hosts, out):
    """One launch on both, a process on each; only the calling thread changes its network, and after a fork there is no other."""
    launch = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "cable"}

    def work(name, rank):
        with open(f"/var/run/netns/{name}") as space:
            if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"cannot enter {name}")
        os.environ.update(launch, RANK=str(rank))
        return cap(*SMALL, "--device", "cpu", "--out", out)()

    return [Program(partial(work, name, rank)) for rank, name in enumerate(hosts)]


def test_a_host_is_lost_and_replaced(tmp_path, undisturbed, hosts):
    out = tmp_path/"S.safetensors"
    first, second = on_hosts(hosts, out)
    wait_for_units(out, first, 2)
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    _, said = first.communicate()
    assert first.returncode == 2 and "Another process of this launch has ended" in said and not out.exists()
    kept = {path: path.stat().st_mtime_ns for path in units(out)}
    first, second = on_hosts(hosts, out)
    assert first.wait(timeout=900) == second.wait(timeout=900) == 0
    assert kept and out.read_bytes() == undisturbed


STAND_IN = """#!/bin/sh
echo "$@" >> {folder}/asked-$TASK
case "$*" in
*--join) [ -e {folder}/asked-0 ] && touch {folder}/joined || exit 2 ;;
*) until [ -e {folder}/joined ]; do sleep 0.1; done; touch {folder}/scores.safetensors ;;
esac
"""


def test_the_job_files_of_the_page(tmp_path):
    """Their options are the program's, and the job runs the script. By the script, with a stand-in for the program, a helper that came too early asks
    again until the table is there; it is numbered as Kubernetes does it, the first task as Slurm does."""
    [text] = [c.source for c in cells(ROOT/"nbs"/"methods"/"00_layer_walk.ipynb") if "## On a cluster" in c.source]
    script, job = (textwrap.dedent(block) for block in re.findall(r"((?:    .*\n)+)", text))
    [(name, words)] = re.findall('score="cap (\\S+) (.+)"', script)
    command = typer.main.get_command(app).commands[name]
    assert command.make_context(name, [*words.split(), "--join"]).params["join"]
    with pytest.raises(Exception, match="No such option"):
        command.make_context(name, [*words.split(), "--joins"])
    spec = yaml.safe_load(job)["spec"]
    [container] = spec["template"]["spec"]["containers"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] and container["command"] == ["bash", "/shared/score.sh"]
    (tmp_path/"cap").write_text(STAND_IN.format(folder=tmp_path))
    (tmp_path/"cap").chmod(0o755)
    here, small = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, script.replace("/shared", str(tmp_path)).replace("sleep 30", "sleep 0.1")
    helper = subprocess.Popen(["bash", "-c", small], env=here | {"TASK": "1", "JOB_COMPLETION_INDEX": "1"})
    while not (tmp_path/"asked-1").exists():
        assert helper.poll() is None
    subprocess.run(["bash", "-c", small], env=here | {"TASK": "0", "SLURM_ARRAY_TASK_ID": "0"}, check=True, timeout=60)
    assert helper.wait(timeout=60) == 0
    asked = [(tmp_path/f"asked-{task}").read_text().splitlines() for task in (0, 1)]
    assert asked[0] == [f"score {words}".replace("/shared", str(tmp_path))] and len(asked[1]) > 1 and set(asked[1]) == {f"{asked[0][0]} --join"}


def test_a_helper_asks_a_files_lock_and_takes_as_many_heads(tmp_path, monkeypatch):
    """Over NFS a folder's lock is unknown on other machines, a file's is not; on another card as many heads might not fit."""
    model, calibration = tiny_llama(), with_prefix(0)
    units, asked = tmp_path / f"{losses_key(model, calibration, '')}-units", Request(batch_tokens=60, store=tmp_path)
    begun = make_plan(model, calibration, replace(asked, heads_at_once=2), units)[0].store.folder
    begun.mkdir(parents=True), (begun / CLAIMS).touch(), (units / OWNER).touch()
    with locked(units):
        refuses("No process is at work", help_scoring, model, calibration, asked)
    with locked(units / OWNER), monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "1.0")  # whose losses may differ in the last bits
        refuses("device and versions", help_scoring, model, calibration, asked)
    with locked(units / OWNER):
        assert help_scoring(model, calibration, asked) == len(list(begun.glob("batch-*"))) > 0
    seen = iter((True, False))
    monkeypatch.setattr(resumed_scoring, "busy", lambda path: next(seen))
    refuses("has ended without its table", help_scoring, model, calibration, asked)
    assert [path.name for path in units.iterdir() if path.is_dir()] == [begun.name]


# the savings, on every family


FAMILIES = {"llama": dict(kind=LlamaConfig), "mistral": dict(kind=MistralConfig, sliding_window=9),
            "qwen2": dict(kind=Qwen2Config)}


def behind(prefix, example):
    """The example behind as many tokens that all examples share."""
    return replace(example, input_ids=(*range(1, 1 + prefix), *example.input_ids),
                   labels=(IGNORED,) * prefix + example.labels)


def with_prefix(prefix):
    examples = [made_up_example(index, 9 + index % 4, prompt=3 + index % 3) for index in range(8)]
    return Calibration.from_examples([behind(prefix, example) for example in examples], k=2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("prefix", [0, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_saving_gives_the_losses_of_the_hook_loop(family, prefix, attention):
    model, calibration = tiny_llama(**FAMILIES[family], attn_implementation=attention), with_prefix(prefix)
    assert shared_prefix(calibration.examples) == prefix
    naive = score_heads_naive(model, calibration)
    for together in (1, 2, 3, 4):
        fast = score_heads(model, calibration, batch_tokens=60, heads_at_once=together)
        assert (fast.masked - naive.masked).abs().max() < 1e-5 and (fast.intact - naive.intact).abs().max() < 1e-5
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_heads_may_be_named_in_any_kind_of_list():
    model, calibration = tiny_llama(), with_prefix(0)
    wanted = score_heads(model, calibration, heads=[(0, 1), (2, 3)]).masked
    for heads in ([[0, 1], [2, 3]], ((0, 1), (2, 3))):
        assert torch.equal(score_heads(model, calibration, heads=heads).masked.isnan(), wanted.isnan())
    assert (~wanted.isnan()).any(-1).sum() == 2


@pytest.mark.parametrize("score", [score_heads_naive, score_heads, screen_heads])
def test_an_example_without_a_target_is_named(score):
    """Also where the first token alone has a label, since nothing predicts it."""
    for first in (IGNORED, 1):
        some = [made_up_example(number, 9) for number in range(9)]
        some[4] = replace(some[4], labels=(first,) + (IGNORED,) * 8)
        refuses("Example 4 of own has no target", score, tiny_llama(), Calibration.from_examples(some, k=1))


def test_a_first_round_of_unequal_tasks_stays_within_the_budget():
    """A large task's share and two examples of each small one may be more than all: then it is two of each."""
    task = torch.tensor([0] * 40 + [1] * 2 + [2] * 2)
    rise, slopes = torch.randn(2, 3, 44, generator=torch.Generator().manual_seed(0)).double(), torch.zeros(2, 3, 44).double()
    assert first_counts(by_task(task).sum(0), 0.14).tolist() == [2, 2, 2]
    assert share_spent(~in_rounds(lambda wanted: rise, slopes, task, 0.14, 0).isnan()) <= 0.14


@pytest.mark.parametrize("cell, value, why", [((0, 1, 0), torch.inf, "some loss is no finite number"), ((0, 1, slice(3, 6)), torch.nan, "some head was measured on no example of a task")])
def test_a_table_with_gaps_that_gives_no_scores_is_refused(cell, value, why, tmp_path):
    table = replace(table_of(torch.ones(2, 2, 6)), task=tuple("aaabbb"), meta={"screened": {"seed": 0}})
    table.masked[..., 0] = torch.nan  # a gap is no fault
    save_partial(PartialLosses(table, torch.zeros(2, 2, 6).double()), tmp_path / "x.safetensors")
    assert read_scores(tmp_path / "x.safetensors", "mean")[1].isfinite().all()
    table.masked[cell] = value
    save_partial(PartialLosses(table, torch.zeros(2, 2, 6).double()), tmp_path / "x.safetensors")
    refuses(f"is not a table of losses .{why}", read_scores, tmp_path / "x.safetensors", "mean")


def test_a_trial_pass_is_run_where_several_heads_of_a_layer_are_wanted(monkeypatch):
    tried, screening = [], Screening(model=tiny_llama(), calibration=with_prefix(0))
    monkeypatch.setattr("cap_nb.methods.screening.heads_by_memory", lambda *given: tried.append(given) or 1)
    wanted = torch.tensor([[True, False, False, False], [False, True, False, False], [False] * 4])
    screening.masked_batch([0, 1], wanted)
    assert not tried
    screening.masked_batch([0, 1], wanted | wanted.roll(1, 1))
    assert len(tried) == 1


def test_a_different_batch_or_head_count_never_reads_units_of_another(tmp_path):
    model, calibration = tiny_llama(), with_prefix(0)
    for options in (dict(batch_tokens=60), dict(batch_tokens=30), dict(batch_tokens=60, heads_at_once=3)):
        score_heads(model, calibration, store=tmp_path, **options)
        next(tmp_path.glob("*.safetensors")).unlink()
    assert len({unit.parent for unit in tmp_path.rglob("batch-*")}) == 3


def test_a_model_that_is_spread_over_memory_and_disk_scores_the_same(tmp_path):
    from accelerate import dispatch_model

    model, spread, calibration = tiny_llama(), tiny_llama(), with_prefix(20)
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "disk"}
    device_map |= {f"model.layers.{layer}": device for layer, device in enumerate(("cpu", "disk", "disk"))}
    spread = dispatch_model(spread, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(weight.is_meta for weight in spread.parameters())
    one, other = score_heads(model, calibration), score_heads(spread, calibration)
    assert torch.equal(one.masked, other.masked) and torch.equal(one.intact, other.intact) and one.meta == other.meta


def test_memory_that_runs_out_is_told_as_such_of_a_model_that_is_offloaded():
    from accelerate import cpu_offload

    spread, gone = cpu_offload(tiny_llama()), patch.object(resumed_scoring, "make_plan", side_effect=RuntimeError("CUDA out of memory"))
    with gone, pytest.raises(RuntimeError, match="CUDA out of memory"):
        score_heads(spread, with_prefix(4))


# ---- how far scores can be trusted ----
def test_tables_are_made_where_they_lie_whatever_torch_s_default_device_is():
    table = table_of(torch.rand(2, 2, 6, device="cpu", generator=torch.Generator().manual_seed(0)))
    wanted = [causal_scores(table), *score_interval(table, "mean", draws=5), split_half_reliability(table, splits=2)]
    with torch.device("meta"):
        found = [causal_scores(table), *score_interval(table, "mean", draws=5), split_half_reliability(table, splits=2)]
    assert all(torch.equal(a, b) for a, b in zip(wanted[:3], found)) and wanted[3] == found[3]
    assert table == table and table != replace(table) and hash(table)  # by what it is, not by what it holds


def test_one_score_has_no_rank_to_gain():
    assert rank_weights(torch.ones(1).double(), torch.ones(1).double()).tolist() == [0.0]


def table_of(rise):
    """A table of one task and one subset, float64 [L, H, N]."""
    count = rise.shape[-1]
    return HeadLosses(masked=rise.double(), intact=torch.zeros(count).double(), stratum=(0,) * count, task=("t",) * count, uid=tuple(map(str, range(count))), k=1, seed=0)


def test_an_interval_of_scores_is_that_of_a_mean():
    """As wide as the normal one, narrower with less confidence, and around the score when tokens weigh."""
    rise = 1 + torch.randn(1, 2, 400, generator=torch.Generator().manual_seed(0)).double()
    flat, half = table_of(rise), 1.96 * rise.std(-1) / 20
    low, high = score_interval(flat, "mean", draws=2000)
    assert torch.allclose(low, rise.mean(-1) - half, atol=0.02) and torch.allclose(high, rise.mean(-1) + half, atol=0.02)
    inner = score_interval(flat, "mean", 2000, confidence=0.5)
    assert (low < inner[0]).all() and (inner[1] < high).all()
    by_tokens = replace(flat, tokens=torch.where(rise[0, 0] > 1, 9, 1))
    (low, high), score = score_interval(by_tokens, "pooled-mean"), causal_scores(by_tokens, "pooled-mean")
    assert (low < score).all() and (score < high).all() and score[0, 0] > flat.masked.mean(-1)[0, 0] + 0.3


def test_halves_of_noise_do_not_agree_and_halves_of_a_signal_do():
    noise = torch.randn(4, 25, 40, generator=torch.Generator().manual_seed(0))
    assert abs(statistics.fmean(split_half_reliability(table_of(noise)))) < 0.3
    assert min(split_half_reliability(table_of(torch.arange(100.0).view(4, 25, 1) + 0 * noise))) > 0.999
