"""The task `emoji-hops`: the pictures of `emoji-scenes`, and questions that take two hops.

"What is left of the thing above the dog?": the thing above the dog must be found before what is
left of it can be. Each example says what the first hop leads to (`Example.hops`), and that the
model should look once more for the answer (`Example.looks`).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from ipn_core.tasks import Example, Picture
from ipn_starter.emoji_scenes import (
    STEPS,
    Asker,
    EmojiScenes,
    Placed,
    Scene,
    anchors_held_out,
    draw,
)
from ipn_starter.wordings import RELATIONS

__all__ = ["EmojiHops"]

_ONE, _TWO = 2, 4
"""Questions of one hop and of two, where the scene allows them."""


class EmojiHops(EmojiScenes):
    """About six questions a scene: `one` hop, as `emoji-scenes` has them, and `two` hops.

    No question names a noun that `emoji-scenes` keeps from its anchors. Splits: `train`, with many
    wordings; `val` and `test`, plain wordings, on the pictures of the same splits there.
    """

    splits = ("train", "val", "test")
    test_splits = ("test",)
    sizes: ClassVar[dict[str, int]] = {"train": 2_000, "val": 100, "test": 500}

    def about(self, scene: Scene) -> list[Example]:
        """Return the questions of a scene."""
        asker = Asker(scene, random.Random(f"{scene.name}/hops"))
        steps = list(_steps(scene))
        paths = [
            (first, second)
            for first in steps
            for second in steps
            if first.to is second.anchor and second.to is not first.anchor
        ]
        shown = tuple(thing.noun.name for thing in scene.things)
        picture = (Picture(scene.name, functools.partial(draw, scene)),)

        def example(kind: str, text: str, found: Placed, anchor: Placed, *hops: str) -> Example:
            answers, names = (found.noun.name,), (anchor.noun.name,)
            return Example(text, answers, picture, kind, names, shown, len(hops), hops)

        named = [step for step in steps if step.named]
        one = asker.rng.sample(named, min(_ONE, len(named)))
        paths = [path for path in paths if path[0].named]
        two = asker.rng.sample(paths, min(_TWO, len(paths)))
        found = [
            example("one", asker.beside(s.relation, s.anchor.noun.name), s.to, s.anchor)
            for s in one
        ]
        for first, second in two:
            there = f"thing {RELATIONS[first.relation][0]} the {first.anchor.noun.name}"
            text = asker.beside(second.relation, there)
            found.append(example("two", text, second.to, first.anchor, first.to.noun.name))
        return found


class _Step(NamedTuple):
    anchor: Placed
    relation: str
    to: Placed

    @property
    def named(self) -> bool:
        """Whether a question may name its anchor."""
        return self.anchor.noun.name not in anchors_held_out()


def _steps(scene: Scene) -> Iterator[_Step]:
    """Yield every pair of neighbours."""
    for anchor in scene.things:
        for relation, (down, right) in STEPS.items():
            if to := scene.at(anchor.row + down, anchor.column + right):
                yield _Step(anchor, relation, to)
