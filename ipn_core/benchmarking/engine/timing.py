"""Timing things in turn, and ratios that a busy machine does not move."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ipn_core.benchmarking.turns import turns
from ipn_core.processors import allowed_threads

__all__ = ["Timed", "collected", "in_turn", "ratios", "threads", "timing"]

Timed = dict[str, float]


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratios within each repetition."""
    return [a / b for a, b in zip(over, under, strict=True)]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let so many threads work inside the block, by default one a CPU that may be used."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or allowed_threads().number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def timing(into: Timed, name: str) -> Iterator[None]:
    """Count the seconds of the block, with all that it has a GPU do."""
    _settle()
    started = time.perf_counter()
    yield
    _settle()
    into[name] = time.perf_counter() - started


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turn(
    rows: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 2
) -> Iterator[tuple[Timed, dict[str, Any]]]:
    """Run all rows, again and again; yields the seconds and the results of each repetition.

    Args:
        rows: by name; each repetition has its own order.
        repeats: how often.
        warm_up: further repetitions before them, which are not yielded.
    """
    for repeat, order in enumerate(turns(list(rows), warm_up + repeats), start=-warm_up):
        timed: Timed = {}
        results = {}
        for name in order:
            with timing(timed, name):
                results[name] = rows[name]()
        if repeat >= 0:
            yield {name: timed[name] for name in rows}, results


def collected(repetitions: Iterator[tuple[Timed, Any]]) -> dict[str, list[float]]:
    """Return the seconds of each row."""
    found: dict[str, list[float]] = {}
    for timed, _ in repetitions:
        for name, seconds in timed.items():
            found.setdefault(name, []).append(seconds)
    return found
