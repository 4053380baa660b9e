"""Keep a finished comparison in docs/evidence, and show its summary in the README.

    python -m benchmarks.evidence runs/compare

What is kept is the report, its table of all numbers and its plots, and in `run` what each job
trained and answered, from which a comparison goes on; no weights.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.pages import fill
from ipn_core.comparison.report import SUMMARY

__all__ = ["keep", "keep_run", "main", "summary"]

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence"
SECTION = "comparison"
REPORT = ("report.md", "report.html", "results.csv")
PLOT = "accuracy.png"
RUN = "run"
_GOES_ON = ("compare.json", "first-token.json", "jobs/*/job.json", "jobs/*/result.json")
"""What a comparison needs of itself to go on, of jobs that are done."""


def keep(run: Path, into: Path) -> None:
    """Copy what shows the results of a comparison, and nothing else.

    Args:
        run: the folder of the comparison.
        into: replaced.

    Raises:
        SystemExit: there is no report.
    """
    missing = [name for name in REPORT if not (run / name).is_file()]
    if missing:
        raise SystemExit(f"'{run}' has no {', '.join(missing)}: finish it with 'ipn compare' first")
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for path in [*(run / name for name in REPORT), *sorted(run.glob("*.png"))]:
        shutil.copyfile(path, into / path.name)
    keep_run(run, into / RUN)


def keep_run(run: Path, into: Path) -> None:
    """Copy what a comparison goes on from, of the jobs that are done.

    Args:
        run: the folder of the comparison, which may be unfinished.
        into: replaced.
    """
    shutil.rmtree(into, ignore_errors=True)
    for path in sorted(path for pattern in _GOES_ON for path in run.glob(pattern)):
        if path.name != "job.json" or path.with_name("result.json").is_file():
            kept = into / path.relative_to(run)
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)


def summary(folder: Path, place: Path) -> str:
    """Return the report's first lines, its summary and its plot, for a document.

    Args:
        folder: with the report.
        place: the folder that the document lies in, for links.
    """
    text = (folder / "report.md").read_text(encoding="utf-8")
    first = text.split("\n", 1)[0]
    _, found, after = text.partition(f"## {SUMMARY}\n\n")
    if not found:
        raise SystemExit(f"'{folder / 'report.md'}' has no '{SUMMARY}'")
    link = folder.relative_to(place)
    parts = [
        first,
        after.partition("\n\n## ")[0].strip(),
        f"![Accuracy of each arm]({link / PLOT})",
        f"All of it, with every type of question, pairwise tests and costs: "
        f"[{link / 'report.md'}]({link / 'report.md'}).",
    ]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep a comparison and fill the README."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder that 'ipn compare' wrote")
    keep(parser.parse_args(arguments).run, EVIDENCE)
    fill(ROOT / "README.md", SECTION, summary(EVIDENCE, ROOT))


if __name__ == "__main__":
    main()
