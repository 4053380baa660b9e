"""A plugin of tiny components for tests: an encoder, and interactions with and without a map.

Register it with `ipn_core.plugins.add_plugin`, or through an entry point as any plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

_STAGES = {"encoder": "tiny", "request": "hidden-state", "inject": "tokens"}


@hookimpl
def register(registry: Registrar) -> None:
    """Add the encoder `tiny`, and strategies `tiny-look` (with a map) and `tiny-mean` (none)."""
    registry.perceiver("tiny", "ipn_core.testing.tiny:TinyEncoder")
    registry.interaction("tiny-look", "ipn_core.testing.interactions:TinyLook")
    registry.interaction("tiny-mean", "ipn_core.testing.interactions:TinyMean")
    registry.strategy("tiny-look", {**_STAGES, "interact": "tiny-look"})
    registry.strategy("tiny-mean", {**_STAGES, "interact": "tiny-mean"})
