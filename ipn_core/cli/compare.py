"""`ipn compare`: arms at equal budget, with a control that cannot ask."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ipn_core.cli.options import Debug

__all__ = ["compare"]


class Where(StrEnum):
    """The names of `ipn_core.comparison.executors`, which imports torch."""

    local = "local"
    ray = "ray"


def compare(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yaml", help="The arms, and what they share.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Set keys of the config: dynamic=8."),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms", metavar="A,B", help="Only these; the reference and its control always."
        ),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="How many seeds; the config's otherwise.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where jobs and report go.")
    ] = None,
    executor: Annotated[
        Where, typer.Option("--executor", help="Where the jobs run.")
    ] = Where.local,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, help="Jobs at once; one a GPU or one a CPU otherwise."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Train arms at equal budget and compare them. Prints the path of the report."""
    import sys

    from ipn_core.cli.loading import check_folder
    from ipn_core.cli.terminal import quiet
    from ipn_core.config import load_yaml
    from ipn_core.memory import keep_freed_memory
    from ipn_core.processors import limit_threads

    folder = out or Path("runs") / config.stem
    check_folder("--out", folder)
    with quiet():
        from ipn_core.comparison.config import CompareConfig
        from ipn_core.comparison.executors import EXECUTORS
        from ipn_core.comparison.run import Comparison

        keep_freed_memory()
        limit_threads()
        values = load_yaml(config, overrides or [])
        if seeds is not None:
            values["seeds"] = seeds
        chosen = CompareConfig.parse(values, str(config))
        report = Comparison(
            chosen if arms is None else chosen.only(arms.split(",")),
            folder,
            command=["ipn", *sys.argv[1:]],
            resume=resume,
            executor=EXECUTORS[executor.value](workers),
        ).run()
    print(report)
