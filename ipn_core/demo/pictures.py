"""The pictures of the page: those that visitors bring, and the examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ipn_core.errors import ImageError, IPNError, PromptError
from ipn_core.images import KEPT_SIDE, MAX_PIXELS, load_image, shrunk

if TYPE_CHECKING:
    from PIL import Image

    from ipn_core.tasks import Picture, Task
    from ipn_core.weights import Weights

__all__ = ["Sample", "copy_samples", "draw_samples", "read_picture"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture to begin with, and a question about it.

    Attributes:
        path: of the picture.
        question: about it.
        model: which one beside the page's own is asked, None for the page's own.
    """

    path: str
    question: str
    model: str | None = None


def read_picture(path: str | None) -> Image.Image:
    """Open a picture that was brought.

    Raises:
        PromptError: there is none.
        ImageError: it is no picture, damaged, or too large.
    """
    if path is None:
        raise PromptError("there is no picture yet. Drop one, or choose an example.")
    try:
        return shrunk(load_image(path, max_pixels=MAX_PIXELS), KEPT_SIDE)
    except IPNError as error:
        # The visitor gave it another name, and the server's folders are nobody's business.
        raise ImageError(str(error).replace(f"'{path}'", "the picture")) from None


def draw_samples(task: Task, folder: Path, count: int = 4) -> list[Sample]:
    """Write pictures of a task as files: the first ones with questions of kinds that differ.

    Args:
        task: has questions about one picture each.
        folder: for the files.
        count: pictures at most.
    """
    split = "val" if "val" in task.splits else task.default_split
    pictures: dict[str, Picture] = {}
    asked: dict[str, dict[str, str]] = {}
    for example in task.examples(split):
        if len(example.images) == 1 and example.dialogue is None:
            (picture,) = example.images
            pictures.setdefault(picture.name, picture)
            asked.setdefault(picture.name, {}).setdefault(example.type, example.question)
    chosen: dict[str, str] = {}
    kinds: set[str] = set()
    for name, questions in asked.items():
        kind = next((one for one in questions if one not in kinds), None)
        if kind is not None and len(chosen) < count:
            chosen[name] = questions[kind]
            kinds.add(kind)
    for name, questions in asked.items():
        if len(chosen) < count:
            chosen.setdefault(name, next(iter(questions.values())))
    found = []
    for number, name in enumerate((name for name in asked if name in chosen), start=1):
        path = folder / f"example-{number}.png"
        pictures[name].load().save(path)
        found.append(Sample(str(path), chosen[name]))
    return found


def copy_samples(weights: Weights, folder: Path, *, beside: bool = False) -> list[Sample]:
    """Write the pictures that a known model needs not fetch as files.

    Args:
        weights: the model's.
        folder: for the files.
        beside: whether the page's own model is another one.
    """
    found = []
    for number, (picture, question) in enumerate(weights.pictures(), start=1):
        path = folder / f"{weights.name}-{number}.png"
        load_image(picture).save(path)
        found.append(Sample(str(path), question, weights.name if beside else None))
    return found
