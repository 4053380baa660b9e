"""A dialogue over one key-value cache: a further question costs only its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ipn_core.answer import Answer
from ipn_core.clock import Clock
from ipn_core.features import VisualFeatures
from ipn_core.plan import Plan
from ipn_core.prompt import Content, Prompt, Shown, Text, Turn
from ipn_core.stages import Percept

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.plan import Piece
    from ipn_core.state import State

__all__ = ["Dialogue"]


class Dialogue:
    """Several turns about the same pictures; each picture is encoded once.

    The generated ids are kept: the next turn first feeds the last one, which no forward has seen,
    then what the chat template puts after an answer. After beams, the cache ends with the prompt.
    """

    def __init__(self, model: IPN, images: Sequence[Any] = ()) -> None:
        self.model = model
        self.prompt = Prompt(())
        self._waiting = list(images)
        self._percepts: list[Percept] = []
        self._state: State | None = None
        self._fed: list[int | Piece] = []

    @property
    def prefilled(self) -> int:
        """Tokens in the cache."""
        return 0 if self._state is None else self._state.length

    @torch.no_grad()
    def ask(self, question: str, images: Sequence[Any] = (), **options: Any) -> Answer:
        """Ask the next question.

        Args:
            question: the user's words.
            images: further pictures, shown with this question.
            options: transformers' generation options.

        Raises:
            UserError: the question, a picture or an option is wrong; the dialogue is unchanged.
        """
        from ipn_core.generate import decode

        model = self.model
        clock = Clock(model.backbone.device)
        shown = [Shown(image) for image in (*self._waiting, *images)]
        order = model.config.layout.order
        text = [Text(question)]
        pictures_first = order.index("images") < order.index("text")
        content: list[Content] = [*shown, *text] if pictures_first else [*text, *shown]
        asked = Prompt.ask(question)  # refuses an empty question before anything is done
        prompt = Prompt((*self.prompt.turns, Turn(asked.turns[0].role, tuple(content))))
        plan = model.planner.plan(prompt)
        percepts = [*self._percepts, *self._perceive(shown, question)]
        percept = _joined(percepts, model)
        clock.lap("perceive")
        rest = plan.after(self._fed) if self._state is not None else None
        if rest is None or self._state is None:
            # The template writes an earlier turn differently now that another follows.
            state, fed, rest = None, [], plan
        else:
            state, fed = self._state.fork(), list(self._fed)
        try:
            answers, after, holds_answer = decode(
                model, [rest], percept, options, clock, state=state
            )
        except BaseException:
            if state is not None and self._state is not None:
                state.end(self._state.length)
            raise
        answer = answers[0]
        said: list[int | Piece] = []
        if holds_answer:
            turn = prompt.then_assistant(answer.ids[:-1], looked=answer.looked).turns[-1]
            said = Plan(model.planner.said(turn, len(prompt.images))).entries
        self._fed = [*fed, *rest.entries, *said]
        self._state = after
        # Joined, so that the next turn finds what was kept with the features.
        self._percepts, self._waiting = [percept] if percepts else [], []
        closed = (
            answer.ids[:-1]
            if answer.ids[-1:] and answer.ids[-1] in (model.backbone.eos_ids)
            else answer.ids
        )
        self.prompt = prompt.then_assistant(closed, looked=answer.looked)
        return answer

    def _perceive(self, shown: Sequence[Shown], question: str) -> list[Percept]:
        if not shown:
            return []
        return [self.model.perceive([[s.image for s in shown]], [question])]


def _joined(percepts: Sequence[Percept], model: IPN) -> Percept:
    """One sample with the pictures of all turns."""
    if len(percepts) == 1:
        return percepts[0]
    if not percepts:
        return model.perceive([[]], [""])
    features = VisualFeatures.pack(
        [p.features.values for p in percepts],
        [span.grid for p in percepts for span in p.features.images],
        [0 for p in percepts for _ in p.features.images],
        1,
        None
        if any(p.features.global_tokens is None for p in percepts)
        else torch.cat(
            [p.features.global_tokens for p in percepts if p.features.global_tokens is not None]
        ),
        _looker(percepts),
    )
    tokens = [t for p in percepts if p.tokens is not None for t in p.tokens]
    return Percept(features, tokens or None, tuple(box for p in percepts for box in p.boxes))


def _looker(percepts: Sequence[Percept]) -> Any:
    """Send each box to the turn that brought its picture; None if one of them cannot look."""
    if any(p.features.looker is None for p in percepts):
        return None
    owner = [(p, i) for p in percepts for i in range(len(p.features.images))]

    def look(boxes: Sequence[Any]) -> VisualFeatures:
        seen = []
        for image, *edges in boxes:
            percept, inner = owner[image]
            seen.append(percept.features.look([(inner, *edges)]))
        return VisualFeatures.pack(
            [s.values for s in seen], [s.images[0].grid for s in seen], [0] * len(seen), 1
        )

    return look
