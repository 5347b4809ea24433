"""A few of the wrong calls of tests/attack.py, the same every time; `make soak` makes them all."""
import pytest
from attack import attacked, prepared


@pytest.fixture(scope="module")
def world():
    with prepared() as w:
        yield w


@pytest.mark.parametrize("kind, count", [("python", 100), ("commands", 40)])
def test_wrong_calls_end_in_one_sentence(kind, count, world):
    found, _ = attacked(world, kind, count, seed=1, rights=False)
    assert len(found) == count
    assert not {str(call): said for call, (end, said) in found.items() if end == "otherwise"}
