"""Things that are compared take turns, and none has an order to gain by."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from ipn_core.benchmarking.turns import turns

NAMES = ["a", "b", "c"]


@pytest.mark.parametrize("count", range(1, 8))
def test_every_turn_has_all_once(count: int) -> None:
    names = list("abcdefg"[:count])
    found = list(turns(names, 40))
    assert len(found) == 40
    assert all(sorted(order) == names for order in found)


@pytest.mark.parametrize(("names", "rows"), [("ab", 2), ("abc", 6), ("abcd", 4), ("abcde", 10)])
def test_everything_follows_everything_equally_often_and_has_each_place(
    names: str, rows: int
) -> None:
    for seed in range(5):
        found = list(turns(list(names), 3 * rows, seed))
        before = Counter(pair for order in found for pair in pairwise(order))
        assert len(before) == len(names) * (len(names) - 1)
        assert len(set(before.values())) == 1
        places = Counter(place for order in found for place in enumerate(order))
        assert set(places.values()) == {3 * rows // len(names)}


def test_the_seed_decides() -> None:
    assert list(turns(NAMES, 10)) == list(turns(NAMES, 10))
    assert list(turns(NAMES, 10)) != list(turns(NAMES, 10, seed=1))


def test_of_nothing_there_are_no_turns() -> None:
    assert list(turns([], 3)) == []
