"""Scoring: when an answer counts as right, and how many do."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ipn_core.evaluation.statistics import wilson

__all__ = ["Guess", "Score", "guess", "matches", "normalise"]


def normalise(text: str) -> str:
    """Return what is compared: case folded, surrounding punctuation and white space removed.

    A minus before a digit is part of the number. Text that is nothing but punctuation is kept.
    """
    folded = unicodedata.normalize("NFC", text).casefold().strip()
    start, end = 0, len(folded)
    while start < end and _skipped(folded[start]) and not _signs(folded[start:]):
        start += 1
    while end > start and _skipped(folded[end - 1]):
        end -= 1
    return folded[start:end] or folded


def _skipped(character: str) -> bool:
    return unicodedata.category(character)[0] in "PZC"


def _signs(text: str) -> bool:
    return text[0] in "-\u2212" and text[1:2].isdigit()


def matches(text: str, answers: Iterable[str]) -> bool:
    """Whether `text` is one of the accepted answers, by `normalise`."""
    given = normalise(text)
    return any(given == normalise(answer) for answer in answers)


@dataclass(frozen=True, slots=True)
class Guess:
    """The most frequent answer, given to every question.

    Attributes:
        answer: that answer.
        accuracy: the share of questions that accept it.
    """

    answer: str
    accuracy: float


@dataclass(frozen=True, slots=True)
class Score:
    """How many of n answers were right.

    Attributes:
        n: number of questions.
        right: how many were answered rightly.
    """

    n: int
    right: int

    @classmethod
    def of(cls, right: Sequence[bool]) -> Score:
        """Count a list of verdicts."""
        return cls(len(right), sum(right))

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 where there is no question."""
        return self.right / self.n if self.n else 0.0

    @property
    def ci95(self) -> tuple[float, float]:
        """The Wilson 95 % interval of the share."""
        return wilson(self.right, self.n)


def guess(answers: Sequence[Sequence[str]]) -> Guess:
    """Return the answer that most questions accept; of equally frequent ones the first in order.

    Args:
        answers: the accepted answers of each question.
    """
    accepted = [{normalise(answer) for answer in each} for each in answers]
    counts = Counter(answer for each in accepted for answer in sorted(each))
    best = min(counts, key=lambda answer: (-counts[answer], answer))
    return Guess(best, counts[best] / len(accepted))
