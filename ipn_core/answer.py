"""`Answer`: what the model said, where it looked, and what that cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Answer", "Answers", "Asked"]


@dataclass(frozen=True, eq=False)
class Asked:
    """What an answer was asked, kept so that it can be shown with it.

    Attributes:
        question: the words of the last turn.
        images: the pictures so far as they were given; they are opened again when they are shown.
        boxes: for each, (left, top, right, bottom) of the part of it that the patches show; none
            where patches are no places in a picture.
    """

    question: str = ""
    images: tuple[Any, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer.

    Attributes:
        text: the words, without special tokens or surrounding space.
        ids: the emitted ids, the end token included.
        attention: (K, P) where the last look went, over the patches of all pictures it saw, or
            None where the interaction has no map.
        attentions: the same for every look, (rounds, K, P), or None.
        grids: the (h, w) of each picture that the last look saw; their products add up to P.
        seconds: by stage, to the first token and in total; shared by the answers of one batch.
        tokens: positions that the LLM processed, by kind; none for a message that was put straight
            into its cache or between its layers.
        looked: for each look that the model took by itself (`layout.look_again`), how many of
            `ids` came before it.
        asked: the question and the pictures.
    """

    text: str
    ids: tuple[int, ...]
    attention: Tensor | None = None
    attentions: Tensor | None = None
    grids: tuple[tuple[int, int], ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    looked: tuple[int, ...] = ()
    asked: Asked = field(default_factory=Asked, repr=False)

    @property
    def grid(self) -> tuple[int, int] | None:
        """The (h, w) of the patches of the first picture."""
        return self.grids[0] if self.grids else None

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the picture with the map, the answer, the seconds."""
        from ipn_core.showing.notebook import summary

        return summary(self)


class Answers(list[Answer]):
    """The answers of a batch, in the order of the prompts, several sequences side by side.

    Attributes:
        raw: what transformers' `generate` returned (scores and the like, if asked for).
    """

    def __init__(self, answers: list[Answer], raw: Any = None) -> None:
        super().__init__(answers)
        self.raw = raw
