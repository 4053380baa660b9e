"""In which order things that are compared take their turns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

__all__ = ["turns"]


def turns(names: Sequence[str], count: int, seed: int = 0) -> Iterator[list[str]]:
    """Yield the names in an order of its own for each turn.

    What ran right before leaves caches and freed memory behind, which whoever comes next pays for
    or gains by; with a fixed or rotated order that would always be the same one.

    Args:
        names: of what is compared.
        count: how many turns.
        seed: of the orders.
    """
    draw = random.Random(seed)
    for _ in range(count):
        yield draw.sample(names, len(names))
