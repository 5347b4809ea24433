"""Link the first use of each term of the glossary, in chapters 00 to 06, to nbs/teaching/01_glossary.ipynb.

    python tools/glossary.py    sets the links anew: old ones are taken out first (a test says where they are not so)

A term is linked where the chapters first use it, and where the chapter that introduces it does. Headings, quotations,
tables, formulas, code and other links are left alone. A paragraph that gains a link is wrapped again.
"""
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
GLOSSARY = ROOT / "nbs" / "teaching" / "01_glossary.ipynb"
CHAPTERS = sorted((ROOT / "nbs").glob("0[0-6]_*.ipynb"))
WIDTH = 120
FORMS = {  # How a term is written, where it is not the term with or without a plural s
    "accuracy": r"accurac(?:y|ies)", "criterion": r"criteri(?:on|a)", "holm correction": r"Holm's correction",
    "stratum": "strat(?:um|a)", "wilson interval": r"Wilson's (?:score )?interval",
    "strict answer": "strict answers?|strictly", "lenient answer": "lenient (?:answers?|reading)|leniently", "cut-off": "cut off",
    "median aggregation": "medians?", "paired difference": "paired(?: differences?)?", "greedy decoding": "greedy decoding|greedily",
    "held-out": "held[- ]out", "cross-entropy": "cross-entropy"}
AT_HOME_ONLY = {"decided", "cut-off", "target", "subset", "tie", "head"}  # Words that other chapters use in other senses
APART = re.compile(r"(`[^`]*`|\$[^$]*\$|!?\[(?:[^][]|\[[^][]*\])*\]\([^)]*\)|<[^>]+>)")  # Code, formulas, links, tags
KEPT = "\ue000"  # Stands for a space at which no line ends
MADE = re.compile(r"\[([^][]+)\]\(teaching/01_glossary\.ipynb#[^)]*\)")


@dataclass(frozen=True)
class Entry:
    """A term of the glossary."""
    term: str
    text: str  # What stands under its heading
    home: Path  # The notebook that introduces it

    @property
    def anchor(self) -> str:
        return slug(self.term)

    @property
    def pattern(self) -> re.Pattern:
        """The term in prose; words may be parted by a line's end."""
        form = FORMS.get(self.term, re.escape(self.term).replace(r"\ ", " ") + "s?")
        return re.compile(rf"(?<![\w-])(?:{form})(?![\w-])".replace(" ", r"\s+"), re.I)


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub and Sphinx make it; of a heading in small letters, Jupyter's too."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def markdown(path: Path) -> list[str]:
    """The texts of a notebook's Markdown cells."""
    return [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]


def entries() -> list[Entry]:
    """The glossary's terms, in its order."""
    found = []
    for text in markdown(GLOSSARY):
        for part in re.split(r"^### ", text, flags=re.M)[1:]:
            term, _, says = part.partition("\n")
            home = re.search(r"Introduced\s+in\s+\[[^\]]+\]\(([^)#]+)\)\.\s*$", says)
            if not home:
                raise ValueError(f"{term!r} does not end with 'Introduced in [page](path.ipynb).'")
            found.append(Entry(term.strip(), says.strip(), (GLOSSARY.parent / home[1]).resolve()))
    return found


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph may hold links: no heading, quotation, table, formula, code, nor what comes in and goes out."""
    return not re.match(r"#|>|\||\$\$|```|    |<|!\[|Next:|Paper:|Source:", paragraph) and "$$" not in paragraph and "\n|" not in paragraph


def wrapped(paragraph: str) -> str:
    """A plain paragraph at the notebooks' width; one with a list keeps its lines and lets long ones go on below."""
    paragraph = "".join(re.sub(r"\s+", KEPT, p) if i % 2 and p[0] in "`$" else p for i, p in enumerate(APART.split(paragraph)))
    if not re.search(r"^\s*(?:[-*+]|\d+\.) ", paragraph, flags=re.M):
        lines = textwrap.wrap(" ".join(paragraph.split()), WIDTH, break_long_words=False, break_on_hyphens=False)
        if not any(re.match(r"(?:[-*+>#|]|\d+\.)(?: |$)", line) for line in lines[1:]):
            return "\n".join(lines)
    lines = []
    for line in paragraph.split("\n"):
        indent = " " * len(re.match(r"\s*(?:(?:[-*+]|\d+\.) )?", line)[0])
        lines += [line] if len(line) <= WIDTH else textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False,
                                                                 break_on_hyphens=False)
    return "\n".join(lines)


def linked(paragraph: str, entry: Entry) -> str | None:
    """The paragraph with the term's first use as a link; None where it does not use it."""
    parts = APART.split(paragraph)
    for index in range(0, len(parts), 2):
        if match := entry.pattern.search(parts[index]):
            said = KEPT.join(match[0].split())
            link = f"[{said}](teaching/{GLOSSARY.name}#{entry.anchor})"
            parts[index] = parts[index][:match.start()] + link + parts[index][match.end():]
            return "".join(parts)
    return None


def set_links(texts: dict[Path, list[str]], terms: list[Entry]) -> dict[Path, list[str]]:
    """The Markdown of every chapter with each term linked; longer terms come first, so that none is cut."""
    plain = {path: [MADE.sub(r"\1", text) for text in cells] for path, cells in texts.items()}
    paragraphs = {path: [re.split(r"(\n{2,})", text) for text in cells] for path, cells in plain.items()}
    touched, order = set(), list(texts)
    for entry in sorted(terms, key=lambda e: (-len(e.term.split()), -len(e.term))):
        done = set()
        for path in order:
            first = not done and entry.term not in AT_HOME_ONLY
            if not first and path != entry.home:
                continue
            for i, cell in enumerate(paragraphs[path]):
                new = next(((j, made) for j, p in enumerate(cell) if is_prose(p) and (made := linked(p, entry))), None)
                if new and "**Exercises**" not in "".join(cell):
                    cell[new[0]] = new[1]
                    touched.add((path, i, new[0]))
                    done.add(path)
                    break
    for path, i, j in touched:
        paragraphs[path][i][j] = wrapped(paragraphs[path][i][j]).replace(KEPT, " ")
    return {path: ["".join(cell) for cell in cells] for path, cells in paragraphs.items()}


def main() -> None:
    after = set_links({path: markdown(path) for path in CHAPTERS}, entries())
    for path in CHAPTERS:
        notebook = nbformat.read(path, 4)
        for cell, text in zip((c for c in notebook.cells if c.cell_type == "markdown"), after[path]):
            cell.source = text
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
