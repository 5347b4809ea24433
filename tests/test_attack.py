"""A few of the wrong calls of tests/attack.py, the same every time; `make soak` makes them all."""
import pytest
from attack import ENDS, attacked


@pytest.mark.parametrize("kind, count", [("python", 150), ("commands", 60)])
def test_wrong_calls_end_in_one_sentence(kind, count):
    found, _ = attacked(kind, count, seed=1, rights=False)
    assert len(found) == count and {end for end, _ in found.values()} <= {*ENDS}
    assert not {str(call): said for call, (end, said) in found.items() if end == "otherwise"}
