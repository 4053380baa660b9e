"""Plots of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ipn_core.comparison.results import Group, Results
from ipn_core.files import atomic_write

__all__ = ["draw_plots"]

_COLOURS = ("#1f5fa8", "#c2571a", "#3a8f4d", "#8a4fa3", "#9a8a1f", "#5b6670", "#b0306a", "#2a9d9d")


def draw_plots(results: Results, folder: Path) -> list[tuple[str, str]]:
    """Draw what there is to draw; returns file names and what each shows."""
    plots = [("accuracy.png", "Accuracy of each arm", _accuracy)]
    if len({group.dynamic for group in results.groups}) > 1:
        plots.append(("tokens.png", "Accuracy against dynamic tokens", _tokens))
    plots.append(("flops.png", "Accuracy against the cost of training", _flops))
    for name, _, draw in plots:
        _save(results, folder / name, draw)
    return [(name, title) for name, title, _ in plots]


def _save(results: Results, path: Path, draw: Callable[[Results, list[Any]], None]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(results.splits)
    figure = Figure(figsize=(4.4 * count, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, count, squeeze=False, sharey=True)[0])
    draw(results, axes)
    for one, (task, split) in zip(axes, results.splits, strict=True):
        one.set_title(f"{task}, {split}")
        one.set_ylim(0, 100)
        one.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    atomic_write(path, lambda to: figure.savefig(to, format="png", dpi=110))


def _colour(results: Results, group: Group) -> str:
    names = list(dict.fromkeys(g.name for g in results.groups))
    return _COLOURS[names.index(group.name) % len(_COLOURS)]


def _accuracy(results: Results, axes: list[Any]) -> None:
    for one, (task, split) in zip(axes, results.splits, strict=True):
        for place, group in enumerate(results.main):
            cell = group.cell(task, split)
            if cell is None:
                continue
            found = cell.accuracy
            one.bar(place, 100 * found.mean, color=_colour(results, group))
            below, above = found.mean - found.low, found.high - found.mean
            one.errorbar(place, 100 * found.mean, [[100 * below], [100 * above]], color="black")
        one.set_xticks(range(len(results.main)), [g.name for g in results.main], rotation=35)


def _tokens(results: Results, axes: list[Any]) -> None:
    names = dict.fromkeys(g.name for g in results.groups if g.dynamic != results.dynamic)
    for one, (task, split) in zip(axes, results.splits, strict=True):
        for name in names:
            groups = sorted((g for g in results.groups if g.name == name), key=lambda g: g.dynamic)
            points = [(g.dynamic, c.accuracy) for g in groups if (c := g.cell(task, split))]
            one.plot(
                [k for k, _ in points],
                [100 * found.mean for _, found in points],
                marker="o",
                label=name,
                color=_colour(results, groups[0]),
            )
        one.set_xscale("log", base=2)
        one.set_xlabel("dynamic tokens K")
        one.legend()


def _flops(results: Results, axes: list[Any]) -> None:
    for one, (task, split) in zip(axes, results.splits, strict=True):
        for group in results.main:
            cell = group.cell(task, split)
            if cell is not None:
                one.scatter(
                    group.flops / 1e12,
                    100 * cell.accuracy.mean,
                    color=_colour(results, group),
                    label=group.name,
                )
        one.set_xlabel("train TFLOPs")
        one.legend()
