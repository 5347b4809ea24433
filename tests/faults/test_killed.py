"""Killed, and gone on: whatever moment it was, the run ends with the bytes of one that nothing happened to."""
import itertools
import os
import random
import shutil
import signal

import pytest

from cap_nb.core.files import read_checked, read_tensors
from cap_nb.core.stopping import STOPPED
from cap_nb.jobs.records import load_evaluation
from faults.machinery import FUZZ, SOAK, contents, differing, goes_on_to, run_in, said_by, signalled_before

# A moment in each part of a run, in the order in which they come
MOMENTS = {
    "its first file": r"rename \.run\.json\.part",
    "scoring": r"rename unfinished/scores/.*/\.batch-0000-layer-003\.safetensors\.part",
    "the table of losses, half written": r"chmod \.losses\.safetensors\.part",
    "clearing up after scoring": r"rmdir unfinished/scores/.*",
    "pruning": r"open reports/\.cap-0\.5\.json\.part",
    "evaluating": r"open unfinished/cap-0\.5/\.loss-lab-arc\.part/losses\.csv",
    "saving an evaluation": r"rename evaluations/\.cap-0\.5\.part",
    "clearing up after an evaluation": r"remove unfinished/cap-0\.5/.*answers\.csv",
    "a table": r"rename tables/\.table\.csv\.part",
    "drawing": r"open figures/\.head_importance\.png\.part",
    "the manifest": r"rename \.manifest\.json\.part",
}


def left_in_order(folder):
    """Nothing under a temporary name, and what has a name is whole."""
    assert not list(folder.rglob(".*.part"))
    for path in folder.rglob("*.safetensors"):
        read_tensors(path)
    for path in folder.rglob("evaluation.json"):
        load_evaluation(path.parent)
    for path in folder.rglob("*.json"):
        read_checked(path)


def stopped(folder, moment, number):
    """Run until a moment at which a signal comes; a stop is one sentence and its code, and leaves no half of anything."""
    code, said = run_in(folder, signalled_before(MOMENTS[moment], number))
    if number == signal.SIGKILL:
        assert code == -number, f"{moment}: {said}"
        return
    assert (code, said.strip().splitlines()[-1:]) == (128 + number, [f"cap: {STOPPED}"]), f"{moment}: {said}"
    assert said.count("cap:") == 1 and "Traceback" not in said and "Error" not in said, said
    left_in_order(folder)


def test_killed_and_stopped_in_every_part_and_gone_on(whole, tmp_path):
    """One run that is ended eleven times, by SIGKILL, SIGTERM and Ctrl-C in turn."""
    for moment, number in zip(MOMENTS, itertools.cycle((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))):
        stopped(tmp_path / "run", moment, number)
    goes_on_to(tmp_path / "run", whole)


def test_nothing_else_may_differ(whole):
    """What the comparison looks at is all but times, memory and the environment."""
    names = contents(whole).keys()
    assert {"run.json", "losses.safetensors", "manifest.json", "tables/table.csv", "figures/head_importance.png", "reports/cap-0.5.json",
            "evaluations/cap-0.5/losses.csv", "evaluations/magnitude-0.5/answers.csv"} <= names and not [name for name in names if "unfinished" in name]


@pytest.mark.skipif(not SOAK, reason="every moment is tried by make soak")
def test_every_moment(whole, tmp_path, record_property):
    """The folder as it is before every single change of a run, taken up by another one."""
    moments, last = [], [None]

    def keep(name):
        now = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        if now == last[0]:
            return  # nothing has changed since the last moment
        last[0] = now
        moments.append(name)
        shutil.copytree(tmp_path / "run", tmp_path / f"at-{len(moments)}", dirs_exist_ok=True) if now else (tmp_path / f"at-{len(moments)}").mkdir()
        (tmp_path / "moments").write_text("\n".join(moments))

    said_by(run_in(tmp_path / "run", keep))
    moments, wrong = (tmp_path / "moments").read_text().split("\n"), {}
    assert len(moments) > 100
    tried = 0
    for index, name in list(enumerate(moments, 1))[:: 1 if FUZZ >= 1000 else 17]:
        tried += 1
        folder = tmp_path / f"at-{index}"
        code, said = run_in(folder)
        if code or differing(folder, whole):
            wrong[f"{index} before {name}"] = said[-300:] if code else differing(folder, whole)
            (tmp_path / "wrong").write_text(f"{wrong}")
        shutil.rmtree(folder)
    assert not wrong, wrong
    record_property("moments of a run", len(moments))
    record_property("moments taken up", tried)


@pytest.mark.skipif(not SOAK, reason="random moments are tried by make soak")
@pytest.mark.parametrize("seed", range(30))
def test_a_random_moment(whole, tmp_path, seed, record_property):
    """Killed by the clock, up to three times, in the first seconds of a run."""
    rng, killed = random.Random(seed), 0
    for _ in range(rng.randint(1, 3)):
        moment = rng.uniform(0, 2.5)

        def alarm():
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            signal.setitimer(signal.ITIMER_REAL, moment)

        killed += run_in(tmp_path / "run", before=alarm)[0] == -signal.SIGKILL
    goes_on_to(tmp_path / "run", whole)
    record_property("kills at a random moment", killed)
