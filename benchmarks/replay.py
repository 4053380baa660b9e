"""Samples that were taken elsewhere, as pytest-benchmark would have taken them itself.

Its fixture times one function after the other. Rows that are compared are to be timed in turn, and
those on a GPU by its own events; so they are, and then pytest-benchmark is shown each sample on a
clock that stands still in between. Its tables, `--benchmark-json`, `--benchmark-autosave` and
`--benchmark-compare` are then about these samples. A test that uses `replay` is marked

    @pytest.mark.benchmark(timer=recorded)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["recorded", "replay"]

_now = [0.0]


def recorded() -> float:
    """Return the time on the clock that only `replay` moves."""
    return _now[0]


def replay(benchmark: Any, seconds: Sequence[float], group: str, **more: Any) -> None:
    """Give samples to the fixture of pytest-benchmark.

    Args:
        benchmark: the fixture.
        seconds: one or more samples.
        group: which rows are shown together.
        more: further facts for its JSON.
    """
    ahead = iter(seconds)

    def pass_() -> None:
        _now[0] += next(ahead)

    benchmark.group = group
    benchmark.extra_info.update(more)
    benchmark.pedantic(pass_, rounds=len(seconds))
