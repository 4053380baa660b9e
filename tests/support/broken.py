"""Plugins that are broken on purpose."""

from __future__ import annotations

from typing import Any

from ipn_core import plugins
from ipn_core.plugins import Plugin, Registry


class OddError(Exception):
    """No error of ours, and none of torch's."""


def fail(*arguments: Any, **options: Any) -> Any:
    """Stand for any method that raises."""
    raise OddError("of its own")


def raises(base: type, method: str) -> type:
    """A class of which one method raises."""
    return type("Broken", (base,), {method: fail})


def install(found: Registry, broken: object) -> Registry:
    """Add a broken plugin, as one of the distribution ipn-broken 1.2."""
    plugin = Plugin("broken", "ipn-broken", "1.2")
    found.plugins.append(plugin)
    plugins._Discovery(found).register(plugin, broken)
    return found
