"""torch's `flex_attention`: masks as functions of positions, and blocks without a key left out.

Compiled on CUDA, where it becomes one kernel. On the CPU torch runs it as written, which shows what
it computes and is not fast, and has no backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ipn_core.attention.backend import AttentionBackend
from ipn_core.attention.inputs import AttentionInputs
from ipn_core.transfer import send

__all__ = ["MIN_HEAD_DIM", "Flex"]

MIN_HEAD_DIM = 16
"""The narrowest head that its CUDA kernel multiplies."""

MayLook = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(sample, head, query, key), index tensors without dimensions, to bool: may it look there."""


class Flex(AttentionBackend):
    """`flex_attention` with a block mask; the blocks of sequences end to end are not computed."""

    name = "flex"
    devices = ("cpu", "cuda")
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    supports_packed = True
    supports_groups = True
    supports_bias_grad = False

    def more_reasons(self, inputs: AttentionInputs) -> list[str]:
        """Say what its kernels cannot do."""
        if inputs.q.device.type == "cpu":
            return ["has no backward pass on the CPU"] if inputs.needs_grad else []
        narrow = min(inputs.q.shape[-1], inputs.v.shape[-1])
        if narrow < MIN_HEAD_DIM:
            return [f"takes heads from {MIN_HEAD_DIM} wide, got {narrow}"]
        return []

    def holds_map(self, inputs: AttentionInputs) -> bool:
        """Say so for the CPU, where it is run as written."""
        return inputs.q.device.type == "cpu"

    def forward(self, inputs: AttentionInputs) -> Tensor:
        """Compute the attention; a row that may look nowhere is zero as torch gives it."""
        B, H, M, N = inputs.shape
        q, k, v = (t.transpose(1, 2) for t in (inputs.q, inputs.k, inputs.v))
        may_look, blocks = _may_look(inputs), None
        if may_look is not None:
            heads = 1 if inputs.mask is None or inputs.mask.shape[1] == 1 else H
            blocks = _block_mask(q.device)(may_look, B, heads, M, N, device=q.device)
        # Nothing warns inside of what is being compiled, and the filter could not be compiled.
        with nullcontext() if torch.compiler.is_compiling() else _unwarned():
            out: Tensor = _function(q.device)(
                q,
                k,
                v,
                score_mod=_added(inputs),
                block_mask=blocks,
                scale=inputs.scale,
                enable_gqa=inputs.is_grouped,
            )
        return out.transpose(1, 2)


def _may_look(inputs: AttentionInputs) -> MayLook | None:
    """Return mask and lengths as one function, or None where every query may look at all keys."""
    rules = [rule for rule in (_by_mask(inputs), _by_length(inputs)) if rule is not None]
    if len(rules) < 2:
        return rules[0] if rules else None
    first, second = rules

    def both(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return first(b, h, m, n) & second(b, h, m, n)

    return both


def _by_mask(inputs: AttentionInputs) -> MayLook | None:
    if inputs.mask is None:
        return None
    mask = inputs.mask.expand(inputs.shape)

    def in_mask(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return mask[b, h, m, n]

    return in_mask


def _by_length(inputs: AttentionInputs) -> MayLook | None:
    if inputs.lengths is None:
        return None
    keys = torch.tensor(inputs.lengths)
    if inputs.query_lengths is None:
        ends = send(keys, inputs.q.device)

        def inside(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return n < ends[b]

        return inside
    queries = torch.tensor(inputs.query_lengths)
    mine, theirs = (
        send(torch.repeat_interleave(lengths), inputs.q.device) for lengths in (queries, keys)
    )

    def same_sequence(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return mine[m] == theirs[n]

    return same_sequence


def _added(inputs: AttentionInputs) -> Callable[..., Tensor] | None:
    if inputs.bias is None:
        return None
    bias = inputs.bias.expand(inputs.shape)

    def add(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return score + bias[b, h, m, n]

    return add


@contextmanager
def _unwarned() -> Iterator[None]:
    """Keep torch from warning that it is not compiled on the CPU, which is so meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without", UserWarning)
        yield


def _function(device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if _as_written(device) else _compiled()[0]


def _block_mask(device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled, it never holds the whole (B, H, M, N) mask.
    return create_block_mask if _as_written(device) else _compiled()[1]


def _as_written(device: torch.device) -> bool:
    """Whether not to compile: on the CPU, and inside of what is being compiled anyway."""
    return device.type == "cpu" or torch.compiler.is_compiling()


@cache
def _compiled() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)
