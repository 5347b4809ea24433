"""Copies of GSM8K's problems with changed numbers, on the benchmark's own file where it is at hand."""
import json
import random
import re
from fractions import Fraction

import pytest

from cap_nb.data.changed_numbers import changed_pairs, copy_of, equations, numbers_in, read_worked
from cap_nb.data.problems import load_problems, read_gsm8k, records_of_file
from conftest import DATA, needs_data


@pytest.fixture(scope="module")
def records():
    return records_of_file(DATA / "gsm8k" / "test.jsonl")


@pytest.fixture(scope="module")
def pairs(records):
    return changed_pairs(records)


def exact(text):
    """Python's own value of an expression, in fractions: nothing of the module is used."""
    assert re.fullmatch(r"[0-9.+\-*/() ]+", text)
    return eval(re.sub(r"[0-9]*\.?[0-9]+", lambda found: f"Fraction('{found[0]}')", text))


def annotations(answer):
    """Each annotation with the number behind it: left side, right side, what the text says."""
    return re.findall(r"<<([^<>=]*)=([^<>=]*)>>((?:[0-9][0-9,]*)?(?:\.?[0-9]+)?)", answer)


@needs_data
def test_enough_problems_have_a_copy(records, pairs):
    """The counts that the notebook names."""
    assert len(records) == 660 and len(pairs) == 260
    assert sum(len(read_worked(original).changing) > 1 for original, _ in pairs) == 170


@needs_data
def test_every_calculation_of_a_copy_holds(pairs):
    for original, copy in pairs:
        steps = annotations(copy["answer"])
        assert len(steps) == copy["answer"].count("<<") == original["answer"].count("<<") > 0
        for left, right, said in steps:
            assert exact(left) == Fraction(right.strip()), (left, right)
            assert not said or Fraction(said.replace(",", "")) == Fraction(right.strip()), (right, said)
        answer = copy["answer"].rpartition("####")[2].strip()
        assert Fraction(answer) == Fraction(steps[-1][1].strip()) > 0
        before = equations(original["answer"].rpartition("####")[0])
        assert all(now for now, true in zip(equations(copy["answer"].rpartition("####")[0]), before, strict=True) if true)


@needs_data
def test_only_numbers_change(pairs):
    """The words stay; at least one number of the question and the answer change; order and size are kept."""
    words = lambda text: re.sub(r"[0-9]*[0-9.,]*[0-9]", "#", text.strip())
    for original, copy in pairs:
        assert words(copy["question"]) == words(original["question"])
        assert words(copy["answer"]) == words(original["answer"])
        old, new = ([number.value for number in numbers_in(record["question"].strip())] for record in (original, copy))
        assert old != new and all(a / 2 <= b <= 2 * a for a, b in zip(old, new, strict=True))
        assert sorted(range(len(old)), key=lambda i: old[i]) == sorted(range(len(new)), key=lambda i: new[i])
        assert read_gsm8k(original).answer != read_gsm8k(copy).answer


@needs_data
def test_whole_numbers_stay_whole_and_ordered(pairs):
    """Every result of a step: whole where it was, positive, and on the same side of every other result."""
    for original, copy in pairs:
        old, new = ([Fraction(right.strip()) for _, right, _ in annotations(record["answer"])] for record in (original, copy))
        assert all(b > 0 and (a.denominator > 1 or b.denominator == 1) for a, b in zip(old, new))
        assert all(new[i] < new[j] for i in range(len(old)) for j in range(len(old)) if old[i] < old[j])


@needs_data
def test_copies_are_problems_of_their_own(records, pairs):
    originals, copies = {read_gsm8k(record).uid for record in records}, [read_gsm8k(copy).uid for _, copy in pairs]
    assert len(set(copies)) == len(copies) and not originals & set(copies)
    problem = read_gsm8k(pairs[0][1], "gsm8k_changed")
    assert problem.task == "gsm8k_changed" and problem.solution and "<<" not in problem.solution
    float(problem.answer)


@needs_data
def test_a_copy_depends_on_seed_and_problem_alone(records, pairs):
    shuffled = random.Random(0).sample(pairs, 40)
    assert [copy_of(original) for original, _ in shuffled] == [copy for _, copy in shuffled]
    others = changed_pairs([original for original, _ in shuffled], seed=1)
    same = sum(copy_of(original) == copy for original, copy in others)
    assert len(others) >= 35 and same <= len(others) / 4, "another seed draws other numbers, where there are any"


@needs_data
def test_a_copy_can_be_copied(pairs):
    """A copy has the form of a record, so it is read again; most have copies of their own."""
    again = changed_pairs([copy for _, copy in pairs[:60]], seed=2)
    assert len(again) >= 45


def test_copies_are_of_what_the_file_holds_now(tmp_path):
    asked = []
    for apples in (3, 5):
        record = {"question": f"Tom has {apples} apples and buys 4 more. How many?", "answer": f"It is {apples}+4=<<{apples}+4={apples + 4}>>{apples + 4}.\n#### {apples + 4}"}
        (tmp_path / "gsm8k").mkdir(exist_ok=True)
        (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps(record) + "\n")
        asked.append(load_problems("gsm8k_changed", "evaluation", tmp_path))
    assert asked[0] != asked[1]
