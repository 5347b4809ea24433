"""`cap repeat`: a run done again from its folder, and what it says when something differs."""
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from programs import called as cap, output_of
from fixtures import refuses
from cap_nb.core.files import read_checked, write_checked
from cap_nb.data.lab_world import lab_text
from cap_nb.jobs.job import check_origin, check_unread, prepare, run_job
from cap_nb.jobs.plugins import plugins_loaded
from cap_nb.jobs.records import job_of, load_run, pack_run
from cap_nb.jobs.report import command_of
from cap_nb.jobs.results import compare_repeated, repeat_run
from cap_nb.jobs.settings import Job, changed

SMALL = changed(Job(), n=2, k=1, methods=("magnitude",), sparsities=(0.5,), accuracy_tasks=("lab-arc",), evaluate_n=2, loss_n=2, windows=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_job(SMALL, tmp_path_factory.mktemp("repeat") / "run")


def test_a_packed_run_is_repeated_to_the_bit(run, tmp_path):
    shutil.copytree(run, tmp_path / "packed")
    pack_run(tmp_path / "packed")
    output_of("repeat", tmp_path / "packed", "--out", tmp_path / "again")
    table = compare_repeated(load_run(run), load_run(tmp_path / "again"))
    assert table["compared"].tolist() == table["equal"].tolist() and {"accuracy", "loss"} <= set(table["what"])


def test_another_number_is_noticed(run):
    first = load_run(run)
    [dense, pruned] = first.evaluations
    losses = (replace(pruned.losses[0], loss=pruned.losses[0].loss + 0.25), *pruned.losses[1:])
    table = compare_repeated(replace(first, evaluations=(dense, replace(pruned, losses=losses))), first).set_index("what")
    assert table.loc["loss", "compared"] - table.loc["loss", "equal"] == 1
    assert table.loc["loss", "largest"] == pytest.approx(0.25)
    assert table.loc["accuracy", "compared"] == table.loc["accuracy", "equal"]


def test_a_run_that_grew_is_compared_where_both_have_cells(run, tmp_path):
    """Its methods stand at different sparsities, and the second run has every method at every sparsity. Without a finished cell nothing is compared."""
    first = load_run(run)
    [*_, pruned], [*_, (report, mask)] = first.evaluations, first.reports
    more = replace(first, evaluations=(*first.evaluations, replace(pruned, sparsity=0.2)), reports=(*first.reports, (replace(report, asked=0.2), mask)))
    assert compare_repeated(first, more).equals(compare_repeated(first, first))
    shutil.copytree(run, tmp_path / "begun", ignore=shutil.ignore_patterns("evaluations"))
    refuses("begun has no finished evaluation yet", repeat_run, tmp_path / "begun", tmp_path / "again")


@pytest.mark.parametrize("given", [{"score_target": "divergence"}, {"budget": 0.7, "aggregation": "mean"}])
def test_a_method_that_reads_no_scores_is_repeated_and_added_alone(given, small_lab, tmp_path):
    """The run's target of scores and its budget stand in its record and were not given for this method; a new run with it is refused."""
    job = changed(SMALL, name=str(small_lab), methods=("cap", "wanda"), n=3, accuracy_tasks=(), **given)
    run_job(job, tmp_path / "run")
    table = repeat_run(tmp_path / "run", tmp_path / "again", ["wanda"])
    assert table["compared"].tolist() == table["equal"].tolist() and table["compared"].sum()
    check_unread(alone := changed(job, methods=("wanda",)), tmp_path / "run")
    refuses("none of wanda is scored by masking heads", check_unread, alone, tmp_path / "new")


def test_other_data_is_noticed_at_the_command_line(run, tmp_path):
    """The run says that it was calibrated on something else: exit code 1, and the row says so."""
    shutil.copytree(run, tmp_path / "other")
    kept = read_checked(run / "run.json")
    kept["calibration"]["fingerprint"] = 64 * "0"
    write_checked(tmp_path / "other" / "run.json", kept)
    said = cap("repeat", tmp_path / "other", "--out", tmp_path / "again")
    assert said.exit_code == 1 and "setting calibration.fingerprint (000000000000, now" in said.output


def test_another_text_is_calibrated_on_than_measured_on(tmp_path):
    """As papers calibrate on C4 and measure on WikiText-2; the job comes back from its record, and so does its command."""
    (tmp_path / "own.txt").write_text(lab_text("calibration"))
    (tmp_path / "own.py").write_text(f"from cap_nb.all import add_text\nadd_text('own', {str(tmp_path / 'own.txt')!r}, {str(tmp_path / 'own.txt')!r})\n")
    job = changed(SMALL, calibrate_on="text", calibration_text="own", text_tokens=64, windows=2, window_tokens=32)
    with plugins_loaded([tmp_path / "own.py"]):
        ready = prepare(job)
        assert ready.configuration["calibration"]["text"] == "own" and [*ready.configuration["evaluation"]["data"]["text"]] == ["lab-text"]
        of_lab = prepare(changed(job, calibration_text="lab-text")).calibration
        assert [e.input_ids for e in ready.calibration.examples] == [e.input_ids for e in of_lab.examples], "the words are the same"
        assert prepare(job_of(ready.configuration)).configuration == ready.configuration
        assert "--calibration-text own" in command_of(ready.configuration) and "--text " not in command_of(ready.configuration)
    refuses("--calibration-text lab-text was given, and no text is calibrated on", prepare, changed(SMALL, calibration_text="lab-text"))


@pytest.mark.parametrize("settings", [
    {"seed": 3, "aggregation": "mean", "max_new_tokens": 9}, {"seed": 3, "calibration_seed": 0, "text_share": 0.5}, {"calibrate_on": "text"},
    {"score_target": "divergence", "methods": ("cap",), "evaluate_on": "validation"}])
def test_a_job_comes_back_from_its_configuration(settings):
    """What `configuration` writes for a job is what it writes for the job read back from it."""
    ready = prepare(changed(SMALL, **settings))
    again = prepare(job_of(ready.configuration))
    assert again.configuration == ready.configuration


def test_a_table_that_was_measured_otherwise_is_named(caplog):
    """A store's table is not measured again for another batch size or device, which moves its last digits."""
    ready = SimpleNamespace(configuration={"model": {"fingerprint": "one"}}, calibration=SimpleNamespace(fingerprint="few"),
                            job=changed(Job(), batch_tokens=1024), model=torch.nn.Linear(1, 1))
    ready.model.device = torch.device("cpu")
    meta = {"model": "one", "calibration": "few", "batch_tokens": 1024, "device": "cpu"}
    check_origin(Path("losses"), meta, ready)
    assert not caplog.text
    check_origin(Path("losses"), meta | {"batch_tokens": 4096, "device": "cuda"}, ready)
    assert "with {'batch_tokens': 4096, 'device': 'cuda'}; this run has {'batch_tokens': 1024, 'device': 'cpu'}" in caplog.text
