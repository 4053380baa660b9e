"""Which backend "auto" is to take: a first timing says who is near, a longer one who wins.

One timing of all is not enough to tell those apart that are alike: of five backends, the one that
was lucky would be taken.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ipn_core.attention.choice import Case
from ipn_core.attention.dispatch import AUTO
from ipn_core.attention.timing import Report, Timing, Trial
from ipn_core.benchmarking.rows import median_interval

__all__ = ["CLOSE", "ROUNDS", "SURE", "TIE", "Decision", "decide", "pick", "tuned"]

CLOSE = 1.5
"""Who took less than so much of the fastest in the first timing is in the second one."""
TIE = 1.01
"""A backend that `auto` tries anyway wins unless another one takes this much less: it never refuses
what it was not timed for."""
SURE = 1.03
"""The second timing goes on with those that may be so much faster than the winner, by the 95 %
interval of the ratio within a turn, until there are none,"""
ROUNDS = 6
"""or until they were timed so many times as long as in the first one."""
BEHIND = 1.15
"""Who took so much more than the winner in the second timing is not near any more."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Who won, and by what.

    Attributes:
        timings: of every backend; of those that were timed twice, the second timing.
        winner: what `auto` is to take, None where no backend takes the call.
        near: those that are not far behind it, by the second timing if there was one.
    """

    timings: tuple[Timing, ...]
    winner: str | None
    near: tuple[str, ...] = ()


def decide(trial: Trial, seconds: float) -> Decision:
    """Time all backends of a call, then those that are near the fastest until it is known who wins.

    Args:
        trial: the call.
        seconds: about how long each is timed first; those that are near, up to `ROUNDS` times as
            long after that.
    """
    first = trial.time(seconds)
    took = {t.backend: statistics.median(t.seconds) for t in first if t.seconds}
    if not took:
        return Decision(tuple(first), None)
    near = tuple(name for name in took if took[name] <= CLOSE * min(took.values()))
    if len(near) == 1:
        return Decision(tuple(first), near[0], near)
    samples: dict[str, tuple[float, ...]] = dict.fromkeys(near, ())
    winner, rivals = near[0], near[1:]
    for number in range(1, ROUNDS + 1):
        racing = (winner, *rivals)
        for timing in trial.time(seconds, only=racing, seed=number):
            samples[timing.backend] += timing.seconds
        winner, rivals = pick({name: samples[name] for name in racing})
        if not rivals:
            break
    timings = tuple(replace(t, seconds=samples.get(t.backend, t.seconds)) for t in first)
    most = BEHIND * statistics.median(samples[winner])
    near = tuple(name for name in near if statistics.median(samples[name]) <= most)
    return Decision(timings, winner, near)


def pick(samples: Mapping[str, Sequence[float]]) -> tuple[str, tuple[str, ...]]:
    """Return who wins, and who may yet be found faster by more than `SURE`.

    Args:
        samples: seconds by backend; the i-th of each are of the same turn.
    """
    fastest = min(samples, key=lambda name: statistics.median(samples[name]))
    usual = next((name for name in AUTO if name in samples), fastest)
    tied = statistics.median(_ratios(samples[usual], samples[fastest])) <= TIE
    winner = usual if tied else fastest
    rivals = (
        name
        for name, times in samples.items()
        if name != winner and median_interval(_ratios(samples[winner], times))[1] > SURE
    )
    return winner, tuple(rivals)


def _ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(over, under, strict=True)]


def tuned(
    cases: Sequence[Case],
    device: torch.device,
    *,
    seconds: float = 0.2,
    report: Report | None = None,
) -> tuple[list[Timing], dict[Case, str]]:
    """Time every backend for every case and decide what "auto" is to take.

    Args:
        cases: the calls.
        device: where they run.
        seconds: as in `decide`.
        report: is told (done, total) cases.

    Returns:
        The timings as of `measure`, and the winner of each case that a backend takes.
    """
    timings: list[Timing] = []
    winners: dict[Case, str] = {}
    for done, case in enumerate(cases, start=1):
        decision = decide(Trial(case, device), seconds)
        timings += decision.timings
        if decision.winner is not None:
            winners[case] = decision.winner
        if report is not None:
            report(done, len(cases))
    return timings, winners
