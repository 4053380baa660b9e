"""`ipn bench engine`: the engine against its rivals, in one run."""

from __future__ import annotations

from typing import Annotated

import typer

from ipn_core.cli.options import Debug, Json

__all__ = ["engine"]


def engine(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="ROW", help="This row, such as first-token; several for several."),
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="A few repetitions: about four minutes.")
    ] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Repetitions of each row.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Fewer than a core each, on a busy machine."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time the engine against what it is held to, and check that both say the same."""
    from ipn_core.cli.terminal import Bar, print_json, quiet

    with quiet():
        from ipn_core.benchmarking import about
        from ipn_core.benchmarking.engine.report import text
        from ipn_core.benchmarking.engine.table import Session, choose_rows, measure
        from ipn_core.benchmarking.engine.timing import threads as working

        rows = choose_rows(only or [])
        session = Session(short, repeats)
        found = []
        with working(threads), Bar("timing the engine") as bar:
            for done, row in enumerate(rows):
                bar.steps(done, len(rows))
                found.append(measure(row, session))
            machine, llm = about(), session.llm
    if json:
        print_json({"about": machine, "llm": llm, "rows": [one.to_json() for one in found]})
        return
    on = f"{machine['threads']} threads of {machine['cpu']}, torch {machine['torch']}"
    print(f"{llm}, float32, {on}")
    for one in found:
        print(f"\n{text(one)}")
