from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_refused
from PIL import Image

from ipn_core import hookimpl
from ipn_core.plugins import add_plugin, get_registry


def test_eval_json_of_a_file(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("eval", home / "some.jsonl", "-m", home / "model", "--json")
    assert run.code == 0
    found = json.loads(run.out)
    assert list(found) == ["task", "split", "n", "accuracy", "ci95", "by_type", "seconds"]
    assert (found["task"], found["split"], found["n"]) == (str(home / "some.jsonl"), "all", 6)
    assert {t: row["n"] for t, row in found["by_type"].items()} == {"exist": 4, "other": 2}
    assert list(found["by_type"]["exist"]) == ["n", "accuracy", "ci95"]


def test_eval_limit_shuffled_and_table(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("eval", home / "some.jsonl", "-m", home / "model", "--limit", "2", "--shuffled")
    assert run.code == 0
    for part in ("exist", "all", "guessing", "95 % interval", "requests shuffled"):
        assert part in run.out
    assert "other " not in run.out
    run = ipn("eval", home / "some.jsonl", "-m", home / "model", "--shuffled", "--json")
    assert json.loads(run.out)["guess"]["accuracy"] == 1.0


def test_eval_of_a_registered_task(home: Path, ipn: Callable[..., Run]) -> None:
    from ipn_core import Example, Picture, Task

    class Toy(Task):
        splits = ("test", "hard")

        def examples(self, split: str) -> list[Example]:
            self.check_split(split)
            image = Picture("p", lambda: Image.new("RGB", (9, 9)))
            return [Example(f"{split} {i}?", ("yes",), (image,)) for i in range(3)]

    class Plugin:
        @hookimpl
        def register(self, registry: object) -> None:
            registry.task("toy-cli-task", Toy)  # type: ignore[attr-defined]

    if "toy-cli-task" not in get_registry().entries("task"):
        add_plugin(get_registry(), "toy-cli", Plugin())
    model = ("-m", home / "model", "--json")
    assert json.loads(ipn("eval", "toy-cli-task", *model).out)["split"] == "test"
    assert json.loads(ipn("eval", "toy-cli-task", "--split", "hard", *model).out)["n"] == 3
    assert_refused(ipn("eval", "toy-cli-task", "--split", "hart"), "did you mean 'hard'?")
    assert_refused(ipn("eval", "toy-cli-tsk"), "unknown task", "did you mean 'toy-cli-task'?")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: expected an object, got list"),
        ('{"image": "scene.png", "question": "q"}', "line 2: 'answer' must be"),
        ('{"image": "scene.png", "question": "", "answer": "a"}', "line 2: 'question' must be"),
        ('{"image": "none.png", "question": "q", "answer": "a"}', "line 2: no such image"),
        ('{"imag": "x", "question": "q", "answer": "a"}', "did you mean 'image'?"),
    ],
)
def test_a_malformed_line_is_named(
    line: str, part: str, home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    shutil.copy(home / "scene.png", tmp_path / "scene.png")
    good = '{"image": "scene.png", "question": "q", "answer": "a"}'
    (tmp_path / "bad.jsonl").write_text(f"{good}\n{line}\n")
    assert_refused(ipn("eval", tmp_path / "bad.jsonl", "-m", home / "model"), part, "bad.jsonl")


def test_eval_names_a_file_that_is_not_there(ipn: Callable[..., Run]) -> None:
    assert_refused(ipn("eval", "none.jsonl"), "no such file: 'none.jsonl'")


def test_eval_names_the_line_of_a_picture_that_does_not_decode(
    home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    shutil.copy(home / "scene.png", tmp_path / "scene.png")
    (tmp_path / "text.png").write_text("no picture")
    rows = [{"image": image, "question": "q", "answer": "a"} for image in ("scene.png", "text.png")]
    # A byte order mark, as editors on Windows write one.
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8-sig")
    run = ipn("eval", tmp_path / "a.jsonl", "-m", home / "model")
    assert_refused(run, "a.jsonl' line 2: ", "text.png' is not an image")


def test_eval_of_a_name_too_long_for_a_file(ipn: Callable[..., Run]) -> None:
    assert_refused(ipn("eval", "x" * 5000), "unknown task 'xxx")
    assert_refused(ipn("eval", "x" * 5000 + ".jsonl"), "cannot be read (File name too long)")
