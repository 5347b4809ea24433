"""Nothing let in: no pickle, no code of a checkpoint, no name that leads out of a folder, no link that is followed, nothing absurd that takes the memory.

The readers are fuzzed with a few examples each here, and with CAP_NB_FUZZ=100000 each by `make soak`: whatever is read gives a value or `BadInput`.
The soak keeps what it did in figures/bad_input/fuzzed.json, which the page of wrong uses shows.
"""
import ast
import datetime
import faulthandler
import functools
import importlib.util
import io
import json
import os
import pickle
import platform
import re
import signal
import stat
import subprocess
import sys
import tempfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cap_nb.command_line import app, known_options, short_name
from cap_nb.core import files
from cap_nb.core.errors import BadInput
from cap_nb.core.files import (
    SHARD_INDEX, check_inside, checked_text, checkpoint_tensors, read_checked, read_checksums, read_json, read_tensors, read_text, sealed, sha256_of_file, stored_tensors,
    whole_file, whole_folder, write_checked, write_tensors)
from cap_nb.data.problems import records_of_file, records_of_table
from cap_nb.jobs import records as run_records
from cap_nb.jobs.chains import read_chains
from cap_nb.methods.unit_store import Unit, UnitStore, read_unit
from cap_nb.evaluation import Evaluation
from cap_nb.jobs.records import commit_of_package, load_evaluation, packed_records, read_report, read_run, save_evaluation, unpack_run
from cap_nb.jobs.sweeps import INDEX as SWEEP_INDEX
from cap_nb.jobs.sweeps import read_config, read_index
from cap_nb.methods.budgets import load_budgets
from cap_nb.methods.screening import read_scores
from cap_nb.methods.streaming import load_norms
from cap_nb.models.lab import load_state, read_state, save_state
from cap_nb.models.loading import config_of, load_gguf, load_model, load_tokenizer
from cap_nb.portable.format import CHECKSUM, open_shard, read_manifest
from cap_nb.portable.quantised import export_gguf
from cap_nb.portable.sharing import ALWAYS, read_record
from cap_nb.scoring import load_losses
from conftest import ROOT
from fixtures import tiny_llama
from hub import byte_tokenizer
from test_quantised import saved

SOURCES = sorted([*(ROOT / "cap_nb").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


# ---- no pickle, no shell ----
def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_module_pickles():
    for path, tree in TREES.items():
        imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "cPickle"}, path
        said = {ast.unparse(call.func) for call in calls(tree)}
        assert not said & {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "eval"}, path
        assert not [one for one in said if one.endswith((".to_pickle", ".read_pickle"))], path


def test_no_shell_is_built():
    for path, tree in TREES.items():
        for call in calls(tree):
            name = ast.unparse(call.func)
            assert name not in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), path
            assert not [word for word in call.keywords if word.arg == "shell"], path
            if name.startswith("subprocess.") and call.args:
                assert not isinstance(call.args[0], (ast.Constant, ast.JoinedStr)), f"{path}: {ast.unparse(call)}"


def test_code_runs_only_from_plugins():
    """`exec` stands in one place of the package, and `trust_remote_code` is False wherever it stands."""
    found = [path for path, tree in TREES.items() for call in calls(tree) if ast.unparse(call.func) == "exec"]
    assert [path.name for path in found if path.is_relative_to(ROOT / "cap_nb")] == ["plugins.py"]
    trusted = [word.value for tree in TREES.values() for call in calls(tree) for word in call.keywords if word.arg == "trust_remote_code"]
    assert trusted and all(isinstance(value, ast.Constant) and value.value is False for value in trusted)


def test_a_run_touches_no_pickle(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a pickle")

    for module, names in ((pickle, ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    words = "run --n 3 --k 1 --evaluate-n 2 --loss-n 2 --max-new-tokens 4 --windows 1 --window-tokens 32 --device cpu --methods cap --sparsity 0.5 --tasks lab-arc --out"
    old = os.umask(0o027)
    try:
        result = CliRunner().invoke(app, [*words.split(), str(tmp_path / "run")])
        packed = CliRunner().invoke(app, ["pack", str(tmp_path / "run")])
        pruned = CliRunner().invoke(app, f"prune --method magnitude --sparsity 0.5 --device cpu --out {tmp_path / 'pruned'}".split())
    finally:
        os.umask(old)
    assert result.exit_code == packed.exit_code == pruned.exit_code == 0, (result.output, result.exception, packed.output, pruned.output)
    modes = {path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) > 8 and set(modes.values()) == {0o640}, {name: oct(mode) for name, mode in modes.items() if mode != 0o640}


# ---- no code of a checkpoint ----
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama in several shards."""
    folder, tokenizer = tmp_path_factory.mktemp("model") / "tiny", byte_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder, max_shard_size="20kB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy that a test may spoil, with what changes its JSON files."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())

    def change(name, **settings):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return change


def refused(folder, *parts):
    with pytest.raises(BadInput) as said:
        load_model(str(folder), device="cpu")
    for part in parts:
        assert part in str(said.value), said.value


@pytest.mark.parametrize("known", [True, False], ids=["a known class", "an unknown class"])
def test_code_in_a_folder_is_not_run(copy, tmp_path, known):
    evil = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\nclass Custom: pass\n"
    auto = {"AutoConfig": "evil.Custom", "AutoModelForCausalLM": "evil.Custom", "AutoTokenizer": ["evil.Custom", None]}
    folder = copy("config.json", auto_map=auto, **({} if known else {"model_type": "custom"}))
    copy("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Custom", None]})
    (folder / "evil.py").write_text(evil)
    if known:
        load_model(str(folder), device="cpu")
    else:
        refused(folder, "copy")
    assert not (tmp_path / "ran").exists()


# ---- checkpoints that lie ----
def shards_of(folder):
    return json.loads((folder / SHARD_INDEX).read_text())["weight_map"]


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/secret.safetensors", "sub/x.safetensors", "", ".", None, 7])
def test_an_index_cannot_lead_outside(copy, tmp_path, place):
    folder = copy("config.json")
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "secret.safetensors")
    copy(SHARD_INDEX, weight_map=shards_of(folder) | {"lm_head.weight": place})
    refused(folder, "is no index of shards")


def test_a_tensor_stands_once_and_where_the_index_says(copy):
    folder = copy("config.json")
    first, last = sorted(set(shards_of(folder).values()))[0], sorted(set(shards_of(folder).values()))[-1]
    name = next(name for name, place in shards_of(folder).items() if place == first)
    right = shards_of(folder)
    copy(SHARD_INDEX, weight_map=right | {name: last})
    refused(folder, f"says that {last} holds {name}")
    copy(SHARD_INDEX, weight_map=right)
    save_file(load_file(folder / last) | {name: torch.zeros(2)}, folder / last)
    refused(folder, f"holds {name}, which")
    with pytest.raises(BadInput, match="holds too"):
        checkpoint_tensors(folder)


def test_shapes_and_dtypes_are_not_believed(copy):
    folder = copy("config.json", vocab_size=1 << 28)
    refused(folder, "copy")
    path = folder / "one.safetensors"
    save_file({"x": torch.zeros(4)}, path)
    for old, new in ((b'"shape":[4]', b'"shape":[9]'), (b'"F32"', b'"F64"'), (b"[0,16]", b"[0,99]")):
        path.with_name("lie.safetensors").write_bytes(path.read_bytes().replace(old, new))
        with pytest.raises(BadInput):
            stored_tensors(path.with_name("lie.safetensors"))


def test_a_tensor_that_is_missing_is_not_made_up(copy):
    folder = copy("config.json")
    places = shards_of(folder)
    gone = "model.layers.1.mlp.up_proj.weight"
    kept = {name: tensor for name, tensor in load_file(folder / places[gone]).items() if name != gone}
    save_file(kept or {"other": torch.zeros(1)}, folder / places[gone], metadata={"format": "pt"})
    places.pop(gone)
    (folder / SHARD_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    refused(folder, "its config.json describes")


def test_a_tensor_of_another_name_is_not_made_up(copy):
    folder = copy("config.json")
    places = shards_of(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / places[name])
    save_file({"x" if key == name else key: tensor for key, tensor in tensors.items()}, folder / places[name], metadata={"format": "pt"})
    copy(SHARD_INDEX, weight_map={"x" if key == name else key: place for key, place in places.items()})
    refused(folder, f"holds no {name}")


def test_a_tensor_of_another_name_in_gguf_is_not_made_up(tmp_path):
    body = model_files()["m.gguf"]
    (tmp_path / "m.gguf").write_bytes(body.replace(b"blk.1.ffn_up", b"blk.1.ffn_uq"))
    with pytest.raises(BadInput, match="holds no model.layers.1.mlp.up_proj.weight"):
        load_model(str(tmp_path / "m.gguf"), device="cpu")


# ---- names ----
@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "a//x", "", ".", "a\\x", "a\nx", 7, None])
def test_names_that_lead_outside(name):
    with pytest.raises(BadInput, match="names a file"):
        check_inside(name, "a file")


def test_a_packed_run_cannot_write_outside(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    table = pyarrow.Table.from_pylist([{"record": "file", "place": "../../escaped", "content": b"x"}], pyarrow.schema(run_records.COLUMNS))
    parquet.write_table(table, tmp_path / "run" / run_records.PACKED)
    write_checked(tmp_path / "run" / "manifest.json", {"packed": files.sha256_of_file(tmp_path / "run" / run_records.PACKED)})
    monkeypatch.setattr(run_records, "read_run", lambda folder: {})
    with pytest.raises(BadInput, match="escaped"):
        unpack_run(tmp_path / "run", tmp_path / "a" / "new")
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "a" / "new").exists()


@pytest.mark.parametrize("model, called", [("..", None), (".", None), ("/", "model"), ("owner/name@abc", "name@abc"), ("lab", "lab")])
def test_a_runs_folder_lies_below_runs(model, called):
    assert short_name(model) not in ("", ".", "..") and "/" not in short_name(model) and called in (None, short_name(model))


def test_a_plugins_names_are_words(tmp_path):
    (tmp_path / "mine.py").write_text("from cap_nb.all import add_criterion\nadd_criterion('../evil', lambda weight: weight)\n")
    result = CliRunner().invoke(app, ["prune", "--plugin", str(tmp_path / "mine.py"), "--method", "magnitude", "--out", str(tmp_path / "new")])
    assert result.exit_code == 2 and "../evil" in result.stderr and not (tmp_path / "new").exists()


# ---- links ----
def test_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    for name in ("result", f".result.{os.getpid()}.part", ".result.999999999.part"):
        (tmp_path / name).symlink_to(victim)
    with whole_file(tmp_path / "result") as part:
        part.write_text("new")
    assert victim.read_text() == "as it was" and not (tmp_path / "result").is_symlink()
    (tmp_path / "folder").symlink_to(tmp_path)
    with pytest.raises(BadInput, match="exists already"), whole_folder(tmp_path / "folder"):
        pass
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "evaluations").symlink_to(tmp_path / "elsewhere")
    result = CliRunner().invoke(app, f"run --n 3 --k 1 --evaluate-n 2 --loss-n 2 --windows 0 --accuracy-tasks none --tasks lab-arc --device cpu --out {tmp_path / 'run'}".split())
    assert result.exit_code == 2, result.output
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(BadInput, match="evaluations is a link"), files.alone_in(tmp_path / "run"):
        pass


# ---- absurd sizes ----
def sparse(path, size, start=b""):
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def peak(anew=False):
    """The most memory of this process, in bytes, since the last time that it was asked for anew; so an earlier peak hides no later one."""
    if anew:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_UNPACKED", 1 << 27)  # the real limit takes seconds to exceed
    before = peak(anew=True)
    terabyte = 1 << 40
    for suffix, read in ((".json", read_json), (".json", read_checked), (".jsonl", records_of_file), (".json", records_of_file), (".jsonl", read_chains)):
        with pytest.raises(BadInput, match="expected a text of at most"):
            read(sparse(tmp_path / f"huge{suffix}", terabyte))
    header = (terabyte // 2).to_bytes(8, "little")
    for read in (stored_tensors, read_tensors, load_losses):
        with pytest.raises(BadInput, match="header would have"):
            read(sparse(tmp_path / "huge.safetensors", terabyte, header))
    whole = json.dumps({"x": {"dtype": "U8", "shape": [terabyte], "data_offsets": [0, terabyte]}}).encode()
    with pytest.raises(BadInput, match="the memory of this machine"):
        read_tensors(sparse(tmp_path / "sparse.safetensors", 8 + len(whole) + terabyte, len(whole).to_bytes(8, "little") + whole))
    parquet.write_table(pyarrow.table({"x": pyarrow.nulls(6_000_000)}), tmp_path / "rows.parquet")
    piece = pyarrow.table({"x": pyarrow.array(["y" * 1_000_000] * 60)})
    with parquet.ParquetWriter(tmp_path / "wide.parquet", piece.schema, compression="zstd") as writer:
        for _ in range(3):
            writer.write_table(piece)
    assert (tmp_path / "wide.parquet").stat().st_size < 1 << 20
    for name in ("rows", "wide"):
        with pytest.raises(BadInput, match="is too large: expected at most"):
            records_of_table(tmp_path / f"{name}.parquet")
    assert peak() - before < 1 << 30


@pytest.mark.parametrize("read", [read_json, read_checked, records_of_file, stored_tensors, read_tensors, read_config])
def test_devices_are_no_files(read):
    with pytest.raises(BadInput):
        read(Path("/dev/zero"), known_options()) if read is read_config else read(Path("/dev/zero"))


# ---- every reader, fuzzed ----
MANY = int(os.environ.get("CAP_NB_FUZZ", 0))
FUZZED = ROOT / "figures" / "bad_input" / "fuzzed.json"
IN_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk would take most of the time
AT_ONCE = 2_000  # Inputs of one search: hypothesis remembers all of them, and becomes slow
FUZZ = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([2 ** 70, "\ud800", "../x", "a" * 300]),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8)
DEEP = st.integers(1, 100_000).map(lambda n: b"[" * n)


def spoilt(good):
    """A good file with some bytes cut out, changed or put in."""
    def spoil(cuts):
        body = bytearray(good)
        for at, length, new in cuts:
            at = at % (len(body) + 1)
            body[at:at + length] = new
        return bytes(body)

    return st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 40), st.binary(max_size=12)), min_size=1, max_size=4).map(spoil)


def as_json(value):
    return json.dumps(value).encode()


def with_header(header):
    return len(header).to_bytes(8, "little") + header + bytes(64)


def json_like(*keys):
    """JSON whose objects have some of the right keys, wrong bytes, and deep nesting."""
    objects = st.dictionaries(st.sampled_from(keys), VALUES, max_size=len(keys))
    return (VALUES | objects | st.lists(objects, max_size=3)).map(as_json) | st.binary(max_size=60) | DEEP


TENSOR = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "F64", "U8", "X"]) | VALUES, "shape": st.lists(st.integers(-1, 2 ** 64), max_size=3) | VALUES,
                                "data_offsets": st.lists(st.integers(0, 2 ** 64), min_size=2, max_size=2) | VALUES})
HEADERS = st.dictionaries(st.sampled_from(["x", "masked", "intact", "__metadata__", "header"]), TENSOR | st.just({"cap_nb": "{}"}) | VALUES, max_size=4).map(as_json).map(with_header)


def written(write):
    """The bytes of a file that is as it should be."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        write(Path(folder) / "good")
        return (Path(folder) / "good").read_bytes()


GOOD = written(lambda path: write_tensors(path, {"masked": torch.rand(2, 2, 3, dtype=torch.float64), "intact": torch.rand(3, dtype=torch.float64)},
                                          {"stratum": [0] * 3, "task": ["a"] * 3, "uid": list("abc"), "k": 1, "seed": 0, "meta": {}}))
CHECKED = written(lambda path: write_checked(path, {"n": [1, 2.5, "three"]}))


def meta(content):
    """A file of tensors whose words are another JSON, with the right checksum of them."""
    return written(lambda path: write_tensors(path, {"masked": torch.rand(2, 2, 3, dtype=torch.float64), "intact": torch.rand(3, dtype=torch.float64)}, content))


def table(rows):
    file = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


ROWS = table([{"record": "file", "place": f"p{i}", "content": b"x" * i} for i in range(20)])
PLAIN = VALUES.filter(lambda value: "\ud800" not in json.dumps(value, ensure_ascii=False))


def right_sum(*keys):
    """JSON beside its right checksum: whatever it says, it is as it was saved."""
    return (PLAIN | st.dictionaries(st.sampled_from(keys), PLAIN)).map(lambda content: checked_text(content).encode())


def right_sums(*keys):
    """Tensors with the right checksums, and words that fit them or not."""
    return st.dictionaries(st.sampled_from(keys), PLAIN).map(meta) | PLAIN.map(meta) | spoilt(GOOD)


@functools.cache
def model_files():
    """A tiny Llama as transformers saves it, what belongs to it, and the same in GGUF."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        folder = Path(name) / "m"
        tokenizer = byte_tokenizer()
        tiny_llama(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        export_gguf(saved(Path(name) / "other"), folder / "m.gguf")
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def good(name):
    """What spoils one of these files, which are made when they are asked for."""
    return st.deferred(lambda: spoilt(model_files()[name]))


@functools.cache
def beside(reader):
    """What a reader finds in its folder besides the file that is spoilt, by name."""
    about = {"config.json": b"{}"}
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        folder = Path(name)
        if reader == "evaluation":
            save_evaluation(Evaluation(method="cap", sparsity=0.5, reached=0.5), folder)
        if reader == "state of a training":
            save_state(folder, *training())
        if reader == "index of shards":
            for tensor, shard in WEIGHT_MAP.items():
                save_file({tensor: torch.zeros(2)}, folder / shard)
        about |= {path.name: path.read_bytes() for path in folder.iterdir()}
    return about | ({name: body for name, body in model_files().items() if "token" in name} if "tokenizer" in reader else {})


def lay_out(folder, reader):
    """Write what a reader finds besides the file that is spoilt."""
    for name, body in beside(reader).items():
        (folder / name).write_bytes(body)


WEIGHT_MAP = {"a": "x.safetensors", "b": "y.safetensors"}  # What the shards beside an index hold


def training():
    """Parameters, their two optimisers, and the log of their training."""
    model = torch.nn.Linear(2, 2)
    both = [torch.optim.Adam([parameter]) for parameter in model.parameters()]
    model(torch.ones(2)).sum().backward()
    for optimizer in both:
        optimizer.step()
    return dict(model.named_parameters()), both, {"step": 1, "recipe": {}, "loss": [0.5]}


def manifest_of(path):
    """A list of files whose own checksum is right."""
    (path.parent / CHECKSUM).write_text(f"{sha256_of_file(path)}  {path.name}\n")
    return read_manifest(path.parent)


NOTE = dict.fromkeys(ALWAYS, "x") | {"zeros": 3, "weights": 6, "asked": 0.5, "base": {"name": "x", "fingerprint": "0"}}
SLOW = ("GGUF", "tokenizer", "configuration of a tokenizer")  # Read by transformers, in milliseconds
REPORT = {"method": "cap", "asked": 0.5, "reached": 0.5, "weights": 8, "zeros": 4, "threshold": 0.1, "ties": 0, "table": [], "mask": "0"}
READERS = {
    "read_json": (read_json, "x.json", json_like("a")),
    "read_checked": (read_checked, "x.json", json_like("content", "sha256") | spoilt(CHECKED)),
    "read_tensors": (read_tensors, "x.safetensors", st.binary(max_size=80) | HEADERS | spoilt(GOOD)),
    "stored_tensors": (stored_tensors, "x.safetensors", st.binary(max_size=80) | HEADERS | spoilt(GOOD)),
    "load_losses": (load_losses, "x.safetensors", right_sums("stratum", "task", "uid", "k", "seed", "meta")),
    "scores": (lambda path: read_scores(path, "mean"), "x.safetensors", right_sums("stratum", "task", "uid", "k", "seed", "meta")),
    "scores measured in part": (lambda path: read_scores(path, "mean"), "x.safetensors", right_sums("stratum", "task", "uid", "k", "seed", "meta")),
    "norms": (load_norms, "x.safetensors", right_sums("norms")),
    "budgets": (load_budgets, "x.safetensors", right_sums("regions", "levels", "uid", "meta", "sparsity", "power", "moves")),
    "training": (lambda path: read_state(path, {"steps": 3}), "x.safetensors", right_sums("steps", "losses")),
    "report": (read_report, "x.json", right_sum(*REPORT) | st.tuples(st.sampled_from(list(REPORT)), PLAIN).map(lambda one: checked_text(REPORT | dict([one])).encode())),
    "run": (lambda path: read_run(path.parent), "run.json", right_sum("format", "methods", "sparsities", "model")),
    "sweep": (lambda path: read_index(path.parent), SWEEP_INDEX, right_sum("format", "configs", "runs")),
    "evaluation": (lambda path: load_evaluation(path.parent), "evaluation.json", right_sum("method", "sparsity", "reached", "perplexity", "sha256")),
    "text": (read_text, "x.txt", st.binary(max_size=200) | st.text(max_size=90).map(lambda text: text.encode("utf-16"))),
    "index of shards": (lambda path: checkpoint_tensors(path.parent), SHARD_INDEX, json_like("weight_map", "metadata") |
                        st.dictionaries(st.text(max_size=5), PLAIN | st.just("x.safetensors")).map(lambda found: as_json({"weight_map": found}))),
    "json records": (records_of_file, "x.json", json_like("question", "answer", "facts")),
    "jsonl records": (records_of_file, "x.jsonl", json_like("question", "answer", "choices", "answerKey")),
    "parquet records": (records_of_table, "x.parquet", st.binary(max_size=80) | spoilt(ROWS)),
    "packed records": (packed_records, "x.parquet", spoilt(ROWS) | st.lists(st.fixed_dictionaries({"record": st.sampled_from(["file", "loss", "evaluation"]), "place": st.text(max_size=5), "content": st.binary(max_size=9)}), max_size=3).map(table)),
    "chains": (read_chains, "x.jsonl", json_like("about", "sha256", "task", "uid")),
    "packed shard": (open_shard, "x.packed.safetensors", HEADERS | spoilt(GOOD)),
    "manifest": (manifest_of, "packed.json", json_like("format", "version", "kind", "base", "files")),
    "configuration": (lambda path: config_of(path.parent), "config.json", json_like("model_type", "hidden_size", "num_attention_heads", "vocab_size", "rope_parameters") |
                      st.dictionaries(st.sampled_from(["hidden_size", "num_attention_heads", "rope_parameters", "dtype", "torch_dtype", "num_hidden_layers"]), VALUES).map(lambda one: as_json({"model_type": "llama"} | one))),
    "note on a pruning": (lambda path: read_record(path.parent), "config.json", json_like("cap_nb", "model_type") |
                          st.dictionaries(st.sampled_from(list(NOTE)), PLAIN).map(lambda some: as_json({"cap_nb": sealed(NOTE | some)}))),
    "checksums": (read_checksums, "SHA256SUMS.json", json_like("a", "../a", "")),
    "unit": (lambda path: read_unit(UnitStore(path.parent), Unit(0, 0), ["a", "b", "c"], 2), "batch-0000-layer-000.safetensors", right_sums("uids")),
    "state of a training": (lambda path: load_state(path.parent, *training()[:2], {}), "training.safetensors", right_sums("step", "recipe")),
    "tokenizer": (lambda path: load_tokenizer(str(path.parent)), "tokenizer.json", json_like("version", "model", "added_tokens", "pre_tokenizer") | good("tokenizer.json")),
    "configuration of a tokenizer": (lambda path: load_tokenizer(str(path.parent)), "tokenizer_config.json",
                                     json_like("tokenizer_class", "auto_map", "extra_special_tokens", "chat_template") | good("tokenizer_config.json")),
    "GGUF": (lambda path: load_gguf(path, None, torch.device("cpu")), "x.gguf", st.binary(max_size=80).map(lambda rest: b"GGUF" + rest) | good("m.gguf")),
    "options": (lambda path: read_config(path, known_options()), "x.yaml", st.text(max_size=60).map(lambda s: s.encode("utf-8", "replace")) | json_like("n", "model", "methods", "sparsity") | st.binary(max_size=40)),
}


SECONDS = 10  # that a reader may take for an input


class TooSlow(BaseException):
    """An input takes a reader too long; nobody catches this by accident."""


@contextmanager
def soon_over(seconds=SECONDS):
    """Raise where the program is after so many seconds; where it does not come back from a library, end it with a traceback."""
    def too_slow(*_):
        raise TooSlow(f"an input took {seconds} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    try:
        yield lambda: signal.setitimer(signal.ITIMER_REAL, seconds)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def fed(read, path, content):
    """Let a reader have an input: whether it was read, or refused in one sentence. Whatever else it does is raised."""
    path.write_bytes(content)
    try:
        read(path)
        return "read"
    except BadInput as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2_000, str(error)[:300]
        return "refused"


def searched(read, path, contents, wanted):
    """Let a reader have so many inputs: how many it read, and how many it refused."""
    found = Counter()

    def one(content):
        wind_up()
        found[fed(read, path, content)] += 1

    number = 0
    with soon_over() as wind_up:
        while found.total() < wanted:
            faulthandler.dump_traceback_later(600 + SECONDS * 2, exit=True)
            search = given(contents)(settings(FUZZ, max_examples=min(AT_ONCE, wanted - found.total()))(one))
            hypothesis.seed(number)(search)()
            number += 1
    return found


def fuzz_noted(reader, **noted):
    """Keep what a soak did with a reader."""
    kept = read_checked(FUZZED) if FUZZED.exists() else {}
    about = {"date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "commit": commit_of_package(), "python": platform.python_version(),
             "hypothesis": hypothesis.__version__, "torch": torch.__version__}
    before = kept.get(reader, {})
    kept[reader] = (before if before.get("commit") == about["commit"] else {}) | about | noted  # counts of other code say nothing of this
    write_checked(FUZZED, {name: kept[name] for name in READERS if name in kept})


@pytest.mark.parametrize("reader", READERS)
def test_whatever_is_read_gives_a_value_or_one_sentence(reader):
    read, name, contents = READERS[reader]
    before = peak(anew=True)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        lay_out(Path(folder), reader)
        found = searched(read, Path(folder) / name, contents, MANY or (5 if reader in SLOW else 25))
    assert peak() - before < 1 << 30
    if MANY:
        fuzz_noted(reader, inputs=found.total(), read=found["read"], refused=found["refused"])


@pytest.mark.skipif(not MANY or not importlib.util.find_spec("atheris"), reason="make soak, where atheris can be installed")
@pytest.mark.parametrize("reader", READERS)
def test_whatever_reaches_new_lines_gives_a_value_or_one_sentence(reader):
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        done = subprocess.run([sys.executable, ROOT / "tests" / "coverage_fuzz.py", reader, f"{MANY}", folder], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    fuzz_noted(reader, **{"coverage-guided inputs": MANY})
