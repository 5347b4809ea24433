"""The site that `make docs` builds: what would break it is seen without building it; where Sphinx, KaTeX and Chromium are, a few pages are
built and walked through."""
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from notebooks_on_disk import NOTEBOOKS, cells, label
from tools.notebooks import floors
from tools.site import stage, walk

NAMES = list(floors())
TITLES = {name: name for name in NAMES}


def headings(path):
    """A notebook's headings, each with its level; what stands in a fence is none."""
    text = "\n\n".join(re.sub(r"^```.*?^```", "", c.source, flags=re.M | re.S) for c in cells(path) if c.kind == "markdown")
    return [(len(hashes), words) for hashes, words in re.findall(r"^(#+) +(.+?) *$", text, flags=re.M)]


def test_contents_are_the_reading_order():
    listed = re.findall(r"^(?:.* <)?([\w/]+)>?$", stage.contents(NAMES, TITLES), flags=re.M)
    assert listed == [*NAMES[1:], "api/index", "gallery", *stage.texts()]
    assert {"CONTRIBUTING", "SECURITY"} <= set(stage.texts())
    titles = [title for title, _ in stage.groups(NAMES)]
    assert titles[0] == "The paper, chapter by chapter" and "Results" in titles and len(set(titles)) == len(titles)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_headings_go_down_step_by_step(path):
    levels = [level for level, _ in headings(path)]
    assert not [words for _, words in headings(path) if words.count("`") % 2], "a line of code in prose begins with # and became a heading"
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in zip(levels, levels[1:])), levels


@pytest.mark.parametrize("path", NOTEBOOKS, ids=label)
def test_links_lead_somewhere(path):
    """Files that are there, and headings that are there, as GitHub and the site spell them."""
    text = "\n\n".join(c.source for c in cells(path) if c.kind == "markdown")
    for target in [found[2] for found in stage.LINK_OR_CODE.finditer(text) if found[2]]:
        if not re.match(r"[a-z]+:", target):
            there, _, part = target.partition("#")
            to = (path.parent / there).resolve() if there else path
            assert to.exists(), f"{label(path)} links to {target}"
            known = {re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-") for _, words in headings(to)} if part else set()
            assert not part or part.lower() in known, f"{label(path)} links to {target}, and there is no such heading"


def test_links_hold_on_the_site():
    links = stage.Links(["01_scoring", "methods/10_wanda"])
    moved = links.moved("[a](../01_scoring.ipynb#Who) `[b](../c.md)` [c](../../CONTRIBUTING.md) ![f](../../figures/framework.png) [w](https://a.b) "
                        "[d](#Here) [e](../../figures/lab) [g](../02_importance.ipynb)", "nbs/methods/10_wanda.ipynb")
    assert moved == ("[a](../01_scoring.ipynb#who) `[b](../c.md)` [c](../CONTRIBUTING.md) ![f](../figures/framework.png) [w](https://a.b) "
                     "[d](#here) e (`figures/lab`) g (`nbs/02_importance.ipynb`)")
    assert links.files == {"figures/framework.png"}
    assert links.moved("[`a` b](../README.md)", "nbs/index.ipynb") == "[`a` b](index.ipynb)"
    assert links.moved("[a](README.md) [b](nbs/01_scoring.ipynb)", "SECURITY.md") == "[a](index.ipynb) [b](01_scoring.ipynb)"
    assert links.moved("[try](../tools/site/pages/x.html)", "nbs/index.ipynb") == '<a href="pages/x.html">try</a>'


def test_a_notebook_keeps_its_code_and_outputs():
    """nbdev's processors take away what is hidden, and no more."""
    made = stage.processed("02_importance", stage.Links(NAMES))["cells"]
    before = json.loads((ROOT / "nbs/02_importance.ipynb").read_text(encoding="utf-8"))["cells"]
    texts = ["".join(c["source"]) for c in made]
    assert not any(re.search(r"#\| *(export|hide|default_exp)", text) or "fastcore" in text for text in texts)
    assert any("def importance_factors(" in text for text in texts)
    marked = [c for c in made if "exported" in c["metadata"].get("tags", [])]
    assert len(marked) == sum("#| export" in "".join(c["source"]) for c in before) and "first" in marked[0]["metadata"]["tags"]
    assert [c["outputs"] for c in made if c.get("outputs")] == [c["outputs"] for c in before if c.get("outputs")]


def test_quartos_folds_are_folds():
    from execnb.nbio import dict2nb
    from nbdev.process import NBProcessor

    text = '#| code-fold: true\n#| code-summary: "Solution 1"\n# 4.\nprint(4)'
    kinds = [dict(cell_type="code", metadata={}, outputs=[], source=source) for source in (text, "#| eval: false\nx = 1", "# plain\ny = {1: 2}")]
    notebook = dict2nb(dict(cells=kinds, metadata={}, nbformat=4, nbformat_minor=5))
    NBProcessor(nb=notebook, procs=[stage.folded], process=True)
    assert [c.source for c in notebook.cells] == ["# 4.\nprint(4)", "x = 1", "# plain\ny = {1: 2}"]
    assert notebook.cells[0].metadata["tags"] == ["hide-cell"] and "tags" not in notebook.cells[1].metadata
    assert notebook.cells[0].metadata["mystnb"]["code_prompt_show"] == "Solution 1"


def missing():
    """What a site cannot be built and walked without."""
    lacks = [name for name in ("myst_nb", "sphinx_book_theme", "playwright") if importlib.util.find_spec(name) is None]
    katex = (ROOT / "_docs/node/node_modules/katex").is_dir() and shutil.which("node")
    return lacks + ["KaTeX (make docs brings it)"] * (not katex) + ["Chromium"] * (walk.chromium() is None)


@pytest.mark.skipif(bool(missing()), reason=f"the site needs {', '.join(missing())}")
def test_a_small_site_can_be_walked_through(tmp_path):
    """The index and the first three chapters, as `make docs` builds all of them; the fourth, to which Next leads, is not there."""
    pages = ["00_calibration", "01_scoring", "02_importance"]
    for words in (["tools/site/stage.py", str(tmp_path / "source"), *pages],
                  ["-m", "sphinx", "-q", "-W", "-n", "-b", "html", "-c", "tools/site", str(tmp_path / "source"), str(tmp_path / "html")]):
        made = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    faults, seen = walk.walk(Path(tmp_path / "html"))
    assert seen["way"] == ["index.html", *(f"{page}.html" for page in pages)]
    assert faults == ["02_importance.html: there is no Next"]
    assert {"gallery.html", "api/index.html", "api/chapters.html", "CONTRIBUTING.html"} <= seen["pages"].keys()
    assert len(seen["slides"]) > 20 and sum(s["pictures"] for s in seen["slides"]) > 5 < sum(s["formulas"] for s in seen["slides"])
    assert seen["pages"]["01_scoring.html"]["formulas"] > 5 and seen["pages"]["gallery.html"]["pictures"] > 5


@pytest.mark.parametrize("lacks", ["playwright", "Chromium"])
def test_a_site_that_cannot_be_walked_through_is_no_success(monkeypatch, lacks):
    monkeypatch.setattr(walk.importlib.util, "find_spec", lambda name: None if lacks == "playwright" else True)
    monkeypatch.setattr(walk, "chromium", lambda: None)
    with pytest.raises(SystemExit, match=f"was not walked through: .*{lacks}"):
        walk.main()
