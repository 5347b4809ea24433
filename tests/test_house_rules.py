"""The rules that a machine can check, beside what ruff checks: short lines, silent modules, imports that run one way, one way
through the book, documented public names."""
import ast
import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping, Sequence

import pytest

import cap_nb.all
from conftest import ROOT
from notebooks_on_disk import NOTEBOOKS, SOURCES, cells, label, module_of, notebooks_tool

MODULES = sorted(p for p in (ROOT / "cap_nb").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py", "__main__.py"))  # __main__ is no notebook's
FLOORS = notebooks_tool.floors()
PUBLIC = {name: getattr(cap_nb.all, name) for name in cap_nb.all.__all__}
parsed = functools.cache(ast.parse)  # several rules look at the same cells and modules


def place(path):
    """A notebook's place in the order that imports follow: its floor, then its line in nbs/order.txt; None where it may import anything."""
    name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    return None if FLOORS[name] is None else (FLOORS[name], list(FLOORS).index(name))


def imported_modules(text, module):
    """The full names of all that a module imports, wherever in its code the import stands; nbdev writes imports within the package as relative."""
    names = []
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[:-node.level] if node.level else []
            source = ".".join(above + ([node.module] if node.module else []))
            names += [source] + [f"{source}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_outputs_name_no_machine_and_hold_no_widget(path):
    """Warnings and tracebacks carry the paths of the machine they came from; a widget shows nothing without its kernel."""
    text = path.read_text(encoding="utf-8")
    assert "site-packages/" not in text and str(ROOT) + "/" not in text and "application/vnd.jupyter.widget" not in text
    said = re.sub(r"\\u001b\[[\d;]*m", " ", text).replace("\\n", "\n")
    assert set(re.findall(r"(?<![\w.~}])/(?:home|root|Users|work|tmp)/[\w.-]+", said)) <= {"/home/me"}  # an example's


@pytest.mark.parametrize("path", SOURCES, ids=label)
def test_imports_are_never_skipped(path):
    """A cell with an import is executed when documentation is made, flagged or not."""
    for cell in cells(path):
        if cell.kind != "code" or cell.source.lstrip().startswith(("%", "!")):
            continue
        body = parsed(cell.source).body
        imports = [isinstance(node, (ast.Import, ast.ImportFrom)) for node in body]
        assert not any(imports) or not {"slow", "gpu"} & cell.directives.keys(), "an import stands in a slow or gpu cell"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_lines_are_short(path):
    """ruff looks at code cells only. The modules are made of the same lines. A table's row and a formula cannot be broken."""
    assert not [line for c in cells(path) for line in c.source.splitlines() if len(line) > 120 and not line.lstrip().startswith(("|", "$$", "!["))]


def test_next_leads_through_every_notebook():
    """From the index, "Next" visits every notebook once, in the order of nbs/order.txt; the last one leads back to the index."""
    for path, following in zip(NOTEBOOKS, [*NOTEBOOKS[1:], NOTEBOOKS[0]]):
        last = [c.source for c in cells(path) if c.kind == "markdown"][-1]
        links = re.findall(r"^Next: \[[^\]]+\]\(([^)]+)\)", last, flags=re.M)
        assert [(path.parent / link).resolve() for link in links] == [following], f"{label(path)}: Next leads to {links}, not to {label(following)}"


@functools.cache
def dataclass_names():
    """The names of the package's dataclasses."""
    trees = [parsed(p.read_text(encoding="utf-8")) for p in MODULES]
    classes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    return {node.name for node in classes if any("dataclass" in ast.unparse(d) for d in node.decorator_list)}


def filled_by_position(text, names, most=3):
    """Calls that fill a dataclass by position beyond its first fields."""
    calls = [node for node in ast.walk(parsed(text)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return [ast.unparse(call)[:80] for call in calls if call.func.id in names and len(call.args) > most]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_dataclasses_are_filled_by_keyword(path):
    code = [c.source for c in cells(path) if c.kind == "code" and not c.source.lstrip().startswith(("%", "!"))]
    assert not [call for text in code for call in filled_by_position(text, dataclass_names())]


def test_filling_by_position_is_noticed():
    assert filled_by_position("Anatomy('llama', 2, 4, 2)", {"Anatomy"}) and not filled_by_position("Anatomy('llama', 2, 4)", {"Anatomy"})


def undocumented(thing):
    """What a public function or class lacks: a docstring, a comment behind a parameter or field, or the error that a function raises."""
    lines = inspect.getsource(thing).splitlines()
    missing = [] if inspect.getdoc(thing) else ["a docstring"]
    names = inspect.signature(thing).parameters if inspect.isfunction(thing) else [name for name in getattr(thing, "__dataclass_fields__", {}) if name in vars(thing)["__annotations__"]]
    for name in names:
        if not any(re.match(rf"\s*\*{{0,2}}{name}\b[^#]*#\s*\S", line) for line in lines):
            missing.append(f"a comment on {name}")
    if inspect.isfunction(thing) and any("raise BadInput" in line for line in lines) and "BadInput" not in (inspect.getdoc(thing) or ""):
        missing.append("BadInput, which it raises")
    return missing


def test_public_means_documented():
    """Each public name has a docstring, and says what every parameter is and that it raises `BadInput`."""
    bare = {name: undocumented(v) for name, v in PUBLIC.items() if (inspect.isfunction(v) or inspect.isclass(v)) and undocumented(v)}
    assert not bare, bare


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
        assert name.split(".")[0] not in ("fastcore", "nbdev", "execnb", "IPython"), f"{path.name} imports {name}"
    calls = [n for n in ast.walk(parsed(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    assert not [n.lineno for n in calls if n.func.id == "print"], f"{path.name} prints"


def asked_of_devices(text):
    """Where code names a function of one kind of accelerator, or compares with its name; torch's own tensors and errors need neither."""
    kinds = ("cuda", "mps", "nccl", "xpu")
    found = [node for node in ast.walk(parsed(text)) if (isinstance(node, ast.Attribute) and node.attr in kinds) or (isinstance(node, ast.Constant) and node.value in kinds)]
    return sorted({node.lineno for node in found})


def test_devices_are_asked_in_one_place():
    """What has never run on a GPU stands on the page of devices, and nowhere else."""
    assert [p.name for p in MODULES if asked_of_devices(p.read_text(encoding="utf-8"))] == ["devices.py"]
    assert asked_of_devices("torch.cuda.synchronize()\nx.type == 'cuda'\nbackend = 'nccl'") == [1, 2, 3]


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
    return sorted({name for name in names if own is not None and places.get(name) is not None and places[name] > own})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_no_cell_imports_a_later_module(path):
    assert not later_imports(path), f"{label(path)} imports what comes after it: {later_imports(path)}"


def test_order_is_noticed():
    """The rule above can fail: the floors go from the errors to the command line."""
    names = ["core/00_errors", "data/02_problems", "models/01_anatomy", "00_calibration", "01_scoring", "methods/24_prune", "jobs/03_job", "command_line"]
    places = [place(ROOT / "nbs" / f"{name}.ipynb") for name in names]
    assert places == sorted(places) and len(set(places)) == len(places)
    assert imported_modules("from ..models import files", "cap_nb.jobs.job") == ["cap_nb.models", "cap_nb.models.files"]


def vague(kind):
    """Whether a type says dict, list or the like and not of what; what a function takes may stay open."""
    parts = [] if typing.get_origin(kind) is Callable else typing.get_args(kind)
    return kind in (dict, list, tuple, set, Mapping, Sequence, re.Pattern) or any(map(vague, parts))


def written_functions(value):
    """A public function, or what is written of methods and properties in a public class."""
    if inspect.isfunction(value):
        return [value]
    parts = [getattr(part, "fget", getattr(part, "__func__", part)) for part in vars(value).values()] if inspect.isclass(value) else []
    return [part for part in parts if inspect.isfunction(part) and part.__code__.co_filename == inspect.getfile(value)]


def test_type_checkers_know_the_public_names():
    """What functions, methods and fields take and give has a type that can be looked up; CONTRIBUTING says how pyright looks at all of it."""
    hints = {name: typing.get_type_hints(value) for name, value in PUBLIC.items() if inspect.isclass(value)}
    for name, value in PUBLIC.items():
        for function in written_functions(value):
            hints[f"{name}: {function.__name__}"] = typing.get_type_hints(function)
            bare = (set(inspect.signature(function).parameters) | {"return"}) - {"self", "cls"} - set(hints[f"{name}: {function.__name__}"])
            assert not bare, f"{name}: {function.__name__} lacks the types of {bare}"
    assert not [f"{name}: {part}" for name, known in hints.items() for part, kind in known.items() if vague(kind)]
    assert vague(dict[str, list] | None) and not vague(Callable[[dict], Mapping]), "the rule can fail"
