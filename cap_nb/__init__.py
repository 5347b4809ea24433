"""Causal Attribution Pruning of reasoning language models, and the methods that it is compared with.

`from cap_nb.all import *` brings every public name; the program is `cap`, and `cap --help` lists its commands.
"""
__version__ = "0.1.0"


def __getattr__(name: str):
    "A public name is imported when it is first asked for (PEP 562); `cap_nb.all` knows where it lives."
    if name.startswith("_"): raise AttributeError(f"cap_nb has no public name {name!r}.")
    from .all import public
    return public(name)


def __dir__():
    from .all import __all__
    return [*globals(), *__all__]
