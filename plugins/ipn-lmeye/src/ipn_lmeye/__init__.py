"""The strategy `lmeye`: the interaction of the released LMEye code (arXiv 2305.03701)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

PRESET = {
    "request": {"name": "hidden-state"},
    "interact": {"name": "lmeye"},
    "inject": {"name": "tokens", "norm": False},
    "layout": {"rounds": 1, "request": 1, "dynamic": 5},
}
"""One `<img-q>`, five `<img-d>`, and a linear map alone from the message to them, as published."""


@hookimpl
def register(registry: Registrar) -> None:
    """Add the interaction and its strategy."""
    registry.interaction("lmeye", "ipn_lmeye.lmeye:LMEye")
    registry.strategy("lmeye", PRESET)
