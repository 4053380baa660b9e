"""The strategies that a model has weights for, over one language model."""

from __future__ import annotations

import threading
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
        names: the strategies, the one that is loaded first of all.
        lock: whoever lets one of them answer holds it: they share a language model.
    """

    def __init__(self, first: IPN, source: Source, registry: Registry) -> None:
        """Start with one strategy.

        Args:
            first: the model with the strategy that comes first.
            source: where it came from.
            registry: where names are looked up.
        """
        self.name = first.name
        self.names = (first.strategy, *(n for n in source.strategies if n != first.strategy))
        self.lock = threading.Lock()
        self._source, self._registry = source, registry
        self._loaded = {first.strategy: first}
        self._loading = threading.Lock()

    def get(self, name: str) -> IPN:
        """Return the model with a strategy.

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
        from ipn_core.checkpoint import load
        from ipn_core.model import IPN

        first = next(iter(self._loaded.values()))
        config = self._source.config(name, self._registry)
        # An adapter belongs to one strategy: the next one needs a language model without it.
        alike = config.backbone == first.config.backbone and config.backbone.lora is None
        model = load(
            IPN,
            self._source,
            interact=name,
            backbone=first.backbone if alike else None,
            encoder=first.encoder if config.encoder == first.config.encoder else None,
            registry=self._registry,
        )
        there = first.slots.request
        return model.to(there.device, there.dtype).eval()
