"""Nothing let in: no pickle, no code of a checkpoint, no name that leads out of a folder, no link that is followed, nothing absurd that takes the memory."""
import ast
import base64
import functools
import json
import os
import pickle
import shutil
import stat
import zlib
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from cap_nb.analysis import method_table
from cap_nb.command_line import known_options, short_name
from cap_nb.core import files
from cap_nb.core.devices import RESET, resident
from cap_nb.core.errors import BadInput
from cap_nb.core.files import (
    SHARD_INDEX, read_checked, read_json, read_tensors, stored_tensors,
    whole_file, whole_folder)
from cap_nb.data.problems import records_of_file, records_of_table
from cap_nb.experiments.claims import save_ledger
from cap_nb.jobs import records as run_records
from cap_nb.jobs.chains import read_chains
from cap_nb.jobs.records import unpack_run
from cap_nb.jobs.sweeps import read_config
from cap_nb.jobs.report import write_results
from cap_nb.jobs.tables import table_latex, table_markdown
from cap_nb.methods.streaming import prune_checkpoint
from cap_nb.models.loading import load_model
from cap_nb.portable.format import export_folder
from cap_nb.portable.quantised import export_gguf
from cap_nb.portable.sharing import files_to_share
from cap_nb.methods.resumed_scoring import load_losses
from conftest import ROOT
from fixtures import refuses, with_settings
from hub import save_llama
from programs import FEW, assert_one_sentence, called
from test_quantised import saved

SOURCES = sorted([*(ROOT / "cap_nb").rglob("*.py"), *(ROOT / "tools").rglob("*.py")])


@functools.cache
def trees():
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


# ---- no pickle, no shell ----
def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_module_pickles():
    for path, tree in trees().items():
        imported = {alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
        assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "cPickle"}, path
        said = {ast.unparse(call.func) for call in calls(tree)}
        assert not said & {"torch.load", "torch.save", "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "eval"}, path
        assert not [one for one in said if one.endswith((".to_pickle", ".read_pickle"))], path


def test_no_shell_is_built():
    for path, tree in trees().items():
        for call in calls(tree):
            name = ast.unparse(call.func)
            assert name not in ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"), path
            assert not [word for word in call.keywords if word.arg == "shell"], path
            if name.startswith("subprocess.") and call.args:
                assert not isinstance(call.args[0], (ast.Constant, ast.JoinedStr)), f"{path}: {ast.unparse(call)}"


def test_code_runs_only_from_plugins():
    """`exec` stands in one place of the package, and `trust_remote_code` is False wherever it stands."""
    found = [path for path, tree in trees().items() for call in calls(tree) if ast.unparse(call.func) == "exec"]
    assert [path.name for path in found if path.is_relative_to(ROOT / "cap_nb")] == ["plugins.py"]
    trusted = [word.value for tree in trees().values() for call in calls(tree) for word in call.keywords if word.arg == "trust_remote_code"]
    assert trusted and all(isinstance(value, ast.Constant) and value.value is False for value in trusted)


def test_a_run_touches_no_pickle(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a pickle")

    for module, names in ((pickle, ("load", "loads", "dump", "dumps", "Unpickler", "Pickler")), (torch, ("load", "save"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    old = os.umask(0o027)
    try:
        result = called("run", *FEW, *"--methods cap --sparsity 0.5 --tasks lab-arc --out".split(), tmp_path / "run")
        packed = called("pack", tmp_path / "run")
        pruned = called(*"prune --method magnitude --sparsity 0.5 --device cpu --out".split(), tmp_path / "pruned")
    finally:
        os.umask(old)
    assert result.exit_code == packed.exit_code == pruned.exit_code == 0, (result.output, result.exception, packed.output, pruned.output)
    modes = {path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) > 8 and set(modes.values()) == {0o640}, {name: oct(mode) for name, mode in modes.items() if mode != 0o640}


# ---- no code of a checkpoint ----
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama in several shards."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_llama(folder, "20kB")
    return folder


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy that a test may spoil, with what changes its JSON files."""
    folder = shutil.copytree(checkpoint, tmp_path / "copy")

    def change(name, **settings):
        with_settings(folder / name, **settings)
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


@pytest.mark.parametrize("settings", [{"attn_implementation": "owner/kernel"}, {"_attn_implementation": {"text_config": "flash_attention_2"}}, {"text_config": {"experts_implementation": "owner/kernel"}}])
def test_code_of_the_hub_is_not_fetched(copy, settings):
    refused(copy("config.json", **settings), "config.json asks for ", "expected sdpa or eager")


def test_a_setting_that_names_no_code_is_taken(copy):
    """As Gemma 2 has it: the kind of a cache."""
    load_model(str(copy("config.json", cache_implementation="hybrid", attn_implementation="eager")), device="cpu")


# ---- checkpoints that lie ----
def test_shapes_and_dtypes_are_not_believed(copy):
    folder = copy("config.json", vocab_size=1 << 28)
    refused(folder, "copy")
    path = folder / "one.safetensors"
    save_file({"x": torch.zeros(4)}, path)
    for old, new in ((b'"shape":[4]', b'"shape":[9]'), (b'"F32"', b'"F64"'), (b"[0,16]", b"[0,99]")):
        path.with_name("lie.safetensors").write_bytes(path.read_bytes().replace(old, new))
        refuses("is damaged or no safetensors file", stored_tensors, path.with_name("lie.safetensors"))


@pytest.mark.parametrize("new, said", [({}, "its config.json describes"), ({"x": torch.zeros(24, 20)}, "holds x, and 0 more, that its config.json knows no place for"),
                                       ({"model.layers.0.self_attn.bias": torch.zeros(24, 20)}, "holds model.layers.0.self_attn.bias"), ({"model.layers.0.attn.masked_bias": torch.zeros(24, 20)}, "holds no model.layers.1.mlp.up_proj.weight")])
def test_a_tensor_that_is_missing_or_has_another_name_is_not_made_up(copy, new, said):
    folder, name = copy("config.json"), "model.layers.1.mlp.up_proj.weight"
    places = json.loads((folder / SHARD_INDEX).read_text())["weight_map"]
    file = places.pop(name)
    save_file({key: tensor for key, tensor in load_file(folder / file).items() if key != name} | new, folder / file, metadata={"format": "pt"})
    copy(SHARD_INDEX, weight_map=places | dict.fromkeys(new, file))
    refused(folder, said)


def test_a_tensor_of_another_name_in_gguf_is_not_made_up(tmp_path):
    export_gguf(saved(tmp_path / "other"), tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes((tmp_path / "m.gguf").read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_uq"))
    refuses("holds no model.layers.1.mlp.up_proj.weight", load_model, str(tmp_path / "m.gguf"), device="cpu")


# ---- names ----
def test_a_packed_run_cannot_write_outside(tmp_path):
    (tmp_path / "run").mkdir()
    table = pyarrow.Table.from_pylist([{"record": "file", "place": "../../escaped", "content": b"x"}], pyarrow.schema(run_records.COLUMNS))
    texts = {"run.json": files.checked_text({"format": run_records.FORMAT}), "manifest.json": files.checked_text({})}
    with parquet.ParquetWriter(path := tmp_path / "run" / run_records.PACKED, table.schema, store_schema=False) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(texts | {"checksum": run_records.SEAL + b"0" * 64})
    path.write_bytes(run_records.sealed_bytes(path.read_bytes()))
    refuses("escaped", unpack_run, tmp_path / "run", tmp_path / "a" / "new")
    assert not (tmp_path / "escaped").exists() and not (tmp_path / "a" / "new").exists()


def test_a_list_in_a_packed_run_is_not_unpacked_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_records, "MOST_TEXT", 1 << 20)
    table = pyarrow.Table.from_pylist([], pyarrow.schema(run_records.COLUMNS))
    texts = {"run.json": files.checked_text({"format": run_records.FORMAT}), "manifest.json": base64.b64encode(zlib.compress(bytes(1 << 21)))}
    with parquet.ParquetWriter(path := tmp_path / run_records.PACKED, table.schema, store_schema=False) as writer:
        writer.add_key_value_metadata(texts | {"checksum": run_records.SEAL + b"0" * 64})
    path.write_bytes(run_records.sealed_bytes(path.read_bytes()))
    refuses("lists more files than a run has", run_records.read_run, tmp_path)


@pytest.mark.parametrize("model, called", [("..", None), (".", None), ("/", "model"), ("owner/name@abc", "name@abc"), ("lab", "lab")])
def test_a_runs_folder_lies_below_runs(model, called):
    assert short_name(model) not in ("", ".", "..") and "/" not in short_name(model) and called in (None, short_name(model))


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
    result = called("run", *FEW, "--tasks", "lab-arc", "--out", tmp_path / "run")
    assert_one_sentence(result, "evaluations is a link")
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(BadInput, match="evaluations is a link"), files.alone_in(tmp_path / "run"):
        pass


def test_a_file_of_another_name_does_not_come_along(checkpoint, copy, tmp_path):
    """Where a folder's LICENSE is a link to a key, no copy of the key is made, and none is shared; links into the hub's cache are followed."""
    (tmp_path / "key").write_text("secret")
    folder = copy("config.json")
    (folder / "LICENSE.txt").symlink_to(tmp_path / "key")
    (folder / "README.md").write_text("a card")
    for work in (lambda: prune_checkpoint(folder, tmp_path / "new", 0.3, method="magnitude"), lambda: export_folder(folder, tmp_path / "small"), lambda: files_to_share(folder)):
        refuses("LICENSE.txt is a link to .*key: expected a file of its own", work)
    refused(folder, "LICENSE.txt is a link")
    (tmp_path / "cache/snapshots").mkdir(parents=True)
    (tmp_path / "cache/blobs").mkdir()
    (tmp_path / "cache/blobs/123abc").write_text("a licence")
    (folder / "LICENSE.txt").unlink()
    (folder / "LICENSE.txt").symlink_to(tmp_path / "cache/blobs/123abc")
    load_model(str(folder), device="cpu")
    assert not any((tmp_path / name).exists() for name in ("new", "small"))


def test_a_page_is_not_written_through_a_link(tmp_path):
    run = shutil.copytree(ROOT / "figures/lab", tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/sparsity_curves_2.png").touch()
    shutil.rmtree(run / "figures", ignore_errors=True)
    (run / "figures").symlink_to(tmp_path / "mine")
    refuses("figures is a link", write_results, run)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["sparsity_curves_2.png"]
    (tmp_path / "claims").symlink_to(tmp_path / "mine")
    refuses("claims is a link", save_ledger, None, [], tmp_path)


def test_a_name_in_a_record_begins_no_line_of_a_table():
    run = run_records.load_run(ROOT / "figures/lab")
    provenance = run.provenance | {"model": {"name": "x\n\\input{secret}"}}
    for text in (table_latex(method_table(run.evaluations), provenance), table_markdown(method_table(run.evaluations), provenance)):
        assert "\\input{secret}" in text and not [line for line in text.splitlines() if line.startswith("\\input")]


def test_no_escape_sequence_of_a_record_reaches_the_terminal(monkeypatch):
    monkeypatch.setattr("cap_nb.jobs.tables.table_markdown", lambda *_: "a\x1b[2Jb\nc")
    assert called("table", ROOT / "figures/lab").stdout == "a [2Jb\nc\n"


# ---- absurd sizes ----
def sparse(path, size, start=b""):
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
    return path


def test_absurd_sizes_are_refused_before_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_UNPACKED", 1 << 27)  # the real limit takes seconds to exceed
    RESET.write_text("5")  # an earlier peak hides no later one
    before = resident("VmHWM")
    terabyte = 1 << 40
    for suffix, read in ((".json", read_json), (".json", read_checked), (".jsonl", records_of_file), (".json", records_of_file), (".jsonl", read_chains)):
        refuses("expected a text of at most", read, sparse(tmp_path / f"huge{suffix}", terabyte))
    header = (terabyte // 2).to_bytes(8, "little")
    for read in (stored_tensors, read_tensors, load_losses):
        refuses("header would have", read, sparse(tmp_path / "huge.safetensors", terabyte, header))
    whole = json.dumps({"x": {"dtype": "U8", "shape": [terabyte], "data_offsets": [0, terabyte]}}).encode()
    refuses("the memory of this machine", read_tensors, sparse(tmp_path / "sparse.safetensors", 8 + len(whole) + terabyte, len(whole).to_bytes(8, "little") + whole))
    parquet.write_table(pyarrow.table({"x": pyarrow.nulls(6_000_000)}), tmp_path / "rows.parquet")
    piece = pyarrow.table({"x": pyarrow.array(["y" * 1_000_000] * 60)})
    with parquet.ParquetWriter(tmp_path / "wide.parquet", piece.schema, compression="zstd") as writer:
        for _ in range(3):
            writer.write_table(piece)
    assert (tmp_path / "wide.parquet").stat().st_size < 1 << 20
    for name in ("rows", "wide"):
        refuses("is too large: expected at most", records_of_table, tmp_path / f"{name}.parquet")
    assert resident("VmHWM") - before < 1 << 30


@pytest.mark.parametrize("read", [read_json, read_checked, records_of_file, stored_tensors, read_tensors, read_config])
def test_devices_are_no_files(read):
    refuses("is no ordinary file", read, Path("/dev/zero"), *([known_options()] if read is read_config else []))
