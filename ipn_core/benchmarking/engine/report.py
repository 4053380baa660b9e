"""What `ipn bench engine` found, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ipn_core.benchmarking.engine.table import Found
    from ipn_core.benchmarking.rows import Row

__all__ = ["amount", "goal", "text"]


def text(found: Found) -> str:
    """Return a row of the table: what was timed, then the ratios, each with its goal."""
    return "\n".join(_lines(found))


def _lines(found: Found) -> Iterator[str]:
    yield f"{found.row}: {found.title}; {max(row.samples for row in found.rows)} repetitions"
    for row in found.rows:
        name = row.name.removeprefix(f"{found.row}/")
        if row.median is None or row.low is None or row.high is None:
            yield f"    {name:60}no: {'; '.join(row.reasons)}"
            continue
        median, low, high = (amount(x, row.unit) for x in (row.median, row.low, row.high))
        said = goal(row)
        yield f"    {name:60}{median:>11}   ({low} to {high}){said and f'   {said}'}"
    yield from (f"    {note}" for note in found.notes)


def goal(row: Row) -> str:
    """Return the goal of a ratio and whether it is met; nothing where there is none."""
    if row.goal is None:
        return ""
    bound = "at most" if row.better == "lower" else "at least"
    return f"goal {bound} {row.goal:g}: {'NOT MET' if row.misses_goal() else 'met'}"


def amount(value: float, unit: str) -> str:
    """Return a value in a unit of its size."""
    if unit == "ratio":
        return f"{value:.3f}" if abs(value) >= 0.05 else f"{value:.2g}"
    if unit == "bytes":
        return f"{value / 1e6:,.1f} MB" if abs(value) >= 1e5 else f"{value:,.0f} bytes"
    if unit != "s":
        return f"{value:,.1f} {unit}"
    if abs(value) >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.1f} µs"
