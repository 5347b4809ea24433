"""Slides from the executed notebooks: title, equation, picture and summary of each, in one file that needs no network.

    python tools/slides.py    build/slides.html from chapters 00 to 06 and the traps

Pictures are embedded, formulas become MathML, style and script stand in the file. Arrow keys, space or a click turn the
page; printing gives a page a slide. nbconvert's own slides fetch reveal.js and MathJax from elsewhere, so they are not used.
"""
import html
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
CHOSEN = [*sorted((ROOT / "nbs").glob("0[0-6]_*.ipynb")), ROOT / "nbs" / "results" / "10_traps.ipynb"]
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$])\$([^$\n]+(?:\n[^$\n]+)?)\$", re.S)
STYLE = """
html { font: 22px/1.45 system-ui, sans-serif; color: #1c2733; background: #fff }
body { margin: 0 } h1 { font-size: 2.2rem } h2 { color: #2c5a8c } blockquote { margin: 0; font-size: 1.3rem }
section { display: none; box-sizing: border-box; min-height: 100vh; padding: 5vh 6vw; max-width: 56rem; margin: auto }
section.on { display: block } img { width: 100%; max-height: 52vh; object-fit: contain; object-position: left } 
math { font-family: "STIX Two Math", "Cambria Math", "Latin Modern Math", math } math[display=block] { font-size: 1.5rem; margin: 1em 0 }
code { font-size: .85em } table { border-collapse: collapse } td, th { padding: .2em .6em; border-bottom: 1px solid #ccc; text-align: left }
footer { position: fixed; right: 1rem; bottom: .5rem; font-size: .7rem; color: #777 }
@media (prefers-color-scheme: dark) { html { color: #e6e9ee; background: #15191f } h2 { color: #8cb8e8 } img { background: #fff } }
@media print { section { display: block; break-after: page; min-height: 0 } footer { display: none } }
"""
SCRIPT = """
const slides = document.querySelectorAll("section"), number = document.querySelector("footer");
let at = Math.min(slides.length, Math.max(1, parseInt(location.hash.slice(1)) || 1)) - 1;
function show(to) {
  at = Math.min(slides.length - 1, Math.max(0, to));
  slides.forEach((slide, i) => slide.classList.toggle("on", i === at));
  number.textContent = `${at + 1} / ${slides.length}`;
  history.replaceState(null, "", `#${at + 1}`); scrollTo(0, 0);
}
addEventListener("keydown", e => { if (["ArrowRight", "PageDown", " "].includes(e.key)) { e.preventDefault(); show(at + 1) }
  if (["ArrowLeft", "PageUp"].includes(e.key)) show(at - 1) });
addEventListener("click", e => show(at + (e.clientX < innerWidth / 4 ? -1 : 1)));
show(at);
"""


def formula(tex: str, display: bool) -> str:
    """A formula as MathML; one that the converter refuses stays as it was written."""
    from latex2mathml.converter import convert

    try:
        return convert(tex.strip().replace(r"\setminus", r"\backslash"), display="block" if display else "inline")
    except Exception as error:  # its own kinds of error are many
        print(f"left as written: {tex.strip()} ({error!r})", file=sys.stderr)
        return f"<code>{html.escape(tex)}</code>"


def rendered(text: str) -> str:
    """Markdown as HTML, formulas as MathML, links to other pages as plain words."""
    import mistune

    kept = []

    def keep(match):
        kept.append(formula(match[1] or match[2], bool(match[1])))
        return f"\ue000{len(kept) - 1}\ue001"

    code = re.split(r"(`[^`]*`)", text)
    text = "".join(part if i % 2 else MATH.sub(keep, part) for i, part in enumerate(code))
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?![a-z]+://)[^)]*\)", r"\1", text)
    made = mistune.create_markdown(plugins=["table", "strikethrough"])(text)
    return re.sub("\ue000(\\d+)\ue001([,.;:)]?)", lambda match: f'<span style="white-space: nowrap">{kept[int(match[1])]}{match[2]}</span>', made)


def title_and_sentence(cells: list[dict]) -> tuple[str, str]:
    """What a notebook opens with."""
    first = next(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    title, quote = re.search(r"^# (.+)$", first, re.M), re.search(r"^((?:>.*\n?)+)", first, re.M)
    return title[1], " ".join(line.lstrip("> ") for line in quote[1].splitlines()) if quote else ""


def heading_before(cells: list[dict], index: int, upto: str = "") -> str:
    """The last heading above a place in a notebook."""
    texts = [cell["source"] for cell in cells[:index] if cell["cell_type"] == "markdown"] + [upto]
    return (re.findall(r"^##+ (.+)$", "\n".join(texts), re.M) or [""])[-1]


def equation(cells: list[dict]) -> tuple[str, str] | None:
    """The first displayed formula under a heading that promises one, else the first, with the paragraph that leads to it."""
    found = []
    for index, cell in enumerate(cells):
        for match in re.finditer(r"\$\$.+?\$\$", cell["source"], re.S) if cell["cell_type"] == "markdown" else ():
            before = cell["source"][:match.start()]
            lead = before.strip().split("\n\n")[-1]
            found.append((heading_before(cells, index, before), f"{'' if lead.startswith(('#', '$$')) else lead}\n\n{match[0]}"))
    return next((one for one in found if "equation" in one[0].lower()), found[0] if found else None)


def picture(cells: list[dict]) -> tuple[str, str, str] | None:
    """The first picture among the outputs, as a data address, with the heading above it and the paragraph below."""
    for index, cell in enumerate(cells):
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                png = "".join(output["data"]["image/png"]).replace("\n", "")
                below = next((c["source"] for c in cells[index + 1:] if c["cell_type"] == "markdown"), "").split("\n\n")[0]
                whole = re.match(r"(?!#).*[.?!)](?=\s|$)", below, re.S)  # Whole sentences: what leads on to a formula is no caption
                return heading_before(cells, index), whole[0] if whole else "", f"data:image/png;base64,{png}"
    return None


def summary(cells: list[dict]) -> str:
    """The text under the heading Summary, without the exercises."""
    text = "\n\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
    found = re.search(r"^## Summary\n(.+?)(?=^\*\*Exercises|^## |^Next:|\Z)", text, re.M | re.S)
    return found[1].strip() if found else ""


def slides_of(path: Path) -> list[str]:
    """A notebook's slides: title, equation, picture, summary; what it lacks is left out."""
    cells = nbformat.read(path, 4).cells
    title, sentence = title_and_sentence(cells)
    made = [f"<h1>{html.escape(title)}</h1><blockquote>{rendered(sentence)}</blockquote>"]
    if found := equation(cells):
        made.append(f"<h2>{html.escape(found[0] or title)}</h2>{rendered(found[1])}")
    if found := picture(cells):
        heading = html.escape(found[0] or title)
        made.append(f'<h2>{heading}</h2><img alt="{heading}" src="{found[2]}">{rendered(found[1])}')
    if text := summary(cells):
        made.append(f"<h2>{html.escape(title)}: summary</h2>{rendered(text)}")
    return made


def deck(paths: list[Path]) -> str:
    """The whole file."""
    sections = "\n".join(f"<section>{slide}</section>" for path in paths for slide in slides_of(path))
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>cap_nb: slides</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
            f"<body>\n{sections}\n<footer></footer><script>{SCRIPT}</script></body></html>\n")


def main() -> None:
    out, text = ROOT / "build" / "slides.html", deck(CHOSEN)
    out.parent.mkdir(exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"{text.count('<section>')} slides in {out}")


if __name__ == "__main__":
    main()
