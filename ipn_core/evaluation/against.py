"""Two models on the same questions: how much better one is, and how sure that is."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ipn_core.evaluation.scoring import Score
from ipn_core.evaluation.statistics import Interval, bootstrap_difference, by_pictures, mcnemar

if TYPE_CHECKING:
    from ipn_core.evaluation.evaluate import Report
    from ipn_core.tasks import Example

__all__ = ["Against", "Pairs", "compare_reports"]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Both models' answers to some questions.

    Attributes:
        ours, theirs: how often each is right.
        difference: our accuracy minus theirs, with the interval that resampling pictures gives.
        p: of McNemar's exact test.
        only_ours: questions that only our model answers rightly.
        only_theirs: questions that only the other one does.
        clusters: how many there were to resample: pictures, unless questions show several.
    """

    ours: Score
    theirs: Score
    difference: Interval
    p: float
    only_ours: int
    only_theirs: int
    clusters: int

    @classmethod
    def of(
        cls,
        ours: Sequence[bool],
        theirs: Sequence[bool],
        clusters: Sequence[Hashable],
        seed: int = 0,
    ) -> Pairs:
        """Compare verdicts on the same questions.

        Args:
            ours: whether our model answered each question rightly.
            theirs: whether the other one did.
            clusters: what each question hangs together by; see `by_pictures`.
            seed: of the resampling.

        Raises:
            ValueError: there are not as many of each, or none.
        """
        a, b = np.array([ours], dtype=bool), np.array([theirs], dtype=bool)
        difference = bootstrap_difference(a, b, clusters, seed=seed)
        wins, losses = int((a & ~b).sum()), int((b & ~a).sum())
        return cls(
            Score.of(ours),
            Score.of(theirs),
            difference,
            mcnemar(ours, theirs),
            wins,
            losses,
            len(set(clusters)),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what `ipn eval --against --json` prints of these questions."""
        return {
            "n": self.theirs.n,
            "accuracy": self.theirs.accuracy,
            "ci95": list(self.theirs.ci95),
            "difference": self.difference.mean,
            "difference_ci95": [self.difference.low, self.difference.high],
            "p": self.p,
            "only_ours": self.only_ours,
            "only_theirs": self.only_theirs,
            "clusters": self.clusters,
        }


@dataclass(frozen=True)
class Against:
    """How a model did against another one.

    Attributes:
        model, interact: the other one's name and strategy.
        whole: all questions.
        by_type: those of each type, by its name; each p is of that type alone.
        seconds: what the other one took.
    """

    model: str
    interact: str
    whole: Pairs
    by_type: dict[str, Pairs]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return what `ipn eval --json` prints under `against`."""
        return {
            "model": self.model,
            "interact": self.interact,
            **self.whole.to_json(),
            "by_type": {name: pairs.to_json() for name, pairs in self.by_type.items()},
            "seconds": self.seconds,
        }


def compare_reports(
    ours: Report, theirs: Report, *, model: str, interact: str, seed: int = 0
) -> Against:
    """Compare the reports of two models on the same examples.

    Args:
        ours: of the model that is judged.
        theirs: of the model that it is held against.
        model: the name of the latter.
        interact: its strategy.
        seed: of the resampling.

    Raises:
        ValueError: the reports are about different examples.
    """
    asked, also = ([_question(p.example) for p in r.predictions] for r in (ours, theirs))
    if asked != also:
        raise ValueError("the two reports are about different examples.")
    clusters = by_pictures(names for _, names in asked)

    def pairs(chosen: Sequence[int]) -> Pairs:
        return Pairs.of(
            [ours.predictions[i].right for i in chosen],
            [theirs.predictions[i].right for i in chosen],
            [clusters[i] for i in chosen],
            seed,
        )

    kinds = [p.example.type for p in ours.predictions]
    by_type = {t: pairs([i for i, kind in enumerate(kinds) if kind == t]) for t in ours.by_type}
    return Against(model, interact, pairs(range(len(asked))), by_type, theirs.seconds)


def _question(example: Example) -> tuple[str, list[str]]:
    return example.question, [picture.name for picture in example.images]
