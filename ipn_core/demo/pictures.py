"""The pictures of the page: those that visitors bring, and the examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ipn_core.errors import ImageError, IPNError, PromptError
from ipn_core.evaluation.overlay import shrunk
from ipn_core.images import MAX_PIXELS, load_image

if TYPE_CHECKING:
    from PIL import Image

    from ipn_core.tasks import Task

__all__ = ["Sample", "draw_samples", "read_picture"]

SIDE = 2048
"""Pixels of a kept picture's longer side: what a visitor's may take of the memory is bounded."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture to begin with, and a question about it."""

    path: str
    question: str


def read_picture(path: str | None) -> Image.Image:
    """Open a picture that was brought.

    Raises:
        PromptError: there is none.
        ImageError: it is no picture, damaged, or too large.
    """
    if path is None:
        raise PromptError("there is no picture yet. Drop one, or choose an example.")
    try:
        return shrunk(load_image(path, max_pixels=MAX_PIXELS), SIDE)
    except IPNError as error:
        # The visitor gave it another name, and the server's folders are nobody's business.
        raise ImageError(str(error).replace(f"'{path}'", "the picture")) from None


def draw_samples(task: Task, folder: Path, count: int = 4) -> list[Sample]:
    """Write the first pictures of a task as files, each with a question of another kind.

    Args:
        task: has questions about one picture each.
        folder: for the files.
        count: pictures at most.
    """
    split = "val" if "val" in task.splits else task.default_split
    about: dict[str, list[tuple[str, str]]] = {}
    files: dict[str, Path] = {}
    for example in task.examples(split):
        if len(example.images) != 1 or example.dialogue is not None:
            continue
        picture = example.images[0]
        if picture.name not in files:
            if len(files) == count:
                break
            files[picture.name] = folder / f"example-{len(files) + 1}.png"
            picture.load().save(files[picture.name])
        about.setdefault(picture.name, []).append((example.type, example.question))
    return _various([(str(files[name]), asked) for name, asked in about.items()])


def _various(pictures: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> list[Sample]:
    """Choose a question for each picture, of a kind that no earlier one has if there is one."""
    seen: set[str] = set()
    found = []
    for path, asked in pictures:
        kind, question = next((one for one in asked if one[0] not in seen), asked[0])
        seen.add(kind)
        found.append(Sample(path, question))
    return found
