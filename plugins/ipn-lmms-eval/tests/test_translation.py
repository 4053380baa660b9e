"""Messages and generation options of lmms-eval, and tasks written for it, without lmms-eval."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ipn_lmms_eval.local import pictures, score, write_task
from ipn_lmms_eval.options import cut, to_options
from ipn_lmms_eval.prompts import to_prompt
from PIL import Image

from ipn_core.errors import DataError, GenerationOptionError, UserError
from ipn_core.generation import check_options
from ipn_core.prompt import Prompt

RED = Image.new("RGB", (4, 4), "red")
FIRST, LAST = ("images", "text", "look"), ("text", "look", "images")


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def image(url: Any) -> dict[str, Any]:
    return {"type": "image", "url": url}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


# -- messages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [FIRST, LAST])
def test_a_question_after_its_pictures_is_asked_as_in_training(order: tuple[str, ...]) -> None:
    asked = to_prompt([user(image(RED), image(RED), text("Same?"))], order)
    assert asked == Prompt.ask("Same?", [RED, RED], order=order)


def test_pictures_among_the_text_stay_where_they_are() -> None:
    asked = to_prompt([user(text("Is "), image(RED), text(" red?"))], LAST)
    assert asked == Prompt.user("Is ", RED, " red?")


def test_examples_before_the_question_are_earlier_turns() -> None:
    system = {"role": "system", "content": "Answer in a word."}
    shot = [user(image(RED), text("Colour?")), {"role": "assistant", "content": [text("red")]}]
    asked = to_prompt([system, *shot, user(image(RED), text("And this?"))], FIRST)
    assert [turn.role for turn in asked.turns] == ["system", "user", "assistant", "user"]
    assert [turn.text for turn in asked.turns][::2] == ["Answer in a word.", "red"]
    assert asked.images == (RED, RED)


def test_a_picture_may_be_a_file_or_written_into_the_message() -> None:
    data = io.BytesIO()
    RED.save(data, "PNG")
    inline = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    asked = to_prompt([user(image("a/b.png"), image(inline), text("?"))], FIRST)
    assert asked.images == (Path("a/b.png"), data.getvalue())


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (user({"type": "video", "url": "a.mp4"}, text("?")), "shows video, and IPN models read"),
        (user({"type": "audio", "url": "a.wav"}, text("?")), "shows audio"),
        (user(image("https://a.example/b.png"), text("?")), "would have to be fetched"),
        (user(image("data:image/png;base64,!"), text("?")), "not valid base64"),
        ({"role": "assistant", "content": [image(RED)]}, "only the user's may"),
    ],
)
def test_what_a_model_cannot_read_is_refused(message: dict[str, Any], said: str) -> None:
    with pytest.raises((UserError, DataError), match=said):
        to_prompt([message], FIRST)


# -- options ---------------------------------------------------------------------------------------

GREEDY = {"do_sample": False, "max_new_tokens": 1024}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, GREEDY),
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1},
            {"max_new_tokens": 16, "num_beams": 1, "do_sample": False},
        ),
        (
            {"temperature": 0.7, "do_sample": False},
            {**GREEDY, "do_sample": True, "temperature": 0.7},
        ),
        ({"temperature": 0.0, "do_sample": True, "top_k": 5}, GREEDY),
        ({"do_sample": True, "top_p": None}, {**GREEDY, "do_sample": True}),
        ({"until": ["\n\n", ""]}, {**GREEDY, "stop_strings": ["\n\n"]}),
        ({"until": "###"}, {**GREEDY, "stop_strings": ["###"]}),
        ({"until": None, "image_aspect_ratio": "original"}, GREEDY),
        ({"max_gen_toks": 5}, {**GREEDY, "max_new_tokens": 5}),
    ],
)
def test_options_become_those_of_generate(given: dict[str, Any], options: dict[str, Any]) -> None:
    found, stops = to_options(given)
    assert found == options
    assert stops == options.get("stop_strings", [])
    check_options(found)


def test_an_option_that_nobody_knows_is_refused_by_the_model() -> None:
    with pytest.raises(GenerationOptionError, match="unknown generation option 'lenght'"):
        check_options(to_options({"lenght": 1})[0])


def test_an_answer_ends_at_the_first_stop() -> None:
    assert cut("red\n\nblue ### green", ["###", "\n\n"]) == "red"
    assert cut("red", ["###"]) == "red"
    assert cut("red", []) == "red"


# -- tasks -----------------------------------------------------------------------------------------


def test_a_task_is_written_with_its_pictures(tmp_path: Path) -> None:
    assert write_task("easy-vqa", tmp_path, limit=3) == "ipn-easy-vqa"
    rows = [json.loads(line) for line in (tmp_path / "ipn-easy-vqa.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows[0]["question"] == "what is the red shape?"
    (shown,) = pictures(rows[0])
    assert shown.size == (64, 64)
    assert len(list((tmp_path / "pictures").iterdir())) == len({r["pictures"][0] for r in rows})
    assert "test_split: test" in (tmp_path / "ipn-easy-vqa.yaml").read_text()


def test_tasks_in_one_folder_keep_their_own_questions(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    for name in ("one", "questions"):  # the second is not overwritten by what is made of it
        asked = {"image": "red.png", "question": f"{name}?", "answer": "red"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(asked))
    for name in ("one", "questions"):
        made = write_task(str(tmp_path / f"{name}.jsonl"), tmp_path)
    for name in ("one", "questions"):
        lines = (tmp_path / f"ipn-{name}.yaml").read_text().splitlines()
        (told,) = (line.split(": ", 1)[1] for line in lines if line.startswith("    test: "))
        assert json.loads(Path(json.loads(told)).read_text())["question"] == f"{name}?"
    assert made == "ipn-questions"
    assert "image" in json.loads((tmp_path / "questions.jsonl").read_text())


def test_an_answer_is_scored_as_by_ipn_eval() -> None:
    assert score({"answers": ["Gray", "grey"]}, ["grey."]) == {"accuracy": 1.0}
    assert score({"answers": ["Gray", "grey"]}, ["a grey one"]) == {"accuracy": 0.0}


def test_the_command_writes_a_file_of_questions_and_says_what_is_wrong(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    asked = {"image": "red.png", "question": "Colour?", "answer": "red"}
    turns = [{"from": "human", "value": "<image>Colour?"}, {"from": "gpt", "value": "red"}] * 2
    turns[2] = {"from": "human", "value": "Sure?"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(asked))
    (tmp_path / "talks.json").write_text(json.dumps([{"image": "red.png", "conversations": turns}]))
    command = [sys.executable, "-m", "ipn_lmms_eval"]

    def run(name: str, out: str = "out", *more: str) -> subprocess.CompletedProcess[str]:
        words = [*command, str(tmp_path / name), str(tmp_path / out), *more]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    assert run("mine.jsonl").stdout == "ipn-mine\n"
    for refused, why in (
        (run("talks.json"), "holds dialogues, such as the one that ends with 'Sure?'"),
        (run("mine.jsonl", "out", "--limit", "-1"), "limit must be at least 1, got -1: it is how"),
        (run("mine.jsonl", "red.png/out"), "red.png' is a file. Name a folder"),
    ):
        assert (refused.returncode, refused.stdout) == (2, "")
        assert re.fullmatch(rf"ipn_lmms_eval: .*{re.escape(why)}.*\n", refused.stderr)
