"""What the fault tests share: a tiny run in a process of its own, which something happens to before a chosen change of its folder.

A process that dies by SIGKILL leaves what the file system held at that moment. So it is enough to look at every moment before
a change: an audit hook counts the changes below the run's folder, and acts before one of them.
"""
import functools
import json
import os
import re
import signal
import sys
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  before the first fork, so that no child reads it again
import torch

import fixtures
from cap_nb.core.files import read_checked
from cap_nb.jobs import job as jobs
from cap_nb.jobs.job import prepare, run_job
from cap_nb.jobs.settings import Job, changed
from programs import Program, cap

FUZZ = int(os.environ.get("CAP_NB_FUZZ", 0))
SOAK = FUZZ > 0  # `make soak` tries all there is; `make test` a few
WORDS = ("run --device cpu --n 2 --k 1 --tasks lab-arc --methods cap,magnitude --sparsity 0.5 --accuracy-tasks lab-arc --evaluate-n 2 --loss-n 2 "
         "--windows 1 --window-tokens 32 --max-new-tokens 4").split()
SMALL = changed(Job(), n=2, k=1, tasks=("lab-arc",), methods=("cap", "magnitude"), sparsities=(0.5,), accuracy_tasks=("lab-arc",), evaluate_n=2,
                loss_n=2, windows=1, window_tokens=32, max_new_tokens=4, device="cpu")
# What may differ between two runs: how long and how much, and what is made from that. `environment.json` names the commit, which may change meanwhile.
MAY_DIFFER = ("timings.json", "memory.json", "environment.json", "tables/costs.csv", "tables/costs.md", "report.html", "log.txt")
PREPARED = {}
text_once = functools.cache(jobs.load_text)


def prepared(job):
    """A job made ready once for all children, each of which has a copy of the memory."""
    if job not in PREPARED:
        PREPARED[job] = prepare(job)
    return PREPARED[job]


# ---- a process that something happens to ----
def path_of(event, arguments):
    """The path that is about to change, or None: what an audit event says, relative to an opened folder if it names one."""
    if event == "open":
        path, _, flags = arguments
        if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return None
        return os.fsdecode(path) if isinstance(path, (str, bytes)) else None
    if event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"):
        return None
    path, place = os.fsdecode(arguments[0]), arguments[-1]
    return f"{os.readlink(f'/proc/self/fd/{place}')}/{path}" if isinstance(place, int) and place >= 0 and not path.startswith("/") else path


def watched(folder, act):
    """Call `act` with a name before every change below a folder: the event and the path, without process numbers."""
    start = f"{folder}"

    def hook(event, arguments):
        path = path_of(event, arguments)
        if path and path.startswith(start):
            act(f"{event.rpartition('.')[2]} " + re.sub(r"\.\d+\.part", ".part", path[len(start):].lstrip("/")))

    sys.addaudithook(hook)


def started(work):
    """Begin some work in a process of its own, both channels in one; it finds the model, the problems and the text made ready."""
    def prepared_work():
        jobs.prepare, jobs.load_text = prepared, text_once
        return work()

    return Program(prepared_work, together=True)


def ended(process, limit=120):
    """Wait for a process: its exit code (a signal negative), and what it said on both channels."""
    said, _ = process.communicate(limit)
    return process.returncode, said


def in_child(work, limit=120):
    """Do some work in a process of its own; its exit code and what it said."""
    return ended(started(work), limit)


def running_in(folder, act=None, words=WORDS, before=None):
    """Work: `cap run` in a folder, with something called before every change of it, and something done before all."""
    prepared(SMALL)

    def work():
        if before:
            before()
        if act:
            watched(folder, act)
        cap(*words, "--out", folder)()

    return work


def run_in(folder, act=None, words=WORDS, before=None):
    """`cap run` in a folder, in a process of its own."""
    return in_child(running_in(folder, act, words, before))


def said_by(outcome, code=0):
    """What a process said that ended with such an exit code."""
    assert outcome[0] == code, outcome[1]
    return outcome[1]


def refused(outcome, *parts):
    """Exit code 2; what went wrong is told in the last line, and nowhere a traceback."""
    said = said_by(outcome, 2)
    assert "Traceback" not in said and "bug" not in said, said
    line = said.strip().splitlines()[-1]
    assert line.startswith("cap: ") and ": expected " in line and line.endswith(".") and ".part" not in line, said
    for part in parts:
        assert part in line, line


def signalled_before(wanted, number=signal.SIGKILL):
    """An act: send this process a signal before the first change whose name matches."""
    sent = []

    def act(name):
        if not sent and re.fullmatch(wanted, name):
            sent.append(name)
            os.kill(os.getpid(), number)

    return act


# ---- what there should be ----
def contents(folder):
    """Every file of a run, byte by byte, without what may differ; the manifest without the hashes of that."""
    found = {name: body for name, body in fixtures.contents(Path(folder)).items() if name not in MAY_DIFFER}
    if "manifest.json" in found:
        listed = read_checked(Path(folder) / "manifest.json")
        for part in ("made", "made from"):
            listed[part] = {name: digest for name, digest in listed[part].items() if name not in MAY_DIFFER}
        found["manifest.json"] = json.dumps(listed, sort_keys=True).encode()
    return found


def differing(folder, other):
    """Names of what two runs do not have alike."""
    one, two = contents(folder), contents(other)
    return sorted(name for name in one.keys() | two.keys() if one.get(name) != two.get(name))


def goes_on_to(folder, whole):
    """A run that was ended goes on, and ends like an undisturbed one."""
    said_by(run_in(folder))
    assert differing(folder, whole) == []



def undisturbed(folder):
    """A run to which nothing happens, in this process: its children find fonts and libraries ready. The model is dense again afterwards."""
    dense, original = jobs.copied_weights(prepared(SMALL).model), (jobs.prepare, jobs.load_text)
    jobs.prepare, jobs.load_text = prepared, text_once
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run_job(SMALL, folder)
    finally:
        torch.set_num_threads(threads)
        jobs.prepare, jobs.load_text = original
        jobs.put_back(prepared(SMALL).model, dense)
    return folder
