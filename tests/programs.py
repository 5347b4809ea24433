"""The program in a forked process: what this one has imported need not be imported again, which costs two cores several seconds each time.

Tests that are about the start itself start an interpreter instead.
"""
import functools
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from unittest.mock import patch

import torch
import typer.main
import typer.testing
from typer.testing import CliRunner

import cap_nb.command_line, cap_nb.single_steps, cap_nb.jobs.sweeps  # noqa: E401, F401  before the first fork, so that no child reads them again
from cap_nb import calibration
from cap_nb.__main__ import main
from cap_nb.data.problems import LAB_TASKS, load_problems
from cap_nb.models.lab import lab_tokenizer


def alone(work, out, err, folder=None):
    """The whole life of a forked process: do some work, write what it says to two open files, and end with its exit code."""
    code = 99
    try:
        for number, channel in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
            os.dup2(channel, number)
        sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.chdir(folder or ".")
        logging.root.handlers.clear()  # pytest's own
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a suite in the background may have inherited an ignored Ctrl-C
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        torch.set_num_threads(1)
        code = work()
    except SystemExit as left:
        code = left.code
    except BaseException:
        traceback.print_exc()
    finally:
        try:  # to leave as the interpreter does at its end; whatever happens, this process does not go on
            if code is not None and not isinstance(code, int):
                print(code, file=sys.stderr)
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code or 0)
        except OSError:
            os._exit(120)
        finally:
            os._exit(99)


FEW = ["--n", "3", "--k", "2", "--evaluate-n", "2", "--loss-n", "2", "--max-new-tokens", "6", "--windows", "1", "--window-tokens", "32", "--device", "cpu"]
FEW_LOSSES = [*FEW[:4], *FEW[6:8], *FEW[10:], "--accuracy-tasks", "none"]  # the same without answers and their tokens


@functools.cache
def built(app):
    """The program with all its commands and options, which Typer would build anew for each call."""
    return typer.main.get_command(app)


def called(*words):
    """Run the program in this process."""
    with patch.object(typer.testing, "_get_command", built):
        return CliRunner().invoke(cap_nb.command_line.app, [str(word) for word in words])


def output_of(*words):
    """What the program prints, which does what it should."""
    result = called(*words)
    assert result.exit_code == 0, f"{result.output} {result.exception!r}"
    return result.stdout


def assert_one_sentence(result, *parts):
    """Exit code 2, nothing on the output, one line on the error channel with all the parts, no traceback."""
    assert result.exit_code == 2 and result.stdout == "", f"{result.output} {result.exception!r}"
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("cap: ") and "Traceback" not in result.stderr, result.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def cap(*words):
    """Work: the program, as a user would start it."""
    def work():
        sys.argv = ["cap", *map(str, words)]
        main()
    return work


def as_nobody(*_):
    """Go on as a user who owns nothing."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


@functools.cache
def problems_drawn():
    """The lab's problems, which a process draws and encodes once, are drawn and encoded here and not in every child."""
    for task in LAB_TASKS:
        calibration.calibration_pool(lab_tokenizer(), task, None, "lab")
        load_problems(task, "evaluation")


class Program:
    """Work in a forked process, with the methods that a process of `subprocess` has."""

    def __init__(self, work, folder=None, together=False, draws=True):
        if draws:
            problems_drawn()
        self.returncode, self.said = None, tempfile.TemporaryFile()
        self.complained = self.said if together else tempfile.TemporaryFile()
        self.pid = os.fork()
        if not self.pid:
            alone(work, self.said.fileno(), self.complained.fileno(), folder)

    def poll(self):
        """The exit code (a signal negative), or None while it is at work."""
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout=300):
        """The exit code; a process that takes longer is killed."""
        last = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > last:
                self.send_signal(signal.SIGKILL)
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout=300):
        """What it said on both channels, once it has ended; if they go together, both times all of it."""
        self.wait(timeout)
        return tuple((file.seek(0), file.read().decode())[1] for file in (self.said, self.complained))


def finished(work, folder=None, timeout=300, draws=True):
    """Do some work in a forked process, which may draw problems: the process, with `stdout` and `stderr`."""
    program = Program(work, folder, draws=draws)
    program.stdout, program.stderr = program.communicate(timeout)
    return program
