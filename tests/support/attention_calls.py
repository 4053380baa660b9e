"""Attention calls of every kind, and how they are held against double precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ipn_core.attention import AttentionBackend, AttentionInputs, get_backend
from ipn_core.attention.eager import Eager
from ipn_core.attention.xformers import XFormers, XFormersSplitK

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Relative to the largest value of the reference, and at least absolute."""

SHAPES = ((1, 31, 4, 4), (31, 33, 4, 2), (33, 257, 3, 1), (257, 1, 2, 2))
"""Queries, keys, heads and heads of the keys: odd, more than one tile, one of each; grouped too."""


def _split(total: int, first: int, second: int) -> list[int]:
    return [first, second, total - first - second]


KINDS: dict[str, Callable[[int, int, int, int], dict[str, Any]]] = {
    "none": lambda B, H, M, N: {},
    "keys": lambda B, H, M, N: {"mask": torch.rand(B, N) > 0.4},
    "mask": lambda B, H, M, N: {"mask": torch.rand(B, H, M, N) > 0.4},
    "bias": lambda B, H, M, N: {"bias": torch.randn(B, H, M, N)},
    "row-bias": lambda B, H, M, N: {"bias": torch.randn(1, H, 1, N)},
    "lengths": lambda B, H, M, N: {"lengths": [N // 2, N]},
    "all": lambda B, H, M, N: {
        "mask": torch.rand(B, 1, M, N) > 0.3,
        "bias": torch.randn(H, 1, N),
        "lengths": [N, N - 1],
    },
    "packed": lambda B, H, M, N: {
        "query_lengths": _split(M, M - M // 2, 0),
        "lengths": _split(N, N // 3, N // 4),
    },
    "packed-even": lambda B, H, M, N: {"query_lengths": [M], "lengths": [N]},
    "packed-dead": lambda B, H, M, N: {
        "query_lengths": _split(M, M // 3, M // 3),
        "lengths": _split(N, N // 2, 0),
    },
    "packed-mask": lambda B, H, M, N: {
        "query_lengths": _split(M, M // 3, M // 3),
        "lengths": _split(N, N // 3, N // 3),
        "mask": torch.rand(1, N) > 0.4,
        "bias": torch.randn(H, M, N),
    },
}
"""What is given besides q, k and v, for (B, H, M, N)."""


def call(
    kind: str,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    widths: tuple[int, int] = (16, 16),
    grad: bool = True,
) -> AttentionInputs:
    """Draw a call: two samples, or one row of sequences that lie end to end."""
    torch.manual_seed(sum(shape))
    M, N, H, Hk = shape
    B = 1 if kind.startswith("packed") else 2
    q = torch.randn(B, M, H, widths[0])
    k, v = torch.randn(B, N, Hk, widths[0]), torch.randn(B, N, Hk, widths[1])
    more = {
        name: given.to(device) if isinstance(given, Tensor) else given
        for name, given in KINDS[kind](B, H, M, N).items()
    }
    tensors = (t.to(device, dtype).requires_grad_(grad) for t in (q, k, v))
    return AttentionInputs.make(*tensors, **more)


def exactly(inputs: AttentionInputs) -> AttentionInputs:
    """The same call in double precision, with leaves of its own."""
    q, k, v = (
        t.detach().double().requires_grad_(t.requires_grad) for t in (inputs.q, inputs.k, inputs.v)
    )
    return replace(inputs, q=q, k=k, v=v)


def gradients(backend: AttentionBackend, inputs: AttentionInputs) -> tuple[Tensor, ...]:
    """The result, and with gradients those of q, k and v too."""
    out = backend.forward(inputs)
    assert isinstance(out, Tensor)
    if not inputs.needs_grad:
        return (out,)
    # All of one sign: half precision cannot tell what a sum of 257 that cancels comes to.
    weight = torch.linspace(0, 1, out.numel(), device=out.device, dtype=torch.float64)
    loss = (out.double() * weight.reshape(out.shape)).sum()
    return out, *torch.autograd.grad(loss, (inputs.q, inputs.k, inputs.v), materialize_grads=True)


def assert_exact(backend: AttentionBackend, inputs: AttentionInputs) -> None:
    """Hold the result and its gradients against `eager` in double precision."""
    found = gradients(backend, inputs)
    expected = gradients(Eager(), exactly(inputs))
    for what, mine, wanted in zip("oqkv"[: len(found)], found, expected, strict=True):
        assert mine.dtype == inputs.q.dtype
        assert mine.shape == wanted.shape
        off = float((mine.detach().double() - wanted.detach()).abs().max())
        largest = max(float(wanted.detach().abs().max()), 1.0)
        # The kernels of GPUs may make a float32 product of several rounded ones.
        limit = TOLERANCE[mine.dtype] * (5 if mine.is_cuda else 1)
        assert off <= limit * largest, f"{what} is off by {off:.2g} of {largest:.2g}"


def on_cpu(name: str) -> AttentionBackend:
    """A backend; those of xformers call its real function, with an operator for the CPU."""
    if not name.startswith("xformers"):
        return get_backend(name)
    pytest.importorskip("xformers", reason="the extra 'cuda' is not installed")
    from ipn_core.testing.xformers_cpu import PAIR

    return XFormers(op=PAIR) if name == "xformers" else XFormersSplitK(op=(PAIR[0], None))
