"""A key-value cache whose rows share beginnings, each of which is stored once.

transformers hands what a cache layer's `update` returns to the attention function that the config
names. A `SharedLayer` returns its pieces there, and `attend_to_pieces` reads each beginning with
the queries of all its rows together, as one matrix product, instead of a copy for every row:

    softmax([q · k_beginning, q · k_own] · scale + mask) · [v_beginning, v_own]
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ipn_core.growing_cache import GrowingLayer
from ipn_core.transfer import send, tensor_on

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["SharedLayer", "fork", "reading", "share", "worth_sharing"]

NAME = "ipn-shared"
"""What transformers' configs call the attention function."""

WORTH_STORING_ONCE = 2048
"""Positions that are not copied, from which on reading in pieces pays."""

LARGEST_SCORES = 1 << 26
"""Scores that are held at once; with more, the queries are run in parts."""


@dataclass(frozen=True, eq=False)
class Beginning:
    """What several rows begin with, or go on with, alike.

    Attributes:
        keys, values: (G, H_kv, P, D_head) of the G beginnings.
        rows: which of them each row has.
    """

    keys: Tensor
    values: Tensor
    rows: tuple[int, ...]

    @property
    def length(self) -> int:
        """P."""
        return int(self.keys.shape[2])

    @cached_property
    def groups(self) -> list[tuple[int, Tensor | None]]:
        """Each beginning with its rows, None for all."""
        if len(self.keys) == 1:
            return [(0, None)]
        found: dict[int, list[int]] = {}
        for row, one in enumerate(self.rows):
            found.setdefault(one, []).append(row)
        return [(one, tensor_on(found[one], self.keys.device)) for one in sorted(found)]


class SharedLayer(DynamicLayer):
    """Beginnings, and what each row has after them: `keys` and `values` are of the latter alone."""

    keys: Tensor
    values: Tensor

    def __init__(self, beginnings: tuple[Beginning, ...], keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.beginnings = beginnings
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    @classmethod
    def of(cls, layer: DynamicLayer, rows: Sequence[int]) -> SharedLayer:
        """Go on from a layer with rows that share what it holds.

        Args:
            layer: is left as it is.
            rows: which of its rows each of the new ones has.
        """
        layer = _forked(layer)
        earlier = layer.beginnings if isinstance(layer, SharedLayer) else ()
        keys, values = layer.keys, layer.values
        assert keys is not None
        assert values is not None
        found = [_selected(one, rows) for one in earlier]
        if keys.shape[2]:
            found.append(Beginning(keys, values, tuple(rows)))
        shape = (len(rows), keys.shape[1], 0, keys.shape[3])
        return cls(
            tuple(found), keys.new_empty(shape), values.new_empty(*shape[:3], values.shape[3])
        )

    @property
    def before(self) -> int:
        """Positions of the beginnings together."""
        return sum(one.length for one in self.beginnings)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values (B, H_kv, T, D_head) to the rows' own.

        Returns what `attend_to_pieces` takes for keys and for values.
        """
        super().update(key_states, value_states, *args, **kwargs)
        return self, self

    def get_seq_length(self) -> int:
        """Return the positions of a row."""
        return self.before + int(self.keys.shape[2])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove so many positions (a negative number) from the end of every row."""
        if -tokens_to_remove > self.keys.shape[2]:
            raise ValueError("a beginning that rows share cannot be cut")
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows into the order of indices (B,)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row next to itself."""
        rows = torch.arange(len(self.keys))
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices (n,), in this order."""
        several = any(len(one.keys) > 1 for one in self.beginnings)
        # Where all rows have the same beginning, a GPU need not be asked which these are.
        rows = indices.tolist() if several else [0] * len(indices)
        self.beginnings = tuple(_selected(one, rows) for one in self.beginnings)
        indices = send(indices, self.keys.device)
        self.keys, self.values = self.keys[indices], self.values[indices]


def _selected(one: Beginning, rows: Sequence[int]) -> Beginning:
    return replace(one, rows=tuple(one.rows[row] for row in rows))


def share(cache: Cache, rows: Sequence[int]) -> None:
    """Let rows go on from what a cache holds, storing it once.

    Args:
        cache: of layers that keep every position.
        rows: which of its rows each of the new ones goes on from.
    """
    cache.layers[:] = [SharedLayer.of(layer, rows) for layer in _plain(cache)]


def worth_sharing(cache: Cache, rows: Sequence[int]) -> bool:
    """Whether storing once what rows go on from saves enough, and this cache can."""
    saved = (len(rows) - len(set(rows))) * int(cache.get_seq_length())
    return saved >= WORTH_STORING_ONCE and _can_share(cache)


def fork(cache: Cache) -> Cache | None:
    """Return a cache that grows without touching the original's; None where that takes a copy."""
    layers = _plain(cache)
    if len(layers) < len(cache.layers):
        return None
    fresh = copy.copy(cache)
    fresh.layers = [_forked(layer) for layer in layers]
    return fresh


def _forked(layer: DynamicLayer) -> DynamicLayer:
    # A `DynamicLayer` never writes into its tensors: it replaces them.
    return layer.fork() if isinstance(layer, GrowingLayer) else copy.copy(layer)


def _can_share(cache: Cache) -> bool:
    return len(_plain(cache)) == len(cache.layers)


def _plain(cache: Cache) -> list[DynamicLayer]:
    found: list[Any] = cache.layers
    return [layer for layer in found if type(layer) in (DynamicLayer, GrowingLayer, SharedLayer)]


# -- attention -------------------------------------------------------------------------------------


@contextmanager
def reading(lm: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Let a model's layers read a cache with shared beginnings inside the block."""
    config: Any = lm.config
    before = config._attn_implementation
    if not any(isinstance(layer, SharedLayer) for layer in cache.layers):
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def attend_to_pieces(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | SharedLayer,
    value: Tensor | SharedLayer,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend to the beginnings that rows share and to what each has of its own.

    Args:
        module: the attention layer.
        query: (B, H, T, D_head).
        key: what a layer's `update` returned; other keys go to transformers' SDPA.
        value: the same for values.
        attention_mask: (B, 1, T, C) True where a query may look, None if everywhere.
        scaling: of the products, by default 1 / √D_head.
        options: of transformers' SDPA.

    Returns:
        (B, T, H, D_head), and no weights.
    """
    if not isinstance(key, SharedLayer) or not isinstance(value, SharedLayer):
        assert isinstance(key, Tensor)
        assert isinstance(value, Tensor)
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    batch, heads, count, width = query.shape
    assert attention_mask is not None or count == 1
    layer, kv_heads = key, key.keys.shape[1]
    scaled = query * (width**-0.5 if scaling is None else scaling)
    # Heads that share keys stand next to each other: (B, H_kv, n, T, D_head).
    grouped = scaled.reshape(batch, kv_heads, heads // kv_heads, count, width)
    step = max(LARGEST_SCORES // (batch * heads * layer.get_seq_length()), 1)
    parts = [
        _attend(part, layer, None if attention_mask is None else attention_mask[:, :, at:])
        for at, part in zip(range(0, count, step), grouped.split(step, dim=3), strict=True)
    ]
    found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)
    return found.permute(0, 3, 1, 2, 4).reshape(batch, count, heads, -1), None


def _attend(query: Tensor, layer: SharedLayer, mask: Tensor | None) -> Tensor:
    """Attend with (B, H_kv, n, T, D_head) queries; returns the same shape."""
    B, H, n, T, _ = query.shape
    scores = [_products(query, one) for one in layer.beginnings]
    own: Tensor = query.reshape(B, H, n * T, -1) @ layer.keys.transpose(2, 3)
    scores.append(own.reshape(B, H, n, T, -1))
    joined = torch.cat(scores, dim=-1)
    if mask is not None:
        joined = joined.masked_fill_(~mask[:, :, None, :T], torch.finfo(joined.dtype).min)
    weights = joined.softmax(-1, dtype=torch.float32).to(query.dtype)
    *shared, mine = weights.split([*(s.shape[-1] for s in scores)], dim=-1)
    found: Tensor = (mine.reshape(B, H, n * T, -1) @ layer.values).reshape(B, H, n, T, -1)
    for part, one in zip(shared, layer.beginnings, strict=True):
        found += _sums(part, one)
    return found


def _products(query: Tensor, one: Beginning) -> Tensor:
    """Return (B, H_kv, n, T, P) products of queries with the keys of their beginnings."""
    return _by_group(query, one, [keys.transpose(1, 2) for keys in one.keys])


def _sums(weights: Tensor, one: Beginning) -> Tensor:
    """Return (B, H_kv, n, T, D_head) sums of the values of beginnings."""
    return _by_group(weights, one, list(one.values))


def _by_group(rows: Tensor, one: Beginning, others: Sequence[Tensor]) -> Tensor:
    """Multiply (B, H_kv, n, T, X) with the (H_kv, X, Y) that belongs to each row."""
    whole: Tensor | None = None
    for group, mine in one.groups:
        some = rows if mine is None else rows[mine]
        b, H, n, T, _ = some.shape
        flat = some.transpose(0, 1).reshape(H, b * n * T, -1) @ others[group]
        found = flat.reshape(H, b, n, T, -1).transpose(0, 1)
        if mine is None:
            return found
        if whole is None:
            whole = found.new_empty(len(rows), *found.shape[1:])
        whole[mine] = found
    assert whole is not None
    return whole


AttentionInterface.register(NAME, attend_to_pieces)
AttentionMaskInterface.register(NAME, sdpa_mask)
