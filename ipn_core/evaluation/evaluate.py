"""Run a model over the examples of a task and report how often it is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.clock import Clock
from ipn_core.errors import DataError, GenerationOptionError, UserError
from ipn_core.evaluation.pictures import PictureCache
from ipn_core.evaluation.scoring import Guess, Score, guess, matches
from ipn_core.evaluation.shuffled import (
    ForeignRequests,
    draw_partners,
    requests_depend_on_pictures,
    requests_of,
)
from ipn_core.generate import decode
from ipn_core.generation import repeats_of
from ipn_core.stages import Connector

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.plan import Plan
    from ipn_core.tasks import Example

__all__ = ["Prediction", "Report", "evaluate"]

BATCH_SIZE = 16
MAX_NEW_TOKENS = 8
"""Of an answer, unless the task's own are longer."""
ROOM = 4
"""Tokens that an answer may have beyond the task's longest one."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """One answered question.

    Attributes:
        example: the question.
        text: what the model said.
        right: whether that counts.
        partner: with shuffled requests, the example whose request was used.
    """

    example: Example
    text: str
    right: bool
    partner: Example | None = None


@dataclass(frozen=True)
class Report:
    """How a model did on a split.

    Attributes:
        task, split: what was asked.
        n: number of questions.
        accuracy: share of right answers.
        ci95: its Wilson 95 % interval.
        by_type: the score of each type of question, by name.
        seconds: from the first question to the last answer, loading left out.
        predictions: every answer, in the order of the examples.
        shuffled: whether the requests were those of other examples.
        guess: the most frequent answer of all and what it scores; None where nothing was asked.
        guess_by_type: the same for each type.
        pictures: how many pictures went through the vision encoder.
    """

    task: str
    split: str
    n: int
    accuracy: float
    ci95: tuple[float, float]
    by_type: dict[str, Score]
    seconds: float
    predictions: tuple[Prediction, ...] = field(repr=False)
    shuffled: bool = False
    guess: Guess | None = None
    guess_by_type: dict[str, Guess] = field(default_factory=dict)
    pictures: int = 0

    @property
    def by_type_guess(self) -> float | None:
        """What it scores to give each type of question its own most frequent answer."""
        if not self.guess_by_type:
            return None
        return sum(g.accuracy * self.by_type[t].n for t, g in self.guess_by_type.items()) / self.n

    def to_json(self) -> dict[str, Any]:
        """Return what `ipn eval --json` prints; shuffled requests add the scores of guessing."""
        types: dict[str, dict[str, Any]] = {
            name: {"n": score.n, "accuracy": score.accuracy, "ci95": list(score.ci95)}
            for name, score in self.by_type.items()
        }
        whole: dict[str, Any] = {
            "task": self.task,
            "split": self.split,
            "n": self.n,
            "accuracy": self.accuracy,
            "ci95": list(self.ci95),
            "by_type": types,
            "seconds": self.seconds,
        }
        if self.shuffled and self.guess is not None:
            whole["shuffled"] = True
            whole["guess"] = {
                "answer": self.guess.answer,
                "accuracy": self.guess.accuracy,
                "by_type_accuracy": self.by_type_guess,
            }
            for name, found in self.guess_by_type.items():
                types[name]["guess"] = {"answer": found.answer, "accuracy": found.accuracy}
        return whole


def evaluate(
    model: IPN,
    examples: Sequence[Example],
    *,
    task: str = "",
    split: str = "",
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    shuffled: bool = False,
    pool: Sequence[Example] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **generate: Any,
) -> Report:
    """Answer every example and score the answers.

    Each picture is perceived once, and what comes first in the prompt decides how examples are
    batched: the engine runs equal questions of a batch once where no picture stands before them,
    and otherwise what questions about the same picture share.

    Args:
        model: the model.
        examples: the questions.
        task: named in the report.
        split: named in the report.
        batch_size: questions a batch.
        seed: of the partners that `shuffled` draws.
        shuffled: give every example the request of another one, with another question and
            another picture.
        pool: the examples that partners are drawn from, by default `examples`.
        progress: called with the number of answers and of examples after every batch.
        generate: transformers' generation options; by default greedy, and as many tokens as the
            longest accepted answer needs, at least 8.

    Raises:
        UserError: there are no examples, a picture cannot be read, the model makes no requests
            that could be shuffled, or an option asks for several answers.
    """
    if not examples:
        raise DataError("there is nothing to evaluate: the split holds no examples.")
    if batch_size < 1:
        raise UserError(f"the batch size must be at least 1, got {batch_size}.")
    if repeats_of(generate)[1] > 1:
        raise GenerationOptionError(
            "num_return_sequences must be 1 in an evaluation: one answer a question is scored."
        )
    if shuffled and model.requester is None:
        raise UserError(
            f"strategy '{model.strategy}' of model '{model.name}' makes no requests, so there are "
            "none to shuffle. Evaluate it without --shuffled."
        )
    if shuffled and model.look_head is not None:
        raise UserError(
            f"model '{model.name}' decides for itself how often it looks (layout.look_again), so "
            "that another question's requests do not fit its looks. Evaluate it without --shuffled."
        )
    if shuffled and any(e.dialogue is not None for e in (*examples, *(pool or ()))):
        raise UserError(
            "some examples are dialogues, which ask more than once, so that another example's "
            "requests do not fit theirs. Evaluate them without --shuffled."
        )
    options = {"max_new_tokens": _tokens_needed(model, examples), **generate}
    run = _Run(model, examples, batch_size, options)
    if shuffled:
        run.partners = draw_partners(examples, pool or examples, seed)
    start = time.perf_counter()
    texts = run.texts(progress)
    seconds = time.perf_counter() - start
    predictions = tuple(
        Prediction(example, text, matches(text, example.answers), partner)
        for example, text, partner in zip(examples, texts, run.partners, strict=True)
    )
    return _report(task, split, predictions, seconds, shuffled, run.pictures.perceived)


def _tokens_needed(model: IPN, examples: Sequence[Example]) -> int:
    answers = list({answer for example in examples for answer in example.answers})
    ids = model.backbone.tokenizer(answers, add_special_tokens=False)["input_ids"]
    return max(MAX_NEW_TOKENS, max(map(len, ids), default=0) + ROOM)


def _report(
    task: str,
    split: str,
    predictions: tuple[Prediction, ...],
    seconds: float,
    shuffled: bool,
    pictures: int,
) -> Report:
    whole = Score.of([p.right for p in predictions])
    types = sorted({p.example.type for p in predictions})
    of_type = {t: [p for p in predictions if p.example.type == t] for t in types}
    return Report(
        task,
        split,
        whole.n,
        whole.accuracy,
        whole.ci95,
        {t: Score.of([p.right for p in mine]) for t, mine in of_type.items()},
        seconds,
        predictions,
        shuffled,
        guess([p.example.answers for p in predictions]),
        {t: guess([p.example.answers for p in mine]) for t, mine in of_type.items()},
        pictures,
    )


class _Run:
    """One pass over the examples."""

    def __init__(
        self, model: IPN, examples: Sequence[Example], batch_size: int, options: dict[str, Any]
    ) -> None:
        self.model = model
        self.examples = examples
        self.batch_size = batch_size
        self.options = options
        self.pictures = PictureCache(model)
        self.partners: list[Example | None] = [None] * len(examples)

    @torch.no_grad()
    def texts(self, progress: Callable[[int, int], object] | None) -> list[str]:
        """Return the model's words on each example, in their order."""
        texts = [""] * len(self.examples)
        observer = ForeignRequests()
        shuffles = any(partner is not None for partner in self.partners)
        requests = self._partner_requests() if shuffles else {}
        done = 0
        with self.model.observing(observer) if shuffles else nullcontext():
            for batch in self._batches(range(len(self.examples)), self.examples):
                observer.rows = [
                    None if partner is None else requests[self._key(partner)]
                    for partner in (self.partners[i] for i in batch)
                ]
                for index, text in zip(batch, self._answer(batch), strict=True):
                    texts[index] = text
                done += len(batch)
                if progress:
                    progress(done, len(self.examples))
        return texts

    def _answer(self, batch: Sequence[int]) -> list[str]:
        examples = [self.examples[i] for i in batch]
        plans = [self._plan(example) for example in examples]
        clock = Clock(self.model.backbone.device)
        features = self.pictures.features(examples)
        percept = self.model.perceive(
            [p.images for p in plans], [p.question for p in plans], features
        )
        answers, _, _ = decode(self.model, plans, percept, dict(self.options), clock)
        return [answer.text for answer in answers]

    def _plan(self, example: Example) -> Plan:
        return self.model.planner.plan(example.prompt(self.model.config.layout.order))

    def _batches(self, indices: Sequence[int], examples: Sequence[Example]) -> Iterator[list[int]]:
        """Yield batches of indices: windows whose pictures fit into memory, sorted inside."""
        for window in self._windows(indices, examples):
            self.pictures.keep({p.name for i in window for p in examples[i].images})
            if not isinstance(self.model.perceiver, Connector):
                window.sort(key=lambda i: (len(examples[i].question), examples[i].question, i))
            for start in range(0, len(window), self.batch_size):
                yield window[start : start + self.batch_size]

    def _windows(self, indices: Sequence[int], examples: Sequence[Example]) -> Iterator[list[int]]:
        first = next((e.images[0] for e in examples if e.images), None)
        room = self.pictures.room_for(first) if first else 1
        seen: dict[str, None] = {}
        by_picture = dict.fromkeys(p.name for e in examples for p in e.images)
        order = {name: i for i, name in enumerate(by_picture)}
        window: list[int] = []
        for index in sorted(
            indices, key=lambda i: min((order[p.name] for p in examples[i].images), default=-1)
        ):
            names = [p.name for p in examples[index].images]
            if window and len(seen | dict.fromkeys(names)) > room:
                yield window
                window, seen = [], {}
            seen |= dict.fromkeys(names)
            window.append(index)
        if window:
            yield window

    # -- shuffled requests -----------------------------------------------------------------------

    def _key(self, example: Example) -> Any:
        """Examples with the same key make the same request."""
        if requests_depend_on_pictures(self.model):
            return example.question, tuple(picture.name for picture in example.images)
        return example.question, len(example.images)

    def _partner_requests(self) -> dict[Any, Tensor]:
        """Return the requests (rounds, R, D) of all partners, on the CPU, by `_key`."""
        distinct = {self._key(p): p for p in self.partners if p is not None}
        keys, examples = list(distinct), list(distinct.values())
        if requests_depend_on_pictures(self.model):
            batches = self._batches(range(len(examples)), examples)
        else:
            order = sorted(range(len(examples)), key=lambda i: len(examples[i].question))
            size = self.batch_size
            batches = iter([order[i : i + size] for i in range(0, len(order), size)])
        found: dict[Any, Tensor] = {}
        for batch in batches:
            chosen = [examples[i] for i in batch]
            plans = [self._plan(example) for example in chosen]
            requests = requests_of(self.model, chosen, plans, self.pictures)
            found.update(zip([keys[i] for i in batch], requests.cpu(), strict=True))
        return found
