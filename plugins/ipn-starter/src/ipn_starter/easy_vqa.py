"""The task `easy-vqa`: pictures of one coloured shape, from the package of that name (MIT)."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path

from ipn_core.images import load_image
from ipn_core.tasks import Example, Picture, Task

__all__ = ["EasyVQA"]

_SHAPES = {"circle", "rectangle", "triangle"}
_COLOURS = {"red", "green", "blue", "black", "gray", "teal", "brown", "yellow"}


class EasyVQA(Task):
    """Shape, colour and yes/no questions with 13 answers.

    `train` and `test` are the package's own splits; `val` is the last tenth of the training
    pictures, which `train` leaves out.
    """

    splits = ("train", "val", "test")
    default_split = "test"
    test_splits = ("test",)

    def examples(self, split: str) -> Sequence[Example]:
        """Return the questions of a split in the package's order."""
        self.check_split(split)
        import easy_vqa

        test = split == "test"
        questions, answers, ids = (
            easy_vqa.get_test_questions() if test else easy_vqa.get_train_questions()
        )
        paths = easy_vqa.get_test_image_paths() if test else easy_vqa.get_train_image_paths()
        last = max(ids) + 1
        wanted = {
            "train": range(last * 9 // 10),
            "val": range(last * 9 // 10, last),
            "test": range(last),
        }[split]
        rows = [row for row in zip(questions, answers, ids, strict=True) if row[2] in wanted]
        shown = _shown(rows)
        return [
            Example(
                question,
                (answer,),
                (_picture(Path(paths[i]), split),),
                _kind(answer),
                _words(question) if len(shown[i]) == 2 else (),
                tuple(sorted(shown[i])),
            )
            for question, answer, i in rows
        ]


@functools.cache
def _picture(path: Path, split: str) -> Picture:
    return Picture(f"easy-vqa/{split}/{path.name}", functools.partial(load_image, path))


def _kind(answer: str) -> str:
    """Return the kind of question by its answer: the package has no types."""
    if answer in ("yes", "no"):
        return "yes-no"
    return "shape" if answer in _SHAPES else "colour"


def _words(text: str) -> tuple[str, ...]:
    """Return the shapes and colours that a text names."""
    return tuple(word for word in re.findall("[a-z]+", text) if word in _SHAPES | _COLOURS)


def _shown(rows: Sequence[tuple[str, str, int]]) -> dict[int, set[str]]:
    """Return the shape and colour of each picture, as far as its questions and answers tell.

    The package does not say them apart. A question that names one is right about it, unless it asks
    whether it is there: then it is there if the answer is yes, or no to a question with "not".
    """
    shown: dict[int, set[str]] = {}
    for question, answer, i in rows:
        found = shown.setdefault(i, set())
        denies = bool({"no", "not"} & set(question.split()))
        if answer not in ("yes", "no"):
            found.update({answer, *_words(question)})
        elif (answer == "yes") != denies:
            found.update(_words(question))
    return shown
