"""The contract of tasks bites, clause by clause."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from clauses import check, clauses, contract
from PIL import Image

from ipn_core.tasks import Example, Picture, Task
from ipn_core.testing.contracts import ContractError, TaskContract


class Good(Task):
    splits = ("train", "test")

    def examples(self, split: str) -> Sequence[Example]:
        self.check_split(split)
        names = [f"{split} {i}" for i in range(3)]
        return [Example("What?", ("a dog",), (Picture(n, self.draw),)) for n in names]

    def draw(self) -> Image.Image:
        return Image.new("RGB", (4, 4))


class TakesAny(Good):
    def examples(self, split: str) -> Sequence[Example]:
        return super().examples(split if split in self.splits else "test")


class Restless(Good):
    def examples(self, split: str) -> Sequence[Example]:
        return [replace(e, question=f"{random.random()}?") for e in super().examples(split)]


class Unanswered(Good):
    def examples(self, split: str) -> Sequence[Example]:
        return [replace(e, answers=()) for e in super().examples(split)]


class Grey(Good):
    def draw(self) -> Image.Image:
        return Image.new("L", (4, 4))


class Shares(Good):
    def examples(self, split: str) -> Sequence[Example]:
        self.check_split(split)
        return super().examples("train")


class Arguments(Good):
    def __init__(self, count: int) -> None:
        self.count = count


class TakesAnything(Good):
    def __init__(self, **options: object) -> None:
        self.options = options


BREAKS = {
    TakesAnything: ("test_config_is_closed", "'no_such_option' was taken"),
    TakesAny: ("test_its_splits", "'no such split' was taken"),
    Restless: ("test_examples_are_the_same_every_time", "differs from one call to the next"),
    Unanswered: ("test_examples_are_whole", "no answer to 'What"),
    Grey: ("test_examples_are_whole", "opens as L, not RGB"),
    Shares: ("test_test_pictures_are_not_trained_on", "share 'train 0'"),
    Arguments: ("test_its_splits", "missing a required argument"),
}


@pytest.mark.parametrize("name", sorted({name for name, _ in BREAKS.values()}))
def test_a_good_task_keeps_the_clause(name: str) -> None:
    check(contract(TaskContract, Good), name)


@pytest.mark.parametrize("target", BREAKS, ids=lambda t: t.__name__)
def test_a_broken_task_is_told_the_clause_and_the_mend(target: type) -> None:
    name, seen = BREAKS[target]
    with pytest.raises(ContractError, match=rf"(?s)clause '.*{seen}.*What to do: "):
        check(contract(TaskContract, target), name)


def test_every_clause_has_a_task_that_breaks_it() -> None:
    # Imports are the same clause for all kinds; the interactions' tests break it.
    others = {"test_imports_are_cheap"}
    assert {name for name, _ in BREAKS.values()} == set(clauses(TaskContract)) - others
