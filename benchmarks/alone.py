"""What is measured by a program of its own, on the language model alone."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import FOLDER, store
from ipn_core.benchmarking.engine import subjects
from ipn_core.benchmarking.engine.report import text
from ipn_core.benchmarking.engine.table import Found
from ipn_core.benchmarking.engine.timing import threads
from ipn_core.memory import keep_freed_memory

__all__ = ["run_alone"]

Measure = Callable[[Any, int, bool], Found]
"""Measures a backbone, with so many repetitions, and compiled too if it is to be."""


def run_alone(
    section: str,
    about: str,
    measure: Measure,
    *,
    repeats: int = 15,
    compiles: bool = True,
    words: Sequence[str] | None = None,
) -> None:
    """Read the command line, measure, print, and keep the section.

    Args:
        section: its name, and that of the module in `benchmarks`.
        about: of the program, for its help.
        measure: what it does.
        repeats: how many repetitions there are unless told otherwise.
        compiles: whether there is something to compile.
        words: of the command line, by default the process's own.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, help="fewer than all, on a busy machine")
    if compiles:
        parser.add_argument("--compile", action="store_true", help="torch.compile too: minutes")
    parser.add_argument("--no-store", action="store_true", help="print only")
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    options = parser.parse_args(words)
    compiled = compiles and options.compile
    keep_freed_memory()
    with threads(options.threads):
        llm, name = subjects.backbone(torch.device("cpu"))
        found = measure(llm, options.repeats, compiled)
        print(f"{name}\n\n{text(found)}")
        if not options.no_store:
            notes = [f"language model: {name}", found.title, *found.notes]
            again = f".venv/bin/python -m benchmarks.{section}"
            again += " --compile" if compiled else ""
            store(section, found.rows, notes=notes, again=again, folder=options.results)
