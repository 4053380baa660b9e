"""A key-value cache that grows in place: a new token copies nothing of what came before it.

transformers' `DynamicLayer` joins what it holds and what is new into a new tensor at every step. A
`GrowingLayer` keeps room behind what it holds. Caches that go on from the same beginning (`fork`)
may use that room in turn, the first one to write there at a time; another one moves to room of its
own, so that none ever sees what another wrote.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["GrowingLayer", "give_back", "growing"]

_CLAIMING = threading.Lock()


class _Room:
    """Keys and values with room behind them.

    Attributes:
        keys, values: (B, H_kv, N, D_head), of which the first `used` positions are written.
        used: positions that belong to some cache.
        forked: positions that several caches may hold; they are not written again.
    """

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        self.keys, self.values, self.used = keys, values, used
        self.forked = 0

    @classmethod
    def behind(cls, keys: Tensor, values: Tensor, new: int) -> _Room:
        """Copy what is held to where there is room for `new` positions and some more."""
        used = int(keys.shape[2])
        whole = used + new
        size = whole + max(64, whole // 16)  # little, since a cache may fill most of the memory
        rows, heads = keys.shape[:2]
        made = [t.new_empty(rows, heads, size, t.shape[3]) for t in (keys, values)]
        for to, held in zip(made, (keys, values), strict=True):
            to[:, :, :used] = held
        return cls(made[0], made[1], used)

    def claim(self, start: int, new: int) -> bool:
        """Whether the caller may write `new` positions from `start` on; nobody else may then."""
        with _CLAIMING:
            if self.used != start or start + new > self.keys.shape[2]:
                return False
            self.used = start + new
            return True

    def leave(self, end: int, start: int) -> None:
        """Give positions from `start` on back, of a cache that ends at `end`."""
        with _CLAIMING:
            if self.used == end and start >= self.forked:
                self.used = start


class GrowingLayer(DynamicLayer):
    """A layer whose `keys` and `values` begin a larger tensor, as long as nobody replaces them."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room: _Room | None = None
        self._seen: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values (B, H_kv, T, D_head) to the rows, in place where nothing is learned.

        Returns all of them, (B, H_kv, C + T, D_head) each.
        """
        others = self.is_initialized and (key_states.dtype, value_states.dtype) != (
            self.keys.dtype,
            self.values.dtype,
        )
        if torch.is_grad_enabled() or others:
            with self._replacing():
                return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, new = int(self.keys.shape[2]), int(key_states.shape[2])
        room = self._own_room()
        if room is None or not room.claim(start, new):
            room = _Room.behind(self.keys, self.values, new)
            room.claim(start, new)
        end = start + new
        room.keys[:, :, start:end] = key_states
        room.values[:, :, start:end] = value_states
        self._show(room, end)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Remove so many positions (a negative number) from the end of every row."""
        room, end = self._own_room(), self.get_seq_length()
        super().crop(tokens_to_remove)
        if room is not None and tokens_to_remove:
            room.leave(end, int(self.keys.shape[2]))
            self._show(room, int(self.keys.shape[2]))

    def reorder_cache(self, beam_idx: Any) -> None:
        """Put rows into another order."""
        with self._replacing():
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row next to itself."""
        with self._replacing():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices (n,), in this order."""
        with self._replacing():
            super().batch_select_indices(indices)

    def fork(self) -> GrowingLayer:
        """Return a layer that goes on from this one and leaves it as it is."""
        if self._room is not None:
            with _CLAIMING:
                self._room.forked = max(self._room.forked, self.get_seq_length())
        return copy.copy(self)

    @contextmanager
    def _replacing(self) -> Iterator[None]:
        """Leave the room to others, and to the garbage, once other tensors are held."""
        room, end = self._own_room(), self.get_seq_length()
        yield
        self._room = self._seen = None
        if room is not None:
            room.leave(end, room.forked)

    def _show(self, room: _Room, end: int) -> None:
        self._room = room
        self.keys, self.values = room.keys[:, :, :end], room.values[:, :, :end]
        self._seen = (self.keys, self.values)

    def _own_room(self) -> _Room | None:
        """The room that the keys lie in; None where they were replaced, or may not be written."""
        if self._room is None or self._seen is None:
            return None
        if self._seen[0] is not self.keys or self._seen[1] is not self.values:
            return None
        read_only = self._room.keys.is_inference() and not torch.is_inference_mode_enabled()
        return None if read_only else self._room


def growing(cache: Cache) -> Cache:
    """Let the layers of an empty cache that keep every position grow in place."""
    layers: list[Any] = cache.layers
    layers[:] = [GrowingLayer() if type(one) is DynamicLayer else one for one in layers]
    return cache


def give_back(cache: Cache, length: int) -> None:
    """Let another cache write behind the first `length` positions; this one is not read again."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.crop(min(0, length - layer.get_seq_length()))
