"""The weights of the model `photo`: a packaged checkpoint, on the starter's language model."""

from __future__ import annotations

from pathlib import Path

from ipn_starter.weights import Packaged

__all__ = ["PHOTO"]

PHOTO = Packaged(
    "photo",
    "photographs by name: what a classifier of 1,000 things sees (packaged)",
    Path(__file__).parent / "checkpoints" / "names",
    "photo-stamps",
)
