"""Every wrong use that is known gets one sentence: what was wrong, what was expected, what to do."""
import os

import pytest

from cap_nb.command_line import bug_report, in_one_sentence
from cap_nb.core.files import read_checked
from wrong_uses import RECORD, answer, cleared, prepared, uses

USES = list(uses())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with everything that the uses name."""
    folder = tmp_path_factory.mktemp("wrong") / "place"
    prepared(folder)
    return folder


@pytest.mark.parametrize("use", USES, ids=[f"{i}" for i in range(len(USES))])
def test_a_wrong_use_gets_one_sentence(use, place):
    sentence, code = answer(use, place)
    cleared(place)
    assert len(sentence.splitlines()) == 1 and "Traceback" not in sentence and "None" not in sentence.split("expected")[0], (use.does, sentence)
    assert code == (2 if use.does.startswith("cap ") else None), use.does
    typers = sentence.startswith(("No such", "Missing option", "Missing argument"))
    assert typers or (": expected " in sentence and sentence.endswith(".")), (use.does, sentence)
    assert not (place / "new").exists()


def test_the_page_of_wrong_uses_shows_these():
    told = read_checked(RECORD)
    assert [(one["area"], one["use"]) for one in told] == [(use.area, use.does) for use in USES] and len(told) >= 150


def test_what_nobody_foresaw_leaves_a_file_to_send(capsys):
    @in_one_sentence
    def broken():
        raise ZeroDivisionError("a division\nby zero")

    with pytest.raises(Exception) as left:
        broken()
    said = capsys.readouterr().err
    assert left.value.exit_code == 1 and said.startswith("cap: This is a bug in cap_nb (ZeroDivisionError: a division by zero)")
    path = said.split("please send ")[1].split(",")[0]
    with open(path, encoding="utf-8") as file:
        text = file.read()
    os.unlink(path)
    assert "ZeroDivisionError" in text and "in broken" in text and "torch" in text and bug_report.__doc__
