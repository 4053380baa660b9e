"""The hookspecs: one for discovery, one for each of the four stages.

`register` is called once per process on every installed plugin. The four stage hooks live on a
plugin manager of each model's own, where the chosen modules are registered as plugins and anyone
may add a wrapper (`@hookimpl(wrapper=True)`) to record, time, cache or replace a stage.
`docs/hooks.md` documents each with an example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from ipn_core.features import VisualFeatures
    from ipn_core.plugins import Registrar
    from ipn_core.stages import (
        InjectContext,
        Injection,
        PerceiveContext,
        Percept,
        Request,
        RequestContext,
        VisualMessage,
    )

__all__ = ["PROJECT", "DiscoverySpec", "StageSpec", "hookimpl"]

PROJECT = "ipn"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class DiscoverySpec:
    """What an installed plugin implements."""

    @hookspec
    def register(self, registry: Registrar) -> None:
        """Add components to the registry, by name; must import no torch."""


class StageSpec:
    """What the four modules of a model implement; a wrapper may stand around each."""

    @hookspec(firstresult=True)
    def perceive(self, context: PerceiveContext) -> Percept:
        """Turn pictures into visual features and, optionally, static tokens at `<img>` slots."""

    @hookspec(firstresult=True)
    def request(self, context: RequestContext) -> Request:
        """Turn the LLM's hidden states at `<img-q>` into what is asked of the picture."""

    @hookspec(firstresult=True)
    def interact(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Let the request look at the features and come back with a message."""

    @hookspec(firstresult=True)
    def inject(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Turn the message into the LLM's inputs at the `<img-d>` slots."""
