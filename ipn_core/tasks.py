"""Tasks: pictures, questions and answers, from a plugin or from a JSONL file."""

from __future__ import annotations

import inspect
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipn_core.errors import (
    ConfigError,
    DataError,
    ImageError,
    IPNError,
    PluginError,
    UnknownNameError,
    near,
)
from ipn_core.images import load_image

if TYPE_CHECKING:
    from PIL import Image

    from ipn_core.plugins import Component, Registry

__all__ = ["Example", "JsonlTask", "Picture", "Task", "open_task"]

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that is opened when it is needed.

    Attributes:
        name: says the same of the same picture within a task, such as its path.
        load: returns it as RGB.
    """

    name: str
    load: Callable[[], Image.Image]


@dataclass(frozen=True, slots=True)
class Example:
    """One question about zero or more pictures.

    Attributes:
        question: the user's words.
        answers: the accepted answers; the first one is the target in training.
        images: the pictures, in the order in which the prompt shows them.
        type: the kind of question, for reports.
        names: the things in the pictures that the question names, for objectives that align
            requests with pictures; empty where that is not known.
        shown: all such things in its pictures.
    """

    question: str
    answers: tuple[str, ...]
    images: tuple[Picture, ...]
    type: str = "all"
    names: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


class Task(ABC):
    """A source of examples, registered with `registry.task(name, ...)`.

    Attributes:
        splits: the names that `examples` takes.
        default_split: what `ipn eval` asks where no split is named.
    """

    splits: tuple[str, ...] = ("test",)
    default_split: str = "test"

    @property
    def test_splits(self) -> tuple[str, ...]:
        """The splits that training refuses to learn from or to choose by.

        By default those whose names start with "test"; a task with others assigns their names.
        """
        return tuple(split for split in self.splits if split.startswith("test"))

    @abstractmethod
    def examples(self, split: str) -> Sequence[Example]:
        """Return the examples of a split, the same and in the same order everywhere.

        Raises:
            DataError: there is no such split, or its data is malformed.
        """

    def check_split(self, split: str) -> None:
        """Raise `DataError` unless `split` is one of `splits`."""
        if split not in self.splits:
            raise DataError(
                f"unknown split '{split}': this task has {', '.join(self.splits)}"
                f"{near(split, self.splits)}."
            )


class JsonlTask(Task):
    """Examples from a file with one JSON object a line.

    Each line is `{"image": path relative to the file, "question": …, "answer": … or […],
    "type": optional}`; `image` may be a list of paths.
    """

    splits = ("all",)
    default_split = "all"
    keys = ("image", "question", "answer", "type")

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def examples(self, split: str = "all") -> Sequence[Example]:
        """Return the file's examples; every line is checked before the first is returned."""
        self.check_split(split)
        try:
            # Editors on Windows begin a file with a byte order mark.
            text = self.path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            raise DataError(f"no such file: '{self.path}'. Give a task or a JSONL file.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"'{self.path}' is not UTF-8 text ({error}).") from None
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be read ({error.strerror}).") from None
        examples = [
            self._parse(number, line)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
        if not examples:
            raise DataError(f"'{self.path}' holds no examples.")
        return examples

    def _parse(self, number: int, line: str) -> Example:
        def fail(why: str) -> DataError:
            wanted = '{"image": "a.png", "question": "…", "answer": "…"}'
            return DataError(f"'{self.path}' line {number}: {why}. Each line is like {wanted}.")

        try:
            row: Any = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise fail(f"not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise fail(f"expected an object, got {type(row).__name__}")
        for key in row:
            if key not in self.keys:
                raise fail(f"unknown key '{key}'{near(key, self.keys)}")
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise fail(f"'question' must be a non-empty text, got {question!r}")
        answers = self._texts(row.get("answer"))
        if not answers:
            raise fail(f"'answer' must be a text or a list of texts, got {row.get('answer')!r}")
        paths = self._texts(row.get("image"))
        if not paths:
            raise fail(f"'image' must be a path or a list of paths, got {row.get('image')!r}")
        kind = row.get("type", "all")
        if not isinstance(kind, str) or not kind:
            raise fail(f"'type' must be a text, got {kind!r}")
        pictures = tuple(self._picture(path, number, fail) for path in paths)
        return Example(question, answers, pictures, kind)

    @staticmethod
    def _texts(value: Any) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [value]
        return tuple(values) if all(isinstance(v, str) and v.strip() for v in values) else ()

    def _picture(self, name: str, number: int, fail: Callable[[str], DataError]) -> Picture:
        path = self.path.parent / name
        if not os.path.isfile(path):
            raise fail(f"no such image: '{path}'")

        def load() -> Image.Image:
            # Decoding a large file's pictures beforehand would take as long as answering.
            try:
                return load_image(path)
            except ImageError as error:
                raise DataError(f"'{self.path}' line {number}: {error}") from error

        return Picture(str(path), load)


def open_task(
    name: str, options: Mapping[str, Any] | None = None, registry: Registry | None = None
) -> Task:
    """Return a registered task, or one that reads a JSONL file.

    Args:
        name: a name that `ipn plugins` lists, or a path; a name wins.
        options: of the task's class; a file takes none.
        registry: where names are looked up, by default everything installed.

    Raises:
        UnknownNameError: it is neither.
        ConfigError: the task takes no such option, or not such a value.
        PluginError: the task cannot be built.
    """
    from ipn_core.plugins import get_registry

    known = (registry or get_registry()).entries("task")
    if name in known:
        target = known[name].load()
        if isinstance(target, Task):
            if options:
                raise ConfigError(f"task '{name}' takes no options, got {', '.join(options)}.")
            return target
        return _build(known[name], target, options or {})
    # `os.path` instead of `Path`: a text too long for a file's name is no file, and no failure.
    if name.endswith(".jsonl") or os.path.isfile(name):
        if options:
            raise ConfigError(f"'{name}' is a file and takes no options, got {dict(options)}.")
        return JsonlTask(name)
    raise UnknownNameError(
        f"unknown task '{name}': installed are {', '.join(sorted(known)) or 'none'}"
        f"{near(name, known)}. Name one of them or a FILE.jsonl. See 'ipn plugins'."
    )


def _build(component: Component, target: Callable[..., Task], options: Mapping[str, Any]) -> Task:
    """Build a task, its options checked against the names and types of its signature."""
    given = _checked(f"task '{component.name}'", target, options)
    try:
        return target(**given)
    except IPNError:
        raise
    except Exception as error:
        raise PluginError(
            f"task '{component.name}' of {component.plugin.label} cannot be built: "
            f"{type(error).__name__}: {error}"
        ) from error


def _checked(what: str, target: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as the types that the target's signature asks for.

    Raises:
        ConfigError: one is unknown, missing or of another type.
    """
    try:
        signature = inspect.signature(target, eval_str=True)
    except NameError:  # an annotation of names that only type checkers import
        signature = inspect.signature(target)
    named = {p.name: p for p in signature.parameters.values() if p.kind in _BY_NAME}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for option in options:
        if option not in named and not takes_any:
            allowed = f"allowed are {', '.join(named)}" if named else "it takes none"
            raise ConfigError(f"{what} has no option '{option}': {allowed}{near(option, named)}.")
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"{what}: {error}. Its options are {', '.join(named)}.") from None
    return {
        option: _converted(f"option '{option}' of {what}", named[option].annotation, value)
        if option in named
        else value
        for option, value in options.items()
    }


def _converted(what: str, wanted: Any, value: Any) -> Any:
    """Return a value as the type of an annotation, where that is one that pydantic can check."""
    import pydantic

    if wanted is inspect.Parameter.empty or isinstance(wanted, str):
        return value
    try:
        adapter = pydantic.TypeAdapter(wanted)
    except pydantic.errors.PydanticUserError:
        return value
    try:
        return adapter.validate_python(value)
    except pydantic.ValidationError as error:
        said = error.errors()[0]["msg"]
        raise ConfigError(f"{what}: {said[0].lower()}{said[1:]}, got {value!r}.") from None
