"""Batches that depend on nothing but seed, stage and step, whatever they are drawn from."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ipn_core.errors import ConfigError

if TYPE_CHECKING:
    from ipn_core.training.config import StageConfig
    from ipn_core.training.data import DataSource, Examples, Place

__all__ = ["Sampler"]

_Group = list[tuple["Examples", int]]


class Sampler:
    """Batches of a stage: the one of a step depends only on seed, stage and step.

    A source is drawn from window by window: all that it has, once an epoch, or of a stream what
    fits into memory. Each example of a window is shown once. A group of more examples than fit is
    cut into several, at random and anew each epoch.
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        stage: StageConfig,
        seed: int,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Start at the beginning.

        Args:
            sources: what is drawn from.
            stage: says how much, and how it is grouped.
            seed: of the training.
            share: rank and number of the processes that share each batch out by groups, for what
                is prepared ahead.
        """
        self.sources = sources
        self.stage = stage
        self.seed = seed
        self.shares = _split(stage.groups, [data.share for data in sources])
        self._rank, self._processes = share
        self._windows = [
            _Windows(data, f"{seed}/{stage.name}/{number}", stage, count)
            for number, (data, count) in enumerate(zip(sources, self.shares, strict=True))
        ]

    def draw(self, batch: int) -> _Group:
        """Return the examples of one batch, counted over the whole stage."""
        return [pair for group in self.groups(batch) for pair in group]

    def groups(self, batch: int) -> list[_Group]:
        """Return the examples of one batch by group, in the order of `draw`."""
        return [
            windows.group(at)
            for windows, count in zip(self._windows, self.shares, strict=True)
            for at in range(batch * count, (batch + 1) * count)
        ]

    def ahead(self, batch: int) -> None:
        """Let sources get ready for this process's groups of a batch."""
        owners = [
            data
            for data, count in zip(self.sources, self.shares, strict=True)
            for _ in range(count)
        ]
        mine = slice(self._rank, None, self._processes)
        for data, group in zip(owners[mine], self.groups(batch)[mine], strict=True):
            data.ahead([window.examples[i] for window, i in group])

    def state(self, batch: int) -> list[dict[str, Any]]:
        """Return, for each source, where the window of a batch begins; JSON can hold it."""
        return [
            windows.state(batch * count)
            for windows, count in zip(self._windows, self.shares, strict=True)
        ]

    def resume(self, states: Sequence[dict[str, Any]]) -> None:
        """Begin at a state, so that nothing before it need be read again."""
        for windows, state in zip(self._windows, states, strict=True):
            windows.start(**state)


@dataclass(frozen=True)
class _Window:
    """A window with its groups in the order in which they are drawn.

    Attributes:
        number: counted from 0.
        first: how many groups came before it.
        place: where it begins.
        data: its examples.
        cuts: groups of indices, and which part of each.
    """

    number: int
    first: int
    place: Place | None
    data: Examples
    cuts: list[tuple[list[int], int]]

    @property
    def end(self) -> int:
        return self.first + len(self.cuts)


class _Windows:
    """The groups of one source, counted from the start of a stage."""

    def __init__(self, data: DataSource, seed: str, stage: StageConfig, count: int) -> None:
        self.data = data
        self.seed = seed
        self.stage = stage
        self.count = count
        self._groups: tuple[Examples, list[tuple[list[int], int]]] | None = None
        self.start()

    def start(self, number: int = 0, first: int = 0, place: Place | None = None) -> None:
        """Begin with a window."""
        self._number, self._first = number, first
        self._coming = self.data.windows(self.seed, place)
        self._kept: deque[_Window] = deque()
        self._failed: Exception | None = None

    def state(self, at: int) -> dict[str, Any]:
        """Return what `start` takes for the window that holds a group."""
        window = self._find(at)
        return {"number": window.number, "first": window.first, "place": window.place}

    def group(self, at: int) -> _Group:
        """Return a group by its number."""
        window = self._find(at)
        group, part = window.cuts[at - window.first]
        return [(window.data, i) for i in self._some(group, part, window.number)]

    def _find(self, at: int) -> _Window:
        if at < (self._kept[0].first if self._kept else self._first):
            self.start()
        while not self._kept or self._kept[-1].end <= at:
            self._next()
        # Those of the step before stay: what is prepared ahead is drawn first.
        reach = 2 * self.count * self.stage.accumulate
        while self._kept[0].end <= at - reach:
            self._kept.popleft()
        return next(window for window in self._kept if at < window.end)

    def _next(self) -> None:
        if self._failed is not None:
            raise self._failed  # an iterator that has raised would only say that it has ended
        try:
            place, data = next(self._coming)
        except Exception as error:
            self._failed = error
            raise
        cuts = self._ordered(data, self._number, self._first)
        self._kept.append(_Window(self._number, self._first, place, data, cuts))
        self._number, self._first = self._number + 1, self._kept[-1].end

    def _ordered(self, data: Examples, number: int, first: int) -> list[tuple[list[int], int]]:
        rng = random.Random(f"{self.seed}/{number}")
        if self.stage.group_by == "length":
            return self._by_length(data, rng, first)
        cuts = self._cuts(data)
        order = list(range(len(cuts)))
        rng.shuffle(order)
        return [cuts[i] for i in order]

    def _cuts(self, data: Examples) -> list[tuple[list[int], int]]:
        """Return groups, and which part of each; kept while a window comes again."""
        if self._groups is None or self._groups[0] is not data:
            by_picture = self.stage.group_by == "picture"
            cuts = [
                (group, part)
                for group in (data.by_picture if by_picture else data.by_question)
                for part in range(math.ceil(len(group) / self.stage.per_group))
            ]
            self._groups = data, cuts
        return self._groups[1]

    def _by_length(
        self, data: Examples, rng: random.Random, first: int
    ) -> list[tuple[list[int], int]]:
        """Cut the examples, sorted by length, into groups, and these into batches, in any order."""
        size = self.stage.per_group
        indices = data.by_length(rng)
        groups = [(indices[at : at + size], 0) for at in range(0, len(indices), size)]
        # The batch that the last window has begun is filled up first.
        begun = -first % self.count
        batches = [groups[:begun]] if begun else []
        rest = [groups[at : at + self.count] for at in range(begun, len(groups), self.count)]
        tail = [rest.pop()] if rest and len(rest[-1]) < self.count else []
        rng.shuffle(rest)
        return [group for batch in (*batches, *rest, *tail) for group in batch]

    def _some(self, group: list[int], part: int, number: int) -> list[int]:
        size = self.stage.per_group
        if len(group) <= size:
            return group
        rng = random.Random(f"{self.seed}/{number}/{group[0]}")
        return rng.sample(group, len(group))[part * size : (part + 1) * size]


def _split(total: int, shares: Sequence[float]) -> list[int]:
    """Split a number of groups by shares; every source gets at least one."""
    if total < len(shares):
        raise ConfigError(f"'groups' must be at least {len(shares)}, one a source, got {total}.")
    exact = [total * share / sum(shares) for share in shares]
    counts = [max(1, int(e)) for e in exact]
    while sum(counts) > total:
        counts[counts.index(max(counts))] -= 1
    by_rest = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for index in range(total - sum(counts)):
        counts[by_rest[index % len(by_rest)]] += 1
    return counts
