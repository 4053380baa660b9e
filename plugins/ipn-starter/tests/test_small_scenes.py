"""The task `emoji-details`: answered rightly, its splits kept apart, and its things small."""

from __future__ import annotations

import hashlib
import re
from collections import Counter

import numpy as np
import pytest
from ipn_starter.emoji_scenes import draw, nouns, questions
from ipn_starter.small_scenes import EmojiDetails, SmallScene
from ipn_starter.wordings import RELATIONS

from ipn_core.testing.contracts import TaskContract

SOME = 100
STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
WAYS = {way: STEPS[name] for name, ways in RELATIONS.items() for way in ways}
WORDS = {
    name: str(1 + at)
    for names in (("first", "second", "third", "fourth"), ("one", "two", "three", "four"))
    for at, name in enumerate(names)
}
PLAIN = (
    r"What is in row \d, column \d\?",
    r"What is (left of|right of|above|below) the cell in row \d, column \d\?",
    r"Is there an? [a-z]+ in row \d, column \d\?",
)


class TestEmojiDetails(TaskContract):
    name = "emoji-details"
    options = {"scenes": 6}  # noqa: RUF012 as declared


def cell_of(question: str) -> tuple[int, int]:
    """The cell that a question names."""
    said = re.sub(r"\w+", lambda m: WORDS.get(m[0], m[0]), question.lower())
    row = re.search(r"row (\d)|(\d) row", said)
    column = re.search(r"column (\d)|(\d) column", said)
    return int(row[1] or row[2]) - 1, int(column[1] or column[2]) - 1


@pytest.mark.parametrize("split", EmojiDetails.splits)
def test_every_answer_is_right_and_its_place_is_in_the_question(split: str) -> None:
    for number in range(SOME):
        scene = SmallScene.make(split, number)
        board = {(thing.row, thing.column): thing.noun.name for thing in scene.things}
        asked = questions(scene)
        assert Counter(e.type for e in asked) == {"cell": 4, "relation": 4, "exist": 4}
        assert Counter(e.answers[0] for e in asked if e.type == "exist") == {"yes": 2, "no": 2}
        for example in asked:
            (right,), (row, column) = example.answers, cell_of(example.question)
            assert set(example.shown) == set(board.values())
            if example.type == "exist":
                (noun,) = example.names
                assert f" {noun} " in f"{example.question} "
                assert noun in board.values()
                assert right == ("yes" if board[row, column] == noun else "no")
                continue
            assert example.names == ()
            if example.type == "relation":
                longest = max((w for w in WAYS if w in example.question.lower()), key=len)
                row, column = row + WAYS[longest][0], column + WAYS[longest][1]
            assert right == board[row, column]


def test_val_and_test_use_the_plain_wordings_and_train_many() -> None:
    kinds = {s: EmojiDetails(scenes=SOME).examples(s) for s in EmojiDetails.splits}
    for split in ("val", "test"):
        for example in kinds[split]:
            assert any(re.fullmatch(plain, example.question) for plain in PLAIN), example.question
    bare = {
        re.sub(r"\d|" + "|".join(n.name for n in nouns()), "", e.question) for e in kinds["train"]
    }
    assert len(bare) > 60


def test_splits_share_no_scene_with_each_other_or_with_emoji_scenes() -> None:
    boards = {
        split: {SmallScene.make(split, n).things for n in range(SOME)}
        for split in EmojiDetails.splits
    }
    assert len(set().union(*boards.values())) == 3 * SOME
    assert SmallScene.make("val", 0).name == "emoji-details/val/0/0"
    sizes = {split: len(EmojiDetails().examples(split)) for split in EmojiDetails.splits}
    assert sizes["test"] >= 2000
    assert sizes["train"] == 2 * sizes["test"] == 10 * sizes["val"]


def test_scenes_are_the_same_everywhere() -> None:
    lines = [f"{e.type}|{e.question}|{e.answers[0]}" for e in questions(SmallScene.make("test", 0))]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "86ab4b0dad526855"


def test_a_thing_is_small_and_lies_within_its_cell() -> None:
    scene = SmallScene.make("test", 0)
    image = draw(scene)
    assert (image.mode, image.size) == ("RGB", (1024, 1024))
    inked = np.abs(np.asarray(image).astype(int) - np.array(scene.tint)).sum(-1) > 0
    assert len(scene.things) >= 6
    for row in range(4):
        for column in range(4):
            cell = inked[row * 256 : row * 256 + 256, column * 256 : column * 256 + 256]
            thing = scene.at(row, column)
            assert cell.any() == (thing is not None)
            if thing is not None:
                ys, xs = cell.nonzero()
                assert max(np.ptp(ys), np.ptp(xs)) < 1.3 * thing.size <= 63
                assert min(ys.min(), xs.min()) > 0
                assert max(ys.max(), xs.max()) < 255
