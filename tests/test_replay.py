"""Notebooks once more, with their exported cells replaced by an import of the module they became.

nbdev_test runs the cells of a notebook, so a module that lacks an import, or that is stale, passes it. Here the tests
in the notebook meet what users import: in `make test` those at the bottom, in `make soak` and `make matrix` every one. Cells flagged slow or gpu are passed over, as everywhere; each notebook runs in its folder, as in nbdev_test.
"""
import json
import os
import traceback

import matplotlib.pyplot
import pytest
from execnb.shell import CaptureShell

import cap_nb
from conftest import ROOT
from notebooks_on_disk import SOURCES, cells, label, module_of, notebooks_tool

IMPORT_ALL = """import {name} as _replayed
globals().update({{k: v for k, v in vars(_replayed).items() if not k.startswith('__')}})"""


def replay(path):
    """Run a notebook against its module; gives the shell and how many exported cells were replaced."""
    shell, replaced, flags = CaptureShell(path), 0, notebooks_tool.FLAGS
    for cell in cells(path):
        if cell.kind != "code" or notebooks_tool.is_skipped(cell.source, flags):
            continue
        source = cell.source
        if cell.exported:
            replaced += 1
            source = IMPORT_ALL.format(name=module_of(path)) if replaced == 1 else ""
        shell.run(source)
        if shell.exc:
            trace = "".join(traceback.format_exception(shell.exc))
            where = f"{path}, replayed against {module_of(path)}, failed in the cell"
            pytest.fail(f"{where}\n\n{cell.source}\n\n{trace}", pytrace=False)
    return shell, replaced


# A replay repeats `make test`: a notebook's cells and its module are the same text (`check-sync`), no name is missing in it (ruff), its cells have
# run (nbdev_test), and other notebooks import the module. So one is replayed, and all of them by make soak.
REPLAYED = SOURCES if os.environ.get("CAP_NB_SOAK") else [path for path in SOURCES if label(path) == "core/00_errors.ipynb"]


@pytest.mark.parametrize("path", REPLAYED, ids=label)
def test_notebook_against_its_module(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.syspath_prepend(str(ROOT))
    _, replaced = replay(path)
    matplotlib.pyplot.close("all")
    assert replaced > 0, f"{label(path)} names a module and exports nothing"


def test_the_package_is_imported_from_this_checkout():
    assert cap_nb.__file__ == str(ROOT / "cap_nb" / "__init__.py")


def test_a_broken_module_is_noticed(tmp_path, monkeypatch):
    """The replay fails when the module does not hold what the notebook's test expects."""
    monkeypatch.syspath_prepend(str(ROOT))
    sources = ["#| default_exp core.errors", "#| export\ndef only_in_the_notebook(): return 1",
               "assert only_in_the_notebook() == 1"]
    cell = dict(cell_type="code", metadata={}, outputs=[], execution_count=None)
    notebook = dict(cells=[cell | dict(source=[source]) for source in sources])
    path = tmp_path / "broken.ipynb"
    path.write_text(json.dumps(notebook))
    with pytest.raises(pytest.fail.Exception, match="only_in_the_notebook"):
        replay(path)
