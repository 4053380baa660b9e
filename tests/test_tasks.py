"""Examples from JSONL files: every line is checked, and faults name theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys import picture

from ipn_core.errors import DataError
from ipn_core.tasks import JsonlTask, Task

GOOD = {"image": "a.png", "question": "What?", "answer": "dog"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write lines beside two pictures; returns the task."""
    for name in ("a.png", "b.png"):
        picture(ord(name[0])).save(tmp_path / name)

    def lines(*rows: Any) -> JsonlTask:
        text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)
        (tmp_path / "task.jsonl").write_text(text, encoding="utf-8")
        return JsonlTask(tmp_path / "task.jsonl")

    return lines


def test_lines_become_examples_with_pictures_beside_the_file(write: Any) -> None:
    rows = [GOOD, "", {**GOOD, "image": ["a.png", "b.png"], "answer": ["x", "y"], "type": "t"}]
    first, second = write(*rows).examples()
    assert (first.question, first.answers, first.type) == ("What?", ("dog",), "all")
    assert (second.answers, second.type, len(second.images)) == (("x", "y"), "t", 2)
    assert second.images[1].load().tobytes() == picture(ord("b")).tobytes()


def test_an_odd_line_separator_inside_a_text_does_not_split_it(write: Any) -> None:
    line = json.dumps({**GOOD, "question": "a\u2028b"}, ensure_ascii=False)
    (example,) = write(line).examples()
    assert example.question == "a\u2028b"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object, got list"),
        ({**GOOD, "anwser": "x"}, r"unknown key 'anwser' \(did you mean 'answer'\?\)"),
        ({**GOOD, "question": "  "}, "'question' must be a non-empty text, got '  '"),
        ({**GOOD, "answer": None}, "'answer' must be a text or a list of texts, got None"),
        ({**GOOD, "answer": []}, "'answer' must be"),
        ({**GOOD, "answer": [1]}, "'answer' must be"),
        ({**GOOD, "image": 3}, "'image' must be a path or a list of paths, got 3"),
        ({**GOOD, "image": "c.png"}, "no such image: '.*c.png'"),
        ({**GOOD, "image": "a\0.png"}, "no such image"),
        ({**GOOD, "type": 3}, "'type' must be a text, got 3"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(write: Any, row: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"task.jsonl' line 3: {reason}"):
        write(GOOD, "", row, GOOD).examples()


def test_a_file_that_cannot_be_read_is_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: '.*none.jsonl'. Give a task or a JSONL"):
        JsonlTask(tmp_path / "none.jsonl").examples()
    with pytest.raises(DataError, match="holds no examples"):
        write("", " ").examples()
    (tmp_path / "task.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        JsonlTask(tmp_path / "task.jsonl").examples()
    with pytest.raises(DataError, match="cannot be read"):
        JsonlTask(tmp_path).examples()


def test_an_unknown_split_is_refused_with_the_near_one() -> None:
    class Two(Task):
        splits = ("train", "test")

        def examples(self, split: str) -> Any:
            self.check_split(split)

    with pytest.raises(DataError, match=r"unknown split 'tset': .* train, test .*'test'"):
        Two().examples("tset")
