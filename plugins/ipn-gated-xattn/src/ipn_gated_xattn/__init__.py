"""The strategy `gated-xattn`: every layer looks at the pictures (Flamingo, arXiv 2204.14198)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]

PRESET = {
    "perceive": {"name": "latents"},
    "inject": {"name": "gated-xattn"},
    "layout": {"rounds": 0},
}
"""No look at `<img-q>`: each hidden state between the layers is a request."""


@hookimpl
def register(registry: Registrar) -> None:
    """Add the perceiver, the injector, their strategy, and the importer of Idefics."""
    registry.perceiver("latents", "ipn_gated_xattn.latents:Latents")
    registry.injector("gated-xattn", "ipn_gated_xattn.injector:GatedCrossAttention")
    registry.strategy("gated-xattn", PRESET)
    registry.importer("idefics", "ipn_gated_xattn.importing:Idefics")
