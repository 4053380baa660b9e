"""`AttentionBackend`: what a backend states about itself, and the reasons that follow from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from ipn_core.attention.inputs import AttentionInputs

__all__ = ["FLOATS", "AttentionBackend"]

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class AttentionBackend(ABC):
    """One way to compute attention.

    Subclasses set the constants and write `forward`; what constants cannot say goes into
    `more_reasons`. Instances take no arguments, are made once a process, and hold no state that
    a call changes.

    Attributes:
        name: what `attend(backend=…)` calls it.
        devices: device types it runs on, None for any.
        dtypes: dtypes of q, k and v.
        max_head_dim: the widest head, None for no limit.
        supports_value_dim: whether values may have another width than keys.
        supports_mask, supports_bias, supports_lengths: whether each may be given.
        supports_packed: whether sequences may lie end to end (`query_lengths`); whoever masks with
            `AttentionInputs.masking` alone does.
        supports_groups: whether keys may have fewer heads than queries; whoever begins with
            `AttentionInputs.ungrouped` does.
        supports_map: whether it can return where each query looked.
        supports_grad, supports_bias_grad: whether a backward pass through q, k, v and through the
            bias gives gradients.
    """

    name: ClassVar[str]
    devices: tuple[str, ...] | None = None
    dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOATS
    max_head_dim: ClassVar[int | None] = None
    supports_value_dim: ClassVar[bool] = True
    supports_mask: ClassVar[bool] = True
    supports_bias: ClassVar[bool] = True
    supports_lengths: ClassVar[bool] = True
    supports_packed: ClassVar[bool] = False
    supports_groups: ClassVar[bool] = False
    supports_map: ClassVar[bool] = False
    supports_grad: ClassVar[bool] = True
    supports_bias_grad: ClassVar[bool] = True

    @abstractmethod
    def forward(self, inputs: AttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the attention.

        Rows that may look nowhere give zeros, with finite gradients.

        Args:
            inputs: such that `not_supported_reasons` gave none, never empty.

        Returns:
            (B, M, H, Kv) in the dtype of q; with `inputs.return_map` also the map (B, H, M, N)
            in float32 or wider, rows summing to 1 (or 0 for those that may look nowhere).
        """

    def more_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Return further reasons; called only where the constants gave none."""
        return []

    def holds_map(self, inputs: AttentionInputs) -> bool:
        """Return whether it holds the logits of all (B, H, M, N) in memory at once."""
        return False

    def not_supported_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Return why these inputs cannot be served; empty means that they can."""
        reasons = []
        q, v = inputs.q, inputs.v
        if self.devices is not None and q.device.type not in self.devices:
            reasons.append(f"needs a device of {_listed(self.devices)}, got {q.device.type}")
        if q.dtype not in self.dtypes:
            allowed = _listed(str(d).removeprefix("torch.") for d in self.dtypes)
            reasons.append(f"takes {allowed}, got {str(q.dtype).removeprefix('torch.')}")
        if self.max_head_dim is not None and inputs.head_dim > self.max_head_dim:
            reasons.append(f"takes heads up to {self.max_head_dim} wide, got {inputs.head_dim}")
        if not self.supports_value_dim and q.shape[-1] != v.shape[-1]:
            reasons.append(
                f"needs values as wide as keys, got {v.shape[-1]} and {q.shape[-1]} a head"
            )
        if inputs.mask is not None and not self.supports_mask:
            reasons.append("takes no mask")
        if inputs.bias is not None and not self.supports_bias:
            reasons.append("takes no bias")
        if inputs.lengths is not None and not self.supports_lengths:
            reasons.append("takes no lengths")
        if inputs.is_packed and not self.supports_packed:
            reasons.append("takes no sequences end to end")
        if inputs.is_grouped and not self.supports_groups:
            reasons.append(
                f"needs as many heads of keys as of queries, got {inputs.kv_heads} and {q.shape[2]}"
            )
        if inputs.return_map and not self.supports_map:
            reasons.append("returns no attention map")
        if not self.supports_grad and inputs.needs_grad:
            reasons.append("has no backward pass")
        if not self.supports_bias_grad and inputs.bias_needs_grad:
            reasons.append("gives no gradient to the bias")
        return reasons or self.more_reasons(inputs)


def _listed(names: Iterable[str]) -> str:
    return " or ".join(names)
