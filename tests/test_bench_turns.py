"""Things that are compared take turns, and none has an order to gain by."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from ipn_core.benchmarking.turns import turns

NAMES = ["a", "b", "c"]


def test_every_turn_has_all_once() -> None:
    assert all(sorted(order) == NAMES for order in turns(NAMES, 20))


def test_whoever_comes_before_another_changes() -> None:
    before = Counter(pair for order in turns(NAMES, 300) for pair in pairwise(order))
    assert len(before) == 6
    assert max(before.values()) < 1.5 * min(before.values())


def test_the_seed_decides() -> None:
    assert list(turns(NAMES, 10)) == list(turns(NAMES, 10))
    assert list(turns(NAMES, 10)) != list(turns(NAMES, 10, seed=1))
