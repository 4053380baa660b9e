"""What a training says while it runs: a bar or lines on stderr, `metrics.jsonl`, a plot."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ipn_core.files import atomic_write
from ipn_core.progress import NOTE_EVERY_S
from ipn_core.training.metrics import Metrics
from ipn_core.training.processes import together

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ipn_core.training.config import TrainConfig
    from ipn_core.training.state import Position

__all__ = ["Log", "Moving", "bar", "plot"]

PLOT = "loss.png"


class Log:
    """What a training finds out: in `metrics.jsonl` first, then where trackers follow it.

    Attributes:
        best: the entry of the best validation so far, of the last stage with any; the same in all
            processes.
    """

    def __init__(
        self, folder: Path, position: Position, config: TrainConfig, accelerator: Accelerator
    ) -> None:
        """Open the logs of a training that goes on from a position; one process writes."""
        main = accelerator.is_main_process
        self.metrics = Metrics(folder, position.stage, position.step) if main else None
        self._accelerator = accelerator
        self._before = [0, *itertools.accumulate(stage.steps for stage in config.stages)]
        self.best = together(accelerator, [self.metrics.best() if self.metrics else None])[0]
        if config.trackers:
            begin = self._before[position.stage] + position.step + 1
            # TensorBoard then leaves out what an interrupted run wrote after the saved state.
            tensorboard = {"purge_step": begin} if begin > 1 else {}
            accelerator.init_trackers(folder.name, init_kwargs={"tensorboard": tensorboard})

    def write(self, here: dict[str, Any], found: dict[str, Any]) -> bool:
        """Note what was found, and whether it is the best validation so far.

        Args:
            here: `stage`, `stage_index` and `step`.
            found: numbers by name; others are for the file alone.
        """
        entry = {**here, **found}
        if self.metrics is not None:
            self.metrics.write(**entry)
        if self._accelerator.trackers:
            numbers = {f"{here['stage']}/{k}": v for k, v in found.items() if type(v) is float}
            step = self._before[here["stage_index"]] + here["step"]
            self._accelerator.log(numbers, step=step)
        if "accuracy" not in found:
            return False
        before = self.best
        better = (
            before is None
            or before["stage_index"] != here["stage_index"]
            or found["accuracy"] > before["accuracy"]
        )
        if better:
            self.best = entry
        return better

    def close(self) -> None:
        """Let the trackers finish."""
        for tracker in self._accelerator.trackers:
            tracker.finish()


def bar(console: Console) -> Progress:
    """Return a progress bar with rate, time and time left; off a terminal, lines that say so.

    Each task has a field `note`: what to say next to how far it is.
    """
    if not (console.is_interactive and console.file.isatty()):
        return _Lines(console)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


class _Lines(Progress):
    """Progress for a log: draws nothing, and prints a line now and then and one at the end."""

    def __init__(self, console: Console) -> None:
        # The window is long because a rate needs two steps in it, and steps may be slow.
        super().__init__(console=console, disable=True, speed_estimate_period=600)
        self._said = self.get_time()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Note how far a task is; print that if it is due."""
        task = self._tasks[task_id]
        before = task.completed
        super().update(task_id, **changes)
        ended = task.finished and task.completed != before
        if ended or self.get_time() - self._said >= NOTE_EVERY_S:
            self._said = self.get_time()
            self.console.print(_line(task), markup=False, highlight=False, soft_wrap=True)


def _line(task: Task) -> str:
    """Return such as "align: 120 of 1,000 (2.1 a second, 0:06:59 left), loss 0.693"."""
    total = "" if task.total is None else f" of {task.total:,.0f}"
    facts = [] if task.speed is None else [f"{task.speed:.3g} a second"]
    if task.finished_time is not None:
        facts.append(f"took {_clock(task.finished_time)}")
    elif task.time_remaining is not None:
        facts.append(f"{_clock(task.time_remaining)} left")
    aside = f" ({', '.join(facts)})" if facts else ""
    note = f", {task.fields['note']}" if task.fields["note"] else ""
    return f"{task.description}: {task.completed:,.0f}{total}{aside}{note}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


class Moving:
    """Moves one task of a progress bar: a callback of how many are done, and of how many."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress = progress
        self.task = task

    def __call__(self, done: int, total: int | None = None) -> None:
        """Move it."""
        self.progress.update(self.task, completed=done, total=total)


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
