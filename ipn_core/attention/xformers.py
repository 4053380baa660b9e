"""xformers' `memory_efficient_attention`: left to dispatch, and each of its operators by name.

Where xformers is a shell over its successor mslk, or not there, mslk's is taken. Either is imported
on the first use on a device that it supports, never before.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.attention.backend import AttentionBackend
from ipn_core.attention.inputs import AttentionInputs
from ipn_core.attention.packing import lay_end_to_end, with_zeros, without_idle

__all__ = [
    "XFormers",
    "XFormersBlackwell",
    "XFormersCK",
    "XFormersCutlass",
    "XFormersFlash",
    "XFormersFlash3",
    "XFormersSplitK",
]

HOMES = ("xformers.ops.fmha", "mslk.attention.fmha")
"""Where `memory_efficient_attention` and its operators may be, under the same names. From the
version after 0.0.35 on the first is a shell over the second, and without that imports empty."""

ALIGNMENT = 8
"""The kernels read rows of 16 bytes: strides must be multiples of 8 elements of half precision."""


class _Kind(NamedTuple):
    """What the operators' answer depends on."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    bias: Literal["none", "packed", "dense"]
    grad: bool
    bias_grad: bool
    deterministic: bool
    scaled: bool


class XFormers(AttentionBackend):
    """`memory_efficient_attention` with whatever operator xformers dispatches to.

    Samples with `lengths` alone, and sequences that lie end to end, go with a block-diagonal mask,
    so that no padded key is computed; masks and biases go as a tensor. Keys with fewer heads than
    queries go as they are, five-dimensional, where no gradient is wanted, for no backward operator
    takes them so; else they are repeated.

    Args:
        op: a pair (forward, backward) of operator classes to use, for tests.

    Attributes:
        module: the module of `xformers.ops.fmha` whose operators to use, None for its choice.
    """

    name = "xformers"
    devices = ("cuda",)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    supports_packed = True
    supports_groups = True
    module: ClassVar[str | None] = None

    def __init__(self, op: tuple[Any, Any] | None = None) -> None:
        self._op = op
        self._known: dict[_Kind, list[str]] = {}
        if op is not None:
            self.devices = tuple(sorted(op[0].SUPPORTED_DEVICES))

    def forward(self, inputs: AttentionInputs) -> Tensor:
        """Return the attention's output, (B, M, H, K) as the queries are."""
        if _in_blocks(inputs):
            return self._by_block(inputs)
        mask, alive = inputs.masking(inputs.q.dtype)
        bias = None if mask is None else _aligned_bias(mask, inputs)
        out = self._call(inputs, bias)
        return out if alive is None else out.masked_fill(~alive.transpose(1, 2), 0.0)

    def _by_block(self, inputs: AttentionInputs) -> Tensor:
        """Attend within each sequence, those without a key left out."""
        packed = lay_end_to_end(inputs)
        asked, kept = without_idle(packed)
        if asked is None or asked.query_lengths is None or asked.lengths is None:
            return inputs.zeros()
        blocks = self._blocks(asked.query_lengths, asked.lengths, inputs.q.device)
        found = self._call(asked, blocks)
        assert packed.query_lengths is not None
        whole = with_zeros(found, packed.query_lengths, kept)
        return whole.reshape(*inputs.q.shape[:3], -1)

    def _blocks(self, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Any:
        """Return xformers' mask for sequences end to end."""
        return _fmha().attn_bias.BlockDiagonalMask.from_seqlens(
            list(queries), list(keys), device=device
        )

    def _call(self, inputs: AttentionInputs, bias: Any) -> Tensor:
        q, k, v, bias = _heads(inputs, bias)
        out: Tensor = _fmha().memory_efficient_attention(
            q, k, v, attn_bias=bias, scale=inputs.scale, op=self._pair()
        )
        return out.flatten(2, 3) if out.ndim == 5 else out

    def _pair(self) -> tuple[Any, Any] | None:
        if self._op is not None or self.module is None:
            return self._op
        found = getattr(_fmha(), self.module)
        return found.FwOp, getattr(found, "BwOp", None)

    def more_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Ask xformers' operators, once for inputs of the same kind."""
        missing = _missing()
        if missing is not None:
            return [missing]
        if inputs.bias_needs_grad and not inputs.needs_grad:
            return ["gives no gradient to the bias unless q, k or v need one"]
        packed = _in_blocks(inputs)
        dense = not packed and (inputs.lengths, inputs.mask, inputs.bias) != (None, None, None)
        q = inputs.q
        kind = _Kind(
            q.device,
            q.dtype,
            q.shape[2],
            inputs.kv_heads,
            q.shape[3],
            inputs.v.shape[-1],
            "packed" if packed else "dense" if dense else "none",
            inputs.needs_grad,
            inputs.bias_needs_grad,
            torch.are_deterministic_algorithms_enabled(),
            inputs.scale is not None,
        )
        if kind not in self._known:
            self._known[kind] = self._ask(kind)
        return self._known[kind]

    def _ask(self, kind: _Kind) -> list[str]:
        """Describe inputs of this kind to the operators and return what they object to."""
        try:
            return self._objections(kind)
        except (NotImplementedError, ValueError) as error:
            return [f"xformers has no operator for these inputs: {' '.join(str(error).split())}"]
        except (AttributeError, ImportError) as error:
            # The package may be a shell over another one, which has other insides.
            package = _fmha().__name__.partition(".")[0]
            said = f"{type(error).__name__}: {error}"
            return [f"{package} {_version(package)} is not as expected ({said})"]

    def _objections(self, kind: _Kind) -> list[str]:
        fmha = _fmha()
        length, grad = ALIGNMENT, kind.grad
        like = torch.empty(0, device=kind.device, dtype=kind.dtype)
        q = like.new_empty(1, length, kind.heads, kind.head_dim).requires_grad_(grad)
        k = like.new_empty(1, length, kind.kv_heads, kind.head_dim)
        v = like.new_empty(1, length, kind.kv_heads, kind.value_dim)
        bias: Any = None
        if kind.bias == "packed":
            bias = self._blocks([length], [length], kind.device)
        elif kind.bias == "dense":
            bias = like.new_empty(1, kind.heads, length, length).requires_grad_(kind.bias_grad)
        q, k, v, bias = _heads(AttentionInputs(q, k, v), bias)
        scale = 0.5 if kind.scaled else None
        described = fmha.common.Inputs(q, k, v, attn_bias=bias, scale=scale)
        pair = self._pair()
        if pair is not None:
            asked = [op for op in (pair if grad else pair[:1]) if op is not None]
            return [f"{op.NAME}: {r}" for op in asked for r in op.not_supported_reasons(described)]
        fmha._dispatch_fw(described, grad)
        if grad:
            fmha._dispatch_bw(described, varlen_lse_packed=None)
        return []


class XFormersFlash(XFormers):
    """FlashAttention 2 as xformers calls it."""

    name = "xformers-flash"
    module = "flash"


class XFormersFlash3(XFormers):
    """FlashAttention 3 as xformers calls it."""

    name = "xformers-flash3"
    module = "flash3"


class XFormersSplitK(XFormers):
    """The Triton operator that splits the keys, for few queries and many keys; forward only."""

    name = "xformers-splitk"
    module = "triton_splitk"
    supports_grad = False

    def _blocks(self, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> Any:
        """Return the one block-diagonal mask that it takes: its keys may have gaps, ours none."""
        starts = [0, *accumulate(keys)]
        return _fmha().attn_bias.BlockDiagonalGappyKeysMask.from_seqlens(
            list(queries), starts, list(keys), device=device
        )


class XFormersBlackwell(XFormers):
    """The CUTLASS operator for Blackwell."""

    name = "xformers-blackwell"
    module = "cutlass_blackwell"

    def more_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Count what it would get; whatever else matters, the operator says itself."""
        B, _, M, N = inputs.shape
        if _in_blocks(inputs):
            M = M if inputs.is_packed else B * M
            N = sum(inputs.lengths or ())
        if M > N:
            return [f"takes no more queries than keys, got {M} and {N}"]
        return super().more_reasons(inputs)


class XFormersCK(XFormers):
    """The Composable Kernel operator, on ROCm."""

    name = "xformers-ck"
    module = "ck"


class XFormersCutlass(XFormers):
    """The CUTLASS operator, the one that takes any mask."""

    name = "xformers-cutlass"
    module = "cutlass"


@cache
def _found() -> tuple[Any, str]:
    """Return the module that has the function, None if none has, and what is wrong then.

    A package of the name is not enough.
    """
    faults = []
    for home in HOMES:
        package = home.partition(".")[0]
        try:
            module = importlib.import_module(home)
        except Exception as error:
            faults.append(f"{package} cannot be imported ({type(error).__name__}: {error})")
            continue
        if getattr(module, "memory_efficient_attention", None) is not None:
            return module, ""
        faults.append(f"{package} {_version(package)} has no memory_efficient_attention")
    if "cannot be imported" in faults[0]:
        return None, f"{faults[0]}; install it with pip install 'ipn-core[cuda]'"
    return None, f"{faults[0]}, and {faults[1]}: install mslk, which has it now, or xformers 0.0.35"


def _missing() -> str | None:
    """Return why the function is not there, or None."""
    module, faults = _found()
    return faults if module is None else None


def _version(package: str) -> str:
    return str(getattr(importlib.import_module(package), "__version__", "of this version"))


def _fmha() -> Any:
    """Return the module of the function, its operators and masks; ask `_missing` first."""
    return _found()[0]


def _in_blocks(inputs: AttentionInputs) -> bool:
    """Whether each sample or sequence looks at its own keys and nothing else is masked."""
    return inputs.lengths is not None and inputs.mask is None and inputs.bias is None


def _heads(inputs: AttentionInputs, bias: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Return q, k, v and the bias with the heads as the operators want them.

    Returns:
        (B, ·, H, K) each and a bias (B, H, M, N); or for grouped heads without gradients
        (B, ·, Hk, H / Hk, K) and (B, Hk, H / Hk, M, N), keys and values without a copy.
    """
    wants_grad = inputs.needs_grad or inputs.bias_needs_grad
    grouped = inputs.is_grouped and not wants_grad
    if not grouped:
        inputs = inputs.ungrouped()
    q, k, v = (_aligned(t) for t in (inputs.q, inputs.k, inputs.v))
    if not wants_grad:
        # It goes by the tensors, and prepares for a backward pass even where none can follow.
        q, k, v = q.detach(), k.detach(), v.detach()
    if not grouped:
        return q, k, v, bias
    groups = (inputs.kv_heads, q.shape[2] // inputs.kv_heads)
    k, v = (t.unsqueeze(3).expand(-1, -1, -1, groups[1], -1) for t in (k, v))
    bias = bias.unflatten(1, groups) if isinstance(bias, Tensor) else bias
    return q.unflatten(2, groups), k, v, bias


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
