"""What the mutator begins with is right, so that more than a reader's first check is reached; and a few inputs of each reader, the same every time."""
import random
import tempfile
from pathlib import Path

import pytest
from mutated_fuzz import SAYING, mutated
from test_nothing_let_in import READERS, SLOW, fed, lay_out


@pytest.mark.parametrize("reader", SAYING)
def test_good_values_are_read(reader):
    values, write = SAYING[reader]
    read, name, _ = READERS[reader]
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder), reader)
        for value in values:
            ends = {fed(read, Path(folder) / name, write(random.Random(seed), value)) for seed in range(9)}
            assert "read" in ends, value


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader not in SLOW])
def test_a_few_mutated_inputs(reader):
    found, _, more = mutated(reader, 100, drawn=10)
    assert found.total() == 100 and more < 1 << 30
