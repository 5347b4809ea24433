"""The run that others are compared with: once for each process of the tests."""
import pytest

from faults.machinery import run_in


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "whole"
    code, said = run_in(folder)
    assert code == 0, said
    return folder
