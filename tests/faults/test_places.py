"""Places that misbehave: a full disk, a folder that may not be written, two runs at once, a clock that goes back, a cache that is pulled."""
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from faults.machinery import SOAK, cap, contents, differing, ended, goes_on_to, in_child, refused, run_in, running_in, said_by, signalled_before, started
from faults.test_killed import left_in_order
from programs import as_nobody

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk, and become another user")


# ---- a full disk ----
ROOM = ",nr_inodes=100000"  # No bound cannot be bounded later


@pytest.fixture
def small_disk(tmp_path):
    """A disk in memory, and how to give it another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(options):
        done = subprocess.run(["mount", "-o", f"remount,{options}", str(place)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size=16k{ROOM}", "tmpfs", str(place)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield place, size
    subprocess.run(["umount", "-l", str(place)], check=True)


SHORT = ((0, None), (None, 1), (8, None), (None, 5), (12, None), (24, None))  # Pages, or files, that there is room for


@ROOT_ONLY
def test_a_disk_that_fills_up(whole, small_disk):
    """Full again and again, by bytes or by files; with more room each time, the run goes on from where it was."""
    place, size = small_disk
    steps = [(page, None) for page in range(0, 60, 2)] + [(None, few) for few in range(12)] if SOAK else SHORT
    full = 0
    for pages, files in steps:
        about = os.statvfs(place)
        size(f"size={4 * max(1, about.f_blocks - about.f_bfree + pages)}k{ROOM}" if files is None else f"size=64m,nr_inodes={about.f_files - about.f_ffree + files}")
        outcome = run_in(place / "run")
        if outcome[0] == 0:
            continue
        full += 1
        refused(outcome, "There was no room to write", f"{place}", "make room and run the same command again")
        if (place / "run").exists():
            left_in_order(place / "run")
    assert full >= 4
    size(f"size=64m{ROOM}")
    goes_on_to(place / "run", whole)


@ROOT_ONLY
def test_a_disk_that_may_only_be_read(whole, small_disk):
    """One sentence for a run that lies there unfinished or finished; what lies there can be read."""
    place, size = small_disk
    size(f"size=64m{ROOM}")
    said_by(run_in(place / "half", signalled_before(r"rename reports/\.cap-0\.5.*")), -signal.SIGKILL)
    shutil.copytree(whole, place / "run")
    before = contents(place / "half"), contents(place / "run")
    size("ro")
    for name in ("half", "run"):
        refused(run_in(place / name), str(place / name), "(Read-only file system): expected a disk that takes new files")
    assert "Magnitude" in said_by(in_child(cap("table", place / "run")))
    assert (contents(place / "half"), contents(place / "run")) == before


def test_no_room_for_what_is_said(whole):
    """The output goes to a full disk: a sentence on the other channel, where there is room."""
    def work():
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        cap("table", whole)()

    refused(in_child(work), "There was no room to write the program's output")


def test_nobody_reads_what_is_said(whole):
    """`cap table run | head -1`: the program ends in silence."""
    def work():
        reading, writing = os.pipe()
        os.close(reading)
        os.dup2(writing, 1)
        cap("table", whole)()

    assert in_child(work) == (128 + signal.SIGPIPE, "")


# ---- a folder of somebody else ----
@pytest.fixture
def open_place():
    """A folder below which another user may look; pytest's own are closed."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    yield place
    shutil.rmtree(place)


@ROOT_ONLY
def test_a_folder_that_may_not_be_written(whole, open_place):
    """Another user may read a finished run, and is told in one sentence that it cannot go on there; nothing changes."""
    shutil.copytree(whole, open_place / "run")
    before = contents(open_place / "run")
    refused(run_in(open_place / "run", before=as_nobody), f"{open_place}/run/run.json cannot be opened or written (Permission denied)")

    def reading():
        as_nobody()
        cap("table", open_place / "run")()

    assert "Magnitude" in said_by(in_child(reading))
    assert contents(open_place / "run") == before


@ROOT_ONLY
@pytest.mark.parametrize("name", ["losses.safetensors", "evaluations/cap-0.5/answers.csv", "timings.json", "run.json"][:None if SOAK else 2])
def test_a_record_that_may_not_be_read_is_not_damaged(whole, open_place, name):
    """It stays where it is, and the sentence says what is the matter."""
    shutil.copytree(whole, open_place / "run")
    for path in [open_place / "run", *(open_place / "run").rglob("*")]:
        os.chown(path, 65534, 65534)
    (open_place / "run" / name).chmod(0)
    refused(run_in(open_place / "run", before=as_nobody), "ermission denied", str(open_place / "run"))
    assert not list((open_place / "run").rglob("*.damaged*"))
    (open_place / "run" / name).chmod(0o644)
    assert differing(open_place / "run", whole) == []


# ---- two at once, a number that comes again, a clock that goes back ----
def stands_still(name):
    if "layer-002" in name:
        os.kill(os.getpid(), signal.SIGSTOP)


def test_locks_numbers_and_clocks(whole, tmp_path, monkeypatch):
    """A second run on the folder stops with a sentence, and the lock of a killed one keeps nobody out. Nor does what a process left that had the same
    number, as in a container it has every time. Files from the year 2040 and a clock that runs backwards from 1970 decide nothing."""
    folder = tmp_path / "run"
    first = started(running_in(folder, stands_still))
    os.waitpid(first.pid, os.WUNTRACED)
    refused(run_in(folder), f"Another process is at work in {folder}")
    first.send_signal(signal.SIGKILL)
    assert ended(first)[0] == -signal.SIGKILL
    said_by(run_in(folder, signalled_before(r"rename reports/\.cap-0\.5.*")), -signal.SIGKILL)
    back = iter(range(10 ** 6, 0, -1))

    def before():
        for name in ("evaluations/.cap-0.5", "unfinished/cap-0.5/.loss-lab-arc"):
            (folder / f"{name}.{os.getpid()}.part").mkdir(parents=True)
        for name in (".losses.safetensors", "reports/.cap-0.5.json", "figures/.gone.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / f"{name}.{os.getpid()}.part").write_text("half")
        for path in folder.rglob("*"):
            os.utime(path, (2_208_988_800, 2_208_988_800))
        monkeypatch.setattr(time, "time", lambda: float(next(back)))

    said_by(run_in(folder, None if SOAK else signalled_before("mkdir tables"), before=before), 0 if SOAK else -signal.SIGKILL)
    assert [name for name in differing(folder, whole) if SOAK or not name.startswith(("tables", "figures", "manifest"))] == []
