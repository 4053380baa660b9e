"""Numbers that are none any more, such as those that float16 cannot hold: noticed, and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.errors import StageError
from ipn_core.shared_cache import SharedLayer

if TYPE_CHECKING:
    from transformers import Cache

    from ipn_core.model import IPN
    from ipn_core.stages import Percept
    from ipn_core.state import State

__all__ = ["FiniteLogits", "origin", "spoiled", "tensors"]


def spoiled(tensor: Tensor) -> Tensor:
    """Whether a tensor (…) holds NaN or infinity, a bool (); minus infinity may be a mask."""
    return (tensor.isnan() | tensor.isposinf()).any()


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of floating-point numbers in something, however deep they lie."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from tensors(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from tensors(inner)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


class FiniteLogits:
    """A logits processor of transformers that ends answers whose logits are no numbers."""

    def __init__(self, where: Callable[[], str]) -> None:
        """Start before the first token.

        Args:
            where: names what the first such number was in, and what to do; called only then.
        """
        self._where = where

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at (B, vocabulary) scores, which are handed on as they are.

        Raises:
            StageError: a row holds such a number, which may be one that has ended already.
        """
        # `generate` waits for the device right after this, for the token. Drawing it from such
        # numbers would end all work on a GPU before anybody could say why.
        if bool(spoiled(scores)):
            raise StageError(f"there is no answer: {self._where()}")
        return scores


def origin(model: IPN, percept: Percept, state: State, mask: Tensor) -> str:
    """Say which tensor of an answer was the first that holds NaN or infinity.

    Args:
        model: that answers.
        percept: what it perceived.
        state: its cache and its looks.
        mask: (B, C) of the cache's positions, True for real tokens; later ones are all real.
    """
    config, dtype = model.config, model.backbone.dtype
    named = _first(model, percept, state, mask)
    text = f"{named} holds NaN or infinity, in {str(dtype).removeprefix('torch.')}"
    if dtype == torch.float16:
        return f"{text}, whose largest number is 65,504. Choose --dtype bfloat16 or float32."
    backbone = config.backbone.weights or config.backbone.name
    return f"{text}. Check the weights of '{backbone}' and of '{model.name}'."


def _first(model: IPN, percept: Percept, state: State, mask: Tensor) -> str:
    config = model.config
    if spoiled(percept.features.values):
        return f"what the encoder '{config.encoder.name}' sees in a picture"
    layer = _first_layer(state.cache, mask, state.length)
    if layer == 0:
        if config.perceive is not None and any(map(spoiled, tensors(percept.tokens))):
            return f"a static token of '{config.perceive.name}'"
        for look in state.looks:
            if spoiled(look.request.values):
                return "the request"
            if config.interact is not None and spoiled(look.message.values):
                return f"the message of '{config.interact.name}'"
    if layer is None:
        return "the output of the language model"
    return f"a key or value of layer {layer} of the language model"


def _first_layer(cache: Cache, mask: Tensor, begun: int) -> int | None:
    """The lowest layer that is spoiled in the first segment where any is; None where none is.

    Within a segment, NaN of one position also reaches those before it: 0 times NaN is NaN.
    """
    length = cache.get_seq_length()
    places: dict[int, int] = {}
    for number, layer in enumerate(cache.layers):
        place = _first_place(layer, mask, length)
        if place is not None:
            places[number] = place
    early = any(place < begun for place in places.values())
    return next((layer for layer, at in places.items() if at < begun or not early), None)


def _first_place(layer: Any, mask: Tensor, length: int) -> int | None:
    """The first real position where a layer is spoiled, None where there is none.

    Nor is one told of a layer that keeps the last positions alone, or none.
    """
    if layer.get_seq_length() != length or not hasattr(layer, "keys"):
        return None
    at = 0
    for keys, values, rows in _pieces(layer):
        bad = ~(keys.isfinite().all(-1) & values.isfinite().all(-1)).all(1)
        real = mask[rows, at : at + bad.shape[1]].to(bad.device)
        bad[:, : real.shape[1]] &= real
        places = bad.any(0).nonzero()
        if len(places):
            return at + int(places[0])
        at += bad.shape[1]
    return None


def _pieces(layer: Any) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Yield keys and values (n, H_kv, P, D_head) by place, and for each one of its rows."""
    if isinstance(layer, SharedLayer):
        for one in layer.beginnings:
            used = sorted(set(one.rows))
            yield one.keys[used], one.values[used], [one.rows.index(group) for group in used]
    yield layer.keys, layer.values, list(range(len(layer.keys)))
