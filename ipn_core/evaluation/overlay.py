"""A map of attention laid over the picture that it is of: what heatmaps and web pages draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ipn_core.errors import ShapeError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from ipn_core.answer import Answer

__all__ = [
    "COLOURS",
    "WHOLE",
    "Edges",
    "Layers",
    "blend",
    "lay_over",
    "maps_of",
    "strongest",
    "upsample",
]

Edges = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of a picture's sides."""
WHOLE: Edges = (0.0, 0.0, 1.0, 1.0)
COLOURS = "plasma"
FADE = 0.55
"""How much of the picture's colour and contrast is taken away under the map."""


@dataclass(frozen=True, eq=False)
class Layers:
    """A picture and the map over it.

    Attributes:
        picture: (h, w, 3) from 0 to 1, faded where nobody looked.
        values: (h, w) the map, from 0 to the top that was given.
        alpha: (h, w) how much of the map's colour covers the picture.
    """

    picture: NDArray[np.float32]
    values: NDArray[np.float32]
    alpha: NDArray[np.float32]


def maps_of(answer: Answer, pictures: int) -> list[list[NDArray[np.float32]]]:
    """Return the mean map (h, w) over the dynamic tokens, of each look and picture.

    Args:
        answer: with `attentions`.
        pictures: how many it was asked about.

    Raises:
        ShapeError: the map does not cover so many pictures.
    """
    assert answer.attentions is not None
    weights = answer.attentions.mean(dim=1).float().numpy()
    sizes = [h * w for h, w in answer.grids]
    if len(sizes) != pictures or sum(sizes) != weights.shape[1]:
        raise ShapeError(
            f"the attention map covers {weights.shape[1]} patches of grids {answer.grids}; "
            f"{pictures} picture(s) were given."
        )
    ends = np.cumsum(sizes)[:-1]
    return [
        [part.reshape(grid) for part, grid in zip(np.split(row, ends), answer.grids, strict=True)]
        for row in np.nan_to_num(weights)
    ]


def strongest(maps: Iterable[Sequence[NDArray[np.float32]]]) -> float:
    """Return the largest value of all maps, which they share as the top of their colours."""
    return max((float(one.max()) for row in maps for one in row), default=0.0) or 1.0


def upsample(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Scale a map (h, w) to a picture's (width, height), linearly between the patches' centres.

    Smoother kernels ring: they would show attention where there is none.
    """
    from PIL import Image

    small = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(small.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)


def lay_over(
    image: Image.Image, values: NDArray[np.float32], top: float, box: Edges = WHOLE
) -> Layers:
    """Fade a picture where nobody looked, and lay the map over the part that it is of.

    Args:
        image: any picture.
        values: a map (h, w).
        top: the value that is as strong as any.
        box: the part of the picture that the map covers.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    large = _placed(values, image.size, box)
    seen = np.clip(large / top, 0, 1)
    grey = pixels.mean(axis=2, keepdims=True)
    faded = pixels * (1 - FADE) + (0.35 * grey + 0.65) * FADE
    under = pixels * seen[:, :, None] + faded * (1 - seen[:, :, None])
    # Strong enough to be seen, never so strong that it hides what lies below.
    return Layers(under, np.clip(large, 0, top), 0.65 * seen**0.75)


def blend(layers: Layers, top: float) -> Image.Image:
    """Return both layers as one picture.

    Args:
        layers: what `lay_over` returned.
        top: the same as there.
    """
    from matplotlib import colormaps
    from PIL import Image

    colours = colormaps[COLOURS](layers.values / top)[:, :, :3]
    alpha = layers.alpha[:, :, None]
    mixed = layers.picture * (1 - alpha) + colours * alpha
    return Image.fromarray((np.clip(mixed, 0, 1) * 255).round().astype(np.uint8))


def _placed(values: NDArray[np.float32], size: tuple[int, int], box: Edges) -> Any:
    """Scale a map (h, w) to its part of a picture (width, height), zeros around it."""
    width, height = size
    left, top, right, bottom = (round(e * s) for e, s in zip(box, (*size, *size), strict=True))
    part = upsample(values, (max(1, right - left), max(1, bottom - top)))
    laid = np.zeros((height, width), dtype=np.float32)
    inside = part[max(0, -top) : height - top, max(0, -left) : width - left]
    y, x = max(0, top), max(0, left)
    laid[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return laid
