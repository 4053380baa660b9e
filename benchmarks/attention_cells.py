"""Which calls `bench_attention.py` times: a grid, and what of it a CPU gets."""

from __future__ import annotations

from itertools import product
from typing import Any

from ipn_core.attention.choice import Case

__all__ = ["GRIDS", "NOTES", "cell"]

QUERIES = (1, 5, 32, 64)
KEYS = (50, 257, 576, 1024, 4096)
WIDTHS = (64, 128)
BATCHES = (1, 8, 64)
DTYPES = ("float32", "bfloat16", "float16")
MASKINGS = ("none", "mask", "packed")
HEADS = 8


def cell(
    queries: int,
    keys: int,
    batch: int = 8,
    *,
    width: int = 64,
    dtype: str = "float32",
    masking: str = "none",
    grad: bool = False,
    heads: tuple[int, int] = (HEADS, HEADS),
) -> Case:
    """Return a call; of sequences end to end, `batch` of them have so many queries and keys."""
    times = batch if masking == "packed" else 1
    return Case(batch, queries * times, keys * times, *heads, width, width, dtype, masking, grad)


def _full() -> list[Case]:
    """The whole grid, those together that a compiler can serve with one kernel."""
    outer = product(MASKINGS, DTYPES, (False, True), WIDTHS)
    inner = list(product(BATCHES, QUERIES, KEYS))
    return [
        cell(q, kv, batch, width=width, dtype=dtype, masking=masking, grad=grad)
        for masking, dtype, grad, width in outer
        for batch, q, kv in inner
    ] + _besides()


def _usual() -> list[Case]:
    """What a CPU is asked: whole for one type and batch, then along one side at a time."""
    found = [cell(q, kv, batch) for batch, q, kv in product((1, 8), QUERIES, KEYS)]
    found += [cell(q, kv, grad=True) for q, kv in product(QUERIES, KEYS)]
    found += [cell(q, kv, 64) for q, kv in product((1, 5, 32), (50, 257, 576))]
    along: list[tuple[tuple[int, ...], dict[str, Any]]] = [
        ((5, 32), {"width": 128}),
        ((5, 32), {"masking": "mask"}),
        ((5,), {"masking": "mask", "grad": True}),
        ((5, 32), {"masking": "packed"}),
        ((5,), {"masking": "packed", "grad": True}),
        ((5, 32), {"dtype": "bfloat16"}),
        ((5,), {"dtype": "bfloat16", "grad": True}),
        ((5, 32), {"dtype": "float16"}),
    ]
    for queries, more in along:
        found += [cell(q, kv, **more) for q, kv in product(queries, KEYS)]
    return found + _besides()


def _besides() -> list[Case]:
    """What the grid does not have: a bias, lengths, and heads that share keys."""
    return [
        cell(5, 576, grad=grad, **more)
        for more in ({"masking": "bias"}, {"masking": "lengths"}, {"heads": (9, 3)})
        for grad in (False, True)
    ]


def _short() -> list[Case]:
    """A few of the usual ones that take a CPU no time."""
    return [
        cell(5, 50, 1),
        cell(5, 257),
        cell(32, 576, 1),
        cell(5, 257, grad=True),
        cell(5, 257, masking="mask"),
        cell(5, 257, masking="packed"),
    ]


GRIDS = {"short": _short, "usual": _usual, "full": _full}
NOTES = {
    "short": "A few shapes, to see that it works; `--grid usual` has more.",
    "usual": (
        "Of the grid (queries 1, 5, 32, 64 × keys 50, 257, 576, 1024, 4096 × heads 64 and 128 wide "
        "× batch 1, 8, 64 × three types × plain, key mask, end to end × forward, forward and "
        "backward: 2,160 cells) a CPU gets float32, 64 wide, plain, forward at batch 1 and 8 and "
        "backward at batch 8 in full, and of each other side some cells alone (no backward of "
        "float16 or 128 wide, batch 64 up to 576 keys), so that `make bench` ends in time; "
        "`--grid full` times all."
    ),
    "full": "The whole grid, and a bias, lengths and grouped heads at one shape.",
}
