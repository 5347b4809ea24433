"""Causal Attribution Pruning: mask each attention head of a language model, measure how much its reasoning suffers, prune.

    model, tokenizer = load_model("lab")                 # or a folder, or a hub id
    losses = score_heads(model, calibration_set(tokenizer))
    factors = importance_factors(causal_scores(losses))
    report = prune(model, "cap", 0.5, factors)           # in place; other methods: `cap methods`

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
