"""Every wrong use that is known gets one sentence: what was wrong, what was expected, what to do."""
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from cap_nb.command_line import in_one_sentence
from cap_nb.core.files import read_checked
from wrong_uses import RECORD, answer, can_be_tried, cleared, in_our_words, prepared, told, uses

USES = list(uses())
SHOWN = read_checked(RECORD)


@pytest.fixture(scope="module")
def place():
    """A folder with everything that the uses name, which other users may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    prepared(folder / "place")
    yield folder / "place"
    shutil.rmtree(folder)


@pytest.mark.parametrize("use", USES, ids=[f"{i}" for i in range(len(USES))])
def test_a_wrong_use_gets_one_sentence(use, place):
    """The one that the page shows, but for what another machine says otherwise."""
    if not can_be_tried(use, place):
        pytest.skip("only root can become another user, or mount a disk")
    sentence, code = answer(use, place)
    left = cleared(place)
    what = sentence.split("expected")[0]
    assert len(sentence.splitlines()) == 1 and "Traceback" not in sentence, (use.does, sentence)
    assert "None" not in what or "=None" in use.does and " is None: " in what, (use.does, sentence)  # None that was given may be named
    assert code == (2 if use.does.startswith("cap ") else None), use.does
    assert ": expected " in sentence and sentence.endswith("."), (use.does, sentence)
    assert left == [] or use.area == "examples beyond a model's context", (use.does, left)  # which begins, and goes on with shorter ones
    if not (torch.cuda.is_available() and "cuda" in use.does):
        assert in_our_words(told(sentence, place)) == in_our_words(SHOWN[use.area][use.does]), use.does


def test_the_page_of_wrong_uses_shows_these():
    assert sorted((area, does) for area, shown in SHOWN.items() for does in shown) == sorted((use.area, use.does) for use in USES)


def test_what_nobody_foresaw_leaves_a_file_to_send(capsys):
    @in_one_sentence()
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
    assert "ZeroDivisionError" in text and "in broken" in text and "torch" in text
