"""Make README.md, cap_nb/all.pyi, cap_nb/__init__.pyi, cap_nb/methods.txt and cap_nb/names.json; tests/test_tools.py sees whether they are up to date.

`cap_nb` and `cap_nb.all` import a public name when it is first asked for, which type checkers and editors cannot follow.
The stubs say where each name lives; they are read and never run. The list of methods is what `cap methods` prints, so
that it need not load the methods; the names are those of tasks, methods and the like, by which a typo is told before
torch is imported.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def names() -> dict[str, list[str]]:
    """What is named -> names, from the lists by which the modules themselves check them."""
    from cap_nb.core.registry import ALLOCATIONS, ATTRIBUTIONS, CRITERIA, FORMATS, RECOVERIES, TASKS
    from cap_nb.data.problems import TEXTS
    from cap_nb.data.prompts import PROMPT_STYLES
    from cap_nb.experiments.variants import VARIANTS
    from cap_nb.methods.neurons import UNIT_AWARE
    from cap_nb.methods.prune import OTHERS, READINGS
    from cap_nb.methods.resumed_scoring import TARGETS
    from cap_nb.methods.selection import TIES
    from cap_nb.models.decoding import WRITERS
    from cap_nb.models.loading import DTYPES
    from cap_nb.portable.quantised import GGUF_TYPES
    from cap_nb.portable.shrink import NEURON_SCORES
    from cap_nb.portable.speed import BACKENDS
    from cap_nb.regions import SHARING
    from cap_nb.scoring import AGGREGATIONS

    lists = {
        "task": TASKS, "prompt style": PROMPT_STYLES, "text": TEXTS, "dtype": (*DTYPES, "fastest"), "GGUF dtype": GGUF_TYPES,
        "aggregation": AGGREGATIONS, "score target": TARGETS, "backend": WRITERS, "way to compute": BACKENDS, "key-value sharing": SHARING,
        "treatment of ties": TIES, "score of neurons": NEURON_SCORES, "method": (*CRITERIA, *OTHERS), "attribution": (*ATTRIBUTIONS, *UNIT_AWARE, *READINGS),
        "allocation": ALLOCATIONS, "recovery": RECOVERIES, "variant": VARIANTS, "format": sorted(FORMATS)}
    return {what: list(each) for what, each in lists.items()}


def stubs() -> dict[Path, str]:
    """The files by path."""
    sys.path.insert(0, str(ROOT))
    from cap_nb.all import public_names
    from cap_nb.methods.prune import method_list
    from tools.readme import readme

    homes = public_names(ROOT / "cap_nb")
    lines = [f"from {home} import {name} as {name}" for name, home in sorted(homes.items())]
    made = "# Made by tools/stubs.py from the modules' __all__."
    text = "\n".join([made, *lines, ""])
    here = ROOT / "cap_nb"
    return {ROOT / "README.md": readme(), here / "all.pyi": text, here / "__init__.pyi": f"{made}\nfrom cap_nb.all import *  # noqa: F403, in a stub a star exports again\n\n__version__: str\n", here / "methods.txt": method_list() + "\n",
            here / "names.json": json.dumps(names(), indent=1) + "\n"}


if __name__ == "__main__":
    for path, text in stubs().items():
        path.write_text(text, encoding="utf-8")
