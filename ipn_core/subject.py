"""Pictures that many questions are asked about, each by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from ipn_core.answer import Answer
from ipn_core.clock import Clock
from ipn_core.generate import decode
from ipn_core.plan import Piece, Plan, RequestSlot
from ipn_core.prompt import Prompt
from ipn_core.stages import Percept

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.state import State

__all__ = ["Subject"]

_PROBES = ("Is it?", "Where was a dog?")
"""Two questions that begin differently, to see what does not depend on the question."""


class Subject:
    """Pictures, read once: a question costs only its own tokens, and knows of no other question.

    What prompts about them begin with alike lies in a cache that all questions go on from: the
    system message, and the static tokens where the connector does not read the question and the
    layout shows pictures first.
    """

    def __init__(self, model: IPN, images: Sequence[Any]) -> None:
        self.model = model
        self.images = list(images)
        self._percept: Percept | None = None
        self._reads_question = False
        self._state: State | None = None
        self._fed: list[int | Piece] = []

    @property
    def prefilled(self) -> int:
        """Tokens that every question goes on from."""
        return 0 if self._state is None else self._state.length

    @torch.no_grad()
    def ask(self, question: str, **options: Any) -> Answer:
        """Ask a question; what was asked before plays no part.

        Args:
            question: the user's words.
            options: transformers' generation options.

        Raises:
            UserError: the question, a picture or an option is wrong.
        """
        clock = Clock(self.model.backbone.device)
        plan = self._plan(question)
        percept = self._perceive(question)
        clock.lap("perceive")
        if self._state is None and not self._reads_question:
            self._read(percept)
            clock.lap("prefill")
        rest = None if self._state is None else plan.after(self._fed)
        if rest is None or self._state is None:
            # Nothing is kept, or the tokenizer joins the first word to what stands before it.
            answers, _, _ = decode(self.model, [plan], percept, options, clock)
            return answers[0]
        state = self._state.fork()
        try:
            answers, _, _ = decode(self.model, [rest], percept, options, clock, state=state)
        finally:
            state.end(self.prefilled)
        return answers[0]

    def _plan(self, question: str) -> Plan:
        order = self.model.config.layout.order
        return self.model.planner.plan(Prompt.ask(question, self.images, order=order))

    def _perceive(self, question: str) -> Percept:
        model = self.model
        if self._percept is None:
            self._percept = model.perceive([self.images], [question])
            if self._percept.tokens:
                both = self._percept.features.select([0, 0])
                found = model.perceive([], _PROBES, both).tokens or ()
                half = len(found) // 2
                # A connector gives one tensor for what is the same to it.
                pairs = zip(found[:half], found[half:], strict=True)
                self._reads_question = any(one is not other for one, other in pairs)
            return self._percept
        if self._reads_question:
            again = model.perceive([], [question], self._percept.features)
            return replace(again, boxes=self._percept.boxes)
        return self._percept

    def _read(self, percept: Percept) -> None:
        """Put what all prompts begin with into a cache, up to the first look."""
        one, other = (self._plan(probe).entries for probe in _PROBES)
        common = takewhile(
            lambda pair: pair[0] == pair[1] and not isinstance(pair[0], RequestSlot),
            zip(one, other, strict=False),
        )
        fed = [entry for entry, _ in common]
        if not fed or len(fed) == len(one):
            return
        beginning = self._plan(_PROBES[0]).until(len(fed))
        self._state = self.model.engine.read([beginning], percept)
        self._fed = fed
