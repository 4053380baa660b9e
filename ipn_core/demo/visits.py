"""What the page does: it shows a picture to strategies, asks them, and tells how that went."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from ipn_core.demo.pictures import read_picture
from ipn_core.demo.sessions import Session, Sessions
from ipn_core.demo.streams import stream
from ipn_core.errors import IPNError, PromptError, first_line
from ipn_core.showing.fragments import counted, looks, seconds_bar, text

if TYPE_CHECKING:
    from ipn_core.answer import Answer
    from ipn_core.demo.strategies import Strategies

__all__ = ["LONGEST", "Visits"]

LONGEST = 2000
"""Characters of a question at most."""
SIDE = 420
"""Pixels of a picture's longer side."""
EARLIER = 10
"""Exchanges that are shown."""


@dataclass
class _Side:
    """What one strategy has said to a question so far."""

    strategy: str
    said: str = ""
    answer: Answer | None = None
    failed: str = ""
    maps: list[str] = field(default_factory=list)


class Visits:
    """Visitors ask; each is told apart by the name of its session."""

    def __init__(self, strategies: Strategies, sessions: Sessions | None = None) -> None:
        self.strategies = strategies
        self.sessions = sessions or Sessions()

    def ask(
        self,
        visitor: str,
        path: str | None,
        question: str,
        first: str,
        second: str | None = None,
        goes_on: bool = False,
    ) -> Iterator[tuple[str, str]]:
        """Yield what stands on both sides of the page, while the answers come in.

        Args:
            visitor: whose session it is.
            path: of the picture.
            question: in the visitor's words.
            first: the strategy on the left.
            second: the one on the right, None for none.
            goes_on: whether earlier questions are remembered.
        """
        chosen = [first, *([second] if second and second != first else [])]
        sides = [_Side(name) for name in chosen]
        session = self.sessions.of(visitor)
        try:
            _check(question)
            session.show(read_picture(path))
        except IPNError as error:
            sides[0].failed = str(error)
            yield _shown(sides[:1], session)
            return
        yield _shown(sides, session)
        for side in sides:
            for _ in self._answer(session, side, question, goes_on):
                yield _shown(sides, session)
        yield _shown(sides, session)
        said = {side.strategy: side.answer.text for side in sides if side.answer is not None}
        if said:
            session.exchanges.append((question, said))

    def forget(self, visitor: str) -> tuple[str, str]:
        """Start anew with the same picture; returns both sides, empty."""
        self.sessions.of(visitor).forget()
        return "", ""

    def _answer(
        self, session: Session, side: _Side, question: str, goes_on: bool
    ) -> Iterator[None]:
        try:
            model = self.strategies.get(side.strategy)
            asker = session.about(model, goes_on=goes_on)
            for piece in stream(asker, question, self.strategies.lock):
                if isinstance(piece, str):
                    side.said = piece
                else:
                    side.answer = piece
                    assert session.picture is not None
                    maps = looks(piece, [session.picture], SIDE)
                    side.maps = [figure for look in maps for figure in look]
                yield
        except IPNError as error:
            side.failed = str(error)
        except Exception as error:  # one visitor's failure is not the page's
            side.failed = f"answering failed: {type(error).__name__}: {first_line(error)}"


def _check(question: str) -> None:
    """Refuse what is no question, before a model reads it."""
    if not question.strip():
        raise PromptError('the question is empty. Ask something, such as "Is there a dog?".')
    if len(question) > LONGEST:
        raise PromptError(
            f"the question has {len(question):,} characters; at most {LONGEST:,} are read. "
            "Shorten it."
        )


def _shown(sides: list[_Side], session: Session) -> tuple[str, str]:
    longest = max(
        (side.answer.seconds["total"] for side in sides if side.answer is not None), default=0.0
    )
    left, *right = (_side(side, session, longest) for side in sides)
    return left, right[0] if right else ""


def _side(side: _Side, session: Session, longest: float) -> str:
    name = text(side.strategy)
    if side.failed:
        body = f'<p class="ipn-failed" role="alert">{text(side.failed)}</p>'
    elif side.answer is None:
        waiting = text(side.said) if side.said else "…"
        body = f'<p class="ipn-answer" data-state="waiting">{waiting}</p>'
    else:
        answer = side.answer
        maps = "".join(side.maps) or f'<p class="ipn-small">{_WITHOUT}</p>'
        body = (
            f'<p class="ipn-answer" data-state="done" role="status">{text(answer.text)}</p>'
            f'<div class="ipn-looks">{maps}</div>'
            f"{seconds_bar(answer.seconds, longest)}{counted(answer.tokens)}"
        )
    return (
        f'<section class="ipn-side" data-strategy="{escape(side.strategy)}"><h2>{name}</h2>{body}'
        f"{_earlier(side.strategy, session)}</section>"
    )


_WITHOUT = "This strategy keeps no map of where it looked."


def _earlier(strategy: str, session: Session) -> str:
    """The exchanges before this one, the last one first."""
    before = [
        f"<li>{text(question)} <b>{text(said[strategy])}</b></li>"
        for question, said in reversed(session.exchanges[-EARLIER:])
        if strategy in said
    ]
    if not before:
        return ""
    return f'<h3>Before</h3><ul class="ipn-earlier">{"".join(before)}</ul>'
