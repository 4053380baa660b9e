"""What the LLM has processed so far: its cache, and what the looks have brought."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.features import VisualFeatures
from ipn_core.segments import Look, TokenCounts
from ipn_core.stages import LayerContext, Request, VisualMessage
from ipn_core.transfer import send, tensor_on

if TYPE_CHECKING:
    from transformers import Cache

    from ipn_core.backbone import Backbone

__all__ = ["LookRecord", "Prefix", "State"]


@dataclass(frozen=True, eq=False)
class LookRecord:
    """One look of the samples that looked together.

    Attributes:
        looks: which rows, in the order of the tensors below.
        request: what was asked.
        message: what came back.
        features: what was looked at.
    """

    looks: tuple[Look, ...]
    request: Request
    message: VisualMessage
    features: VisualFeatures


@dataclass(eq=False)
class State:
    """What has been processed so far.

    Attributes:
        cache: the keys and values of C tokens.
        mask: (B, C) True for real tokens.
        lengths: real tokens of each row.
        pictures: for each row, the position of each picture so far.
        counts: tokens by kind, a row.
        looks: the looks so far.
        told: for each row, the position after each look so far and its message (M, Dm); those of
            earlier turns too.
    """

    cache: Cache
    mask: Tensor
    lengths: list[int]
    pictures: list[list[int]]
    counts: list[TokenCounts]
    looks: list[LookRecord] = field(default_factory=list)
    told: list[list[tuple[int, Tensor]]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """C, padding included."""
        return int(self.mask.shape[1])

    def select(self, rows: Sequence[int], shares: bool = False) -> None:
        """Keep these rows of cache and mask, in this order; one may be named several times.

        Args:
            rows: which.
            shares: whether rows may share what lies in the cache; it is copied otherwise.
        """
        from ipn_core.shared_cache import SharedLayer, share, worth_sharing

        known = torch.tensor(rows)
        index = send(known, self.mask.device)
        if self.length and shares and worth_sharing(self.cache, rows):
            share(self.cache, rows)
        elif self.length:
            layers: list[Any] = self.cache.layers
            for layer in layers:
                # One whose rows share something asks which they are, which the CPU knows.
                shared = isinstance(layer, SharedLayer)
                layer.batch_select_indices(known if shared else index.to(layer.keys.device))
        self.mask = self.mask[index]

    def fork(self) -> State:
        """Return a state that goes on from this one and leaves it as it is."""
        from ipn_core import shared_cache

        fresh = copy.copy(self)
        fresh.cache = shared_cache.fork(self.cache) or copy.deepcopy(self.cache)
        fresh.lengths = list(self.lengths)
        fresh.pictures = [list(p) for p in self.pictures]
        fresh.told = [list(t) for t in self.told]
        fresh.looks = []
        fresh.counts = [TokenCounts() for _ in self.counts]
        return fresh

    def end(self, length: int) -> None:
        """Leave the room behind the first `length` positions to the next fork; use this no more."""
        from ipn_core.growing_cache import give_back

        give_back(self.cache, length)

    def remember(
        self, rows: Sequence[int], keys: Tensor, values: Tensor, backbone: Backbone
    ) -> None:
        """Put keys and values straight into the cache, after what each row has processed.

        Args:
            rows: whose they are; the others get padding.
            keys: (n, layers, C, H_kv, D_head) without positions.
            values: the same shape.
            backbone: whose cache it is.
        """
        batch, caches, device = len(self.mask), keys.shape[2], keys.device
        index = tensor_on(rows, device)
        whole = (batch, *keys.shape[1:])
        after = tensor_on(self.lengths, device).unsqueeze(1)
        backbone.remember(
            keys.new_zeros(whole).index_copy(0, index, keys),
            values.new_zeros(whole).index_copy(0, index, values),
            after + torch.arange(caches, device=device),
            self.cache,
        )
        real = torch.zeros(batch, caches, dtype=torch.bool, device=device)
        self.mask = torch.cat([self.mask, real.index_fill(0, index, True)], dim=1)
        for row in rows:
            self.lengths[row] += caches

    def between(
        self,
        rows: Sequence[int],
        positions: Tensor,
        features: VisualFeatures,
        size: tuple[int, int],
    ) -> LayerContext:
        """Say what stands before each token of a forward; its layer is filled in later.

        Args:
            rows: which row of the state each row of the forward is; beams share one.
            positions: (n, T) of the tokens.
            features: the pictures of the n rows.
            size: (M, Dm) of a message.
        """
        zeros = features.values.new_zeros(max(map(len, self.told)), *size)
        told = [
            torch.stack([*(message for _, message in row), *zeros[len(row) :]]) if row else zeros
            for row in self.told
        ]
        return LayerContext(
            layer=-1,
            positions=positions,
            pictures=_passed(positions, [self.pictures[row] for row in rows]),
            features=features,
            looks=_passed(positions, [[at for at, _ in self.told[row]] for row in rows]),
            messages=torch.stack([told[row] for row in rows]),
        )


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt up to its last segment, which `generate` or the caller runs.

    Attributes:
        state: everything before the last segment.
        embeds: (B, L, D_in) the last segment, its dynamic tokens filled in.
        mask: (B, L) True for real tokens.
        lengths: real tokens of each row, known without a device sync.
    """

    state: State
    embeds: Tensor
    mask: Tensor
    lengths: list[int]


def _passed(positions: Tensor, starts: Sequence[Sequence[int]]) -> Tensor:
    """Count for each token, (B, T), how many of its row's starts it has reached."""
    width = max(map(len, starts))
    never = 1 << 30
    padded = [[*row, *[never] * (width - len(row))] for row in starts]
    at = tensor_on(padded, positions.device).reshape(len(starts), 1, width)
    return (positions.unsqueeze(-1) >= at).sum(-1)
