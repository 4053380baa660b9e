"""The connector `static`: a linear map or an MLP from patches to the LLM's width."""

from __future__ import annotations

from math import isqrt
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ipn_core.config import Config
from ipn_core.features import VisualFeatures
from ipn_core.stages import Connector, Dims, PerceiveContext, VisionEncoder

__all__ = ["StaticConfig", "StaticConnector"]

WIDEST_GRID = 64


class StaticConfig(Config):
    """How a picture's patches become static tokens.

    Attributes:
        map: one linear layer, or two with a GELU between them (LLaVA-1.5's).
        hidden: width between the two, 0 for the LLM's own width.
        pool: "none" for a token a patch, "mean" for one a picture, or n for n × n, each the mean
            of its part of the grid.
        tokens: how many tokens a picture instead, 0 for as `pool` says: those of the squarest
            grid of so many parts, 3 × 4 for 12.
        norm: whether a layer norm comes first; towers differ in the size of their features.
    """

    map: Literal["linear", "mlp"] = "linear"
    hidden: int = Field(default=0, ge=0, le=65536)
    pool: Literal["none", "mean"] | int = "none"
    tokens: int = Field(default=0, ge=0, le=WIDEST_GRID**2)
    norm: bool = True

    @field_validator("pool", mode="before")
    @classmethod
    def _known_pool(cls, pool: Any) -> Any:
        number = isinstance(pool, int) and not isinstance(pool, bool)
        if pool in ("none", "mean") or (number and 1 <= pool <= WIDEST_GRID):
            return pool
        raise ValueError(
            f"must be none, mean, or the rows (and columns) to pool to, from 1 to {WIDEST_GRID}"
        )

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        if self.tokens and self.pool != "none":
            raise ValueError("pool and tokens both say how many tokens there are; give one")
        return self

    @property
    def parts(self) -> tuple[int, int] | None:
        """Rows and columns that a picture is pooled to; None for its own grid."""
        if self.tokens:
            rows = next(r for r in range(isqrt(self.tokens), 0, -1) if self.tokens % r == 0)
            return rows, self.tokens // rows
        if self.pool == "none":
            return None
        side = 1 if self.pool == "mean" else int(self.pool)
        return side, side

    @model_validator(mode="after")
    def _hidden_is_used(self) -> Self:
        if self.map == "linear" and self.hidden:
            raise ValueError("hidden is the width inside map: mlp; a linear map has none")
        return self


class StaticConnector(Connector):
    """`map(norm(pool(patches)))`: the same tokens whatever is asked.

    The linear map is LLaVA's (arXiv 2304.08485), the MLP LLaVA-1.5's (arXiv 2310.03744).
    """

    Config = StaticConfig

    def __init__(self, config: StaticConfig, dims: Dims, encoder: VisionEncoder) -> None:
        super().__init__(config, dims, encoder)
        self.norm = nn.LayerNorm(dims.Dv) if config.norm else nn.Identity()
        hidden = config.hidden or dims.D_in
        self.map: nn.Module = (
            nn.Linear(dims.Dv, dims.D_in)
            if config.map == "linear"
            else nn.Sequential(nn.Linear(dims.Dv, hidden), nn.GELU(), nn.Linear(hidden, dims.D_in))
        )

    @property
    def static_tokens(self) -> int | None:
        """Static tokens S a picture; None without pooling, where the grid decides."""
        parts = self.config.parts
        return None if parts is None else parts[0] * parts[1]

    def connect(self, features: VisualFeatures, context: PerceiveContext) -> list[Tensor]:
        """Return (S, D_in) for each picture; patches that pictures share are mapped once."""
        places = {(span.offset, span.grid): None for span in features.images}
        if not places:
            return []
        values = features.values.to(next(self.map.parameters()).dtype)
        pooled = [self._pool(values, *place) for place in places]
        tokens: Tensor = self.map(self.norm(torch.cat(pooled)))
        parts = dict(zip(places, tokens.split([len(p) for p in pooled]), strict=True))
        return [parts[span.offset, span.grid] for span in features.images]

    def _pool(self, values: Tensor, offset: int, grid: tuple[int, int]) -> Tensor:
        """Return one picture's patches (h·w, Dv) pooled to (S, Dv)."""
        height, width = grid
        patches = values[offset : offset + height * width]
        parts = self.config.parts
        if parts is None:
            return patches
        image = patches.T.reshape(1, -1, height, width)  # (1, Dv, h, w)
        return F.adaptive_avg_pool2d(image, parts)[0].flatten(1).T  # (S, Dv)
