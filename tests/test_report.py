"""The page of a run: all of its table, nothing from elsewhere, the same bytes from the same records, and sense where pieces are missing."""
import json
import re
import shutil
from dataclasses import replace
from html import escape, unescape

import pytest

from cap_nb.analysis import method_table
from cap_nb.core.files import read_checked, sha256_of_file
from cap_nb.jobs.records import REPORT, load_run, pack_run, packed_texts, unpack_run
from cap_nb.jobs.report import command_of, figures_of, report_html, write_results
from cap_nb.jobs.tables import answer_markdown, answer_table, table_cells
from conftest import ROOT

LAB = ROOT / "figures" / "lab"


@pytest.fixture(scope="module")
def run():
    return load_run(LAB)


def text_of(html):
    """What a reader sees, without tags."""
    return unescape(re.sub(r"<[^>]+>", "", html))


def test_the_page_holds_every_cell_and_nothing_from_elsewhere(run):
    pictures = {"figures/head_importance": (LAB / "figures/head_importance.png").read_bytes()}
    html = report_html(run, pictures)
    assert html == report_html(run, pictures), "equal records give equal bytes"
    header, rows = table_cells(method_table(run.evaluations))
    answers = [line[2:-2].split(" | ") for line in answer_markdown(answer_table(run.evaluations)).splitlines()]
    for cell in [*header, *sum(rows, []), *answers[0], *sum(answers[2:], [])]:
        assert cell in text_of(html)
    assert "http" not in html and re.findall(r'src="([^"]{10})', html) == ["data:image"] and "<script" not in html and "<link" not in html
    assert "Of 42 comparisons 11 are significant" in html and "Lab StrategyQA +29.5 [+23.0, +36.0] points" in text_of(html)
    assert escape(command_of(run.configuration)) in html
    for opened in re.findall(r"<(table|tr|td|th|section|div|ul|li|p|small|details|figure|pre)\b", html):
        assert html.count(f"</{opened}>") == len(re.findall(rf"<{opened}\b", html)), f"<{opened}> is not closed"


def test_pieces_that_a_run_lacks(run):
    """Wanda alone, by losses alone: no comparison, no head, no answer, no cost, and a name that is no HTML."""
    alone = tuple(replace(e, answers=()) for e in run.evaluations if e.method in ("dense", "wanda"))
    settings = run.configuration | {"methods": ["wanda"], "model": run.configuration["model"] | {"name": "<b>&"}}
    html = report_html(replace(run, losses=None, evaluations=alone, timings={}, configuration=settings), {})
    assert "nothing to compare" in html and "No head was masked" in html and "--model &#x27;&lt;b&gt;&amp;&#x27; " in html
    assert not any(f"<h2>{heading}" in html for heading in ("What the accuracy hides", "Costs", "Curves"))
    assert {"figures/head_importance", "figures/sparsity_curves", "figures/zeros_50"} <= figures_of(run).keys()


def test_settings_become_options(run):
    settings = run.configuration | {"methods": ["wanda"], "sparsities": [0.5], "budget": 0.25}
    evaluation = settings["evaluation"] | {"max_new_tokens": {}, "windows": 0, "on": "validation"}
    command = command_of(settings | {"evaluation": evaluation, "calibration": settings["calibration"] | {"seed": 3, "n": 8}})
    assert command == ("cap run --model lab --dtype float32 --tasks lab-gsm8k,lab-strategyqa,lab-arc --style lab --n 8 --calibration-seed 3 "
                       "--methods wanda --sparsity 0.5 --budget 0.25 --accuracy-tasks none --windows 0 --evaluate-on validation")


def listed_in(packed):
    """The manifest of a packed run."""
    return json.loads(packed_texts(packed)["manifest.json"])["content"]


def test_a_packed_run_keeps_its_page(tmp_path):
    """The page is made on request, listed in the manifest, and goes along when a run is unpacked and packed again."""
    packed, live = tmp_path / "packed", tmp_path / "live"
    shutil.copytree(LAB, packed)
    write_results(packed, page=True)
    page = (packed / REPORT).read_bytes()
    assert page.count(b"data:image/png;base64,") == len(figures_of(load_run(packed)))
    assert listed_in(packed)["made"][REPORT] == sha256_of_file(packed / REPORT)
    unpack_run(packed, live)
    assert read_checked(live / "manifest.json") == listed_in(packed)
    pack_run(live)
    assert (live / REPORT).read_bytes() == page and load_run(live).evaluations == load_run(LAB).evaluations
    assert listed_in(live) == listed_in(packed)
