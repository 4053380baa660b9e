"""The short form of the benchmarks: no goal is broken by more than 20 %.

Only ratios within one run are looked at, never a time; each is a median over turns, and breaks its
goal only where all of its 95 % interval does. What breaks one is measured anew, twice at most.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ipn_core.benchmarking import Row

ROOT = Path(__file__).parents[1]
SLACK = 0.2
TRIES = 3
SECONDS = 0.2

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_table")]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def attention(case: Any) -> Row:
    """The row of `auto` over the fastest backend, which says if a backend was wrong."""
    from benchmarks.bench_attention import RATIO, measure, setup_attention

    cell = measure(setup_attention(case, torch.device("cpu")), SECONDS)
    assert [t.reasons for t in cell.timings.values() if t.failed] == []
    return cell.row(RATIO)


@pytest.mark.parametrize("index", range(6))
def test_auto_is_near_the_fastest_backend(index: int) -> None:
    from benchmarks.attention_cells import GRIDS

    case = GRIDS["short"]()[index]
    for _ in range(TRIES):
        row = attention(case)
        if not row.misses_goal(SLACK, surely=True):
            return
    pytest.fail(f"{row.name} is {row.median:.2f} ({row.low:.2f} to {row.high:.2f}), not 1.05")


def test_a_choice_that_is_not_the_fastest_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_attention
    from benchmarks.attention_cells import cell

    real = bench_attention.decide
    monkeypatch.setattr(bench_attention, "AGAIN", 0)
    monkeypatch.setattr("ipn_core.attention.deciding.CLOSE", 100.0)
    monkeypatch.setattr(
        bench_attention, "decide", lambda *given: replace(real(*given), winner="flex")
    )
    case = cell(5, 50, 1)
    row = attention(case)
    assert row.case["chosen"] == "flex"
    assert row.misses_goal(SLACK, surely=True)
