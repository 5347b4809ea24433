"""The glossary's entries and links, the cell for Colab, the slides."""
import json
import re

import pytest

from conftest import ROOT, tool
from notebooks_on_disk import NOTEBOOKS, cells, label

glossary, slides = tool("glossary"), tool("slides")
ENTRIES = glossary.entries()


def links(path):
    """Every link in a notebook's prose, code aside: target and anchor."""
    text = re.sub(r"`[^`]*`", "", "\n".join(glossary.markdown(path)))
    return [target.partition("#")[::2] for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"[a-z]+:", target)]


def test_every_entry_is_there_once_and_leads_home():
    anchors = [entry.anchor for entry in ENTRIES]
    assert len(ENTRIES) > 40 and len(set(anchors)) == len(anchors)
    assert all(entry.term == entry.term.lower() for entry in ENTRIES), "in small letters GitHub, Sphinx and Jupyter agree on the anchor"
    assert not [entry.term for entry in ENTRIES if entry.home not in NOTEBOOKS or entry.home == glossary.GLOSSARY]


def test_an_entry_is_short_and_in_its_place():
    assert not [entry.term for entry in ENTRIES if not 8 <= len(re.findall(r"\w+", re.sub(r"\$\$.*?\$\$", "", entry.text, flags=re.S))) <= 80]
    assert [entry.term for entry in ENTRIES] == sorted((entry.term for entry in ENTRIES), key=glossary.slug)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "teaching"], ids=label)
def test_links_of_the_teaching_pages_lead_somewhere(path):
    anchors = {glossary.slug(h) for text in glossary.markdown(glossary.GLOSSARY) for h in re.findall(r"^#+ (.+)$", text, re.M)}
    for target, anchor in links(path):
        there = (path.parent / target).resolve() if target else path
        assert there.is_file(), target
        assert not anchor or (there == glossary.GLOSSARY and anchor in anchors), f"{target}#{anchor}"


def test_the_chapters_lead_to_the_glossary():
    """Each term where the chapters first use it, and where its own chapter does: as `python tools/glossary.py` sets the links."""
    before = {path: glossary.markdown(path) for path in glossary.CHAPTERS}
    after = glossary.set_links(before, ENTRIES)
    assert not [path.name for path in before if before[path] != after[path]], "run python tools/glossary.py"
    found = [anchor for path in before for target, anchor in links(path) if target == "teaching/01_glossary.ipynb"]
    assert len(before) == 7 and len(set(found)) > 30 and set(found) <= {entry.anchor for entry in ENTRIES}


def test_links_are_set_once_and_only_in_prose():
    path = ROOT / "nbs" / "01_scoring.ipynb"
    [entry] = [one for one in ENTRIES if one.term == "causal score"]
    text = "# Causal score\n\n> A causal score.\n\nIn `causal score`, a [causal score](x.ipynb), $causal score$;\nfor a causal\nscore, a causal score."
    [once] = glossary.set_links({path: [text]}, [entry])[path]
    assert once.count("glossary") == 1
    assert once.endswith("$causal score$; for a\n[causal score](teaching/01_glossary.ipynb#causal-score), a causal score.")
    assert glossary.set_links({path: [once]}, [entry])[path] == [once]
    assert glossary.set_links({path: ["**Exercises**\n\nA causal score."]}, [entry])[path] == ["**Exercises**\n\nA causal score."]


@pytest.mark.parametrize("where, calls", [("<google.colab._shell.Shell object>", 1), ("<ipykernel.zmqshell.ZMQInteractiveShell>", 0)])
def test_the_first_cell_installs_in_colab_alone(where, calls):
    called = []

    class Shell:
        def __str__(self): return where
        def run_line_magic(self, *words): called.append(words)

    [first, *_] = [cell for cell in cells(ROOT / "nbs" / "00_calibration.ipynb") if cell.kind == "code"]
    assert first.directives == {"eval": "false"}
    exec(first.source, {"get_ipython": Shell})
    assert len(called) == calls and all(word[0] == "pip" for word in called)


def test_slides_need_nothing_from_elsewhere(tmp_path):
    made = slides.deck(slides.CHOSEN)
    assert not set(re.findall(r"""(?:src|href)=["'](?!data:|#)([^"']+)""", made)) and "@import" not in made and "url(" not in made
    assert made.count("<img ") >= 6 and made.count("<math ") > 10 and "$$" not in made
    for path in slides.CHOSEN:
        assert slides.title_and_sentence(slides.cells_of(path))[0] in made


def test_a_slide_shows_what_the_notebook_holds(tmp_path):
    png = {"output_type": "display_data", "data": {"image/png": "aGVsbG8="}, "metadata": {}}
    sources = [("markdown", "# A\n\n> One & two."), ("markdown", "## Form\n\nSee\n\n$$ x_1 < 2 $$"), ("code", "plot()"),
               ("markdown", "What to see in [it](b.ipynb).\n\n## Summary\n\nAll `$5` of it.\n\n**Exercises**\n\n1. None.")]
    notebook = {"cells": [{"cell_type": kind, "source": [text], **({"outputs": [png]} if kind == "code" else {})} for kind, text in sources]}
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    title, form, picture, summary = slides.slides_of(tmp_path / "a.ipynb")
    assert "<h1>A</h1>" in title and "One &amp; two." in title
    assert "<h2>Form</h2>" in form and "See" in form and "<msub>" in form and 'display="block"' in form
    assert "data:image/png;base64,aGVsbG8=" in picture and "What to see in it." in picture
    assert "<code>$5</code>" in summary and "None" not in summary
