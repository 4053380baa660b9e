"""Put results into documents: tables between markers, a page and plots for each device.

    python -m benchmarks.render                    all that lies in benchmarks/results
    python -m benchmarks.render --results DIR      pages and plots of other results, no document

A document asks for a section by two lines, `<!-- results attention: begin -->` and
`<!-- results attention: end -->`; whatever stands between them is replaced. A section that no
device has is said to be missing there. A sentence about one (`EXCERPTS`) is asked for the same way.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import fill
from benchmarks.plots import draw
from benchmarks.results import FOLDER
from benchmarks.tables import EXCERPTS, SUMMARIES, everything, measured_on, notes_of, rows_of
from ipn_core.benchmarking import Results
from ipn_core.errors import IPNError
from ipn_core.files import atomic_write

__all__ = ["asked", "main", "render", "section"]

ROOT = Path(__file__).parents[1]
BEGINS = re.compile(r"<!-- (results ([\w-]+)): begin -->")
SHOWS = {"attention": ("attention", "roofline"), "modules": ("modules",)}
"""Which plots stand under a section's tables."""
CAPTIONS = {
    "attention": "milliseconds over keys",
    "roofline": "operations a second over operations a byte",
    "modules": "milliseconds of each module",
}

Measured = Sequence[tuple[Results, dict[str, Path]]]
"""The results of each device, with its plots."""


def asked() -> list[Path]:
    """Return the documents that ask for a section."""
    some = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in some if BEGINS.search(path.read_text(encoding="utf-8"))]


def section(name: str, measured: Measured, place: Path) -> str:
    """Return what a document shows of a section.

    Args:
        name: of the section, or of a sentence about one.
        measured: what there is.
        place: the folder that the document lies in, for links.
    """
    parts = []
    of, excerpt = EXCERPTS.get(name, (name, None))
    for device, plots in measured:
        if of not in device.sections:
            continue
        mine = device.sections[of]
        if excerpt is not None:
            parts.append(f"{measured_on(mine)}: {excerpt(mine)}")
            continue
        parts += [measured_on(mine), *notes_of(mine), SUMMARIES.get(name, rows_of)(mine)]
        for plot in SHOWS.get(name, ()):
            if plot in plots:
                link = os.path.relpath(plots[plot], place)
                parts.append(f"![{CAPTIONS[plot]}, {device.device}]({link})")
    return "\n\n".join(parts) or f"Not measured yet: no device has results of '{of}'."


def render(folder: Path, into: Sequence[Path]) -> list[Path]:
    """Draw and write what belongs to the results in a folder; returns the files.

    Args:
        folder: with a JSON file for each device.
        into: documents to fill.

    Raises:
        DataError: a file cannot be read.
    """
    found: list[tuple[Results, dict[str, Path]]] = []
    written: list[Path] = []
    for path in sorted(folder.glob("*.json")):
        results = Results.read(path)
        plots = draw(results, folder)
        page = path.with_suffix(".md")
        atomic_write(page, everything(results).encode())
        found.append((results, plots))
        written += [page, *plots.values()]
    for document in into:
        for marker, name in BEGINS.findall(document.read_text(encoding="utf-8")):
            fill(document, marker, section(name, found, document.parent))
        written.append(document)
    return written


def main(words: Sequence[str] | None = None) -> int:
    """Run from the command line; returns 1 if results cannot be read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=FOLDER, metavar="DIR")
    folder = parser.parse_args(words).results
    try:
        into = asked() if folder.resolve() == FOLDER.resolve() else []
        for path in render(folder, into):
            print(path)
    except IPNError as error:
        print(f"render: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
