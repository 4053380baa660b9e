"""The task `easy-vqa`: pictures of one coloured shape, from the package of that name (MIT)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from ipn_core.images import load_image
from ipn_core.tasks import Example, Picture, Task

__all__ = ["EasyVQA"]


class EasyVQA(Task):
    """Shape, colour and yes/no questions with 13 answers.

    `train` and `test` are the package's own splits; `val` is the last tenth of the training
    pictures, which `train` leaves out.
    """

    splits = ("train", "val", "test")
    default_split = "test"

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
        return [
            Example(question, (answer,), (_picture(Path(paths[i]), split),), _kind(answer))
            for question, answer, i in zip(questions, answers, ids, strict=True)
            if i in wanted
        ]


@functools.cache
def _picture(path: Path, split: str) -> Picture:
    return Picture(f"easy-vqa/{split}/{path.name}", functools.partial(load_image, path))


def _kind(answer: str) -> str:
    """Return the kind of question by its answer: the package has no types."""
    if answer in ("yes", "no"):
        return "yes-no"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "colour"
