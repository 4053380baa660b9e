"""A picture of where a question looked, for people."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ipn_core.errors import UserError
from ipn_core.evaluation.overlay import COLOURS, WHOLE, Edges, lay_over, maps_of, strongest
from ipn_core.files import atomic_write
from ipn_core.images import shrunk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy import float32
    from numpy.typing import NDArray
    from PIL import Image

    from ipn_core.answer import Answer
    from ipn_core.model import IPN

__all__ = ["draw_heatmap", "drawn_heatmap", "require_map"]

LINE = 12
"""A picture so many times as long as wide would be a line in its panel; it fills it instead."""
PANEL_IN = 4.6
"""Longer side of a panel, in inches at 120 dots an inch."""


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
    """Draw what `drawn_heatmap` draws, to a file.

    Args:
        answer: see there, as for what is not described here.
        images: likewise.
        question: likewise.
        path: a PNG file in a folder that exists; written whole or not at all.
        boxes: likewise.
        model: likewise.
        interact: likewise.

    Raises:
        UserError: the answer holds no attention map.
        ShapeError: the map does not cover these pictures.
        IPNError: the file cannot be written; what was there is unchanged.
    """
    drawn = drawn_heatmap(answer, images, question, boxes=boxes, model=model, interact=interact)
    atomic_write(path, drawn)


def drawn_heatmap(
    answer: Answer,
    images: Sequence[Image.Image],
    question: str,
    *,
    boxes: Sequence[Edges] | None = None,
    model: str = "",
    interact: str = "",
) -> Callable[[Path], None]:
    """Draw the pictures with the request's attention over them; one row a look.

    Args:
        answer: with `attentions` (rounds, K, P); the mean over the K dynamic tokens is drawn.
        images: the pictures that the question was asked about, in order, RGB.
        question: for the title, with the answer.
        boxes: for each picture, which part of it the patches show (`VisionEncoder.shows`); all of
            it by default.
        model: named if there is no map.
        interact: likewise.

    Returns:
        What writes it to a PNG file.

    Raises:
        UserError: the answer holds no attention map.
        ShapeError: the map does not cover these pictures.
    """
    if answer.attentions is None:
        raise UserError(
            f"model '{model}': its interaction '{interact}' keeps no attention map, so there is "
            "no heatmap to draw. Choose an interaction that keeps one."
        )
    figure = _figure(maps_of(answer, len(images)), images, question, answer.text, boxes)

    def save(to: Path) -> None:
        with warnings.catch_warnings():
            # A script that the font lacks is drawn as boxes; that is no news for stderr.
            warnings.simplefilter("ignore", UserWarning)
            figure.savefig(to, format="png", facecolor="white")

    return save


def _figure(
    maps: Sequence[Sequence[NDArray[float32]]],
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
    top = strongest(maps)
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


def _panel(axes: Axes, image: Image.Image, values: NDArray[float32], top: float, box: Edges) -> Any:
    """Draw one picture, faded where nobody looked, and the map over the part that it is of."""
    line = max(image.size) > LINE * min(image.size)
    aspect: Literal["equal", "auto"] = "auto" if line else "equal"
    # A panel has some 550 dots; more pixels only cost time.
    layers = lay_over(shrunk(image, 1024), values, top, box)
    axes.imshow(layers.picture, aspect=aspect)
    drawn = axes.imshow(
        layers.values, cmap=COLOURS, vmin=0, vmax=top, alpha=layers.alpha, aspect=aspect
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
