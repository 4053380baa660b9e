"""Gradient checkpointing of an LLM's layers that keeps the key-value cache.

Of each layer's forward only its inputs and outputs are kept, the rest is computed again in the
backward pass (Chen et al. 2016, arXiv 1604.06174). transformers' own switch drops the cache. Here
a layer is handed the keys and values so far and gives the longer ones back as tensors, so that
running it again changes nothing outside, and gradients reach the tokens of earlier segments.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import Cache

__all__ = ["checkpointed"]


@contextmanager
def checkpointed(layers: Sequence[nn.Module], cache: Cache) -> Iterator[None]:
    """Run decoder layers inside the block so that they keep only what goes in and out.

    Args:
        layers: in the order of the cache's layers.
        cache: what they extend.
    """
    before = [vars(layer).get("forward") for layer in layers]
    for index, layer in enumerate(layers):
        layer.forward = partial(_run, layer.forward, cache, index)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def _run(forward: Callable[..., Any], cache: Cache, index: int, *args: Any, **kwargs: Any) -> Any:
    """Run one layer; its part of the cache grows as without checkpointing."""
    held = cache.layers[index]
    given = copy.copy(held)
    key = next(name for name, value in kwargs.items() if value is cache)
    # A cache with this layer alone: another one's tensors would be kept alive in vain.
    alone: Any = copy.copy(cache)
    alone.layers = [None] * len(cache.layers)
    settings: dict[str, Any] = {}

    def replayed(*args: Any) -> tuple[Any, Any, Any]:
        own: Any = copy.copy(given)
        shadow = copy.copy(alone)
        shadow.layers = [*alone.layers]
        shadow.layers[index] = own
        output = forward(*args, **{**kwargs, key: shadow})
        settings.update({k: v for k, v in vars(own).items() if k not in ("keys", "values")})
        return output, own.keys, own.values

    output, keys, values = checkpoint(replayed, *args, use_reentrant=False)
    vars(held).update({**settings, "keys": keys, "values": values})
    return output
