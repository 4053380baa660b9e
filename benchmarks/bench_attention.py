"""Every attention backend, and `auto`, at the shapes of small-query cross-attention.

Each is held against double precision first; a cell that a backend cannot serve is a row with its
reasons. All backends of a shape are timed in turn, on CUDA by its events. The fastest are kept in a
table of this run alone, as `ipn bench attention --tune` keeps them; then those that come near the
fastest are timed once more, with `auto` among them, and `auto` must be within 5 % of the best.

    .venv/bin/python -m pytest benchmarks/bench_attention.py -m "not gpu" [--grid short|usual|full]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.attention_cells import GRIDS, NOTES
from benchmarks.replay import recorded, replay
from benchmarks.results import Row
from benchmarks.sections import Book
from ipn_core.attention import choice
from ipn_core.attention.choice import Case
from ipn_core.attention.dispatch import choose
from ipn_core.attention.drawing import label
from ipn_core.attention.timing import Timing, Trial, fastest
from ipn_core.benchmarking.engine.timing import threads
from ipn_core.plugins import get_registry

SECTION = "attention"
AUTO, RATIO = "auto", "auto over the fastest"
LIMIT = 1.05
"""How much longer `auto` may take than the fastest backend."""
CLOSE = 1.5
"""Which backends are timed again beside `auto`: those that took less than so much of the best."""
AGAIN = 2
"""How often a ratio above the limit is measured anew, three times as long each: the fastest of
several that are alike is found by chance, too."""
SECONDS = {"cpu": 0.1, "cuda": 0.02}


# -- what is timed ---------------------------------------------------------------------------------


@dataclass
class Cell:
    """One call with what every backend did.

    Attributes:
        timings: by backend, with "auto" among them.
        ratio: the row of `auto` over the fastest.
    """

    timings: dict[str, Timing]
    ratio: Row

    def row(self, name: str) -> Row:
        """Return a backend's row, or the one of the ratio."""
        if name == RATIO:
            return self.ratio
        return self.timings[name].to_row()


def setup_attention(case: Case, device: torch.device) -> Trial:
    """Draw a call and hold every backend against double precision; for time and memory alike."""
    if device.type == "cuda":
        torch.compiler.reset()  # flex is compiled for a few kinds of calls only, then no more
    return Trial(case, device)


def measure(trial: Trial, seconds: float) -> Cell:
    """Time all backends, keep the fastest for `auto`, and time it beside those that come near."""
    case = trial.case
    timings = {t.backend: t for t in trial.time(seconds)}
    winners = fastest(timings.values())
    if not winners:
        nothing = ("no backend takes it",)
        lost = Row.refused(f"{label(case)} / {RATIO}", nothing, unit="ratio")
        return Cell({**timings, AUTO: Timing(case, AUTO, nothing)}, lost)
    choice.write_table(trial.device, winners)
    chosen = choose(trial.inputs).name
    took = {name: statistics.median(t.seconds) for name, t in timings.items() if t.seconds}
    near = [name for name, median in took.items() if median <= CLOSE * min(took.values())]
    for attempt in range(1, AGAIN + 2):
        longer = 1 if attempt == 1 else 3
        found = {t.backend: t for t in trial.time(seconds * longer, also=[AUTO], only=near)}
        best, ratios = over_fastest(found)
        if statistics.median(ratios) <= LIMIT:
            break
    timings |= found
    timings[AUTO] = replace(timings[AUTO], error=timings[chosen].error)
    row = Row.of(
        f"{label(case)} / {RATIO}",
        ratios,
        {**case._asdict(), "chosen": chosen, "fastest": best},
        unit="ratio",
        goal=LIMIT,
        more={"attempts": attempt},
    )
    return Cell(timings, row)


def over_fastest(found: Mapping[str, Timing]) -> tuple[str, list[float]]:
    """Return the fastest backend, and how many times as long `auto` took in each turn."""
    times = {name: t.seconds for name, t in found.items() if t.seconds and name != AUTO}
    best = min(times, key=lambda name: statistics.median(times[name]))
    return best, [a / b for a, b in zip(found[AUTO].seconds, times[best], strict=True)]


# -- the rows --------------------------------------------------------------------------------------


def grid_of(config: pytest.Config, device: str) -> str:
    """Return how much is timed on a device; where it is not there, what says so is short."""
    if device == "cuda" and not torch.cuda.is_available():
        return "short"
    return config.getoption("--grid") or ("full" if device == "cuda" else "usual")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each cell and backend, those of a cell one after the other."""
    if "case" not in metafunc.fixturenames:
        return
    names = (*sorted(get_registry().entries("attention")), AUTO, RATIO)
    rows = [
        pytest.param(
            device,
            case,
            name,
            id=f"{device} {label(case)} {name}",
            marks=[pytest.mark.gpu] if device == "cuda" else [],
        )
        for device in ("cpu", "cuda")
        for case in GRIDS[grid_of(metafunc.config, device)]()
        for name in names
    ]
    metafunc.parametrize(("device", "case", "name"), rows, indirect=["device"])


class Cells:
    """The cell that was measured last; its rows are asked for one after the other."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self._last: tuple[Case, torch.device, Cell] | None = None

    def get(self, case: Case, device: torch.device) -> Cell:
        """Return a cell; it is measured on the first call, with all cores."""
        if self._last is None or self._last[:2] != (case, device):
            with threads(None):
                trial = setup_attention(case, device)
                seconds = SECONDS[device.type] if self.seconds is None else self.seconds
                self._last = (case, device, measure(trial, seconds))
        return self._last[2]


@pytest.fixture(scope="module")
def cells(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cells]:
    """What measures, with a table of the fastest of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPN_CACHE", str(tmp_path_factory.mktemp("tables")))
        patch.setenv(choice.SWITCH, "on")
        choice.forget()
        yield Cells(request.config.getoption("--row-seconds"))
    choice.forget()


@pytest.fixture(scope="module")
def entered(request: pytest.FixtureRequest, book: Book, device: torch.device) -> Book:
    """The book, open for the rows of a device."""
    grid = grid_of(request.config, device.type)
    names = (*get_registry().entries("attention"), AUTO, RATIO)
    expected = {f"{label(case)} / {name}" for case in GRIDS[grid]() for name in names}
    book.open(SECTION, device.type, frozenset(expected), notes=(NOTES[grid],))
    return book


@pytest.mark.benchmark(timer=recorded)
def test_attention(
    device: torch.device,
    case: Case,
    name: str,
    cells: Cells,
    entered: Book,
    request: pytest.FixtureRequest,
) -> None:
    cell = cells.get(case, device)
    row = cell.row(name)
    entered.enter(SECTION, device.type, row)
    if name == RATIO:
        if row.misses_goal() and not request.config.getoption("--no-check"):
            pytest.fail(f"{row.name}: {row.median:.3f}, more than {LIMIT}", pytrace=False)
        return
    timing = cell.timings[name]
    if timing.failed:
        pytest.fail(f"{row.name}: {'; '.join(timing.reasons)}", pytrace=False)
    if not timing.seconds:
        pytest.skip("; ".join(timing.reasons))
    benchmark = request.getfixturevalue("benchmark")
    replay(benchmark, timing.seconds, label(case), error=timing.error)
