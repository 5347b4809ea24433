"""`cap run --save-models`: each pruned model of a run in a folder, the bytes of `cap prune`, and nothing else of the run changes."""
import json
import shutil
import signal

import pytest

from cap_nb.jobs.job import run_job
from cap_nb.jobs.records import pack_run, unpack_run
from cap_nb.jobs.results import repeat_run
from cap_nb.jobs.report import write_results
from cap_nb.jobs.settings import SinglePruning, changed
from cap_nb.single_steps import keep_model, prune_into
from faults.machinery import SMALL, WORDS, contents, run_in, said_by, signalled_before

METHODS = ("cap", "cap.literal", "wanda^block", "sparsegpt", "wanda@2:4^swaps", "cap.relevance")


def files(folder):
    """Every file; of the tokenizer not how it pads, which is saved as its last call left it and is set anew by every call."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {"tokenizer.json": json.loads(found["tokenizer.json"]) | {"padding": None}}


def recorded(folder):
    """What a run holds, but for its models."""
    return {name: body for name, body in contents(folder).items() if not name.startswith("models/")}


@pytest.fixture(scope="module")
def job(small_lab):
    return changed(SMALL, name=str(small_lab), methods=METHODS, accuracy_tasks=(), max_new_tokens=None, windows=0)


@pytest.fixture(scope="module")
def runs(job, tmp_path_factory):
    """A run with its models, and one without."""
    place = tmp_path_factory.mktemp("models")
    return run_job(job, place / "plain"), run_job(job, place / "keeping", keep=keep_model)


def test_the_models_are_those_of_cap_prune(job, runs, tmp_path):
    """Weights, and config.json with its record, for a mask, its other reading, block reconstruction, a solver, a pattern and an attribution."""
    assert sorted(path.name for path in (runs[1] / "models").iterdir()) == ["cap-0.5", "cap.literal-0.5", "cap.relevance-0.5", "sparsegpt-0.5", "wanda@2of4^swaps-0.5", "wanda^block-0.5"]
    for method in METHODS:
        scores = runs[1] / "losses.safetensors" if method in ("cap", "cap.literal") else None
        prune_into(job, SinglePruning(method=method, sparsity=0.5, scores=scores), tmp_path / "alone")
        assert files(tmp_path / "alone") == files(runs[1] / "models" / f"{method.replace(':', 'of')}-0.5"), method
        shutil.rmtree(tmp_path / "alone")


def test_the_run_is_the_same(runs, tmp_path):
    """Records, tables, figures and run.json do not know of the models; figures, repeat, pack and unpack do not trip over them."""
    assert recorded(runs[0]) == recorded(runs[1]) and not (runs[0] / "models").exists()
    copy = shutil.copytree(runs[1], tmp_path / "copy")
    write_results(copy)
    assert contents(copy) == contents(runs[1])
    again = repeat_run(copy, tmp_path / "again", methods=["sparsegpt"])
    assert (again["compared"] == again["equal"]).all() and not (tmp_path / "again/models").exists()
    pack_run(copy)
    unpack_run(copy, tmp_path / "live")
    assert recorded(tmp_path / "live") == recorded(runs[1])
    for packed in (copy, tmp_path / "live"):
        assert files(packed / "models/cap-0.5") == files(runs[1] / "models/cap-0.5")


def test_a_finished_run_makes_what_is_missing(job, runs, tmp_path, monkeypatch):
    """Asked again, models that are there stay and those that are not are made; nothing is measured, and no time is added."""
    copy = shutil.copytree(runs[1], tmp_path / "copy")
    shutil.rmtree(copy / "models/sparsegpt-0.5")
    monkeypatch.setattr("cap_nb.jobs.job.measure_piece", lambda *_: pytest.fail("measured again"))
    before = (copy / "models/cap-0.5/model.safetensors").stat().st_mtime_ns, (copy / "timings.json").read_bytes()
    run_job(job, copy, keep=keep_model)
    assert contents(copy) == contents(runs[1])
    assert before == ((copy / "models/cap-0.5/model.safetensors").stat().st_mtime_ns, (copy / "timings.json").read_bytes())


SOLVER = [*WORDS[:WORDS.index("--methods")], "--methods", "sparsegpt", *WORDS[WORDS.index("--methods") + 2:], "--save-models"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_in(folder, words=SOLVER)[0] == 0
    return folder


@pytest.mark.parametrize("moment, number", [
    (r"open unfinished/sparsegpt-0\.5/layers/\w+/\.layer-003\.safetensors\.part", signal.SIGTERM),
    (r"mkdir models/\.sparsegpt-0\.5\.part", signal.SIGKILL), (r"open unfinished/sparsegpt-0\.5/\.loss-lab-arc\.part/losses\.csv", signal.SIGKILL)])
def test_killed_and_gone_on(moment, number, whole, tmp_path):
    """In the midst of a solver, of saving its model, and of measuring it: the end is that of a run that nothing happened to."""
    said_by(run_in(tmp_path / "run", signalled_before(moment, number), words=SOLVER), -number if number == signal.SIGKILL else 128 + number)
    kept = sorted((tmp_path / "run").glob("unfinished/sparsegpt-0.5/layers/*/*"))
    assert len(kept) == (3 if number == signal.SIGTERM else 6)
    assert f"Pruned models, for --model or transformers: {tmp_path / 'run/models/sparsegpt-0.5'}" in said_by(run_in(tmp_path / "run", words=SOLVER))
    assert contents(tmp_path / "run") == contents(whole) and not (tmp_path / "run/unfinished").exists()
