"""The task `photo-words`: questions and what may be answered, with no picture to answer them by.

Every example shows the same blank picture, because a look needs one: `understand` learns from it
what a question asks, and `verbalise` to say what it is handed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ipn_core import Example, Picture, Task
from ipn_names.classes import article, labels
from ipn_names.objective import Asked
from ipn_names.sayings import NO, NOWHERE, UNSURE, YES
from ipn_names.wordings import CELLS, DEVELOPMENT, HELD_OUT, PLACES, TRAINED

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["PhotoWords"]

_WORDINGS = {"train": TRAINED, "val": DEVELOPMENT, "test": HELD_OUT}


class PhotoWords(Task):
    """Every label and every word for one, in questions of each kind.

    Splits: `train`; `val` and `test` have wordings that training never uses.
    """

    splits = ("train", "val", "test")
    default_split = "test"

    def __init__(self, both: bool = False, seed: int = 0) -> None:
        """Choose what is asked.

        Args:
            both: ask both whether and where each thing is, instead of one of them.
            seed: another seed draws other wordings.
        """
        self.both = both
        self.seed = seed

    def examples(self, split: str) -> Sequence[Example]:
        """Return the questions of a split."""
        self.check_split(split)
        rng = random.Random(f"photo-words/{split}/{self.seed}")
        picture = Picture(f"blank/{split}", _blank)
        asker = _Asker(rng, _WORDINGS[split], picture)
        things = asker.things(1 if split == "train" else 8, self.both)
        return [*asker.names(), *asker.sides(), *things]


def _blank() -> Image.Image:
    from PIL import Image

    return Image.new("RGB", (64, 64), "white")


class _Asker:
    def __init__(
        self, rng: random.Random, wordings: dict[str, tuple[str, ...]], picture: Picture
    ) -> None:
        self.rng = rng
        self.wordings = wordings
        self.picture = picture

    def names(self) -> Iterator[Asked]:
        """Ask what this is, for every label, and for a guess at it."""
        for label in labels():
            for answer in (label.name, UNSURE.format(article(label.name))):
                question = self.rng.choice(self.wordings["name"])
                yield Asked(question, (answer,), (self.picture,), "name")

    def sides(self) -> Iterator[Asked]:
        """Ask in every wording what is in every place."""
        some = self.rng.sample(labels(), len(labels()))
        for wording in self.wordings["side"]:
            for cell in CELLS:
                for place in PLACES[cell]:
                    question = wording.format(**{"in": place})
                    answer = some.pop().name
                    yield Asked(question, (answer,), (self.picture,), "name", place=cell)

    def things(self, each: int, both: bool) -> Iterator[Asked]:
        """Ask for every `each`-th word whether or where it is, or both."""
        words = dict.fromkeys(w for label in labels() for w in (label.name, *label.also))
        kinds = ("exist", "where")
        for word in list(words)[::each]:
            for kind in kinds if both else (self.rng.choice(kinds),):
                question = self.rng.choice(self.wordings[kind]).format(a=article(word), noun=word)
                answer = self.rng.choice((YES, NO) if kind == "exist" else (*CELLS, NOWHERE))
                yield Asked(question, (answer,), (self.picture,), kind, (word,), (word,))
