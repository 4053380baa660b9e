"""Plots of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from ipn_core.comparison.results import GUESSING, Group, Results
from ipn_core.evaluation.statistics import Interval
from ipn_core.files import atomic_write

__all__ = ["draw_plots"]

_Draw: TypeAlias = Callable[[Results, Any], None]
_Cost: TypeAlias = tuple[str, Callable[[Group], float | None]]
"""What the axis is called, and where an arm stands on it."""

_COLOURS = ("#1f5fa8", "#c2571a", "#3a8f4d", "#8a4fa3", "#9a8a1f", "#5b6670", "#b0306a", "#2a9d9d")


def draw_plots(
    results: Results, folder: Path, first_token: dict[str, Any]
) -> list[tuple[str, str]]:
    """Draw what there is to draw; returns file names and what each shows."""
    timed = {name: found["seconds"] for name, found in first_token.items() if "seconds" in found}
    flops: list[_Cost] = [("train TFLOPs", lambda g: g.flops / 1e12)]
    others: list[_Cost] = [
        ("first token, ms", lambda g: 1000 * timed[g.name] if g.name in timed else None),
        ("training, examples/s", lambda g: g.speed),
        ("peak memory, GiB", lambda g: g.peak_memory / 2**30),
    ]
    plots = [("accuracy.png", "Accuracy of each arm", 1, _accuracy)]
    if len({group.dynamic for group in results.groups}) > 1:
        plots.append(("tokens.png", "Accuracy against dynamic tokens", 1, _tokens))
    plots += [
        ("flops.png", "Accuracy against the cost of training", 1, partial(_costs, flops)),
        ("cost.png", "Accuracy against other costs", len(others), partial(_costs, others)),
    ]
    for name, _, rows, draw in plots:
        _save(results, folder / name, rows, draw)
    return [(name, title) for name, title, *_ in plots]


def _save(results: Results, path: Path, rows: int, draw: _Draw) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(results.splits)
    figure = Figure(figsize=(4.4 * count, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, count, squeeze=False, sharey=True)
    draw(results, axes)
    for row in axes:
        row[0].set_ylabel("accuracy, %")
        for one, (task, split) in zip(row, results.splits, strict=True):
            one.set_title(f"{task}, {split}")
            one.set_ylim(0, 100)
            one.grid(axis="y", alpha=0.3)
            guess = results.asker.cells[task, split, False].guess
            one.axhline(100 * guess, color="black", ls=":", lw=1, label=GUESSING)
    # One for all panels, outside of them, where it hides nothing.
    named: dict[str, Any] = {}
    for one in axes.flat:
        lines, names = one.get_legend_handles_labels()
        named |= dict(zip(names, lines, strict=True))
    if named:
        figure.legend(named.values(), named, loc="outside lower center", ncols=len(named))
    atomic_write(path, lambda to: figure.savefig(to, format="png", dpi=110))


def _colour(results: Results, group: Group) -> str:
    names = list(dict.fromkeys(g.name for g in results.groups))
    return _COLOURS[names.index(group.name) % len(_COLOURS)]


def _interval(found: Interval) -> tuple[float, list[list[float]]]:
    """Return the mean and how far the interval goes below and above it, in per cent."""
    below, above = found.mean - found.low, found.high - found.mean
    return 100 * found.mean, [[100 * below], [100 * above]]


def _accuracy(results: Results, axes: Any) -> None:
    for one, (task, split) in zip(axes[0], results.splits, strict=True):
        for place, group in enumerate(results.main):
            if (cell := group.cell(task, split)) is None:
                continue
            mean, bar = _interval(cell.accuracy)
            one.bar(place, mean, color=_colour(results, group))
            one.errorbar(place, mean, bar, color="black")
        one.set_xticks(range(len(results.main)), [g.name for g in results.main], rotation=35)


def _tokens(results: Results, axes: Any) -> None:
    names = dict.fromkeys(g.name for g in results.groups if g.dynamic != results.dynamic)
    for one, (task, split) in zip(axes[0], results.splits, strict=True):
        for name in names:
            groups = sorted((g for g in results.groups if g.name == name), key=lambda g: g.dynamic)
            points = [(g.dynamic, c.accuracy) for g in groups if (c := g.cell(task, split))]
            bars = [_interval(found) for _, found in points]
            one.errorbar(
                [k for k, _ in points],
                [mean for mean, _ in bars],
                [[bar[side][0] for _, bar in bars] for side in (0, 1)],
                marker="o",
                capsize=2,
                label=name,
                color=_colour(results, groups[0]),
            )
        one.set_xscale("log", base=2)
        counts = sorted({group.dynamic for group in results.groups})
        one.set_xticks(counts, [str(count) for count in counts])
        one.set_xlabel("dynamic tokens K")


def _costs(costs: Sequence[_Cost], results: Results, axes: Any) -> None:
    """Draw a row of panels for each cost, which is None for what is not known."""
    for row, (label, cost) in zip(axes, costs, strict=True):
        for one, (task, split) in zip(row, results.splits, strict=True):
            one.set_xlabel(label)
            for group in results.main:
                cell, at = group.cell(task, split), cost(group)
                if cell is not None and at is not None:
                    mean, bar = _interval(cell.accuracy)
                    colour = _colour(results, group)
                    one.errorbar(at, mean, bar, marker="o", color=colour, label=group.name)
