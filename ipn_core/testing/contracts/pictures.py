"""Ragged batches of made-up pictures, for contracts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor

from ipn_core.features import VisualFeatures

__all__ = ["SAMPLES", "disturbed", "patches", "ragged"]

GRIDS = ((2, 3), (4, 4), (1, 5))
SAMPLES = ((0,), (1, 2), (2,), (0, 1))
"""Pictures of each sample."""


def patches(number: int, width: int) -> Tensor:
    """Return the patches (h·w, width) of a picture: always the same for the same number."""
    h, w = GRIDS[number]
    return torch.randn(h * w, width, generator=torch.Generator().manual_seed(number))


def ragged(width: int, samples: Sequence[Sequence[int]] = SAMPLES) -> VisualFeatures:
    """Return the features of a batch: samples with other numbers and grids of pictures."""
    flat = [(row, one) for row, pictures in enumerate(samples) for one in pictures]
    return VisualFeatures.pack(
        [patches(one, width) for _, one in flat],
        [GRIDS[one] for _, one in flat],
        [row for row, _ in flat],
        len(samples),
    )


class _Disturbed(VisualFeatures):
    """Features whose padding holds noise where others hold zeros."""

    def spread(self, packed: Tensor) -> Tensor:
        laid = super().spread(packed)
        if not laid.is_floating_point():
            return laid
        real = self.mask.reshape(*self.mask.shape, *[1] * (laid.ndim - 2))
        noise = torch.randn(laid.shape, generator=torch.Generator().manual_seed(17))
        return torch.where(real, laid, noise.to(laid))


def disturbed(features: VisualFeatures) -> VisualFeatures:
    """Return the same features with noise in what `padded()` and `spread()` fill up with."""
    return _Disturbed(*(getattr(features, part.name) for part in fields(features)))
