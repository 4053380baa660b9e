"""OPT backbones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]


@hookimpl
def register(registry: Registrar) -> None:
    """Add the backbone `opt`."""
    registry.backbone("opt", "ipn_opt.opt:Opt")
