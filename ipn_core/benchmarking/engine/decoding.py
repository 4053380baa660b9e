"""Decoding after a look against plain `generate`, and a ragged batch against its rows alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ipn_core.benchmarking.engine.first_token import Case, setup_first_token
from ipn_core.benchmarking.engine.subjects import asking_model, features_of
from ipn_core.benchmarking.engine.table import Found, against, took
from ipn_core.benchmarking.engine.timing import collected, in_turn
from ipn_core.clock import Clock
from ipn_core.features import VisualFeatures
from ipn_core.generate import decode
from ipn_core.model import IPN
from ipn_core.prompt import Prompt

if TYPE_CHECKING:
    from ipn_core.benchmarking.engine.table import Session

__all__ = ["measure", "measure_ragged"]

NEW = 32
"""Tokens of an answer, so many whatever it says."""
GOAL = 0.98
"""Of the tokens a second of plain `generate`."""
RAGGED_NEW = 16
RAGGED_GOAL = 2.5
"""How many times the throughput of single runs a batch of 8 must have."""
WORDS = (2, 5, 9, 14, 20, 27, 35, 44)
"""Words of the questions of a ragged batch, more than a template brings."""


def measure(session: Session) -> Found:
    """Measure tokens a second from the second token on."""
    case = setup_first_token(session.backbone, 128)
    count = session.repeats(10, 4)
    ids: dict[str, list[int]] = {}
    seconds: dict[str, list[float]] = {"after a look": [], "plain generate": []}

    def looked() -> float:
        ids["after a look"], taken = _answer(case)
        return taken

    def plain() -> float:
        ids["plain generate"], taken = _generate(case)
        return taken

    for _, results in in_turn({"after a look": looked, "plain generate": plain}, count, warm_up=1):
        for name, taken in results.items():
            seconds[name].append(taken / (NEW - 1))
        if len(set(map(tuple, ids.values()))) > 1:
            raise AssertionError(f"the answers differ: {ids}")
    row = "decoding"
    # Of seconds a token, so that the ratio of tokens a second is the other way round.
    rate = against(row, seconds, "plain generate", "after a look", GOAL, "higher")
    return Found(
        row,
        f"seconds a token from the second on, {NEW} tokens after {case.prefix + case.rest}",
        [*took(row, seconds), rate],
        notes=[
            "plain generate is given the same inputs, the message of the look among them",
            "the ratio is that of tokens a second",
        ],
    )


@torch.no_grad()
def _answer(case: Case) -> tuple[list[int], float]:
    """Answer; returns the ids, and the seconds from the first token on."""
    clock = Clock(case.model.backbone.device)
    plans = [case.model.planner.plan(case.prompt)]
    answers, _, _ = decode(case.model, plans, case.percept, _exactly(NEW), clock)
    return list(answers[0].ids), clock.seconds["decode"]


@torch.no_grad()
def _generate(case: Case) -> tuple[list[int], float]:
    """Run transformers' `generate` over the same inputs, and count as `_answer` does."""
    lm: Any = case.model.backbone.lm
    clock = Clock(case.model.backbone.device)
    with clock.decoding(lm):
        made = lm.generate(
            inputs_embeds=case.filled,
            attention_mask=torch.ones(case.filled.shape[:2], dtype=torch.long).to(lm.device),
            pad_token_id=0,
            do_sample=False,
            **_exactly(NEW),
        )
    return made[0].tolist(), clock.seconds["decode"]


def _exactly(count: int) -> dict[str, Any]:
    """Return the options of an answer of so many tokens, whatever it says."""
    return {"max_new_tokens": count, "min_new_tokens": count}


def measure_ragged(session: Session) -> Found:
    """Measure a batch of prompts of different lengths."""
    batch = Ragged(session)
    count = session.repeats(6, 3)
    expected = batch.singly()
    if batch.together() != expected:
        raise AssertionError("a ragged batch answers otherwise than its rows alone")
    rows = {"the batch": batch.together, f"{len(WORDS)} single runs": batch.singly}
    found = collected(in_turn(rows, count, warm_up=1))
    row = "ragged-batch"
    single = f"{len(WORDS)} single runs"
    return Found(
        row,
        f"{len(WORDS)} questions of {min(batch.lengths)} to {max(batch.lengths)} tokens, a picture "
        f"and a look each, {RAGGED_NEW} tokens an answer",
        [
            *took(row, found),
            against(row, found, single, "the batch", RAGGED_GOAL, "higher"),
        ],
    )


class Ragged:
    """Questions of different lengths, each about a picture of its own."""

    def __init__(self, session: Session) -> None:
        self.model: IPN = asking_model(session.backbone, layout={"dynamic": 5})
        opening = ("What", "Where", "Who", "Which", "How", "When", "Why", "Is")
        self.prompts = [
            Prompt.ask(f"{word} is" + " it" * more, ["the picture"])
            for word, more in zip(opening, WORDS, strict=True)
        ]
        self.features = features_of(len(self.prompts), session.backbone.device)
        self.lengths = [len(self.model.planner.plan(prompt).text_ids) for prompt in self.prompts]

    def together(self) -> list[tuple[int, ...]]:
        """Answer all as one batch."""
        return self._answer(self.prompts, self.features)

    def singly(self) -> list[tuple[int, ...]]:
        """Answer one after the other."""
        return [
            ids
            for row, prompt in enumerate(self.prompts)
            for ids in self._answer([prompt], self.features.select([row]))
        ]

    @torch.no_grad()
    def _answer(self, prompts: list[Prompt], features: VisualFeatures) -> list[tuple[int, ...]]:
        model = self.model
        plans = [model.planner.plan(prompt) for prompt in prompts]
        percept = model.perceive([], [plan.question for plan in plans], features)
        clock = Clock(model.backbone.device)
        answers, _, _ = decode(model, plans, percept, _exactly(RAGGED_NEW), clock)
        return [answer.ids for answer in answers]
