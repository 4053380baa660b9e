"""What a training says while it runs: a bar on stderr, lines in `metrics.jsonl`, a plot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ipn_core.files import atomic_write

__all__ = ["Metrics", "bar", "plot"]

METRICS = "metrics.jsonl"
PLOT = "loss.png"


class Metrics:
    """Lines of JSON, one an entry; resuming forgets those after the saved state."""

    def __init__(self, folder: Path, stage: int = 0, step: int = 0) -> None:
        """Open the file, keeping what was logged up to a step of a stage."""
        self.path = folder / METRICS
        kept = [e for e in self.read() if (e["stage_index"], e["step"]) <= (stage, step)]
        atomic_write(self.path, "".join(json.dumps(e) + "\n" for e in kept).encode())

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines if line]

    def write(self, **entry: Any) -> None:
        """Append a line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def bar(console: Console) -> Progress:
    """Return a progress bar with rate, time and time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=not console.is_terminal,
    )


def plot(metrics: Metrics) -> Path | None:
    """Draw the loss of every stage, and validation accuracy where there is any, as `loss.png`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = metrics.read()
    names = list(dict.fromkeys(e["stage"] for e in entries if "loss" in e))
    if not names:
        return None
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        losses = [(e["step"], e["loss"]) for e in entries if e["stage"] == name and "loss" in e]
        right = [
            (e["step"], 100 * e["accuracy"])
            for e in entries
            if e["stage"] == name and "accuracy" in e
        ]
        axes.plot(*zip(*losses, strict=True), color="#1f5fa8", linewidth=1)
        axes.set_title(name)
        axes.set_xlabel("step")
        axes.set_ylabel("loss", color="#1f5fa8")
        if right:
            twin = axes.twinx()
            twin.plot(*zip(*right, strict=True), color="#c2571a", marker="o", markersize=3)
            twin.set_ylim(0, 100)
            twin.set_ylabel("validation accuracy, %", color="#c2571a")
    target = metrics.path.with_name(PLOT)
    atomic_write(target, lambda path: figure.savefig(path, format="png", dpi=120))
    return target
