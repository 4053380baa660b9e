"""Which backend wins: one that is surely not slower, and of those that are alike the usual one."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import pytest
import torch

from ipn_core.attention import deciding, timing
from ipn_core.attention.choice import Case, write_table
from ipn_core.attention.deciding import ROUNDS, decide, pick, tuned
from ipn_core.attention.dispatch import choose
from ipn_core.attention.drawing import draw
from ipn_core.attention.timing import Timing

CPU = torch.device("cpu")
PLAIN = Case(2, 3, 5, 4, 2, 16, 16, "float32", "none", False)


pytestmark = pytest.mark.usefixtures("own_table")


# -- of samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        ({"eager": 3.0, "sdpa": 2.0}, "sdpa"),
        ({"eager": 1.0, "sdpa": 2.0}, "eager"),
        # Alike: what never refuses; and of these, what the list names first.
        ({"sdpa-flash": 1.0, "sdpa": 1.009, "eager": 1.0}, "sdpa"),
        ({"sdpa-flash": 1.0, "sdpa": 1.02}, "sdpa-flash"),
        ({"sdpa-flash": 1.0, "sdpa-math": 1.0}, "sdpa-flash"),
    ],
)
def test_the_fastest_wins_unless_the_usual_one_is_like_it(
    times: dict[str, float], winner: str
) -> None:
    assert pick({name: [seconds] * 9 for name, seconds in times.items()}) == (winner, ())


def test_turns_are_compared_and_not_what_the_machine_did_meanwhile() -> None:
    busy = [1.0, 1.0, 1.0, 3.0, 3.0, 3.0, 3.0, 2.0, 2.0]
    slower = [1.02 * seconds for seconds in busy]
    assert pick({"sdpa": slower, "eager": busy}) == ("eager", ())
    assert pick({"sdpa": busy, "eager": slower}) == ("sdpa", ())


def test_whoever_may_yet_beat_the_winner_is_named() -> None:
    one = [1.0] * 9
    other = [0.9, 0.9, 0.9, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1]
    slow = [1.1] * 9
    assert pick({"sdpa": one, "eager": other, "sdpa-math": slow}) == ("sdpa", ("eager",))


# -- of a call -------------------------------------------------------------------------------------


class Fake:
    """A trial whose backends take what they are said to, with noise; the first timing may lie."""

    case = PLAIN

    def __init__(self, truth: dict[str, float], first: dict[str, float], noise: float) -> None:
        self.truth, self.first, self.noise = truth, first, noise
        self.timed: list[tuple[str, ...]] = []
        self.seeds: list[int] = []

    def time(self, seconds: float, *, only: Sequence[str] | None = None, seed: int = 0) -> Any:
        names = tuple(self.truth) if only is None else tuple(only)
        self.timed.append(names)
        self.seeds.append(seed)
        means = self.truth if len(self.timed) > 1 else {**self.truth, **self.first}
        draw = random.Random(len(self.timed))
        return [
            Timing(PLAIN, n, seconds=tuple(means[n] * draw.gauss(1, self.noise) for _ in range(20)))
            for n in names
        ]


def test_a_lucky_first_timing_does_not_win() -> None:
    trial: Any = Fake(
        {"eager": 1.6, "sdpa": 1.0, "sdpa-flash": 1.07, "flex": 9.0}, {"sdpa-flash": 0.9}, 0.02
    )
    found = decide(trial, 0)
    assert found.winner == "sdpa"
    assert found.near == ("sdpa", "sdpa-flash")
    assert trial.timed == [("eager", "sdpa", "sdpa-flash", "flex"), ("sdpa", "sdpa-flash")]
    by_name = {t.backend: t.seconds for t in found.timings}
    assert list(by_name) == ["eager", "sdpa", "sdpa-flash", "flex"]
    assert min(by_name["sdpa-flash"]) > 0.95  # of the second timing


def test_it_is_timed_on_until_it_is_sure_and_no_longer_than_it_may() -> None:
    quiet: Any = Fake({"sdpa": 1.0, "eager": 1.2}, {}, 0.01)
    noisy: Any = Fake({"sdpa": 1.0, "eager": 1.04}, {}, 0.2)
    hopeless: Any = Fake({"sdpa": 1.0, "eager": 1.0}, {}, 0.4)
    assert [decide(trial, 0).winner for trial in (quiet, noisy)] == ["sdpa", "sdpa"]
    decide(hopeless, 0)
    assert len(quiet.timed) == 2
    assert 2 < len(noisy.timed) <= 1 + ROUNDS
    assert len(hopeless.timed) == 1 + ROUNDS
    assert hopeless.seeds == list(range(1 + ROUNDS))  # each time in other orders


def test_those_that_are_surely_slower_leave_the_second_timing() -> None:
    truth = {"sdpa": 1.0, "eager": 1.0, "sdpa-flash": 1.1, "sdpa-math": 1.3}
    trial: Any = Fake(truth, {}, 0.06)
    found = decide(trial, 0)
    assert found.winner in ("sdpa", "eager")
    assert set(found.near) == {"sdpa", "eager", "sdpa-flash"}
    assert set(trial.timed[1]) == set(truth)
    assert len(trial.timed) > 2
    assert set(trial.timed[-1]) == {"sdpa", "eager"}


def test_the_only_one_that_is_near_is_timed_once() -> None:
    trial: Any = Fake({"sdpa": 1.0, "eager": 2.0}, {}, 0.01)
    found = decide(trial, 0)
    assert (found.winner, found.near, len(trial.timed)) == ("sdpa", ("sdpa",), 1)


def test_nothing_wins_where_nothing_ran() -> None:
    refused = Timing(PLAIN, "eager", ("not today",))
    trial: Any = type("Refusing", (), {"time": lambda *_: [refused]})()
    assert decide(trial, 0) == deciding.Decision((refused,), None)


class Twins:
    """Backends on a machine where a call is slow after one that left other things in the caches.

    `sdpa` and `sdpa-flash` read the same, and the second one takes a twentieth longer.
    """

    base: ClassVar[dict[str, float]] = {
        "eager": 4.0,
        "flex": 6.0,
        "sdpa": 1.0,
        "sdpa-flash": 1.05,
        "sdpa-math": 4.5,
    }

    def __init__(self, warm: bool) -> None:
        self.unit = timing.WARM_S / 10 * (1 if warm else 100)
        self.last = ""

    def run(self, name: str) -> float:
        alike = name[:4] == self.last[:4] and "sdpa-math" not in (name, self.last)
        self.last = name
        return self.base[name] * self.unit * (1.0 if alike else 1.3)

    def time(self, seconds: float, *, only: Sequence[str] | None = None, seed: int = 0) -> Any:
        tasks: Any = {name: partial(self.run, name) for name in only or self.base}
        times = timing.in_turn(tasks, CPU, seconds, seed)
        return [Timing(PLAIN, name, seconds=tuple(found)) for name, found in times.items()]


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "seconds_of", lambda task, times, device: task())


def drawn(names: Sequence[str], count: int, seed: int = 0) -> Iterator[list[str]]:
    draw = random.Random(seed)
    for _ in range(count):
        yield draw.sample(names, len(names))


@pytest.mark.usefixtures("no_clock")
@pytest.mark.parametrize("warm", [True, False])
def test_who_runs_after_its_twin_more_often_gains_nothing_by_it(
    warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SAMPLES", (17, 17))
    trial: Any = Twins(warm)
    assert decide(trial, 0).winner == "sdpa"
    with monkeypatch.context() as patch:
        patch.setattr(timing, "turns", drawn)
        patch.setattr(timing, "WARM_S", 0.0)
        lucky = {t.backend: statistics.median(t.seconds) for t in trial.time(0)}
    assert lucky["sdpa-flash"] < lucky["sdpa"]


def test_what_wins_is_what_auto_takes() -> None:
    told: list[tuple[int, int]] = []
    cases = [PLAIN, PLAIN._replace(grad=True), PLAIN._replace(masking="lengths")]
    rows, winners = tuned(cases, CPU, seconds=0, report=lambda *done: told.append(done))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert list(winners) == cases
    assert {row.case for row in rows if row.seconds} == set(cases)
    write_table(CPU, winners)
    assert {case: choose(draw(case, CPU)).name for case in cases} == winners
