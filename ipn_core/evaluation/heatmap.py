"""A picture of where a question looked, for people."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ipn_core.errors import ShapeError, UserError
from ipn_core.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL import Image

    from ipn_core.answer import Answer
    from ipn_core.model import IPN

__all__ = ["draw_heatmap", "require_map", "upsample"]

Edges = tuple[float, float, float, float]
"""(left, top, right, bottom) as fractions of a picture's sides."""
WHOLE: Edges = (0.0, 0.0, 1.0, 1.0)
LINE = 12
"""A picture so many times as long as wide would be a line in its panel; it fills it instead."""
PANEL_IN = 4.6
"""Longer side of a panel, in inches at 120 dots an inch."""
FADE = 0.55
"""How much of the picture's colour and contrast is taken away under the map."""


def require_map(model: IPN) -> None:
    """Raise `UserError` unless the model's interaction can say where it looked."""
    if model.interaction is None or not model.interaction.has_map:
        raise UserError(
            f"model '{model.name}': its interaction '{model.strategy}' keeps no attention map, so "
            "there is no heatmap to draw. Leave --heatmap out, or choose an interaction that "
            "keeps one with --interact."
        )
    if not (model.encoder.placed and model.perceiver.placed):
        raise UserError(
            f"model '{model.name}': what it looks at are no places in the picture but features "
            "made of all of it, so there is no heatmap to draw. Leave --heatmap out, or choose "
            "another perceive or encoder."
        )


def draw_heatmap(
    answer: Answer,
    images: Sequence[Image.Image],
    question: str,
    path: str | Path,
    *,
    boxes: Sequence[Edges] | None = None,
    model: str = "",
    interact: str = "",
) -> None:
    """Draw the pictures with the request's attention over them; one row a look.

    Args:
        answer: with `attentions` (rounds, K, P); the mean over the K dynamic tokens is drawn.
        images: the pictures that the question was asked about, in order, RGB.
        question: for the title, with the answer.
        path: a PNG file in a folder that exists; written whole or not at all.
        boxes: for each picture, which part of it the patches show (`VisionEncoder.shows`); all of
            it by default.
        model: named if there is no map.
        interact: likewise.

    Raises:
        UserError: the answer holds no attention map.
        ShapeError: the map does not cover these pictures.
        IPNError: the file cannot be written; what was there is unchanged.
    """
    if answer.attentions is None:
        raise UserError(
            f"model '{model}': its interaction '{interact}' keeps no attention map, so there is "
            "no heatmap to draw. Choose an interaction that keeps one."
        )
    figure = _figure(_maps(answer, len(images)), images, question, answer.text, boxes)

    def save(to: Path) -> None:
        with warnings.catch_warnings():
            # A script that the font lacks is drawn as boxes; that is no news for stderr.
            warnings.simplefilter("ignore", UserWarning)
            figure.savefig(to, format="png", facecolor="white")

    atomic_write(path, save)


def upsample(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Scale a map (h, w) to a picture's (width, height), linearly between the patches' centres.

    Smoother kernels ring: they would show attention where there is none.
    """
    from PIL import Image

    small = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    return np.asarray(small.resize(size, Image.Resampling.BILINEAR), dtype=np.float32)


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


def _maps(answer: Answer, pictures: int) -> list[list[NDArray[np.float32]]]:
    """Return the mean map (h, w) of each look and picture."""
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


def _figure(
    maps: Sequence[Sequence[NDArray[np.float32]]],
    images: Sequence[Image.Image],
    question: str,
    answer: str,
    boxes: Sequence[Edges] | None = None,
) -> Figure:
    # Figure and canvas by hand: pyplot would choose a window system and keep global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = len(maps), len(images)
    width, height = PANEL_IN * columns + 1.1, PANEL_IN * rows + 0.9
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    top = max(max(float(m.max()) for m in row) for row in maps) or 1.0
    shown: Any = None
    for round_, row in enumerate(maps):
        shares = boxes or [WHOLE] * columns
        for index, (values, image, box) in enumerate(zip(row, images, shares, strict=True)):
            shown = _panel(axes[round_][index], image, values, top, box)
            axes[round_][index].set_title(
                _label(round_, rows, index, columns), fontsize=10, color="#444444"
            )
    bar = figure.colorbar(shown, ax=list(axes.flat), shrink=0.85, pad=0.02)
    bar.set_label("share of the attention on one patch")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}" if top >= 0.1 else
                                     f"{value:.1%}")  # fmt: skip
    figure.suptitle(_title(question, answer, int(width * 9)), fontsize=13, parse_math=False)
    return figure


def _panel(
    axes: Axes, image: Image.Image, values: NDArray[np.float32], top: float, box: Edges
) -> Any:
    """Draw one picture, faded where nobody looked, and the map over the part that it is of."""
    longest = max(image.size)
    aspect: Literal["equal", "auto"] = "auto" if longest > LINE * min(image.size) else "equal"
    if longest > 1024:
        # A panel has some 550 dots; more pixels only cost time.
        scale = 1024 / longest
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height))
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    large = _placed(values, image.size, box)
    seen = np.clip(large / top, 0, 1)[:, :, None]
    grey = pixels.mean(axis=2, keepdims=True)
    faded = pixels * (1 - FADE) + (0.35 * grey + 0.65) * FADE
    axes.imshow(pixels * seen + faded * (1 - seen), aspect=aspect)
    # Strong enough to be seen, never so strong that it hides what lies below.
    drawn = axes.imshow(
        np.clip(large, 0, top),
        cmap="plasma",
        vmin=0,
        vmax=top,
        alpha=0.65 * seen[:, :, 0] ** 0.75,
        aspect=aspect,
    )
    axes.set_axis_off()
    # The bar shows the colours without the map's transparency.
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(norm=drawn.norm, cmap=drawn.cmap)


def _label(round_: int, rows: int, index: int, columns: int) -> str:
    parts = [f"picture {index + 1}"] if columns > 1 else []
    parts += [f"look {round_ + 1}"] if rows > 1 else []
    return ", ".join(parts)


def _title(question: str, answer: str, width: int) -> str:
    lines = [*_wrapped(question, width, 3), *_wrapped(f"→ {answer}", width, 2)]
    return "\n".join(lines)


def _wrapped(text: str, width: int, most: int) -> list[str]:
    lines = textwrap.wrap(" ".join(text.split()), width) or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], lines[most - 1][: width - 1] + "…"]
