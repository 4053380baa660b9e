"""Put the counts of torture into docs/reliability.md: `python -m torture.render`.

The document asks for a section as the benchmarks' documents do, by two lines,
`<!-- torture inputs: begin -->` and `<!-- torture inputs: end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.pages import fill
from ipn_core.benchmarking import Results, Row, Section

__all__ = ["main", "table", "total"]

ROOT = Path(__file__).parents[1]
COUNTS = Path(__file__).parent / "results" / "counts.json"
PAGE = ROOT / "docs" / "reliability.md"
ASKED = re.compile(r"<!-- (torture (\w+)): begin -->")
TOTAL = "total"
"""What the document asks for to get one line about all sections."""
COLUMNS = ("tried", "refused", "taken", "broken")


def table(section: Section) -> str:
    """Return a section's counts as Markdown, with the command that makes them again."""
    head = [*COLUMNS, "median ms", "slowest s", "more"]
    lines = [f"| what | {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|---|"]
    lines += [_line(row) for row in section.rows]
    about = section.about
    made = f"`{about['command']}`, {about['day']}, {about['cpu']}, torch {about['torch']}."
    return "\n".join([*lines, "", made])


def total(sections: Mapping[str, Section]) -> str:
    """Return in one sentence what all sections counted, how long it took, and on what."""
    rows = [row for section in sections.values() for row in section.rows]
    counts = [f"{sum(row.more[name] for row in rows):,.0f} {name}" for name in COLUMNS]
    abouts = [section.about for section in sections.values()]
    seconds = [about.get("seconds") for about in abouts]
    known = [float(one) for one in seconds if isinstance(one, (int, float))]
    took = f"{sum(known):,.0f} s" if len(known) == len(seconds) else "in a time that was not kept"
    threads, cores = (
        " or ".join(sorted({str(about[key]) for about in abouts})) for key in ("threads", "cores")
    )
    return (
        f"{', '.join(counts)}, in {len(sections)} sections: {took}, "
        f"torch with {threads} thread(s), {cores} cores."
    )


def _line(row: Row) -> str:
    counts = [f"{row.more[name]:,.0f}" for name in COLUMNS]
    known = {*COLUMNS, "slowest"}
    more = [f"{name} {value:,.4g}" for name, value in row.more.items() if name not in known]
    cells = [*counts, f"{(row.median or 0) * 1e3:,.1f}", f"{row.more['slowest']:.1f}"]
    return f"| {row.name} | {' | '.join(cells)} | {', '.join(more)} |"


def main(counts: Path = COUNTS, page: Path = PAGE) -> int:
    """Fill the page; a section without counts is said to have none."""
    sections = Results.read(counts).sections if counts.exists() else {}
    for marker, name in ASKED.findall(page.read_text(encoding="utf-8")):
        found = sections.get(name)
        if name == TOTAL and sections:
            fill(page, marker, total(sections))
        else:
            fill(page, marker, table(found) if found else "Not counted yet: run `make torture`.")
    print(total(sections) if sections else "nothing is counted yet")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
