"""The table of `ipn bench engine`: which rows there are, and what is found of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch

from ipn_core.benchmarking.engine.timing import ratios
from ipn_core.benchmarking.rows import Row
from ipn_core.errors import UserError, near

if TYPE_CHECKING:
    from ipn_core.backbone import Backbone

__all__ = ["ROWS", "Found", "Session", "against", "choose_rows", "measure", "took"]

Better: TypeAlias = Literal["lower", "higher"]
CPU = torch.device("cpu")

ROWS = {
    "first-token-128": "ipn_core.benchmarking.engine.first_token:measure_128",
    "first-token-512": "ipn_core.benchmarking.engine.first_token:measure_512",
    "first-token-2048": "ipn_core.benchmarking.engine.first_token:measure_2048",
    "questions": "ipn_core.benchmarking.engine.questions:measure",
    "decoding": "ipn_core.benchmarking.engine.decoding:measure",
    "ragged-batch": "ipn_core.benchmarking.engine.decoding:measure_ragged",
    "training": "ipn_core.benchmarking.engine.training:measure",
    "training-all": "ipn_core.benchmarking.engine.training:measure_all",
    "memory": "ipn_core.benchmarking.engine.memory:measure",
    "commands": "ipn_core.benchmarking.engine.commands:measure",
    "machinery": "ipn_core.benchmarking.engine.machinery:measure",
}
"""By name, the function that measures a row: it takes a `Session` and returns a `Found`."""


@dataclass(frozen=True)
class Found:
    """What a row of the table has found.

    Attributes:
        row: its name.
        title: what is timed, with all sizes.
        rows: what each thing took (`took`), then ratios of them (`against`), which may have goals.
        notes: what else there is to know, such as how it was measured.
    """

    row: str
    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        rows = [row.model_dump(mode="json", exclude_defaults=True) for row in self.rows]
        return {"row": self.row, "title": self.title, "rows": rows, "notes": list(self.notes)}


@dataclass
class Session:
    """What the rows of one run share.

    Attributes:
        short: a few repetitions of each row, to see that nothing broke.
        count: repetitions of every row, None for what each of them chooses.
        device: where both sides of every ratio run.
    """

    short: bool = False
    count: int | None = None
    device: torch.device = CPU

    def repeats(self, full: int, short: int) -> int:
        """Return how often a row runs what it times."""
        return self.count or (short if self.short else full)

    @cached_property
    def _llm(self) -> tuple[Backbone, str]:
        from ipn_core.benchmarking.engine.subjects import backbone

        return backbone(self.device)

    @property
    def backbone(self) -> Backbone:
        """The language model of all rows."""
        return self._llm[0]

    @property
    def llm(self) -> str:
        """What the language model is."""
        return self._llm[1]


def choose_rows(only: Sequence[str]) -> list[str]:
    """Return the rows of these names, or whose names begin so, in the order of the table.

    Args:
        only: names; none for all.

    Raises:
        UserError: there is no such row.
    """
    for name in only:
        if not any(_matches(row, name) for row in ROWS):
            raise UserError(
                f"unknown row '{name}': known are {', '.join(ROWS)}{near(name, ROWS)}. "
                "'first-token' stands for all whose names begin so."
            )
    return [row for row in ROWS if not only or any(_matches(row, name) for name in only)]


def _matches(row: str, name: str) -> bool:
    return row == name or row.startswith(f"{name}-")


def measure(row: str, session: Session) -> Found:
    """Measure one row."""
    module, _, function = ROWS[row].partition(":")
    measured: Callable[[Session], Found] = getattr(import_module(module), function)
    return measured(session)


def took(row: str, found: Mapping[str, Sequence[float]]) -> list[Row]:
    """Return what each thing took, in seconds.

    Args:
        row: whose they are.
        found: for each thing, its seconds in every repetition.
    """
    return [Row.of(f"{row}/{name}", seconds) for name, seconds in found.items()]


def against(
    row: str,
    found: Mapping[str, Sequence[float]],
    over: str,
    under: str,
    goal: float | None = None,
    better: Better = "lower",
) -> Row:
    """Return the ratio of two things, taken within each repetition.

    Args:
        row: whose they are.
        found: for each thing, its seconds in every repetition.
        over: the one.
        under: the other.
        goal: what the ratio must not be worse than.
        better: which way is better.
    """
    ratio = ratios(found[over], found[under])
    return Row.of(f"{row}/{over} : {under}", ratio, unit="ratio", better=better, goal=goal)
