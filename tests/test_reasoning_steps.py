"""Reasoning measures against 20 outputs labelled by hand, against GSM8K's own calculator notes, and against texts that a broken model might write."""
import json
import math
import os
import random
import re
from fractions import Fraction
from pathlib import Path

import pytest

from cap_nb.experiments.reasoning_steps import (
    ERROR_CATEGORIES, arithmetic_check, category_shares, completeness, conclusion_of, equations_in, error_category,
    grounded_share, incoherent, lab_facts_check, plot_error_mixture, reasoning_report,
    reasoning_steps, step_reports)
from cap_nb.data.problems import Problem, load_problems
from cap_nb.data.prompts import target_text
from cap_nb.data.prompts import extract_answer
from cap_nb.evaluation import AnswerRecord
from fixtures import refuses
from conftest import DATA, needs_data

LABELLED = json.loads((Path(__file__).parent / "hand_labelled.json").read_text(encoding="utf-8"))
PROBLEMS = {name: Problem(task=p["task"], question=p["question"], solution=p["solution"], answer=p["answer"], choices=tuple(map(tuple, p["choices"]))) for name, p in LABELLED["problems"].items()}
LAB_TASKS = ("lab-gsm8k", "lab-strategyqa", "lab-arc")


def answered(problem, output, cut_off=False, style="lab"):
    """The record that evaluation would make of an output."""
    strict, lenient = (extract_answer(output, problem.task, style, strict=way) for way in (True, False))
    return AnswerRecord(task=problem.task, uid=problem.uid, prompt_sha256="", output=output, strict=strict, lenient=lenient, gold=problem.answer, correct=strict == problem.answer, lenient_correct=lenient == problem.answer,
                        tokens=len(output.split()), cut_off=cut_off)


def record_of(case):
    return answered(PROBLEMS[case["problem"]], case["output"], case["cut_off"], LABELLED["problems"][case["problem"]]["style"])


def same(measured, label):
    """Whether a share is the labelled fraction; no label means no number."""
    return math.isnan(measured) if label is None else measured == pytest.approx(float(Fraction(label)), abs=1e-12)


def test_the_labels_are_twenty_and_of_every_kind():
    assert len(LABELLED["outputs"]) == 20 == len({case["output"] for case in LABELLED["outputs"]})
    assert {case["labels"]["category"] for case in LABELLED["outputs"]} == set(ERROR_CATEGORIES) - {"unchecked"}
    assert {PROBLEMS[case["problem"]].task for case in LABELLED["outputs"]} == {"gsm8k", *LAB_TASKS}


@pytest.mark.parametrize("name", [name for name, p in PROBLEMS.items() if p.task in ("lab-strategyqa", "lab-arc")])
def test_the_labelled_solutions_hold_in_the_labs_world(name):
    said = lab_facts_check(PROBLEMS[name].solution)
    assert said and all(statement.true for statement in said)


@pytest.mark.parametrize("case", LABELLED["outputs"], ids=lambda case: case["name"])
def test_every_measure_gives_its_label(case):
    """Steps, the truth of every statement, grounding, completeness, incoherence, conclusion and category."""
    problem, labels, record = PROBLEMS[case["problem"]], case["labels"], record_of(case)
    steps = step_reports(problem, case["output"])
    perplexities = None if case["perplexity"] is None else [case["perplexity"]]
    row = reasoning_report([record], [problem], dense=[answered(problem, target_text(problem, "lab"))], perplexities=perplexities).iloc[0]
    assert row.steps == labels["steps"] == len(reasoning_steps(case["output"])) and same(row.step_ratio, labels["step_ratio"])
    found = [[statement.true for statement in step.statements] for step in steps]
    assert found == labels["statements"]
    if problem.task.endswith("gsm8k"):
        assert arithmetic_check(case["output"]) == (sum(found, []).count(True), len(sum(found, [])))
    assert [step.grounded for step in steps] == labels["grounded"]
    using = [label for label in labels["grounded"] if label is not None]
    assert same(grounded_share(steps), Fraction(sum(using), len(using)) if using else None)
    assert same(completeness(problem, case["output"]), labels["completeness"])
    assert row.incoherent == incoherent(case["output"], case["perplexity"]) == labels["incoherent"]
    conclusion = labels["conclusion"]
    assert conclusion_of(problem, steps) == (Fraction(conclusion) if conclusion and problem.task.endswith("gsm8k") else conclusion)
    assert row.category == error_category(record, problem, case["perplexity"]) == labels["category"]


@pytest.mark.parametrize("text, verdicts", [
    ("12 + 5 = 17", "t"), ("12+5=18", "f"), ("$3 x 4 = $12", "t"), ("3 × 4 = 12 and 8 ÷ 2 = 5", "tf"), ("(3 + 4) * 2 = 14", "t"), ("3 + 4 * 2 = 14", "f"),
    ("20 - 5 - 3 = 12", "t"), ("64 / 4 / 2 = 8", "t"), ("2^3^2 = 512", "t"), ("-5 + 3 = -2", "t"), ("3(4) = 12", "t"), ("2 1/2 * 4 = 10", "t"),
    ("1,200 + 34.5 = 1,234.5", "t"), ("20% of 50 = 10", "t"), ("3/4 of 8 = 6", "t"), ("20 / 50 * 100 = 40%", "t"), ("20 / 50 = 4%", "f"), ("4 * 25 = 1 dollar", "f"),
    ("$0.05 * 4 = 20 cents", "t"), ("7 = 3 + 4 = 8", "tf"), ("2.5 * 3 = 7.4", "f"), ("2.5 * 3 = 7.50", "t"), ("10 / 3 = 3.33", "t"), ("10 / 3 = 3.34", "t"),
    ("10 / 3 = 3.35", "f"), ("10 / 3 = 3", "f"), ("10 / 3 ≈ 3", "t"), ("10 / 3 ≈ 5", "f"), ("2 * 3 ≈ 100", "f"), ("29 * 5 ≈ 150", "t"), ("100 * 20% = 2000", "f"), ("7 - 2 ≈ 0", "f"), ("0.1 + 0.2 = 0.3", "t"), ("5 / 0 = 0", "f"), ("0 / 5 = 0", "t"),
    ("- 3 + 4 = 7", "t"), ("-3 + 4 = 7", "f"), ("**3 + 4 = 7**", "t"), ("\\(\\frac{6}{2} \\times 4 = 12\\)", "t"), ("3 * 4 = <<3*4=12>>12", "t"), ("3 + 4\n= 7", "t"),
    ("8 divided by 2 equals 4, 3 times 4 equals 13", "tf"), ("$10/hour * 5 hours = $50", "t"), ("3 (big) apples + 4 apples = 7 apples", "t"),
    ("5\n5 * 2 = 10", "t"), ("2 hours = 2 * 60 = 120 minutes", "t"), ("1 dozen = 12 eggs", ""), ("x = 5", ""), ("2x + 3 - 1 = 9", ""), ("13x - 21 = 239", ""),
    ("at 5:30 + 2 = 7:30", ""), ("3 + 4 => 7", ""), ("3 + 4 >= 7", ""), ("9^9^9 = 1", ""), ("#### 12", "")])
def test_spellings(text, verdicts):
    assert "".join("t" if e.true else "f" for e in equations_in(text)) == verdicts


def test_what_follows_the_answer_is_not_a_step():
    eggs = PROBLEMS["eggs"]
    rambling = target_text(eggs, "lab") + "\nRora has 5 boxes.\n5 * 5 = 26"
    row = reasoning_report([answered(eggs, rambling, cut_off=True)], [eggs]).iloc[0]
    assert (row.category, row.steps, row.statements) == ("right", 3, 3)
    wrong = rambling.replace("#### 81", "#### 80")
    assert error_category(answered(eggs, wrong, cut_off=True), eggs) == "wrong last line"


def test_three_hundred_is_a_number_of_the_question_and_options_belong_to_it():
    [step] = step_reports(Problem(task="gsm8k", question="Three hundred eggs fill how many dozens?", solution="", answer="25"), "300 / 12 = 25")
    assert step.grounded
    [step] = step_reports(Problem(task="arc", question="Which is most?", solution="", answer="A", choices=(("A", "40 kg"), ("B", "30 kg"))), "40 - 30 = 10")
    assert step.grounded, "numbers of the options are given, too"


def test_facts_that_nobody_can_check():
    arc = Problem(task="arc", question="Which gas do plants take in?", solution="", answer="B", choices=(("A", "Oxygen"), ("B", "Carbon dioxide")))
    assert error_category(answered(arc, "Plants breathe oxygen.\nAnswer: A", style="paper"), arc) == "unchecked"
    assert error_category(answered(arc, "Plants breathe oxygen. 2 + 2 = 5.\nAnswer: A", style="paper"), arc) == "arithmetic slip"
    assert error_category(answered(arc, "Plants breathe oxygen.", style="paper"), arc) == "no answer line"


# GSM8K's authors wrote each calculation a second time, as <<48/2=24>>: an opinion about where the equations are that is not ours.


def gold_lines():
    """(calculator notes, the line without them) over all worked solutions."""
    for name in ("train", "test"):
        for record in (DATA / "gsm8k" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            for line in json.loads(record)["answer"].rpartition("####")[0].split("\n"):
                yield re.findall(r"<<([^<>]*)>>", line), re.sub(r"<<[^<>]*>>", "", line), line


@needs_data
def test_the_equations_of_gsm8k_are_found_and_true():
    """99.6 % true and 98 % found, where some of the rest are the authors' own slips; a line with its notes reads the same as without."""
    notes_in_all = missed = equations = true = 0
    for index, (notes, plain, whole) in enumerate(gold_lines()):
        found = equations_in(plain)
        notes_in_all, missed = notes_in_all + len(notes), missed + max(0, len(notes) - len(found))
        equations, true = equations + len(found), true + sum(e.true for e in found)
        if index % 50 == 0:
            assert equations_in(whole) == found
    assert notes_in_all > 25_000
    assert missed / notes_in_all < 0.02, f"{missed} of {notes_in_all} calculations were not found"
    assert true / equations > 0.996, f"{equations - true} of {equations} equations of worked solutions are called false"


@needs_data
def test_a_wrong_result_in_gsm8k_is_noticed():
    """Each note whose result is a whole number, with one more in its place, is called false; as it stands it is true."""
    rng, checked, blind = random.Random(0), 0, 0
    for notes, _, _ in rng.sample(list(gold_lines()), 4_000):
        for note in notes:
            left, _, result = note.partition("=")
            if result.isdigit() and re.search(r"[-+*/]", left) and arithmetic_check(note) == (1, 1):
                checked += 1
                blind += arithmetic_check(f"{left}={int(result) + 1}") != (0, 1)
    assert checked > 2_000 and blind == 0


@needs_data
def test_worked_solutions_of_gsm8k_as_answers():
    """Read as a model's answers, almost all are right without a false step, complete, and mostly grounded."""
    problems = load_problems("gsm8k", "evaluation", DATA)
    report = reasoning_report([answered(p, target_text(p, "paper"), style="paper") for p in problems], problems)
    assert (report.category == "right").mean() > 0.98 and set(report.category) <= {"right", "right, faulty steps"}
    assert report.completeness.mean() == 1.0 and report.grounded.mean() > 0.9


def test_no_text_breaks_the_reader():
    rng, signs = random.Random(0), list("0123456789+-*/=().,$%^:≈x \n") + ["**", "\\frac{", "}", "<<", ">>", " of ", "#### ", "Answer: ", "A. ", "so A with 62"]
    problems = list(PROBLEMS.values())
    for _ in range(int(os.environ.get("CAP_NB_FUZZ", 300))):
        text = "".join(rng.choices(signs, k=rng.randint(0, 120)))
        problem = rng.choice(problems)
        assert error_category(answered(problem, text, rng.random() < 0.5), problem) in ERROR_CATEGORIES
    for text in ("(" * 5_000, "-" * 5_000, "2^" * 2_000 + "2 = 4", "9*" * 2_000 + "9 = 1", "1/0 = " * 3_000, "3 1/0 = 3", "=" * 9_999):
        assert all(isinstance(e.true, bool) for e in equations_in(text))


def test_reports_side_by_side():
    problems = [p for task in LAB_TASKS for p in load_problems(task, "evaluation")[:4]]
    good, bad = ([answered(p, output(p)) for p in problems] for output in (lambda p: target_text(p, "lab"), lambda p: "so so so so"))
    reports = {(method, sparsity): reasoning_report(answers, problems, good) for method, sparsity, answers in (("wanda", 0.5, bad), ("dense", 0.0, good))}
    shares = category_shares(reports)
    assert shares.loc[("wanda", 0.5), "incoherent"] == 1.0 == shares.loc[("dense", 0.0), "right"] and (shares.sum(axis=1) == 1).all()
    ax = plot_error_mixture(category_shares(reports, "lab-arc"), title="ARC")
    assert [label.get_text() for label in ax.get_legend().get_texts()] == ["incoherent", "right"]
    assert {round(bar.get_height()) for bar in ax.patches} == {0, 100} and ax.get_title() == "ARC"
    refuses("has no answers to gsm8k", category_shares, reports, "gsm8k")
