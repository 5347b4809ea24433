"""One table of losses by several processes: the bytes of one process; and a process that dies, is slow, or helps."""
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixtures import made_up_calibration, refuses, tiny_llama

from cap_nb.core import devices
from cap_nb.core.errors import BadInput
from cap_nb.methods import resumed_scoring
from cap_nb.methods.resumed_scoring import Request, help_scoring, score_heads
from cap_nb.methods.layer_walk import joined
from cap_nb.models.decoding import HeldModel
from tools.benchmarks.processes import free_port

PROCESSES = multiprocessing.get_context("fork")  # what is imported already need not be imported again
UNITS = 3 * 5  # layers and batches of the model and the examples below
BATCH_TOKENS = 33


def model_and_examples():
    return tiny_llama(), made_up_calibration(9)


def finished(store):
    return [path for path in Path(store).rglob("batch-*.safetensors")]


def table_bytes(store):
    return next(Path(store).glob("*.safetensors")).read_bytes()


def until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.002)


def counted_units(store, before):
    """How many units this process computes, and what happens before each is written."""
    written, write = [], resumed_scoring.write_unit

    def counting(*arguments):
        before(store, len(written))
        write(*arguments)
        written.append(arguments[1])

    resumed_scoring.write_unit = counting
    return written


def nothing(store, number):
    """Before a unit is written, nothing happens."""


def launched_rank(rank, count, port, store, said, before=nothing):
    """What a launcher would start: one of several processes that score together."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    written = counted_units(store, before)
    try:
        with joined(torch.device("cpu")) as share:
            score_heads(*model_and_examples(), BATCH_TOKENS, store, share=share)
        said.put((rank, len(written), ""))
    except BadInput as error:
        said.put((rank, len(written), str(error)))


def alone(store, said, before=nothing):
    """A process that no launcher started, and that makes the table."""
    written = counted_units(store, before)
    score_heads(*model_and_examples(), BATCH_TOKENS, store)
    said.put(("owner", len(written), ""))


def helper(store, said, before=nothing):
    """A process that comes later and helps."""
    counted_units(store, before)
    said.put(("helper", help_scoring(*model_and_examples(), Request(batch_tokens=BATCH_TOKENS, store=store)), ""))


def started(target, *arguments):
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    return process


def together(count, store, before=None):
    """Start so many processes and wait for them: name -> (units, sentence) of those that ended by themselves."""
    port, said = free_port(), PROCESSES.Queue()
    ranks = [started(launched_rank, rank, count, port, store, said, (before or {}).get(rank, nothing)) for rank in range(count)]
    for process in ranks:
        process.join(300)
    alive = sum(process.exitcode == 0 for process in ranks)
    return {name: (units, sentence) for name, units, sentence in (said.get(timeout=10) for _ in range(alive))}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    store = tmp_path_factory.mktemp("one")
    score_heads(*model_and_examples(), BATCH_TOKENS, store)
    assert len(finished(store)) == UNITS
    return table_bytes(store)


soak = pytest.mark.skipif(not os.environ.get("CAP_NB_SOAK"), reason="eight processes in make soak")


@pytest.mark.parametrize("count", [4, pytest.param(8, marks=soak)])
def test_any_number_of_processes_gives_the_bytes_of_one(tmp_path, undisturbed, count):
    done = together(count, tmp_path)
    assert table_bytes(tmp_path) == undisturbed and len(done) == count
    assert sum(units for units, _ in done.values()) == UNITS  # nothing is computed twice


def test_a_process_that_dies_ends_the_others_with_a_sentence_and_fewer_go_on(tmp_path, undisturbed):
    died = tmp_path.with_name(f"{tmp_path.name}-died")

    def dies(store, number):
        died.touch()
        os._exit(9)

    def waits(store, number):  # at its second unit, so that one is left for the process that dies
        if number == 1:
            until(died.exists)

    done = together(3, tmp_path, {0: waits, 1: waits, 2: dies})
    assert set(done) == {0, 1} and all("Another process of this launch has ended" in sentence for _, sentence in done.values())
    assert not list(tmp_path.glob("*.safetensors"))
    kept = {path: path.stat().st_mtime_ns for path in finished(tmp_path)}
    again = together(2, tmp_path)
    assert table_bytes(tmp_path) == undisturbed and len(kept) > 0
    assert sum(units for units, _ in again.values()) == UNITS - len(kept) and {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_slow_process_takes_fewer_units(tmp_path, undisturbed):
    """The slow one is at its first unit while the other one does all but this."""
    done = together(2, tmp_path, {1: lambda store, number: until(lambda: len(finished(store)) == UNITS - 1) if number == 0 else None})
    assert (done[0][0], done[1][0]) == (UNITS - 1, 1) and table_bytes(tmp_path) == undisturbed


def waiting_owner(place, said, name):
    """An owner that has begun, and waits for a file at its first unit."""
    owner = started(alone, place, said, lambda store, number: until(lambda: (store/name).exists()) if number == 0 else None)
    until(lambda: list(place.rglob("claims")))
    return owner


def test_a_helper_that_dies_at_a_unit_is_made_up_for(tmp_path, undisturbed):
    """The owner passes over the helper's unit, waits for it, and computes it when the helper has died."""
    def dies_last(store, number):
        until(lambda: len(finished(store)) == UNITS - 1)
        os._exit(9)

    said = PROCESSES.Queue()
    owner = waiting_owner(tmp_path, said, "helper is at work")
    late = started(helper, tmp_path, said, lambda store, number: ((store/"helper is at work").touch(), dies_last(store, number)))
    assert said.get(timeout=120)[:2] == ("owner", UNITS)
    owner.join(300), late.join(300)
    assert late.exitcode == 9 and table_bytes(tmp_path) == undisturbed


def test_a_helper_has_the_owner_s_settings(tmp_path):
    said = PROCESSES.Queue()
    owner = waiting_owner(tmp_path, said, "go on")
    refuses("has other settings", help_scoring, *model_and_examples(), Request(batch_tokens=20, store=tmp_path))
    (tmp_path/"go on").touch()
    owner.join(300)
    assert owner.exitcode == 0


class Card:
    """A device's memory, counted as CUDA counts it."""

    now = peak = 0

    def use_and_free(self, size):
        self.peak = max(self.peak, self.now + size)

    def reset_peak_memory_stats(self, device):
        self.peak = self.now

    def memory_allocated(self, device):
        return self.now

    def max_memory_allocated(self, device):
        return self.peak


def test_a_measurement_within_another_leaves_its_peak(monkeypatch):
    card, device = Card(), torch.device("cpu")
    monkeypatch.setattr(devices, "module_of", lambda device: card)
    with devices.memory_taken(device) as outer:
        card.use_and_free(100)
        with devices.memory_taken(device) as inner:
            card.use_and_free(10)
    assert (outer, inner, devices.OPEN) == ([100], [10], [])


@pytest.mark.parametrize("where", [dict(device=torch.device("cuda:1")), dict(device=torch.device("cuda:0"), hf_device_map={"model": 0, "lm_head": 1})])
def test_vllm_is_not_given_a_model_elsewhere(where):
    refuses("vllm takes the first device alone", lambda: HeldModel(SimpleNamespace(**where), "folder").writer)


def test_every_kind_of_work_gives_the_same_on_a_pretended_device():
    """In a process of its own: torch's engine for the way back takes no device that is made after its first backward pass."""
    asked = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(Path(__file__).with_name("pretended_device.py"))]
    kept = {name: value for name, value in os.environ.items() if name != "CAP_NB_FUZZ"} # a soak is not recorded by it
    done = subprocess.run(asked, capture_output=True, text=True, cwd=Path(__file__).parent, env=kept)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    if " passed" not in done.stdout.splitlines()[-1]:
        pytest.skip(done.stdout[-300:])
