"""What the rows of a batch share at their beginning, and the LLM therefore runs only once.

A first segment is cut where its rows part: after what all of them begin with, such as the system
message, and after their pictures. Each part is run for the distinct beginnings alone, and the cache
is copied to the rows that go on from them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from ipn_core.segments import IGNORED, Segment

__all__ = ["Part", "contents", "divide", "undivided"]

WORTH_SHARING = 32
"""Tokens that are not run again, from which on a forward of their own pays."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a segment, laid out for the n beginnings that differ up to its end.

    Attributes:
        rows: (n) a row of the batch that begins so.
        parents: (n) which beginning of the part before each goes on from.
        order: (n, L) which position of its row's segment stands where; any where there is padding.
            None where every row stands as it is.
        mask: (n, L) True for real tokens.
        padded: whether any position is padding; known without a device sync.
    """

    rows: list[int]
    parents: list[int]
    order: Tensor | None
    mask: Tensor
    padded: bool


def undivided(segment: Segment) -> tuple[list[Part], list[int]]:
    """Return a segment as one part in which every row stands for itself, and the rows."""
    rows = list(range(len(segment.ids)))
    return [Part(rows, rows, None, segment.mask, segment.padded)], rows


def divide(
    segment: Segment, pictures: Mapping[tuple[int, int], Hashable], *, every: bool = False
) -> tuple[list[Part], list[int]]:
    """Cut a first segment into parts, as far as that saves something.

    Args:
        segment: the first of its batch.
        pictures: by row and ordinal of the picture in it, what is equal for equal static tokens.
        every: lay the last part out for every row, also where rows are equal to the end.

    Returns:
        The parts; and for each row, its index among the beginnings of the last part.
    """
    keys = [contents(segment, row, pictures) for row in range(len(segment.ids))]
    padding = [segment.length - len(key) for key in keys]
    begun, index = [0] * len(keys), [0] * len(keys)
    parts: list[Part] = []
    cuts = _cuts(segment, keys)
    for number, ends in enumerate(cuts):
        apart = every and number == len(cuts) - 1
        found: dict[Hashable, int] = {}
        rows: list[int] = []
        parents: list[int] = []
        following: list[int] = []
        for row, (key, end) in enumerate(zip(keys, ends, strict=True)):
            beginning = row if apart else tuple(key[:end])
            if beginning not in found:
                found[beginning] = len(rows)
                rows.append(row)
                parents.append(index[row])
            following.append(found[beginning])
        sizes = [ends[row] - begun[row] for row in rows]
        width = max(sizes)
        left = torch.tensor([width - size for size in sizes])[:, None]
        first = torch.tensor([padding[row] + begun[row] for row in rows])[:, None]
        at = torch.arange(width).expand(len(rows), -1) - left
        parts.append(
            Part(rows, parents, at.clamp(min=0) + first, at >= 0, min(sizes, default=0) < width)
        )
        begun, index = ends, following
    return parts, index


def contents(
    segment: Segment, row: int, pictures: Mapping[tuple[int, int], Hashable] | None = None
) -> list[Hashable]:
    """Return for each position of a row, padding left out, what makes it equal to another's.

    Args:
        segment: the row's.
        row: which one.
        pictures: as in `divide`; None for a segment without static tokens.
    """
    keys: list[Hashable] = list(segment.ids[row].tolist())
    for place in segment.statics:
        if place.row == row:
            for i in range(place.length):
                keys[place.start + i] = ((pictures or {})[row, place.image], i)
    if any(look.row == row for look in segment.looks):
        for i in range(segment.request):
            keys[len(keys) - segment.request + i] = ("request", i)
    return keys[int((~segment.mask[row]).sum()) :]


def _cuts(segment: Segment, keys: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Return where each part ends in each row; a cut that saves too little is left out."""
    whole = [len(key) for key in keys]
    most = _unlearned(segment, whole)
    different = {tuple(key): row for row, key in enumerate(keys)}
    head = min(_common([keys[row] for row in different.values()]), *most)
    after = [head] * len(keys)
    for place in segment.statics:
        end = place.start + place.length - (segment.length - whole[place.row])
        after[place.row] = min(max(after[place.row], end), most[place.row])
    stems = {tuple(keys[row][: after[row]]): row for row in different.values()}
    again = sum(after[row] - head for row in different.values())
    once = sum(after[row] - head for row in stems.values())
    cuts = [whole]
    following = len(different)
    if again - once >= WORTH_SHARING:
        cuts.insert(0, after)
        following = len(stems)
    if head * (following - 1) >= WORTH_SHARING:
        cuts.insert(0, [head] * len(keys))
    return cuts


def _unlearned(segment: Segment, whole: Sequence[int]) -> list[int]:
    """Return how far each row may be cut off: before its end, and before what predicts a label."""
    if not segment.learns:
        return [length - 1 for length in whole]
    learned = (segment.labels != IGNORED).long()
    first = torch.where(learned.any(1), learned.argmax(1), segment.length)
    return [
        max(min(int(at) - (segment.length - length), length) - 1, 0)
        for at, length in zip(first, whole, strict=True)
    ]


def _common(keys: Sequence[Sequence[Hashable]]) -> int:
    """Return how many first keys are the same in all."""
    if len(keys) < 2:
        return 0
    columns = zip(*keys, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
