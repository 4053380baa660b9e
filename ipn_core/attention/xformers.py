"""xformers' `memory_efficient_attention`: left to dispatch, and each of its operators by name.

xformers is imported on the first use on a device that it supports, never before.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.attention.backend import AttentionBackend
from ipn_core.attention.inputs import AttentionInputs

__all__ = ["XFormers", "XFormersCutlass", "XFormersFlash", "XFormersFlash3"]

ALIGNMENT = 8
"""The kernels read rows of 16 bytes: strides must be multiples of 8 elements of half precision."""


class _Kind(NamedTuple):
    """What the operators' answer depends on."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    value_dim: int
    bias: Literal["none", "packed", "dense"]
    grad: bool
    bias_grad: bool
    deterministic: bool


class XFormers(AttentionBackend):
    """`memory_efficient_attention` with whatever operator xformers dispatches to.

    Samples with `lengths` alone go packed, with a block-diagonal mask, so that no padded key is
    computed; masks and biases go as a tensor.

    Args:
        op: a pair (forward, backward) of operator classes to use, for tests.

    Attributes:
        module: the module of `xformers.ops.fmha` whose operators to use, None for its choice.
    """

    name = "xformers"
    devices = ("cuda",)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    module: ClassVar[str | None] = None

    def __init__(self, op: tuple[Any, Any] | None = None) -> None:
        self._op = op
        self._known: dict[_Kind, list[str]] = {}
        if op is not None:
            self.devices = tuple(sorted(op[0].SUPPORTED_DEVICES))

    def forward(self, inputs: AttentionInputs) -> Tensor:
        """Compute the attention."""
        if inputs.lengths is not None and inputs.mask is None and inputs.bias is None:
            return self._packed(inputs, inputs.lengths)
        mask, alive = inputs.masking(inputs.q.dtype)
        bias = None if mask is None else _aligned_bias(mask, inputs)
        out = self._call(inputs.q, inputs.k, inputs.v, bias, inputs.scale)
        return out if alive is None else out.masked_fill(~alive.transpose(1, 2), 0.0)

    def _packed(self, inputs: AttentionInputs, lengths: tuple[int, ...]) -> Tensor:
        """Lay the samples end to end, without their padding."""
        B, M = inputs.q.shape[:2]
        rows = [i for i in range(B) if lengths[i]]
        if not rows:
            # Connected to the inputs, so that a backward pass finds a graph with zeros.
            zeros: Tensor = inputs.q.sum(-1, keepdim=True) * 0.0 + inputs.v[:, :1] * 0.0
            return zeros
        blocks = _fmha().BlockDiagonalMask.from_seqlens(
            [M] * len(rows), [lengths[i] for i in rows], device=inputs.q.device
        )
        q = inputs.q if len(rows) == B else inputs.q[rows]
        k, v = (torch.cat([t[i, : lengths[i]] for i in rows])[None] for t in (inputs.k, inputs.v))
        packed = self._call(q.flatten(0, 1)[None], k, v, blocks, inputs.scale)
        found = packed.reshape(len(rows), M, *packed.shape[2:])
        if len(rows) == B:
            return found
        out = found.new_zeros(B, *found.shape[1:])
        return out.index_copy(0, torch.tensor(rows, device=out.device), found)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float | None) -> Tensor:
        q, k, v = (_aligned(t) for t in (q, k, v))
        out: Tensor = _ops().memory_efficient_attention(
            q, k, v, attn_bias=bias, scale=scale, op=self._pair()
        )
        return out

    def _pair(self) -> tuple[Any, Any] | None:
        if self._op is not None or self.module is None:
            return self._op
        found = getattr(_fmha(), self.module)
        return found.FwOp, found.BwOp

    def more_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Ask xformers' operators, once for inputs of the same kind."""
        missing = _missing()
        if missing is not None:
            return [missing]
        if inputs.bias_needs_grad and not inputs.needs_grad:
            return ["gives no gradient to the bias unless q, k or v need one"]
        packed = inputs.lengths is not None and inputs.mask is None and inputs.bias is None
        dense = not packed and (inputs.lengths, inputs.mask, inputs.bias) != (None, None, None)
        q = inputs.q
        kind = _Kind(
            q.device,
            q.dtype,
            q.shape[2],
            q.shape[3],
            inputs.v.shape[-1],
            "packed" if packed else "dense" if dense else "none",
            inputs.needs_grad,
            inputs.bias_needs_grad,
            torch.are_deterministic_algorithms_enabled(),
        )
        if kind not in self._known:
            self._known[kind] = self._ask(kind)
        return self._known[kind]

    def _ask(self, kind: _Kind) -> list[str]:
        """Describe inputs of this kind to the operators and return what they object to."""
        fmha = _fmha()
        length = ALIGNMENT
        device, grad = kind.device, kind.grad
        q = torch.empty(1, length, kind.heads, kind.head_dim, device=device, dtype=kind.dtype)
        v = q.new_empty(1, length, kind.heads, kind.value_dim)
        q.requires_grad_(grad)
        bias: Any = None
        if kind.bias == "packed":
            bias = fmha.BlockDiagonalMask.from_seqlens([length], [length], device=device)
        elif kind.bias == "dense":
            bias = v.new_empty(1, kind.heads, length, length).requires_grad_(kind.bias_grad)
        described = fmha.common.Inputs(q, q, v, attn_bias=bias, scale=0.5)
        pair = self._pair()
        try:
            if pair is not None:
                asked = [op for op in (pair if grad else pair[:1]) if op is not None]
                return [
                    f"{op.NAME}: {r}" for op in asked for r in op.not_supported_reasons(described)
                ]
            fmha.dispatch._dispatch_fw(described, grad)
            if grad:
                fmha.dispatch._dispatch_bw(described, varlen_lse_packed=None)
        except (NotImplementedError, ValueError) as error:
            return [f"xformers has no operator for these inputs: {' '.join(str(error).split())}"]
        return []


class XFormersFlash(XFormers):
    """FlashAttention 2 as xformers calls it."""

    name = "xformers-flash"
    module = "flash"


class XFormersFlash3(XFormers):
    """FlashAttention 3 as xformers calls it."""

    name = "xformers-flash3"
    module = "flash3"


class XFormersCutlass(XFormers):
    """The CUTLASS operator, the one that takes any mask."""

    name = "xformers-cutlass"
    module = "cutlass"


@cache
def _missing() -> str | None:
    """Return why the function is not there, or None. A package of the name is not enough."""
    try:
        ops = importlib.import_module("xformers.ops")
    except Exception as error:
        return (
            f"xformers cannot be imported ({type(error).__name__}: {error}); install it with "
            "pip install 'ipn-core[cuda]'"
        )
    if getattr(ops, "memory_efficient_attention", None) is None:
        version = getattr(importlib.import_module("xformers"), "__version__", "of this version")
        return f"xformers {version} has no ops.memory_efficient_attention"
    return None


def _ops() -> Any:
    return importlib.import_module("xformers.ops")


def _fmha() -> Any:
    return importlib.import_module("xformers.ops.fmha")


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor with strides that the kernels take."""
    fits = tensor.stride(-1) == 1 and all(s % ALIGNMENT == 0 for s in tensor.stride()[:-1])
    return tensor if fits else tensor.contiguous()


def _aligned_bias(mask: Tensor, inputs: AttentionInputs) -> Tensor:
    """Return a mask or bias as a float (B, H, M, N) whose rows start aligned."""
    if mask.dtype == torch.bool:
        bias = inputs.q.new_zeros(mask.shape).masked_fill(~mask, float("-inf"))
    else:
        bias = mask
    keys = inputs.shape[-1]
    # Padding writes a new tensor, whole: heads and queries that share a row get their own.
    bias = F.pad(bias.expand(inputs.shape), (0, -keys % ALIGNMENT or ALIGNMENT))
    return bias[..., :keys]
