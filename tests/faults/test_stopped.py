"""Asked to stop: one sentence, a code that says by which signal, nothing half-written, and the run goes on."""
import os
import random
import signal
import subprocess
import sys

import pytest

from cap_nb.core.files import read_checked, read_tensors
from cap_nb.core.stopping import STOPPED
from cap_nb.jobs.records import load_evaluation
from faults.machinery import SOAK, WORDS, differing, run_in, signalled_before
from faults.test_killed import MOMENTS

SHORT = ("scoring", "pruning", "evaluating", "drawing")


def left_in_order(folder):
    """Nothing under a temporary name, and what has a name is whole."""
    assert not list(folder.rglob(".*.part"))
    for path in folder.rglob("*.safetensors"):
        read_tensors(path)
    for path in folder.rglob("evaluation.json"):
        load_evaluation(path.parent)
    for path in folder.rglob("*.json"):
        read_checked(path)


def test_stopped_in_every_part_and_gone_on(whole, tmp_path):
    """Ctrl-C, SIGTERM and a closed terminal, in turn; in the soak, each at each moment."""
    for turn, moment in enumerate(MOMENTS if SOAK else SHORT):
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        for number in numbers if SOAK else numbers[turn % 2:turn % 2 + 1]:
            folder = tmp_path / (f"run-{turn}-{number}" if SOAK else "run")
            code, said = run_in(folder, signalled_before(MOMENTS[moment], number))
            assert (code, said.strip().splitlines()[-1]) == (128 + number, f"cap: {STOPPED}"), f"{moment}: {said}"
            assert said.count("cap:") == 1 and "Traceback" not in said and "Error" not in said, said
            left_in_order(folder)
    for folder in sorted(tmp_path.iterdir())[:None if SOAK else 1]:
        code, said = run_in(folder)
        assert code == 0, said
        assert differing(folder, whole) == []


def test_two_signals_end_it_at_once(tmp_path):
    """Somebody in a hurry: the second Ctrl-C does not wait for what the first one clears up."""
    def act(name):
        if "reports" in name:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

    code, said = run_in(tmp_path / "run", act)
    assert code == 130 and said.count(STOPPED) == 1


@pytest.mark.skipif(not SOAK, reason="reads the libraries six times")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.4, 1.5, 3])
def test_stopped_while_the_libraries_are_read(number, seconds, tmp_path):
    """The program as installed, stopped before it has begun."""
    program = subprocess.Popen([sys.executable, "-c", "from cap_nb.core.stopping import main; main()", *WORDS, "--out", tmp_path / "run"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(seconds)
    program.send_signal(number)
    _, said = program.communicate(timeout=60)
    assert (program.returncode, said) == (128 + number, f"cap: {STOPPED}\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not SOAK, reason="random moments are tried by make soak")
@pytest.mark.parametrize("seed", range(30))
def test_stopped_at_a_random_moment(whole, tmp_path, seed):
    """Stopped by the clock, in the midst of whatever library is at work."""
    rng = random.Random(seed)
    number = rng.choice([signal.SIGINT, signal.SIGTERM])

    def alarm():
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.1, 4))

    code, said = run_in(tmp_path / "run", before=alarm)
    assert code in (0, 128 + number), said
    assert "Traceback" not in said and said.count(STOPPED) == (code != 0), said
    if code and (tmp_path / "run").exists():
        left_in_order(tmp_path / "run")
    code, said = run_in(tmp_path / "run")
    assert code == 0, said
    assert differing(tmp_path / "run", whole) == []
