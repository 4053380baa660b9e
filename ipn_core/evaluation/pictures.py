"""Pictures of an evaluation: each is perceived once, and kept while it is needed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch

from ipn_core.features import Box, VisualFeatures
from ipn_core.stages import EncodedImage, PerceiveContext

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.tasks import Example, Picture

__all__ = ["PictureCache"]

MAX_BYTES = 1 << 30
"""How much of encoded pictures is kept in memory."""


class PictureCache:
    """The encoder's output by `Picture.name`, held until `keep` leaves it out.

    Attributes:
        perceived: how many pictures went through the encoder.
    """

    def __init__(self, model: IPN) -> None:
        self.model = model
        self.perceived = 0
        self._held: dict[str, EncodedImage] = {}

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

        def look(boxes: Sequence[Box]) -> VisualFeatures:
            # Crops come from the pictures themselves, which are opened again only for this.
            images = [[picture.load() for picture in example.images] for example in examples]
            context = PerceiveContext(images, [e.question for e in examples])
            return self.model.encoder(context).features.look(boxes)  # type: ignore[no-any-return]

        shared = VisualFeatures.share(
            [e.values for e in found],
            [e.grid for e in found],
            [[index[picture.name] for picture in example.images] for example in examples],
            self.model.encoder.width,
            [e.global_token for e in found],
            look,
        )
        return shared.to(self.model.backbone.device)

    @torch.no_grad()
    def _load(self, pictures: Sequence[Picture]) -> None:
        pictures = [p for p in pictures if p.name not in self._held]
        if not pictures:
            return
        images = [[picture.load()] for picture in pictures]
        packed = self.model.encoder(PerceiveContext(images, [""] * len(images))).features
        tokens = packed.global_tokens
        for index, (picture, span) in enumerate(zip(pictures, packed.images, strict=True)):
            self._held[picture.name] = EncodedImage(
                # A copy: a view would keep the whole batch alive.
                packed.values[span.offset : span.offset + span.length].clone(),
                span.grid,
                None if tokens is None else tokens[index].clone(),
            )
        self.perceived += len(pictures)


def _size(encoded: EncodedImage) -> int:
    summary = encoded.global_token
    tensors = [encoded.values] if summary is None else [encoded.values, summary]
    return sum(t.numel() * t.element_size() for t in tensors)
