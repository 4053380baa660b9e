"""The perceiver `vision`: patch features of a chosen layer of a Hugging Face vision tower."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ipn_core.config import Config
from ipn_core.errors import ConfigError
from ipn_core.stages import EncodedImage, VisionEncoder
from ipn_core.transfer import send
from ipn_vision.digest import Digest
from ipn_vision.loading import fetch, load_tower
from ipn_vision.pixels import WHOLE, build_processor, read_settings, visible

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["VisionTower", "VisionTowerConfig"]


class VisionTowerConfig(Config):
    """Which tower, and what is read from it.

    Attributes:
        weights: a name of `ipn models list`, a folder or a hub id; of a composite model (CLIP,
            SigLIP, LLaVA, BLIP-2, …) its vision part is used.
        layer: −1 for what the tower itself puts out, after its final norm if it has one; other
            numbers count its hidden states as transformers does (0 before the first layer, −2
            before the last, as LLaVA reads CLIP).
        keep_class_token: whether a class token is kept as the picture's global token; it is never
            one of the patches.
        dtype: to hold the tower in.
        image_size: pixels, (height, width) or one number for both, that whole pictures are
            resized to without cropping; None for what the tower's own settings say. Some of them
            (CLIP's, DINOv2's) crop the middle, so that patches do not cover the whole picture.
        preprocess: settings of the image processor that win over those in the tower's folder.
        batch: pictures that go through the tower at once.
    """

    weights: str
    layer: int = -1
    keep_class_token: bool = True
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    image_size: int | tuple[int, int] | None = None
    preprocess: dict[str, Any] | None = None
    batch: int = Field(default=16, ge=1, le=65536)


class VisionTower(VisionEncoder):
    """A tower's patch features, with the grid that they lie on.

    Raises:
        UserError: the weights or the settings are wrong; nothing is guessed.
    """

    Config = VisionTowerConfig

    def __init__(self, config: VisionTowerConfig) -> None:
        super().__init__(config)
        folder = fetch(config.weights)
        dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
        self.tower = load_tower(folder, dtype).requires_grad_(False)
        its = self.tower.config
        self._takes = inspect.signature(self.tower.forward).parameters
        self._patch = _pair(getattr(its, "patch_size", None) or 1)
        self._check_layer()
        size = None if config.image_size is None else _pair(config.image_size)
        if size is not None and any(s < p or s % p for s, p in zip(size, self._patch, strict=True)):
            raise ConfigError(
                f"image_size {list(size)} must be a multiple of the tower's patches, "
                f"{list(self._patch)} pixels."
            )
        self.settings = read_settings(folder, its.model_type, config.preprocess, size)
        self.processor = build_processor(self.settings)
        self._digest = Digest(self.tower)

    def _check_layer(self) -> None:
        layers = getattr(self.tower.config, "num_hidden_layers", None)
        layer = self.config.layer
        if layers is not None and not -layers - 1 <= layer <= layers:
            raise ConfigError(
                f"layer {layer} is out of range: the tower has hidden states 0 to {layers}, or "
                f"-1 to {-layers - 1} from the end."
            )

    @property
    def width(self) -> int:
        """Width Dv of the features."""
        its = self.tower.config
        width = getattr(its, "hidden_size", None)
        if width is None:
            sizes = getattr(its, "hidden_sizes", None)
            width = sizes[-1] if sizes else its.embed_dim
        return int(width)

    @property
    def looks(self) -> bool:
        """Whether its patches are of the whole picture: boxes of it then mean what they say."""
        return visible(self.processor, (2, 1)) == visible(self.processor, (1, 1)) == WHOLE

    def shows(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return the part of a picture that its processor leaves."""
        return visible(self.processor, size)

    @property
    def fingerprint(self) -> str:
        """A digest of the tower's weights as they are, its config, and what is read from it."""
        its = self.tower.config.to_dict()
        its.pop("_name_or_path", None)  # the same weights elsewhere see the same
        read = {
            "tower": its,
            "layer": self.config.layer,
            "class": self.config.keep_class_token,
            "pixels": self.processor.to_dict(),
        }
        text = self._digest() + json.dumps(read, sort_keys=True, default=str)
        short = hashlib.sha256(text.encode()).hexdigest()[:24]
        return f"vision-{self.tower.config.model_type}-{short}"

    def encode(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Encode pictures; those that are prepared to the same size go through it together.

        Raises:
            ConfigError: the tower's tokens do not lie on the grid of its patches.
        """
        prepared = [self._prepare(image) for image in images]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, inputs in enumerate(prepared):
            groups.setdefault(tuple(inputs["pixel_values"].shape), []).append(index)
        found: dict[int, EncodedImage] = {}
        for indices in groups.values():
            for start in range(0, len(indices), self.config.batch):
                some = indices[start : start + self.config.batch]
                found.update(zip(some, self._encode([prepared[i] for i in some]), strict=True))
        return [found[index] for index in range(len(images))]

    def _prepare(self, image: Image.Image) -> dict[str, Tensor]:
        """Return what the tower takes for one picture, each with a batch of one."""
        made = self.processor(images=[image.convert("RGB")], return_tensors="pt")
        if isinstance(made, Tensor):  # Idefics' gives the pixels alone
            made = {"pixel_values": made}
        inputs = {k: v for k, v in made.items() if k in self._takes and isinstance(v, Tensor)}
        pixels = inputs["pixel_values"]
        if pixels.ndim == 5 and pixels.shape[1] == 1:  # (1, pictures, C, h, w) of chat models
            return {"pixel_values": pixels[:, 0]}
        return inputs

    def _encode(self, prepared: Sequence[dict[str, Tensor]]) -> list[EncodedImage]:
        """Encode pictures of one size."""
        weight = next(self.tower.parameters())
        inputs: dict[str, Any] = {}
        for name in prepared[0]:
            joined = send(torch.cat([one[name] for one in prepared]), weight.device)
            inputs[name] = joined.to(weight.dtype) if joined.is_floating_point() else joined
        pixels = inputs["pixel_values"]
        shapes = inputs.get("spatial_shapes")
        if shapes is None and "interpolate_pos_encoding" in self._takes:
            inputs["interpolate_pos_encoding"] = tuple(pixels.shape[-2:]) != self._native()
        layer = self.config.layer
        if layer != -1:
            inputs["output_hidden_states"] = True
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.tower.parameters())
        with torch.set_grad_enabled(learns):
            out = self.tower(**inputs, return_dict=True)
        values = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        if values.ndim == 4:  # a convolutional tower's map, (B, Dv, h, w)
            grid = (values.shape[2], values.shape[3])
            return [EncodedImage(v, grid) for v in values.flatten(2).mT]
        if shapes is not None:  # SigLIP 2 keeps proportions: (B, padded P, Dv)
            grids = [(int(h), int(w)) for h, w in shapes.tolist()]
            pairs = zip(values, grids, strict=True)
            return [EncodedImage(v[: h * w], (h, w)) for v, (h, w) in pairs]
        return self._split(values, (pixels.shape[-2], pixels.shape[-1]))

    def _split(self, values: Tensor, size: tuple[int, int]) -> list[EncodedImage]:
        """Part (B, T, Dv) tokens into the class token, others that are no patches, and patches."""
        grid = (size[0] // self._patch[0], size[1] // self._patch[1])
        count = grid[0] * grid[1]
        extra = values.shape[1] - count
        if extra < 0:
            raise ConfigError(
                f"the tower '{self.config.weights}' gives {values.shape[1]} tokens for a grid of "
                f"{grid[0]} × {grid[1]} patches, so that they have no places in the picture. "
                "Choose a tower that keeps one token a patch."
            )
        keep = extra > 0 and self.config.keep_class_token
        return [EncodedImage(v[extra:], grid, v[0] if keep else None) for v in values]

    def _native(self) -> tuple[int, int] | None:
        """Return the size (height, width) that the tower's positions were learned for."""
        size = getattr(self.tower.config, "image_size", None)
        return None if size is None else _pair(size)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
