"""The page of nbs/teaching/02_try_it.ipynb for readers without a kernel: every state computed before, in one file.

    python -m tools.interactive     measure all states and put them into tools/site/pages/try_it.html (a while)

The functions are the notebook's own: its cells are executed here. What the page can show is every method at every
sparsity, with no head masked or one of all. Its text and script are edited in the page itself; only the numbers are
replaced. tests/test_teaching.py compares them with the notebook, which masks one head for one problem.
"""
import base64
import itertools
import json
import re
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from tools.notebooks import is_skipped

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "nbs" / "teaching" / "02_try_it.ipynb"
PAGE = ROOT / "tools" / "site" / "pages" / "try_it.html"
DATA = re.compile(r'(<script type="application/json" id="data">)(.*?)(</script>)', re.S)
SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SEED, N = 0, 16  # of the notebook's calibration set, a task
LINES, WIDTH = 12, 76  # of an answer; what a ruined model says further is cut


def notebook_names() -> dict:
    """What the cells of the notebook define, up to the one that puts the widgets in motion; what follows only tries them."""
    names = {"__name__": "try_it"}
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not is_skipped(source, {"slow", "gpu"}):
            exec(compile(source, f"{NOTEBOOK.name}, cell {number}", "exec"), names)
            if source.endswith("prune_again()"):
                break
    return names


def heads_of(lab: dict) -> list[tuple[int, int]]:
    """Every head of the lab model."""
    return [tuple(head) for head in np.ndindex(tuple(lab["scores"].shape))]


def answers_of(lab: dict, problem) -> list[tuple]:
    """(answer, loss) with no head masked and with each head masked, for the model as it is."""
    from cap_nb.evaluation import answer_problems, problem_losses
    from cap_nb.methods.attributions import gated_heads
    from cap_nb.scoring import masked_head

    answers = []
    for head in (None, *heads_of(lab)):  # rows change places while answers are written, so a head at a time
        with masked_head(lab["model"], *head) if head else nullcontext():
            answers += answer_problems(lab["model"], lab["tokenizer"], [problem], max_new_tokens=128)
    gates = torch.ones(len(answers), *lab["scores"].shape)
    for row, head in enumerate(heads_of(lab), start=1):
        gates[(row, *head)] = 0
    with gated_heads(lab["model"], gates):
        losses = problem_losses(lab["model"], lab["tokenizer"], [problem] * len(answers), batch_tokens=10**6)
    return list(zip(answers, (record.loss for record in losses)))


def numbered() -> dict:
    """Values that occur often, each kept once and named by its number."""
    return defaultdict(itertools.count().__next__)


def shown_lines(text: str) -> list[str]:
    """An answer as the page shows it."""
    cut = [line if len(line) <= WIDTH else line[:WIDTH] + "…" for line in text.splitlines()]
    return cut if len(cut) <= LINES else [*cut[:LINES], "…"]


def state_of(lab: dict, method: str, sparsity: float, lines: dict, said: dict) -> dict:
    """What the page shows of a method and sparsity: shares (per mille), zeros of a matrix, a cell a head and problem."""
    reached = lab["pruned"](method, sparsity).reached
    zero = (lab["model"].model.layers[0].self_attn.o_proj.weight == 0).numpy()
    cells = []
    for problem in lab["problems"]:
        right = lab["right"][problem.task]
        for answer, loss in answers_of(lab, problem):
            wrong = lab["first_wrong"](answer.output, right)
            numbers = tuple(lines[line] for line in shown_lines(answer.output))
            cells += [said[numbers, -1 if wrong is None else wrong, int(answer.correct)], round(loss, 3)]
    return {"reached": round(reached, 4), "zeros": base64.b64encode(np.packbits(zero)).decode(),
            "shares": (1000 * lab["shares"]()).round().int().tolist(), "cells": cells}


def about(lab: dict) -> dict:
    """Where the page's numbers come from."""
    from cap_nb.jobs.records import environment, load_run
    from cap_nb.models.loading import model_fingerprint

    lab["pruned"]("dense", 0.0)
    run = load_run(ROOT / "figures" / "lab")
    session = environment(torch.device("cpu"))
    kept = ("python", "torch", "transformers", "cap_nb", "device", "threads")
    return {"model": model_fingerprint(lab["model"]), "dtype": "float32", "seed": SEED, "n": N,
            "calibration": lab["calibration"].fingerprint, "scores": run.configuration["calibration"]["fingerprint"],
            **{name: session[name] for name in kept}}


def measured(lab: dict) -> dict:
    """All that the page shows."""
    lines, said = numbered(), numbered()
    asked = [("dense", 0.0), *((m, s) for m in lab["METHODS"].values() for s in SPARSITIES)]
    states = {f"{method} {share:g}": state_of(lab, method, share, lines, said) for method, share in tqdm(asked)}
    problems = [{"task": p.task, "question": lab["asked"](p), "right": lab["right"][p.task].splitlines()} for p in lab["problems"]]
    return {"about": about(lab), "methods": lab["METHODS"], "sparsities": [0, *SPARSITIES], "problems": problems,
            "scores": [[round(score, 5) for score in row] for row in lab["scores"].tolist()],
            "lines": list(lines), "answers": [[list(n), *rest] for n, *rest in said], "states": states}


def page_of(data: dict) -> str:
    """The page as it is, with these numbers in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    return DATA.sub(lambda m: m[1] + text + m[3], PAGE.read_text(encoding="utf-8"))


def data_of(page: str) -> dict:
    """The data that a page holds."""
    return json.loads(DATA.search(page)[2])


def main() -> None:
    data = measured(notebook_names())
    PAGE.write_text(made := page_of(data), encoding="utf-8")
    print(f"{PAGE.name}: {len(made.encode()) / 1000:.0f} KB, {len(data['states'])} states, {len(data['answers'])} answers")


if __name__ == "__main__":
    main()
