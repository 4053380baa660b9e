"""The task `easy-vqa`: the package's questions, with a part of the training kept for `val`."""

from __future__ import annotations

from collections import Counter

import pytest
from ipn_starter.easy_vqa import EasyVQA

from ipn_core.errors import DataError
from ipn_core.testing.contracts import TaskContract


class TestEasyVQA(TaskContract):
    name = "easy-vqa"


ASKED = ("is there a circle?", "does the image not contain a red shape?", "is no circle present?")


@pytest.fixture(scope="module")
def splits() -> dict[str, list]:
    return {split: list(EasyVQA().examples(split)) for split in EasyVQA.splits}


def test_the_splits_are_the_packages(splits: dict[str, list]) -> None:
    assert len(splits["test"]) == 9673
    assert len(splits["train"]) + len(splits["val"]) == 38575
    shown = {split: {e.images[0].name for e in examples} for split, examples in splits.items()}
    assert {split: len(names) for split, names in shown.items()} == {
        "train": 3600,
        "val": 400,
        "test": 1000,
    }
    assert not shown["train"] & shown["val"]
    assert not shown["test"] & (shown["train"] | shown["val"])


@pytest.mark.parametrize("split", EasyVQA.splits)
def test_thirteen_one_word_answers_of_three_kinds(splits: dict[str, list], split: str) -> None:
    answers = {answer for e in splits[split] for answer in e.answers}
    assert len(answers) == 13
    assert all(answer.isalpha() for answer in answers)
    kinds = Counter(e.type for e in splits[split])
    assert set(kinds) == {"yes-no", "shape", "colour"}
    by_kind = {k: {e.answers[0] for e in splits[split] if e.type == k} for k in kinds}
    assert {k: len(v) for k, v in by_kind.items()} == {"yes-no": 2, "shape": 3, "colour": 8}


def test_what_a_picture_shows_follows_from_its_questions(splits: dict[str, list]) -> None:
    answers = {q: {e.answers[0] for e in splits["test"] if e.question == q} for q in ASKED}
    for e in splits["test"]:
        assert len(e.shown) <= 2
        if e.names:
            assert len(e.shown) == 2
            assert e.names[0] in e.question
        if e.names and e.type == "yes-no":
            denies = " no" in e.question
            assert (e.names[0] in e.shown) == ((e.answers[0] == "yes") != denies)
        if e.type != "yes-no":
            assert e.answers[0] in e.shown
    assert answers == {q: {"yes", "no"} for q in ASKED}
    assert sum(bool(e.names) for e in splits["train"]) > 20_000


def test_pictures_open_and_questions_share_them(splits: dict[str, list]) -> None:
    first = splits["val"][0].images[0]
    image = first.load()
    assert (image.mode, image.size) == ("RGB", (64, 64))
    sharing = [e for e in splits["val"] if e.images[0].name == first.name]
    assert len(sharing) > 1
    assert all(e.images[0] is first for e in sharing)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(DataError, match="this task has train, val, test"):
        EasyVQA().examples("all")
