"""The report of a comparison: Markdown, HTML, a table of all numbers, and plots."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ipn_core.comparison.plots import draw_plots
from ipn_core.comparison.results import GUESSING, Cell, Group, Results
from ipn_core.evaluation.statistics import FEW_CLUSTERS, Interval
from ipn_core.files import atomic_write

__all__ = ["SUMMARY", "write_report"]

SUMMARY = "In short"
"""The heading of the table that says most."""


@dataclass(frozen=True)
class Table:
    """Some rows under a heading."""

    heading: str
    about: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def write_report(
    results: Results, folder: Path, facts: dict[str, str], first_token: dict[str, Any]
) -> Path:
    """Write `report.md`, `report.html`, `results.csv` and the plots; returns `report.md`.

    Args:
        results: of all jobs.
        folder: where they go.
        facts: how it was made: command, versions, commit and so on.
        first_token: of `timing.first_token`.
    """
    atomic_write(folder / "results.csv", results.csv(first_token).encode())
    plots = draw_plots(results, folder, first_token)
    lead = [_asking_matters(results), *_against_the_blind(results)]
    tables = _tables(results, facts, first_token)
    atomic_write(folder / "report.md", _markdown(lead, tables, plots).encode())
    atomic_write(folder / "report.html", _html(lead, tables, plots, folder).encode())
    return folder / "report.md"


# -- what comes first ----------------------------------------------------------------------------


def _asking_matters(results: Results) -> str:
    """Say whether accuracy falls when the requests are those of other questions."""
    name = results.reference
    parts, ignored = [], []
    for task, split, own, foreign in results.asker.shuffled:
        fall = own.minus(foreign)
        parts.append(f"{_percent(own)} to {_percent(foreign)} on {task} {split}")
        if fall.low <= 0:
            ignored.append(f"{task} {split}")
    if ignored:
        return (
            f"**The request of `{name}` is ignored** on {', '.join(ignored)}: with the requests of "
            f"other questions its accuracy does not fall ({'; '.join(parts)})."
        )
    return (
        f"**The request of `{name}` is used**: with the requests of other questions its accuracy "
        f"falls from {'; from '.join(parts)}."
    )


def _against_the_blind(results: Results) -> list[str]:
    """Compare the reference with all arms that cannot ask, split by split.

    It is above every one of them only if no interval of a difference reaches zero; the best is not
    always the one that is hardest to tell from it.
    """
    lines = []
    for task, split in results.splits:
        mine = results.asker.cell(task, split)
        others = [(g, c) for g in results.blind if (c := g.cell(task, split)) is not None]
        if mine is None or not others:
            continue
        gaps = {g.name: (c, mine.minus(c)) for g, c in others}
        best = max(gaps, key=lambda name: gaps[name][0].accuracy.mean)
        shown = gaps[best][1]
        level = [name for name, (_, gap) in gaps.items() if gap.low <= 0]
        if not level:
            verdict = "is above every"
        elif best in level:
            verdict = f"is {'below' if shown.high < 0 else 'level with'} the best"
        else:
            verdict = "is not surely above every"
        more = "".join(
            f"; from `{name}` ({_percent(gaps[name][0])}) it is {_points(gaps[name][1])}"
            for name in level
            if best not in level
        )
        lines.append(
            f"On {task} {split} `{results.reference}` ({_percent(mine)}) {verdict} arm of equal "
            f"budget that cannot ask; the best of them is `{best}` ({_percent(gaps[best][0])}), "
            f"the difference {_points(shown)}{more}."
        )
    return lines


# -- tables --------------------------------------------------------------------------------------


def _tables(results: Results, facts: dict[str, str], first_token: dict[str, Any]) -> list[Table]:
    tables = [_summary(results), _arms(results), _learned(results)]
    tables += [_split(results, task, split) for task, split in results.splits]
    tables += [_shuffled(results), _differences(results)]
    sweep = _sweep(results)
    return [*tables, *([sweep] if sweep else []), _cost(results, first_token), _made(facts)]


def _summary(results: Results) -> Table:
    rows = []
    for group in results.main:
        asks = "yes" if group.asks else "no"
        rows.append((f"`{group.name}`", asks, *_accuracies(results, group)))
    for group in results.askers:
        shown = _accuracies(results, group, shuffled=True)
        rows.append((f"`{group.name}`, requests of other questions", "in vain", *shown))
    asked = (results.asker.cells[task, split, False] for task, split in results.splits)
    rows.append((GUESSING, "no", *(f"{100 * cell.guess:.1f}" for cell in asked)))
    tokens, seeds = results.asker.tokens, len(results.asker.seeds)
    return Table(
        SUMMARY,
        f"Accuracy in per cent, with the 95 % interval over seeds and pictures; {tokens} tokens "
        f"into the LLM for every arm, {seeds} {'seed' if seeds == 1 else 'seeds'}.",
        ("arm", "asks", *(f"{task} {split}" for task, split in results.splits)),
        rows,
    )


def _accuracies(results: Results, group: Group, shuffled: bool = False) -> list[str]:
    """Say what an arm has on each split, nothing where it was not asked so."""
    cells = (group.cell(task, split, shuffled) for task, split in results.splits)
    return ["" if cell is None else _interval(cell.accuracy) for cell in cells]


def _arms(results: Results) -> Table:
    rows = []
    for group in results.groups:
        arm = group.arm
        same = results.group(results.reference, group.dynamic) or results.asker
        change = arm["parameters"] / same.arm["parameters"] - 1
        rows.append(
            (
                f"`{group.name}`",
                str(group.dynamic),
                "yes" if group.asks else "no",
                f"{arm['static']} + {arm['request']} + {arm['message']} = {group.tokens}",
                f"{arm['parameters']:,} ({change:+.1%})",
                f"`{arm['width']}` = {arm['width_value']}",
                f"{sum(stage['steps'] for stage in arm['stages']):,}",
                ", ".join(map(str, group.seeds)),
                f"{group.cpu_minutes:.1f}",
            )
        )
    header = ("arm", "K", "can ask", "S + R + K", "trained parameters", "width", "steps", "seeds")
    return Table(
        "Arms",
        "Tokens into the LLM are static S + request R + dynamic K. The width is solved for, so "
        "that all arms train as many parameters as the reference, which is the one compared with. "
        "CPU minutes are those of all of a job, evaluation included, of the seed that took most.",
        (*header, "CPU minutes"),
        rows,
    )


def _learned(results: Results) -> Table:
    rows = []
    for group in results.main:
        stages = "; ".join(
            f"{s['name']}: {', '.join(s['objectives'])} ({s['steps']} steps)"
            for s in group.arm["stages"]
        )
        left = " ".join(f"{name}: {why}" for name, why in group.arm["left_out"].items())
        rows.append((f"`{group.name}`", stages, left or "nothing"))
    return Table(
        "What each arm learned from",
        "Every arm gets every alignment that its inputs allow, on the same examples in the same "
        "order.",
        ("arm", "stages and objectives", "what it could not do"),
        rows,
    )


def _split(results: Results, task: str, split: str) -> Table:
    kinds = results.kinds(task, split)
    rows = []
    for group in results.main:
        cell = group.cell(task, split)
        if cell is not None:
            seeds = " ".join(f"{100 * right:.1f}" for right in cell.right.mean(1))
            found = [_interval(cell.only(kind).accuracy) for kind in kinds]
            rows.append((f"`{group.name}`", *found, seeds))
    whole = results.asker.cells[task, split, False]
    cells = {kind: whole.only(kind) for kind in kinds}
    rows.append((GUESSING, *(f"{100 * cell.guess:.1f}" for cell in cells.values()), ""))
    counts = ", ".join(f"{k} {c.right.shape[1]:,} ({c.clusters:,})" for k, c in cells.items())
    few = ", ".join(kind for kind, cell in cells.items() if cell.clusters < FEW_CLUSTERS)
    doubt = f" Too few pictures for intervals that can be trusted: {few}." if few else ""
    return Table(
        f"Accuracy on {task}, split {split}",
        "Per cent, with the 95 % interval over seeds and pictures. Questions (and pictures that "
        f"they are about): {counts}.{doubt}",
        ("arm", *kinds, "each seed"),
        rows,
    )


def _shuffled(results: Results) -> Table:
    rows = []
    for group in results.askers:
        for task, split, own, foreign in group.shuffled:
            for kind in results.kinds(task, split):
                mine, others = own.only(kind), foreign.only(kind)
                rows.append(
                    (
                        f"`{group.name}`",
                        f"{task} {split}",
                        kind,
                        _interval(mine.accuracy),
                        _interval(others.accuracy),
                        f"{100 * mine.guess:.1f}",
                    )
                )
    return Table(
        "With the requests of other questions",
        "Every question gets the request of another question about another picture.",
        ("arm", "split", "type", "own requests", "others' requests", GUESSING),
        rows,
    )


def _differences(results: Results) -> Table:
    first = [g for g in results.main if g.name == results.reference]
    groups = [*first, *(g for g in results.main if g.name != results.reference)]
    rows = []
    for task, split in results.splits:
        for one, other in combinations(groups, 2):
            mine, theirs = one.cell(task, split), other.cell(task, split)
            if mine is not None and theirs is not None:
                names = (f"`{one.name}`", f"`{other.name}`")
                gap = _points(mine.minus(theirs))
                rows.append((f"{task} {split}", *names, gap, _p(mine, theirs)))
    return Table(
        "Paired differences",
        "Points of accuracy over the same questions, with the 95 % interval over seeds and "
        "pictures (paired bootstrap), and McNemar's exact p for the first seed. Neither allows for "
        "the number of pairs.",
        ("split", "first", "second", "first minus second", "p"),
        rows,
    )


def _sweep(results: Results) -> Table | None:
    numbers = sorted({group.dynamic for group in results.groups})
    if len(numbers) < 2:
        return None
    rows = []
    names = dict.fromkeys(g.name for g in results.groups if g.dynamic != results.dynamic)
    for task, split in results.splits:
        for name in names:
            groups = [results.group(name, number) for number in numbers]
            cells = [None if g is None else g.cell(task, split) for g in groups]
            shown = ["" if c is None else _interval(c.accuracy) for c in cells]
            rows.append((f"{task} {split}", f"`{name}`", *shown))
    return Table(
        "Accuracy against the number of tokens",
        "Every arm puts R + K tokens into the LLM, as the reference does.",
        ("split", "arm", *(f"K = {number}" for number in numbers)),
        rows,
    )


def _cost(results: Results, first_token: dict[str, Any]) -> Table:
    names = list(dict.fromkeys(s["name"] for g in results.main for s in g.arm["stages"]))
    rows = []
    for group in results.main:
        rates = [*(group.rate(name) for name in names), group.speed]
        timed = first_token.get(group.name, {})
        rows.append(
            (
                f"`{group.name}`",
                f"{group.flops / 1e12:.3g}",
                *("" if rate is None else f"{rate:.1f}" for rate in rates),
                f"{group.peak_memory / 2**30:.2f}",
                f"{1000 * timed['seconds']:.0f}" if "seconds" in timed else "",
                f"{timed['median']:.2f} ({timed['spread']})" if timed else "",
            )
        )
    return Table(
        "What it costs",
        "Train TFLOPs count what is computed in the steps of training, and not the features and "
        "requests, which are read once for all arms. Examples a second are medians of the log, and "
        "over all stages weighted by how long each lasts; jobs may have run side by side. First "
        "token: the arms alternate in one process; medians, and of the ratio quartiles, too.",
        (
            "arm",
            "train TFLOPs",
            *(f"{name}, examples/s" for name in (*names, "all stages")),
            "peak memory, GiB",
            "first token, ms",
            "first token / reference",
        ),
        rows,
    )


def _made(facts: dict[str, str]) -> Table:
    return Table("How it was made", "", ("", ""), [(k, f"`{v}`") for k, v in facts.items()])


# -- numbers as text -----------------------------------------------------------------------------


def _percent(cell: Cell) -> str:
    return f"{100 * float(cell.right.mean()):.1f} %"


def _interval(found: Interval) -> str:
    return f"{100 * found.mean:.1f} ({100 * found.low:.1f}-{100 * found.high:.1f})"


def _points(found: Interval) -> str:
    return f"{100 * found.mean:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _p(mine: Cell, other: Cell) -> str:
    value = mine.p_value(other)
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# -- Markdown and HTML ---------------------------------------------------------------------------


def _markdown(
    lead: Sequence[str], tables: Sequence[Table], plots: Sequence[tuple[str, str]]
) -> str:
    parts = [lead[0], "\n".join(f"- {line}" for line in lead[1:])]
    parts += [f"![{title}]({name})" for name, title in plots]
    for table in tables:
        rows = [table.header, ["---"] * len(table.header), *table.rows]
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
        parts += [f"## {table.heading}", table.about, "\n".join(lines)]
    return "\n\n".join(part for part in parts if part) + "\n"


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: 0.3rem 0.6rem; text-align: left; vertical-align: top; }
img { max-width: 100%; } code { background: #f2f2f2; }
"""


def _html(
    lead: Sequence[str],
    tables: Sequence[Table],
    plots: Sequence[tuple[str, str]],
    folder: Path,
) -> str:
    items = "".join(f"<li>{_inline(line)}</li>" for line in lead[1:])
    body = [f"<p>{_inline(lead[0])}</p>", f"<ul>{items}</ul>" if items else ""]
    for name, title in plots:
        data = base64.b64encode((folder / name).read_bytes()).decode()
        body.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    for table in tables:
        head = "".join(f"<th>{_inline(cell)}</th>" for cell in table.header)
        rows = "".join(
            "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>"
            for row in table.rows
        )
        body.append(
            f"<h2>{_inline(table.heading)}</h2><p>{_inline(table.about)}</p>"
            f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Comparison</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _inline(text: str) -> str:
    """Escape text, and turn its `code` and **bold** into tags."""
    pieces = html.escape(text).split("`")
    coded = [p if i % 2 == 0 else f"<code>{p}</code>" for i, p in enumerate(pieces)]
    bold = "".join(coded).split("**")
    return "".join(p if i % 2 == 0 else f"<strong>{p}</strong>" for i, p in enumerate(bold))
