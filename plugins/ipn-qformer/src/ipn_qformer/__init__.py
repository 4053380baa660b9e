"""The strategy `qformer`: learned queries look at the picture (arXiv 2301.12597, 2305.06500)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

PRESET = {
    "perceive": {"name": "qformer"},
    "layout": {"rounds": 0},
}
"""Static tokens, and no request at `<img-q>`."""


@hookimpl
def register(registry: Registrar) -> None:
    """Add the connector, its strategy, an encoder, and the importers of both models."""
    registry.perceiver("qformer", "ipn_qformer.qformer:QFormer")
    registry.perceiver("qformer-tokens", "ipn_qformer.tokens:QFormerTokens")
    registry.strategy("qformer", PRESET)
    registry.importer("blip2", "ipn_qformer.importing:Blip2")
    registry.importer("instructblip", "ipn_qformer.importing:InstructBlip")
