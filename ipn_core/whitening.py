"""Fixed projections to the principal directions of a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Whitening", "whiten"]


class Whitening(nn.Module):
    """A fixed projection to the principal directions of what comes in, each of variance 1.

    Not trained: hidden states of an inner layer have a few huge numbers, which would make every
    step of a trained projection a leap.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, width: int, directions: int) -> None:
        super().__init__()
        self.register_buffer("weight", nn.init.orthogonal_(torch.empty(directions, width)))
        self.register_buffer("bias", torch.zeros(directions))

    def fit(self, sample: Tensor) -> None:
        """Take the directions from a sample (n, width)."""
        whiten(self.weight, self.bias, sample)

    def forward(self, values: Tensor) -> Tensor:
        """Project (B, width) to (B, directions)."""
        return F.linear(values, self.weight, self.bias)


_LEAST = 1e-3
"""Of a sample's norm, what a direction must vary by: float32 then fixes its weights to 1e-4."""


def whiten(weight: Tensor, bias: Tensor, sample: Tensor) -> None:
    """Set a projection to the principal directions of a sample, each of variance 1.

    Directions in which the sample hardly varies are left out: their scale would be rounding, and
    the weights as large as its inverse. A sample that varies in none leaves the projection as it
    is.

    Args:
        weight: (directions, width), changed in place; rows that are left out become zero.
        bias: (directions,), changed in place.
        sample: (n, width).
    """
    sample = sample.float()
    mean = sample.mean(0)
    _, scales, directions = torch.linalg.svd(sample - mean, full_matrices=False)
    varies = scales > _LEAST * torch.linalg.vector_norm(sample)
    count = min(len(weight), int(varies.sum()))
    if not count:
        return
    deviations = scales[:count] / (len(sample) - 1) ** 0.5
    found = directions[:count] / deviations[:, None]
    weight.zero_()
    bias.zero_()
    weight[:count] = found.to(weight)
    bias[:count] = -(found @ mean).to(bias)
