"""Readers fed with good files that are spoilt by chance: many times as fast as hypothesis, which looks for small examples and remembers every input.

    python tests/mutated_fuzz.py INPUTS [READER ...]    all readers if none is named; the counts go into figures/bad_input/fuzzed.json

It begins with inputs that hypothesis drew and with good files. Half of what it makes are bytes with a few changes; the other half, where a file has a
structure, are well-formed files that say something else, their checksums right. The same seed makes the same inputs.
"""
import faulthandler
import io
import json
import math
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import pyarrow
import torch
from hypothesis import given, settings
from pyarrow import parquet
from safetensors.torch import save
from test_nothing_let_in import FUZZ, GOOD, IN_MEMORY, NOTE, READERS, REPORT, ROOT, SECONDS, WEIGHT_MAP, beside, fed, fuzz_noted, lay_out, model_files, peak, soon_over, with_header

from cap_nb.core.files import checked_text, json_text, read_checked, sealed, sha256_of_tensor, sha256_of_text
from cap_nb.portable.format import FORMAT, VERSION, Entry, header_of

ODD = [None, True, False, 0, -1, 1, 2 ** 31, 2 ** 63, 2 ** 70, -(2 ** 70), 0.5, 1e308, "", "a", "..", "../x", "/x", "a" * 300, "\n", "\x00", [], {}, [[]], {"": None}, ["a", 1], "NaN", "Infinity"]
PIECES = [b"[" * 5000, b"{\"a\":" * 500, b"1e999", b"NaN", b"\"\\ud800\"", b"\xff", b"\x00" * 8, b"null", b"-1", b"18446744073709551616", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"..", b"/"]


# ---- bytes ----
def spoilt(rng, body, corpus):
    """A few changes of some bytes."""
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at, length = rng.randrange(len(body) + 1), rng.choice((0, 1, 1, 4, 30))
        kind = rng.randrange(7)
        if kind == 0 and body:
            at = rng.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1 << rng.randrange(8)]) + body[at + 1:]
        elif kind == 1:
            body = body[:at] + body[at + length:]
        elif kind == 2:
            body = body[:at] + rng.randbytes(length) + body[at + length:]
        elif kind == 3:
            body = body[:at] + rng.choice(PIECES) + body[at + length:]
        elif kind == 4:
            body = body[:at] + body[at:at + length] * 2 + body[at + length:]
        elif kind == 5:
            other = rng.choice(corpus)
            start = rng.randrange(len(other) + 1)
            body = body[:at] + other[start:start + rng.choice((1, 8, 60))] + body[at + length:]
        else:
            body = body[:at]
    return body


# ---- what a file says ----
def places_in(value, found=None):
    """Every list and object in a value, itself included."""
    found = [] if found is None else found
    if isinstance(value, (list, dict)):
        found.append(value)
        for inner in value.values() if isinstance(value, dict) else value:
            places_in(inner, found)
    return found


def said_otherwise(rng, value):
    """A value with one to three of its parts exchanged, left out, renamed or doubled."""
    value = [json.loads(json.dumps(value))]
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.choice(places_in(value))
        if not place or rng.random() < 0.1:
            new = json.loads(json.dumps(rng.choice(ODD)))
            place.append(new) if isinstance(place, list) else place.update({rng.choice(("a", "", "sha256", "__class__")): new})
            continue
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        kind = rng.randrange(5)
        if place is not value and kind == 0:
            del place[key]
        elif place is not value and kind == 1 and isinstance(place, dict):
            place[rng.choice((key + "x", key.upper(), "a"))] = place.pop(key)
        elif kind == 2 and isinstance(place[key], (int, float)) and not isinstance(place[key], bool):
            place[key] = rng.choice((-1, 0, place[key] + 1, place[key] * 2, -place[key], 10 ** rng.randrange(30)))
        else:
            place[key] = json.loads(json.dumps(rng.choice(ODD)))
    return value[0] if value else None


ONE = {name: torch.rand(1, dtype=torch.float64) for name in ("costs", "solved", "shares")}
TENSORS = {"masked": torch.rand(2, 2, 3, dtype=torch.float64), "intact": torch.rand(3, dtype=torch.float64), "kl": torch.rand(2, 3, dtype=torch.float64),
           "budgets": torch.rand(2), "weights": torch.ones(2), "whole": torch.tensor(True), "empty": torch.zeros(0, 3), "half": torch.zeros(2, 2, dtype=torch.float16),
           "lost": torch.full((3,), float("nan"), dtype=torch.float64)}
SUMS = {name: sha256_of_tensor(tensor) for name, tensor in TENSORS.items()}


def tensors_about(**good):
    """What writes tensors with words about them and the right checksums: in half of the files those that a reader wants, else some under some names."""
    right = {name: sha256_of_tensor(tensor) for name, tensor in good.items()}

    def write(rng, words):
        chosen = {name: (tensor, right[name]) for name, tensor in good.items()}
        if rng.random() < 0.5:
            chosen = {} if rng.random() < 0.5 else chosen
            chosen |= {rng.choice((*good, *TENSORS)): (TENSORS[name], SUMS[name]) for name in rng.choices(list(TENSORS), k=rng.randrange(4))}
        sums = {"meta": sha256_of_text(json_text(words)), "tensors": {name: checksum for name, (_, checksum) in chosen.items()}}
        return save({name: tensor.clone() for name, (tensor, _) in chosen.items()}, {"cap_nb": json.dumps({"meta": words, "sha256": sums}, sort_keys=True)})

    return write


def as_chains(rng, lines):
    """Answers, a line each, behind a line that names their checksum."""
    try:
        header = {"about": lines[0]["about"], "sha256": sha256_of_text(json.dumps([lines[0]["about"], *lines[1:]], sort_keys=True))}
        return a_line_each(rng, [lines[0] | header, *lines[1:]])
    except (KeyError, TypeError, IndexError):
        return a_line_each(rng, lines)


def as_packed(rng, said):
    """A packed file whose tensors lie as they must, whatever their names and sizes; some have the length of their shape."""
    try:
        inner = json.dumps(said["inner"]).encode()
        inner = len(inner).to_bytes(8, "little") + inner
        wide = {"U8": 1, "F16": 2, "F32": 4, "F64": 8}
        counts = {name: math.prod(size for size in shape if type(size) is int) for name, (_, shape) in said["tensors"].items()}
        entries = {name: Entry(kind=kind, shape=tuple(shape), size=counts[name] * wide.get(kind, 4), width=wide.get(kind, 4)) for name, (kind, shape) in said["tensors"].items()}
        entries |= {"header": Entry(kind="U8", shape=(len(inner),), size=len(inner), width=1)} if rng.random() < 0.9 else {}
        head = header_of(entries, said["about"])
        body = bytearray(min(1 << 16, sum(entry.size for entry in entries.values())))
        if "header" in entries:
            start, end = json.loads(head[8:])["header"]["data_offsets"]
            body[start:end] = inner
        return head + bytes(body)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        return with_header(json.dumps(said).encode())


def plain(rng, value):
    return json.dumps(value).encode()


def checked(rng, value):
    return checked_text(value).encode()


def a_line_each(rng, values):
    return b"\n".join(plain(rng, value) for value in (values if isinstance(values, list) else [values]))


def as_table(rng, rows):
    file = io.BytesIO()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    except (pyarrow.ArrowException, AttributeError, LookupError, TypeError, ValueError, OverflowError):
        return plain(rng, rows)  # no table can hold this
    return file.getvalue()


def losses(**more):
    return {"stratum": [0, 0, 1], "task": ["a"] * 3, "uid": ["a", "b", "c"], "k": 1, "seed": 0, "meta": {}} | more


LLAMA = {"model_type": "llama", "hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 50,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "dtype": "float32", "tie_word_embeddings": False, "max_position_embeddings": 64, "cap_nb": sealed(NOTE)}
ARC = {"question": {"stem": "Which?", "choices": [{"label": label, "text": label} for label in "AB"]}, "answerKey": "A"}
CHAIN = {"task": "lab-arc", "uid": "a", "prompt": "p", "text": "t", "answer": "A", "gold": "A", "attempt": 0, "entropy": 0.5, "tokens": 3, "cut_off": False}
REGION = {"layer": 0, "kind": "mlp", "modules": ["m"], "weights": 4}
MOVE = {"sparser": 0, "denser": 1, "weights": 4.0, "first": [0.2, 0.1], "again": None, "accepted": True}
PACKED = {"about": {"format": FORMAT, "version": str(VERSION), "kind": "bitmask", "base": "", "sha256": "0" * 64},
          "inner": {"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}, "b": {"dtype": "F32", "shape": [2], "data_offsets": [32, 40]}},
          "tensors": {"mask/a": ["U8", [1]], "kept/a": ["F32", [3]], "plain/b": ["F32", [2]]}}
DELTA = PACKED | {"about": PACKED["about"] | {"kind": "delta"}, "tensors": {"mask/a": ["U8", [1]]}}
LOSSES = {name: TENSORS[name] for name in ("masked", "intact")}
SCREENED = losses(meta={"screened": {"seed": 0}})
ABOUT_RUN = read_checked(ROOT / "figures" / "lab" / "run.json")
# Reader -> a good value that its file may hold, and what writes it
SAYING = {
    "read_json": ([{"a": [1, "b"]}], plain), "read_checked": ([{"n": [1, 2.5, "three"]}], checked), "read_tensors": ([losses()], tensors_about(**LOSSES)),
    "load_losses": ([losses()], tensors_about(**LOSSES)), "scores": ([losses(), losses(meta={"measured": 0.5})], tensors_about(**LOSSES)), "norms": ([{"norms": {"n": 3}}], tensors_about()),
    "scores measured in part": ([SCREENED], tensors_about(**LOSSES, slopes=LOSSES["masked"])),
    "budgets": ([{"regions": [REGION], "levels": [0.0, 0.5], "uid": ["a", "b", "c"], "meta": {}, "sparsity": 0.5, "power": 1.0, "moves": [MOVE, MOVE | {"again": [0.2, 0.1]}]}],
                tensors_about(kl=torch.rand(1, 2, 3, dtype=torch.float64), **ONE)),
    "training": ([{"steps": 3, "losses": [0.5]}], tensors_about()), "unit": ([{"uids": ["a", "b", "c"]}], tensors_about(masked=torch.rand(2, 3, dtype=torch.float64))), "report": ([REPORT | {"table": [[0, "query", "a", 2, 4]]}], checked),
    "run": ([ABOUT_RUN], checked), "sweep": ([{"format": 1, "config_sha256": "0", "configs": ["x.yaml"], "on_the_command_line": [], "varies": ["n"], "runs": [{"folder": "a", "settings": {"n": 3}, "finished": False}]}], checked),
    "evaluation": ([json.loads(beside("evaluation")["evaluation.json"])["content"]], checked), "index of shards": ([{"metadata": {}, "weight_map": WEIGHT_MAP}], plain),
    "json records": ([[{"question": "q", "answer": True, "facts": ["f"]}]], plain), "jsonl records": ([[{"question": "q", "answer": "a #### 1"}], [ARC]], a_line_each),
    "parquet records": ([[{"question": "q", "answer": "a", "choices": {"label": ["A"], "text": ["a"]}}]], as_table),
    "packed records": ([[{"record": "file", "place": "p", "content": "x"}]], as_table), "chains": ([[{"about": {"model": {}}, "sha256": "0"}, CHAIN]], as_chains),
    "packed shard": ([PACKED, DELTA], as_packed),
    "manifest": ([{"format": "cap_nb packed folder", "version": 1, "kind": "bitmask", "base": None, "files": [
        {"name": "a", "bytes": 1, "sha256": "0", "stored": "a", "stored_bytes": 1, "stored_sha256": "0"}]}], plain),
    "configuration": ([LLAMA, LLAMA | {"model_type": "gpt2"}, LLAMA | {"model_type": "mixtral", "num_local_experts": 2}], plain), "note on a pruning": ([{"cap_nb": sealed(NOTE)}], plain),
    "checksums": ([{"a": "0", "b": "1"}], plain), "state of a training": ([{"step": 1, "recipe": {}}], tensors_about()),
    "tokenizer": ([json.loads(model_files()["tokenizer.json"])], plain), "configuration of a tokenizer": ([json.loads(model_files()["tokenizer_config.json"])], plain),
    "options": ([{"n": 3, "model": "lab", "methods": ["cap", "wanda"], "sparsity": [0.1, 0.5]}], plain)}


def drawn_by_hypothesis(contents, count=200):
    """Some inputs that hypothesis draws."""
    found = []

    def keep(content):
        found.append(content)

    given(contents)(settings(FUZZ, max_examples=count, derandomize=True)(keep))()
    return found


def inputs(reader, seed, drawn=200):
    """Ever more inputs of a reader."""
    rng, (_, name, contents) = random.Random(f"{reader}{seed}"), READERS[reader]
    values, write = SAYING.get(reader, ([], None))
    whole = [body for body in (model_files().get({"GGUF": "m.gguf"}.get(reader, name)), beside(reader).get(name)) if body]
    corpus = [*drawn_by_hypothesis(contents, drawn), *whole, *(write(rng, value) for value in values), *([GOOD] if name.endswith(".safetensors") else [])]
    while True:
        body = write(rng, said_otherwise(rng, rng.choice(values))) if values and rng.random() < 0.5 else rng.choice(corpus)
        yield spoilt(rng, body, corpus) if not values or rng.random() < 0.5 else body


def mutated(reader, wanted, seed=0, drawn=200):
    """Feed a reader: how many inputs it read and refused, the seconds, and the bytes of memory that came on top."""
    read, name, _ = READERS[reader]
    found, making = Counter(), inputs(reader, seed, drawn)
    first = next(making)
    before, start = peak(anew=True), time.monotonic()
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder, soon_over() as wind_up:
        lay_out(Path(folder), reader)
        for number in range(wanted):
            content = first if not number else next(making)
            wind_up()
            if not number % 1000:
                faulthandler.dump_traceback_later(1000 * SECONDS, exit=True)
            try:
                found[fed(read, Path(folder) / name, content)] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                kept = Path(tempfile.gettempdir()) / f"cap-fuzz-{reader.replace(' ', '-')}"
                kept.write_bytes(content)
                raise AssertionError(f"{reader}: input {number} is kept as {kept}") from error
    return found, time.monotonic() - start, peak() - before


def main(wanted, readers):
    """Feed every reader that is named, one after the other, and keep the counts; the first that fails ends it."""
    warnings.simplefilter("ignore")
    for reader in readers or READERS:
        found, seconds, more = mutated(reader, wanted)
        assert more < 1 << 30, f"{reader} took {more:,} bytes"
        fuzz_noted(reader, **{"mutated inputs": found.total(), "mutated, read": found["read"]})
        print(f"{reader}: {found.total():,} inputs, {found['read']:,} read, {seconds:.0f} s, {more >> 20} MiB", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
