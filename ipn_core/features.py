"""`VisualFeatures`: what the pictures of a batch look like to an interaction, packed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ipn_core.errors import ShapeError
from ipn_core.transfer import send, tensor_on

if TYPE_CHECKING:
    from ipn_core.records import EncodedImage

__all__ = ["Box", "ImageSpan", "VisualFeatures"]

_T = TypeVar("_T")

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
        box: (left, top, right, bottom) of the part of that picture that the patches show, as
            fractions of its sides; a crop has the place of the picture that it is cut from.
    """

    sample: int
    grid: tuple[int, int]
    offset: int
    place: int = 0
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def length(self) -> int:
        """Return h·w."""
        return self.grid[0] * self.grid[1]

    def moved(self, sample: int, place: int) -> ImageSpan:
        """Return the same patches as a picture of another sample."""
        return replace(self, sample=sample, place=place)


@dataclass(frozen=True, eq=False)
class VisualFeatures:
    """The patches of all pictures of a batch, any number and resolution a sample.

    Attributes:
        values: (N, Dv) patch features, the pictures one after the other.
        images: one span a picture, in the order of the samples' prompts; several samples may
            share the patches of one picture, at the same place in each prompt.
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
        needed = max((span.offset + span.length for span in self.images), default=0)
        if self.values.ndim != 2 or self.values.shape[0] < needed:
            raise ShapeError(
                f"VisualFeatures.values must be (N, Dv) with N >= {needed}, the patches of "
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

    @classmethod
    def of(
        cls,
        encoded: Sequence[EncodedImage],
        samples: Sequence[int],
        batch: int,
        empty: Tensor,
        looker: Callable[[Sequence[Box]], VisualFeatures] | None = None,
    ) -> VisualFeatures:
        """Pack what an encoder made of pictures; `samples` says whose each is, in prompt order.

        Args:
            encoded: one a picture; their global tokens are kept if all have one.
            samples: the row of the batch that each belongs to.
            batch: number of samples B.
            empty: (0, Dv) the values for no picture.
            looker: as in the class.
        """
        tokens = [one.global_token for one in encoded if one.global_token is not None]
        return cls.pack(
            [one.values for one in encoded] or [empty],
            [one.grid for one in encoded],
            samples,
            batch,
            torch.stack(tokens) if tokens and len(tokens) == len(encoded) else None,
            looker,
        )

    @classmethod
    def share(
        cls,
        values: Sequence[Tensor],
        grids: Sequence[tuple[int, int]],
        rows: Sequence[Sequence[int]],
        width: int,
        global_tokens: Sequence[Tensor | None] = (),
        looker: Callable[[Sequence[Box]], VisualFeatures] | None = None,
    ) -> VisualFeatures:
        """Pack pictures that several samples may show, the patches of each once for each place.

        Args:
            values: one (h·w, Dv) tensor a distinct picture.
            grids: the (h, w) of each.
            rows: for each sample, which of the pictures its prompt shows, in order.
            width: Dv, for a batch without a picture.
            global_tokens: (Dv,) a picture; left out unless all have one.
            looker: as in the class.
        """
        shown = [(row, place, one) for row, r in enumerate(rows) for place, one in enumerate(r)]
        spans: dict[tuple[int, int], ImageSpan] = {}
        packed: list[Tensor] = [] if shown else [torch.zeros(0, width)]
        offset = 0
        for _, place, one in shown:
            if (one, place) not in spans:
                spans[one, place] = ImageSpan(0, grids[one], offset, place)
                packed.append(values[one])
                offset += len(values[one])
        tokens = [token for token in global_tokens if token is not None]
        whole = bool(tokens) and len(tokens) == len(values)
        return cls(
            torch.cat(packed),
            tuple(spans[one, place].moved(row, place) for row, place, one in shown),
            len(rows),
            torch.stack([tokens[one] for *_, one in shown]) if whole and shown else None,
            looker,
        )

    @cached_property
    def lengths(self) -> list[int]:
        """Number of patches of each sample, (B,)."""
        counts = [0] * self.batch
        for span in self.images:
            counts[span.sample] += span.length
        return counts

    @cached_property
    def alike(self) -> bool:
        """Whether the patches of all samples stand in the same places."""
        places: list[list[object]] = [[] for _ in range(self.batch)]
        for span in self.images:
            places[span.sample].append((span.grid, span.box))
        return all(mine == places[0] for mine in places)

    @cached_property
    def derived(self) -> dict[Hashable, Any]:
        """What was made of these features and may be wanted again, in a further look or question.

        Whoever keeps something here names it and everything else that it was made of.
        """
        return {}

    def keep(
        self, what: str, owner: nn.Module, weights: Iterable[Tensor], make: Callable[[], _T]
    ) -> _T:
        """Return what a module makes of these features; while nothing is learned, made once.

        Args:
            what: names it, among all that the module makes of them.
            owner: the module.
            weights: all that it is made with; when one of them has changed, it is made anew.
            make: makes it.
        """
        weights = list(weights)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        if any(w.is_inference() for w in weights):  # nobody counts their changes
            return make()
        state = tuple((id(w), w._version, w.dtype, w.device) for w in weights)
        key = (what, id(owner), state)
        if key not in self.derived:
            # With those whose ids these are, so that no others can come to have them.
            self.derived[key] = owner, weights, make()
        found: _T = self.derived[key][-1]
        return found

    @cached_property
    def _index(self) -> Tensor | None:
        """(B, P) index into the packed values, -1 for padding; None if already rectangular."""
        rows: list[list[int]] = [[] for _ in range(self.batch)]
        for span in self.images:
            rows[span.sample].extend(range(span.offset, span.offset + span.length))
        width = max(self.lengths, default=0)
        whole = self.batch * width
        if self.values.shape[0] == whole and [i for r in rows for i in r] == list(range(whole)):
            return None
        padded = [row + [-1] * (width - len(row)) for row in rows]
        return tensor_on(padded, self.values.device).reshape(self.batch, width)

    def spread(self, packed: Tensor) -> Tensor:
        """Lay what belongs to the packed patches, (N, …), out as (B, P, …), zeros where padded.

        An interaction that maps `values` first and spreads the result maps each picture once,
        however many questions are asked of it.
        """
        if self._index is None:
            return packed.reshape(self.batch, -1, *packed.shape[1:])
        if packed.shape[0] == 0:
            return packed.new_zeros(*self._index.shape, *packed.shape[1:])
        index = self._index
        gathered = packed.index_select(0, index.clamp(min=0).flatten())
        gathered = gathered.reshape(*index.shape, *packed.shape[1:])
        if len(set(self.lengths)) == 1:  # without asking the device
            return gathered
        real = self.mask.reshape(*index.shape, *[1] * (packed.ndim - 1))
        return gathered.masked_fill(~real, 0)

    @cached_property
    def mask(self) -> Tensor:
        """(B, P) bool, True where `padded()` holds a patch."""
        if self._index is None:
            width = max(self.lengths, default=0)
            return torch.ones(self.batch, width, dtype=torch.bool, device=self.values.device)
        return self._index >= 0

    def padded(self) -> tuple[Tensor, Tensor]:
        """Return the values as (B, P, Dv), zeros where padded, and the mask (B, P)."""
        return self.spread(self.values), self.mask

    def positions(self) -> Tensor:
        """Return (B, P, 2): each patch's centre (y, x) as fractions of its picture's sides."""
        return self._per_patch([_centres(span.grid, span.box) for span in self.images], (2,))

    def places(self) -> Tensor:
        """Return (B, P) long: the ordinal of the picture that each patch belongs to."""
        parts = [torch.full((span.length,), span.place) for span in self.images]
        return self._per_patch(parts, ()).long()

    def packed_positions(self) -> tuple[Tensor, Tensor]:
        """Return the positions (N, 2) and places (N,) of the packed patches, each once."""
        positions = torch.zeros(self.values.shape[0], 2)
        places = torch.zeros(self.values.shape[0], dtype=torch.long)
        distinct = {(s.offset, s.grid, s.place, s.box) for s in self.images}
        for offset, grid, place, box in distinct:
            end = offset + grid[0] * grid[1]
            positions[offset:end] = _centres(grid, box)
            places[offset:end] = place
        device = self.values.device
        return send(positions, device), send(places, device)

    def _per_patch(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Lay one (h·w, …) tensor a picture out as (B, P, …), zeros where padded."""
        laid = torch.zeros(self.batch, max(self.lengths, default=0), *shape)
        filled = [0] * self.batch
        for span, part in zip(self.images, parts, strict=True):
            start = filled[span.sample]
            laid[span.sample, start : start + span.length] = part
            filled[span.sample] += span.length
        return send(laid, self.values.device)

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
        mine: dict[int, list[int]] = {}
        for index, span in enumerate(self.images):
            mine.setdefault(span.sample, []).append(index)
        kept = [
            (row, index)
            for row, sample in enumerate(samples)
            for index in mine.get(sample, [])[: None if pictures is None else pictures[row]]
        ]
        return self.pick(kept, len(samples))

    def pick(self, pictures: Sequence[tuple[int, int]], batch: int) -> VisualFeatures:
        """Return the features of some pictures; `values` are the same, with patches of all.

        Args:
            pictures: for each, the row that it is for, and its index in `images`.
            batch: number of rows.
        """
        indices = [index for _, index in pictures]
        tokens, look = self.global_tokens, self.looker
        picked = VisualFeatures(
            self.values,
            tuple(replace(self.images[index], sample=row) for row, index in pictures),
            batch,
            None if tokens is None else tokens[tensor_on(indices, tokens.device, torch.long)],
            None if look is None else partial(_look_at_chosen, look, pictures, batch),
        )
        whole, own = self.picked
        # Not a field: what is made of these by `dataclasses.replace` may have other patches.
        picked.__dict__["_picked"] = whole, [own[index] for index in indices]
        return picked

    @property
    def picked(self) -> tuple[VisualFeatures, Sequence[int]]:
        """The features that these were picked from, or they themselves; each picture's index there.

        What is made of single patches may be made of those once, for all that is picked from them.
        """
        found: tuple[VisualFeatures, Sequence[int]]
        found = self.__dict__.get("_picked", (self, range(len(self.images))))
        return found

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
                "these features cannot look again: they came without their pictures, or from a "
                "perceiver that keeps none."
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

    def to(
        self, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> VisualFeatures:
        """Return the same features on another device or in another dtype.

        While nothing is learned those in another dtype are kept, with all that is kept with them.
        """
        device, dtype = device or self.values.device, dtype or self.values.dtype
        if (device, dtype) == (self.values.device, self.values.dtype):
            return self
        if device != self.values.device or torch.is_grad_enabled():
            return self._moved(device, dtype)
        if dtype not in self.derived:
            self.derived[dtype] = self._moved(device, dtype)
        found: VisualFeatures = self.derived[dtype]
        return found

    def _moved(self, device: torch.device, dtype: torch.dtype) -> VisualFeatures:
        tokens = self.global_tokens
        return replace(
            self,
            values=send(self.values, device, dtype),
            global_tokens=None if tokens is None else send(tokens, device, dtype),
        )


def _look_at_chosen(
    look: Callable[[Sequence[Box]], VisualFeatures],
    chosen: Sequence[tuple[int, int]],
    batch: int,
    boxes: Sequence[Box],
) -> VisualFeatures:
    """Look again for a selection: `chosen` holds (row, image looked at) for each picture."""
    seen = look([(chosen[box[0]][1], *box[1:]) for box in boxes])
    rows = [chosen[box[0]][0] for box in boxes]
    spans = (replace(s, sample=row) for s, row in zip(seen.images, rows, strict=True))
    return replace(seen, images=tuple(spans), batch=batch)


@lru_cache(maxsize=256)
def _centres(grid: tuple[int, int], box: tuple[float, float, float, float]) -> Tensor:
    (height, width), (left, top, right, bottom) = grid, box
    y = top + (torch.arange(height) + 0.5) / height * (bottom - top)
    x = left + (torch.arange(width) + 0.5) / width * (right - left)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2)
