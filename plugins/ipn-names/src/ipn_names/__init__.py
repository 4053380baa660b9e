"""Photographs by name: a classifier's classes as words of the language model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]


@hookimpl
def register(registry: Registrar) -> None:
    """Add the encoder, the stages, the tasks and the weights."""
    registry.perceiver("imagenet-names", "ipn_names.encoder:ImageNetNames")
    registry.perceiver("names", "ipn_names.connector:NamesConnector")
    registry.interaction("names", "ipn_names.interaction:Names")
    registry.injector("verbatim", "ipn_names.injector:Verbatim")
    registry.objective("understand", "ipn_names.objective:Understand")
    registry.task("photo-stamps", "ipn_names.stamps:PhotoStamps")
    registry.task("photo-words", "ipn_names.words:PhotoWords")
    registry.weights("photo", "ipn_names.weights:PHOTO")
