"""Laying plans out as padded segments: which token of which row stands where.

Every segment is padded on the left, so that all rows end together and `<img-q>` lines up. A row
with fewer looks than others sits out the segments between its own and the last one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor

from ipn_core.errors import PromptError
from ipn_core.plan import DynamicSlot, ImageSlot, Piece, Plan, RequestSlot, Tokens

__all__ = ["Look", "Segment", "TokenCounts", "lay_out"]

IGNORED = -100
"""Label of a token that training does not predict, as in torch's cross entropy."""


@dataclass(frozen=True, slots=True)
class Look:
    """A row that looks at the end of a segment: its round, and how many pictures it sees."""

    row: int
    round: int
    pictures: int


@dataclass(frozen=True, slots=True)
class _Place:
    row: int
    start: int
    length: int
    image: int = -1


@dataclass(frozen=True, eq=False)
class Segment:
    """One segment of a batch.

    Attributes:
        ids: (B, L) token ids; slots and padding hold any valid id.
        mask: (B, L) True for real tokens and slots.
        labels: (B, L) ids to predict at their own position, -100 elsewhere.
        statics: where static tokens go, `image` counting the pictures of the row.
        dynamics: where the dynamic tokens of the look before this segment go.
        looks: the rows whose last R positions are `<img-q>`.
        request: R.
    """

    ids: Tensor
    mask: Tensor
    labels: Tensor
    statics: tuple[_Place, ...]
    dynamics: tuple[_Place, ...]
    looks: tuple[Look, ...]
    request: int

    @property
    def length(self) -> int:
        """L."""
        return int(self.ids.shape[1])

    @property
    def padded(self) -> bool:
        """Whether any position is padding; known without a device sync."""
        return not self._full

    @property
    def learns(self) -> bool:
        """Whether it holds a label."""
        return bool((self.labels != IGNORED).any())

    _full: bool = field(default=False, repr=False)


@dataclass(slots=True)
class TokenCounts:
    """The positions that the LLM processes for one answer, none counted twice."""

    text: int = 0
    static: int = 0
    request: int = 0
    dynamic: int = 0
    generated: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Count both."""
        mine, more = astuple(self), astuple(other)
        return TokenCounts(*(a + b for a, b in zip(mine, more, strict=True)))

    def total(self) -> int:
        """All of them together."""
        return self.text + self.static + self.request + self.dynamic + self.generated


def lay_out(
    plans: Sequence[Plan],
    statics: Sequence[Sequence[int]],
    request: int,
    dynamic: int,
    cached: int = 0,
    start: Sequence[int] | None = None,
) -> tuple[list[Segment], list[TokenCounts], list[list[int]]]:
    """Lay plans out side by side.

    Args:
        plans: one a row.
        statics: for each row, the number S of static tokens of each of its pictures.
        request: R.
        dynamic: the slots that a look fills.
        cached: positions that a look adds to the cache, before what follows it.
        start: for each row, how many tokens its cache already holds.

    Returns:
        The segments; the token counts of each row; and for each row, the position at which each
        of its pictures stands.

    Raises:
        PromptError: a look fills no slot and nothing follows it for the LLM to read, or a picture
            has a place and no features.
    """
    rows = [_spread(plan.segments, max(len(p.segments) for p in plans)) for plan in plans]
    counts = [TokenCounts() for _ in plans]
    pictures: list[list[int]] = [[] for _ in plans]
    position = list(start or [0] * len(plans))
    segments = []
    for column in zip(*rows, strict=True):
        sizes = [
            sum(_length(p, s, request, dynamic) for p in pieces)
            for pieces, s in zip(column, statics, strict=True)
        ]
        width = max(sizes)
        ids = [[0] * width for _ in plans]
        labels = [[IGNORED] * width for _ in plans]
        places: list[_Place] = []
        fills: list[_Place] = []
        looks: list[Look] = []
        for row, pieces in enumerate(column):
            at = width - sizes[row]
            for piece in pieces:
                size = _length(piece, statics[row], request, dynamic)
                if isinstance(piece, Tokens):
                    ids[row][at : at + size] = piece.ids
                    if piece.learn:
                        labels[row][at : at + size] = piece.ids
                    counts[row].text += size
                elif isinstance(piece, ImageSlot):
                    if size:
                        places.append(_Place(row, at, size, piece.image))
                    pictures[row].append(position[row] + at - (width - sizes[row]))
                    counts[row].static += size
                elif isinstance(piece, DynamicSlot):
                    position[row] += cached
                    if size:
                        fills.append(_Place(row, at, size))
                    else:
                        _check_rest(pieces)
                    counts[row].dynamic += size
                else:
                    looks.append(Look(row, piece.round, piece.images))
                    counts[row].request += size
                at += size
            position[row] += sizes[row]
        mask = [[False] * (width - size) + [True] * size for size in sizes]
        segments.append(
            Segment(
                torch.tensor(ids).reshape(len(plans), width),
                torch.tensor(mask).reshape(len(plans), width),
                torch.tensor(labels).reshape(len(plans), width),
                tuple(places),
                tuple(fills),
                tuple(looks),
                request,
                min(sizes) == width,
            )
        )
    return segments, counts, pictures


def _check_rest(pieces: Sequence[Piece]) -> None:
    """Refuse what begins with a look that fills no slot and goes on with nothing to read."""
    rest = [p for p in pieces if not isinstance(p, (DynamicSlot, ImageSlot))]
    if not rest or (isinstance(rest[0], Tokens) and rest[0].learn):
        raise PromptError(
            "nothing stands between the look and the answer: this injector fills no slot, so the "
            "LLM would answer before it has read the message. Use a chat template that begins the "
            "answer's turn, or put 'look' before 'text' in layout.order."
        )


def _length(piece: Piece, statics: Sequence[int], request: int, dynamic: int) -> int:
    if isinstance(piece, Tokens):
        return len(piece.ids)
    if isinstance(piece, ImageSlot):
        if piece.image >= len(statics):
            raise PromptError(
                f"a prompt has places for {piece.image + 1} pictures or more, and there are "
                f"features of {len(statics)}."
            )
        return statics[piece.image]
    return request if isinstance(piece, RequestSlot) else dynamic


def _spread(segments: list[tuple[Piece, ...]], columns: int) -> list[tuple[Piece, ...]]:
    """Place a row's segments into the batch's columns: its last one into the last column.

    The first column must not be empty, or its keys would be all padding: a row without a look
    puts all but its last piece's last token there.
    """
    if len(segments) == columns:
        return segments
    if len(segments) == 1:
        segments = list(_cut(segments[0]))
    blank: list[tuple[Piece, ...]] = [()] * (columns - len(segments))
    return [*segments[:-1], *blank, segments[-1]]


def _cut(pieces: tuple[Piece, ...]) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Cut before the last token, or before the token that predicts the answer to learn."""
    if not pieces:
        return (), ()
    index = len(pieces) - 1
    while index > 0 and isinstance(piece := pieces[index], Tokens) and piece.learn:
        index -= 1
    before = pieces[index]
    if not isinstance(before, Tokens) or (index == 0 and len(before.ids) == 1):
        return pieces[:index], pieces[index:]
    head, last = Tokens(before.ids[:-1], before.learn), Tokens(before.ids[-1:], before.learn)
    kept = (head,) if head.ids else ()
    return (*pieces[:index], *kept), (last, *pieces[index + 1 :])
