"""torch's `scaled_dot_product_attention`: left to choose its kernel, and each kernel by name.

Sequences that lie end to end get a row each, padded; only with a mask or a bias of their own the
blocks become part of it.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.attention.backend import AttentionBackend
from ipn_core.attention.inputs import AttentionInputs
from ipn_core.attention.packing import join_padded, pad

__all__ = ["SDPA", "SDPACudnn", "SDPAEfficient", "SDPAFlash", "SDPAKernel", "SDPAMath"]


REMEMBERED = 1024
"""Kinds of inputs whose answers are kept."""


class SDPA(AttentionBackend):
    """`scaled_dot_product_attention` with whatever kernel torch chooses; it always has one."""

    name = "sdpa"
    supports_packed = True
    supports_groups = True

    def forward(self, inputs: AttentionInputs) -> Tensor:
        """Return the attention's output, (B, M, H, K) as the queries are."""
        q, k, v, mask, alive = _arguments(inputs)
        with self._kernels():
            out = F.scaled_dot_product_attention(
                q, k, v, mask, scale=inputs.scale, enable_gqa=inputs.is_grouped
            )
        if alive is not None:
            out = out.masked_fill(~alive, 0.0)
        out = out.transpose(1, 2)
        if _wants_rows(inputs) and inputs.query_lengths is not None:
            return join_padded(out, inputs.query_lengths)
        return out

    def _kernels(self) -> Any:
        return contextlib.nullcontext()


class SDPAKernel(SDPA):
    """Base of the kernels by name: whether one takes some inputs, torch itself is asked.

    Attributes:
        kernel: its name in `torch.nn.attention.SDPBackend`.
    """

    kernel: ClassVar[str]

    def __init__(self) -> None:
        self._known: dict[Any, list[str]] = {}

    def more_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Ask torch, once for inputs of the same kind, and pass on what it says."""
        if torch.compiler.is_compiling():
            return self._ask(inputs)
        kind = _kind(inputs)
        if kind not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[kind] = self._ask(inputs)
        return self._known[kind]

    def _ask(self, inputs: AttentionInputs) -> list[str]:
        from torch.nn.attention import SDPBackend

        q, k, v, mask, _ = _arguments(inputs)
        said = []
        with self._kernels(), warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            try:
                choice = torch._fused_sdp_choice(
                    q, k, v, mask, scale=inputs.scale, enable_gqa=inputs.is_grouped
                )
                if choice == getattr(SDPBackend, self.kernel).value:
                    return []
            except RuntimeError as error:
                said.append(str(error))
        lines = [_first_line(text) for text in [*(str(w.message) for w in heard), *said]]
        # Torch warns "… not used because:" first, and then once a cause.
        causes = [line for line in dict.fromkeys(lines) if line and not line.endswith(":")]
        return causes or [f"torch's kernel {self.kernel} does not take these inputs"]

    def _kernels(self) -> Any:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel([getattr(SDPBackend, self.kernel)])


class SDPAMath(SDPAKernel):
    """The kernel that torch writes out in its own operations."""

    name = "sdpa-math"
    kernel = "MATH"

    def holds_map(self, inputs: AttentionInputs) -> bool:
        """Say so, but of sequences end to end only as many as their rows have."""
        return not _wants_rows(inputs)


class SDPAFlash(SDPAKernel):
    """FlashAttention as torch ships it."""

    name = "sdpa-flash"
    kernel = "FLASH_ATTENTION"


class SDPAEfficient(SDPAKernel):
    """The memory-efficient kernel as torch ships it."""

    name = "sdpa-efficient"
    devices = ("cuda",)
    kernel = "EFFICIENT_ATTENTION"


class SDPACudnn(SDPAKernel):
    """The kernel of cuDNN."""

    name = "sdpa-cudnn"
    devices = ("cuda",)
    kernel = "CUDNN_ATTENTION"


def _arguments(
    inputs: AttentionInputs,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return q, k, v as (B, H, ·, K), the mask or bias, and which rows may look somewhere."""
    if _wants_rows(inputs):
        inputs = pad(inputs)
    mask, alive = inputs.masking(inputs.q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))
    return q, k, v, mask, alive


def _wants_rows(inputs: AttentionInputs) -> bool:
    return inputs.is_packed and inputs.mask is None and inputs.bias is None


def _kind(inputs: AttentionInputs) -> Any:
    """Return what torch's choice depends on."""
    tensors = (inputs.q, inputs.k, inputs.v, inputs.mask, inputs.bias)
    return (
        tuple(None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors),
        inputs.lengths,
        inputs.query_lengths,
        inputs.needs_grad,
        inputs.bias_needs_grad,
        torch.are_deterministic_algorithms_enabled(),
    )


def _first_line(text: str) -> str:
    """Return what torch says, without where in its sources it says so."""
    return text.strip().split("\n")[0].split(" (Triggered internally")[0].strip()
