"""The records of runs: any text comes back, damage is named, committed runs hold what tables and manifests say."""
import functools
import json
import os
import random
import re
import subprocess

import pytest

from cap_nb.core.files import read_json, sha256_of_file
from cap_nb.evaluation import AnswerRecord, Evaluation, LossRecord
from cap_nb.jobs import records
from cap_nb.jobs.job import prepare
from cap_nb.jobs.records import (
    PACKED, differences, load_evaluation, load_run, manifest, pack_run, packed_texts, read_run, save_evaluation,
    unpack_run)
from cap_nb.jobs.report import run_folders, table_texts
from cap_nb.jobs.settings import Job
from cap_nb.data.lab_world import DRAWN
from conftest import ROOT

FIGURES = ROOT / "figures"
RUNS = {folder.relative_to(FIGURES).as_posix(): folder for folder in run_folders(FIGURES)}
committed = pytest.mark.parametrize("run", RUNS.values(), ids=list(RUNS))


def test_records_of_any_text_come_back(tmp_path):
    rng = random.Random(1)
    letters = [chr(c) for c in (0, 9, 10, 13, 34, 39, 44, 92, 0x85, 0x2028, 0xe9, 0x1f600)] + list("ab ")
    answers = tuple(AnswerRecord(
        task="arc", uid=f"{i}", prompt_sha256="0" * 64, output="".join(rng.choices(letters, k=20 if i else 200_000)),
        strict=None if i % 3 else "A", lenient=None if i % 2 else "a\rb", gold="B", correct=False,
        lenient_correct=i % 2 == 0, tokens=i, cut_off=i % 5 == 0) for i in range(40))
    losses = tuple(LossRecord(task="gsm8k", uid=f"{i}", loss=rng.random() * 10 ** rng.randrange(-8, 8), tokens=i + 1)
                   for i in range(40))
    whole = Evaluation(method="cap", sparsity=0.1, reached=0.1 + 1e-17, answers=answers, losses=losses, perplexity=None)
    save_evaluation(whole, tmp_path / "e")
    assert load_evaluation(tmp_path / "e") == whole
    lines = (tmp_path / "e" / "answers.csv").read_bytes().decode().split("\n")
    assert len(lines) == 42 and lines[-1] == "", "one line a record"


NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?")


@committed
def test_a_committed_run_is_packed_and_whole_and_its_tables_follow_from_its_records(run, monkeypatch):
    """Every record, table and picture has the hash that the manifest gives it, and nothing else lies there.

    Scores are sums, whose last digit differs from one processor to another. Answers are spelt as the lab spells.
    """
    monkeypatch.setattr(records, "packed_records", functools.lru_cache(maxsize=1)(records.packed_records))  # read once
    listed = json.loads(packed_texts(run)["manifest.json"])["content"]
    assert manifest(run) == listed
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert files == {PACKED, *listed["made"]}
    assert {name.rpartition(".")[2] for name in listed["made"] if name.startswith("figures/")} <= {"png"}

    loaded = load_run(run)
    texts = table_texts(loaded) if (run / "tables").is_dir() or os.environ.get("CAP_NB_SOAK") else {}
    said = (answer for each in loaded.evaluations for answer in each.answers)
    assert [text for a in said for text in (a.output, a.strict, a.lenient, a.gold) if text and DRAWN in text] == []
    for path in run.glob("tables/*"):
        kept, made = path.read_text(), texts[f"tables/{path.name}"]
        assert NUMBER.sub("#", made) == NUMBER.sub("#", kept), path.name
        assert list(map(float, NUMBER.findall(made))) == pytest.approx(list(map(float, NUMBER.findall(kept))), rel=1e-9, abs=1e-12), path.name


@pytest.mark.parametrize("name", RUNS if os.environ.get("CAP_NB_SOAK") else ["lab_moe", "qwen_answers"])
def test_a_committed_run_is_the_same_unpacked_and_packed_again(name, tmp_path):
    run, live = RUNS[name], tmp_path / "live"
    unpack_run(run, live)
    assert load_run(live).evaluations == load_run(run).evaluations and manifest(live) == manifest(run)
    pack_run(live)
    assert manifest(live) == manifest(run)


def test_the_demo_committed_is_the_demo_of_today():
    """Model, tokenizer, calibration set, problems, text and prompts have the fingerprints that the run names."""
    kept, today = read_run(FIGURES / "lab"), prepare(Job()).configuration
    assert differences(kept, {"format": kept["format"]} | today) == ()


def test_figures_are_few_and_small():
    listed = subprocess.run(["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), "ls-files", "figures"],
                            capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listed) <= 150, f"{len(listed)} files"
    size = sum((ROOT / name).stat().st_size for name in listed)
    assert size <= 18e6, f"{size:,} bytes"  # 17.3 million before heads and neurons were measured on Qwen and the mixture
    assert not [name for name in listed if name.endswith(".svg")], "a page shows none, and save_figure makes one"


def test_the_ledger_is_of_these_runs():
    """The ledger's manifest names its own files and the runs behind it, all as they are."""
    listed = read_json(FIGURES / "claims" / "manifest.json")
    assert {name: sha256_of_file(FIGURES / "claims" / name) for name in listed["made"]} == listed["made"]
    assert {name: sha256_of_file(FIGURES / name) for name in listed["made from"]} == listed["made from"]
