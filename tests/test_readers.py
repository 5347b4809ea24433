"""Every reader of a file: what is right is read, and whatever is spoilt gives a value or one sentence.

Bytes of a good file are cut out, changed or put in; or a well-formed file says something else, its checksum right. Where a file holds its own checksum,
spoilt bytes give a sentence or the same value. A few examples each here, and CAP_NB_FUZZ of them in `make soak`.
"""
import functools
import json
import math
import os
import signal
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from cap_nb.command_line import known_options
from cap_nb.core.devices import RESET, resident
from cap_nb.core.errors import BadInput
from cap_nb.core.files import (
    SHARD_INDEX, checked_text, checkpoint_tensors, json_text, read_checked, read_checksums, read_json, read_tensors, read_text, sealed, sha256_of_file, sha256_of_tensor,
    sha256_of_text, stored_tensors)
from cap_nb.data.problems import records_of_file, records_of_table
from cap_nb.evaluation import Evaluation
from cap_nb.jobs.chains import read_chains
from cap_nb.jobs.records import load_evaluation, packed_records, read_report, read_run, save_evaluation
from cap_nb.jobs.sweeps import INDEX as SWEEP_INDEX
from cap_nb.jobs.sweeps import read_config, read_index
from cap_nb.methods.screening import read_scores
from cap_nb.methods.streaming import load_norms
from cap_nb.methods.layer_walk import Unit, UnitStore, read_unit
from cap_nb.models.lab import load_state, read_state
from cap_nb.models.loading import config_of, load_gguf, load_tokenizer
from cap_nb.portable.format import CHECKSUM, FORMAT, VERSION, Entry, header_of, open_shard, read_manifest
from cap_nb.portable.quantised import export_gguf
from cap_nb.portable.sharing import ALWAYS, read_record
from cap_nb.methods.resumed_scoring import load_losses
from conftest import ROOT
from hub import parquet_bytes, save_llama
from test_quantised import saved

MANY = int(os.environ.get("CAP_NB_FUZZ", 0))
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk would take most of the time
FUZZ = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
SECONDS = 10  # that a reader may take for an input


# ---- how a file is written ----
def plain(value):
    return json.dumps(value).encode()


def checked(value):
    return checked_text(value).encode()


def lines(values):
    return b"\n".join(map(plain, values if isinstance(values, list) else [values]))


def tensors_about(**tensors):
    """What writes tensors with words about them and the right checksums."""
    def write(words):
        sums = {"meta": sha256_of_text(json_text(words)), "tensors": {name: sha256_of_tensor(tensor) for name, tensor in tensors.items()}}
        return save(tensors, {"cap_nb": json.dumps({"meta": words, "sha256": sums}, sort_keys=True)})

    return write


def chains(values):
    """Answers, a line each, behind a line that names their checksum."""
    header = {"about": values[0]["about"], "sha256": sha256_of_text(json.dumps([values[0]["about"], *values[1:]], sort_keys=True))}
    return lines([values[0] | header, *values[1:]])


def packed(said):
    """A packed file whose tensors lie as they must, whatever their names and sizes; each has the length of its shape."""
    inner = json.dumps(said["inner"]).encode()
    inner = len(inner).to_bytes(8, "little") + inner
    wide = {"U8": 1, "F16": 2, "F32": 4, "F64": 8}
    entries = {name: Entry(kind=kind, shape=tuple(shape), size=math.prod(shape) * wide.get(kind, 4), width=wide.get(kind, 4)) for name, (kind, shape) in said["tensors"].items()}
    entries["header"] = Entry(kind="U8", shape=(len(inner),), size=len(inner), width=1)
    head = header_of(entries, said["about"])
    body = bytearray(min(1 << 16, sum(entry.size for entry in entries.values())))
    start, end = json.loads(head[8:])["header"]["data_offsets"]
    body[start:end] = inner
    return head + bytes(body)


@functools.cache
def model_files():
    """A tiny Llama as transformers saves it, what belongs to it, and the same in GGUF."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        folder = Path(name) / "m"
        save_llama(folder)
        export_gguf(saved(Path(name) / "other"), folder / "m.gguf")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@functools.cache
def beside(reader):
    """What a reader finds in its folder besides the file that is spoilt, by name; and that file, where another writes it."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        folder = Path(name)
        if reader == "evaluation":
            save_evaluation(Evaluation(method="cap", sparsity=0.5, reached=0.5), folder)
        if reader == "index of shards":
            for tensor, shard in WEIGHT_MAP.items():
                save_file({tensor: torch.zeros(2)}, folder / shard)
        found = {"config.json": b"{}"} | {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | ({name: body for name, body in model_files().items() if "token" in name} if "tokenizer" in reader else {})


def content_beside(reader, name):
    return json.loads(beside(reader)[name])["content"]


def training():
    """Parameters and their optimiser."""
    parameters = {"bias": torch.nn.Parameter(torch.ones(2))}
    return parameters, [torch.optim.Adam(parameters.values())]


def manifest_of(path):
    """A list of files whose own checksum is right."""
    (path.parent / CHECKSUM).write_text(f"{sha256_of_file(path)}  {path.name}\n")
    return read_manifest(path.parent)


def losses(**more):
    return {"stratum": [0, 0, 1], "task": ["a"] * 3, "uid": ["a", "b", "c"], "k": 1, "seed": 0, "meta": {}} | more


WEIGHT_MAP = {"a": "x.safetensors", "b": "y.safetensors"}  # What the shards beside an index hold
NOTE = dict.fromkeys(ALWAYS, "x") | {"zeros": 3, "weights": 6, "asked": 0.5, "base": {"name": "x", "fingerprint": "0"}}
REPORT = {"method": "cap", "asked": 0.5, "reached": 0.5, "weights": 8, "zeros": 4, "threshold": 0.1, "ties": 0, "table": [[0, "query", "a", 2, 4]], "mask": "0"}
LLAMA = {"model_type": "llama", "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 50,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "dtype": "float32", "tie_word_embeddings": False, "max_position_embeddings": 64, "cap_nb": sealed(NOTE)}
ARC = {"question": {"stem": "Which?", "choices": [{"label": label, "text": label} for label in "AB"]}, "answerKey": "A"}
CHAIN = {"task": "lab-arc", "uid": "a", "prompt": "p", "text": "t", "answer": "A", "gold": "A", "attempt": 0, "entropy": 0.5, "tokens": 3, "cut_off": False}
PACKED = {"about": {"format": FORMAT, "version": str(VERSION), "kind": "bitmask", "base": "", "sha256": "0" * 64},
          "inner": {"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [32, 40]}},
          "tensors": {"mask/a": ["U8", [1]], "kept/a": ["F32", [3]], "plain/b": ["F32", [2]]}}
SWEEP = {"format": 1, "config_sha256": "0", "configs": ["x.yaml"], "on_the_command_line": [], "varies": ["n"], "runs": [{"folder": "a", "settings": {"n": 3}, "finished": False}]}
FILES = {"name": "a", "bytes": 1, "sha256": "0", "stored": "a", "stored_bytes": 1, "stored_sha256": "0"}
TABLE = {"masked": torch.rand(2, 2, 3, dtype=torch.float64), "intact": torch.rand(3, dtype=torch.float64)}


@dataclass
class Reader:
    """A reader, and good files that it reads."""

    read: Callable  # Of a path
    name: str  # Of the file
    good: Callable  # Gives values that the file may hold, or its bytes
    write: Callable = bytes  # Value -> bytes

    @property
    def sealed(self):
        """Whether the file holds its own checksum."""
        return self.write in (checked, chains) or self.write.__qualname__.startswith("tensors_about")


READERS = {
    "read_json": Reader(read_json, "x.json", lambda: [{"a": [1, "b"]}], plain),
    "read_checked": Reader(read_checked, "x.json", lambda: [{"n": [1, 2.5, "three"]}], checked),
    "read_tensors": Reader(read_tensors, "x.safetensors", lambda: [losses()], tensors_about(**TABLE)),
    "stored_tensors": Reader(stored_tensors, "x.safetensors", lambda: [tensors_about(**TABLE)(losses())]),
    "load_losses": Reader(load_losses, "x.safetensors", lambda: [losses()], tensors_about(**TABLE)),
    "scores": Reader(lambda path: read_scores(path, "mean"), "x.safetensors", lambda: [losses(), losses(meta={"measured": 0.5})], tensors_about(**TABLE)),
    "scores measured in part": Reader(lambda path: read_scores(path, "mean"), "x.safetensors", lambda: [losses(meta={"screened": {"seed": 0}})], tensors_about(**TABLE, slopes=TABLE["masked"] + 1)),
    "norms": Reader(load_norms, "x.safetensors", lambda: [{"norms": {"n": 3}}], tensors_about()),
    "training": Reader(lambda path: read_state(path, {"steps": 3}), "x.safetensors", lambda: [{"steps": 3, "losses": [0.5]}], tensors_about()),
    "unit": Reader(lambda path: read_unit(UnitStore(path.parent), Unit(0, 0), ["a", "b", "c"], 2), "batch-0000-layer-000.safetensors", lambda: [{"uids": ["a", "b", "c"]}],
                   tensors_about(masked=torch.rand(2, 3, dtype=torch.float64))),
    "report": Reader(read_report, "x.json", lambda: [REPORT], checked),
    "run": Reader(lambda path: read_run(path.parent), "run.json", lambda: [read_run(ROOT / "figures" / "lab")], checked),
    "sweep": Reader(lambda path: read_index(path.parent), SWEEP_INDEX, lambda: [SWEEP], checked),
    "evaluation": Reader(lambda path: load_evaluation(path.parent), "evaluation.json", lambda: [content_beside("evaluation", "evaluation.json")], checked),
    "state of a training": Reader(lambda path: load_state(path.parent, *training(), {}), "training.safetensors", lambda: [{"step": 1, "recipe": {}}], tensors_about(**{"weight.bias": torch.ones(2), "optimizer.0.0.step": torch.tensor(1.)})),
    "text": Reader(read_text, "x.txt", lambda: ["Größe\n".encode()]),
    "index of shards": Reader(lambda path: checkpoint_tensors(path.parent), SHARD_INDEX, lambda: [{"metadata": {}, "weight_map": WEIGHT_MAP}], plain),
    "json records": Reader(records_of_file, "x.json", lambda: [[{"question": "q", "answer": True, "facts": ["f"]}]], plain),
    "jsonl records": Reader(records_of_file, "x.jsonl", lambda: [[{"question": "q", "answer": "a #### 1"}], [ARC]], lines),
    "parquet records": Reader(records_of_table, "x.parquet", lambda: [[{"question": "q", "answer": "a", "choices": {"label": ["A"], "text": ["a"]}}]], parquet_bytes),
    "packed records": Reader(packed_records, "x.parquet", lambda: [[{"record": "file", "place": "p", "content": "x"}]], parquet_bytes),
    "chains": Reader(read_chains, "x.jsonl", lambda: [[{"about": {"model": {}, "tokenizer": "t", "style": {"called": "s"}}, "sha256": "0"}, CHAIN]], chains),
    "packed shard": Reader(open_shard, "x.packed.safetensors", lambda: [PACKED, PACKED | {"about": PACKED["about"] | {"kind": "delta"}, "tensors": {"mask/a": ["U8", [1]]}}], packed),
    "manifest": Reader(manifest_of, "packed.json", lambda: [{"format": "cap_nb packed folder", "version": 1, "kind": "bitmask", "base": None, "files": [FILES]}], plain),
    "configuration": Reader(lambda path: config_of(path.parent), "config.json",
                            lambda: [LLAMA, LLAMA | {"model_type": "gpt2"}, LLAMA | {"model_type": "mixtral", "num_local_experts": 2}], plain),
    "note on a pruning": Reader(lambda path: read_record(path.parent), "config.json", lambda: [{"cap_nb": sealed(NOTE)}], plain),
    "checksums": Reader(read_checksums, "SHA256SUMS.json", lambda: [{"a": "0", "b": "1"}], plain),
    "tokenizer": Reader(lambda path: load_tokenizer(str(path.parent)), "tokenizer.json", lambda: [json.loads(model_files()["tokenizer.json"])], plain),
    "configuration of a tokenizer": Reader(lambda path: load_tokenizer(str(path.parent)), "tokenizer_config.json", lambda: [json.loads(model_files()["tokenizer_config.json"])], plain),
    "GGUF": Reader(lambda path: load_gguf(path, None, torch.device("cpu")), "x.gguf", lambda: [model_files()["m.gguf"]]),
    "options": Reader(lambda path: read_config(path, known_options()), "x.yaml", lambda: [{"n": 3, "model": "lab", "methods": ["cap", "wanda"], "sparsity": [0.1, 0.5]}], plain)}
SLOW = ("GGUF", "tokenizer", "configuration of a tokenizer")  # Read by transformers, in milliseconds


# ---- how it is spoilt ----
PIECES = [b"[" * 5000, b"{\"a\":" * 500, b"1e999", b"NaN", b"\"\\ud800\"", b"\xff", b"\x00" * 8, b"null", b"-1", b"18446744073709551616", b"\xff" * 7 + b"\x7f", b"..", b"/", b""]
ODD = st.sampled_from([None, True, 0, -1, 2 ** 31, 2 ** 63, -(2 ** 70), 0.5, 1e308, math.nan, "", "a", "..", "../x", "/x", "a" * 300, "\n", "\x00", "\ud800", [], {}, [[]], {"": None}, ["a", 1]])
PLACE = st.integers(0, 1 << 20)


def bytes_spoilt(body):
    """A good file with some bytes cut out, changed or put in."""
    def spoil(cuts):
        changed = bytearray(body)
        for at, length, new in cuts:
            at = at % (len(changed) + 1)
            changed[at:at + length] = new
        return bytes(changed)

    cut = st.tuples(PLACE, st.sampled_from([0, 1, 4, 30, 1 << 20]), st.binary(max_size=12) | st.sampled_from(PIECES))
    return st.lists(cut, min_size=1, max_size=4).map(spoil)


def lists_in(value):
    """Every list and object in a value, itself included, if they hold something."""
    if not isinstance(value, (list, dict)) or not value:
        return []
    return [value, *(found for inner in (value.values() if isinstance(value, dict) else value) for found in lists_in(inner))]


def said_otherwise(value, write):
    """The file of a value some of whose parts are exchanged, left out or renamed; what cannot be written so is plain JSON."""
    def change(changes):
        new = json.loads(json.dumps(value))
        for at, key, kind, odd in changes:
            if not (places := lists_in(new)):
                break
            place = places[at % len(places)]
            key = list(place)[key % len(place)] if isinstance(place, dict) else key % len(place)
            old = place.pop(key) if kind != "exchanged" else None
            if kind == "renamed" and isinstance(place, dict):
                place[f"{key}x"] = old
            if kind == "exchanged":
                place[key] = odd
        try:
            return write(new)
        except (pyarrow.ArrowException, AttributeError, LookupError, TypeError, ValueError, OverflowError):
            return plain(new)

    return st.lists(st.tuples(PLACE, PLACE, st.sampled_from(["exchanged", "exchanged", "left out", "renamed"]), ODD), min_size=1, max_size=3).map(change)


class TooSlow(BaseException):
    """An input takes a reader too long; nobody catches this by accident."""


@contextmanager
def soon_over():
    def too_slow(*_):
        raise TooSlow(f"an input took {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def answer(read, path, content):
    """What a reader makes of a file: a value, or one sentence. Whatever else it does is raised."""
    path.write_bytes(content)
    with soon_over():
        try:
            return read(path), None
        except BadInput as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2_000, str(error)[:300]
            return None, str(error)


@pytest.fixture
def place(request, tmp_path_factory):
    """A folder with what a reader finds besides its file."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        for name, body in beside(request.node.callspec.params["name"]).items():
            (Path(folder) / name).write_bytes(body)
        yield Path(folder)


@pytest.mark.parametrize("name", READERS)
def test_whatever_is_read_gives_a_value_or_one_sentence(name, place):
    reader = READERS[name]
    path = place / reader.name
    RESET.write_text("5")  # an earlier peak hides no later one
    before = resident("VmHWM")
    for value in reader.good():
        body = reader.write(value)
        right, refused = answer(reader.read, path, body)
        assert refused is None, refused

        @settings(FUZZ, max_examples=MANY or (4 if name in SLOW else 20))
        @given(bytes_spoilt(body))
        def spoilt(content):
            found, refused = answer(reader.read, path, content)
            assert refused or not reader.sealed or repr(found) == repr(right)

        @settings(FUZZ, max_examples=MANY or (4 if name in SLOW else 20))
        @given(said_otherwise(value, reader.write) if reader.write is not bytes else st.binary(max_size=80))
        def otherwise(content):
            answer(reader.read, path, content)

        spoilt()
        otherwise()
    assert resident("VmHWM") - before < 1 << 30
