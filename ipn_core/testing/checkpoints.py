"""A tiny model on disk for tests: a random language model, and two strategies over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ipn_core.checkpoint import INDEX
from ipn_core.model import IPN
from ipn_core.plugins import add_plugin, get_registry
from ipn_core.testing import plugin
from ipn_core.testing.tiny import tiny_backbone

__all__ = ["register_tiny", "save_tiny_model", "tiny_config"]


def register_tiny() -> None:
    """Make the tiny components known in this process, once."""
    registry = get_registry()
    if "tiny" not in registry.entries("perceiver"):
        add_plugin(registry, "tiny", plugin)


def tiny_config(strategy: str = "tiny-look", **more: Any) -> dict[str, Any]:
    """Return a config for `IPN.from_config` with two dynamic tokens.

    Args:
        strategy: "tiny-look" or "tiny-mean".
        more: further keys, such as `backbone`.
    """
    base = {"strategy": strategy, "backbone": "llama", "layout": {"dynamic": 2}}
    return {**base, **more}


def save_tiny_model(folder: Path, *, positions: int = 256) -> Path:
    """Save a language model and a model with `tiny-look` (the default) and `tiny-mean`.

    Args:
        folder: gets `llm` and `model`.
        positions: the longest context.

    Returns:
        The model's folder.
    """
    register_tiny()
    backbone = tiny_backbone("llama", positions=positions)
    backbone.lm.save_pretrained(folder / "llm")
    backbone.tokenizer.save_pretrained(folder / "llm")
    named = {"name": "llama", "weights": str(folder / "llm")}
    strategies = ["tiny-look", "tiny-mean"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for strategy in strategies:
            config = tiny_config(strategy, backbone=named)
            IPN.from_config(config, backbone=backbone).save_pretrained(folder / "model" / strategy)
    index = {"default": strategies[0], "strategies": strategies}
    (folder / "model" / INDEX).write_text(json.dumps(index))
    return folder / "model"
