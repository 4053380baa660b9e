"""The starter: a trained model on real LLM weights, its vision encoder, tasks and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]


@hookimpl
def register(registry: Registrar) -> None:
    """Add the encoder, the tasks and the weights."""
    registry.perceiver("efficientnet-lite0", "ipn_starter.encoder:EfficientNetLite0")
    registry.task("easy-vqa", "ipn_starter.easy_vqa:EasyVQA")
    registry.task("emoji-details", "ipn_starter.small_scenes:EmojiDetails")
    registry.task("emoji-hops", "ipn_starter.hop_scenes:EmojiHops")
    registry.task("emoji-scenes", "ipn_starter.emoji_scenes:EmojiScenes")
    registry.weights("smollm2-135m-instruct", "ipn_starter.weights:SMOLLM2")
    registry.weights("starter", "ipn_starter.weights:STARTER")
