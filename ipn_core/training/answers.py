"""What each look of an example shall bring, and messages that say so without a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.errors import ConfigError
from ipn_core.hooks import hookimpl
from ipn_core.stages import VisualMessage
from ipn_core.transfer import send
from ipn_core.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ipn_core.config import Layout
    from ipn_core.model import IPN
    from ipn_core.stages import Request
    from ipn_core.tasks import Example
    from ipn_core.training.data import DataSource

__all__ = ["Answers", "Told", "directions", "looking", "targets"]


def targets(example: Example, layout: Layout) -> tuple[str, ...]:
    """Return what each look of an example shall bring: its hops one after the other, its answer.

    With fewer looks than that, the first hops are left to the last looks; with more, the last ones
    bring the answer again.

    Raises:
        ConfigError: it is a dialogue, of which it is not known what its looks should find.
    """
    if example.dialogue is not None:
        raise ConfigError(
            f"'{example.question}' ends a dialogue, or has pictures between its words; from that "
            "only the objective 'language' can learn, and it cannot be validated on."
        )
    looks = _looks(example, layout)
    wanted = (*example.hops, example.answers[0])
    return tuple(
        wanted[max(len(wanted) - looks, 0) :][min(i, len(wanted) - 1)] for i in range(looks)
    )


def looking(examples: Sequence[Example], layout: Layout, look: int) -> list[int]:
    """Return the examples that have a look of this number, from 0."""
    return [i for i, e in enumerate(examples) if _looks(e, layout) > look]


def _looks(example: Example, layout: Layout) -> int:
    """Return how many looks a question has."""
    return layout.rounds + min(example.looks, layout.look_again)


class Answers:
    """The distinct targets of some data, and a unit direction for each in the LLM's input space.

    Attributes:
        directions: (A, D_in) mean input embedding of each target's tokens, centred over them all.
    """

    def __init__(self, model: IPN, data: Sequence[DataSource]) -> None:
        self._layout = model.config.layout
        every = {t for d in data for e in d.examples for t in targets(e, self._layout)}
        self._index = {answer: i for i, answer in enumerate(sorted(every))}
        self.directions = directions(model, list(self._index))

    def index(self, examples: Sequence[Example], look: int) -> Tensor:
        """Return (B,) the index of what a look of each example shall bring.

        Targets that training never had get -1, which no message can point at.
        """
        wanted = [targets(e, self._layout)[look] for e in examples]
        return torch.tensor([self._index.get(target, -1) for target in wanted])

    def of(self, examples: Sequence[Example], look: int) -> Tensor:
        """Return (B, D_in) the direction of what a look shall bring; zeros for unknown targets."""
        index = send(self.index(examples, look), self.directions.device)
        known = (index >= 0).unsqueeze(1)
        return self.directions[index.clamp(min=0)] * known


class Told:
    """A wrapper on one model's `interact`: messages in place of the interaction's."""

    def __init__(self, messages: Sequence[Tensor]) -> None:
        """Take the messages of each look.

        Args:
            messages: (B, M, Dm) of the rows that have this look, in their order.
        """
        self._messages = messages

    @hookimpl(tryfirst=True)
    def interact(self, request: Request, features: Any) -> VisualMessage:
        """Answer the hook first, so that the interaction is not run."""
        return VisualMessage(self._messages[request.round].to(request.values.dtype))


def directions(model: IPN, words: Sequence[str]) -> Tensor:
    """Return a unit direction (n, D_in) for each of some words in the LLM's input space.

    It is the mean input embedding of the word's tokens as an answer, centred over all the words.
    """
    vocabulary = Vocabulary.of(model.backbone)
    vocabulary.ids = model.planner.answer_ids
    with model.driving("embed"):
        return vocabulary.directions(words)
