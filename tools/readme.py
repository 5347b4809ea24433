"""The text of README.md, from nbs/index.ipynb; stubs.py writes it.

nbdev_readme needs Quarto. This takes those of nbdev's own notebook processors that matter for a page of text (hide,
hide_line, export) and lets nbconvert write the Markdown, without the code that makes the table. Its link processor stays
out: it would point at a documentation site that does not exist. Links in the index are relative to nbs/; in the README they are made relative to the top
folder. Pictures are links to committed files, so that the README renders anywhere.
"""
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    """The README's whole text."""
    import nbformat
    from execnb.nbio import nb2str, read_nb
    from nbconvert import MarkdownExporter
    from nbdev.process import NBProcessor
    from nbdev.processors import clean_magics, hide_, hide_line, rm_export, strip_ansi

    notebook = read_nb(ROOT / "nbs" / "index.ipynb")
    NBProcessor(nb=notebook, procs=[strip_ansi, hide_line, clean_magics, rm_export, hide_], process=True)
    text, resources = MarkdownExporter(exclude_input=True).from_notebook_node(nbformat.reads(nb2str(notebook), as_version=4))
    if resources.get("outputs"):
        sys.exit("nbs/index.ipynb has a picture among its outputs, which a README cannot show: "
                 "save it under figures/ and link to it in a Markdown cell.")
    text = re.sub(r"(?<=\]\()(?![a-z]+:|#|/)[^)\s]+(?=\))", lambda link: os.path.normpath(f"nbs/{link[0]}"), text)
    text = "\n".join(line.rstrip() for line in text.splitlines())
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return "<!-- Made from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n" + text + "\n"
