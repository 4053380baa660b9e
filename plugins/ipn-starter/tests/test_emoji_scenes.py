"""The task `emoji-scenes`: the same everywhere, answered rightly, and its splits kept apart."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
from ipn_starter.emoji_scenes import (
    NUMBERS,
    EmojiScenes,
    Scene,
    anchors_held_out,
    draw,
    nouns,
    questions,
)
from ipn_starter.wordings import DEVELOPMENT, HELD_OUT, KEPT_OUT, RELATIONS, TRAINED

from ipn_core.errors import DataError
from ipn_core.tasks import Example
from ipn_core.testing.contracts import TaskContract

SPLITS = EmojiScenes.splits
SOME = 150
NAMES = {noun.name for noun in nouns()}
WAYS = {way: relation for relation, ways in RELATIONS.items() for way in ways}
STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
CATEGORIES = {"animals": "animal", "food items": "food", "vehicles": "vehicle", "objects": "object"}
GAPS = {
    "r": r"(?P<r>\d)",
    "c": r"(?P<c>\d)",
    "rw": "(?P<rw>one|two|three|four)",
    "cw": "(?P<cw>one|two|three|four)",
    "rth": r"(?P<rth>first|second|third|fourth)",
    "cth": r"(?P<cth>first|second|third|fourth)",
    "rel": "(?P<rel>" + "|".join(sorted(WAYS, key=len, reverse=True)) + ")",
    "Rel": "(?P<rel>" + "|".join(way.capitalize() for way in WAYS) + ")",
    "noun": "(?P<noun>[a-z]+)",
    "a": "(?:an? )?(?P<noun>[a-z]+)",
    "axis": "(?P<axis>row|column)",
    "things": "(?P<things>" + "|".join(CATEGORIES) + ")",
    "Things": "(?P<things>" + "|".join(name.capitalize() for name in CATEGORIES) + ")",
}


class TestEmojiScenes(TaskContract):
    name = "emoji-scenes"
    options = {"scenes": 12}  # noqa: RUF012 as declared


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    return {split: [Scene.make(split, n) for n in range(SOME)] for split in SPLITS}


def patterns(wordings: dict[str, tuple[str, ...]]) -> dict[str, list[re.Pattern[str]]]:
    return {
        kind: [
            re.compile(re.sub(r"\\{(\w+)\\}", lambda m: GAPS[m[1]], re.escape(text)))
            for text in texts
        ]
        for kind, texts in wordings.items()
    }


WORDINGS = {"paraphrase": HELD_OUT, "val-paraphrase": DEVELOPMENT}
KNOWN = {split: patterns(WORDINGS.get(split, TRAINED)) for split in SPLITS}


def read(split: str, example: Example) -> dict[str, str]:
    """What a question says, by the gaps of its wording."""
    text = example.question.replace("Are there any ", "Is there ")
    found = [m for p in KNOWN[split][example.type] if (m := p.fullmatch(text))]
    assert len(found) == 1, example.question
    return found[0].groupdict()


def answer(scene: Scene, kind: str, said: dict[str, str]) -> str:
    """The answer from the scene alone, worked out the slow way."""
    board = {(t.row, t.column): t.noun for t in scene.things}
    where = {noun.name: cell for cell, noun in board.items()}
    ordinals, words = ("first", "second", "third", "fourth"), ("one", "two", "three", "four")
    if kind == "cell":
        for row, column, names in (("rth", "cth", ordinals), ("rw", "cw", words)):
            if row in said:
                return board[names.index(said[row]), names.index(said[column])].name
        return board[int(said["r"]) - 1, int(said["c"]) - 1].name
    if kind == "relation":
        (row, column), (down, right) = where[said["noun"]], STEPS[WAYS[said["rel"].lower()]]
        return board[row + down, column + right].name
    if kind == "exist":
        return "yes" if said["noun"] in where else "no"
    if kind == "where":
        row, column = where[said["noun"]]
        return NUMBERS[1 + (row if said["axis"] == "row" else column)]
    return NUMBERS[sum(n.category == CATEGORIES[said["things"].lower()] for n in board.values())]


def anchors(examples: Sequence[Example], split: str) -> set[str]:
    return {read(split, e)["noun"] for e in examples if e.type == "relation"}


def test_scenes_are_the_same_everywhere() -> None:
    asked = questions(Scene.make("test", 0))
    lines = [f"{e.type}|{e.question}|{e.answers[0]}" for e in asked]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "c069ff01901792df"
    code = (
        "from ipn_starter.emoji_scenes import *\n"
        "from ipn_starter.emoji_scenes import questions\n"
        "print([(e.type, e.question, e.answers) for e in questions(Scene.make('test', 0))])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == str([(e.type, e.question, e.answers) for e in asked])


def test_the_table_of_nouns() -> None:
    assert len(NAMES) == len({n.emoji for n in nouns()}) == 80
    assert {n.category for n in nouns()} == set(CATEGORIES.values())
    assert all(name.isalpha() and name.islower() for name in NAMES)
    assert len(anchors_held_out()) == 16
    assert anchors_held_out() == {noun.name for noun in nouns()[4::5]}


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_hold_six_to_twelve_different_nouns(
    scenes: dict[str, list[Scene]], split: str
) -> None:
    counts = set()
    for scene in scenes[split]:
        counts.add(len(scene.things))
        assert len({t.noun.name for t in scene.things}) == len(scene.things)
        assert len({(t.row, t.column) for t in scene.things}) == len(scene.things)
        assert all(0 <= t.row < 4 and 0 <= t.column < 4 for t in scene.things)
        assert all(40 <= t.size <= 48 and max(map(abs, t.shift)) <= 4 for t in scene.things)
        assert all(225 <= tint <= 255 for tint in scene.tint)
    assert counts == set(range(6, 13))


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_right_and_one_word(scenes: dict[str, list[Scene]], split: str) -> None:
    for scene in scenes[split]:
        for example in questions(scene):
            (right,) = example.answers
            assert right == answer(scene, example.type, read(split, example)), example.question
            assert right.isalpha()
            assert right in NAMES | set(NUMBERS) | {"yes", "no"}
            assert set(example.shown) == {t.noun.name for t in scene.things}
            named = read(split, example).get("noun")
            assert example.names == ((named,) if named else ())


@pytest.mark.parametrize("split", [s for s in SPLITS if s != "composition"])
def test_each_kind_is_asked_as_often_and_half_of_what_is_asked_for_is_there(split: str) -> None:
    examples = EmojiScenes(scenes=SOME).examples(split)
    kinds = {kind: [e for e in examples if e.type == kind] for kind in TRAINED}
    assert {len(kinds[k]) for k in ("cell", "exist", "where")} == {2 * SOME}
    assert len(kinds["count"]) == (4 if split == "train" else 2) * SOME
    assert 1.9 * SOME < len(kinds["relation"]) <= 2 * SOME
    assert sum(e.answers == ("no",) for e in kinds["exist"]) == SOME


def test_held_out_anchors_are_composition_alone() -> None:
    for split in SPLITS:
        found = anchors(EmojiScenes(scenes=SOME).examples(split), split)
        if split == "composition":
            assert found == anchors_held_out()
        else:
            assert found
            assert not found & anchors_held_out()
            assert len(found) > 50


def test_every_question_of_composition_is_a_relation() -> None:
    assert {e.type for e in EmojiScenes(scenes=SOME).examples("composition")} == {"relation"}


@pytest.mark.parametrize(
    ("split", "held_out"), [("paraphrase", HELD_OUT), ("val-paraphrase", DEVELOPMENT)]
)
def test_held_out_wordings_are_never_trained(
    split: str, held_out: dict[str, tuple[str, ...]]
) -> None:
    for kind, texts in held_out.items():
        assert not set(texts) & set(TRAINED[kind])
        assert len(texts) >= 3
        assert len(TRAINED[kind]) >= 4
    asked = {s: {e.question for e in EmojiScenes(scenes=SOME).examples(s)} for s in SPLITS}
    others = set().union(*(questions for s, questions in asked.items() if s != split))
    assert not asked[split] & others
    for question in asked[split]:
        assert not any(p.fullmatch(question) for ps in KNOWN["train"].values() for p in ps)


def test_what_paraphrase_turns_on_is_kept_out_of_all_other_wordings() -> None:
    for texts in (*TRAINED.values(), *DEVELOPMENT.values()):
        for text in texts:
            assert not KEPT_OUT & set(re.findall("[a-z]+", text.lower())), text
    turning = [set(re.findall("[a-z]+", t.lower())) & KEPT_OUT for t in sum(HELD_OUT.values(), ())]
    # Two of them are built of common words, in an order that training does not use.
    assert sum(not words for words in turning) <= 2


def test_the_splits_for_looking_and_testing_use_the_plain_wordings() -> None:
    asked = {s: {e.question for e in EmojiScenes(scenes=SOME).examples(s)} for s in SPLITS}
    plain = patterns({kind: texts[:1] for kind, texts in TRAINED.items()})
    for split in ("val", "test", "composition"):
        for question in asked[split]:
            assert any(p.fullmatch(question) for ps in plain.values() for p in ps)


def test_splits_are_large_enough_and_share_no_scene() -> None:
    task = EmojiScenes()
    sizes = {split: len(task.examples(split)) for split in SPLITS if split != "train"}
    assert sizes["test"] >= 2000
    assert sizes["paraphrase"] >= 2000
    assert sizes["composition"] >= 1000
    boards = {
        split: {Scene.make(split, n).things for n in range(SOME)} for split in ("train", *sizes)
    }
    assert len(set().union(*boards.values())) == SOME * len(boards)


def test_another_seed_gives_other_scenes_of_the_same_kind() -> None:
    first, other = (EmojiScenes(scenes=20, seed=seed).examples("test") for seed in (0, 1))
    assert [e.question for e in first] != [e.question for e in other]
    assert not {e.images[0].name for e in first} & {e.images[0].name for e in other}


def test_a_picture_is_drawn_as_the_scene_says() -> None:
    scene = Scene.make("test", 0)
    image = draw(scene)
    assert (image.mode, image.size) == ("RGB", (256, 256))
    pixels = np.asarray(image).astype(int)
    assert np.array_equal(pixels, np.asarray(draw(scene)))
    inked = np.abs(pixels - np.array(scene.tint)).sum(-1) > 0
    for row in range(4):
        for column in range(4):
            cell = inked[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
            assert (cell.mean() > 0.1) == (scene.at(row, column) is not None)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(DataError, match="'scenes' must be at least 1, got 0"):
        EmojiScenes(scenes=0)
    with pytest.raises(DataError, match=r"unknown split 'trian'.*did you mean 'train'"):
        EmojiScenes().examples("trian")
