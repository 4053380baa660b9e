"""Where the benchmarks of this workspace keep what they measured: one file a device.

    from benchmarks.results import Row, store

    rows = [Row.of("prefix 128/first token", seconds, {"prefix": 128}, goal=…), …]
    store("first-token", rows)

writes the section `first-token` of `benchmarks/results/<device>.json` anew and leaves the other
sections as they are; `python -m benchmarks.render` puts them into the documents.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ipn_core import benchmarking
from ipn_core.benchmarking import Row, Section

__all__ = ["FOLDER", "Row", "Section", "command", "path_of", "store"]

FOLDER = Path(__file__).parent / "results"


def path_of(device: str = "cpu", folder: Path | None = None) -> Path:
    """Return the file of a device.

    Args:
        device: "cpu" or "cuda"; for a CPU the number of torch's threads is part of the name.
        folder: by default that of this workspace.
    """
    return (folder or FOLDER) / f"{benchmarking.device_name(device)}.json"


def command(file: str, kind: str = "cpu", grid: str | None = None) -> str:
    """Return what measures a section again, wherever it was started from.

    Args:
        file: of the benchmark.
        kind: "cpu" or "cuda".
        grid: the value of `--grid`, None for what the kind gets anyway.
    """
    which = "gpu" if kind == "cuda" else "not gpu"
    words = [".venv/bin/python", "-m", "pytest", f"benchmarks/{Path(file).name}", "-m", which]
    return shlex.join([*words, *(["--grid", grid] if grid else [])])


def store(
    name: str,
    rows: Sequence[Row],
    device: str = "cpu",
    *,
    notes: Sequence[str] = (),
    again: str | None = None,
    folder: Path | None = None,
) -> Path:
    """Write a section anew; returns its file.

    Call it while as many threads are set as were measured with (`timing.threads`).

    Args:
        name: of the benchmark, such as "attention", "engine", "first-token" or "training".
        rows: what was measured, in the order in which they are to be shown.
        device: "cpu" or "cuda".
        notes: sentences that belong to them.
        again: the command that measures them again (`command`), by default what runs now.
        folder: by default that of this workspace.
    """
    path = path_of(device, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    about = benchmarking.about(device, again)
    section = Section(about=about, notes=tuple(notes), rows=tuple(rows))
    benchmarking.store(path, benchmarking.device_name(device), name, section)
    return path
