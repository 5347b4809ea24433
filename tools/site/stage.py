"""Lay out the site's sources: every notebook through nbdev's own processors, reference, gallery, table of contents.

    python tools/site/stage.py [_docs/source [PAGE ...]]    PAGE: as in nbs/order.txt; none means all

Nothing is executed: the outputs are the committed ones. Of nbdev's processors those that make documentation out of code
(show_doc) and those that take exported cells away stay out: here the code is the text, and the reference has pages of
its own. Pages lie as in the repository, but nbs/ is the top: nbs/methods/10_wanda.ipynb becomes methods/10_wanda.html.
"""
import base64
import io
import itertools
import os
import re
import shutil
import sys
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[2]
TITLES = {"core": "Core: errors, files, plots", "models": "Models", "data": "Data",
          "methods": "Methods", "jobs": "Jobs: what cap run does", "portable": "A pruned model elsewhere",
          "experiments": "Experiments", "results": "Results", "teaching": "Teaching"}
LINK = re.compile(r"\[((?:[^][]|\[[^][]*\])*)\]\(([^)\s]+)\)")
LINK_OR_CODE = re.compile(rf"^```.*?^```|{LINK.pattern}|`[^`\n]*`", flags=re.M | re.S)  # a link in code is none
THUMB = 480  # pixels, twice what is shown


def groups(names: list[str]) -> list[tuple[str, list[str]]]:
    """Reading order cut where the folder changes, each part with its title; the index is in none of them."""
    parts = []
    for folder, found in itertools.groupby((n for n in names if n != "index"), lambda n: n.rpartition("/")[0]):
        found = list(found)
        first = "The paper, chapter by chapter" if re.match(r"\d|on_one_page", found[0]) else "The program"
        parts.append((TITLES.get(folder, folder.replace("_", " ").capitalize()) if folder else first, found))
    return parts


def texts() -> list[str]:
    """The pages of the top folder that are not the index: CHANGELOG, CONTRIBUTING, SECURITY."""
    return sorted(path.stem for path in ROOT.glob("*.md") if path.stem != "README")


def site_path(path: str) -> str:
    """Where a file of the repository lies on the site."""
    if path == "README.md":
        return "index.ipynb"
    return re.sub(r"^tools/site/pages/", "pages/", re.sub(r"^nbs/", "", path))


class Links:
    """The links of the repository's pages as they hold on the site, and which files the site needs because of them."""

    def __init__(self, names: list[str]):
        self.pages = {"index.ipynb", *(f"{name}.ipynb" for name in names), *(f"{name}.md" for name in texts())}
        self.files: set[str] = set()

    def moved(self, text: str, page: str) -> str:
        """A page's text with every link moved, outside code."""
        return LINK_OR_CODE.sub(lambda m: self.link(m[1], m[2], page) if m[2] else m[0], text)

    def link(self, said: str, target: str, page: str) -> str:
        """One link. A page that is not built, a folder or a foreign text is only named."""
        if re.match(r"[a-z]+:", target):
            return f"[{said}]({target})"
        target, _, part = target.partition("#")
        part = f"#{part.lower()}" if part else ""  # Jupyter keeps a heading's capitals, everybody else lowers them
        there = os.path.normpath(os.path.join(os.path.dirname(page), target)) if target else page
        here = PurePosixPath(os.path.relpath(site_path(there), os.path.dirname(site_path(page)) or "."))
        if there.startswith("tools/site/pages/"):
            return f'<a href="{here}{part}">{said}</a>'
        if site_path(there) in self.pages:
            return f"[{said}]({here if target else ''}{part})"
        if there.endswith((".ipynb", ".md")) or not (ROOT / there).is_file():
            return f"{said} (`{there}`)"
        self.files.add(there)
        return f"[{said}]({here})"


def tagged(kind: str, says: str):
    """A processor in nbdev's manner: cells with this directive get a class that the style sheet knows."""
    def processor(cell):
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), says]
    processor.__name__ = f"{kind}_"
    return processor


def folded(cell) -> None:
    """Quarto's directives, which nbdev leaves in the text of a cell: a folded cell is a folded one here."""
    said = cell.directives_ if cell.cell_type == "code" else {}
    if said.get("code-fold:") == ["true"]:
        cell.metadata["tags"] = [*cell.metadata.get("tags", []), "hide-cell"]
        title = " ".join(said.get("code-summary:", ["Code"])).strip("\"'")
        cell.metadata["mystnb"] = {"code_prompt_show": title, "code_prompt_hide": title}
    if any(word.endswith(":") for word in said):
        cell.source = re.sub(r"\A(?:#\| *[\w-]+:.*\n?)+", "", cell.source)


def processed(name: str, links: Links) -> dict:
    """A notebook with nbdev's directives applied and links that hold on the site."""
    from execnb.nbio import nb2dict, read_nb
    from nbdev.process import NBProcessor
    from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_header_dash, strip_ansi

    def default_exp_(cell, *_):
        del cell["source"]

    def move_links(cell):
        if cell.cell_type == "markdown":
            cell.source = links.moved(cell.source, f"nbs/{name}.ipynb")
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}):
                text = links.moved("".join(output["data"]["text/markdown"]), f"nbs/{name}.ipynb")
                # Sphinx leaves the links of outputs alone, so here they get the name that the page will have.
                output["data"]["text/markdown"] = re.sub(r"(\]\([^)\s:]+)\.(?:ipynb|md)(?=[)#])", r"\1.html", text)

    notebook = read_nb(ROOT / "nbs" / f"{name}.ipynb")
    flags = [tagged("export", "exported"), tagged("exporti", "exported"), tagged("slow", "slow"), tagged("gpu", "slow")]
    NBProcessor(nb=notebook, process=True, procs=[strip_ansi, hide_line, filter_stream_, rm_header_dash, clean_magics,
                                                  *flags, folded, default_exp_, hide_, move_links])
    for cell in [c for c in notebook.cells if "exported" in c.metadata.get("tags", [])][:1]:
        cell.metadata["tags"].append("first")  # it says what the mark means
    return nb2dict(notebook)


def headings(notebook: dict) -> list[str]:
    """For every cell the heading it stands under."""
    found, now = [], ""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            text = re.sub(r"^```.*?^```", "", "".join(cell["source"]), flags=re.M | re.S)
            now = ([now] + re.findall(r"^#+ +(.+?) *$", text, flags=re.M))[-1]
        found.append(LINK.sub(r"\1", now))
    return found


def pictures(notebook: dict, name: str, out: Path) -> list[tuple[str, str, str]]:
    """Give every picture among the outputs a label and words for those who cannot see it, and make its thumbnail."""
    from PIL import Image

    found, cells = [], []
    for cell, heading in zip(notebook["cells"], headings(notebook)):
        drawn = [o["data"]["image/png"] for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
        for png in drawn[:1]:
            label = f"figure-{name.replace('/', '-')}-{len(found) + 1}".replace("_", "-")
            cell["metadata"].setdefault("mystnb", {})["image"] = {"alt": f"Figure: {re.sub('[`$]', '', heading)}"}
            cells.append({"cell_type": "markdown", "metadata": {}, "source": f"({label})="})
            picture = Image.open(io.BytesIO(base64.b64decode("".join(png)))).convert("RGB")
            picture.thumbnail((THUMB, THUMB))
            (out / "thumbnails").mkdir(exist_ok=True)
            picture.quantize(64).save(out / "thumbnails" / f"{label}.png", optimize=True)
            found.append((label, heading, name))
        cells.append(cell)
    notebook["cells"] = cells
    return found


def gallery(shown: list[tuple[str, str, str]], titles: dict[str, str]) -> str:
    """The page of all pictures, in reading order."""
    said = f"The {len(shown)} figures of the notebooks in reading order. Each leads to where it is drawn and read."
    beside = ('Beside them stand <a href="pages/try_it.html">a page to try pruning by hand</a> and '
              '<a href="pages/slides.html">slides of the chapters</a>.')
    lines = ["---", "nosearch: true", "---", "# Gallery", "", said, beside, ""]  # its words are those of the pages
    for page, found in itertools.groupby(shown, lambda s: s[2]):
        lines += [f"## {titles[page]}", "", "::::{container} gallery"]
        for label, heading, _ in found:
            alt = re.sub(r"[`$\[\]]", "", heading)
            lines += [":::{container} shot", f"[![{alt}](thumbnails/{label}.png)](#{label})", "", heading, ":::"]
        lines += ["::::", ""]
    return "\n".join(lines)


def contents(names: list[str], titles: dict[str, str]) -> str:
    """The table of contents, which the index page gets: what stands beside every page."""
    lines = []

    def part(caption, entries):
        lines.extend(["```{toctree}", ":hidden:", f":caption: {caption}", "", *entries, "```", ""])

    for title, found in groups(names):
        numbered = {n: f"{int(n[:2])} {titles[n]} <{n}>" for n in found if re.match(r"\d\d_", n)}
        part(title, [numbered.get(n, n) for n in found])
    part("Reference", ["api/index", "gallery"])
    part("The project", texts())
    return "\n".join(lines)


def title_of(notebook: dict) -> str:
    """A notebook's first heading."""
    return next(m[1] for c in notebook["cells"] if (m := re.match(r"# +(.+)", "".join(c["source"]))))


def stage(out: Path, names: list[str]) -> None:
    """Write the sources of the site into an emptied folder."""
    import nbformat
    from reference import reference

    from tools.slides import CHOSEN, deck

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    links = Links(names)
    notebooks = {name: processed(name, links) for name in names}
    titles = {name: title_of(notebook) for name, notebook in notebooks.items()}
    shown = [picture for name in names for picture in pictures(notebooks[name], name, out)]
    index = notebooks["index"]["cells"]
    index.append({"cell_type": "markdown", "metadata": {}, "source": contents(names, titles)})
    for name, notebook in notebooks.items():
        for number, cell in enumerate(notebook["cells"]):
            cell["id"] = f"c{number:03d}"
        (out / f"{name}.ipynb").parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(nbformat.from_dict(notebook), out / f"{name}.ipynb")
    for name in texts():
        text = links.moved((ROOT / f"{name}.md").read_text(encoding="utf-8"), f"{name}.md")
        (out / f"{name}.md").write_text(text, encoding="utf-8")
    (out / "gallery.md").write_text(gallery(shown, titles), encoding="utf-8")
    (out / "api").mkdir()
    for name, text in reference(groups(names), titles).items():
        (out / "api" / f"{name}.md").write_text(text, encoding="utf-8")
    for name in sorted(links.files):
        (out / site_path(name)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / site_path(name))
    pages = out.parent / "extra" / "pages"  # self-contained ones, taken as they are
    shutil.copytree(ROOT / "tools/site/pages", pages, dirs_exist_ok=True)
    (pages / "slides.html").write_text(deck(CHOSEN), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tools.notebooks import floors

    target, asked = (sys.argv[1:2] or [ROOT / "_docs" / "source"])[0], sys.argv[2:]
    stage(Path(target), [n for n in floors() if not asked or n in {"index", *asked}])
