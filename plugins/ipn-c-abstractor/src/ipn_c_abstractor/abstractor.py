"""The connector `c-abstractor`: convolutions, pooling to n × n, convolutions."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from ipn_c_abstractor.blocks import stage
from ipn_core.config import Config
from ipn_core.features import VisualFeatures
from ipn_core.stages import Connector, Dims, PerceiveContext, VisionEncoder

__all__ = ["CAbstractor", "CAbstractorConfig"]


class CAbstractorConfig(Config):
    """The sizes of the abstractor; the defaults are those of Honeybee-C-7B-M144.

    Attributes:
        tokens: S a picture, a square number; Honeybee's M.
        depth: residual blocks L before the pooling, and as many after it.
        hidden: channels of the blocks.
        mlp: linear layers from there to the LLM's width, with a SiLU between each two.
        grid: patches a side that positions are learned for: 16 for CLIP ViT-L/14 at 224 pixels.
    """

    tokens: int = Field(default=144, ge=1, le=4096)
    depth: int = Field(default=3, ge=1, le=64)
    hidden: int = Field(default=1024, ge=1, le=65536)
    mlp: int = Field(default=2, ge=1, le=16)
    grid: int = Field(default=16, ge=1, le=256)

    @field_validator("tokens")
    @classmethod
    def _is_square(cls, tokens: int) -> int:
        low = isqrt(tokens)
        if low * low != tokens:
            raise ValueError(f"must be a square number, such as {low**2} or {(low + 1) ** 2}")
        return tokens


class CAbstractor(Connector):
    """`mlp(after(pool(before(patches + positions))))`: n × n tokens that keep their places.

    Honeybee (Cha et al., arXiv 2312.06742, section 3, and `CAbstractor` in its released code):
    L residual blocks, adaptive average pooling to n × n, L residual blocks, an MLP to the LLM's
    width; a learned position is added to every patch first. Published are square pictures of one
    size. Ours is that any grid is taken: the positions are resampled to the grid of each picture
    (bicubic, smoothed where it is coarser; not at all where it is the grid that they were learned
    for), and pooling makes n × n of any sides, so that a wide picture gets wide cells.
    """

    Config = CAbstractorConfig

    def __init__(self, config: CAbstractorConfig, dims: Dims, encoder: VisionEncoder) -> None:
        super().__init__(config, dims, encoder)
        self.positions = nn.Parameter(torch.empty(config.grid**2, dims.Dv))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.before = stage(config.depth, dims.Dv, config.hidden)
        self.after = stage(config.depth, config.hidden, config.hidden)
        layers: list[nn.Module] = [nn.Linear(config.hidden, dims.D_in)]
        for _ in range(1, config.mlp):
            layers += [nn.SiLU(), nn.Linear(dims.D_in, dims.D_in)]
        self.mlp = nn.Sequential(*layers)

    @property
    def static_tokens(self) -> int | None:
        """Static tokens S a picture, whatever its grid."""
        return int(self.config.tokens)

    def connect(self, features: VisualFeatures, context: PerceiveContext) -> list[Tensor]:
        """Return (S, D_in) for each picture; pictures of one grid go through together."""
        offsets: dict[tuple[int, int], dict[int, None]] = {}
        for span in features.images:
            offsets.setdefault(span.grid, {})[span.offset] = None
        if not offsets:
            return []
        pooled = torch.cat([self._pool(features.values, g, list(o)) for g, o in offsets.items()])
        tokens = self.mlp(self.after(pooled).flatten(2).mT)  # (pictures, S, D_in)
        places = [(grid, offset) for grid, some in offsets.items() for offset in some]
        parts = dict(zip(places, tokens.unbind(), strict=True))
        return [parts[span.grid, span.offset] for span in features.images]

    def _pool(self, values: Tensor, grid: tuple[int, int], offsets: list[int]) -> Tensor:
        """Return pictures of one grid as (pictures, hidden, n, n)."""
        count = grid[0] * grid[1]
        patches = torch.stack([values[offset : offset + count] for offset in offsets])
        placed = patches.to(self.positions.dtype) + self._positions(grid)  # (pictures, h·w, Dv)
        maps: Tensor = self.before(placed.mT.unflatten(-1, grid))  # (pictures, hidden, h, w)
        return F.adaptive_avg_pool2d(maps, isqrt(self.config.tokens))

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Return the positions of a grid, (h·w, Dv)."""
        learned = (self.config.grid, self.config.grid)
        if grid == learned:
            return self.positions
        # In float32: the smoothed resampling has no half precision on the CPU.
        maps = self.positions.float().T.unflatten(-1, learned)[None]
        options: dict[str, Any] = {"mode": "bicubic", "antialias": True}
        resampled = F.interpolate(maps, grid, **options)[0].flatten(1).T
        return resampled.to(self.positions.dtype)
