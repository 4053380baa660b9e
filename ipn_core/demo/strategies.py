"""The strategies that a model has weights for, and other models, over one language model."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ipn_core.errors import unknown_name

if TYPE_CHECKING:
    from ipn_core.checkpoint import Source
    from ipn_core.model import IPN
    from ipn_core.plugins import Registry

__all__ = ["Strategies"]


class Strategies:
    """One model with each of its strategies, loaded when it is first asked for.

    Attributes:
        name: the model's.
        own: its strategies, the one that is loaded first of all.
        others: further models, each with its first strategy.
        names: all of them, in this order.
        lock: whoever lets one of them answer holds it: they share a language model.
    """

    def __init__(
        self, first: IPN, source: Source, registry: Registry, others: Sequence[str] = ()
    ) -> None:
        """Start with one strategy.

        Args:
            first: the model with the strategy that comes first.
            source: where it came from.
            registry: where names are looked up.
            others: known models that are offered beside it.
        """
        self.name = first.name
        self.own = (first.strategy, *(n for n in source.strategies if n != first.strategy))
        self.others = tuple(other for other in others if other not in self.own)
        self.names = (*self.own, *self.others)
        self.lock = threading.Lock()
        self._source, self._registry = source, registry
        self._loaded = {first.strategy: first}
        self._loading = threading.Lock()

    def get(self, name: str) -> IPN:
        """Return the model with a strategy, or another model.

        Raises:
            UnknownNameError: the model has no weights for it.
            CheckpointError: its weights do not fit.
        """
        if name not in self.names:
            raise unknown_name("strategy", name, self.names, f"ipn ask --model {self.name}")
        with self._loading:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def _load(self, name: str) -> IPN:
        from ipn_core.checkpoint import load, open_source
        from ipn_core.model import IPN

        first = next(iter(self._loaded.values()))
        source = open_source(name, self._registry) if name in self.others else self._source
        strategy = source.strategies[0] if name in self.others else name
        config = source.config(strategy, self._registry)
        # An adapter belongs to one strategy: the next one needs a language model without it.
        alike = config.backbone == first.config.backbone and config.backbone.lora is None
        model = load(
            IPN,
            source,
            interact=strategy,
            backbone=first.backbone if alike else None,
            encoder=first.encoder if config.encoder == first.config.encoder else None,
            registry=self._registry,
        )
        there = first.slots.request
        return model.to(there.device, there.dtype).eval()
