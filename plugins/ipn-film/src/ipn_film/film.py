"""FiLM: features scaled and shifted by the request, then pooled."""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from ipn_core import Config, Dims, Interaction, Request, VisualFeatures, VisualMessage
from ipn_core.positions import cosines

__all__ = ["FiLM", "FiLMConfig"]


class FiLMConfig(Config):
    """The size of the modulated features.

    Attributes:
        width: channels C that are scaled and shifted.
        frequencies: cosines a side in the position code of the patches, 0 for none.
        message: width of the message, 0 for the width of the LLM's input embeddings.
    """

    width: int = Field(default=512, ge=1, le=65536)
    frequencies: int = Field(default=8, ge=0, le=64)
    message: int = Field(default=0, ge=0, le=65536)


class FiLM(Interaction):
    """For each token k, `mean over patches of relu((1 + γ)·x + β)` with `(γ, β) = W·request + b`.

    The modulation is that of Perez et al. 2018 (arXiv 1709.07871, section 2.1) with the scale
    counted from 1, as their code does; they apply it between convolutions, and pool at the end.
    """

    Config = FiLMConfig

    def __init__(self, config: FiLMConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.patch_in = nn.Linear(dims.Dv, config.width)
        sides = 2 * config.frequencies
        self.position_in = nn.Linear(sides, config.width, bias=False) if sides else None
        self.norm = nn.LayerNorm(config.width)
        self.modulate = nn.Linear(dims.R * dims.D_request, dims.K * 2 * config.width)
        self.out = nn.Linear(config.width, self.width)

    @property
    def width(self) -> int:
        """Width Dm of the message."""
        return int(self.config.message or self.dims.D_in)

    @property
    def objectives(self) -> frozenset[str]:
        """Its message may stand for an answer's embedding."""
        return frozenset({"answer-embedding", "verbalise"})

    def forward(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Modulate the patches with the request; see `Interaction.forward`."""
        patches = self.patch_in(features.values)  # (N, C)
        if self.position_in is not None:
            positions, _ = features.packed_positions()
            code = cosines(positions, self.config.frequencies).to(patches.dtype)
            patches = patches + self.position_in(code)
        x = features.spread(self.norm(patches)).unsqueeze(1)  # (B, 1, P, C)
        modulation = self.modulate(request.values.flatten(1)).unflatten(-1, (self.dims.K, 1, -1))
        scale, shift = modulation.chunk(2, dim=-1)  # (B, K, 1, C) each
        lit = F.relu((1 + scale) * x + shift)  # (B, K, P, C)
        real = features.mask[:, None, :, None]
        pooled = (lit * real).sum(2) / real.sum(2).clamp(min=1)
        return VisualMessage(self.out(pooled))
