"""Intervals and paired tests: how far a share of right answers, or a difference, can be trusted.

Questions about the same picture hang together, and so do all answers of one trained model. The
bootstrap here resamples both: clusters of questions, and runs, which is training with several
seeds. Its weights are products of how often a run and how often a cluster was drawn (Owen, "The
pigeonhole bootstrap", Annals of Applied Statistics 1, 2007).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "FEW_CLUSTERS",
    "Z95",
    "Interval",
    "bootstrap_difference",
    "bootstrap_mean",
    "by_pictures",
    "mcnemar",
    "wilson",
]

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""
DRAWS = 2000
"""Resamples of a bootstrap, unless told otherwise."""
FEW_CLUSTERS = 20
"""Of fewer, an interval from resampling them is too narrow too often to be trusted."""
BLOCK = 1 << 18
"""Numbers in the weights of one block of draws: 2 MB, which a processor keeps close."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval.

    Attributes:
        mean: the estimate from the data as it is.
        low, high: the 2.5 % and the 97.5 % quantile of the resampled estimates.
    """

    mean: float
    low: float
    high: float


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share, [0, 1] for n = 0.

    `(p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)` with p = right/n (Wilson, 1927). It
    takes the n answers as independent.
    """
    if n == 0:
        return 0.0, 1.0
    share, zz = right / n, Z95 * Z95
    centre = share + zz / (2 * n)
    spread = Z95 * math.sqrt(share * (1 - share) / n + zz / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + zz / n) for sign in (-1, 1))
    # Exact at the ends, where rounding would leave 1e-17.
    return (0.0 if right == 0 else low), (1.0 if right == n else high)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Return the exact two-sided p value of McNemar's test of two models on the same questions.

    Only the n questions that one answers rightly and the other wrongly count. If neither model
    were better, each would win such a question with probability 1/2, so that
    `p = min(1, 2·P(X <= the fewer wins))` with X binomial (n, 1/2); 1 where n = 0.

    It takes questions as independent: where many are about the same picture, p comes out too
    small, and the interval of `bootstrap_difference` is the one to go by.

    Raises:
        ValueError: there are not as many verdicts of one as of the other.
    """
    wins = sum(bool(a) and not b for a, b in zip(ours, theirs, strict=True))
    losses = sum(bool(b) and not a for a, b in zip(ours, theirs, strict=True))
    n = wins + losses
    # Binomial coefficients n over 0, 1, … and their sum: whole numbers, so that nothing is rounded.
    term = tail = 1
    for i in range(min(wins, losses)):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / (1 << n))


def by_pictures(names: Iterable[Sequence[str]]) -> list[Hashable]:
    """Return the cluster of each question: those about the same pictures form one.

    Args:
        names: the names of each question's pictures; a question without any is a cluster of its
            own.
    """
    return [tuple(sorted(set(each))) or index for index, each in enumerate(names)]


def bootstrap_mean(
    values: ArrayLike, clusters: Sequence[Hashable], *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Return the mean of all values and its 95 % percentile interval.

    Each draw takes as many runs as there are, and as many clusters of questions, both with
    replacement, and divides the sum of the values drawn by their number, so that clusters count
    by their size.

    What it cannot do: values that are all equal give no width (for a share, `wilson` does). One
    run says nothing about other seeds. A few runs say little: where three differ by far more than
    their questions explain, the interval is their range, which holds the mean of all seeds three
    times in four, not 95 times in a hundred. Where chance acts on every answer by itself, it is
    wider than it need be. Where all questions are one cluster, they are resampled one by one,
    and the interval holds for these pictures only.

    Args:
        values: (runs, questions), such as 1 for right and 0 for wrong.
        clusters: what each question hangs together by, such as its picture; see `by_pictures`.
        draws: number of resamples.
        seed: the same seed draws the same.

    Raises:
        ValueError: `values` is not (runs, questions), is empty, or does not fit `clusters`.
    """
    return _bootstrap([_checked(values, clusters)], clusters, draws, seed)


def bootstrap_difference(
    ours: ArrayLike,
    theirs: ArrayLike,
    clusters: Sequence[Hashable],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """Return the mean of ours minus theirs and its 95 % percentile interval.

    Both answer the same questions, and each draw takes the same clusters for both. Where both
    have the same number of runs, run i of either is drawn together: they share their seed, that
    is the order of the data and often where the weights started, and what that does to both is
    no difference between them. Otherwise there are no pairs, and each side's runs are drawn on
    their own. The limits are those of `bootstrap_mean`.

    Args:
        ours: (runs, questions).
        theirs: (runs, questions), the questions in the same order; runs in the order of the same
            seeds where there are as many.
        clusters: as for `bootstrap_mean`.
        draws: number of resamples.
        seed: the same seed draws the same.

    Raises:
        ValueError: a side is not (runs, questions), is empty, or does not fit `clusters`.
    """
    left, right = _checked(ours, clusters), _checked(theirs, clusters)
    sides = [left - right] if len(left) == len(right) else [left, -right]
    return _bootstrap(sides, clusters, draws, seed)


def _checked(values: ArrayLike, clusters: Sequence[Hashable]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"expected values (runs, questions), at least (1, 1), got {array.shape}.")
    if array.shape[1] != len(clusters):
        raise ValueError(f"got {array.shape[1]} questions, but the clusters of {len(clusters)}.")
    return array


def _bootstrap(
    sides: Sequence[NDArray[np.float64]], clusters: Sequence[Hashable], draws: int, seed: int
) -> Interval:
    """Return the interval of the sum of the sides' means, whose runs are drawn independently."""
    known: dict[Hashable, int] = {}
    index = np.array([known.setdefault(cluster, len(known)) for cluster in clusters])
    if len(known) == 1:
        index = np.arange(len(clusters))
    sizes = np.bincount(index).astype(np.float64)
    sums = [np.stack([np.bincount(index, run) for run in side]) for side in sides]
    draw = np.random.default_rng(seed)
    block = max(1, BLOCK // len(sizes))
    found = np.empty(draws)
    for start in range(0, draws, block):
        count = min(block, draws - start)
        weights = _counts(draw, len(sizes), count)
        total = sum(
            (_counts(draw, len(side), count) / len(side) * (weights @ side.T)).sum(axis=1)
            for side in sums
        )
        found[start : start + count] = total / (weights @ sizes)
    low, high = np.percentile(found, [2.5, 97.5])
    return Interval(float(sum(side.mean() for side in sides)), float(low), float(high))


def _counts(draw: np.random.Generator, n: int, rows: int) -> NDArray[np.float64]:
    """Return (rows, n): how often each of n came up in n draws with replacement."""
    drawn = draw.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
