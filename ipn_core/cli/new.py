"""`ipn new`: a plugin package to start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ipn_core.cli.completing import kinds
from ipn_core.cli.options import Debug

__all__ = ["new"]

_KINDS = "interaction, perceiver, requester, injector, backbone, attention or task."


def new(
    kind: Annotated[
        str,
        typer.Argument(metavar="KIND", help=f"What it brings: {_KINDS}", autocompletion=kinds),
    ],
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What configs call it, such as my-look.")
    ],
    into: Annotated[
        Path, typer.Option("--dir", metavar="DIR", help="Where to write the folder ipn-NAME.")
    ] = Path(),
    debug: Debug = False,
) -> None:
    """Write a plugin package that installs, passes its tests, lints, and does something real."""
    from shlex import quote

    from ipn_core.cli.terminal import quiet
    from ipn_core.scaffold import write_package

    with quiet():
        package, folder = write_package(kind, name, into)
    where = quote(str(folder))
    print(f"wrote {folder}: the {package.title} '{name}' is in {package.component}")
    print("Install it, test it, use it:")
    print(f"    pip install -e {where}")
    print(f"    pytest {where}")
    print(f"    {package.use.replace(package.distribution + '/', where + '/')}")
