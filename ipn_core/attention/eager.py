"""The reference: attention written out, the softmax in float32, and the map on request."""

from __future__ import annotations

import torch
from torch import Tensor

from ipn_core.attention.backend import AttentionBackend
from ipn_core.attention.inputs import AttentionInputs

__all__ = ["Eager"]


class Eager(AttentionBackend):
    """`softmax(scale · q·kᵀ + bias) · v`, each step a line of plain torch.

    The only backend of the core that returns a map; every other one is tested against it.
    """

    name = "eager"
    supports_packed = True
    supports_groups = True
    supports_map = True

    def holds_map(self, inputs: AttentionInputs) -> bool:
        """Say so: the map is what it is for."""
        return True

    def forward(self, inputs: AttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the attention, and the map if it is wanted."""
        inputs = inputs.ungrouped()
        wide = torch.promote_types(inputs.q.dtype, torch.float32)
        q, k, v = (t.to(wide) for t in (inputs.q, inputs.k, inputs.v))
        logits = torch.einsum("bmhk,bnhk->bhmn", q, k) * inputs.softmax_scale
        mask, alive = inputs.masking(wide)
        if mask is not None and mask.dtype == torch.bool:
            logits = logits.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            logits = logits + mask
        weights = logits.softmax(-1)
        if alive is not None:
            weights = weights.masked_fill(~alive, 0.0)
        out = torch.einsum("bhmn,bnhk->bmhk", weights, v).to(inputs.q.dtype)
        return (out, weights) if inputs.return_map else out
