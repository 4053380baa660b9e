"""`ipn bench compare`: two files of results, and what got worse."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ipn_core.cli.options import Debug, Json

if TYPE_CHECKING:
    from ipn_core.benchmarking.compare import Change, Comparison

__all__ = ["compare"]

FACTORS = {"s": (1e3, "ms"), "bytes": (1e-6, "MB")}


def compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="The older results.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The newer ones.")],
    section: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this benchmark. Several times for several."),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(metavar="SHARE", min=0, help="How much worse is still alike.")
    ] = 0.05,
    every: Annotated[bool, typer.Option("--all", help="Show what is alike, too.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Show what got worse or better from A to B, each with its 95 % interval.

    Exit code 0: nothing is worse. 1: a row is, by more than the tolerance with all of its
    interval, or can no longer be measured. 2: a file cannot be read, or they have no row in common.
    Rows of one file alone are named and change no exit code: a run of fewer shapes is no
    regression, and what refuses to run is a row that says so.
    """
    from ipn_core.benchmarking.compare import compare as compared
    from ipn_core.benchmarking.results import Results
    from ipn_core.cli.terminal import print_json

    found = compared(
        Results.read(before), Results.read(after), tolerance=tolerance, sections=section or ()
    )
    if json:
        print_json(_plain(found))
    else:
        _print(found, every)
    return 1 if found.regressions else 0


def _plain(found: Comparison) -> dict[str, object]:
    from dataclasses import asdict

    return {**asdict(found), "regressions": len(found.regressions)}


def _print(found: Comparison, every: bool) -> None:
    for name in dict.fromkeys(change.section for change in found.changes):
        mine = [change for change in found.changes if change.section == name]
        drift = found.drift(name)
        said = "" if drift is None else f", the median at {drift:.3f} of what it was"
        print(f"{name}: {len(mine)} in both{said} (above 1 is worse)")
        order = ("worse", "lost", "better", "found", *(("alike",) if every else ()))
        for verdict in order:
            rows = [change for change in mine if change.verdict == verdict]
            for change in sorted(rows, key=lambda c: -abs((c.ratio or 1) - 1)):
                print(f"    {verdict:<7}{change.name:<60} {_words(change)}")
    counts = {
        verdict: sum(change.verdict == verdict for change in found.changes)
        for verdict in ("worse", "lost", "better", "found", "alike")
    }
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), end="")
    print(f"; tolerance {100 * found.tolerance:g} %")
    for file, names in (("A", found.only_before), ("B", found.only_after)):
        if names:
            print(f"only in {file}: {len(names)}, such as {names[0]}")
    for what, (old, new) in found.differs.items():
        section, _, key = what.partition(": ")
        print(f"{section}: measured with another {key}, {old} -> {new}")


def _words(change: Change) -> str:
    if change.before is None or change.after is None:
        return "; ".join(change.reasons)
    factor, unit = FACTORS.get(change.unit, (1.0, change.unit))
    ratio = ""
    if change.ratio is not None:
        ratio = f"   {change.ratio:.3f} ({change.low:.3f} to {change.high:.3f})"
    return f"{factor * change.before:.4g} -> {factor * change.after:.4g} {unit}{ratio}"
