"""The residual block of RegNet that the abstractor is made of."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResidualBlock", "stage"]

SQUEEZED = 4
"""The gate's inner width is the block's input width over this."""


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each place of (B, C, h, w) maps."""

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise."""
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """`silu(expand(gate(y) · y) + shortcut(x))` with `y = mix(reduce(x))`.

    `reduce` is a 1 × 1 convolution, `mix` a 3 × 3 one of each channel by itself, `expand` a 1 × 1
    one; each is followed by a layer norm over the channels, the first two by a SiLU as well. `gate`
    scales the channels: sigmoid of two linear layers over their means (squeeze and excitation).
    The shortcut is x itself, or a 1 × 1 convolution and a norm where the width changes.

    It is the bottleneck of RegNet (Radosavovic et al. 2020, arXiv 2003.13678) with the
    gate of RegNetY, and with the defaults that Honeybee's code leaves as they are in timm's
    `RegStage`: bottleneck ratio 1, group width 1, gate ratio 1/4.
    """

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        squeezed = max(1, round(into / SQUEEZED))
        self.reduce = nn.Sequential(*_convolution(into, out), nn.SiLU())
        self.mix = nn.Sequential(*_convolution(out, out, size=3, groups=out), nn.SiLU())
        self.gate = nn.Sequential(
            nn.Linear(out, squeezed), nn.SiLU(), nn.Linear(squeezed, out), nn.Sigmoid()
        )
        self.expand = nn.Sequential(*_convolution(out, out))
        self.shortcut = nn.Identity() if into == out else nn.Sequential(*_convolution(into, out))

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, into, h, w) to (B, out, h, w)."""
        mixed = self.mix(self.reduce(maps))
        mixed = mixed * self.gate(mixed.mean((2, 3)))[:, :, None, None]
        return F.silu(self.expand(mixed) + self.shortcut(maps))


def stage(depth: int, into: int, out: int) -> nn.Sequential:
    """Return `depth` blocks, of which the first changes the width."""
    widths = pairwise([into, *[out] * depth])
    return nn.Sequential(*(ResidualBlock(a, b) for a, b in widths))


def _convolution(into: int, out: int, size: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(into, out, size, padding=size // 2, groups=groups, bias=False),
        ChannelNorm(out),
    ]
