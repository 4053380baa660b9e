"""The strategy `film`: the request scales and shifts the visual features (arXiv 1709.07871)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

PRESET = {
    "request": {"name": "hidden-state"},
    "interact": {"name": "film"},
    "inject": {"name": "tokens"},
    "layout": {"rounds": 1, "request": 1, "dynamic": 5},
}
"""One look, as many dynamic tokens as `rvii`."""


@hookimpl
def register(registry: Registrar) -> None:
    """Add the interaction and its strategy."""
    registry.interaction("film", "ipn_film.film:FiLM")
    registry.strategy("film", PRESET)
