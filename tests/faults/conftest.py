"""The run that others are compared with: once for each process of the tests."""
import pytest

from faults.machinery import undisturbed


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return undisturbed(tmp_path_factory.mktemp("faults") / "whole")
