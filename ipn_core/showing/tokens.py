"""What the LLM read for one answer: tokens and slots, segment by segment, and the answer's ids."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from ipn_core.plan import DynamicSlot, ImageSlot, Piece, RequestSlot, Tokens, look_slots
from ipn_core.prompt import Prompt

if TYPE_CHECKING:
    from ipn_core.answer import Answer
    from ipn_core.model import IPN

__all__ = ["Read", "segments_of"]

Kind = Literal["text", "special", "answer", "static", "request", "dynamic"]


@dataclass(frozen=True, slots=True)
class Read:
    """A token, or a slot of several positions.

    Attributes:
        kind: "special" tokens are the template's, "answer" ones the model's own.
        text: the token's, or how the slot is written.
        positions: how many the LLM processes; those that a look puts into its cache too. None of
            the last token of an answer, which no forward reads.
    """

    kind: Kind
    text: str
    positions: int = 1


def segments_of(model: IPN, answer: Answer) -> list[list[Read]]:
    """Return what was read, a list a segment: each but the last ends with a look's request.

    Args:
        model: gave the answer.
        answer: to a single question, not within a dialogue.
    """
    asked = answer.asked
    order = model.config.layout.order
    plan = model.planner.plan(Prompt.ask(asked.question, asked.images, order=order))
    found: list[list[Read]] = [[]]
    for piece in (*plan.pieces, *_said(answer)):
        found[-1] += _reads(model, answer, piece)
        if isinstance(piece, RequestSlot):
            found.append([])
    if answer.ids:
        found[-1][-1] = replace(found[-1][-1], positions=0)
    return found


def _said(answer: Answer) -> Iterator[Piece]:
    """The ids of an answer and the looks within it."""
    done = 0
    for number, place in enumerate(answer.looked):
        yield Tokens(answer.ids[done:place], learn=True)
        yield from look_slots(number, 1)
        done = place
    yield Tokens(answer.ids[done:], learn=True)


def _reads(model: IPN, answer: Answer, piece: Piece) -> list[Read]:
    layout, injector = model.config.layout, model.injector
    if isinstance(piece, Tokens):
        tokenizer = model.backbone.tokenizer
        special = set(tokenizer.all_special_ids)
        kinds: dict[bool, Kind] = {True: "special", False: "answer" if piece.learn else "text"}
        return [Read(kinds[id_ in special], str(tokenizer.decode([id_]))) for id_ in piece.ids]
    if isinstance(piece, ImageSlot):
        pictures = len(answer.asked.images)
        static = answer.tokens.get("static", 0) // pictures
        return [Read("static", "<img>", static)]
    if isinstance(piece, RequestSlot):
        return [Read("request", "<img-q>", layout.request)]
    assert isinstance(piece, DynamicSlot)
    filled = injector.fills + injector.caches if injector is not None else 0
    return [Read("dynamic", "<img-d>", filled)]
