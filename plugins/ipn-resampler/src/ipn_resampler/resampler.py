"""The perceiver resampler: a fixed number of learned queries reads each picture, whatever its size.

Letters: I distinct pictures, L latents, N tokens of a picture, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ipn_core.attention import attend
from ipn_core.config import Config
from ipn_core.features import VisualFeatures

__all__ = ["PerceiverResampler", "ResamplerConfig", "with_global_tokens"]


class ResamplerConfig(Config):
    """The size of the resampler; it is as wide as the visual features.

    Attributes:
        latents: learned queries L, and so tokens a picture.
        depth: blocks of attention and MLP.
        heads: attention heads.
        head_width: width of each.
        mlp_ratio: hidden width of the MLPs, in widths.
        qk_norm: whether queries and keys are normalised head by head.
        backend: of `ipn_core.attention`.
    """

    latents: int = Field(default=64, ge=1, le=4096)
    depth: int = Field(default=6, ge=1, le=64)
    heads: int = Field(default=16, ge=1, le=128)
    head_width: int = Field(default=96, ge=1, le=1024)
    mlp_ratio: int = Field(default=4, ge=1, le=16)
    qk_norm: bool = False
    backend: str = "auto"


class PerceiverResampler(nn.Module):
    """In each block `x += attention(x, [x, picture])` and `x += mlp(x)`; a layer norm at the end.

    The resampler of Flamingo (arXiv 2204.14198, section 2.1) without the codes of time, as Idefics
    has it: the latents are among the keys, norms come first, no linear map has a bias.
    """

    def __init__(self, config: ResamplerConfig, width: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(config.latents, width))
        self.blocks = nn.ModuleList(_Block(config, width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, features: VisualFeatures) -> tuple[Tensor, list[int]]:
        """Sum up each distinct picture: its global token, if there is one, and its patches.

        Returns:
            The latents (I, L, W), and for each of `features.images` which of them are its.
        """
        merged = with_global_tokens(features)
        places: dict[tuple[int, int], int] = {}
        whose = [
            places.setdefault((span.offset, span.length), len(places)) for span in merged.images
        ]
        if not places:
            return self.latents.new_zeros(0, *self.latents.shape), []
        tokens = [merged.values[offset : offset + length] for offset, length in places]
        lengths = [length for _, length in places]
        return self.resample(pad_sequence(tokens, batch_first=True), lengths), whose

    def resample(self, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Sum up sequences of tokens.

        Args:
            tokens: (I, N, W), padded on the right.
            lengths: how many of each are real.

        Returns:
            (I, L, W).
        """
        latents = self.latents.expand(len(tokens), -1, -1)
        for block in self.blocks:
            latents = block(latents, tokens, lengths)
        normed: Tensor = self.norm(latents)
        return normed


class _Block(nn.Module):
    def __init__(self, config: ResamplerConfig, width: int) -> None:
        super().__init__()
        self.attention = _Attention(config, width)
        hidden = config.mlp_ratio * width
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, width, bias=False),
        )

    def forward(self, latents: Tensor, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        latents = latents + self.attention(latents, tokens, lengths)
        mixed: Tensor = latents + self.mlp(latents)
        return mixed


class _Attention(nn.Module):
    def __init__(self, config: ResamplerConfig, width: int) -> None:
        super().__init__()
        self.heads, self.backend = config.heads, config.backend
        inner = config.heads * config.head_width
        self.latents_norm = nn.LayerNorm(width)
        self.tokens_norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.q_norm = nn.LayerNorm(config.head_width) if config.qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(config.head_width) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, latents: Tensor, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        latents = self.latents_norm(latents)
        # The latents come first among the keys, so that all padding is on the right.
        read = torch.cat([latents, self.tokens_norm(tokens)], dim=1)
        looked = attend(
            self.q_norm(self._split(self.q(latents))),
            self.k_norm(self._split(self.k(read))),
            self._split(self.v(read)),
            lengths=[latents.shape[1] + length for length in lengths],
            backend=self.backend,
        )
        mapped: Tensor = self.out(looked.flatten(-2))
        return mapped

    def _split(self, values: Tensor) -> Tensor:
        split: Tensor = values.unflatten(-1, (self.heads, -1))
        return split


def with_global_tokens(features: VisualFeatures) -> VisualFeatures:
    """Put each picture's global token before its patches, (1, h·w + 1) in one row.

    Features without global tokens are returned as they are.
    """
    if features.global_tokens is None:
        return features
    placed: dict[tuple[int, int], int] = {}
    spans, pieces, end = [], [features.values[:0]], 0
    for span, token in zip(features.images, features.global_tokens, strict=True):
        key = (span.offset, span.length)
        if key not in placed:
            placed[key], end = end, end + span.length + 1
            pieces += [token[None], features.values[span.offset : span.offset + span.length]]
        spans.append(replace(span, grid=(1, span.length + 1), offset=placed[key]))
    return VisualFeatures(torch.cat(pieces), tuple(spans), features.batch)
