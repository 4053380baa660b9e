"""Results as Markdown: a table for any section, and summaries of those with many rows."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ipn_core.benchmarking import Results, Row, Section

__all__ = [
    "EXCERPTS",
    "SUMMARIES",
    "amount",
    "everything",
    "measured_on",
    "notes_of",
    "rows_of",
    "table",
]

AUTO, RATIO = "auto", "auto over the fastest"
SLOT = re.compile(r"<[\w-]+>")


# -- any section -----------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    rows = [f"| {' | '.join(cells)} |" for cells in (head, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def measured_on(section: Section) -> str:
    """Say on what a section was measured, when, and by what command."""
    about = section.about
    threads = about.get("threads")
    cpu = f"{about.get('cpu')}, {threads} thread{'' if threads == 1 else 's'}"
    device = about.get("gpu") or cpu
    with_ = ", ".join(
        f"{library} {about[library]}"
        for library in ("torch", "transformers", "xformers", "triton")
        if about.get(library)
    )
    return f"{device}; {with_}; {about.get('day')}; `{about.get('command')}`"


def notes_of(section: Section) -> list[str]:
    """Return a section's notes; what a page would take for a tag of HTML is written as code."""
    return [SLOT.sub(r"`\g<0>`", note) for note in section.notes]


def rows_of(section: Section) -> str:
    """Return all rows of any section; `n` is how many samples each has."""
    plain = any(row.goal is not None for row in section.rows)
    head = ["", "median", "95 % interval", "n", *(["goal"] if plain else []), "error"]
    return table(head, (_cells(row, plain) for row in section.rows))


def _cells(row: Row, goals: bool) -> list[str]:
    name = row.name.replace("|", "\\|")
    if row.median is None or row.low is None or row.high is None:
        return [name, f"no: {'; '.join(row.reasons)}", "", "", *([""] if goals else []), ""]
    goal = ""
    if row.goal is not None:
        bound = "at most" if row.better == "lower" else "at least"
        goal = f"{bound} {row.goal:g}{', **missed**' if row.misses_goal() else ''}"
    return [
        name,
        amount(row.median, row.unit),
        f"{amount(row.low, row.unit)} to {amount(row.high, row.unit)}",
        str(row.samples),
        *([goal] if goals else []),
        "" if row.error is None else f"{row.error:.0e}",
    ]


def amount(value: float, unit: str) -> str:
    """Return a value in a unit of its size."""
    if unit == "ratio":
        return f"{value:.3f}" if abs(value) >= 0.05 else f"{value:.2g}"
    if unit == "s":
        return _scaled(value, {"s": 1.0, "ms": 1e-3, "µs": 1e-6})
    short = unit.replace("bytes", "B")
    return _scaled(value, {"T" + short: 1e12, "G" + short: 1e9, "M" + short: 1e6, short: 1.0})


def _scaled(value: float, units: Mapping[str, float]) -> str:
    """Write a value in the largest unit that it has one of, else in the last."""
    name = next((name for name, size in units.items() if abs(value) >= size), [*units][-1])
    return f"{value / units[name]:.3g} {name}"


# -- attention -------------------------------------------------------------------------------------


def attention(section: Section) -> str:
    """Sum the shapes up: how `auto` does beside the best, and what is the fastest where."""
    ratios = [row for row in section.rows if row.unit == "ratio" and row.median is not None]
    if not ratios:
        return "No backend was timed."
    worst = max(ratios, key=lambda row: row.median or 0)
    middle = statistics.median(row.median or 0 for row in ratios)
    missed = sum(row.misses_goal() for row in ratios)
    again = sum(row.more.get("attempts", 1) > 1 for row in ratios)
    said = (
        f"At {len(ratios)} shapes `auto` takes {middle:.3f} of the fastest backend's time in the "
        f"median and {worst.median:.3f} at most ({worst.name.partition(' / ')[0]}). Above "
        f"{worst.goal:g}: {missed}; timed more than once, because it was above at first: {again}."
    )
    return "\n\n".join([said, _groups(section, ratios), _by_shape(section)])


def _groups(section: Section, ratios: Sequence[Row]) -> str:
    """A line for each kind of call."""
    keys = ("dtype", "masking", "grad", "head_dim", "heads", "batch")
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in ratios:
        groups.setdefault(tuple(row.case[key] for key in keys), []).append(row)
    errors: dict[tuple[object, ...], float] = {}
    for row in section.rows:
        if row.unit == "s" and row.error is not None and row.median is not None:
            kind = tuple(row.case[key] for key in keys)
            errors[kind] = max(errors.get(kind, 0.0), row.error)
    lines = []
    for kind, rows in groups.items():
        wins = Counter(str(row.case["fastest"]) for row in rows).most_common()
        dtype, masking, grad, width, heads, batch = kind
        lines.append(
            [
                f"{dtype}, {masking}, {'forward and backward' if grad else 'forward'}",
                f"{heads} × {width}",
                str(batch),
                str(len(rows)),
                ", ".join(f"{name} {count}" for name, count in wins),
                f"{max(row.median or 0 for row in rows):.3f}",
                f"{errors.get(kind, 0.0):.0e}",
            ]
        )
    head = ["calls", "heads", "batch", "shapes", "fastest at", "auto / fastest, at most"]
    return table([*head, "largest error"], lines)


def _by_shape(section: Section) -> str:
    """Milliseconds of `auto` by queries and keys, and how many times as fast as eager that is."""
    mine: dict[tuple[int, int], dict[str, float]] = {}
    for row in section.rows:
        case = row.case
        kind = (case.get("dtype"), case.get("masking"), case.get("grad"), case.get("head_dim"))
        if row.unit != "s" or row.median is None or case.get("batch") != 8:
            continue
        if kind == ("float32", "none", False, 64) and case.get("heads") == 8:
            place = (int(case["queries"] or 0), int(case["keys"] or 0))
            mine.setdefault(place, {})[str(case["backend"])] = row.median
    if not mine:
        return ""
    queries, keys = (sorted({place[i] for place in mine}) for i in (0, 1))

    def cell(q: int, kv: int) -> str:
        times = mine.get((q, kv), {})
        if AUTO not in times:
            return ""
        gain = f", {times['eager'] / times[AUTO]:.1f} ×" if "eager" in times else ""
        return f"{amount(times[AUTO], 's')}{gain}"

    head = ["`auto`, and how many times as fast as `eager`", *(f"{kv} keys" for kv in keys)]
    lines = [[f"{q} queries", *(cell(q, kv) for kv in keys)] for q in queries]
    said = "Forward, float32, batch 8, 8 heads 64 wide, no mask:"
    return f"{said}\n\n{table(head, lines)}"


def _every_attention(section: Section) -> str:
    """A line a shape, a column a backend; then what refused, by its reasons."""
    shapes: dict[str, dict[str, Row]] = {}
    refused: Counter[tuple[str, str]] = Counter()
    for row in section.rows:
        shape, _, name = row.name.partition(" / ")
        shapes.setdefault(shape, {})[name] = row
        if row.median is None and name != RATIO:
            refused[name, "; ".join(row.reasons)] += 1
    names = [n for n in next(iter(shapes.values()), {}) if n not in (AUTO, RATIO)]
    there = [n for n in names if any(rows[n].median is not None for rows in shapes.values())]
    lines = []
    for shape, rows in shapes.items():
        cells = [rows[n].median for n in (*there, AUTO)]
        best = min((c for c in cells[:-1] if c is not None), default=None)
        shown = ["no" if c is None else amount(c, "s") for c in cells]
        shown = [f"**{s}**" if c == best and c else s for s, c in zip(shown, cells, strict=True)]
        ratio = rows[RATIO].median
        lines.append([shape, *shown, "" if ratio is None else f"{ratio:.3f}"])
    timed = table(["shape", *there, AUTO, "auto / fastest"], lines)
    why = table(
        ["backend", "shapes", "not, because"],
        ([name, str(count), reasons] for (name, reasons), count in sorted(refused.items())),
    )
    return f"{timed}\n\n{why}"


# -- modules ---------------------------------------------------------------------------------------


def modules(section: Section) -> str:
    """A line for each module: ours, the library's, and the ratio."""
    groups: dict[str, dict[str, Row]] = {}
    for row in section.rows:
        label, _, name = row.name.partition(" / ")
        groups.setdefault(label, {})[name] = row
    lines = []
    for label, rows in groups.items():
        ours, theirs, ratio = (rows.get(n) for n in ("ours", "theirs", "ours over theirs"))
        lines.append(
            [
                label,
                _time(ours),
                f"`{theirs.case['class']}`" if theirs and theirs.case.get("class") else "",
                _time(theirs),
                _time(ratio) if theirs and theirs.median is not None else "",
                f"{max((r.error or 0) for r in (ours, theirs) if r):.0e}",
            ]
        )
    head = ["module", "ours", "the library's class", "its time", "ours / its", "largest error"]
    return table(head, lines)


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    if row.median is None or row.p20 is None or row.p80 is None:
        return f"no: {'; '.join(row.reasons)}"
    median, p20, p80 = (amount(v, row.unit) for v in (row.median, row.p20, row.p80))
    return f"{median} ({p20} to {p80})"


SUMMARIES: dict[str, Callable[[Section], str]] = {"attention": attention, "modules": modules}
"""What documents show of a section; `rows_of` for any other."""
_WHOLE: dict[str, Callable[[Section], str]] = {"attention": _every_attention, "modules": modules}


def everything(results: Results) -> str:
    """Return all of a device's results as one page."""
    parts = [f"# {results.device}"]
    for name, section in results.sections.items():
        parts += [f"## {name}", measured_on(section), *notes_of(section)]
        parts.append(_WHOLE.get(name, rows_of)(section))
    return "\n\n".join(parts) + "\n"


# -- sentences -------------------------------------------------------------------------------------


def _first_token(section: Section) -> str:
    """Say what a first token with a look costs beside its floor, no look, and two passes."""
    row = "first-token-128"
    title = next(note for note in notes_of(section) if note.startswith(f"{row}: "))
    found = {one.name.removeprefix(f"{row}/"): one for one in section.rows}

    def said(name: str) -> str:
        one = found[name]
        values = (one.median, one.low, one.high)
        median, low, high = (f"{value:.2f}" for value in values if value is not None)
        return f"{median} ({low} to {high})"

    samples = found["one request round"].samples
    sizes = title.removeprefix(f"{row}: first token, ")
    return (
        f"A first token with a look takes {said('one request round : its floor')} of its floor's "
        f"time and {said('one request round : no request')} of the same words' without a look; two "
        f"passes take {said('two passes : one request round')} of it (medians of {samples} turns, "
        f"with their 95 % intervals; {sizes})."
    )


EXCERPTS: dict[str, tuple[str, Callable[[Section], str]]] = {
    "first-token": ("engine", _first_token)
}
"""What documents may ask for that is a sentence: of which section, and how it is made."""
