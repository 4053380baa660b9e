"""A code for places in a picture, for interactions that must know where a patch is."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cosines"]


def cosines(positions: Tensor, frequencies: int) -> Tensor:
    """Code places as cosines of 0, 1, … half-waves a side.

    Args:
        positions: (…, 2) places (y, x) as fractions of a picture's sides.
        frequencies: cosines a side.

    Returns:
        (…, 2 × frequencies): `cos(π · f · y)` for all f, then `cos(π · f · x)`.
    """
    waves = torch.arange(frequencies, device=positions.device) * torch.pi
    return (positions.unsqueeze(-1) * waves).cos().flatten(-2)
