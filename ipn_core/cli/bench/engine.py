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
        bool, typer.Option("--short", help="A few repetitions: about half as long.")
    ] = False,
    repeats: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Repetitions of each row.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="By default one for each CPU that may be used."),
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="Where all of it runs: cpu, cuda or cuda:1.")
    ] = "cpu",
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
        from ipn_core.memory import keep_freed_memory
        from ipn_core.placing import device_of

        keep_freed_memory()
        rows = choose_rows(only or [])
        session = Session(short, repeats, device_of(device))
        found = []
        with working(threads), Bar("timing the engine") as bar:
            for done, row in enumerate(rows):
                bar.steps(done, len(rows))
                found.append(measure(row, session))
            machine, llm = about(str(session.device)), session.llm
    if json:
        print_json({"about": machine, "llm": llm, "rows": [one.to_json() for one in found]})
        return
    on = machine.get("gpu") or f"{machine['threads']} threads of {machine['cpu']}"
    print(f"{llm}, float32, {on}, torch {machine['torch']}")
    for one in found:
        print(f"\n{text(one)}")
