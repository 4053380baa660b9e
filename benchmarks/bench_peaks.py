"""The roofs of the roofline: how fast this device multiplies and copies, measured in the same run.

Multiplying is torch's product of two square matrices, the best of several sizes; copying is
`Tensor.copy_` of blocks from what fits a core's cache to what fits none. Both count what must be
done: 2·n³ operations, and each byte read and written once. They are what torch reaches here, not
what a data sheet says, so that a kernel may in rare cases go beyond.

    .venv/bin/python -m pytest benchmarks/bench_peaks.py -m "not gpu"
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks.results import Row
from ipn_core.attention.timing import in_turn
from ipn_core.benchmarking.engine.timing import threads

SECTION = "peaks"
DTYPES = ("float32", "bfloat16", "float16")
TOO_LONG_S = 0.05


class Sizes(NamedTuple):
    """What is multiplied and copied.

    Attributes:
        matrices: their sides n.
        blocks: bytes that are copied, the largest far larger than any cache.
        seconds: about how long each is timed.
    """

    matrices: tuple[int, ...]
    blocks: tuple[int, ...]
    seconds: float


SIZES = {
    "cpu": Sizes((256, 512, 1024), (1 << 15, 1 << 18, 1 << 21, 1 << 28), 0.3),
    "cuda": Sizes((2048, 8192), (1 << 20, 1 << 24, 1 << 30), 0.1),
}


def multiplying(n: int, dtype: str, device: torch.device) -> Callable[[], Any]:
    """Return a product of two matrices."""
    a, b, out = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def copying(size: int, device: torch.device) -> Callable[[], Any]:
    """Return a copy of so many bytes."""
    a, b = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: b.copy_(a)


def rates(task: Callable[[], Any], work: float, device: torch.device, took: float) -> list[float]:
    """Return how much of some work is done a second, a number a sample."""
    return [work / s for s in in_turn({"it": task}, device, took)["it"]]


def measure(device: torch.device, sizes: Sizes) -> Iterator[Row]:
    """Yield the fastest product of each type, and every copy."""
    for dtype in DTYPES:
        found: dict[int, list[float]] = {}
        for n in sizes.matrices:
            product = multiplying(n, dtype, device)
            found[n] = rates(product, 2 * n**3, device, sizes.seconds)
            if 2 * n**3 / statistics.median(found[n]) > TOO_LONG_S:
                break  # a CPU without such a type: the next one takes minutes
        n = max(found, key=lambda side: statistics.median(found[side]))
        case = {"dtype": dtype, "side": n}
        yield Row.of(f"multiply {dtype}", found[n], case, unit="FLOP/s", better="higher")
    for size in sizes.blocks:
        speeds = rates(copying(size, device), 2 * size, device, sizes.seconds)
        case = {"bytes": size}
        yield Row.of(f"copy {size} bytes", speeds, case, unit="bytes/s", better="higher")


def test_peaks(
    device: torch.device, kind: str, request: pytest.FixtureRequest, keep: Callable[..., object]
) -> None:
    with threads(request.config.getoption("--threads")):
        keep(SECTION, list(measure(device, SIZES[kind])), kind)
