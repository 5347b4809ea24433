"""Walk through the built site in headless Chromium, as a reader would, and say what is wrong with it.

    python tools/site/walk.py

From the index by "Next" to the last page, then every other page of the sidebar and the reference. On each: pictures
load, formulas are rendered, links lead somewhere, nothing is fetched that is not a file of the site, the console stays
silent, and at a phone's width nothing is wider than the screen. Then the search, the switch from light to dark, the
page on which a reader prunes by hand, whose slider and heads are moved by keyboard and mouse, and the slides, which the
right arrow turns. A site that nobody can walk through, for want of playwright or Chromium, counts as a fault.
"""
import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
# A closed network, and nobody's own settings.
QUIET = ("--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync").split()
LOOK = """() => {
  const text = document.querySelector("article") || document.body, shown = e => e.getBoundingClientRect();
  text.querySelectorAll("details").forEach(fold => { fold.open = true; });
  const raw = document.createTreeWalker(text, NodeFilter.SHOW_TEXT), left = [];
  while (raw.nextNode()) {
    const {data, parentElement} = raw.currentNode;
    if (data.includes("$$") && !parentElement.closest("pre, code, annotation")) left.push(data.trim().slice(0, 60));
  }
  const pictures = [...document.images].filter(i => i.offsetParent !== null);
  const formulas = [...text.querySelectorAll(".math")];
  return {
    raw: left, pictures: pictures.length, formulas: formulas.length,
    unloaded: pictures.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.getAttribute("src")),
    empty: formulas.filter(f => !f.querySelector(".katex-html, mjx-container, svg, math")
                                || shown(f).width < 2 || shown(f).height < 2).map(f => f.textContent.slice(0, 60)),
    ids: [...document.querySelectorAll("[id]")].map(e => e.id),
    links: [...document.querySelectorAll("a[href]")].map(a => a.href),
    next: [...text.querySelectorAll("p")].filter(p => p.textContent.trim().startsWith("Next:"))
      .map(p => p.querySelector("a")?.href).pop(),
  };
}"""
WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll("article *")].filter(e => {
    for (let p = e.parentElement; p; p = p.parentElement) if (getComputedStyle(p).overflowX === "auto") return false;
    return e.getBoundingClientRect().right > innerWidth + 1;
  }).slice(0, 3).map(e => e.outerHTML.slice(0, 80)).concat([`${document.documentElement.scrollWidth} px`])"""

SLIDE = """() => [...document.querySelectorAll("section")].filter(s => s.offsetParent !== null).map(slide => {
  const pictures = [...slide.querySelectorAll("img")], formulas = [...slide.querySelectorAll("math")];
  return {
    number: document.querySelector("footer").textContent, words: slide.textContent.trim().length,
    pictures: pictures.length, formulas: formulas.length, raw: slide.textContent.includes("$$") ? ["$$"] : [],
    unloaded: pictures.filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.alt),
    empty: formulas.filter(f => f.getBoundingClientRect().width < 2 || f.getBoundingClientRect().height < 2)
      .map(f => f.textContent.slice(0, 60)),
  };
})"""


def chromium() -> str | None:
    """The browser of this machine: $CHROMIUM, or the first one found."""
    names = [os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


class Walk:
    """One reader, and what this reader found wrong."""

    def __init__(self, site: Path, page):
        self.site, self.page, self.faults, self.seen = site, page, [], {}
        page.on("console", lambda m: m.type in ("error", "warning") and self.fault(f"console: {m.text}"))
        page.on("pageerror", lambda e: self.fault(f"script: {e}"))
        page.on("request", lambda r: r.url.startswith(("file:", "data:")) or self.fault(f"asks for {r.url}"))
        page.on("requestfailed", lambda r: self.fault(f"did not get {r.url}: {r.failure}"))

    def fault(self, text: str) -> None:
        self.faults.append(f"{self.name(self.page.url)}: {text}")

    def name(self, url: str) -> str:
        return url.split("#")[0].removeprefix(self.site.as_uri() + "/")

    def visit(self, url: str) -> dict:
        """Open a page and look at it, at a desk's width and at a phone's."""
        self.page.set_viewport_size(DESK)
        self.page.goto(url, wait_until="load")
        found = self.page.evaluate(LOOK)
        for what in ("raw", "unloaded", "empty"):
            for each in found[what]:
                self.fault(f"{what}: {each}")
        self.page.set_viewport_size(PHONE)
        if wide := self.page.evaluate(WIDE):
            self.fault(f"wider than a phone: {wide}")
        self.seen[self.name(url)] = found
        return found

    def by_next(self) -> list[str]:
        """From the index by "Next" until it leads back there."""
        url, way = (self.site / "index.html").as_uri(), []
        while self.name(url) not in self.seen:
            way.append(self.name(url))
            following = self.visit(url)["next"]
            if not following:
                self.fault("there is no Next")
                return way
            url = following
        if self.name(url) != "index.html":
            self.fault(f"Next leads back to {self.name(url)}")
        return way

    def the_rest(self) -> None:
        """Every page that a page leads to; what they point at must be there."""
        def near():
            links = (u for found in self.seen.values() for u in found["links"])
            return {self.name(u) for u in links if u.startswith(self.site.as_uri())}
        while missing := sorted(n for n in near() - self.seen.keys() if n.endswith(".html") and "?" not in n):
            for name in missing:
                if (self.site / name).is_file():
                    self.visit((self.site / name).as_uri())
                else:
                    self.seen[name] = {"links": [], "ids": [], "pictures": 0, "formulas": 0}
                    self.faults.append(f"{name} is linked to and not there")
        for name, found in self.seen.items():
            for link in set(found["links"]):
                to, _, part = link.partition("#")
                if link.startswith("file:") and not (self.site / self.name(to)).exists():
                    self.faults.append(f"{name}: a link leads to {link}")
                elif part and self.name(to) in self.seen and part not in self.seen[self.name(to)]["ids"]:
                    self.faults.append(f"{name}: {self.name(to)} has no place #{part}")

    def search(self, words: str, wanted: str) -> None:
        """Ask the site's own search."""
        self.page.set_viewport_size(DESK)
        self.page.goto((self.site / "search.html").as_uri() + f"?q={words.replace(' ', '+')}")
        from playwright.sync_api import TimeoutError as Late

        try:
            self.page.wait_for_selector(f"#search-results a[href*='{wanted}']", timeout=10_000)
        except Late:
            self.fault(f"searching for {words!r} does not find {wanted}")

    def light_and_dark(self) -> None:
        """The switch changes the page's colours."""
        self.page.goto((self.site / "index.html").as_uri())
        seen = set()
        for mode in ("light", "dark"):
            self.page.locator("button.theme-switch-button:visible").first.click()
            self.page.locator(f"button.theme-change-button[data-mode={mode}]:visible").first.click(timeout=5000)
            seen.add(self.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        if len(seen) < 2:
            self.fault(f"the switch leaves the background {seen}")

    def prune_by_hand(self) -> None:
        """Slider, method and heads change the numbers they should, and two clicks on a head change nothing."""
        page, told = self.page, {}
        page.goto((self.site / "pages" / "try_it.html").as_uri())

        def expect(step, changed):
            seen = {part: page.inner_text(f"#{part}") for part in ("verdict", "shares", "answer")}
            if told and {part for part in seen if seen[part] != told[part]} != set(changed):
                self.fault(f"after {step} not {' and '.join(changed) or 'nothing'} changed")
            told.update(seen)

        expect("opening", ())
        page.press("#sparsity", "End")
        expect("the slider's end", ("verdict", "shares", "answer"))
        page.locator("#methods input").last.check()
        expect("another method", ("verdict", "shares", "answer"))
        page.press("#sparsity", "Home")
        page.locator("#heads button").first.focus()
        expect("the slider's start", ("verdict", "shares", "answer"))
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Space")
        expect("masking a head", ("verdict", "answer"))
        page.locator("#heads button[aria-pressed=true]").click()
        page.locator("#heads button").first.dblclick()
        expect("masking and freeing", ("verdict", "answer"))

    def slides(self) -> list[dict]:
        """From the first slide to the last by the right arrow; each shows something, its pictures load, its formulas are rendered."""
        self.page.set_viewport_size(DESK)
        self.page.goto((self.site / "pages" / "slides.html").as_uri(), wait_until="load")
        count, seen = self.page.locator("section").count(), []
        for number in range(1, count + 1):
            shown = self.page.evaluate(SLIDE)
            seen += shown[:1]
            if len(shown) != 1 or not shown[0]["words"] or shown[0]["number"] != f"{number} / {count}":
                self.fault(f"slide {number} of {count} is not the one that is shown")
            for what in ("raw", "unloaded", "empty"):
                for each in (each for slide in shown for each in slide[what]):
                    self.fault(f"slide {number}: {what}: {each}")
            self.page.keyboard.press("ArrowRight")
        return seen


def walk(site: Path) -> tuple[list[str], dict]:
    """What is wrong with a built site, and what was seen."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=QUIET)
        reader = Walk(site.resolve(), browser.new_page(viewport=DESK))
        way = reader.by_next()
        reader.the_rest()
        reader.search("importance factor", "02_importance.html")
        reader.light_and_dark()
        reader.prune_by_hand()
        slides = reader.slides()
        browser.close()
    return reader.faults, {"way": way, "pages": reader.seen, "slides": slides}


def main() -> None:
    if importlib.util.find_spec("playwright") is None:
        sys.exit("the site was not walked through: playwright is missing; make docs installs it, or pip install 'playwright>=1.50,<2'")
    if chromium() is None:
        sys.exit("the site was not walked through: there is no Chromium; install one, or name it in $CHROMIUM")
    began = time.time()
    faults, seen = walk(ROOT / "_docs" / "html")
    def counted(parts): return f"{sum(p['pictures'] for p in parts)} pictures, {sum(p['formulas'] for p in parts)} formulas"
    print(f"{len(seen['way'])} pages by Next, {len(seen['pages'])} in all: {counted(seen['pages'].values())}")
    print(f"{len(seen['slides'])} slides: {counted(seen['slides'])}; {time.time() - began:.0f} s, {len(faults)} faults")
    if faults:
        sys.exit("\n".join([*faults[:50], f"{len(faults)} faults"]))


if __name__ == "__main__":
    main()
