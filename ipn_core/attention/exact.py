"""What a call must give: the equation in double precision, a few samples at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ipn_core.attention.dispatch import attend
from ipn_core.attention.inputs import AttentionInputs

__all__ = ["call", "exact", "largest_difference", "results"]

PIECE = 1 << 24
"""Numbers in the map of one piece, unless one sample alone has more."""


class _Piece(NamedTuple):
    """Samples, queries and keys that no others look at."""

    samples: slice
    queries: slice
    keys: slice


def call(inputs: AttentionInputs, name: str) -> Tensor:
    """Attend with a backend by name, or "auto"."""
    return attend(
        inputs.q,
        inputs.k,
        inputs.v,
        mask=inputs.mask,
        bias=inputs.bias,
        lengths=inputs.lengths,
        query_lengths=inputs.query_lengths,
        scale=inputs.scale,
        backend=name,
    )


def results(inputs: AttentionInputs, name: str) -> list[Tensor]:
    """Return what a backend gives: the result, and with gradients those of q, k and v too."""
    if not inputs.q.requires_grad:
        with torch.no_grad():
            return [call(inputs, name)]
    out = call(inputs, name)
    leaves = (inputs.q, inputs.k, inputs.v)
    # A gradient that is missing counts as zero, which is wrong like any other number.
    grads = torch.autograd.grad(out, leaves, _weights(out), materialize_grads=True)
    return [out.detach(), *grads]


def exact(inputs: AttentionInputs) -> list[Tensor]:
    """Return what `results` must give, in float64.

    It is found sample by sample, or sequence by sequence where they lie end to end, each alone: so
    it depends on no block mask, and never holds the map of all.
    """
    B, M, H, _ = inputs.q.shape
    grad = inputs.q.requires_grad
    whole = inputs.v.new_zeros(B, M, H, inputs.v.shape[-1], dtype=torch.float64)
    found = [whole]
    if grad:
        leaves = (inputs.q, inputs.k, inputs.v)
        found += [torch.zeros_like(t, dtype=torch.float64) for t in leaves]
    # The very numbers that the backend's backward pass starts from.
    weights = _weights(whole).to(inputs.q.dtype).double() if grad else None
    for piece in _pieces(inputs):
        mine = _cut(inputs, piece)
        with torch.set_grad_enabled(grad):
            out = call(mine, "eager")
        mine_q, mine_k = (piece.samples, piece.queries), (piece.samples, piece.keys)
        whole[mine_q] = out.detach()
        if weights is not None:
            q, k, v = torch.autograd.grad(out, (mine.q, mine.k, mine.v), weights[mine_q])
            found[1][mine_q], found[2][mine_k], found[3][mine_k] = q, k, v
    return found


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest one, relative to the largest expected value of each tensor."""
    worst = 0.0
    for mine, true in zip(found, expected, strict=True):
        largest = max(float(true.abs().max()), 1e-3)
        error = float((mine.double() - true).abs().max()) / largest
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _weights(out: Tensor) -> Tensor:
    """Return what a backward pass starts from: all of one sign, so that few sums cancel."""
    ones = torch.linspace(0, 1, out.numel(), device=out.device, dtype=torch.float64)
    return ones.reshape(out.shape).to(out.dtype)


def _pieces(inputs: AttentionInputs) -> Iterator[_Piece]:
    B, H, M, N = inputs.shape
    everything = slice(None)
    if inputs.query_lengths is not None and inputs.lengths is not None:
        for queries, keys in zip(
            _slices(inputs.query_lengths), _slices(inputs.lengths), strict=True
        ):
            yield _Piece(everything, queries, keys)
        return
    step = max(1, PIECE // max(1, H * M * N))
    for start in range(0, B, step):
        yield _Piece(slice(start, start + step), everything, everything)


def _slices(lengths: tuple[int, ...]) -> Iterator[slice]:
    return (slice(*ends) for ends in pairwise(accumulate(lengths, initial=0)))


def _cut(inputs: AttentionInputs, piece: _Piece) -> AttentionInputs:
    """Return a piece of a call in double precision, with leaves of its own."""

    def part(tensor: Tensor, place: slice) -> Tensor:
        cut = tensor.detach()[piece.samples, place].double()
        return cut.requires_grad_(inputs.q.requires_grad)

    def masking(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        for dim, place in ((0, piece.samples), (2, piece.queries), (3, piece.keys)):
            if tensor.shape[dim] > 1:
                tensor = tensor[(slice(None),) * dim + (place,)]
        return tensor

    lengths = None
    if inputs.lengths is not None and not inputs.is_packed:
        lengths = inputs.lengths[piece.samples]
    return AttentionInputs.make(
        part(inputs.q, piece.queries),
        part(inputs.k, piece.keys),
        part(inputs.v, piece.keys),
        masking(inputs.mask),
        masking(inputs.bias),
        lengths,
        inputs.scale,
    )
