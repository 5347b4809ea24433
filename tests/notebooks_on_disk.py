"""The notebooks as the tests need them: which cells are exported, to which module, in which order."""
import functools
import json
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from tools import notebooks as notebooks_tool

EXPORTS = {"export", "exporti", "exports"}


@dataclass(frozen=True)
class Cell:
    """One cell: its kind, its text, and nbdev's directives at its head."""
    kind: str
    source: str
    directives: dict

    @property
    def exported(self) -> bool:
        return self.kind == "code" and bool(EXPORTS & self.directives.keys())


@functools.cache
def cells(path: Path) -> list[Cell]:
    """All cells of a notebook, in order."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = [(c["cell_type"], "".join(c["source"])) for c in found]
    return [Cell(kind, text, notebooks_tool.directives(text) if kind == "code" else {}) for kind, text in texts]


@functools.cache
def module_of(path: Path) -> str | None:
    """The module a notebook exports to, with the package's name, or None."""
    named = [c.directives["default_exp"] for c in cells(path) if "default_exp" in c.directives]
    return f"cap_nb.{named[0]}" if named else None


NOTEBOOKS = notebooks_tool.reading_order()
SOURCES = [p for p in NOTEBOOKS if module_of(p)]


def label(path: Path) -> str:
    """A notebook's name in a test report."""
    return path.relative_to(ROOT / "nbs").as_posix()
