"""Windows on a picture: what the classifier says of parts of it, from the logits of its patches."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from ipn_names.wordings import CELLS

__all__ = ["WINDOWS", "Window", "centres", "inside", "pooling", "tiles"]

Window: TypeAlias = tuple[float, float, float, float]
"""(top, left, bottom, right) as fractions of a picture's sides."""

_SIZES = ((0.5, 1.0), (1.0, 0.5), (0.5, 0.5), (1 / 3, 1.0), (1.0, 1 / 3), (1 / 3, 1 / 3))
"""Heights and widths; windows overlap by half."""
_EPS = 1e-6


def _steps(size: float) -> list[float]:
    count = round(2 / size) - 1 if size < 1 else 1
    return [(1 - size) * i / max(count - 1, 1) for i in range(count)]


WINDOWS: tuple[Window, ...] = tuple(
    (top, left, top + height, left + width)
    for height, width in _SIZES
    for top in _steps(height)
    for left in _steps(width)
)
"""The windows that a look compares."""


def tiles(side: int) -> tuple[Window, ...]:
    """Return the windows that part a picture into `side` rows of as many, row by row; 0: none."""
    edges = [i / max(side, 1) for i in range(side + 1)]
    return tuple(
        (top, left, bottom, right)
        for top, bottom in pairwise(edges)
        for left, right in pairwise(edges)
    )


def centres() -> Tensor:
    """Return the centre (y, x) of each window, (W, 2)."""
    return torch.tensor([((t + b) / 2, (le + r) / 2) for t, le, b, r in WINDOWS])


@lru_cache(maxsize=256)
def pooling(grid: tuple[int, int], windows: tuple[Window, ...] = WINDOWS) -> Tensor:
    """Return the weights (W, h·w) that make the mean over each window's patches.

    A window that no patch's centre lies in takes the nearest one.
    """
    h, w = grid
    y = ((torch.arange(h) + 0.5) / h).repeat_interleave(w)
    x = ((torch.arange(w) + 0.5) / w).repeat(h)
    rows = []
    for top, left, bottom, right in windows:
        within = (y > top - _EPS) & (y < bottom + _EPS) & (x > left - _EPS) & (x < right + _EPS)
        if not within.any():
            away = (y - (top + bottom) / 2) ** 2 + (x - (left + right) / 2) ** 2
            within = torch.zeros_like(within)
            within[away.argmin()] = True
        rows.append(within.float() / within.sum())
    return torch.stack(rows)


def inside() -> Tensor:
    """Return for each of the nine cells (9, W) which windows show it and nothing beside it.

    A side is shown by the half or the third along it, a corner by its quarter or its ninth, the
    middle by the windows around the centre.
    """
    found = torch.zeros(len(CELLS), len(WINDOWS), dtype=torch.bool)
    for index, (top, left, bottom, right) in enumerate(WINDOWS):
        rows = _third(top, bottom)
        columns = _third(left, right)
        if rows is not None and columns is not None:
            found[3 * rows + columns, index] = True
    return found


def _third(low: float, high: float) -> int | None:
    """Return 0, 1 or 2: at the low end, in the middle or the whole length, at the high end."""
    if high - low > 1 - _EPS or abs(low + high - 1) < _EPS:
        return 1
    if low < _EPS:
        return 0
    return 2 if high > 1 - _EPS else None
