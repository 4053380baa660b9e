"""A grid of boxes over a picture, and which share of one grid's cells lies in another's."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["Edges", "boxes", "inside", "inside_boxes"]

Edges = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of a picture's sides."""


def boxes(side: int, overlapping: bool) -> list[Edges]:
    """Return side² boxes of equal size that cover a picture, row by row.

    Args:
        side: boxes a side.
        overlapping: whether neighbours share half of their width or height.
    """
    spans = _windows(side, overlapping)
    return [(left, top, right, bottom) for top, bottom in spans for left, right in spans]


@lru_cache(maxsize=256)
def inside(grid: tuple[int, int], box: Edges, other: tuple[int, int]) -> Tensor:
    """Return (h·w, h'·w'): which share of each patch of a crop lies in each of its picture's.

    Args:
        grid: (h, w) of the crop.
        box: what it shows of the picture.
        other: (h', w') of the picture.
    """
    left, top, right, bottom = box
    rows = _lengths(_tiles(grid[0], top, bottom), _tiles(other[0]))
    columns = _lengths(_tiles(grid[1], left, right), _tiles(other[1]))
    return torch.kron(rows, columns)


@lru_cache(maxsize=256)
def inside_boxes(grid: tuple[int, int], side: int, overlapping: bool) -> Tensor:
    """Return (h·w, side²): which share of each of a picture's patches lies in each of `boxes`."""
    spans = _windows(side, overlapping)
    return torch.kron(_lengths(_tiles(grid[0]), spans), _lengths(_tiles(grid[1]), spans))


def _tiles(count: int, start: float = 0.0, end: float = 1.0) -> list[tuple[float, float]]:
    edges = [start + (end - start) * i / count for i in range(count + 1)]
    return list(pairwise(edges))


def _windows(count: int, overlapping: bool) -> list[tuple[float, float]]:
    if not overlapping:
        return _tiles(count)
    return [(i / (count + 1), (i + 2) / (count + 1)) for i in range(count)]


def _lengths(parts: list[tuple[float, float]], others: list[tuple[float, float]]) -> Tensor:
    """Return (parts, others): which share of each part lies in each of the others."""
    of, on = torch.tensor(parts, dtype=torch.double), torch.tensor(others, dtype=torch.double)
    starts = torch.maximum(of[:, None, 0], on[None, :, 0])
    ends = torch.minimum(of[:, None, 1], on[None, :, 1])
    return ((ends - starts).clamp(min=0) / (of[:, 1] - of[:, 0])[:, None]).float()
