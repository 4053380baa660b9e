"""How much must be computed and moved for an attention call, and how much a device can.

Both are least amounts: every query-key pair once, every number of q, k, v and the result read or
written once, whatever a kernel really does. A backward pass multiplies five times where a forward
one multiplies twice, as the logits are computed again, and moves the tensors and their gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ipn_core.attention.choice import Case
from ipn_core.attention.drawing import ragged
from ipn_core.benchmarking import Row, Section

__all__ = ["Roofs", "Work", "case_of", "roofs", "work"]


class Work(NamedTuple):
    """What one call must do at least.

    Attributes:
        flops: additions and multiplications.
        bytes: moved to and from memory.
    """

    flops: float
    bytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes


class Roofs(NamedTuple):
    """What a device reached.

    Attributes:
        flops: a second, by dtype.
        memory: bytes a second of the largest copy, which no cache holds.
        cache: bytes a second of the fastest copy.
    """

    flops: Mapping[str, float]
    memory: float
    cache: float


def case_of(row: Row) -> Case:
    """Return the call of an attention row."""
    found: dict[str, Any] = {name: row.case[name] for name in Case._fields}
    return Case(**found)


def work(case: Case) -> Work:
    """Return what a call must do at least."""
    packed = "packed" in case.masking
    if packed:
        sequences = zip(
            ragged(case.queries, case.batch), ragged(case.keys, case.batch), strict=True
        )
        pairs = sum(m * n for m, n in sequences)
    else:
        pairs = case.batch * case.queries * case.keys
    times = 1 if packed else case.batch
    numbers = times * (case.queries * case.heads + case.keys * case.kv_heads)
    size = torch.finfo(getattr(torch, case.dtype)).bits // 8
    moved = size * numbers * (case.head_dim + case.value_dim)
    multiplied = 2 * pairs * case.heads
    flops = multiplied * (case.head_dim + case.value_dim)
    if case.grad:
        flops += multiplied * (3 * case.head_dim + 2 * case.value_dim)
        moved *= 3
    return Work(float(flops), float(moved))


def roofs(peaks: Section) -> Roofs:
    """Return the roofs that `bench_peaks.py` measured."""
    rows = [row for row in peaks.rows if row.median is not None]
    copies = {row.case["bytes"]: row.median for row in rows if row.unit == "bytes/s"}
    return Roofs(
        {str(row.case["dtype"]): row.median or 0 for row in rows if row.unit == "FLOP/s"},
        copies[max(copies, key=lambda size: int(size or 0))] or 0,
        max(speed or 0 for speed in copies.values()),
    )
