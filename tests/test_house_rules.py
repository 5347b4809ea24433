"""The house rules that a machine can check: short cells, enough prose, silent modules, imports that run one way."""
import ast
import re

import pytest

from conftest import ROOT
from notebooks_on_disk import NOTEBOOKS, SOURCES, cells, label, module_of, notebooks_tool

MODULES = sorted(p for p in (ROOT / "cap_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
FLOORS = notebooks_tool.floors()


def place(path):
    """A notebook's place in the order that imports follow: its floor, then its line in nbs/order.txt; None where it may import anything."""
    name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    return None if FLOORS[name] is None else (FLOORS[name], list(FLOORS).index(name))


def imported_modules(text, module):
    """The full names of all that a module imports, wherever in its code the import stands; nbdev writes imports within the package as relative."""
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[:-node.level] if node.level else []
            source = ".".join(above + ([node.module] if node.module else []))
            names += [source] + [f"{source}.{alias.name}" for alias in node.names]
    return names


def prose_words(path):
    return sum(len(re.findall(r"\w[\w'-]*", c.source)) for c in cells(path) if c.kind == "markdown")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_cells_are_short(path):
    long = [f"{c.code_lines} lines (of {limit}): {c.source.splitlines()[:3]}" for c in cells(path) if c.kind == "code"
            for limit in [25 if c.exported else 12] if c.code_lines > limit]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_outputs_name_no_machine(path):
    """Warnings and tracebacks carry the paths of the machine they came from; neither belongs into a notebook that is kept."""
    text = path.read_text(encoding="utf-8")
    assert "site-packages/" not in text and str(ROOT) + "/" not in text


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_there_is_prose_for_the_code(path):
    code_cells = sum(c.kind == "code" for c in cells(path))
    assert prose_words(path) >= 15 * code_cells, f"{prose_words(path)} words for {code_cells} code cells"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_imports_stand_alone(path):
    """A cell with an import is executed when documentation is made, so it holds nothing else and is never flagged."""
    for cell in cells(path):
        if cell.kind != "code" or cell.source.lstrip().startswith(("%", "!")):
            continue
        body = ast.parse(cell.source).body
        imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
        assert not any(imports) or all(imports), f"an import shares its cell: {cell.source.splitlines()[:4]}"
        assert not any(imports) or not {"slow", "gpu"} & cell.directives.keys(), "an import stands in a slow or gpu cell"


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_module_bears_the_notebooks_name(path):
    folder = path.parent.relative_to(ROOT / "nbs").parts
    assert module_of(path) == ".".join(["cap_nb", *folder, re.sub(r"^\d+_", "", path.stem)]) or module_of(path) == "cap_nb.all"


def test_every_module_has_its_notebook():
    made = {str(ROOT / (module_of(p).replace(".", "/") + ".py")) for p in SOURCES}
    assert made == {str(p) for p in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_are_silent_and_lean(path):
    text = path.read_text(encoding="utf-8")
    for name in imported_modules(text, "cap_nb.x"):
        assert name.split(".")[0] not in ("fastcore", "nbdev", "execnb", "pickle", "IPython"), f"{path.name} imports {name}"
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not [n.lineno for n in calls if n.func.id == "print"], f"{path.name} prints"
    assert "trust_remote_code=True" not in text.replace(" ", "")


def test_order_names_every_notebook_once():
    """nbs/order.txt is the one list: what it lacks would be neither read nor tested."""
    there = {p.relative_to(ROOT / "nbs").with_suffix("").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts}
    lines = [line.split()[1] for line in notebooks_tool.ORDER.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert sorted(lines) == sorted(there)


def later_imports(path):
    """What the cells of a notebook import from modules that come after it."""
    places, own = {module_of(p): place(p) for p in SOURCES}, place(path)
    code = [c.source for c in cells(path) if c.kind == "code" and not c.source.lstrip().startswith(("%", "!"))]
    names = [name for text in code for name in imported_modules(text, module_of(path) or "")]
    return sorted({name for name in names if name in places and own is not None and places[name] > own})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_no_cell_imports_a_later_module(path):
    assert not later_imports(path), f"{label(path)} imports what comes after it: {later_imports(path)}"


def test_order_is_noticed():
    """The rule above can fail: the floors go from the errors to the command line."""
    names = ["core/00_errors", "models/01_anatomy", "00_calibration", "01_scoring", "02_importance", "methods/07_prune", "05_evaluation", "06_analysis", "command_line"]
    places = [place(ROOT / "nbs" / f"{name}.ipynb") for name in names]
    assert places == sorted(places) and len(set(places)) == len(places)
    assert imported_modules("from ..models import files", "cap_nb.jobs.job") == ["cap_nb.models", "cap_nb.models.files"]
