"""Student copies of the chapters, into a folder that needs no repository: no outputs, no solutions, cells to fill and cells that check them.

    python -m tools.classroom               build/class
    python -m tools.classroom --out FOLDER

To fill are the functions of HEARTS, which the chapter's next cell with a test checks, and the exercises: a solution, a cell that begins
with `#| code-fold: true`, ends with its tests, and these become the check. Chapter 6 finds its run, and its first picture, in `figures` beside it.
"""
import argparse
import ast
import copy
import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbconvert.preprocessors import ClearOutputPreprocessor

from cap_nb.core.files import whole_folder
from tools.notebooks import ROOT, directives, is_skipped

HEARTS = {  # Chapter -> functions that students write; the chapter's next cell with a test checks them
    "on_one_page": ["mask"], "00_calibration": ["length_quartiles"], "01_scoring": ["mask", "target_token_losses", "aggregate"],
    "02_importance": ["importance_factors"], "03_regions": ["key_value_factors", "blocks"], "04_threshold": ["bisect_threshold", "smallest_naive"],
    "05_evaluation": ["wilson_interval"], "06_analysis": ["mcnemar_exact", "holm"]}
GLOSSARY, FIGURES = "teaching/01_glossary.ipynb", ("figures/lab/records.parquet", "figures/framework.png",
                                                  "figures/head_mask.png", "figures/head_region.png")
PAGES = {*(f"{name}.ipynb" for name in HEARTS), GLOSSARY}
NOTE = ("Cells that say *your code* are yours to fill, from top to bottom; the check after each passes when it is right. A check of an\n"
        "exercise is folded, since it names the answer. You need `cap_nb`, `jupyterlab` and `fastcore`.")


def is_test(node: ast.stmt) -> bool:
    """Whether a statement is a test: assert, or a call of fastcore's test functions."""
    return isinstance(node, ast.Assert) or ast.unparse(node).startswith("test_")


def is_opening(node: ast.stmt) -> bool:
    """Whether a statement at the head of a function is no part of the answer: its docstring, or a check of its arguments."""
    raises = isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise)
    return raises or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) or re.match(r"(\w+ = )?check_", ast.unparse(node)) is not None


def blank_function(source: str, name: str) -> str:
    """A cell in which the function's docstring and checks stay, and its body is for the student."""
    [function] = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == name]
    first = next(node for node in function.body if not is_opening(node))
    lines, indent = source.splitlines(), " " * first.col_offset
    said = f"{indent}raise NotImplementedError('{name} is yours to write, in place of this line.') # your code"
    lines[first.lineno - 1:function.end_lineno] = [said]
    return "\n".join(lines)


def used(nodes: list[ast.stmt], how: type) -> set[str]:
    """The names that statements read, or set."""
    return {one.id for node in nodes for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, how)}


def split_solution(source: str) -> tuple[str, str, str]:
    """What stands in a solution's place, the solution without its tests, and the check that they become."""
    said, body = directives(source), ast.parse(source).body
    first = next(i for i, node in enumerate(body) if all(map(is_test, body[i:])))
    work, tests, lines = body[:first], body[first:], source.splitlines()
    cut = tests[0].lineno - 1
    read = used(tests, ast.Load) - used(tests, ast.Store)
    names = sorted(read & (used(work, ast.Store) | {node.name for node in work if isinstance(node, ast.FunctionDef)}))
    blank = ["# your answer in words", f"# your code; the check, which is folded below, reads {' and '.join(names)}", *(f"{name} = ..." for name in names)]
    exercise = said["code-summary"].strip('"').replace("Solution", "Exercise")
    check = [f'assert {name} is not ..., "{exercise}: {name} is yours to work out, in the cell above."' for name in names]
    return "\n".join(blank), "\n".join(lines[:cut]), "\n".join([f"# Check of {exercise.lower()}: it passes when you are right.", *check, *lines[cut:]])


def outside_links(text: str, folder: str = "") -> str:
    """Links to pages that are not in the class's folder as plain words."""
    def said(match):
        target = os.path.normpath(os.path.join(folder, match[2].partition("#")[0]))
        return match[0] if re.match(r"#|[a-z]+:", match[2]) or target in PAGES else match[1]
    return re.sub(r"(?<!!)\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s]+)\)", said, text)


def student_copy(notebook: nbformat.NotebookNode, hearts: list[str]) -> tuple[nbformat.NotebookNode, dict[str, str]]:
    """A notebook for students, and by the id of each cell to fill what belongs into it."""
    made, _ = ClearOutputPreprocessor().preprocess(copy.deepcopy(notebook), {})
    cells, solutions, due = [], {}, []
    for cell in made.cells:
        said = directives(cell.source) if cell.cell_type == "code" else {}
        cell.metadata = {}
        if is_skipped(cell.source, {"slow", "gpu"}):
            continue
        cells.append(cell)
        if cell.cell_type != "code":
            cell.source = outside_links(cell.source)
        elif "code-fold" in said:
            cell.source, solutions[cell.id], check = split_solution(cell.source)
            cells.append(nbformat.v4.new_code_cell(check, id=f"{cell.id}-check", metadata={"jupyter": {"source_hidden": True}}))
        elif here := [name for name in hearts if re.search(rf"^ *def {name}\(", cell.source, re.M)]:
            solutions[cell.id], due = cell.source, due + here
            for name in here:
                cell.source = blank_function(cell.source, name)
        elif due and re.search(r"^(assert |test_\w+\()", cell.source, re.M):
            cell.source, due = f"# Check of {', '.join(due)}: it passes when you are right.\n{cell.source}", []
    made.cells = [cells[0], nbformat.v4.new_markdown_cell(NOTE, id="note"), *cells[1:]]
    return made, solutions


def write_class(out: Path) -> None:
    """The folder that is handed out."""
    for path in (out / "teaching", out / "figures" / "lab"):
        path.mkdir(parents=True)
    for name, hearts in HEARTS.items():
        nbformat.write(student_copy(nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4), hearts)[0], out / f"{name}.ipynb")
    glossary = nbformat.read(ROOT / "nbs" / GLOSSARY, 4)
    for cell in glossary.cells:
        cell.source = outside_links(cell.source, "teaching")
    nbformat.write(glossary, out / GLOSSARY)
    for name in FIGURES:
        shutil.copy(ROOT / name, out / name)
    (out / "settings.ini").write_text("# By this file the notebooks know the top of the folder.\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "class")
    out = parser.parse_args().out
    if out.exists():
        sys.exit(f"{out} is there, and somebody may have worked in it: expected a new folder; remove it, or name another one.")
    with whole_folder(out) as part:
        write_class(part)
    print(f"{len(HEARTS)} notebooks to fill in {out}")


if __name__ == "__main__":
    main()
