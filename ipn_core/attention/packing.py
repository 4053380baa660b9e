"""From samples with padding to sequences that lie end to end, and back.

A kernel with a block-diagonal mask computes no padded key, one with a mask over the keys wants each
sample in a row of its own; whichever form a call has, a backend may ask for the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ipn_core.attention.inputs import AttentionInputs

__all__ = ["join_padded", "lay_end_to_end", "pad", "with_zeros", "without_idle"]


def lay_end_to_end(inputs: AttentionInputs) -> AttentionInputs:
    """Lay samples with `lengths` alone end to end, without their padding.

    Args:
        inputs: with lengths, without a mask or bias.

    Returns:
        q (1, B·M, H, K), k and v (1, sum(lengths), Hk, ·) with `query_lengths`; the same inputs if
        they are so already. The result (1, B·M, H, Kv) is to be reshaped to (B, M, H, Kv).
    """
    assert inputs.lengths is not None
    if inputs.is_packed:
        return inputs
    B, M = inputs.q.shape[:2]
    k, v = (
        torch.cat([t[i, :n] for i, n in enumerate(inputs.lengths)])[None]
        for t in (inputs.k, inputs.v)
    )
    q = inputs.q.flatten(0, 1)[None]
    return replace(inputs, q=q, k=k, v=v, query_lengths=(M,) * B)


def without_idle(inputs: AttentionInputs) -> tuple[AttentionInputs | None, list[bool]]:
    """Leave out the sequences that have no key or no query.

    Args:
        inputs: that lie end to end.

    Returns:
        The others, or None if there are none; and for each sequence whether it is among them.
    """
    queries, keys = inputs.query_lengths, inputs.lengths
    assert queries is not None
    assert keys is not None
    kept = [bool(m and n) for m, n in zip(queries, keys, strict=True)]
    if all(kept) or not any(kept):
        return (inputs if all(kept) else None), kept
    few = tuple(m for m, keep in zip(queries, kept, strict=True) if keep)
    q = _only(inputs.q, queries, kept)
    k, v = (_only(t, keys, kept) for t in (inputs.k, inputs.v))
    rest = tuple(n for n, keep in zip(keys, kept, strict=True) if keep)
    return replace(inputs, q=q, k=k, v=v, query_lengths=few, lengths=rest), kept


def _only(tensor: Tensor, lengths: tuple[int, ...], kept: list[bool]) -> Tensor:
    parts = tensor.split(list(lengths), dim=1)
    return torch.cat([part for part, keep in zip(parts, kept, strict=True) if keep], dim=1)


def with_zeros(found: Tensor, lengths: tuple[int, ...], kept: list[bool]) -> Tensor:
    """Put zeros where `without_idle` left sequences out.

    Args:
        found: (1, ·, H, Kv) the result for the sequences that were kept.
        lengths: the queries of each sequence, left out or not.
        kept: which were.

    Returns:
        (1, sum(lengths), H, Kv).
    """
    if all(kept):
        return found
    few = [m for m, keep in zip(lengths, kept, strict=True) if keep]
    there = iter(found.split(few, dim=1))
    parts = [
        next(there) if keep else found.new_zeros(1, m, *found.shape[2:])
        for m, keep in zip(lengths, kept, strict=True)
    ]
    return torch.cat(parts, dim=1)


def pad(inputs: AttentionInputs) -> AttentionInputs:
    """Give each of the sequences that lie end to end a row of its own, padded on the right.

    Args:
        inputs: with `query_lengths`, without a mask or bias.

    Returns:
        q (S, max(query_lengths), H, K), k and v (S, max(lengths), Hk, ·) with `lengths`. What the
        padded queries give is taken out by `join_padded`.
    """
    queries, keys = inputs.query_lengths, inputs.lengths
    assert queries is not None
    assert keys is not None
    q = _rows(inputs.q, queries)
    k, v = (_rows(t, keys) for t in (inputs.k, inputs.v))
    lengths = None if min(keys) == max(keys) else keys
    return replace(inputs, q=q, k=k, v=v, lengths=lengths, query_lengths=None)


def _rows(tensor: Tensor, lengths: tuple[int, ...]) -> Tensor:
    if min(lengths) == max(lengths):
        rows: Tensor = tensor[0].unflatten(0, (len(lengths), lengths[0]))
        return rows
    padded: Tensor = pad_sequence(list(tensor[0].split(list(lengths))), batch_first=True)
    return padded


def join_padded(found: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Lay rows (S, M, H, Kv) end to end again: (1, sum(lengths), H, Kv)."""
    if min(lengths) == max(lengths):
        return found.flatten(0, 1)[None]
    return torch.cat([found[i, :m] for i, m in enumerate(lengths)])[None]
