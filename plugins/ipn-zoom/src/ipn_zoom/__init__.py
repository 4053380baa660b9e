"""The strategy `zoom`: the request picks regions, which are perceived again at full resolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

PRESET = {
    "request": {"name": "hidden-state"},
    "interact": {"name": "zoom"},
    "inject": {"name": "tokens"},
    "layout": {"rounds": 1, "request": 1, "dynamic": 5},
}
"""One look, as many dynamic tokens as `rvii`."""


@hookimpl
def register(registry: Registrar) -> None:
    """Add the interaction and its strategy."""
    registry.interaction("zoom", "ipn_zoom.zoom:Zoom")
    registry.strategy("zoom", PRESET)
