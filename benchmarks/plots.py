"""Plots of a device's results: attention over keys, the roofline, and modules beside libraries'."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.roofline import case_of, roofs, work
from ipn_core.benchmarking import Results, Row, Section
from ipn_core.files import atomic_write

__all__ = ["draw"]

COLOURS = {
    "auto": "#000000",
    "eager": "#9a8a1f",
    "flex": "#8a4fa3",
    "sdpa": "#1f5fa8",
    "sdpa-flash": "#c2571a",
    "sdpa-math": "#5b6670",
    "sdpa-efficient": "#2a9d9d",
    "sdpa-cudnn": "#7aa6d8",
    "xformers": "#3a8f4d",
    "xformers-cutlass": "#b0306a",
    "xformers-flash": "#e0a030",
    "xformers-flash3": "#8fbf5f",
    "xformers-splitk": "#d07070",
}
OTHER = "#bbbbbb"
LINES = {"dtype": "float32", "head_dim": 64, "masking": "none", "grad": False, "heads": 8}


def draw(results: Results, folder: Path) -> dict[str, Path]:
    """Draw what there is to draw; returns the files by what they show."""
    found: dict[str, Path] = {}

    def save(what: str, figure: Any) -> None:
        path = folder / f"{results.device}-{what}.png"
        atomic_write(path, lambda to: figure.savefig(to, format="png", dpi=100))
        found[what] = path

    attention = results.sections.get("attention")
    if attention is not None:
        timed = list(_timed(attention))
        if any(_is_line(row) for row in timed):
            save("attention", _attention(timed))
        peaks = results.sections.get("peaks")
        if peaks is not None and timed:
            save("roofline", _roofline(timed, peaks))
    modules = results.sections.get("modules")
    if modules is not None and any(row.unit == "s" and row.median for row in modules.rows):
        save("modules", _modules(modules))
    return found


def _figure(columns: int, width: float = 3.6, height: float = 3.4) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _timed(section: Section) -> Iterable[Row]:
    """The rows of a backend that has a time."""
    return (row for row in section.rows if row.unit == "s" and row.median is not None)


def _is_line(row: Row) -> bool:
    return all(row.case[key] == value for key, value in LINES.items()) and row.case["batch"] == 8


def _attention(rows: list[Row]) -> Any:
    """Draw milliseconds over keys, a line a backend and a panel for each number of queries."""
    mine = [row for row in rows if _is_line(row)]
    queries = sorted({int(row.case["queries"] or 0) for row in mine})
    figure, axes = _figure(len(queries))
    for one, q in zip(axes, queries, strict=True):
        for name in dict.fromkeys(str(row.case["backend"]) for row in mine):
            points = sorted(
                (int(row.case["keys"] or 0), 1000 * (row.median or 0))
                for row in mine
                if row.case["backend"] == name and row.case["queries"] == q
            )
            style = "--" if name == "auto" else "-"
            one.plot(*zip(*points, strict=True), style, marker=".", label=name, color=_of(name))
        one.set_title(f"{q} queries")
        one.set_xlabel("keys")
        _log(one)
    axes[0].set_ylabel("ms")
    figure.suptitle("float32, forward, batch 8, 8 heads 64 wide, no mask", fontsize=9)
    axes[-1].legend(fontsize=7)
    return figure


def _roofline(rows: list[Row], peaks: Section) -> Any:
    """Draw operations a second over operations a byte, under what this device reached."""
    limits = roofs(peaks)
    dtypes = [d for d in limits.flops if any(row.case["dtype"] == d for row in rows)]
    figure, axes = _figure(len(dtypes), 4.4, 3.8)
    for one, dtype in zip(axes, dtypes, strict=True):
        mine = [row for row in rows if row.case["dtype"] == dtype and row.case["backend"] != "auto"]
        for name in dict.fromkeys(str(row.case["backend"]) for row in mine):
            for grad, marker in ((False, "."), (True, "x")):
                points = [
                    (needed.intensity, needed.flops / (row.median or 1))
                    for row in mine
                    if row.case["backend"] == name and row.case["grad"] is grad
                    for needed in [work(case_of(row))]
                ]
                if points:
                    label = name if marker == "." else None
                    one.scatter(
                        *zip(*points, strict=True),
                        s=14,
                        marker=marker,
                        color=_of(name),
                        label=label,
                    )
        intensities = [work(case_of(row)).intensity for row in mine] or [1.0]
        ends = [
            min(intensities) / 2,
            max(2 * max(intensities), limits.flops[dtype] / limits.memory),
        ]
        for speed, style, what in (
            (limits.memory, "-", "largest copy"),
            (limits.cache, ":", "fastest copy"),
        ):
            corner = limits.flops[dtype] / speed
            xs = [ends[0], *([corner] if ends[0] < corner < ends[1] else []), ends[1]]
            ys = [min(limits.flops[dtype], x * speed) for x in xs]
            one.plot(xs, ys, style, color="#444444", linewidth=1, label=what)
        one.set_title(f"{dtype}: {limits.flops[dtype] / 1e9:,.3g} GFLOP/s")
        one.set_xlabel("operations a byte, at least")
        _log(one)
    axes[0].set_ylabel("operations a second")
    axes[-1].legend(fontsize=7, title="forward ., both x", title_fontsize=7)
    return figure


def _modules(section: Section) -> Any:
    """Draw milliseconds of ours beside the library's, for one picture forward."""
    rows = {
        (row.case["strategy"], row.case["of"]): 1000 * row.median
        for row in section.rows
        if row.unit == "s"
        and row.median is not None
        and (row.case["batch"], row.case["dtype"], row.case["grad"]) == (1, "float32", False)
        and row.case["size"] == "starter"
    }
    names = sorted({strategy for strategy, _ in rows}, key=str)
    figure, (axis,) = _figure(1, 8.0)
    for shift, whose, colour in ((-0.2, "ours", "#1f5fa8"), (0.2, "theirs", "#c2571a")):
        there = [
            (place, rows[name, whose]) for place, name in enumerate(names) if (name, whose) in rows
        ]
        axis.bar(
            [x + shift for x, _ in there], [y for _, y in there], 0.4, label=whose, color=colour
        )
    axis.set_xticks(range(len(names)), names, rotation=25)
    axis.set_yscale("log")
    axis.set_ylabel("ms, one picture, forward, float32")
    axis.grid(axis="y", alpha=0.3)
    axis.legend()
    return figure


def _of(name: str) -> str:
    return COLOURS.get(name, OTHER)


def _log(axis: Any) -> None:
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
