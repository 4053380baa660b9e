"""The engine against its rivals: every row of `ipn bench engine`, kept and held to its goals.

Run `pytest benchmarks/bench_engine.py`, or `ipn bench engine`, which keeps nothing.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.checking import report
from ipn_core.benchmarking.engine.table import ROWS, Session, measure
from ipn_core.benchmarking.engine.timing import threads


def test_engine(
    device: torch.device,
    kind: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    option = request.config.getoption
    with threads(option("--threads")):
        session = Session(short=option("--grid") == "short", device=device)
        found = [measure(row, session) for row in ROWS]
        report("engine", session.llm, found, kind, request, capsys)
