"""A pair of xformers operators for the CPU, in plain torch, for tests.

xformers ships none. Passed as `op=PAIR`, forward and backward run through the real
`memory_efficient_attention`, so that layout, masks, packing and gradients of the CUDA path are
exercised without a GPU. Importing this module imports xformers.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from xformers.ops import fmha
from xformers.ops.fmha.common import (
    AttentionBwOpBase,
    AttentionFwOpBase,
    Context,
    Gradients,
    Inputs,
)

__all__ = ["PAIR", "BwOp", "FwOp"]


class _CPU:
    """What both operators state about themselves."""

    # xformers takes an operator as built if this is not None.
    OPERATOR: ClassVar[Any] = True
    SUPPORTED_DEVICES: ClassVar[set[str]] = {"cpu"}
    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]] = {torch.float32, torch.bfloat16, torch.float16}
    SUPPORTED_MAX_K = 512
    SUPPORTED_ATTN_BIAS_TYPES = (
        type(None),
        torch.Tensor,
        fmha.BlockDiagonalMask,
        fmha.attn_bias.BlockDiagonalGappyKeysMask,
    )
    SUPPORTS_DROPOUT = False
    SUPPORTS_CUSTOM_SCALE = True
    SUPPORTS_DIFFERENT_VALUE_EMBED = True
    VARLEN_LSE_PACKED = True

    @classmethod
    def not_supported_reasons(cls, d: Any) -> list[str]:
        """Return xformers' reasons, without the one that takes every bf16 for a GPU's."""
        reasons: list[str] = super().not_supported_reasons(d)  # type: ignore[misc]
        return [r for r in reasons if "A100" not in r]


class FwOp(_CPU, AttentionFwOpBase):  # type: ignore[misc]  # xformers ships no types
    """The forward operator; `calls` counts its calls by the type of their bias."""

    NAME = "cpuF"
    SUPPORTS_BMGHK = True
    calls: ClassVar[dict[str, int]] = {}

    @classmethod
    def apply(cls, inp: Any, needs_gradient: bool) -> tuple[Tensor, Any]:
        """Return the output, and what the backward operator needs.

        Heads may be grouped, (B, M, G, H, K), as the CUDA operators take them without gradients.
        """
        kind = type(inp.attn_bias).__name__
        cls.calls[kind] = cls.calls.get(kind, 0) + 1
        if inp.query.ndim == 5:
            assert not needs_gradient, "no backward operator takes grouped heads"
        logits = _logits(inp)
        lse = logits.logsumexp(-1)
        weights = (logits - lse[..., None]).exp()
        out = torch.einsum("b...mn,bn...k->bm...k", weights, inp.value.float())
        out = out.to(inp.query.dtype)
        return out, Context(out=out, lse=lse) if needs_gradient else None


class BwOp(_CPU, AttentionBwOpBase):  # type: ignore[misc]  # xformers ships no types
    """The backward operator."""

    NAME = "cpuB"
    SUPPORTS_ATTN_BIAS_GRAD = True

    @classmethod
    def apply(cls, ctx: Any, inp: Any, grad: Tensor) -> Any:
        """Return the gradients, from the saved log-sum-exp as the CUDA kernels do."""
        q, k, v, grad, out = (t.float() for t in (inp.query, inp.key, inp.value, grad, ctx.out))
        weights = (_logits(inp) - ctx.lse[..., None]).exp()
        dv = torch.einsum("bhmn,bmhk->bnhk", weights, grad)
        row = torch.einsum("bmhk,bmhk->bhm", grad, out)
        ds = weights * (torch.einsum("bmhk,bnhk->bhmn", grad, v) - row[..., None])
        dq = torch.einsum("bhmn,bnhk->bmhk", ds, k) * inp.scale_float
        dk = torch.einsum("bhmn,bmhk->bnhk", ds, q) * inp.scale_float
        bias = inp.attn_bias
        wanted = isinstance(bias, Tensor) and bias.requires_grad
        dtype = inp.query.dtype
        return Gradients(
            dq=dq.to(dtype),
            dk=dk.to(dtype),
            dv=dv.to(dtype),
            db=ds.to(bias.dtype) if wanted else None,
        )


PAIR = (FwOp, BwOp)


def _logits(inp: Inputs) -> Tensor:
    """Return (B, [G,] H, M, N) in float32, −inf where a query may not look."""
    logits: Tensor = torch.einsum("bm...k,bn...k->b...mn", inp.query.float(), inp.key.float())
    logits = logits * inp.scale_float
    bias: Any = inp.attn_bias
    if bias is None:
        return logits
    if not isinstance(bias, Tensor):
        bias = bias.materialize(tuple(logits.shape))
    biased: Tensor = logits + bias.float()
    return biased
