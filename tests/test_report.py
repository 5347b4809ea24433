"""The page of a run: all of its table, nothing from elsewhere, the same bytes from the same records, and sense where pieces are missing."""
import json
import re
import shutil
from dataclasses import replace
from html import escape, unescape

import pytest
from matplotlib.figure import Figure

from cap_nb.analysis import method_table
from fixtures import refuses
from programs import assert_one_sentence, called, output_of
from cap_nb.core.files import locked, read_checked, sha256_of_file
from cap_nb.core.plots import figure_bytes
from cap_nb.jobs.records import REPORT, check_continues, job_of, load_run, pack_run, packed_texts, unpack_run
from cap_nb.jobs.job import prepare
from cap_nb.jobs import report
from cap_nb.jobs.report import command_of, figures_of, report_html, write_results
from cap_nb.jobs.settings import Job, changed
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


def test_the_page_names_every_method_but_the_dense_model(run):
    """A folder may have none: its first method is named as well."""
    for evaluations in (run.evaluations, tuple(e for e in run.evaluations if e.method != "dense")):
        assert "<p>What Wanda, Magnitude, CAP did to the model lab: " in report_html(replace(run, evaluations=evaluations), {})


def test_settings_become_options(run):
    settings = run.configuration | {"methods": ["wanda"], "sparsities": [0.5], "budget": 0.25}
    evaluation = settings["evaluation"] | {"max_new_tokens": {}, "windows": 0, "on": "validation"}
    command = command_of(settings | {"evaluation": evaluation, "calibration": settings["calibration"] | {"seed": 3, "n": 8}})
    unread = settings | {"evaluation": evaluation | {"evaluate_n": 7, "window_tokens": 64}, "calibration": settings["calibration"] | {"seed": 3, "n": 8}}
    assert command_of(unread) == command, "what nothing read is refused by cap run"
    assert command == ("cap run --model lab --dtype float32 --tasks lab-gsm8k,lab-strategyqa,lab-arc --style lab --n 8 --calibration-seed 3 "
                       "--methods wanda --sparsity 0.5 --budget 0.25 --accuracy-tasks none --windows 0 --evaluate-on validation")


def test_every_picture_of_a_run_is_drawn(run):
    """Elsewhere in the suite the pictures of runs are blank."""
    blank = len(figure_bytes(Figure((1, 1))))
    for name, draw in figures_of(run).items():
        assert len(figure_bytes(draw())) > 10 * blank, name


def test_the_command_has_the_seed_and_a_word_for_each_folder(run):
    """Both seeds, where they are not the usual ones; DATA where benchmark files were read, FILE for a plugin, and what they stand for."""
    job = changed(Job(), name="lab", n=3, seed=3, loss_n=3, windows=0, accuracy_tasks=(), methods=("magnitude",))
    for calibration, options in ((None, "--seed 3 "), (1, "--seed 3 --calibration-seed 1 "), (0, "--seed 3 --calibration-seed 0 ")):
        settings = prepare(changed(job, calibration_seed=calibration)).configuration
        assert f"--n 3 {options}--methods" in command_of(settings) and "DATA" not in command_of(settings)
    assert "seed" not in prepare(changed(job, seed=0)).configuration["evaluation"], "a run with the usual seed is written as ever"
    elsewhere = run.configuration | {"calibration": run.configuration["calibration"] | {"tasks": ["gsm8k"]}, "plugins": {"mine": "f" * 64}}
    html = text_of(report_html(replace(run, configuration=elsewhere), {}))
    assert "--data-dir DATA" in html and "--plugin FILE" in html and "RUN: this run's folder; DATA: the folder of benchmark files" in html
    assert "--model lab " in html and "MODEL" not in html
    spaced = run.configuration | {"model": run.configuration["model"] | {"name": "Qwen, dequantised from Q4"}}
    html = text_of(report_html(replace(run, configuration=spaced), {}))
    assert "cap run --model MODEL --dtype" in html and "MODEL: the folder of the model that is named above" in html and "the model Qwen, dequantised from Q4: " in html


def test_another_seed_is_refused_by_its_option(run, tmp_path):
    """A record names no seed where it is 0, with problems or with a text alone."""
    for kept in (run.configuration, changed_data(run.configuration, accuracy={}, loss={})):
        asked = kept | {"evaluation": kept["evaluation"] | {"seed": 3}}
        refuses("--seed is 3, the run in this folder has 0", check_continues, tmp_path, kept, asked)
        drawn_otherwise = kept | {"calibration": kept["calibration"] | {"seed": 1}}
        assert (job_of(drawn_otherwise).calibrate.seed, job_of(drawn_otherwise).calibrate.calibration_seed) == (0, 1)
        refuses("--seed is 3, the run in this folder has 0:", check_continues, tmp_path, drawn_otherwise, drawn_otherwise | {"evaluation": asked["evaluation"]})


def changed_data(configuration, **parts):
    """A run's settings with other problems."""
    measured = configuration["evaluation"]
    return configuration | {"evaluation": measured | {"data": measured["data"] | parts}}


def test_the_page_says_when_nothing_could_be_decided(run):
    few = report_html(replace(run, evaluations=tuple(replace(e, answers=e.answers[:9], losses=(), perplexity=None) for e in run.evaluations)), {})
    assert "None of 6 comparisons is significant. Each has fewer than 20 problems or windows, too few" in few
    same = tuple(replace(e, method=m, losses=(), perplexity=None) for m in ("cap", "wanda") for e in run.evaluations if e.method == "dense")
    assert "None of 3 comparisons is significant.</p>" in report_html(replace(run, evaluations=same), {})


def test_costs_name_methods_as_the_table_does(run):
    html = text_of(report_html(run, {}))
    costs = html[html.index("Factors (s)"):html.index("How it was made")]
    assert "CAP" in costs and "Magnitude" in costs and "beyond the model" in costs and "magnitude" not in costs


def listed_in(packed):
    """The manifest of a packed run."""
    return json.loads(packed_texts(packed)["manifest.json"])["content"]


def test_a_picture_of_other_methods_does_not_stay(tmp_path):
    unpack_run(LAB, tmp_path / "run")
    (tmp_path / "run/figures").mkdir(exist_ok=True)
    (tmp_path / "run/figures/sparsity_curves_solvers.png").write_bytes(b"of a run with more methods")
    write_results(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run/figures").glob("sparsity_curves*")} == {"sparsity_curves.png"}


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


def test_a_cell_that_is_finished_while_tables_are_written_is_in_them(tmp_path, monkeypatch):
    """A run at work writes its tables behind its last cell, and a report that was begun before must not take their place."""
    unpack_run(ROOT / "figures" / "bfloat16" / "usual", tmp_path / "run")
    whole = load_run(tmp_path / "run")
    seen = iter([replace(whole, evaluations=whole.evaluations[:-1])])
    monkeypatch.setattr(report, "load_run", lambda folder: next(seen, whole))
    write_results(tmp_path / "run")
    assert [*seen] == [] and (tmp_path / "run" / "tables" / "table.md").read_text(encoding="utf-8") == report.table_texts(whole)["tables/table.md"]


def test_of_several_runs_an_unfinished_one_is_left_as_it_is(tmp_path):
    """The others are done, and a line names it; one run alone is refused."""
    unpack_run(ROOT / "figures" / "bfloat16" / "usual", tmp_path / "runs" / "b")
    (tmp_path / "runs" / "a" / "unfinished").mkdir(parents=True)
    shutil.copy(tmp_path / "runs" / "b" / "run.json", tmp_path / "runs" / "a")
    with locked(tmp_path / "runs" / "a"):
        assert output_of("pack", tmp_path / "runs").startswith("Left as it is: Another process is at work in")
    unpack_run(tmp_path / "runs" / "b", tmp_path / "live")
    shutil.rmtree(tmp_path / "runs" / "b")
    (tmp_path / "live").rename(tmp_path / "runs" / "b")
    for command, said in (("figures", "has no finished evaluation yet"), ("report", "has no finished evaluation yet"), ("pack", "holds unfinished work")):
        left, done = output_of(command, tmp_path / "runs").splitlines()
        assert left.startswith(f"Left as it is: {tmp_path / 'runs' / 'a'} {said}") and str(tmp_path / "runs" / "b") in done, left
        assert_one_sentence(called(command, tmp_path / "runs" / "a"), said)
