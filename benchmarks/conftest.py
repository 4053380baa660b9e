"""Options of the benchmarks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a busy machine print what it measures without failing."""
    parser.addoption("--no-check", action="store_true", help="print ratios without checking them")
