"""What every `Task` must do, as tests that a plugin gets by one line."""

from __future__ import annotations

from typing import Any, ClassVar

from ipn_core.errors import ConfigError, DataError
from ipn_core.tasks import Example, Task, open_task
from ipn_core.testing.contracts.clause import clause
from ipn_core.testing.contracts.component import ComponentContract

__all__ = ["TaskContract"]

OPENED = 3
"""Pictures of a split that are opened."""


class TaskContract(ComponentContract):
    """Subclass it and name the task: `class TestMine(TaskContract): name = "mine"`.

    Attributes:
        options: of the task, to make it small.
    """

    kind = "task"
    options: ClassVar[dict[str, Any]] = {}

    def task(self) -> Task:
        """The task, opened anew."""
        return open_task(self.name, self.options)

    def config_class(self) -> Any:
        """A task's options are the arguments of its class."""
        return None

    def test_config_is_closed(self) -> None:
        """An unknown option is refused and named."""
        with clause(
            "the config is closed",
            "name every option in the signature of `__init__`; take no **options.",
        ):
            said = ""
            try:
                open_task(self.name, {**self.options, "no_such_option": 1})
            except ConfigError as error:
                said = str(error)
            assert said, "the unknown option 'no_such_option' was taken"
            assert "no_such_option" in said, f"the error does not name the option: {said}"

    def test_its_splits(self) -> None:
        """The default split is one of them, and an unknown one is refused with their names."""
        with clause("its splits", "call `self.check_split(split)` first in `examples`."):
            task = self.task()
            assert task.default_split in task.splits, (
                f"'{task.default_split}' is none of {task.splits}"
            )
            assert set(task.test_splits) <= set(task.splits), f"{task.test_splits} are none of them"
            said = ""
            try:
                task.examples("no such split")
            except DataError as error:
                said = str(error)
            assert said, "the split 'no such split' was taken"
            missing = [split for split in task.splits if split not in said]
            assert not missing, f"the error does not name {', '.join(missing)}: {said}"

    def test_examples_are_the_same_every_time(self) -> None:
        """A split holds the same examples in the same order, whoever opens it."""
        with clause(
            "the same every time",
            "seed a generator of your own with the split's name; iterate over no set.",
        ):
            for split in self.task().splits:
                first, again = (
                    [(e.question, e.answers, [p.name for p in e.images]) for e in examples]
                    for examples in (self.task().examples(split), self.task().examples(split))
                )
                assert first, f"split '{split}' holds no examples"
                assert first == again, f"split '{split}' differs from one call to the next"

    def test_examples_are_whole(self) -> None:
        """Each has a question, answers and a type, and its pictures open as RGB."""
        with clause("examples are whole", "give every example a question and at least one answer."):
            for split in self.task().splits:
                examples = list(self.task().examples(split))
                for example in examples:
                    assert isinstance(example, Example), f"a {type(example).__name__} in '{split}'"
                    assert example.question.strip(), f"an empty question in '{split}'"
                    assert example.answers, f"no answer to {example.question!r}"
                    assert all(a.strip() for a in example.answers), "an empty answer"
                for picture in [p for e in examples for p in e.images][:OPENED]:
                    mode = picture.load().mode
                    assert mode == "RGB", f"picture '{picture.name}' opens as {mode}, not RGB"

    def test_test_pictures_are_not_trained_on(self) -> None:
        """No picture of a test split stands in another split."""
        with clause("test pictures are kept apart", "split by picture, not by question."):
            task = self.task()
            names = {
                split: {p.name for e in task.examples(split) for p in e.images}
                for split in task.splits
            }
            for split in task.test_splits:
                for other in set(task.splits) - set(task.test_splits):
                    both = names[split] & names[other]
                    assert not both, f"'{split}' and '{other}' share '{min(both, default='')}'"
