"""What the LLM makes of beginnings of prompts that never change, kept for when they come again.

Where nothing trainable stands before `<img-q>`, the first segment of a repeated question always
gives the same keys, values and hidden states. Training reads each such segment once, and every step
goes on from what is kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.sharing import contents
from ipn_core.transfer import send

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.segments import Segment
    from ipn_core.state import State

__all__ = ["PrefixCache", "changing_reasons"]


def changing_reasons(model: IPN) -> list[str]:
    """Say why a question is read differently while the model trains; empty if it is not."""
    reasons = []
    if model.requester is None:
        reasons.append("it has no look")
    if model.slots.request.requires_grad:
        reasons.append("<img-q> trains")
    if any(p.requires_grad for p in model.backbone.parameters()):
        reasons.append("weights of the LLM train")
    if model.injector is not None and not model.injector.needs_message:
        reasons.append("its injector acts before any look")
    return reasons


@dataclass(frozen=True, eq=False)
class _Entry:
    """One first segment of T tokens, read alone.

    Attributes:
        keys, values: (layers, H_kv, T, D_head).
        hidden: by layer, the states (R, D) at its end, -1 after the final norm.
    """

    keys: Tensor
    values: Tensor
    hidden: dict[int, Tensor]

    @property
    def bytes(self) -> int:
        tensors = (self.keys, self.values, *self.hidden.values())
        return sum(t.numel() * t.element_size() for t in tensors)


class PrefixCache:
    """Keys, values and hidden states of first segments by their tokens, while those are constants.

    Each is read alone, whatever the batch in which it comes first, so that the bits of a step do
    not depend on the steps before it: a training that is resumed with an empty cache goes on as one
    that was never interrupted.

    Attributes:
        reads: how many first segments the LLM has read.
        held: the bytes that are kept.
    """

    def __init__(self, model: IPN, limit: int) -> None:
        """Start empty.

        Args:
            model: whose LLM reads; make a new cache after anything has changed that stands before a
                look, such as the weights of `<img-q>`.
            limit: bytes to keep at most, on the LLM's device; what was not used for longest goes.
        """
        self.model = model
        self.limit = limit
        self.reads = 0
        self.held = 0
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()

    def not_supported_reasons(self, segment: Segment) -> list[str]:
        """Say why a first segment must be run in its batch; empty if it need not."""
        reasons = changing_reasons(self.model)
        if segment.statics:
            reasons.append("static tokens of pictures stand in it")
        if segment.learns:
            reasons.append("tokens to learn stand in it")
        if not segment.mask[:, -1].all():
            reasons.append("a row of it is empty")
        return reasons

    @torch.no_grad()
    def begin(self, segment: Segment, embeds: Tensor, state: State) -> dict[int, Tensor]:
        """Fill an empty state with a first segment that is supported.

        Args:
            segment: of B rows.
            embeds: (B, L, D_in) of it.
            state: gets its keys, values and mask.

        Returns:
            Hidden states (B, R, D) of the segment's end by layer, -1 the last.
        """
        entries = self._find(segment, embeds)
        keys = _side_by_side([entry.keys for entry in entries], segment.length)
        values = _side_by_side([entry.values for entry in entries], segment.length)
        for index, layer in enumerate(self.model.backbone.layers):
            device = next(layer.parameters()).device
            state.cache.update(keys[index].to(device), values[index].to(device), index)
        state.mask = send(segment.mask, embeds.device)
        layers = entries[0].hidden
        return {i: torch.stack([entry.hidden[i] for entry in entries]) for i in layers}

    def _find(self, segment: Segment, embeds: Tensor) -> list[_Entry]:
        """Return the entry of each row; those that are missing are read now, each alone."""
        rows = [tuple(contents(segment, row)) for row in range(len(segment.ids))]
        found: dict[Hashable, _Entry] = {}
        for row, key in enumerate(rows):
            if key in found:
                continue
            if key in self._entries:
                self._entries.move_to_end(key)
                found[key] = self._entries[key]
            else:
                own = embeds[row : row + 1, segment.length - len(key) :]
                found[key] = self._read(own, segment.request)
                self._keep(key, found[key])
        return [found[key] for key in rows]

    def _read(self, embeds: Tensor, ends: int) -> _Entry:
        """Run the LLM over one first segment (1, T, D_in); keep the states of its last tokens."""
        backbone, requester = self.model.backbone, self.model.requester
        assert requester is not None
        length, device = embeds.shape[1], embeds.device
        positions = torch.arange(length, device=device)[None]
        with self.model.driving("new_cache"):
            cache = backbone.new_cache()
        with self.model.driving("extend"):
            out = backbone.extend(embeds, cache, positions, None, [requester.layer])
        self.reads += 1
        held: list[Any] = cache.layers
        short = max(ends - length, 0)  # a row without a look may be shorter than R
        return _Entry(
            torch.stack([layer.keys[0].to(device) for layer in held]),
            torch.stack([layer.values[0].to(device) for layer in held]),
            {
                index: F.pad(states[0, -ends:], (0, 0, short, 0)).clone()
                for index, states in {**out.hidden, -1: out.last}.items()
            },
        )

    def _keep(self, key: Hashable, entry: _Entry) -> None:
        if entry.bytes > self.limit:
            return
        self._entries[key] = entry
        self.held += entry.bytes
        while self.held > self.limit:
            _, oldest = self._entries.popitem(last=False)
            self.held -= oldest.bytes


def _side_by_side(rows: Sequence[Tensor], length: int) -> Tensor:
    """Put (layers, H, T, D) of several rows into (layers, B, H, length, D), padded on the left."""
    layers, heads, _, width = rows[0].shape
    whole = rows[0].new_zeros(layers, len(rows), heads, length, width)
    for index, row in enumerate(rows):
        whole[:, index, :, length - row.shape[2] :] = row
    return whole
