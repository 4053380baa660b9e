"""`Grid`: a section whose rows are cases times names, a test each, measured a case at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import pytest
import torch

from benchmarks.results import command
from benchmarks.sections import Book
from ipn_core.benchmarking.engine.timing import threads

__all__ = ["Grid"]

C = TypeVar("C")
M = TypeVar("M")


@dataclass
class Grid(Generic[C, M]):
    """What a benchmark of many shapes consists of.

    Attributes:
        section: its name in the results; its file is `bench_<section>.py`.
        levels: the cases, by the value of `--grid`.
        notes: what is said of the rows, by the same.
        names: of the rows of a case.
        label: of a case.
        measure: (case, device, seconds a row) to whatever holds the rows of a case.
        seconds: about how long a row is timed unless told otherwise, by type of device.
    """

    section: str
    levels: Mapping[str, Callable[[], Sequence[C]]]
    notes: Mapping[str, str]
    names: Sequence[str]
    label: Callable[[C], str]
    measure: Callable[[C, torch.device, float], M]
    seconds: Mapping[str, float]
    _last: tuple[C, torch.device, M] | None = field(default=None, init=False)

    def level(self, config: pytest.Config, device: str) -> str:
        """Return how much is measured on a device; where it is not there, what says so is short."""
        if device == "cuda" and not torch.cuda.is_available():
            return "short"
        return config.getoption("--grid") or ("full" if device == "cuda" else "usual")

    def parametrize(self, metafunc: pytest.Metafunc) -> None:
        """Make a test of each row, those of a case one after the other."""
        if "case" not in metafunc.fixturenames:
            return
        rows = [
            pytest.param(
                kind,
                case,
                name,
                id=f"{kind} {self.label(case)} {name}",
                marks=[pytest.mark.gpu] if kind == "cuda" else [],
            )
            for kind in ("cpu", "cuda")
            for case in self.levels[self.level(metafunc.config, kind)]()
            for name in self.names
        ]
        # Not indirectly: pytest would take what is set up for a device down after every row.
        metafunc.parametrize(("kind", "case", "name"), rows)

    def title(self, case: C, name: str) -> str:
        """Return the name of a row."""
        return f"{self.label(case)} / {name}"

    def open(self, book: Book, config: pytest.Config) -> None:
        """Open the section for the rows of all kinds of devices."""
        for kind in ("cpu", "cuda"):
            level = self.level(config, kind)
            cases = self.levels[level]()
            expected = frozenset(self.title(case, name) for case in cases for name in self.names)
            again = command(f"bench_{self.section}.py", kind, config.getoption("--grid"))
            book.open(self.section, kind, expected, notes=(self.notes[level],), again=again)

    def get(self, config: pytest.Config, case: C, device: torch.device) -> M:
        """Return what was measured of a case; it is measured on the first call."""
        if self._last is None or self._last[:2] != (case, device):
            self._last = None  # it is freed before the next one is drawn
            given = config.getoption("--row-seconds")
            seconds = self.seconds[device.type] if given is None else given
            with threads(config.getoption("--threads")):
                self._last = (case, device, self.measure(case, device, seconds))
        return self._last[2]

    def close(self) -> None:
        """Free what was measured last."""
        self._last = None
