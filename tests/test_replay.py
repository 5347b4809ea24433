"""Each notebook once more, with its exported cells replaced by an import of the module they became.

nbdev_test runs the cells of a notebook, so a module that lacks an import, or that is stale, passes it. Here the tests
in the notebook meet what users import. Cells flagged slow or gpu are passed over, as everywhere; each notebook runs in
its folder, as in nbdev_test.
"""
import importlib
import inspect
import json
import os
import traceback
import typing

import matplotlib.pyplot
import pytest
from execnb.shell import CaptureShell

from conftest import ROOT
from notebooks_on_disk import SOURCES, cells, label, module_of, notebooks_tool, skipped_flags

IMPORT_ALL = """import {name} as _replayed
globals().update({{k: v for k, v in vars(_replayed).items() if not k.startswith('__')}})"""


def replay(path):
    """Run a notebook against its module; gives the shell and how many exported cells were replaced."""
    shell, replaced, flags = CaptureShell(path), 0, skipped_flags()
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


# The fifteen that take longest. Their cells and their module are the same text (`check-sync`), no name is missing in it (ruff), and other
# tests import it; so running them twice in every CI finds little.
LONG = {f"{name}.ipynb" for name in ("methods/08_attributions", "jobs/03_job", "methods/11_budgets", "jobs/06_chains", "jobs/05_planning", "experiments/00_variants",
                                     "command_line", "methods/13_prune", "engine/02_resumed_scoring", "05_evaluation", "jobs/10_repeat", "methods/05_update",
                                     "methods/06_joint", "methods/17_screening", "methods/15_given_hessians")}


def test_the_long_ones_are_notebooks():
    assert LONG <= {label(path) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_notebook_against_its_module(path, monkeypatch):
    if label(path) in LONG and not os.environ.get("CAP_NB_SOAK"):
        pytest.skip("takes long, and nbdev_test runs its cells: replayed by make soak and make matrix")
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("IN_TEST", "1")
    monkeypatch.syspath_prepend(str(ROOT))
    shell, replaced = replay(path)
    matplotlib.pyplot.close("all")
    assert replaced > 0, f"{label(path)} names a module and exports nothing"
    module = importlib.import_module(module_of(path))
    assert module.__file__ == str(ROOT / (module_of(path).replace(".", "/") + ".py"))
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        is_class = inspect.isclass(value) and typing.get_origin(value) is None  # in Python 3.10 Callable[...] is one
        if inspect.isfunction(value) or is_class:
            assert value.__module__.startswith("cap_nb."), f"{name} was not imported but defined in {label(path)}"


def test_there_are_notebooks():
    assert SOURCES, "no notebook exports anything: is this the right folder?"


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
