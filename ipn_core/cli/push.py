"""`ipn push`: publish a checkpoint on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ipn_core.cli.options import Debug

__all__ = ["push"]


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A checkpoint: RUN/model.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where on the hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Visible to you alone, if it is new.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Publish a checkpoint on the hub, with a model card. Prints its address."""
    from ipn_core.cli.terminal import quiet
    from ipn_core.errors import UserError

    if not folder.is_dir():
        raise UserError(f"'{folder}' is no folder. Give a checkpoint that 'ipn train' wrote.")
    with quiet():
        from ipn_core.publish import push as run

        address = run(folder, repository, private)
    print(address)
