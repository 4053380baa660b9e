"""`VisualFeatures`: what the pictures of a batch look like to an interaction, packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ipn_core.errors import ShapeError

__all__ = ["Box", "ImageSpan", "VisualFeatures"]

Box = tuple[int, float, float, float, float]
"""(image, left, top, right, bottom), the edges as fractions of that picture's width and height."""


@dataclass(frozen=True, slots=True)
class ImageSpan:
    """Where one picture's patches lie in the packed values.

    Attributes:
        sample: the row of the batch that the picture belongs to.
        grid: (h, w) patches; h·w values lie from `offset` on, row by row.
        offset: index of its first patch.
        place: its ordinal among the pictures of its sample's prompt.
    """

    sample: int
    grid: tuple[int, int]
    offset: int
    place: int = 0

    @property
    def length(self) -> int:
        """Return h·w."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class VisualFeatures:
    """The patches of all pictures of a batch, any number and resolution a sample.

    Attributes:
        values: (N, Dv) patch features, the pictures one after the other.
        images: one span a picture, in the order of `values`.
        batch: number of samples B; a sample may have no picture.
        global_tokens: (images, Dv) one summary a picture (a class token), or None.
        looker: perceives crops of the original pictures again, or None; see `look`.
    """

    values: Tensor
    images: tuple[ImageSpan, ...]
    batch: int
    global_tokens: Tensor | None = None
    looker: Callable[[Sequence[Box]], VisualFeatures] | None = None

    def __post_init__(self) -> None:
        expected = sum(span.length for span in self.images)
        if self.values.ndim != 2 or self.values.shape[0] != expected:
            raise ShapeError(
                f"VisualFeatures.values must be (N, Dv) with N = {expected}, the patches of "
                f"{len(self.images)} picture(s); got {tuple(self.values.shape)}."
            )

    @classmethod
    def pack(
        cls,
        values: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        samples: Sequence[int],
        batch: int,
        global_tokens: Tensor | None = None,
        looker: Callable[[Sequence[Box]], VisualFeatures] | None = None,
    ) -> VisualFeatures:
        """Pack one (h·w, Dv) tensor a picture; `samples` says whose each is, in prompt order."""
        spans, offset, seen = [], 0, dict.fromkeys(range(batch), 0)
        for grid, sample in zip(grids, samples, strict=True):
            spans.append(ImageSpan(sample, grid, offset, seen[sample]))
            offset += spans[-1].length
            seen[sample] += 1
        return cls(torch.cat(list(values)), tuple(spans), batch, global_tokens, looker)

    @cached_property
    def lengths(self) -> list[int]:
        """Number of patches of each sample, (B,)."""
        counts = [0] * self.batch
        for span in self.images:
            counts[span.sample] += span.length
        return counts

    @cached_property
    def _index(self) -> Tensor | None:
        """(B, P) index into the packed values, -1 for padding; None if already rectangular."""
        rows: list[list[int]] = [[] for _ in range(self.batch)]
        for span in self.images:
            rows[span.sample].extend(range(span.offset, span.offset + span.length))
        width = max(self.lengths, default=0)
        flat = [i for row in rows for i in row]
        if flat == list(range(len(flat))) and all(len(row) == width for row in rows):
            return None
        padded = [row + [-1] * (width - len(row)) for row in rows]
        return torch.tensor(padded, device=self.values.device).reshape(self.batch, width)

    def _pad(self, packed: Tensor) -> Tensor:
        """Lay (N, …) out as (B, P, …), zeros where padded."""
        if self._index is None:
            return packed.reshape(self.batch, -1, *packed.shape[1:])
        if packed.shape[0] == 0:
            return packed.new_zeros(*self._index.shape, *packed.shape[1:])
        gathered = packed[self._index.clamp(min=0)]
        real = (self._index >= 0).reshape(*self._index.shape, *[1] * (packed.ndim - 1))
        return gathered * real.to(gathered.dtype)

    @cached_property
    def mask(self) -> Tensor:
        """(B, P) bool, True where `padded()` holds a patch."""
        if self._index is None:
            width = max(self.lengths, default=0)
            return torch.ones(self.batch, width, dtype=torch.bool, device=self.values.device)
        return self._index >= 0

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return the values as (B, P, Dv), zeros where padded, and the mask (B, P)."""
        return self._pad(self.values), self.mask

    def positions(self) -> Tensor:
        """Return (B, P, 2): each patch's centre (y, x) as fractions of its picture's sides."""
        return self._pad(torch.cat([_centres(s.grid) for s in self.images] or [torch.zeros(0, 2)])
                         .to(self.values.device))

    def places(self) -> Tensor:
        """Return (B, P) long: the ordinal of the picture that each patch belongs to."""
        parts = [torch.full((s.length,), s.place) for s in self.images]
        packed = torch.cat(parts or [torch.zeros(0)]).to(self.values.device, torch.long)
        return self._pad(packed)

    def grids(self, sample: int) -> tuple[tuple[int, int], ...]:
        """Return the (h, w) of each picture of a sample, in prompt order."""
        return tuple(span.grid for span in self.images if span.sample == sample)

    def select(
        self, samples: Sequence[int], pictures: Sequence[int] | None = None
    ) -> VisualFeatures:
        """Return the features of some samples, renumbered 0, 1, … in the order given.

        Args:
            samples: the rows to keep; a row may be named twice.
            pictures: for each of them, how many of its first pictures to keep; None keeps all.
        """
        whole = pictures is None or all(
            n >= len(self.grids(s)) for s, n in zip(samples, pictures, strict=True)
        )
        if whole and list(samples) == list(range(self.batch)):
            return self
        kept: list[tuple[int, int]] = []
        for row, sample in enumerate(samples):
            mine = [i for i, span in enumerate(self.images) if span.sample == sample]
            kept.extend((row, i) for i in mine[: None if pictures is None else pictures[row]])
        spans = [self.images[i] for _, i in kept]
        values = [self.values[s.offset : s.offset + s.length] for s in spans]
        tokens = self.global_tokens
        look = self.looker
        return VisualFeatures.pack(
            values or [self.values[:0]],
            [s.grid for s in spans],
            [row for row, _ in kept],
            len(samples),
            None if tokens is None else tokens[[i for _, i in kept]],
            None if look is None else lambda boxes: look([(kept[b[0]][1], *b[1:]) for b in boxes]),
        )

    def look(self, boxes: Sequence[Box]) -> VisualFeatures:
        """Perceive crops of the original pictures again, at the perceiver's full resolution.

        Args:
            boxes: which picture (its index in `images`) and which part of it.

        Returns:
            Features with one picture for each box, in the order of `boxes`, belonging to the
            sample of the picture that was cropped.

        Raises:
            ShapeError: this perceiver cannot look again, or a box is empty or out of range.
        """
        if self.looker is None:
            raise ShapeError(
                "these features cannot look again: they came from a cache or from a perceiver "
                "that keeps no pictures."
            )
        for image, left, top, right, bottom in boxes:
            inside = 0 <= left < right <= 1 and 0 <= top < bottom <= 1
            if not (0 <= image < len(self.images)) or not inside:
                raise ShapeError(
                    f"box {(image, left, top, right, bottom)} must name one of "
                    f"{len(self.images)} picture(s) and edges 0 <= left < right <= 1, "
                    "0 <= top < bottom <= 1."
                )
        return self.looker(boxes)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> (
        VisualFeatures
    ):
        """Return the same features on another device or in another dtype."""
        tokens = self.global_tokens
        return replace(
            self,
            values=self.values.to(device=device, dtype=dtype),
            global_tokens=None if tokens is None else tokens.to(device=device, dtype=dtype),
        )


def _centres(grid: tuple[int, int]) -> Tensor:
    height, width = grid
    y = (torch.arange(height) + 0.5) / height
    x = (torch.arange(width) + 0.5) / width
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)
