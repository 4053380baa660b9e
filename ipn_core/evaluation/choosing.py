"""Which questions of a split are asked where not all of them are."""

from __future__ import annotations

from collections.abc import Sequence

from ipn_core.evaluation.statistics import by_pictures
from ipn_core.tasks import Example

__all__ = ["choose_questions"]


def choose_questions(
    pool: Sequence[Example], limit: int | None = None, per_picture: int | None = None
) -> list[Example]:
    """Return the questions to ask, in their order.

    Generated pictures have their types of question in the same order, those of a type next to each
    other. So those taken of one picture are spread over its questions, and of the next picture they
    begin one later: of pictures with equally many questions, every place comes as often.

    Args:
        pool: all questions of a split.
        limit: how many to ask at most; None for all.
        per_picture: how many about the same pictures at most; None for all.
    """
    if per_picture is None:
        return list(pool[:limit])
    of_picture: dict[object, list[int]] = {}
    for index, key in enumerate(by_pictures([i.name for i in e.images] for e in pool)):
        of_picture.setdefault(key, []).append(index)
    chosen: list[int] = []
    for turn, mine in enumerate(of_picture.values()):
        count = min(per_picture, len(mine))
        chosen += sorted(mine[(turn + k * len(mine) // count) % len(mine)] for k in range(count))
    return [pool[index] for index in sorted(chosen[:limit])]
