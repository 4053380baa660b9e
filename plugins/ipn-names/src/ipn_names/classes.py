"""The 1,000 ImageNet classes: how they are called, and which kinds of thing they are.

The table was written by `train/names.py` out of WordNet 3.0 (see NOTICE).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

from ipn_core.stages import Label

__all__ = ["article", "labels"]


@cache
def labels() -> tuple[Label, ...]:
    """Return the classes in the classifier's order."""
    text = files("ipn_names").joinpath("imagenet.tsv").read_text(encoding="utf-8")
    rows = [line.split("\t") for line in text.splitlines()]
    return tuple(Label(name, tuple(also.split(", ")) if also else ()) for _, name, also in rows)


def article(noun: str) -> str:
    """Return a noun with its article."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
