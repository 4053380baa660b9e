"""How often progress is told where nobody watches a bar: the same in every command and training."""

from __future__ import annotations

__all__ = ["NOTE_EVERY_S"]

NOTE_EVERY_S = 10.0
"""Seconds between two lines of progress where stderr is no terminal."""
