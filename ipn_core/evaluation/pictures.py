"""Pictures of an evaluation: each is perceived once, and kept while it is needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ipn_core.features import Box, VisualFeatures
from ipn_core.images import crop
from ipn_core.stages import EncodedImage, PerceiveContext

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.tasks import Example, Picture

__all__ = ["PictureCache"]

MAX_BYTES = 1 << 30
"""How much of encoded pictures is kept in memory, and how much of encoded crops."""


class PictureCache:
    """The encoder's output by `Picture.name`, held until `keep` leaves it out.

    Crops that were looked at are held until there are too many.

    Attributes:
        perceived: how many pictures went through the encoder; crops do not count.
    """

    def __init__(self, model: IPN) -> None:
        self.model = model
        self.perceived = 0
        self._held: dict[str, EncodedImage] = {}
        self._crops: dict[tuple[str, tuple[float, ...]], EncodedImage] = {}

    def room_for(self, picture: Picture) -> int:
        """Return how many pictures like this one fit into `MAX_BYTES`, at least 1."""
        self._load([picture])
        return max(1, MAX_BYTES // max(1, _size(self._held[picture.name])))

    def keep(self, names: Collection[str]) -> None:
        """Drop every picture that is not named."""
        self._held = {name: held for name, held in self._held.items() if name in names}

    @torch.no_grad()
    def features(self, examples: Sequence[Example]) -> VisualFeatures:
        """Return the features of the pictures of a batch, one sample an example."""
        distinct = {picture.name: picture for example in examples for picture in example.images}
        self._load(list(distinct.values()))
        index = {name: i for i, name in enumerate(distinct)}
        found = [self._held[name] for name in distinct]

        shown = [(row, picture) for row, e in enumerate(examples) for picture in e.images]

        @torch.no_grad()
        def look(boxes: Sequence[Box]) -> VisualFeatures:
            crops = [(shown[image][1], tuple(edges)) for image, *edges in boxes]
            held = self._look(crops)
            empty = torch.zeros(0, self.model.encoder.width)
            rows = [shown[image][0] for image, *_ in boxes]
            packed = VisualFeatures.of(held, rows, len(examples), empty)
            return packed.to(self.model.backbone.device)

        shared = VisualFeatures.share(
            [e.values for e in found],
            [e.grid for e in found],
            [[index[picture.name] for picture in example.images] for example in examples],
            self.model.encoder.width,
            [e.global_token for e in found],
            look,
        )
        return shared.to(self.model.backbone.device)

    def _look(self, crops: Sequence[tuple[Picture, tuple[float, ...]]]) -> list[EncodedImage]:
        """Encode crops, unless they are held; pictures are opened again only for this."""
        missing: dict[str, list[tuple[float, ...]]] = {}
        pictures = {picture.name: picture for picture, _ in crops}
        for name, edges in dict.fromkeys((picture.name, edges) for picture, edges in crops):
            if (name, edges) not in self._crops:
                missing.setdefault(name, []).append(edges)
        for name, parts in missing.items():
            image = pictures[name].load()
            encoded = self.model.encoder.encode([crop(image, edges) for edges in parts])
            for edges, one in zip(parts, encoded, strict=True):
                self._crops[name, edges] = _copied(one.values, one.grid, one.global_token)
        found = [self._crops[picture.name, edges] for picture, edges in crops]
        excess = sum(map(_size, self._crops.values())) - MAX_BYTES
        while excess > 0:
            excess -= _size(self._crops.pop(next(iter(self._crops))))
        return found

    @torch.no_grad()
    def _load(self, pictures: Sequence[Picture]) -> None:
        pictures = [p for p in pictures if p.name not in self._held]
        if not pictures:
            return
        images = [[picture.load()] for picture in pictures]
        packed = self.model.encoder(PerceiveContext(images, [""] * len(images))).features
        tokens = packed.global_tokens
        for index, (picture, span) in enumerate(zip(pictures, packed.images, strict=True)):
            values = packed.values[span.offset : span.offset + span.length]
            token = None if tokens is None else tokens[index]
            self._held[picture.name] = _copied(values, span.grid, token)
        self.perceived += len(pictures)


def _copied(values: Tensor, grid: tuple[int, int], token: Tensor | None) -> EncodedImage:
    """Copy what is to be held: a view would keep the whole batch alive."""
    return EncodedImage(values.clone(), grid, None if token is None else token.clone())


def _size(encoded: EncodedImage) -> int:
    summary = encoded.global_token
    tensors = [encoded.values] if summary is None else [encoded.values, summary]
    return sum(t.numel() * t.element_size() for t in tensors)
