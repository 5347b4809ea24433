"""Asked to stop: one sentence, a code that says by which signal, nothing half-written, and the run goes on."""
import os
import random
import signal
import subprocess
import sys

import pytest

from cap_nb.core.stopping import STOPPED
from faults.machinery import SOAK, WORDS, goes_on_to, run_in, said_by
from faults.test_killed import MOMENTS, left_in_order, stopped


@pytest.mark.skipif(not SOAK, reason="every signal at every moment is tried by make soak; make test takes them in turn")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_in_every_part_and_gone_on(whole, tmp_path, moment, number):
    stopped(tmp_path / "run", moment, number)
    goes_on_to(tmp_path / "run", whole)


def test_two_signals_end_it_at_once(tmp_path):
    """Somebody in a hurry: the second Ctrl-C does not wait for what the first one clears up."""
    def act(name):
        if "layer-001" in name:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            finally:
                os.kill(os.getpid(), signal.SIGINT)

    assert said_by(run_in(tmp_path / "run", act), 130).count(STOPPED) == 1


@pytest.mark.skipif(not SOAK, reason="reads the libraries six times; make soak does")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("seconds", [0.4, 1.5, 3])
def test_stopped_while_the_libraries_are_read(number, seconds, tmp_path):
    """The program as installed, stopped before it has begun."""
    program = subprocess.Popen([sys.executable, "-c", "from cap_nb.__main__ import main; main()", *WORDS, "--out", tmp_path / "run"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with pytest.raises(subprocess.TimeoutExpired):
        program.wait(seconds)
    program.send_signal(number)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 128 + number and said in ("cap: Stopped.\n", f"cap: {STOPPED}\n")  # before the command began, or within it
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not SOAK, reason="random moments are tried by make soak")
@pytest.mark.parametrize("seed", range(30))
def test_stopped_at_a_random_moment(whole, tmp_path, seed, record_property):
    """Stopped by the clock, in the midst of whatever library is at work."""
    rng = random.Random(seed)
    number = rng.choice([signal.SIGINT, signal.SIGTERM])

    def alarm():
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), number))
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.1, 2.5))

    code, said = run_in(tmp_path / "run", before=alarm)
    assert code in (0, 128 + number), said
    assert "Traceback" not in said and said.count(STOPPED) == (code != 0), said
    record_property("stops at a random moment", int(code != 0))
    if code and (tmp_path / "run").exists():
        left_in_order(tmp_path / "run")
    goes_on_to(tmp_path / "run", whole)
