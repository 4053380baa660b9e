"""What the jobs of a comparison found: accuracies with intervals, and differences between arms."""

from __future__ import annotations

import csv
import io
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ipn_core.comparison.job import Job
from ipn_core.evaluation.statistics import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    by_pictures,
    mcnemar,
)
from ipn_core.training.config import StageConfig

__all__ = ["GUESSING", "Cell", "Group", "Results"]

ALL = "all"
"""All types of question together."""
GUESSING = "each type's most frequent answer"
"""What accuracies are to be seen beside; see `Cell.guess`."""


@dataclass(frozen=True)
class Cell:
    """Answers of one arm, over all its seeds, to the questions of one split.

    Attributes:
        right: (seeds, questions) whether each answer counts.
        types: of the questions.
        pictures: what hangs together: questions about the same pictures.
        guess_by_type: the share of each type's questions that its most frequent answer gets.
    """

    right: np.ndarray
    types: tuple[str, ...]
    pictures: tuple[Hashable, ...]
    guess_by_type: dict[str, float]

    def only(self, kind: str) -> Cell:
        """Return the questions of one type, or all of them."""
        if kind == ALL:
            return self
        kept = [i for i, name in enumerate(self.types) if name == kind]
        return Cell(
            self.right[:, kept],
            (kind,) * len(kept),
            tuple(self.pictures[i] for i in kept),
            self.guess_by_type,
        )

    @property
    def guess(self) -> float:
        """The share that gets it right to give each question its type's most frequent answer."""
        return float(np.mean([self.guess_by_type[kind] for kind in self.types]))

    @property
    def clusters(self) -> int:
        """How many pictures the questions are about."""
        return len(set(self.pictures))

    @property
    def accuracy(self) -> Interval:
        """The share of right answers, with its interval over seeds and pictures."""
        return bootstrap_mean(self.right, self.pictures)

    def minus(self, other: Cell) -> Interval:
        """Return how much better this is, over the same questions."""
        return bootstrap_difference(self.right, other.right, self.pictures)

    def p_value(self, other: Cell) -> float:
        """Return McNemar's exact p for the first seed of both."""
        return mcnemar(self.right[0].tolist(), other.right[0].tolist())


@dataclass(frozen=True)
class Group:
    """The seeds of one arm at one number of tokens.

    Attributes:
        arm: as `arms.Arm` has it.
        results: of each seed, as `job.run_job` wrote them.
    """

    arm: dict[str, Any]
    results: list[dict[str, Any]]

    @property
    def name(self) -> str:
        """The arm's name."""
        return str(self.arm["name"])

    @property
    def dynamic(self) -> int:
        """The number K that it is compared at."""
        return int(self.arm["dynamic"])

    @property
    def asks(self) -> bool:
        """Whether it can ask."""
        return bool(self.arm["asks"])

    @property
    def tokens(self) -> int:
        """S + R + K."""
        return int(self.arm["static"] + self.arm["request"] + self.arm["message"])

    @property
    def seeds(self) -> list[int]:
        """Their numbers."""
        return [int(result["seed"]) for result in self.results]

    @property
    def flops(self) -> float:
        """Of training, per seed."""
        return float(self.results[0]["measured"]["train_flops"])

    @property
    def peak_memory(self) -> int:
        """The largest of all seeds, in bytes."""
        return max(int(result["training"]["peak_memory"]) for result in self.results)

    @property
    def cpu_minutes(self) -> float:
        """The most that a seed took, evaluation included."""
        return max(float(result["cpu_s"]) for result in self.results) / 60

    @property
    def speed(self) -> float | None:
        """Examples a second over all stages, each for as long as it lasts; None if unknown."""
        stages = [StageConfig.parse(stage, self.name) for stage in self.arm["stages"]]
        rates = [self.rate(stage.name) for stage in stages]
        sizes = [s.steps * s.accumulate * s.groups * s.per_group for s in stages]
        if None in rates:
            return None
        return sum(sizes) / sum(n / rate for n, rate in zip(sizes, rates, strict=True) if rate)

    def rate(self, stage: str) -> float | None:
        """Return the median examples a second of a stage, over the seeds."""
        found = [r["training"]["examples_per_s"].get(stage) for r in self.results]
        known = [rate for rate in found if rate is not None]
        return float(np.median(known)) if known else None

    @cached_property
    def cells(self) -> dict[tuple[str, str, bool], Cell]:
        """Its answers by task, split, and whether requests were shuffled."""
        found: dict[tuple[str, str, bool], Cell] = {}
        for scores in zip(*(result["scores"] for result in self.results), strict=True):
            first = scores[0]
            found[first["task"], first["split"], first["shuffled"]] = Cell(
                np.array([score["right"] for score in scores], dtype=float),
                tuple(first["types"]),
                tuple(by_pictures(first["pictures"])),
                first["guess_by_type"],
            )
        return found

    def cell(self, task: str, split: str, shuffled: bool = False) -> Cell | None:
        """Return its answers to a split, None where it was not asked so."""
        return self.cells.get((task, split, shuffled))

    @property
    def shuffled(self) -> list[tuple[str, str, Cell, Cell]]:
        """Task and split, and its answers with its own and with others' requests."""
        return [
            (task, split, self.cells[task, split, False], foreign)
            for (task, split, shuffled), foreign in self.cells.items()
            if shuffled
        ]


class Results:
    """All that the jobs found."""

    def __init__(self, jobs: Iterable[Job], reference: str, control: str, dynamic: int) -> None:
        """Read the results of jobs that are done.

        Args:
            jobs: of the comparison.
            reference: the arm that asks.
            control: its control.
            dynamic: tokens K of the main comparison.

        Raises:
            CheckpointError: a result is damaged.
            TrainingError: one answers other questions than its job asks.
        """
        found: dict[tuple[str, int], Group] = {}
        for job in jobs:
            key = (job.arm["name"], job.arm["dynamic"])
            found.setdefault(key, Group(job.arm, [])).results.append(job.answers())
        self.groups = list(found.values())
        self.reference, self.control, self.dynamic = reference, control, dynamic

    @property
    def main(self) -> list[Group]:
        """The groups of the main comparison."""
        return [group for group in self.groups if group.dynamic == self.dynamic]

    def group(self, name: str, dynamic: int | None = None) -> Group | None:
        """Return a group by name and number of tokens."""
        wanted = self.dynamic if dynamic is None else dynamic
        chosen = [g for g in self.groups if (g.name, g.dynamic) == (name, wanted)]
        return chosen[0] if chosen else None

    @property
    def asker(self) -> Group:
        """The reference of the main comparison."""
        found = self.group(self.reference)
        assert found is not None
        return found

    @property
    def askers(self) -> list[Group]:
        """The arms of the main comparison that ask."""
        return [group for group in self.main if group.asks]

    @property
    def blind(self) -> list[Group]:
        """The arms of the main comparison that cannot ask."""
        return [group for group in self.main if not group.asks]

    @property
    def splits(self) -> list[tuple[str, str]]:
        """Task and split of everything that was asked, in order."""
        return [(task, split) for task, split, shuffled in self.asker.cells if not shuffled]

    def kinds(self, task: str, split: str) -> list[str]:
        """Return the types of question of a split, all of them first."""
        cell = self.asker.cell(task, split)
        assert cell is not None
        kinds = sorted(set(cell.types))
        return [ALL] if kinds == [ALL] else [ALL, *kinds]

    def csv(self, first_token: dict[str, Any]) -> str:
        """Return a row for each arm, number of tokens, seed, split and type of question.

        Args:
            first_token: of `timing.first_token`, of the arms of the main comparison.
        """
        text = io.StringIO()
        out = csv.writer(text, lineterminator="\n")
        out.writerow(_COLUMNS)
        for group in self.groups:
            for seed, result in zip(group.seeds, group.results, strict=True):
                timed = first_token.get(group.name, {}) if group.dynamic == self.dynamic else {}
                costs = (
                    f"{result['measured']['train_flops']:.4g}",
                    "" if group.speed is None else f"{group.speed:.4g}",
                    f"{result['cpu_s'] / 60:.2f}",
                    result["training"]["peak_memory"],
                    f"{timed['seconds']:.4g}" if "seconds" in timed else "",
                )
                for score in result["scores"]:
                    out.writerows((*row, *costs) for row in _rows(group, seed, score))
        return text.getvalue()


_COLUMNS = (
    "arm",
    "asks",
    "dynamic",
    "static_tokens",
    "request_tokens",
    "message_tokens",
    "parameters",
    "seed",
    "task",
    "split",
    "shuffled",
    "type",
    "n",
    "right",
    "accuracy",
    "low",
    "high",
    "train_flops",
    "examples_per_s",
    "cpu_minutes",
    "peak_memory",
    "first_token_s",
)


def _rows(group: Group, seed: int, score: dict[str, Any]) -> list[Sequence[Any]]:
    right = np.array([score["right"]], dtype=float)
    pictures = tuple(by_pictures(score["pictures"]))
    cell = Cell(right, tuple(score["types"]), pictures, score["guess_by_type"])
    arm = group.arm
    rows: list[Sequence[Any]] = []
    for kind in [ALL, *sorted(set(score["types"]) - {ALL})]:
        part = cell.only(kind)
        found = part.accuracy
        rows.append(
            (
                group.name,
                group.asks,
                group.dynamic,
                arm["static"],
                arm["request"],
                arm["message"],
                arm["parameters"],
                seed,
                score["task"],
                score["split"],
                score["shuffled"],
                kind,
                part.right.size,
                int(part.right.sum()),
                *(f"{x:.4f}" for x in (found.mean, found.low, found.high)),
            )
        )
    return rows
