"""Tasks: pictures, questions and answers, from a plugin or from a file."""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ipn_core.errors import ConfigError, DataError, PluginError, UnknownNameError, near
from ipn_core.faults import Guarded
from ipn_core.prompt import Prompt

if TYPE_CHECKING:
    from PIL import Image

    from ipn_core.plugins import Component, Registry

__all__ = ["Example", "Picture", "ShardedTask", "Task", "check_pictures", "open_task"]

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def _unchecked() -> None:
    """Find no fault with a picture."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Picture:
    """A picture that is opened when it is needed.

    Attributes:
        name: says the same of the same picture within a task, such as its path.
        load: returns it as RGB.
        check: raises early what `load` would, as far as that is known without decoding.
    """

    name: str
    load: Callable[[], Image.Image]
    check: Callable[[], object] = _unchecked


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
        looks: how often to look again before the answer, for models that may
            (`layout.look_again`) and are to learn when.
        hops: what the looks before the one for the answer should find, where that is known.
        dialogue: all of what is said where that is more than a question about the pictures before
            it: earlier turns, or pictures between words. It ends with the first answer; question
            and pictures are then those of its last turn and of all of its turns.
    """

    question: str
    answers: tuple[str, ...]
    images: tuple[Picture, ...]
    type: str = "all"
    names: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    looks: int = 0
    hops: tuple[str, ...] = ()
    dialogue: Prompt | None = None

    def prompt(self, order: Sequence[str], *, learn: bool = False, looks: int = 0) -> Prompt:
        """Return what the model is asked.

        Args:
            order: a layout's; says whether pictures stand before the question.
            learn: whether the answers follow, to learn from.
            looks: how often to learn to look again before the answer.
        """
        if self.dialogue is not None:
            return self.dialogue if learn else Prompt(self.dialogue.turns[:-1])
        answer = self.answers[0] if learn else None
        return Prompt.ask(self.question, self.images, order=order, answer=answer, looks=looks)


class Task(Guarded, ABC):
    """A source of examples, registered with `registry.task(name, ...)`.

    Attributes:
        splits: the names that `examples` takes.
        default_split: what `ipn eval` asks where no split is named.
    """

    GUARDED = ("examples", "shards", "read")
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


class ShardedTask(Task):
    """A task whose examples lie in shards, which can be read one after the other as a stream."""

    @abstractmethod
    def shards(self, split: str) -> Sequence[str]:
        """Return the shards of a split, the same and in the same order everywhere.

        Raises:
            DataError: there is no such split, or there are none.
        """

    @abstractmethod
    def read(self, shard: str, skip: int = 0) -> Iterator[Example]:
        """Yield the examples of a shard in their order, without the first few.

        Their pictures can be sent to other processes.

        Raises:
            DataError: something is malformed; the text names the shard, and the line or key.
        """

    def examples(self, split: str) -> Sequence[Example]:
        """Return all examples of all shards; each is checked before the first is returned."""
        return [example for shard in self.shards(split) for example in self.read(shard)]


def check_pictures(examples: Sequence[Example]) -> None:
    """Look at the beginning of each picture, so that a fault comes out before any work is done.

    Raises:
        UserError: one cannot be opened.
    """
    for picture in {image.name: image for one in examples for image in one.images}.values():
        picture.check()


def open_task(
    name: str, options: Mapping[str, Any] | None = None, registry: Registry | None = None
) -> Task:
    """Return a registered task, or one that reads a file.

    Args:
        name: a name that `ipn plugins` lists, or a path; a name wins.
        options: of the task's class; of a file, `FileTask` or `TarTask`.
        registry: where names are looked up, by default everything installed.

    Raises:
        UnknownNameError: it is neither.
        ConfigError: the task takes no such option, or not such a value.
        PluginError: the task cannot be built, or is no `Task`.
    """
    from ipn_core.plugins import get_registry

    known = (registry or get_registry()).entries("task")
    if name in known:
        target = known[name].load()
        if not isinstance(target, Task):
            target = _build(known[name], target, options or {})
        elif options:
            raise ConfigError(f"task '{name}' takes no options, got {', '.join(options)}.")
        target.sign(known[name].label)
        return target
    # `os.path` instead of `Path`: a text too long for a file's name is no file, and no failure.
    if name.endswith((".jsonl", ".json", ".tar")) or os.path.isfile(name):
        kind = _file_kind(name)
        return kind(name, **_checked(f"the file '{name}'", partial(kind, name), options or {}))
    raise UnknownNameError(
        f"unknown task '{name}': installed are {', '.join(sorted(known)) or 'none'}"
        f"{near(name, known)}. Name one of them or a FILE.jsonl, .json or .tar. See 'ipn plugins'."
    )


def _file_kind(name: str) -> Callable[..., Task]:
    if name.endswith(".tar"):
        from ipn_core.tar_task import TarTask

        return TarTask
    from ipn_core.file_task import FileTask

    return FileTask


def _build(component: Component, target: Callable[..., Task], options: Mapping[str, Any]) -> Task:
    """Build a task, its options checked against the names and types of its signature."""
    given = _checked(f"task '{component.name}'", target, options)
    with component.building():
        task = target(**given)
    if not isinstance(task, Task):
        raise PluginError(
            f"{component.label} must be a subclass of ipn_core.tasks.Task, got {target!r}."
        )
    return task


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
