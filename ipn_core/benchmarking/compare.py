"""Two files of results against each other: what got worse, by how much, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from ipn_core.benchmarking.results import Results, Section
from ipn_core.benchmarking.rows import Row
from ipn_core.errors import DataError, near

__all__ = ["TOLERANCE", "Change", "Comparison", "Verdict", "compare", "ratio_interval"]

TOLERANCE = 0.05
"""How much worse a row may be unless told otherwise: two runs of the same program differ, too."""

PEAK = "peak_bytes"
IGNORED = ("command", "day")
"""What may differ between two files without a word."""

Verdict: TypeAlias = Literal["worse", "lost", "better", "found", "alike"]
REGRESSIONS = ("worse", "lost")


@dataclass(frozen=True, slots=True)
class Change:
    """One row of both files.

    Attributes:
        section, name: the row's.
        unit: of what is compared; a row's peak memory is compared as one of its own.
        verdict: "worse" or "better" where the whole interval is beyond the tolerance, "lost" where
            it was measured and now cannot be, "found" the other way round, else "alike".
        before, after: medians.
        ratio, low, high: how many times as bad it is now, with its 95 % interval; above 1 is worse
            whichever way is better. None where there is none.
        reasons: why it cannot be measured now, or could not before.
    """

    section: str
    name: str
    unit: str
    verdict: Verdict
    before: float | None = None
    after: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two files differ in.

    Attributes:
        changes: every row that is in both.
        only_before, only_after: rows of one of them, as "section: name".
        differs: what they were measured on, where that is not the same: (before, after) by
            "section: what".
        tolerance: how much worse a row may be.
    """

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    differs: dict[str, tuple[Any, Any]]
    tolerance: float

    @property
    def regressions(self) -> tuple[Change, ...]:
        """What is worse, or can no longer be measured."""
        return tuple(c for c in self.changes if c.verdict in REGRESSIONS)

    def drift(self, section: str) -> float | None:
        """Return the median ratio of a section: near 1 unless the machine was another one."""
        found = [c.ratio for c in self.changes if c.section == section and c.ratio is not None]
        return statistics.median(found) if found else None


def compare(
    before: Results,
    after: Results,
    *,
    tolerance: float = TOLERANCE,
    sections: Sequence[str] = (),
) -> Comparison:
    """Compare the rows that two files have in common, by section and name.

    Args:
        before: the older results.
        after: the newer ones.
        tolerance: how much worse or better a row may be and still be alike.
        sections: only these; all by default.

    Raises:
        DataError: a section is in neither, a row has another unit, or they have no row in common.
    """
    known = list(dict.fromkeys([*before.sections, *after.sections]))
    for name in sections:
        if name not in known:
            raise DataError(
                f"unknown section '{name}': these results have {', '.join(known) or 'none'}"
                f"{near(name, known)}."
            )
    changes: list[Change] = []
    only: tuple[list[str], list[str]] = ([], [])
    differs: dict[str, tuple[Any, Any]] = {}
    for name in sections or known:
        old, new = (r.sections.get(name, Section()) for r in (before, after))
        left, right = ({row.name: row for row in section.rows} for section in (old, new))
        only[0].extend(f"{name}: {row}" for row in left if row not in right)
        only[1].extend(f"{name}: {row}" for row in right if row not in left)
        both = [(left[row], right[row]) for row in left if row in right]
        if both:
            differs |= _differing(name, old, new)
        for one, other in both:
            changes += _changes(name, one, other, tolerance)
    if not changes:
        raise DataError(
            "the two files have no row in common: "
            f"{sum(len(s.rows) for s in before.sections.values())} and "
            f"{sum(len(s.rows) for s in after.sections.values())} rows of other names. Compare "
            "results of the same benchmarks."
        )
    return Comparison(tuple(changes), tuple(only[0]), tuple(only[1]), differs, tolerance)


def ratio_interval(before: Row, after: Row) -> tuple[float, float, float]:
    """Return how many times as large a median is, and the 95 % interval of that.

    The logarithms' intervals are put together by the square root of the sum of their squares
    (MOVER; Zou and Donner, Statistics in Medicine 27, 2008). It holds for two independent runs and
    knows nothing of what differs from one process to the next.

    Args:
        before: measured, all of it above zero, and so is the other.
        after: what is divided by it.
    """
    a, a_low, a_high = (math.log(v or 0) for v in (before.median, before.low, before.high))
    b, b_low, b_high = (math.log(v or 0) for v in (after.median, after.low, after.high))
    low = b - a - math.hypot(b - b_low, a_high - a)
    high = b - a + math.hypot(b_high - b, a - a_low)
    return math.exp(b - a), math.exp(low), math.exp(high)


def _differing(name: str, old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
    keys = [key for key in {**old.about, **new.about} if key not in IGNORED]
    return {
        f"{name}: {key}": (old.about.get(key), new.about.get(key))
        for key in keys
        if old.about.get(key) != new.about.get(key)
    }


def _changes(section: str, old: Row, new: Row, tolerance: float) -> Iterator[Change]:
    if (old.unit, old.better) != (new.unit, new.better):
        raise DataError(
            f"row '{old.name}' of '{section}' is in {old.unit} ({old.better} is better) in one "
            f"file and in {new.unit} ({new.better} is better) in the other. Measure both with one "
            "version."
        )
    if old.median is None or new.median is None:
        verdict: Verdict = "alike"
        if (old.median is None) != (new.median is None):
            verdict = "lost" if new.median is None else "found"
        reasons = new.reasons or old.reasons
        yield Change(section, old.name, old.unit, verdict, old.median, new.median, reasons=reasons)
        return
    yield _change(section, old, new, tolerance)
    if PEAK in old.more and PEAK in new.more:
        name = f"{old.name}, peak memory"
        one, other = (Row.of(name, [row.more[PEAK]], unit="bytes") for row in (old, new))
        yield _change(section, one, other, tolerance)


def _change(section: str, old: Row, new: Row, tolerance: float) -> Change:
    numbers = [v for row in (old, new) for v in (row.median, row.low, row.high)]
    if any(v is None or v <= 0 for v in numbers):
        verdict: Verdict = "alike" if old.median == new.median else "worse"
        if verdict == "worse" and _is_less(new, old) == (old.better == "lower"):
            verdict = "better"
        return Change(section, old.name, old.unit, verdict, old.median, new.median)
    worse = (old, new) if old.better == "lower" else (new, old)
    ratio, low, high = ratio_interval(*worse)
    verdict = "alike"
    if low > 1 + tolerance:
        verdict = "worse"
    elif high < 1 / (1 + tolerance):
        verdict = "better"
    return Change(section, old.name, old.unit, verdict, old.median, new.median, ratio, low, high)


def _is_less(one: Row, other: Row) -> bool:
    return (one.median or 0.0) < (other.median or 0.0)
