"""The perceiver `vision`: any Hugging Face vision tower, by config."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]


@hookimpl
def register(registry: Registrar) -> None:
    """Add the perceiver `vision`."""
    registry.perceiver("vision", "ipn_vision.tower:VisionTower")
