"""The two scripts that `make notebooks` and `make readme` call."""
import json
import subprocess
import sys

from conftest import ROOT, tool
from notebooks_on_disk import NOTEBOOKS, label, notebooks_tool

readme_tool = tool("readme")


def write_notebook(path, *sources):
    """A notebook of code cells, each with an old output."""
    old = dict(output_type="stream", name="stdout", text=["old\n"])
    cells = [dict(cell_type="code", id=f"c{place}", source=[source], metadata={}, outputs=[old], execution_count=None) for place, source in enumerate(sources)]
    kernel = dict(display_name="python3", language="python", name="python3")
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


def outputs(path):
    return ["".join("".join(o.get("text", [])) for o in cell["outputs"]) for cell in json.loads(path.read_text())["cells"]]


def execute(*words):
    return subprocess.run([sys.executable, ROOT / "tools/notebooks.py", *map(str, words)], capture_output=True, text=True)


def test_slow_cells_are_passed_over_and_keep_their_outputs(tmp_path):
    path = tmp_path / "a.ipynb"
    write_notebook(path, "#| slow\nprint('slow')", "print('quick')", "#| eval: false\n1/0", "import os; print(os.getcwd())")
    done = execute(path)
    assert done.returncode == 0, done.stderr
    assert outputs(path) == ["old\n", "quick\n", "old\n", f"{tmp_path}\n"]
    assert execute(path, "--flags", "slow").returncode == 0
    assert outputs(path)[0] == "slow\n"


def test_the_first_error_stops_and_nothing_is_written(tmp_path):
    one, two = tmp_path / "1.ipynb", tmp_path / "2.ipynb"
    write_notebook(one, "print('new')", "1/0")
    write_notebook(two, "print('new')")
    done = execute(one, two)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert outputs(one) == ["old\n", "old\n"] and outputs(two) == ["old\n"]
    assert execute(tmp_path / "nowhere.ipynb").returncode != 0


def test_reading_order():
    order = [label(path) for path in NOTEBOOKS]
    assert order[0].startswith("models/00_") and order[-1] == "index.ipynb"
    assert order.index("00_calibration.ipynb") < order.index("run/00_methods.ipynb")


def test_directives():
    assert notebooks_tool.directives("#| export\n#| eval: false\nx = 1\n#| late") == {"export": "", "eval": "false"}
    assert notebooks_tool.is_skipped("#| slow\nx", {"slow"}) and not notebooks_tool.is_skipped("x  # slow", {"slow"})


def test_links_hold_in_the_top_folder():
    moved = readme_tool.links_from_the_top("![f](../figures/a.png) [n](00_x.ipynb) [w](https://a.b/c) [h](#here)")
    assert moved == "![f](figures/a.png) [n](nbs/00_x.ipynb) [w](https://a.b/c) [h](#here)"
    assert readme_tool.broken_links("[a](README.md) [b](nowhere.md)") == ["nowhere.md"]
