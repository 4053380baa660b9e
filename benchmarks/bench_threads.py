"""What threads are worth: a first token with one, and with one for each CPU that may be used.

    .venv/bin/python -m pytest benchmarks/bench_threads.py

Both in one process and in turn, and both must find the same first token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from benchmarks.checking import report
from ipn_core.benchmarking.engine.first_token import Case, setup_first_token
from ipn_core.benchmarking.engine.table import Found, Session, against, took
from ipn_core.benchmarking.engine.timing import collected, in_turn, threads
from ipn_core.processors import allowed_threads

PREFIX = 128
SECTION = "threads"
REPEATS, SHORT = 12, 3


def measure(case: Case, number: int, repeats: int) -> Found:
    """Time a first token with one thread, and with as many as are right here.

    Args:
        case: one prompt with one picture.
        number: how many are right here.
        repeats: how often each is timed.
    """
    ways: dict[str, Callable[[], int]] = {
        _name(count): partial(_first_token, case, count) for count in {1, number}
    }
    tokens = {name: way() for name, way in ways.items()}
    if len(set(tokens.values())) > 1:
        raise AssertionError(f"they find different first tokens: {tokens}")
    found = collected(in_turn(ways, repeats, warm_up=0))  # all have run just now
    right = _name(number)
    rows = took(SECTION, found)
    rows += [against(SECTION, found, name, right) for name in ways if name != right]
    title = f"first token, {case.prefix} tokens up to <img-q>, {case.rest} more"
    return Found(SECTION, title, rows, notes=[f"{right}: one for each CPU that may be used"])


def _name(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _first_token(case: Case, count: int) -> int:
    torch.set_num_threads(count)
    return case.round()


def test_threads(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    number = allowed_threads().number
    with threads(number):
        session = Session()
        repeats = SHORT if request.config.getoption("--grid") == "short" else REPEATS
        found = measure(setup_first_token(session.backbone, PREFIX), number, repeats)
        torch.set_num_threads(number)  # which the results are named after
        report(SECTION, session.llm, [found], "cpu", request, capsys)
