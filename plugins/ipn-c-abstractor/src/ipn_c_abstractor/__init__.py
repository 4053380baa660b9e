"""The strategy `c-abstractor`: Honeybee's convolutional abstractor (arXiv 2312.06742)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

PRESET = {
    "perceive": {"name": "c-abstractor"},
    "layout": {"rounds": 0},
}
"""Static tokens and no request."""


@hookimpl
def register(registry: Registrar) -> None:
    """Add the connector and its strategy."""
    registry.perceiver("c-abstractor", "ipn_c_abstractor.abstractor:CAbstractor")
    registry.strategy("c-abstractor", PRESET)
