"""Tiny interactions for tests: one that keeps its attention map, and one that has none."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import nn

from ipn_core.config import Config
from ipn_core.features import VisualFeatures
from ipn_core.stages import Dims, Interaction, Request, VisualMessage

__all__ = ["TinyInteractionConfig", "TinyLook", "TinyMean"]


class TinyInteractionConfig(Config):
    """Nothing but a width.

    Attributes:
        width: Dm.
    """

    width: int = Field(default=16, ge=1, le=65536)


class TinyLook(Interaction):
    """One look: `softmax((W_q·request + learned queries) · (W_k·features)ᵀ) · W_v·features`."""

    Config = TinyInteractionConfig

    def __init__(self, config: TinyInteractionConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.queries = nn.Parameter(torch.randn(dims.K, config.width))
        self.ask = nn.Linear(dims.D_request, config.width)
        self.key = nn.Linear(dims.Dv, config.width)
        self.value = nn.Linear(dims.Dv, config.width)

    @property
    def width(self) -> int:
        """Width Dm of the message."""
        width: int = self.config.width
        return width

    @property
    def has_map(self) -> bool:
        """It keeps its map."""
        return True

    @property
    def objectives(self) -> frozenset[str]:
        """Its message may stand for an answer where the LLM is as narrow."""
        return frozenset({"answer-embedding", "verbalise"})

    def forward(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Look at the patches of (B, P, Dv) with the mean of the request (B, R, D)."""
        patches, mask = features.padded()
        asked = self.queries + self.ask(request.values.mean(1, keepdim=True))
        scores = asked @ self.key(patches).transpose(1, 2)
        weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
        return VisualMessage(weights @ self.value(patches), weights if request.return_map else None)


class TinyMean(TinyLook):
    """The same, but it does not say where it looked."""

    @property
    def has_map(self) -> bool:
        """It keeps no map."""
        return False
