"""A pytest plugin for an environment without torch: what needs it is skipped, and counted.

A test that fails for want of torch, or of a fixture from a conftest.py that imports it, is skipped;
any other failure stays one.
"""

from __future__ import annotations

from typing import Any

import pytest

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

WANTS = ("No module named 'torch'", "fixture '")
REASON = "needs torch"


def _excuse(report: Any, path: Any) -> Any:
    text = str(report.longrepr)
    if report.failed and any(one in text for one in WANTS):
        report.outcome = "skipped"
        report.longrepr = (str(path), 0, f"Skipped: {REASON}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """Skip a file that imports torch."""
    return _excuse((yield), collector.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Skip a test that imports torch while it runs."""
    return _excuse((yield), item.path)
