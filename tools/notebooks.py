"""Execute the notebooks in reading order and keep their outputs, stopping at the first error.

    python tools/notebooks.py                          every notebook
    python tools/notebooks.py nbs/00_calibration.ipynb  this one only
    python tools/notebooks.py --flags slow             slow cells too

`jupyter nbconvert --execute` knows nothing of nbdev's flags, so a slow cell would run; here it is left alone, and
keeps the outputs it has. Progress bars are switched off, and tqdm's warning that it cannot draw them: they hold times
and this machine's paths, and a second run should leave no difference in git.
"""
import argparse
import configparser
import os
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
ORDER = ROOT / "nbs" / "order.txt"
WIDGET = "application/vnd.jupyter.widget-view+json"
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
FLAGS = set(SETTINGS["DEFAULT"]["tst_flags"].split())  # Of the cells that are passed over


def floors() -> dict[str, int | None]:
    """Every notebook of nbs/order.txt in reading order, with its floor; one that may import anything has none."""
    lines = [line.split() for line in ORDER.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {path: None if floor == "-" else int(floor) for floor, path in lines}


def reading_order(root: Path = ROOT) -> list[Path]:
    """Every notebook in the order of nbs/order.txt."""
    return [root / "nbs" / f"{path}.ipynb" for path in floors()]


def directives(source: str) -> dict[str, str]:
    """nbdev's `#| name: value` lines at the head of a cell."""
    found = {}
    for line in source.splitlines():
        match = re.match(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)$", line)
        if match:
            found[match[1]] = match[2].strip()
        elif line.strip():
            break
    return found


def is_skipped(source: str, flags: set[str]) -> bool:
    """Whether a cell carries one of the flags, or says that it is not to be evaluated."""
    said = directives(source)
    return bool(flags & said.keys()) or said.get("eval", "").lower() == "false"


def fold_solutions(notebook) -> None:
    """Hide source and output of the cells that say `#| code-fold: true`, which JupyterLab then shows as a bar to open."""
    for cell in notebook.cells:
        cell.metadata.pop("jupyter", None)
        if cell.cell_type == "code" and directives(cell.source).get("code-fold") == "true":
            cell.metadata["jupyter"] = {"outputs_hidden": True, "source_hidden": True}


def drop_widgets(notebook) -> None:
    """Take out what only a live kernel can draw: widgets, tqdm's bars among them, which heed no TQDM_DISABLE."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if WIDGET not in o.get("data", {})]


class FlaggedClient(NotebookClient):
    """A notebook client that passes over the cells nbdev passes over."""

    skipped_flags: set[str] = set()

    async def async_execute_cell(self, cell, cell_index, **options):
        if cell.cell_type == "code" and is_skipped(cell.source, self.skipped_flags):
            return cell
        return await super().async_execute_cell(cell, cell_index, **options)


def execute(path: Path, flags: set[str]) -> None:
    """Run one notebook in its own folder, as nbdev_test does, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    client = FlaggedClient(notebook, timeout=None, kernel_name="python3", record_timing=False, coalesce_streams=True,
                           store_widget_state=False,
                           extra_arguments=["--log-level=ERROR"], resources={"metadata": {"path": str(path.parent)}})
    client.skipped_flags = flags
    client.execute()
    fold_solutions(notebook)
    drop_widgets(notebook)
    nbformat.write(notebook, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--flags", default="", help="flags to run that are passed over otherwise, for example: slow")
    asked = parser.parse_args()
    flags = FLAGS - set(asked.flags.split())
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    os.environ.update(TQDM_DISABLE="1", PYTHONWARNINGS="ignore:IProgress not found", PYTHONPATH=paths)
    os.environ.pop("MPLBACKEND", None)  # a backend set from outside would keep the pictures out of the notebooks
    for path in asked.notebooks or reading_order():
        if not path.is_file():
            sys.exit(f"There is no notebook {path}.")
        print(f"executing {path}", flush=True)
        try:
            execute(path.resolve(), flags)
        except CellExecutionError as error:
            sys.exit(f"{error}\n{path} stopped at this error; nothing of it was written.")


if __name__ == "__main__":
    main()
