"""`Book`: the rows of sections that many tests measure, written once a section is whole."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.results import Row, store
from ipn_core.benchmarking.engine.timing import threads

__all__ = ["Book"]

PARTLY_S = 60.0
"""How often what is measured so far is written aside: a kernel may end the program."""


@dataclass
class _Page:
    """Rows of one section on one device."""

    expected: frozenset[str]
    notes: tuple[str, ...] = ()
    again: str | None = None
    rows: dict[str, Row] = field(default_factory=dict)


class Book:
    """Rows by section and device.

    Args:
        folder: where the files of results lie.
        count: threads that are measured with, None for one a core.

    Attributes:
        told: lines about what was written, for whoever started it.
    """

    def __init__(self, folder: Path, count: int | None = None) -> None:
        self.folder = folder
        self.count = count
        self.told: list[str] = []
        self._pages: dict[tuple[str, str], _Page] = {}
        self._written = time.monotonic()

    def open(
        self,
        section: str,
        device: str,
        expected: frozenset[str],
        *,
        notes: tuple[str, ...] = (),
        again: str | None = None,
    ) -> None:
        """Say which rows a section has when it is whole; once is enough.

        Args:
            section: its name.
            device: "cpu" or "cuda".
            expected: the names of its rows.
            notes: sentences that belong to it.
            again: the command that measures it again.
        """
        self._pages.setdefault((section, device), _Page(expected, notes, again))

    def enter(self, section: str, device: str, row: Row) -> None:
        """Add a row to a section that is open."""
        page = self._pages[section, device]
        page.rows[row.name] = row
        if time.monotonic() - self._written > PARTLY_S:
            self._written = time.monotonic()
            self._store(section, device, page, self.folder / "partly")

    def close(self) -> None:
        """Write every section that is whole, and say what became of the others."""
        for (section, device), page in self._pages.items():
            missing = page.expected - page.rows.keys()
            if not page.rows:
                continue
            if missing:
                self.told.append(
                    f"{section} on {device}: {len(page.rows)} of {len(page.expected)} rows were "
                    "measured; results are written only of all of them"
                )
                continue
            path = self._store(section, device, page, self.folder)
            self._clear(path.name)
            self.told.append(f"{section} on {device}: {len(page.rows)} rows in {path}")
        self._pages.clear()

    def _clear(self, name: str) -> None:
        """Remove what was put aside before it was whole."""
        aside = self.folder / "partly"
        for path in (aside / name, (aside / name).with_suffix(".lock")):
            path.unlink(missing_ok=True)
        if aside.is_dir() and not any(aside.iterdir()):
            aside.rmdir()

    def _store(self, section: str, device: str, page: _Page, folder: Path) -> Path:
        rows = list(page.rows.values())
        with threads(self.count):  # they are part of the device's name
            return store(section, rows, device, notes=page.notes, again=page.again, folder=folder)
