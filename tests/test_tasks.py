"""Examples from JSONL files: every line is checked, and faults name theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys import picture

from ipn_core.errors import ConfigError, DataError, PluginError, UnknownNameError
from ipn_core.file_task import FileTask
from ipn_core.hooks import hookimpl
from ipn_core.plugins import Registry, add_plugin, get_registry
from ipn_core.tasks import Example, Task, open_task
from ipn_core.training.config import DataConfig
from ipn_core.training.data import Data

GOOD = {"image": "a.png", "question": "What?", "answer": "dog"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write lines beside two pictures; returns the task."""
    for name in ("a.png", "b.png"):
        picture(ord(name[0])).save(tmp_path / name)

    def lines(*rows: Any) -> FileTask:
        text = [json.dumps(r) if isinstance(r, (dict, list)) else r for r in rows]
        content = b"\n".join(t.encode() if isinstance(t, str) else t for t in text)
        (tmp_path / "task.jsonl").write_bytes(content)
        return FileTask(tmp_path / "task.jsonl")

    return lines


def test_lines_become_examples_with_pictures_beside_the_file(write: Any) -> None:
    rows = [GOOD, "", {**GOOD, "image": ["a.png", "b.png"], "answer": ["x", "y"], "type": "t"}]
    first, second = write(*rows).examples()
    assert (first.question, first.answers, first.type) == ("What?", ("dog",), "all")
    assert (second.answers, second.type, len(second.images)) == (("x", "y"), "t", 2)
    assert second.images[1].load().tobytes() == picture(ord("b")).tobytes()


def test_a_line_says_how_often_to_look_and_what_to_find(write: Any) -> None:
    rows = [GOOD, {"looks": 2}, {"hops": "cat"}, {"hops": ["cat", "car"]}, {"hops": [], "looks": 1}]
    examples = write(*({**GOOD, **row} for row in rows)).examples()
    found = [(example.looks, example.hops) for example in examples]
    assert found == [(0, ()), (2, ()), (1, ("cat",)), (2, ("cat", "car")), (1, ())]


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
        ({**GOOD, "image": "x" * 5000}, "no such image"),
        ({**GOOD, "type": 3}, "'type' must be a text, got 3"),
        ({**GOOD, "looks": -1}, "'looks' must be a whole number of at least 0, got -1"),
        ({**GOOD, "looks": True}, "'looks' must be a whole number of at least 0, got True"),
        ({**GOOD, "hops": [1]}, r"'hops' must be a text or a list of texts, got \[1\]"),
        ("[" * 100_000, "not valid JSON"),
        ('{"image": "a.png", "looks": ' + "9" * 5000 + "}", "not valid JSON"),
        (
            '{"image": "a.png", "question": "a\\ud83d", "answer": "b"}',
            r"\\ud83d is half of a character. Write both halves",
        ),
        (b'{"image": "a.png", "question": "\xff", "answer": "b"}', "is not UTF-8 text"),
    ],
)
def test_a_malformed_line_is_named_by_its_number(write: Any, row: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"task.jsonl' line 3:? {reason}"):
        write(GOOD, "", row, GOOD).examples()


def test_a_picture_that_does_not_decode_is_named_by_its_line(write: Any, tmp_path: Path) -> None:
    task = write(GOOD, "", {**GOOD, "image": "b.png"})
    (tmp_path / "b.png").write_text("no picture")
    first, second = task.examples()
    assert first.images[0].load().size == (24, 24)
    with pytest.raises(DataError, match=r"task.jsonl' line 3: '.*b.png' is not an image"):
        second.images[0].load()


def test_a_byte_order_mark_is_no_part_of_the_first_line(write: Any, tmp_path: Path) -> None:
    task = write(GOOD)
    task.path.write_bytes(b"\xef\xbb\xbf" + task.path.read_bytes())
    assert [e.question for e in task.examples()] == ["What?"]


def test_a_file_that_cannot_be_read_is_refused(write: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: '.*none.jsonl'. Give a task or a JSONL"):
        FileTask(tmp_path / "none.jsonl").examples()
    with pytest.raises(DataError, match="holds no examples"):
        write("", " ").examples()
    (tmp_path / "task.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(
        DataError, match=r"task.jsonl' line 1 is not UTF-8 text \(.*\). Save it as UTF-8"
    ):
        FileTask(tmp_path / "task.jsonl").examples()
    (tmp_path / "task.json").write_bytes(b"[\n\xff]")
    with pytest.raises(DataError, match=r"task.json' line 2 is not UTF-8 text"):
        FileTask(tmp_path / "task.json").examples()
    with pytest.raises(DataError, match="cannot be read"):
        FileTask("a\0.jsonl").examples()
    with pytest.raises(DataError, match="cannot be read"):
        FileTask(tmp_path).examples()


def test_an_unknown_split_is_refused_with_the_near_one() -> None:
    class Two(Task):
        splits = ("train", "test")

        def examples(self, split: str) -> Any:
            self.check_split(split)

    with pytest.raises(DataError, match=r"unknown split 'tset': .* train, test .*'test'"):
        Two().examples("tset")


class Sized(Task):
    """A task with options."""

    splits = ("train", "held-out", "test", "testing")

    def __init__(self, count: int | None = None, *, name: str = "a", loud: bool = False) -> None:
        self.count, self.name, self.loud = count, name, loud
        if name == "bad":
            raise TypeError("of its own")

    def examples(self, split: str) -> list[Example]:
        self.check_split(split)
        return [Example("What?", ("dog",), ())]


class HeldOut(Sized):
    test_splits = ("held-out",)


def plain(needed: NoSuchName) -> Sized:  # noqa: F821  # as one that only type checkers import
    return Sized(needed)


class Plugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.task("sized", Sized)
        registry.task("held-out", HeldOut)
        registry.task("plain", plain)
        registry.task("ready", Sized(3))


@pytest.fixture(scope="module")
def tasks() -> Registry:
    registry = Registry()
    add_plugin(registry, "tasks", Plugin())
    return registry


def test_options_come_as_the_types_that_the_task_asks_for(tasks: Registry) -> None:
    opened: Any = open_task("sized", {"count": "3", "loud": 1}, tasks)
    assert (opened.count, opened.name, opened.loud) == (3, "a", True)
    assert open_task("sized", {"count": None}, tasks).count is None  # type: ignore[attr-defined]
    plainly: Any = open_task("plain", {"needed": "kept as it is"}, tasks)
    assert plainly.count == "kept as it is"


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        (
            "sized",
            {"cuont": 1},
            "task 'sized' has no option 'cuont': allowed are count, name, loud "
            "(did you mean 'count'?).",
        ),
        (
            "sized",
            {"count": "many"},
            "option 'count' of task 'sized': input should be a valid integer, unable to parse "
            "string as an integer, got 'many'.",
        ),
        ("sized", {"count": [1]}, "option 'count' of task 'sized': input should be a valid int"),
        (
            "plain",
            {},
            "task 'plain': missing a required argument: 'needed'. Its options are needed",
        ),
        ("easy-vqa", {"count": 1}, "task 'easy-vqa' has no option 'count': it takes none."),
        ("ready", {"count": 1}, "task 'ready' takes no options, got count."),
    ],
)
def test_wrong_options_are_refused(
    tasks: Registry, name: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        open_task(name, options, tasks if name in tasks.entries("task") else None)
    assert str(caught.value).startswith(text)


def test_a_task_that_fails_by_itself_is_not_blamed_on_its_options(tasks: Registry) -> None:
    with pytest.raises(PluginError, match=r"task 'sized' of tasks local .*TypeError: of its own"):
        open_task("sized", {"name": "bad"}, tasks)


def test_a_name_too_long_for_a_file_is_an_unknown_task(tasks: Registry) -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown task 'x+': installed are .*sized.* Name one of them or"
    ):
        open_task("x" * 5000, None, tasks)
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        open_task(f"{'x' * 5000}.jsonl", None, tasks).examples("all")


@pytest.mark.parametrize(
    ("name", "tests", "others"),
    [
        ("sized", ("test", "testing"), "train or held-out"),
        ("held-out", ("held-out",), "train or test or testing"),
        ("emoji-scenes", ("test", "paraphrase", "composition"), "train or val or val-paraphrase"),
        ("easy-vqa", ("test",), "train or val"),
    ],
)
def test_training_refuses_the_splits_that_a_task_keeps_for_testing(
    tasks: Registry, name: str, tests: tuple[str, ...], others: str
) -> None:
    registry = tasks if name in tasks.entries("task") else get_registry()
    assert open_task(name, None, registry).test_splits == tests
    for split in tests:
        config = DataConfig(task=name, split=split)
        with pytest.raises(ConfigError, match=f"split '{split}' is a test .* Use {others}.$"):
            Data(config, registry, training=True)


@pytest.mark.parametrize("split", ["train", "val", "val-paraphrase"])
def test_the_other_splits_may_be_learnt_from_and_validated_on(split: str) -> None:
    config = DataConfig(task="emoji-scenes", split=split, options={"scenes": 1}, limit=2)
    assert len(Data(config, get_registry(), training=True).examples) == 2
