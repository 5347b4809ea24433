"""The two scripts that `make notebooks` and `make readme` call, the matrix of the Makefile, and layer errors on SmolLM2."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer

from cap_nb.command_line import app
from cap_nb.core.files import read_checked
from conftest import ROOT
from notebooks_on_disk import cells, notebooks_tool
from programs import finished
from tools import matrix as matrix_tool
from tools.stubs import stubs


def write_notebook(path, *sources):
    """A notebook of code cells, each with an old output."""
    old = dict(output_type="stream", name="stdout", text=["old\n"])
    cells = [dict(cell_type="code", id=f"c{index}", source=[source], metadata={}, outputs=[old], execution_count=None) for index, source in enumerate(sources)]
    kernel = dict(display_name="python3", language="python", name="python3")
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


def outputs(path):
    return ["".join("".join(o.get("text", [])) for o in cell["outputs"]) for cell in json.loads(path.read_text())["cells"]]


def execute(*words):
    """What `python tools/notebooks.py` does, in a forked process."""
    def work():
        sys.argv = ["notebooks.py", *map(str, words)]
        notebooks_tool.main()
    return finished(work, draws=False)


def test_slow_cells_are_passed_over_and_keep_their_outputs_and_widgets_are_not_kept(tmp_path):
    path = tmp_path / "a.ipynb"
    write_notebook(path, "#| slow\nprint('slow')", "print('quick')", "#| eval: false\n1/0", "import os; print(os.getcwd())",
                   f"from IPython.display import display\ndisplay({{'{notebooks_tool.WIDGET}': {{}}}}, raw=True); print('kept')")
    done = execute(path)
    assert done.returncode == 0, done.stderr
    assert outputs(path) == ["old\n", "quick\n", "old\n", f"{tmp_path}\n", "kept\n"]
    kept = [output for cell in json.loads(path.read_text())["cells"] for output in cell["outputs"]]
    assert not any(notebooks_tool.WIDGET in output.get("data", {}) for output in kept), "without its kernel a widget shows nothing"
    assert execute(path, "--flags", "slow").returncode == 0
    assert outputs(path)[0] == "slow\n"


def test_the_first_error_stops_and_nothing_is_written(tmp_path):
    one, two = tmp_path / "1.ipynb", tmp_path / "2.ipynb"
    write_notebook(one, "print('new')", "1/0")
    write_notebook(two, "print('new')")
    done = execute(one, two)
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert outputs(one) == ["old\n", "old\n"] and outputs(two) == ["old\n"]
    started = subprocess.run([sys.executable, ROOT / "tools/notebooks.py", tmp_path / "nowhere.ipynb"], capture_output=True, text=True)
    assert started.returncode != 0 and started.stderr.startswith("There is no notebook")


def test_the_readme_the_stubs_and_the_lists_are_what_the_notebooks_make():
    for path, text in stubs().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make readme`, and commit it"


def test_directives():
    assert notebooks_tool.directives("#| export\n#| eval: false\nx = 1\n#| late") == {"export": "", "eval": "false"}
    assert notebooks_tool.is_skipped("#| slow\nx", {"slow"}) and not notebooks_tool.is_skipped("x  # slow", {"slow"})


def make(*words, makefile=ROOT / "Makefile", **variables):
    """What make says; no virtual environment is active unless it is given."""
    known = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", "-f", str(makefile), *words], cwd=makefile.parent, env=known | variables, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A Makefile with two environments whose programs only say that they were called; .venv holds transformers 5, .venv-457 what a file says."""
    shutil.copy(ROOT / "Makefile", tmp_path), (tmp_path / "tests").mkdir(), (tmp_path / "settings.ini").touch(), (tmp_path / "setup.py").touch()
    for name, version in ((".venv", "5.1.0"), (".venv-457", "4.57.6")):
        bin_, called = tmp_path / name / "bin", tmp_path / name / "called"
        bin_.mkdir(parents=True)
        (bin_.parent / ".cap_nb-installed").write_text(str(tmp_path))
        (bin_.parent / "site").mkdir()
        (bin_.parent / "site" / "transformers.py").write_text(f"__version__ = '{version}'\n")
        (bin_ / "python").write_text(f'''#!/bin/sh
echo "$@" >> "{called}"
case "$*" in *tools/check_notebooks.py*) ;; *tools/matrix.py*) [ ! -e "{bin_.parent}/failing" ];; *pytest*) echo "== 3 passed in 0.12s =="; [ ! -e "{bin_.parent}/broken" ];;
  *) PYTHONPATH="{bin_.parent}/site:$PYTHONPATH" exec "{sys.executable}" "$@";; esac
''')
        (bin_ / "python").chmod(0o755)
    return tmp_path


def test_the_matrix_runs_in_both_environments(checkout):
    done = make("matrix", makefile=checkout / "Makefile")
    assert done.returncode == 0, done.stdout + done.stderr
    closing = done.stdout.split("== matrix\n")[1].splitlines()
    assert closing == ["passed: transformers 5.1.0 in .venv, 3 passed in 0.12s", "passed: transformers 4.57.6 in .venv-457, 3 passed in 0.12s"]
    assert "tools/matrix.py" in (checkout / ".venv" / "called").read_text()
    (checkout / ".venv" / "failing").touch()
    assert make("matrix", makefile=checkout / "Makefile").returncode != 0, "a cell that fails is a failure"
    for name in (".venv", ".venv-457"):
        called = (checkout / name / "called").read_text()
        assert all(f"tests/test_{word}.py" in called for word in ("families", "replay", "scoring", "evaluation", "streaming")) and "check_notebooks" not in called


def test_the_matrix_goes_on_after_a_failure_and_fails(checkout):
    (checkout / ".venv" / "broken").touch()
    done = make("matrix", "SLOW=1", makefile=checkout / "Makefile")
    assert done.returncode != 0
    assert [line.split(":")[0] for line in done.stdout.split("== matrix\n")[1].splitlines()] == ["FAILED", "passed"]
    for name in (".venv", ".venv-457"):
        called = (checkout / name / "called").read_text()
        assert "check_notebooks" in called and "tests/test_families.py" not in called, "SLOW=1 runs everything"


def test_the_matrix_refuses_the_wrong_transformers(checkout):
    (checkout / ".venv-457" / "site" / "transformers.py").write_text("__version__ = '5.2.0'\n")
    done = make("matrix", makefile=checkout / "Makefile")
    assert done.returncode != 0 and "transformers<4.58,>=4.57 is wanted there" in done.stderr + done.stdout
    assert "pytest" not in (checkout / ".venv-457" / "called").read_text()


def test_the_cells_of_the_matrix_and_their_record():
    """What is oldest comes from settings.ini; every cell is in the record, was run or says why not, and none failed."""
    assert matrix_tool.pins("oldest", "newest") == ["torch==2.6.*"] and matrix_tool.pins("newest", "oldest") == ["transformers==4.57.*"]
    record = read_checked(matrix_tool.RECORD)
    assert set(record) == set(matrix_tool.CELLS)
    assert all(cell["result"] == "passed" or cell["result"].startswith("not run: ") for cell in record.values())
    lacking = {"result": "not run: no Python 3.10 here"}
    assert matrix_tool.with_cell({"3.10/oldest/oldest": {"result": "passed"}}, "3.10/oldest/oldest", lacking)["3.10/oldest/oldest"] == {"result": "passed"}
    assert matrix_tool.with_cell({}, "3.10/oldest/oldest", lacking)["3.10/oldest/oldest"] == lacking
    assert matrix_tool.with_cell({}, "3.10/oldest/oldest", lacking)["3.13/newest/newest"]["result"] == "not run: not yet"


def test_ci_makes_no_second_environment():
    wanted = make("-n", "test")
    assert wanted.returncode == 0 and ".venv-457" not in wanted.stdout and "exec make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readmes_methods_are_those_of_the_page():
    """The seven rows near its top are rows of the first table of the page on methods, with the head of the reason that stands there."""
    def rows(path):
        [table] = re.findall(r"\| You want \| Use \| Because \|\n\|[-|]+\|\n((?:\|.+\n?)+)", "\n".join(c.source for c in cells(path)))
        return {want: (use, why) for want, use, why in (line.strip("| ").split(" | ") for line in table.splitlines())}

    ours, theirs = rows(ROOT / "nbs" / "index.ipynb"), rows(ROOT / "nbs" / "results" / "07_which_method.ipynb")
    assert len(ours) == 7 and all(theirs[want][part].startswith(row[part]) for want, row in ours.items() for part in (0, 1))


def test_the_readmes_lines_are_commands_of_the_program():
    """Every option that they name is one of its command's, and what one line makes is what the next ones take."""
    [block] = [text for text in re.findall(r"((?:    \S.*\n)+)", (ROOT / "README.md").read_text(encoding="utf-8")) if "cap fetch" in text]
    fetch, before, prune, after, compare, export, generate = (line.split() for line in block.splitlines())
    known = typer.main.get_command(app).commands
    assert (fetch[2], prune[1], before[1], after[1], export[1:3]) == ("smollm2", "prune", "eval", "eval", ["export", "pruned"])
    assert compare == ["cap", "compare", before[-1], after[-1]]
    for line in (before, prune, after, export):
        assert {word for word in line if word.startswith("--")} <= {option for parameter in known[line[1]].params for option in parameter.opts}
    models = [line[line.index("--model") + 1] for line in (before, prune, after)]
    assert models == [fetch[2], fetch[2], "pruned"] and prune[-1] == export[2] == "pruned"
    compile(shlex.split(" ".join(generate))[2], "README", "exec")
