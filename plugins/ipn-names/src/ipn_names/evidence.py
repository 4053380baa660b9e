"""How likely each label is in each window of each picture, and which patches say so."""

from __future__ import annotations

import torch
from torch import Tensor

from ipn_core import VisualFeatures
from ipn_core.transfer import send
from ipn_names.windows import WINDOWS, pooling

__all__ = ["Evidence"]

_LEAST = 1e-3
"""Of the best patch in a window, what every other patch of it counts at least."""


class Evidence:
    """Probabilities of labels, from the logits of patches.

    The first window of each picture is all of it, for which its global token speaks, if it has one.

    Attributes:
        windows: (B, N, 1 + W, C) probabilities in each window of each picture of a sample, 0 where
            it has fewer than N pictures.
    """

    def __init__(self, features: VisualFeatures) -> None:
        self._features = features
        self._logits = features.values.float()
        rows: list[list[Tensor]] = [[] for _ in range(features.batch)]
        for index, span in enumerate(features.images):
            own = self._logits[span.offset : span.offset + span.length]
            parts = send(pooling(span.grid), own.device, own.dtype) @ own
            tokens = features.global_tokens
            whole = own.mean(0) if tokens is None else tokens[index].float()
            rows[span.sample].append(torch.cat([whole.unsqueeze(0), parts]).softmax(-1))
        most = max(len(row) for row in rows)
        nothing = self._logits.new_zeros(1 + len(WINDOWS), self._logits.shape[1])
        self.windows = torch.stack(
            [torch.stack([*row, *[nothing] * (most - len(row))]) for row in rows]
        )

    def map(self, looked: Tensor, wanted: Tensor) -> Tensor:
        """Return where it was looked (B, P), over the patches as `padded()` lays them out.

        Args:
            looked: (B, N, 1 + W) how much each window counts.
            wanted: (B, C) how much each label does.
        """
        features = self._features
        parts: list[list[Tensor]] = [[] for _ in range(features.batch)]
        for span in features.images:
            own = self._logits[span.offset : span.offset + span.length].softmax(-1)
            within = send(pooling(span.grid), own.device, own.dtype)
            within = torch.cat([within.new_full((1, span.length), 1 / span.length), within])
            shown = own @ wanted[span.sample]
            shown = shown / shown.max().clamp(min=1e-12) + _LEAST
            counts = looked[span.sample, len(parts[span.sample])]
            parts[span.sample].append(counts @ within * shown)
        rows = [torch.cat(row) for row in parts]
        most = max(len(row) for row in rows)
        padded = [torch.cat([row, row.new_zeros(most - len(row))]) for row in rows]
        found = torch.stack(padded)
        return found / found.sum(-1, keepdim=True)
