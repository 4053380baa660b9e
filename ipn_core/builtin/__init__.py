"""The core's own components, registered through the same hook as anybody's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registry

__all__ = ["register"]


@hookimpl
def register(registry: Registry) -> None:
    """Add the requesters and the token injector."""
    registry.requester("hidden-state", "ipn_core.builtin.requesters:HiddenState")
    registry.requester("constant", "ipn_core.builtin.requesters:Constant")
    registry.requester("shuffled", "ipn_core.builtin.requesters:Shuffled")
    registry.injector("tokens", "ipn_core.builtin.injectors:TokenInjector")
