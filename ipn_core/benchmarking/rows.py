"""`Row`: what one benchmark measured of one thing, or why it could not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, Self, TypeAlias

from pydantic import Field, model_validator

from ipn_core.config import Config

__all__ = ["Row", "Value", "median_interval"]

Value: TypeAlias = str | bool | int | float | None

CONFIDENCE = 0.95
_OF = 10_000


class Row(Config):
    """One line of a section; all numbers but `samples` are None where nothing was measured.

    Attributes:
        name: unique in its section and the same in every run: results are compared by it.
        case: what was measured: shape, dtype, backend, …
        unit: of the median: "s", "ratio", "bytes", "tokens/s", …
        better: which way is better.
        median: of the samples.
        low, high: the 95 % interval of the median (`median_interval`).
        p20, p80: quantiles of the samples.
        samples: how many there were.
        error: the largest difference from what it must be, relative to the largest value there.
        reasons: why it was not measured, or what is wrong with what it computes; empty if neither.
        goal: what the median must not be worse than.
        more: further numbers, such as "peak_bytes", "flops" and "bytes".
    """

    name: str = Field(min_length=1)
    case: Mapping[str, Value] = Field(default_factory=dict)
    unit: str = "s"
    better: Literal["lower", "higher"] = "lower"
    median: float | None = None
    low: float | None = None
    high: float | None = None
    p20: float | None = None
    p80: float | None = None
    samples: int = Field(default=0, ge=0)
    error: float | None = None
    reasons: tuple[str, ...] = ()
    goal: float | None = None
    more: Mapping[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        spread = (self.low, self.high, self.p20, self.p80)
        missing = [value is None for value in (self.median, *spread)]
        if any(missing) and not all(missing):
            raise ValueError(f"row '{self.name}' must have a median with its interval, or neither")
        if self.median is None and not self.reasons:
            raise ValueError(f"row '{self.name}' has no median and does not say why")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"row '{self.name}' has an interval whose end is before its start")
        return self

    @classmethod
    def of(
        cls,
        name: str,
        samples: Sequence[float],
        case: Mapping[str, Value] | None = None,
        *,
        unit: str = "s",
        better: Literal["lower", "higher"] = "lower",
        error: float | None = None,
        goal: float | None = None,
        more: Mapping[str, float] | None = None,
    ) -> Self:
        """Sum samples up.

        Args:
            name: as the attribute, and so are the others.
            samples: one or more.
            case: as the attribute.
            unit: as the attribute.
            better: as the attribute.
            error: as the attribute.
            goal: as the attribute.
            more: as the attribute.
        """
        low, high = median_interval(samples)
        p20, p80 = _fifths(samples)
        return cls(
            name=name,
            case=case or {},
            unit=unit,
            better=better,
            median=_rounded(statistics.median(samples)),
            low=_rounded(low),
            high=_rounded(high),
            p20=_rounded(p20),
            p80=_rounded(p80),
            samples=len(samples),
            error=error,
            goal=goal,
            more=more or {},
        )

    @classmethod
    def refused(
        cls,
        name: str,
        reasons: Sequence[str],
        case: Mapping[str, Value] | None = None,
        *,
        error: float | None = None,
        unit: str = "s",
    ) -> Self:
        """Return the row of what was not measured.

        Args:
            name: as the attribute, and so are the others.
            reasons: one or more.
            case: as the attribute.
            error: as the attribute.
            unit: as the attribute.
        """
        return cls(name=name, case=case or {}, unit=unit, error=error, reasons=tuple(reasons))

    def misses_goal(self, slack: float = 0.0, *, surely: bool = False) -> bool:
        """Return whether the median is worse than the goal, by more than a share of it.

        Args:
            slack: the share, such as 0.2.
            surely: ask this of the better end of the interval, not of the median.
        """
        if self.goal is None or self.median is None:
            return False
        if self.better == "lower":
            return ((self.low if surely else self.median) or 0.0) > self.goal * (1 + slack)
        return ((self.high if surely else self.median) or 0.0) < self.goal / (1 + slack)


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median by order statistics, whatever the distribution.

    It runs from the k-th smallest to the k-th largest sample, for the largest k with
    `2 · P(Binomial(n, ½) < k) <= 0.05`; of fewer than six samples it is all there is, which holds
    the median with a probability of 1 − 2^(1−n) only.

    Args:
        samples: n of one or more, taken independently.
    """
    ordered = sorted(samples)
    n = len(ordered)
    below, ways, k = 0, 1, 0  # whole numbers: of thousands of samples, no float holds them
    while 2 * (below + ways) * _OF <= round((1 - CONFIDENCE) * _OF) * (1 << n):
        below += ways
        ways = ways * (n - k) // (k + 1)
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def _fifths(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) == 1:
        return samples[0], samples[0]
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return low, high


def _rounded(number: float) -> float:
    """Round to six digits, which no clock exceeds and which a file shows well."""
    return float(f"{number:.6g}")
