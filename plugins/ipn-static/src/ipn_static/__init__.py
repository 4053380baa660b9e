"""The strategy `static`: visual tokens that no question changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

PRESET = {
    "perceive": {"name": "static"},
    "layout": {"rounds": 0},
}
"""Static tokens and no request."""


@hookimpl
def register(registry: Registrar) -> None:
    """Add the connector, its strategy, and the importer of LLaVA."""
    registry.perceiver("static", "ipn_static.static:StaticConnector")
    registry.strategy("static", PRESET)
    registry.importer("llava", "ipn_static.importing:Llava")
