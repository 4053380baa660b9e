"""What a benchmark does with its findings: print them, keep them, and hold them to their goals."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from benchmarks.results import command, store
from ipn_core.benchmarking.engine.report import goal, text
from ipn_core.benchmarking.engine.table import Found

__all__ = ["missed", "report"]


def report(
    section: str,
    llm: str,
    found: Sequence[Found],
    kind: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Print findings, store them as a section, and fail where a goal is missed.

    Args:
        section: of the results.
        llm: what the language model was.
        found: the findings.
        kind: of device that they are of, "cpu" or "cuda".
        request: says whether goals are to be checked.
        capsys: is stepped around, so that a passing benchmark prints too.
    """
    with capsys.disabled():
        print(f"\n{llm}")
        for one in found:
            print(f"\n{text(one)}")
    rows = [row for one in found for row in one.rows]
    store(
        section,
        rows,
        kind,
        notes=[f"language model: {llm}", *notes(found)],
        again=command(request.path.name, kind, request.config.getoption("--grid")),
        folder=request.config.getoption("--results"),
    )
    if (said := missed(found)) and not request.config.getoption("--no-check"):
        pytest.fail(said, pytrace=False)


def notes(found: Sequence[Found]) -> list[str]:
    """Return what is to be known of findings, each with its row."""
    return [f"{one.row}: {said}" for one in found for said in (one.title, *one.notes)]


def missed(found: Sequence[Found], slack: float = 0.0) -> str | None:
    """Say which goals are missed by more than a share of them, None if none is."""
    faults = [
        f"{row.name} is {row.median:.3f} ({goal(row)})"
        for one in found
        for row in one.rows
        if row.misses_goal(slack)
    ]
    if not faults:
        return None
    return "; ".join(faults) + ". On a busy machine, run it again alone or with --no-check."
