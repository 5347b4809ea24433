"""The reference: for every public name of cap_nb.all its signature, its docstring, and what each parameter is.

fastcore's docments read the comments behind parameters and fields; the pages are MyST, in Sphinx's Python domain.
"""
import importlib
import inspect
import re


def plain(text: str) -> str:
    """Words of a comment or docstring, of which only `code` is markup."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if i % 2 else re.sub(r"([\\$<\[\]*_])", r"\\\1", p) for i, p in enumerate(parts))


def cell_text(text: str) -> str:
    """What may stand in a table's cell."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|")


def type_text(anno) -> str:
    """A type as one writes it: without the modules it comes from."""
    if anno in (inspect.Parameter.empty, None):
        return ""
    is_class = inspect.isclass(anno) and not getattr(anno, "__args__", None)
    text = anno if isinstance(anno, str) else anno.__name__ if is_class else str(anno)
    return f"`{cell_text(re.sub(r'(?:[a-z_0-9]+[.])+(?=[A-Za-z])', '', text))}`"


def table(thing) -> list[str]:
    """The parameters or fields of a public name, from the comments behind them (fastcore's docments)."""
    from fastcore.docments import docments

    rows, found = [], docments(thing, full=True, returns=True)
    if not any(doc.docment for doc in found.values()):
        return []
    for name, doc in found.items():
        if name in ("self", "cls") or (name == "return" and (inspect.isclass(thing) or not doc.docment)):
            continue
        has_default = doc.default is not inspect.Parameter.empty and name != "return"
        given = f"`{cell_text(default_text(doc.default))}`" if has_default else ""
        label = "*returns*" if name == "return" else f"`{name}`"
        rows.append(f"| {label} | {cell_text(plain(doc.docment or ''))} | {type_text(doc.anno)} | {given} |")
    return ["", "| name | what it is | type | default |", "|---|---|---|---|", *rows, ""] if rows else []


def default_text(value) -> str:
    """A default as a signature shows it."""
    if inspect.isfunction(value) or inspect.isclass(value):
        return value.__name__
    text = repr(value)
    return "…" if len(text) > 40 or "<" in text else text


def signature(thing) -> str:
    """Names and defaults; the types stand in the table."""
    try:
        said = inspect.signature(thing)
    except (TypeError, ValueError):
        return "()"
    shown = [p for name, p in said.parameters.items() if name not in ("self", "cls")]
    bare = [str(p.replace(annotation=p.empty, default=p.empty)) for p in shown]
    given = ["" if p.default is p.empty else f"={default_text(p.default)}" for p in shown]
    return f"({', '.join(map(str.__add__, bare, given))})"


def entry(name: str, thing, page: str, title: str) -> list[str]:
    """One public name: signature, docstring, table, and for a class its own methods and properties."""
    away = f"*From* [{title}](../{page}.ipynb)."
    if not callable(thing):
        kinds = ", ".join(f"`{cell_text(str(k))}`" for k in thing)
        return [f"::::{{py:data}} cap_nb.{name}", f"{len(thing)} entries: {kinds}. {away}", "::::", ""]
    kind = "class" if inspect.isclass(thing) else "function"
    about = (inspect.getdoc(thing) or "").partition("\n\n")[0]  # the parameters have a table
    said = f"{plain(about)} {away}"
    lines = [f"::::{{py:{kind}}} cap_nb.{name}{signature(thing)}", "", said, *table(thing)]
    for own, member in vars(thing).items() if kind == "class" else ():
        if not own.startswith("_") and (inspect.isfunction(member) or isinstance(member, OF_CLASS)):
            lines += of_class(own, member)
    return [*lines, "::::", ""]


OF_CLASS = (property, classmethod, staticmethod)


def of_class(name: str, member) -> list[str]:
    """A method or property of a public class."""
    said = ["", plain(inspect.getdoc(member) or "")]
    if isinstance(member, property):
        return [f":::{{py:property}} {name}", *said, ":::", ""]
    called = getattr(member, "__func__", member)
    flag = [] if called is member else [f":{type(member).__name__}:"]
    return [f":::{{py:method}} {name}{signature(called)}", *flag, *said, *table(called), ":::", ""]


def first_line(thing) -> str:
    """What a public name is, in a line."""
    return (inspect.getdoc(thing) or "").split("\n")[0] if callable(thing) else f"{len(thing)} entries"


def reference(groups: list[tuple[str, list[str]]], titles: dict[str, str]) -> dict[str, str]:
    """The pages of the reference by name: one of all names, and one for each group of notebooks."""
    public = importlib.import_module("cap_nb.all")
    # nbs/methods/10_wanda makes cap_nb.methods.wanda.
    home = {f"cap_nb.{re.sub(r'(^|/)[0-9]+_', r'/', name).strip('/').replace('/', '.')}": name for name in titles}
    found = {name: home[module] for name, module in sorted(public.HOMES.items()) if module in home}
    out, rows = {}, {}
    for title, names in groups:
        key = names[0].rpartition("/")[0] or ("chapters" if re.match(r"\d", names[0]) else "program")
        lines = [f"# {title}", ""]
        for page in names:
            mine = [name for name in found if found[name] == page]
            lines += [f"## {titles[page]}", ""] * bool(mine)
            for name in mine:
                thing = getattr(public, name)
                lines += entry(name, thing, page, titles[page])
                said = cell_text(plain(first_line(thing)))
                rows[name] = f"| {{py:obj}}`~cap_nb.{name}` | {said} | [{titles[page]}](../{page}.ipynb) |"
        if len(lines) > 2:
            out[key] = "\n".join(lines)
    out["index"] = "\n".join([
        "# Public names", "",
        f"`from cap_nb.all import *` gives all {len(rows)} of them, `from cap_nb import NAME` any one. What a",
        "parameter is stands in the comment behind it in the notebooks; these pages are made from those comments.", "",
        "| name | what it does | page |", "|---|---|---|", *(rows[name] for name in sorted(rows, key=str.lower)),
        "", "```{toctree}", ":hidden:", *out, "```", ""])
    return out
