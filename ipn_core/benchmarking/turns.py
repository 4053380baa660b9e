"""In which order things that are compared take their turns."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import islice

__all__ = ["turns"]


def turns(names: Sequence[str], count: int, seed: int = 0) -> Iterator[list[str]]:
    """Yield the names in an order of its own for each turn.

    What ran right before leaves caches and freed memory behind, which whoever comes next pays for
    or gains by. Drawn orders do not share that out: in 17 of them, one of five names may come after
    a certain other nine times, and that one after it twice. So the orders are rows of a Williams
    design (E. J. Williams, 1949): in each run through it every name follows every other equally
    often, and has each place equally often.

    Args:
        names: of what is compared.
        count: how many turns.
        seed: of the order of the rows, and of who is who in them.
    """
    return islice(_designs(names, random.Random(seed)), count)


def _designs(names: Sequence[str], draw: random.Random) -> Iterator[list[str]]:
    """Yield the rows of one design after the other, of which each is drawn anew."""
    n = len(names)
    # 0, 1, n-1, 2, n-2, …: the steps between neighbours are all different.
    first = [(i + 1) // 2 if i % 2 else (n - i // 2) % n for i in range(n)]
    rows = [[(start + k) % n for k in first] for start in range(n)]
    if n % 2:
        rows += [row[::-1] for row in rows]
    while rows:
        who = draw.sample(names, n)
        for row in draw.sample(rows, len(rows)):
            yield [who[k] for k in row]
