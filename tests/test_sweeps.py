"""Sweeps and comparisons from outside: a file of options through `cap run --config`, mistakes with their line, what the command line wins, runs
compared by `cap compare`, and a tracker that follows."""
import dataclasses
import shutil

import pytest
import typer
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from programs import called as cap, output_of
from cap_nb.command_line import app, known_options
from fixtures import refuses
from cap_nb.jobs.job import run_job
from cap_nb.jobs.records import load_run, pack_run, read_run, unpack_run
from cap_nb.jobs.results import compare_runs
from cap_nb.jobs.settings import Job, changed
from cap_nb.jobs.sweeps import read_config, read_index, sweep_jobs, tracked, tracked_numbers
from conftest import ROOT

SMALL = """# a comment stays
device: cpu
tasks: lab-arc
accuracy_tasks: none
methods: [cap]
sparsity: 0.5
n: [3, 4]
k: 1
loss-n: 20
windows: 0
"""


def written(folder, text):
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def sweep(small_lab, tmp_path_factory):
    """Two runs; the command line changes one option of the file."""
    folder = tmp_path_factory.mktemp("sweep")
    output_of("run", "--config", written(folder, f"{SMALL}model: {small_lab}\n"), "--k", 2, "--out", folder / "out")
    return folder


def test_a_file_may_give_every_option():
    """All that `cap run` has, but the file itself, what is said meanwhile, `--quick`, whose values a file can give, `--save-models`, which is for a
    single run, and `--plugin`: a user's code runs only when the command line says so."""
    [command] = [c for name, c in typer.main.get_command(app).commands.items() if name == "run"]
    assert set(known_options()) == {p.opts[0].removeprefix("--") for p in command.params} - {"config", "help", "plugin", "quick", "quiet", "save-models", "verbose"}
    of_jobs = {f.name for part in dataclasses.fields(Job) for f in dataclasses.fields(part.default_factory)}
    assert {known.field for known in known_options().values() if known.kind != "whole"} == of_jobs


def test_a_budget_in_a_file_takes_means_as_on_the_command_line(tmp_path):
    known = known_options()
    for text, how in (("budget: [0.3, 0.5]", "mean"), ("n: 3", Job().prune.aggregation)):
        jobs = sweep_jobs(read_config(written(tmp_path, text), known), known, Job())
        assert {job.prune.aggregation for job in jobs.values()} == {how}
    refuses("takes medians of whole subsets", sweep_jobs, read_config(written(tmp_path, "budget: 0.3\naggregation: paper"), known), known, Job())
    for text in ("budget: 0.3", "score-target: divergence"):
        refuses("none of wanda is scored by masking", sweep_jobs, read_config(written(tmp_path, f"{text}\nmethods: wanda"), known), known, Job())


def test_what_a_sweep_leaves(sweep):
    out = sweep / "out"
    index = read_index(out)
    assert sorted(path.name for path in out.iterdir()) == [index["configs"][0], "losses", "n=3", "n=4", "results.csv", "sweep.json"]
    assert (index["varies"], index["on_the_command_line"]) == (["n"], ["k", "out"])
    for run, n in zip(index["runs"], (3, 4)):
        about = read_run(out / run["folder"])
        assert run["finished"] and run["settings"]["n"] == about["calibration"]["n"] == n and about["calibration"]["k"] == 2
        assert about["methods"] == ["cap"] and about["sparsities"] == [0.5]


def test_runs_of_a_sweep_compared(sweep, tmp_path):
    said = output_of("compare", sweep / "out" / "n=3", sweep / "out" / "n=4", "--methods", "cap", "--out", tmp_path / "kept")
    assert "| n=4: CAP | n=3: CAP | 50 % | Lab ARC-C. loss |" in said
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["comparison.csv", "comparison.md", "comparison.png", "sources.json"]
    [comparison] = compare_runs([sweep / "out" / "n=3", sweep / "out" / "n=4"], ["cap"]).values()
    losses = [{r.uid: r.loss for e in load_run(sweep / "out" / name).evaluations if e.method == "cap" for r in e.losses} for name in ("n=4", "n=3")]
    assert comparison.value == pytest.approx(sum(losses[0][uid] - losses[1][uid] for uid in losses[1]) / 20, abs=1e-12)
    assert cap("compare", sweep / "out" / "n=3", "--out", tmp_path / "kept").exit_code == 2


def test_a_run_that_has_lost_a_record_is_taken_up_again(sweep, tmp_path):
    shutil.copytree(sweep / "out", tmp_path / "out")
    results, damaged = (tmp_path / "out" / "results.csv").read_bytes(), tmp_path / "out" / "n=3" / "evaluations" / "cap-0.5" / "losses.csv"
    damaged.write_bytes(damaged.read_bytes()[:40])
    output_of("run", "--config", sweep / "sweep.yaml", "--k", 2, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "results.csv").read_bytes() == results


def test_a_method_with_a_pattern_is_compared():
    """A method's name may hold @ and a colon; it is given by an option and cannot be taken for anything else."""
    said = output_of("compare", ROOT / "figures/held_out/lab/0", "--methods", "cap@2:4", "--against", "wanda@2:4", "--format", "csv")
    assert said.splitlines()[1].startswith("cap@2:4,wanda@2:4,0.5,Lab GSM8K loss,"), said


def test_a_tracker_that_is_not_installed(tmp_path, monkeypatch):
    missing = [name for name in LOGGER_TYPE_TO_CLASS if name not in map(str, get_available_trackers())]
    if not missing:
        pytest.skip("every tracker of accelerate is installed")
    monkeypatch.chdir(tmp_path)
    result = cap("run", "--track", missing[0])
    assert result.exit_code == 2 and f"{missing[0]} is not installed" in result.stderr and not list(tmp_path.iterdir())


class NoLogin(GeneralTracker):
    name, requires_logging_directory, tracker = "no login", False, None

    def store_init_configuration(self, values):
        raise PermissionError("nobody is logged in")


def test_a_tracker_that_does_not_start(tmp_path):
    with tracked(NoLogin(), tmp_path) as follow:
        refuses("did not start .PermissionError.*log in to it", follow, {"model": {"name": "lab"}, "methods": [], "sparsities": []})


class DoesNotEnd(NoLogin):
    def store_init_configuration(self, values):
        pass

    def finish(self):
        raise ConnectionError("the network is gone")


def test_a_tracker_that_does_not_end_ends_no_run(tmp_path, caplog):
    with tracked(DoesNotEnd(), tmp_path) as follow:
        follow({"model": {"name": "lab"}, "methods": [], "sparsities": []})
    assert "did not end: the network is gone" in caplog.text


@pytest.mark.skipif("wandb" not in map(str, get_available_trackers()), reason="wandb is not installed")
def test_wandb_offline_has_every_cell(tmp_path, monkeypatch):
    """One file that `wandb sync` could send holds the settings and the numbers of both sparsities, and none is left out as older than another."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = changed(Job(), device="cpu", tasks=("lab-arc",), accuracy_tasks=(), methods=("magnitude", "wanda"), sparsities=(0.2, 0.5), n=3, k=1, loss_n=3, windows=0)
    with tracked("wandb", tmp_path / "run") as follow:
        run_job(job, tmp_path / "run", follow=follow)
    [kept] = (tmp_path / "run" / "tracking" / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert b"calibration.n" in content
    for cell in load_run(tmp_path / "run").evaluations:
        for name, value in tracked_numbers(cell).items():
            assert name.encode() in content and repr(value).encode() in content
    with tracked("wandb", tmp_path / "run") as follow:  # wandb leaves links
        run_job(changed(job, sparsities=(0.2, 0.5, 0.6)), tmp_path / "run", follow=follow)
    pack_run(tmp_path / "run")
    unpack_run(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back" / "tracking").exists(), "what a tracker wrote stays where it is"
