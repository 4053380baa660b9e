"""The strategy `rvii`: request-based visual information interaction (LMEye, arXiv 2305.03701)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

PRESET = {
    "request": {"name": "hidden-state"},
    "interact": {"name": "rvii"},
    "inject": {"name": "tokens"},
    "layout": {"rounds": 1, "request": 1, "dynamic": 5},
}
"""The paper's: one look, five dynamic tokens."""


@hookimpl
def register(registry: Registrar) -> None:
    """Add the interaction and its strategy."""
    registry.interaction("rvii", "ipn_rvii.rvii:RVII")
    registry.strategy("rvii", PRESET)
