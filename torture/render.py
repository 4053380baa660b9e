"""Put the counts of torture into docs/reliability.md: `python -m torture.render`.

The document asks for a section as the benchmarks' documents do, by two lines,
`<!-- torture inputs: begin -->` and `<!-- torture inputs: end -->`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from benchmarks.pages import fill
from ipn_core.benchmarking import Results, Row, Section

__all__ = ["main", "table"]

ROOT = Path(__file__).parents[1]
COUNTS = Path(__file__).parent / "results" / "counts.json"
PAGE = ROOT / "docs" / "reliability.md"
ASKED = re.compile(r"<!-- (torture (\w+)): begin -->")
COLUMNS = ("tried", "refused", "taken", "broken")


def table(section: Section) -> str:
    """Return a section's counts as Markdown, with the command that makes them again."""
    head = [*COLUMNS, "median ms", "slowest s", "more"]
    lines = [f"| what | {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|---|"]
    lines += [_line(row) for row in section.rows]
    about = section.about
    made = f"`{about['command']}`, {about['day']}, {about['cpu']}, torch {about['torch']}."
    return "\n".join([*lines, "", made])


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
        fill(page, marker, table(found) if found else "Not counted yet: run `make torture`.")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
