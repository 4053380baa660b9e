"""One answer as one page: what was read, where each look went, and how long each stage took."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
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
from ipn_core.showing.tokens import Read, segments_of

if TYPE_CHECKING:
    from ipn_core.answer import Answer
    from ipn_core.model import IPN

__all__ = ["trace_page"]

SIDE = 420
"""Pixels of a picture's longer side."""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Nothing is fetched and no script runs, whatever stands in the page."""


def trace_page(model: IPN, answer: Answer) -> str:
    """Return a page of HTML that needs no other file.

    Args:
        model: gave the answer.
        answer: to a single question about one picture or several of one size.
    """
    images = opened(answer.asked)
    whole = "".join(
        picture(image, f"picture {number}", SIDE) for number, image in enumerate(images, 1)
    )
    maps = looks(answer, images, SIDE)
    parts = [
        "<header><h1>IPN</h1>",
        f'<p class="ipn-small">{text(model.name)}, {text(model.strategy)}</p></header>',
        f'<main><section><p class="ipn-question">{text(answer.asked.question)}</p>',
        f'<p class="ipn-answer">{text(answer.text)}</p>',
        f'<div class="ipn-looks">{whole}</div></section>',
        f"<section><h2>Seconds by stage</h2>{seconds_bar(answer.seconds)}</section>",
        f"<section><h2>What was read</h2>{counted(answer.tokens)}",
        *_segments(segments_of(model, answer), maps),
        "</section>",
        "" if maps else f"<p>{escape(_no_map(answer))}</p>",
        "</main>",
    ]
    title = escape(f"{answer.asked.question} – {answer.text}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style()}</style></head>"
        f'<body class="ipn-page">{"".join(parts)}</body></html>\n'
    )


def _segments(segments: Sequence[Sequence[Read]], maps: Sequence[Sequence[str]]) -> list[str]:
    """Each segment, and after it the look that it asked for."""
    found = []
    for number, segment in enumerate(segments):
        positions = sum(read.positions for read in segment)
        found.append(
            f"<h3>segment {number}: {positions} positions</h3>"
            f'<p class="ipn-tokens" dir="ltr">{"".join(map(_token, segment))}</p>'
        )
        if number < len(maps):
            found.append(f'<div class="ipn-looks">{"".join(maps[number])}</div>')
    return found


def _token(read: Read) -> str:
    shown = read.text.replace("\n", "↵")
    if read.kind in ("static", "request", "dynamic"):
        shown = f"{shown} ×{read.positions}"
        return f'<b class="ipn-slot ipn-{read.kind}-slot">{text(shown)}</b>'
    last = "" if read.positions else ' ipn-unread-token" title="the last one: nothing reads it'
    return f'<span class="ipn-token ipn-{read.kind}-token{last}">{text(shown)}</span>'


def _no_map(answer: Answer) -> str:
    if answer.attentions is None:
        return "This interaction keeps no map of where it looked."
    return "Where it looked cannot be drawn: its patches are no places in these pictures."
