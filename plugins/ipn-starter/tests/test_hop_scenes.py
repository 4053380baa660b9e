"""The task `emoji-hops`: every hop and answer is right, and two hops cannot be taken for one."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from ipn_starter.emoji_scenes import EmojiScenes, Scene, anchors_held_out
from ipn_starter.hop_scenes import EmojiHops
from ipn_starter.wordings import RELATIONS

from ipn_core.testing.contracts import TaskContract

STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
WAY = "|".join(STEPS)
ONE = re.compile(rf"What is ({WAY}) the (\w+)\?")
TWO = re.compile(rf"What is ({WAY}) the thing ({WAY}) the (\w+)\?")


class TestEmojiHops(TaskContract):
    name = "emoji-hops"
    options = {"scenes": 6}  # noqa: RUF012 as declared


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_hop_and_every_answer_is_right(split: str) -> None:
    for number in range(60):
        scene = Scene.make(split, number)
        board = {thing.noun.name: (thing.row, thing.column) for thing in scene.things}
        cells = {cell: noun for noun, cell in board.items()}

        def step(noun: str, way: str, board: dict = board, cells: dict = cells) -> str:
            return cells[board[noun][0] + STEPS[way][0], board[noun][1] + STEPS[way][1]]

        for example in EmojiHops().about(scene):
            (answer,) = example.answers
            if example.type == "two":
                last, first, anchor = TWO.fullmatch(example.question).groups()
                assert example.hops == (step(anchor, first),)
                assert answer == step(example.hops[0], last) != anchor
            else:
                way, anchor = ONE.fullmatch(example.question).groups()
                assert example.hops == ()
                assert answer == step(anchor, way)
            assert example.looks == len(example.hops)
            assert example.names == (anchor,)
            assert anchor not in anchors_held_out()


def test_training_uses_other_words_for_both_hops() -> None:
    asked = [e for e in EmojiHops(scenes=200).examples("train") if e.type == "two"]
    plain = sum(bool(TWO.fullmatch(e.question)) for e in asked)
    assert 0.1 < plain / len(asked) < 0.4
    usual = [way for way, _ in RELATIONS.values()]
    assert all(re.search(rf"thing ({'|'.join(usual)}) the ", e.question) for e in asked)


def test_the_pictures_are_those_of_emoji_scenes() -> None:
    for split in EmojiHops.splits:
        mine, theirs = (
            {e.images[0].name: e.images[0] for e in task(scenes=3).examples(split)}
            for task in (EmojiHops, EmojiScenes)
        )
        assert mine.keys() == theirs.keys()
        for name, picture in mine.items():
            assert picture.load().tobytes() == theirs[name].load().tobytes()


def test_no_answer_is_right_by_itself() -> None:
    answers = Counter(e.answers[0] for e in EmojiHops(scenes=300).examples("val"))
    assert max(answers.values()) < 0.03 * sum(answers.values())
