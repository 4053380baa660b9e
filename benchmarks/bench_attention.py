"""Every attention backend, and `auto`, at the shapes of small-query cross-attention.

Each is held against double precision first; a cell that a backend cannot serve is a row with its
reasons. All backends of a shape are timed in turn, on CUDA by its events. What `auto` is to take is
decided as `ipn bench attention --tune` does, and kept in a table of this run alone; then those that
come near the fastest are timed once more, with `auto` among them, and `auto` must be within 5 % of
the best.

    .venv/bin/python -m pytest benchmarks/bench_attention.py -m "not gpu" [--grid short|usual|full]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.attention_cells import GRIDS, NOTES
from benchmarks.grids import Grid
from benchmarks.replay import recorded, replay
from benchmarks.results import Row
from benchmarks.sections import Book
from ipn_core.attention import choice
from ipn_core.attention.choice import Case
from ipn_core.attention.deciding import ROUNDS, decide
from ipn_core.attention.dispatch import choose
from ipn_core.attention.drawing import label
from ipn_core.attention.timing import Timing, Trial
from ipn_core.plugins import get_registry

AUTO, RATIO = "auto", "auto over the fastest"
LIMIT = 1.05
"""How much longer `auto` may take than the fastest backend."""
AGAIN = 2
"""How often a ratio above the limit is decided and measured anew, three times as long each: the
fastest of several that are alike is found by chance, too, and a call may take another tenth of its
time from where its memory lies."""


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


_compiled_for: list[tuple[object, ...]] = []


def setup_attention(case: Case, device: torch.device) -> Trial:
    """Draw a call and hold every backend against double precision; for time and memory alike."""
    kind = (case.masking, case.dtype, case.grad, case.head_dim, case.heads)
    if device.type == "cuda" and _compiled_for != [kind]:
        # Torch compiles flex for a few kinds of calls and shapes, and then no more.
        torch.compiler.reset()
        _compiled_for[:] = [kind]
    return Trial(case, device)


def measure(trial: Trial, seconds: float) -> Cell:
    """Time all backends, keep the winner for `auto`, and time it beside those that come near."""
    case = trial.case
    for attempt in range(1, AGAIN + 2):
        longer = seconds if attempt == 1 else 3 * seconds
        decision = decide(trial, longer)
        timings = {t.backend: t for t in decision.timings}
        if decision.winner is None:
            nothing = ("no backend takes it",)
            lost = Row.refused(f"{label(case)} / {RATIO}", nothing, unit="ratio")
            return Cell({**timings, AUTO: Timing(case, AUTO, nothing)}, lost)
        choice.write_table(trial.device, {case: decision.winner})
        timed = trial.time(longer, also=[AUTO], only=decision.near, seed=ROUNDS + attempt)
        found = {t.backend: t for t in timed}
        best, ratios = over_fastest(found)
        if statistics.median(ratios) <= LIMIT:
            break
    chosen = choose(trial.inputs).name
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


GRID = Grid[Case, Cell](
    section="attention",
    levels=GRIDS,
    notes=NOTES,
    names=(*sorted(get_registry().entries("attention")), AUTO, RATIO),
    label=label,
    measure=lambda case, device, seconds: measure(setup_attention(case, device), seconds),
    seconds={"cpu": 0.08, "cuda": 0.02},
)
pytest_generate_tests = GRID.parametrize


@pytest.fixture(scope="module")
def entered(
    request: pytest.FixtureRequest,
    book: Book,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Book]:
    """The book, open for these rows; and a table of the fastest of this run's own."""
    GRID.open(book, request.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPN_CACHE", str(tmp_path_factory.mktemp("tables")))
        patch.setenv(choice.SWITCH, "on")
        choice.forget()
        yield book
    choice.forget()
    GRID.close()


@pytest.mark.benchmark(timer=recorded)
def test_attention(
    device: torch.device,
    case: Case,
    name: str,
    entered: Book,
    request: pytest.FixtureRequest,
) -> None:
    cell = GRID.get(request.config, case, device)
    row = cell.row(name)
    entered.enter(GRID.section, device.type, row)
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
