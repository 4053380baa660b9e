"""The task `emoji-details`: the board of `emoji-scenes`, but large and its things small.

A picture is 1024×1024 and a thing 40 to 48 pixels of it. An encoder that sees the whole picture at
256×256 sees things of 10 to 12 pixels; the cell on its own, at full resolution, shows them as large
as `emoji-scenes` does. Every question says which cell it is about, so that nothing but the detail
is missing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import ClassVar

from ipn_starter.emoji_scenes import SIDE, STEPS, Asker, EmojiScenes, Scene, article

__all__ = ["EmojiDetails", "SmallScene"]

_EACH = 4
"""Questions of each kind, where the scene allows them."""


class SmallScene(Scene):
    """Cells of 256 pixels, with a thing as small as in cells of 64 anywhere around the centre."""

    __slots__ = ()

    task: ClassVar[str] = "emoji-details"
    cell: ClassVar[int] = 256
    off: ClassVar[int] = 64

    def ask(self, rng: random.Random) -> Iterator[tuple[str, ...]]:
        """Yield (kind, question, answer) and the noun that the question names, if it does."""
        return _CellAsker(self, rng).ask()


class EmojiDetails(EmojiScenes):
    """About twelve questions a scene, four of each of three kinds.

    `cell`: what is in this cell; `relation`: what is beside this cell; `exist`: is this noun in
    this cell, where a "no" is about a noun that stands in another cell.

    Splits: `train`, with many wordings; `val` and `test`, plain wordings.
    """

    splits = ("train", "val", "test")
    test_splits = ("test",)
    sizes: ClassVar[dict[str, int]] = {"train": 400, "val": 40, "test": 200}
    scene: ClassVar[type[Scene]] = SmallScene


class _CellAsker(Asker):
    def ask(self) -> Iterator[tuple[str, ...]]:
        yield from self._cells(_EACH)
        yield from self._relations_of_cells()
        yield from self._exist_in_cells()

    def _relations_of_cells(self) -> Iterator[tuple[str, ...]]:
        pairs = [
            (row, column, relation, found.noun.name)
            for row in range(SIDE)
            for column in range(SIDE)
            for relation, (down, right) in STEPS.items()
            if (found := self.scene.at(row + down, column + right))
        ]
        for row, column, relation, answer in self.rng.sample(pairs, _EACH):
            yield "relation", self.beside(relation, f"cell in {_place(row, column)}"), answer

    def _exist_in_cells(self) -> Iterator[tuple[str, ...]]:
        things = self.rng.sample(self.scene.things, _EACH + 1)
        for index, thing in enumerate(things[:_EACH]):
            there = index < _EACH // 2
            noun = (thing if there else things[index + 1]).noun.name
            where = _place(thing.row, thing.column)
            text = self._word("exist", a=f"{article(noun)} {noun} in {where}")
            yield "exist", text, "yes" if there else "no", noun


def _place(row: int, column: int) -> str:
    return f"row {row + 1}, column {column + 1}"
