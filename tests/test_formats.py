"""Conversations and documents become prompts whose every answer is learnt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import lesson, stage, training
from toys import picture, toy_model

from ipn_core.errors import ConfigError, DataError, UserError
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.model import IPN
from ipn_core.plan import DynamicSlot, ImageSlot, RequestSlot, Tokens
from ipn_core.plugins import Registry
from ipn_core.prompt import Prompt, Shown
from ipn_core.tasks import Example, open_task
from ipn_core.training.data import prompt_of

pytestmark = pytest.mark.usefixtures("own_training")


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write records beside a folder of two pictures; returns what becomes of them."""
    (tmp_path / "shown").mkdir()
    for name in ("a.png", "b.png"):
        picture(ord(name[0])).save(tmp_path / "shown" / name)

    def read(*rows: Any, name: str = "some.json") -> list[Example]:
        lines = name.endswith("l")
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(list(rows))
        (tmp_path / name).write_text(text, encoding="utf-8")
        folder = {"images": str(tmp_path / "shown")}
        return list(open_task(str(tmp_path / name), folder).examples("all"))

    return read


def talk(*texts: str, image: Any = "a.png", **more: Any) -> dict[str, Any]:
    roles = ("human", "gpt")
    turns = [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "7", **({"image": image} if image else {}), "conversations": turns, **more}


def outline(prompt: Prompt) -> list[tuple[str, list[str], bool]]:
    """Role, content and whether it is learnt, with a picture's name in brackets."""

    def said(one: Any) -> str:
        return f"[{Path(one.image.name).name}]" if isinstance(one, Shown) else one.text

    return [(turn.role, [said(c) for c in turn.content], turn.learn) for turn in prompt.turns]


@pytest.mark.parametrize("name", ["some.json", "some.jsonl"])
@pytest.mark.parametrize("asked", ["<image>\nWhat?", "What?\n<image>", "<image>What?"])
def test_a_conversation_of_one_question_is_a_question(write: Any, asked: str, name: str) -> None:
    """The layout says where its picture stands, as it does for every other question."""
    (example,) = write(talk(asked, "A dog."), name=name)
    assert (example.question, example.answers, example.dialogue) == ("What?", ("A dog.",), None)
    assert example.images[0].load().tobytes() == picture(ord("a")).tobytes()


def test_every_answer_of_a_conversation_is_learnt_in_one_prompt(write: Any) -> None:
    turns = ["<image>\nWhat?", "A dog.", "Why <image> then?\n", "It barks."]
    (example,) = write(talk(*turns, image=["a.png", "b.png"], model="x"))
    assert example.dialogue is not None
    assert outline(example.dialogue) == [
        ("user", ["[a.png]", "What?"], False),
        ("assistant", ["A dog."], True),
        ("user", ["Why ", "[b.png]", " then?"], False),
        ("assistant", ["It barks."], True),
    ]
    assert (example.question, example.answers) == ("Why  then?", ("It barks.",))
    assert example.prompt(("text", "images"), learn=True) == example.dialogue
    assert example.prompt(()).turns == example.dialogue.turns[:-1]


def test_a_system_turn_and_text_without_a_picture_are_kept(write: Any) -> None:
    row = talk("Who?", "I.", image=None)
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    (first, second) = write(row, talk("Who?", "I.", image=None))
    assert outline(first.dialogue)[0] == ("system", ["Be brief."], False)
    assert (second.images, second.question) == ((), "Who?")


def test_a_document_says_what_follows_its_pictures(write: Any) -> None:
    row = {
        "images": [None, "a.png", None, None, "b.png", "a.png", None, "b.png"],
        "texts": ["Intro.", None, "A.", "More.", None, None, "B.", None],
        "metadata": "{}",
    }
    (example,) = write(row)
    expected = [
        ("user", ["Intro.", "[a.png]"], False),
        ("assistant", ["A.\n\nMore."], True),
        ("user", ["[b.png]", "[a.png]"], False),
        ("assistant", ["B."], True),
    ]
    assert outline(example.dialogue) == expected
    assert [Path(p.name).name for p in example.images] == ["a.png", "b.png", "a.png"]
    mmc4 = {
        "text_list": ["Intro.", "A.", "More.", "B."],
        "image_info": [
            {"image_name": name, "matched_text_index": at, "matched_sim": 0.3}
            for name, at in (("b.png", 3), ("a.png", 1), ("a.png", 3))
        ],
    }
    (other,) = write(mmc4, name="some.jsonl")
    assert outline(other.dialogue) == expected


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_a_blank_text_of_a_document_is_none(write: Any, blank: str) -> None:
    """It would teach the empty answer."""
    aligned = {
        "images": [None, "a.png", None, "b.png", None, None, "a.png", None],
        "texts": [blank, blank, "A.", None, blank, "B.", None, blank],
    }
    matched = {
        "text_list": [blank, "A.", blank, "B.", blank],
        "image_info": [
            {"image_name": name, "matched_text_index": at}
            for name, at in (("a.png", 1), ("b.png", 2), ("a.png", 4))
        ],
    }
    for example in write(aligned, matched):
        assert outline(example.dialogue) == [
            ("user", ["[a.png]"], False),
            ("assistant", ["A."], True),
            ("user", ["[b.png]"], False),
            ("assistant", ["B."], True),
        ]


def matching(index: Any) -> dict[str, Any]:
    """An MMC4 document of two texts, whose first picture stands right."""
    infos = [{"image_name": "a.png", "matched_text_index": at} for at in (0, index)]
    return {"id": 7, "text_list": ["x", "y"], "image_info": infos}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (talk("What?", "A dog."), "it has 1 pictures and 0 times <image>"),
        (talk("<image><image>?", "Two."), "it has 1 pictures and 2 times <image>"),
        (talk("<image>What?"), "must take turns and gpt have the last word, got user"),
        (talk(), "have the last word, got nothing"),
        (talk("<image>?", "x", "y", "z", "w"), "last word, got user, assistant, user, assis"),
        (talk("<image>?", " "), "turn 2 must say something, got ' '"),
        (talk("<image>?", "x", image="c.png"), "no such image: '.*c.png'"),
        (talk("<image>?", "x", image="http://a/b.png"), "'http://a/b.png' is an address"),
        (talk("<image>?", "x", image=[3]), r"'image' must be a path or a list of paths, got \[3\]"),
        ({"id": 7, "conversations": ["x"]}, "turn 1 must have 'from' and 'value', got 'x'"),
        ({"id": 7, "conversations": [{"from": "me", "value": "x"}]}, "turn 1 is from 'me', not"),
        (
            {"id": 7, "conversations": [{"from": ["me"], "value": "x"}]},
            "turn 1 is from ..me.., not",
        ),
        ({"id": 7, "images": [None], "texts": []}, "'images' has 1 places and 'texts' 0"),
        ({"id": 7, "images": ["a.png"], "texts": ["x"]}, "place 0 must hold either a picture or"),
        ({"id": 7, "images": [None], "texts": [3]}, "place 0 holds 3, not a text or a path"),
        ({"id": 7, "images": [None, "a.png"], "texts": ["x", None]}, "no text after a picture"),
        ({"id": 7, "images": ["a.png", None], "texts": [None, " "]}, "no text after a picture"),
        ({"id": 7, "images": [None], "texts": [None]}, "place 0 must hold either a picture or"),
        ({"id": 7, "text_list": ["x"], "image_info": [{}]}, "'image_info' must give 'image_name'"),
        (matching(2), "'matched_text_index' must be the number of a text .* from 0 to 1, got 2"),
        (matching(-1), "from 0 to 1, got -1"),
        (matching("0"), "from 0 to 1, got '0'"),
        (matching(None), "from 0 to 1, got None"),
    ],
)
def test_a_broken_record_is_named(write: Any, row: Any, reason: str) -> None:
    good = {"image": "a.png", "question": "What?", "answer": "dog"}
    with pytest.raises(DataError, match=rf"some.json' record 2 \(id 7\): .*{reason}") as caught:
        write(good, row)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=rf"some.jsonl' line 2: .*{reason}"):
        write(good, row, name="some.jsonl")


def test_a_json_file_that_is_no_list_of_records_is_refused(tmp_path: Path, write: Any) -> None:
    with pytest.raises(DataError, match="record 1: expected an object, got int"):
        write(3)
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="expected a list of records, got dict"):
        open_task(str(tmp_path / "x.json")).examples("all")
    (tmp_path / "x.json").write_text('[{"a": 1},\n{')
    with pytest.raises(DataError, match=r"x.json': not valid JSON \(.* line 2 column 2"):
        open_task(str(tmp_path / "x.json")).examples("all")


def test_the_loss_of_a_conversation_is_over_all_its_answers(write: Any, registry: Registry) -> None:
    model = toy_model(registry, "tiny-look")
    turns = ["<image>\nWhat is it?", "ab", "And <image>\nthis one?", "ba"]
    (example,) = write(talk(*turns, image=["a.png", "b.png"]))
    prompt = prompt_of(example, model.config.layout)
    pieces = model.planner.plan(prompt).pieces
    assert sum(isinstance(p, ImageSlot) for p in pieces) == 2
    assert sum(isinstance(p, RequestSlot) for p in pieces) == 2
    assert sum(isinstance(p, DynamicSlot) for p in pieces) == 2
    learnt = [p.ids for p in pieces if isinstance(p, Tokens) and p.learn]
    alone = model.planner.plan(Prompt.ask("x", example.images, answer="ba")).pieces[-1]
    assert learnt[1] == alone.ids
    both, count = model([prompt])
    assert count == sum(map(len, learnt))
    # The first answer's share is what it is without the second turn.
    head = Prompt(prompt.turns[:2])
    tail = Prompt((prompt.turns[0], forgotten(prompt.turns[1]), *prompt.turns[2:]))
    (first, n), (second, m) = model([head]), model([tail])
    assert n + m == count
    torch.testing.assert_close(both, first + second, rtol=1e-4, atol=1e-4)


def forgotten(turn: Any) -> Any:
    """The same turn, kept as the ids that were learnt, but not learnt."""
    return type(turn)(turn.role, turn.content, False)


def test_dialogues_are_trained_on_and_evaluated(write: Any, llm: Path, tmp_path: Path) -> None:
    rows = [
        talk("<image>\nWhat?", "red", "Sure?", "tan"),
        talk("<image>\nWhat?", "sky"),
        {"images": ["a.png", None, "b.png", None], "texts": [None, "ink", None, "sky"]},
    ]
    examples = write(*rows)
    data = [{"task": str(tmp_path / "some.json"), "options": {"images": str(tmp_path / "shown")}}]
    values = lesson(llm, stage("s", "language", steps=2), data=data)
    run = training(values, tmp_path / "run")
    model = IPN.from_pretrained(run.run(), registry=run.registry)
    report = evaluate(model, examples, task="some")
    assert [p.example.answers for p in report.predictions] == [("tan",), ("sky",), ("sky",)]


@pytest.mark.parametrize("objective", ["answer-embedding", "verbalise"])
def test_objectives_that_need_one_question_refuse_dialogues(
    write: Any, llm: Path, tmp_path: Path, objective: str
) -> None:
    write(talk("<image>\nWhat?", "red", "Sure?", "tan"))
    data = [{"task": str(tmp_path / "some.json"), "options": {"images": str(tmp_path / "shown")}}]
    values = lesson(llm, stage("s", objective), data=data)
    with pytest.raises(
        ConfigError, match=f"stage 's': the objective '{objective}' needs one quest"
    ):
        training(values, tmp_path / "run").run()


def test_requests_of_dialogues_are_not_shuffled(write: Any, registry: Registry) -> None:
    examples = write(talk("<image>\nWhat?", "red", "Sure?", "tan"))
    with pytest.raises(UserError, match="some examples are dialogues"):
        evaluate(toy_model(registry, "tiny-look"), examples, shuffled=True)
