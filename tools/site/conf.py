"""Sphinx's settings for the site, whose sources tools/site/stage.py lays out under _docs/source."""
import atexit
import configparser
import json
import shutil
import subprocess
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.errors import ExtensionError
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging

HERE = Path(__file__).resolve().parent
KATEX = HERE.parents[1] / "_docs" / "node" / "node_modules" / "katex" / "dist"
parser = configparser.ConfigParser()
parser.read(HERE.parents[1] / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

project, author, copyright = settings["lib_name"], settings["author"], settings["copyright"]
version = release = settings["version"]
extensions = ["myst_nb"]
exclude_patterns = ["thumbnails"]
nitpicky = True
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}  # they would come from a distant server
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_dmath_double_inline = True
myst_heading_anchors = 6
html_math_renderer = "katex"
html_theme = "sphinx_book_theme"
html_title = f"{project} {version}"
html_css_files, html_js_files = ["katex.min.css", "site.css"], ["site.js"]
html_show_sourcelink = html_copy_source = False
html_theme_options = {"home_page_in_toc": True, "use_download_button": False, "use_fullscreen_button": False,
                      "show_toc_level": 2, "show_navbar_depth": 1, "navigation_with_keys": False,
                      "navbar_persistent": []}
html_context = {"default_mode": "auto"}
toc_object_entries_show_parents = "hide"
add_module_names = False

# KaTeX as a server: a formula a line in, its HTML a line out.
SERVER = """const katex = require(process.argv[1]);
require("readline").createInterface({input: process.stdin}).on("line", line => {
  const [tex, displayMode] = JSON.parse(line);
  let said;
  try { said = {html: katex.renderToString(tex, {displayMode, strict: "error"})}; }
  catch (e) { said = {error: String(e)}; }
  console.log(JSON.stringify(said)); });"""


class Katex:
    """Formulas become HTML (and MathML for those who listen) while the site is built."""
    server = None

    @classmethod
    def render(cls, tex: str, display: bool) -> dict:
        """The HTML of a formula, or what is wrong with it."""
        if cls.server is None:
            words = ["node", "-e", SERVER, str(KATEX / "katex.min.js")]
            cls.server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
            atexit.register(cls.server.kill)
        cls.server.stdin.write(json.dumps([tex, display]) + "\n")
        cls.server.stdin.flush()
        return json.loads(cls.server.stdout.readline())

    @classmethod
    def visit(cls, display: bool):
        """How Sphinx writes a formula."""
        def visitor(writer, node):
            said = cls.render(node.astext(), display)
            if "error" in said:
                logging.getLogger(__name__).warning("formula %r: %s", node.astext(), said["error"], location=node)
            writer.body.append(writer.starttag(node, "div" if display else "span", "", CLASS="math"))
            writer.body.append(said.get("html", "") + ("</div>" if display else "</span>"))
            raise nodes.SkipNode
        return visitor, None


class LinksToTheReference(SphinxPostTransform):
    """The first time that a page names a public name as `code`, the name leads to the reference."""
    default_priority = 5

    def run(self, **options):
        if self.env.docname.startswith("api/"):
            return
        known, seen = self.env.get_domain("py").objects, set()
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().removesuffix("()")
            inside = (nodes.reference, nodes.title, addnodes.pending_xref)
            if f"cap_nb.{name}" not in known or name in seen or any(isinstance(p, inside) for p in ancestors(literal)):
                continue
            seen.add(name)
            docname = known[f"cap_nb.{name}"].docname
            uri = self.app.builder.get_relative_uri(self.env.docname, docname) + f"#cap_nb.{name}"
            link = nodes.reference("", "", literal.deepcopy(), refuri=uri, internal=True)
            literal.replace_self(link)


def ancestors(node):
    """A node's parents, the nearest first."""
    while (node := node.parent) is not None:
        yield node


def static_files(app):
    """The style sheet, the script and KaTeX's fonts, brought together."""
    if not KATEX.is_dir() or not shutil.which("node"):
        raise ExtensionError("Formulas are rendered by KaTeX, which `make docs` brings; that needs node and npm.")
    [static] = map(Path, app.config.html_static_path)
    shutil.copytree(KATEX / "fonts", static / "fonts", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.ttf"))
    for path in (KATEX / "katex.min.css", HERE / "site.css", HERE / "site.js"):
        shutil.copy(path, static)


def setup(app):
    """Beside the sources lie what stage.py found of self-contained pages, and the static files."""
    beside = Path(app.srcdir).parent
    (beside / "static").mkdir(exist_ok=True)
    app.config.html_static_path = [str(beside / "static")]
    app.config.html_extra_path = [str(beside / "extra")] if (beside / "extra").is_dir() else []
    app.add_html_math_renderer("katex", inline_renderers=Katex.visit(False), block_renderers=Katex.visit(True))
    app.add_post_transform(LinksToTheReference)
    app.connect("builder-inited", static_files)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
