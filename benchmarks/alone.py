"""What is measured by a program of its own, on the language model alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from benchmarks.results import store
from ipn_core.benchmarking.engine import subjects
from ipn_core.benchmarking.engine.report import text
from ipn_core.benchmarking.engine.table import Found
from ipn_core.benchmarking.engine.timing import threads

__all__ = ["run_alone"]

Measure = Callable[[Any, int, bool], Found]
"""Measures a language model, with so many repetitions, and compiled too if it is to be."""


def run_alone(section: str, about: str, measure: Measure) -> None:
    """Read the command line, measure, print, and keep the section.

    Args:
        section: its name, and that of the module in `benchmarks`.
        about: of the program, for its help.
        measure: what it does.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="fewer than all, on a busy machine")
    parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes")
    parser.add_argument("--no-store", action="store_true", help="print only")
    options = parser.parse_args()
    with threads(options.threads):
        llm, name = subjects.backbone()
        found = measure(llm.lm, options.repeats, options.compile)
        print(f"{name}\n\n{text(found)}")
        if not options.no_store:
            notes = [f"language model: {name}", found.title, *found.notes]
            again = f".venv/bin/python -m benchmarks.{section}"
            again += " --compile" if options.compile else ""
            store(section, found.rows, notes=notes, again=again)
