"""EfficientNet-Lite0 as a frozen encoder whose features are the logits of its ImageNet classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from ipn_starter.encoder import digest, feature_maps, load_classifier
from pydantic import Field

from ipn_core.config import Config
from ipn_core.stages import EncodedImage, Label, VisionEncoder
from ipn_names.classes import labels

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ImageNetNames", "ImageNetNamesConfig"]

_STRIDE = 32


class ImageNetNamesConfig(Config):
    """How pictures are prepared.

    Attributes:
        whole: pixels of the longer side for what is said of the whole picture.
        parts: pixels of the longer side for what is said of its patches, 32 pixels each.
    """

    whole: int = Field(default=224, ge=64, le=1024, multiple_of=_STRIDE)
    parts: int = Field(default=384, ge=64, le=1024, multiple_of=_STRIDE)


class ImageNetNames(VisionEncoder):
    """Logits of 1,000 classes for each patch, and as the global token for the whole picture.

    The classifier is linear after its pooling, so that its last layer applies to every patch, and
    the mean of some patches' logits is what it says of them together. Pixels are scaled to -1…1.
    Pictures keep their proportions up to whole patches: nothing is cropped or padded.
    """

    Config = ImageNetNamesConfig

    def __init__(self, config: ImageNetNamesConfig) -> None:
        super().__init__(config)
        self.net = load_classifier()

    @property
    def width(self) -> int:
        """One feature a class."""
        return len(labels())

    @property
    def labels(self) -> tuple[Label, ...]:
        """The classes."""
        return labels()

    @property
    def fingerprint(self) -> str:
        """The digest of the weights and both sizes."""
        return f"imagenet-names-{digest()}-{self.config.whole}-{self.config.parts}"

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Classify pictures and their patches."""
        return [self._encode(image) for image in images]

    def _encode(self, image: Image.Image) -> EncodedImage:
        whole = feature_maps(self.net, [image], _fitted(image.size, self.config.whole))
        parts = feature_maps(self.net, [image], _fitted(image.size, self.config.parts))
        values = self.net._fc(parts[0].flatten(1).T)
        grid = (parts.shape[2], parts.shape[3])
        return EncodedImage(values, grid, self.net._fc(whole[0].mean((1, 2))))


def _fitted(size: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return a size of about the same proportions in whole patches, at least two a side."""
    scale = longest / max(size) / _STRIDE
    width, height = (max(2, round(side * scale)) * _STRIDE for side in size)
    return width, height
