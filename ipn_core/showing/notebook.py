"""An answer in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.showing.fragments import (
    counted,
    looks,
    opened,
    picture,
    seconds_bar,
    style,
    text,
)

if TYPE_CHECKING:
    from ipn_core.answer import Answer

__all__ = ["summary"]

SIDE = 240
"""Pixels of a picture's longer side."""


def summary(answer: Answer) -> str:
    """Return the pictures with the map of each look, the answer, and the seconds.

    Args:
        answer: any; pictures that are gone by now are left out.
    """
    images = opened(answer.asked)
    shown = [figure for look in looks(answer, images, SIDE) for figure in look]
    shown = shown or [picture(image, "the picture", SIDE) for image in images]
    asked = f'<p class="ipn-question">{text(answer.asked.question)}</p>'
    return (
        f'<div class="ipn-summary"><style>{style()}</style>'
        f'<div class="ipn-looks">{"".join(shown)}</div>'
        f"{asked if answer.asked.question else ''}"
        f'<p class="ipn-answer">{text(answer.text)}</p>'
        f"{seconds_bar(answer.seconds) if answer.seconds else ''}{counted(answer.tokens)}</div>"
    )
