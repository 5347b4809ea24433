"""The claims ledger reads studies and answers of several runs, and refuses those that do not belong together."""
import functools
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fixtures import refuses
from cap_nb.core.files import read_checked, write_checked
from cap_nb.experiments.claims import (
    CLAIMS, MEASURES, ModelRecords, answered_by_both, answers_of_dense, gain_comparison, merge_parts, neuron_cells, paired_gains, reason, seed_runs, studies_of, study_gains,
    verdict)
from cap_nb.experiments.variants import only_examples
from cap_nb.jobs.records import load_run, read_run
from conftest import ROOT

FIGURES = ROOT / "figures"
QWEN = FIGURES / "held_out" / "qwen"
load_run = functools.cache(load_run)  # several tests read the same


def model_of(folder):
    return read_run(FIGURES / folder)["model"]


def asked(measure, records, **where):
    """What the first row of the table with this measure gives, put to other records or of other arguments."""
    case = replace(next(row for row in CLAIMS if row.measure == measure), **where)
    return MEASURES[measure](case, records, 0.95)


def test_every_claim_is_rows_of_one_section_and_every_case_has_one_name():
    sections = {}
    for row in CLAIMS:
        assert sections.setdefault(row.claim, row.section) == row.section
        assert row.low < row.high and row.listed in ("always", "where measured")
    assert len({(row.claim, row.case) for row in CLAIMS}) == len(CLAIMS)


def test_a_study_goes_to_the_model_that_it_is_of():
    assert "layer errors" in studies_of(FIGURES, "smollm2", model_of("smollm2_methods"))
    lab = studies_of(FIGURES, "lab", model_of("lab_methods"))
    assert {"budgets", "calibration sets", "weighed", "shrunk", "heads together", "screening"} == lab.keys()
    refuses("differ in the model", studies_of, FIGURES, "lab", model_of("lab_methods") | {"fingerprint": "0" * 64})


def test_a_second_record_of_calibration_sets_joins_by_itself(tmp_path):
    """One of another model with one seed, without CAP, and with answers: as the study writes it for a model that reasons."""
    record = read_checked(FIGURES / "calibration_sets" / "lab.json")
    cells = [cell for cell in record["cells"] if cell[0] in ("wanda", "sparsegpt") and cell[3] == 0]
    answers = {f"{how} 0": {"uid": ["a", "b", "c"], "lenient_correct": right, "correct": "000"}
               for how, right in (("gold", "100"), ("chains", "111"), ("text", "100"))}
    about = {"name": "few", "dtype": "bfloat16", "fingerprint": "f"}
    write_checked(tmp_path / "calibration_sets" / "few.json",
                  record | {"model": about, "cells": cells, "answers": answers})
    records = ModelRecords("few", {}, studies=studies_of(tmp_path, "few", about), has_variants=False)
    sets = {"of": "sparsegpt", "sparsity": 0.5, "first": "gold", "second": "text"}
    found = asked("gain of calibration sets", records, **sets)
    assert (found.n, found.unit) == (120, "nats") and found.p is not None
    assert asked("gain of calibration sets", records, **sets | {"of": "cap"}) is None
    tasks_alone = [[*key, {task: of for task, of in losses.items() if task != "text"}, windows] for *key, losses, windows in cells]
    without = replace(records, studies={"calibration sets": {"cells": tasks_alone, "sets": record["sets"]}})
    assert asked("gain of calibration sets", without, **sets) == found
    assert asked("gain of calibration sets", without, **sets | {"on": "perplexity"}) is None
    assert asked("answers gained by calibration sets", records, first="chains").value == pytest.approx(200 / 3)


def test_methods_on_other_problems_are_refused():
    refuses("the same problems for every method", study_gains, {"a": [1.0]}, {"a": [1.0, 2.0]})


def test_a_gap_of_parts_wants_what_both_parts_measured():
    cells = {(e.method, e.sparsity): e for e in load_run(FIGURES / "lab_claims").evaluations}
    assert asked("gap of MLPs and attention", ModelRecords("lab", cells), on="perplexity") is not None
    without = {key: replace(e, perplexity=None) for key, e in cells.items()}
    assert asked("gap of MLPs and attention", ModelRecords("lab", without), on="perplexity") is None


def test_losses_of_one_run_and_answers_of_another_are_merged(tmp_path):
    """The run with more methods gives the losses that both have; what only one has is kept."""
    for name, to in (("masks", "a"), ("solvers", "b"), ("20", "c")):
        shutil.copytree(QWEN / name, tmp_path / to)
    cells = seed_runs(tmp_path)[0][0]
    runs = {name: {(e.method, e.sparsity): e for e in load_run(QWEN / name).evaluations} for name in ("masks", "20")}
    assert cells["wanda", 0.5].losses == runs["masks"]["wanda", 0.5].losses
    assert cells["dense", 0.0].losses == runs["20"]["dense", 0.0].losses, "seven methods against five"
    alps = cells["alps", 0.5]
    assert len(alps.answers) == 660 and len(alps.losses) == 180
    words, others = (replace(alps, losses=tuple(one for one in alps.losses if (one.task == "gsm8k") == way)) for way in (True, False))
    assert len(words.losses) == 60 and merge_parts(words, others).losses == words.losses + others.losses, "each task is of one run alone"


@pytest.mark.parametrize("measure", ["gain", "spread over seeds"])
def test_seeds_that_were_judged_on_other_problems_are_refused(measure):
    cells = {(e.method, e.sparsity): e for e in load_run(FIGURES / "lab_methods").evaluations}
    fewer = {key: replace(e, answers=tuple(a for a in e.answers if a.task != "lab-arc")) for key, e in cells.items()}
    case = {"of": "seeds", "first": "cap", "second": "wanda", "sparsity": 0.5, "on": "tasks"}
    assert asked(measure, ModelRecords("lab", cells, runs={"seeds": dict.fromkeys(range(3), cells)}), **case)
    refuses("other problems with one calibration seed", asked, measure, ModelRecords("lab", cells, runs={"seeds": {0: cells, 1: cells, 2: fewer}}), **case)
    turned = {key: replace(e, answers=e.answers[::-1]) for key, e in cells.items()}  # whose problems would be paired with others
    refuses("other problems with one calibration seed", asked, measure, ModelRecords("lab", cells, runs={"seeds": {0: cells, 1: turned}}), **case)


def test_neurons_at_a_sparsity_that_the_main_run_lacks_are_refused():
    cells = {(e.method, e.sparsity): e for e in load_run(FIGURES / "lab_methods").evaluations}
    model = model_of("lab_methods")
    assert neuron_cells(FIGURES, "lab", cells, model)
    refuses("has none of cap", neuron_cells, FIGURES, "lab", {key: e for key, e in cells.items() if key[1] != 0.5}, model)
    refuses("differ in the model", neuron_cells, FIGURES, "lab", cells, model | {"fingerprint": "0" * 64})
    fewer = {key: replace(e, losses=e.losses[:9]) for key, e in cells.items()}
    refuses("and the main run 9", neuron_cells, FIGURES, "lab", fewer, model)


def test_the_dense_model_s_answers_are_those_of_this_model(tmp_path):
    dense = answers_of_dense(FIGURES / "qwen_answers", load_run(FIGURES / "qwen"), {})
    assert len(dense) == 200 and sum(answer.lenient_correct for answer in dense) == 50
    refuses("differ in", answers_of_dense, FIGURES / "qwen_answers", load_run(FIGURES / "lab_methods"), {})
    write_checked(tmp_path / "run.json", read_run(FIGURES / "qwen_answers"))
    assert answers_of_dense(tmp_path, load_run(FIGURES / "qwen"), {}) == (), "it was stopped before its dense cell"
    cells = {(e.method, e.sparsity): e for e in load_run(QWEN / "solvers").evaluations}
    records = ModelRecords("qwen", {}, runs={"held out": {0: cells}}, dense_answers=dense)
    kept = asked("right answers kept", records, first="alps")
    assert kept.value == pytest.approx(22 / 50) and kept.n == 50 and kept.high < 2 / 3
    assert asked("right answers kept", records, first="alps", on="arc") is None, "the dense model answered GSM8K alone"
    others = replace(records, dense_answers=(*dense, replace(dense[0], task="arc")))
    assert asked("right answers kept", others, first="alps") == kept
    refuses("problems were not put to the pruned one", answered_by_both, cells["alps", 0.5].answers, dense)


def test_what_a_row_misspells_is_refused_and_not_called_unmeasured():
    """A task without examples is not measured; an unknown aggregation, task or variant, or a table that cannot be read so, is a mistake."""
    losses = load_run(FIGURES / "lab").losses
    records = ModelRecords("lab", {}, losses=losses)
    assert asked("share below zero", records, first="paired") and asked("agreement of tasks", records, first="gsm8k", second="arc")
    refuses("Unknown aggregation 'pairde'", asked, "share below zero", records, first="pairde")
    refuses("score again", asked, "share below zero", replace(records, losses=replace(losses, tokens=None)), first="pooled")
    refuses("Unknown task 'gsm8'", asked, "agreement of tasks", records, first="gsm8", second="arc")
    refuses("Unknown variant 'cap~subset-5'", asked, "agreement", records, of="blocks", first="cap~subset-5")
    counted = asked("agreement of tasks", records, first="gsm8k", second="arc").n
    assert counted == sum(task in ("lab-gsm8k", "lab-arc") for task in losses.task) < len(losses.task), "the examples of these tasks alone"
    one = only_examples(losses, [index for index, task in enumerate(losses.task) if task == "lab-arc"])
    assert asked("agreement of tasks", ModelRecords("lab", {}, losses=one), first="gsm8k", second="arc") is None


def test_all_tasks_together_are_no_few_of_them():
    """Where a run has answers of one task and losses of all, the losses of all are compared."""
    first, second = ({(e.method, e.sparsity): e for e in load_run(FIGURES / "lab").evaluations}[name, 0.5] for name in ("cap", "wanda"))
    gains, unit = paired_gains(first, second, "tasks")
    assert unit == "points" and len(gains) == 600
    some = [replace(each, answers=tuple(answer for answer in each.answers if answer.task == "lab-arc")) for each in (first, second)]
    gains, unit = paired_gains(*some, "tasks")
    assert unit == "nats" and len(gains) == len([loss for loss in first.losses if loss.task.startswith("lab-") and loss.task != "lab-text"])
    assert paired_gains(*some, "arc")[1] == "points"


def test_chains_that_are_the_gold_solutions_are_not_judged_again():
    lab = ModelRecords("lab", {}, studies=studies_of(FIGURES, "lab", model_of("lab_methods")), has_variants=False)
    sets = {"of": "wanda", "sparsity": 0.5, "second": "text"}
    assert asked("gain of calibration sets", lab, first="gold", **sets) and asked("gain of calibration sets", lab, first="chains", **sets) is None


def test_several_answers_to_a_problem_count_as_one():
    """The share of a problem's answers that is right, in pairs and in a margin, whose interval holds its own value."""
    one = replace(load_run(QWEN / "solvers").evaluations[-1].answers[0], lenient_correct=True)
    four = [replace(one, uid=str(problem), sample=sample, lenient_correct=sample < 3) for problem in range(5) for sample in range(4)]
    dense = [replace(one, uid=str(problem)) for problem in range(5)]
    assert answered_by_both(dense, four).tolist() == [[0.75, 1.0]] * 5
    refuses("5 of the dense model's 5 problems", answered_by_both, [replace(answer, task="gsm8k_fresh") for answer in dense], four)
    margin = gain_comparison(np.array([25.0, 25.0, 25.0, -50.0] * 10), "points", 0.95, test=False)
    assert margin.low < margin.value < margin.high and margin.value == 6.25


def test_what_a_table_of_losses_cannot_say_is_not_measured():
    """One task alone with windows of text beside it, and too few examples for blocks."""
    losses = load_run(FIGURES / "lab").losses
    alone = only_examples(losses, [i for i, task in enumerate(losses.task) if task == "lab-gsm8k"])
    few = replace(only_examples(alone, range(6)), task=("lab-gsm8k",) * 3 + ("text",) * 3)
    for measure, on in (("agreement of tasks", {}), ("agreement", {"of": "blocks"})):
        assert asked(measure, ModelRecords("lab", {}, losses=few), **on) is None
    some = dict(enumerate([losses] * 4))
    assert asked("agreement gained by more", ModelRecords("lab", {}, seed_losses=some), of="seeds") is None
    assert asked("agreement gained by more", ModelRecords("lab", {}, seed_losses=some | {4: losses}), of="seeds").value == pytest.approx(0)
    assert asked("agreement of tasks", ModelRecords("lab", {}, losses=losses), first="gsm8k", second="arc").value < 1
    cells = {(e.method, e.sparsity): e for e in load_run(FIGURES / "lab_methods").evaluations}
    equal = asked("separation and gain", ModelRecords("lab", {}, runs={"seeds": dict.fromkeys(range(5), cells)}, seed_losses=dict.fromkeys(range(5), losses)))
    assert "no seed differs in the scores' concentration" in reason(equal, verdict(equal, (0, math.inf))), "measured, and undecided"


@pytest.mark.parametrize("right, said", [(3, "too few"), (200, None)])
def test_too_few_chains_are_a_number_and_enough_without_a_gain_are_not_measured(right, said):
    one = replace(load_run(QWEN / "solvers").evaluations[-1].answers[0], correct=True, cut_off=False)
    found = asked("gold over chains", ModelRecords("lab", {}, chains=(one,) * right))
    assert (found and found.n < found.fewest and "too few") == said
