"""The strategy `resampler`: learned queries sum each picture up (Flamingo, arXiv 2204.14198)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

PRESET = {
    "perceive": {"name": "resampler"},
    "layout": {"rounds": 0},
}
"""Static tokens and no request."""


@hookimpl
def register(registry: Registrar) -> None:
    """Add the connector and its strategy."""
    registry.perceiver("resampler", "ipn_resampler.connector:ResamplerConnector")
    registry.strategy("resampler", PRESET)
