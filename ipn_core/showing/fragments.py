"""Pieces of HTML: whatever they are given is text, and stays text."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from ipn_core.clock import STAGES
from ipn_core.errors import IPNError
from ipn_core.evaluation.overlay import blend, lay_over, maps_of, strongest
from ipn_core.images import shrunk

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray
    from PIL import Image

    from ipn_core.answer import Answer, Asked

__all__ = ["counted", "looks", "opened", "picture", "seconds_bar", "style", "text", "whereabouts"]

_PLACES = (
    ("at the upper left", "at the top", "at the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("at the lower left", "at the bottom", "at the lower right"),
)


@cache
def style() -> str:
    """Return the style sheet of all pieces; every class in it begins with `ipn-`."""
    return files("ipn_core.showing").joinpath("style.css").read_text(encoding="utf-8")


def text(words: str) -> str:
    """Return words as HTML; a change of the direction of writing ends with them."""
    return f"<bdi>{escape(words)}</bdi>"


def opened(asked: Asked) -> list[Image.Image]:
    """Open the pictures of a question again; none where one of them is gone or is none."""
    from ipn_core.images import load_image
    from ipn_core.tasks import Picture

    try:
        return [one.load() if isinstance(one, Picture) else load_image(one) for one in asked.images]
    except (IPNError, OSError):
        return []


def picture(image: Image.Image, said: str, side: int) -> str:
    """Return a picture within the page itself.

    Args:
        image: any picture.
        said: what it shows, for those who do not see it.
        side: pixels of its longer side, at most.
    """
    small = shrunk(image, side)
    out = io.BytesIO()
    small.save(out, "PNG")
    data = base64.b64encode(out.getvalue()).decode()
    return (
        f'<img class="ipn-picture" width="{small.width}" height="{small.height}" '
        f'alt="{escape(said)}" src="data:image/png;base64,{data}">'
    )


def looks(answer: Answer, images: Sequence[Image.Image], side: int = 360) -> list[list[str]]:
    """Return the pictures with the map of each look over them, a list a look.

    Args:
        answer: any.
        images: what it was asked about; those of `answer.asked`, opened.
        side: pixels of a picture's longer side, at most.

    Returns:
        An empty list where there is no map, or its patches are no places in these pictures.
    """
    boxes = answer.asked.boxes
    if answer.attentions is None or not images or len(boxes) != len(images):
        return []
    if len(answer.grids) != len(images):
        return []  # the last look saw fewer pictures, or crops
    maps = maps_of(answer, len(images))
    top = strongest(maps)
    small = [shrunk(image, side) for image in images]
    found = []
    for number, row in enumerate(maps, 1):
        figures = []
        for image, values, box in zip(small, row, boxes, strict=True):
            over = blend(lay_over(image, values, top, box), top)
            share, where = float(values.max()), whereabouts(values)
            said = f"look {number}: strongest {where}, {share:.0%} on one patch"
            figures.append(
                f'<figure class="ipn-look">{picture(over, said, side)}'
                f"<figcaption>{escape(said)}</figcaption></figure>"
            )
        found.append(figures)
    return found


def whereabouts(values: NDArray[float32]) -> str:
    """Say in words where a map (h, w) is strongest: "at the upper left", "in the middle"."""
    height, width = values.shape
    row, column = divmod(int(values.argmax()), width)
    # The middle of each patch decides, so that the one row of a flat map is in the middle.
    return _PLACES[3 * (2 * row + 1) // (2 * height)][3 * (2 * column + 1) // (2 * width)]


def seconds_bar(seconds: Mapping[str, float], longest: float | None = None) -> str:
    """Return the seconds of each stage as a bar of parts, and as a table of numbers.

    Args:
        seconds: of `Answer.seconds`.
        longest: the seconds that a whole bar stands for, so that bars side by side share a scale.
    """
    taken = {stage: float(seconds.get(stage, 0.0)) for stage in STAGES}
    whole = max(longest or 0.0, sum(taken.values())) or 1.0
    parts = "".join(
        f'<span class="ipn-part ipn-{stage}" style="width:{100 * value / whole:.2f}%"></span>'
        for stage, value in taken.items()
    )
    cells = "".join(
        f'<li><span class="ipn-key ipn-{stage}"></span>{stage} {_milliseconds(value)}</li>'
        for stage, value in taken.items()
    )
    total = f"<li>in all {_milliseconds(sum(taken.values()))}</li>"
    return (
        f'<div class="ipn-bar" aria-hidden="true">{parts}</div>'
        f'<ul class="ipn-legend" aria-label="time by stage">{cells}{total}</ul>'
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.1f} ms"


def counted(tokens: Mapping[str, Any]) -> str:
    """Return the positions that the LLM processed, by kind."""
    kinds = [f"{number} {escape(kind)}" for kind, number in tokens.items() if number]
    return f'<p class="ipn-small">positions: {", ".join(kinds)}</p>' if kinds else ""
