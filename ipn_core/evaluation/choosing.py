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

    A generated picture has its types of question in the same order as every other. So of one
    picture the first questions are taken, of the next those that come after as many, and so on
    around: all types come equally often.

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
        chosen += sorted(mine[(turn * per_picture + k) % len(mine)] for k in range(count))
    return [pool[index] for index in sorted(chosen[:limit])]
