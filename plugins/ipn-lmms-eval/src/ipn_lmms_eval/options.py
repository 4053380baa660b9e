"""Generation options of lmms-eval's tasks as those of `IPN.generate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["MAX_NEW_TOKENS", "cut", "to_options"]

MAX_NEW_TOKENS = 1024
"""Of an answer where the task sets no limit, as with lmms-eval's own models."""
_LENGTHS = ("max_new_tokens", "max_gen_toks")
_STOPS = ("until", "stop_sequences")
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_OTHERS = ("image_aspect_ratio", "skip_special_tokens")
"""How LLaVA cuts pictures, which is the Perceiver's matter here, and what always is the case."""


def to_options(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the options of `IPN.generate`, and the texts that end an answer.

    As with lmms-eval's own models the temperature decides whether to sample, and `do_sample` where
    there is none. What is not listed here is passed on, so that the model refuses it by name.

    Args:
        given: `generation_kwargs` of the task, changed by `--gen_kwargs`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    lengths = [int(given.pop(name)) for name in _LENGTHS if name in given]
    found = [given.pop(name) for name in _STOPS if name in given]
    stops = [s for some in found for s in ([some] if isinstance(some, str) else some) if s]
    for name in _OTHERS:
        given.pop(name, None)
    asked = bool(given.pop("do_sample", False))
    sample = float(given["temperature"]) > 0 if "temperature" in given else asked
    if not sample:
        given = {name: value for name, value in given.items() if name not in _SAMPLING}
    options = {**given, "do_sample": sample, "max_new_tokens": (lengths or [MAX_NEW_TOKENS])[0]}
    return {**options, **({"stop_strings": stops} if stops else {})}, stops


def cut(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the first of the texts that end it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=None)]
