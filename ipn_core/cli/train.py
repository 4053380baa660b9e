"""`ipn train`: train the stages that a config names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ipn_core.cli.options import Debug

__all__ = ["train"]


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="What to train, and how.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]…", help="Set keys of the config: stages.0.steps=100."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where checkpoints and logs go.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Train a model's stages; the rest stays frozen. Prints the folder of the checkpoint."""
    from ipn_core.cli.loading import check_folder
    from ipn_core.cli.terminal import quiet
    from ipn_core.memory import keep_freed_memory
    from ipn_core.processors import limit_threads

    check_folder("--out", out or Path("runs") / config.stem)
    with quiet():
        from ipn_core.training.run import train as run

        keep_freed_memory()
        limit_threads()
        folder = run(config, overrides or [], resume=resume, out=out)
    if os.environ.get("RANK", "0") == "0":  # of the processes that a launcher started
        print(folder)
