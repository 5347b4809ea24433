"""The chapters of the paper have one form: a guess before the run, a worked example, where intuition goes wrong, and exercises
whose solutions are executed like every cell and folded for readers."""
import json
import re

import pytest
from conftest import ROOT
from notebooks_on_disk import cells, label, notebooks_tool

CHAPTERS = sorted((ROOT / "nbs").glob("0*.ipynb"))
FOLDED = {"outputs_hidden": True, "source_hidden": True}
ENDING = ["## Where intuition goes wrong", "## Summary", "## Exercises"]


def is_solution(cell):
    return cell.kind == "code" and cell.directives.get("code-fold") == "true"


def headings(chapter):
    return [line for c in chapter if c.kind == "markdown" for line in c.source.splitlines() if re.match("#{1,3} ", line)]


def faults(chapter):
    """What a chapter's cells lack of the form, as sentences."""
    found, titles = [], headings(chapter)
    texts = [c.source for c in chapter if c.kind == "markdown"]
    if titles[1] != "## Before you run" or not any(t.endswith("Write down your guess.") for t in texts[:3]):
        found.append("it does not begin with a question")
    if sum(t.startswith("**Your guess.**") or "\n\n**Your guess.**" in t for t in texts) != 1:
        found.append("the question is not answered once")
    if not any(re.match("##+ A worked example", title) for title in titles):
        found.append("it has no worked example")
    if not re.search(r"^Paper:.+\bIn:.+\bOut:", texts[0], re.M | re.S):
        found.append("it does not say what comes in and goes out")
    if titles[-3:] != ENDING:
        found.append(f"it ends with {titles[-3:]}")
    if not re.fullmatch(r"Next: \[[^\]]+\]\([^)]+\)\.", chapter[-1].source):
        found.append("its last cell says more than what comes next")
    return found + exercise_faults(chapter)


def exercise_faults(chapter):
    """What is missing of three exercises, each with its solution in the next cell."""
    found, asked = [], [i for i, c in enumerate(chapter) if c.kind == "markdown" and re.search(r"^\*\*Exercise \d\.\*\* \w", c.source, re.M)]
    if len(asked) != 3 or sum(map(is_solution, chapter)) != 3:
        found.append(f"it has {len(asked)} exercises and {sum(map(is_solution, chapter))} solutions")
    for number, i in enumerate(asked, 1):
        solution = chapter[i + 1]
        if not is_solution(solution) or solution.directives.get("code-summary") != f'"Solution {number}"':
            found.append(f"exercise {number} is not followed by its solution")
        elif not re.search(r"^ *(assert|test_\w+\()", solution.source, re.M) or notebooks_tool.FLAGS & solution.directives.keys():
            found.append(f"solution {number} is not tested")
        elif not re.match(r"# \w", "\n".join(line for line in solution.source.splitlines() if not line.startswith("#|"))):
            found.append(f"solution {number} does not begin with its answer in words")
    return found


@pytest.mark.parametrize("path", CHAPTERS, ids=label)
def test_form(path):
    assert not faults(cells(path))


@pytest.mark.parametrize("path", CHAPTERS, ids=label)
def test_solutions_are_executed_and_folded(path):
    raw = json.loads(path.read_text(encoding="utf-8"))["cells"]
    solutions = [c for c, cell in zip(raw, cells(path)) if is_solution(cell)]
    assert all(c["outputs"] for c in solutions), "a solution shows no value; run tools/notebooks.py"
    assert all(c["metadata"].get("jupyter") == FOLDED for c in solutions), "a solution is open; run tools/notebooks.py"
    assert not [c for c in raw if c["metadata"] and c not in solutions]
    assert any("image/png" in output.get("data", {}) for c in raw for output in c.get("outputs", [])), "it draws no picture"


def test_faults_are_noticed():
    chapter = cells(CHAPTERS[0])
    first = next(i for i, c in enumerate(chapter) if is_solution(c))
    assert "it has 3 exercises and 2 solutions" in faults(chapter[:first] + chapter[first + 1:])
    assert {"it does not begin with a question", "it does not say what comes in and goes out"} <= set(faults(
        [c for c in chapter if "Before you run" not in c.source and "Paper:" not in c.source]))
