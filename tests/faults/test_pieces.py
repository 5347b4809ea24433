"""Pieces that vanish, are cut short or have a bit flipped between two sessions: made anew, or one sentence; never believed."""
import itertools
import random
import re
import shutil
import signal

import pytest

from cap_nb.core.errors import BadInput
from fixtures import refuses
from cap_nb.evaluation import Evaluation
from cap_nb.jobs.records import PACKED, load_run, pack_run, put_in_order, save_evaluation, unpack_run
from faults.machinery import SOAK, cap, contents, differing, in_child, refused, run_in, said_by, signalled_before, watched

STOPS = ("run.json", "environment.json")  # What cannot be made anew: damaged, it stops the run
LOST = ("environment.json", "timings.json")  # What cannot be made anew: missing, it is told


@pytest.fixture(scope="session")
def killed(tmp_path_factory):
    """A run that died while it measured, with finished and unfinished pieces of every kind."""
    folder = tmp_path_factory.mktemp("faults") / "killed"
    run_in(folder, signalled_before(r"rename unfinished/cap-0\.5/\.perplexity.*"))
    for part in folder.rglob(".*.part"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    return folder


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def kinds_of(folder):
    """One file of each kind, so that a few stand for all."""
    kinds = {}
    for name in files_of(folder):
        kinds.setdefault((name.split("/")[0], name.rpartition(".")[2], name.count("/"), "answers" in name), name)
    return sorted(kinds.values())


def spoilt(path, how, rng):
    """Spoil a file: a bit flipped, half of it cut off, gone."""
    kept = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(kept[:len(kept) // 2])
    else:
        at = rng.randrange(len(kept))
        path.write_bytes(kept[:at] + bytes([kept[at] ^ 1 << rng.randrange(8)]) + kept[at + 1:])


def set_aside(folder, said):
    """What a run set aside, which it named; it goes."""
    aside = sorted(folder.rglob("*.damaged"))
    for path in aside:
        assert f"It is set aside as {path.name} and made anew." in said
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return aside


def goes_on(folder, whole, name, how):
    """The run goes on to the bytes of an undisturbed one and names what it sets aside, or stops with a sentence that names it."""
    outcome = run_in(folder)
    if name in STOPS and how != "gone" or name == "run.json":
        return refused(outcome, name)
    said = said_by(outcome)
    set_aside(folder, said)
    if name in LOST and how == "gone":
        assert f"has lost its {name}" in said
    assert differing(folder, whole) == []


CASES = [(state, how) for state in ("killed", "whole") for how in ("flip", "cut", "gone")]


@pytest.mark.skipif(not SOAK, reason="every file by itself is spoilt by make soak")
@pytest.mark.parametrize("state, how", CASES)
def test_every_piece_in_turn(state, how, whole, killed, tmp_path, record_property):
    """Every file of a run by itself, flipped at three places."""
    source, rng = {"whole": whole, "killed": killed}[state], random.Random(f"{state}{how}")
    names = [name for name in files_of(source) for _ in range(3 if how == "flip" else 1)]
    for number, name in enumerate(names):
        folder = tmp_path / f"{number}"
        shutil.copytree(source, folder)
        spoilt(folder / name, how, rng)
        goes_on(folder, whole, name, how)
        shutil.rmtree(folder)
    record_property("spoilt pieces", len(names))


@pytest.mark.parametrize("state, how", CASES if SOAK else [("killed", "mixed")])
def test_many_pieces_at_once(state, how, whole, killed, tmp_path):
    """One file of each kind, all in one folder: what can be made anew is; then one that cannot."""
    source, rng = {"whole": whole, "killed": killed}[state], random.Random(f"{how}{state}")
    folder = tmp_path / "run"
    shutil.copytree(source, folder)
    spoiling = [name for name in kinds_of(source) if name not in STOPS]
    for name, turn in zip(spoiling, itertools.cycle(("flip", "gone", "cut"))):
        spoilt(folder / name, turn if how == "mixed" else how, rng)
    said = said_by(run_in(folder))
    assert len(set_aside(folder, said)) >= {"gone": 0, "mixed": 3}.get(how, 4)
    assert differing(folder, whole) == []
    spoilt(folder / "run.json", "flip" if how == "mixed" else how, rng)
    refused(run_in(folder), "run.json")


@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_the_environment_is_not_made_up(how, whole, tmp_path):
    """Where earlier numbers came from nobody can compute: damage stops the run before any work; a missing file is told."""
    shutil.copytree(whole, tmp_path / "run")
    spoilt(tmp_path / "run" / "environment.json", how, random.Random(5))
    goes_on(tmp_path / "run", whole, "environment.json", how)


def test_readers_stop_at_every_damaged_record(whole, tmp_path):
    """Commands that only read name the file, and say nothing of numbers."""
    rng = random.Random(7)
    shutil.copytree(whole, tmp_path / "run")
    records = [name for name in files_of(whole) if not name.startswith(("tables", "figures", "manifest", "report", "log"))]
    for name in records:
        kept = (tmp_path / "run" / name).read_bytes()
        for _ in range(40 if SOAK else 2):
            spoilt(tmp_path / "run" / name, "flip", rng)
            try:
                assert load_run(tmp_path / "run").evaluations == load_run(whole).evaluations, f"{name}: other numbers"
                assert name.endswith(".json"), f"{name} was believed"  # white space of JSON carries no number
            except BadInput as error:
                assert name.rpartition("/")[2] in str(error) or name.split("/")[-2] in str(error), error
            (tmp_path / "run" / name).write_bytes(kept)


# ---- packed runs ----
@pytest.fixture
def packed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "packed")
    pack_run(tmp_path / "packed")
    return tmp_path / "packed"


def test_a_damaged_pack_is_not_packed_or_unpacked_into_belief(packed, tmp_path):
    """`cap pack` again would give a damaged file a new checksum, and `cap unpack` would give its numbers new files."""
    rng = random.Random(3)
    kept = (packed / PACKED).read_bytes()
    for _ in range(200 if SOAK else 20):
        spoilt(packed / PACKED, "flip", rng)
        for attempt in (lambda: pack_run(packed), lambda: unpack_run(packed, tmp_path / "back"), lambda: load_run(packed)):
            refuses(PACKED, attempt)
        (packed / PACKED).write_bytes(kept)
    assert not (tmp_path / "back").exists()
    assert {path.name for path in packed.iterdir()} == {PACKED, "report.html", "tables", "figures"}


PACKING = ("rename .records.parquet.part", "remove run.json", "remove evaluations/cap-0.5/losses.csv", "remove reports/cap-0.5.json")


@pytest.mark.parametrize("moment", PACKING if SOAK else PACKING[1:3])
def test_killed_while_it_packed(moment, whole, packed, tmp_path):
    shutil.copytree(whole, tmp_path / "run")

    def work():
        watched(tmp_path / "run", signalled_before(re.escape(moment)))
        cap("pack", tmp_path / "run")()

    assert in_child(work)[0] == -signal.SIGKILL
    said_by(in_child(cap("pack", tmp_path / "run")))
    assert contents(tmp_path / "run") == contents(packed)
    unpack_run(tmp_path / "run", tmp_path / "back")
    assert differing(tmp_path / "back", whole) == []


def test_a_foreign_file_is_left_alone(whole, tmp_path, caplog):
    """Notes and models that somebody keeps in a run's folder are none of its pieces."""
    shutil.copytree(whole, tmp_path / "run")
    for name in ("notes.json", "model/model.safetensors", "model/config.json", "evaluations.txt"):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    put_in_order(tmp_path / "run")
    assert not caplog.records and (tmp_path / "run" / "model/model.safetensors").read_text() == "mine"
    assert differing(tmp_path / "run", whole) == ["evaluations.txt", "model/config.json", "model/model.safetensors", "notes.json"]


def test_answers_of_one_task_that_are_damaged_are_set_aside(tmp_path):
    """The dense model's answers to calibration problems lie task by task until all are there."""
    parts = tmp_path / "unfinished" / "chains"
    for task in ("lab-arc", "lab-gsm8k"):
        save_evaluation(Evaluation(method="dense", sparsity=0.0, reached=0.0), parts / task)
    (parts / "lab-arc" / "answers.csv").write_text("half")
    put_in_order(tmp_path)
    assert sorted(path.name for path in parts.iterdir()) == ["lab-arc.damaged", "lab-gsm8k"]
