"""LLaMA and Vicuna backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]


@hookimpl
def register(registry: Registrar) -> None:
    """Add the backbones `llama` and `vicuna`."""
    registry.backbone("llama", "ipn_llama.llama:Llama")
    registry.backbone("vicuna", "ipn_llama.llama:Vicuna")
