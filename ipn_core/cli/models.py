"""`ipn models`: known weights, where they lie, and fetching them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ipn_core.cli.completing import installed
from ipn_core.cli.options import Debug, Json

__all__ = ["app"]

app = typer.Typer(help="List known weights, or fetch them.", invoke_without_command=True)


@app.callback()
def models(context: typer.Context, json: Json = False, debug: Debug = False) -> None:
    """List known weights and where they lie, or fetch them with 'pull'."""
    if context.invoked_subcommand is None:
        _list(json)


@app.command("list")
def list_(json: Json = False, debug: Debug = False) -> None:
    """List known weights: whether they are here, how large they are, and where they lie."""
    _list(json)


@app.command("pull")
def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A name of 'ipn models list'.",
            autocompletion=installed("weights"),
        ),
    ],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch weights, or go on where an interrupted attempt stopped; prints their folder."""
    from ipn_core.cli.terminal import Bar, print_json, quiet
    from ipn_core.errors import UnknownNameError, near
    from ipn_core.plugins import get_registry

    with quiet():
        known = get_registry().entries("weights")
        if name not in known:
            raise UnknownNameError(
                f"unknown weights '{name}': known are {', '.join(sorted(known)) or 'none'}"
                f"{near(name, known)}. See 'ipn models list'."
            )
        with Bar() as bar:
            folder = known[name].load().pull(bar.bytes)
    if json:
        print_json({"name": name, "folder": str(folder)})
    else:
        print(folder)


def _list(json: bool) -> None:
    from ipn_core.cli.terminal import note, print_json, quiet
    from ipn_core.errors import PluginError
    from ipn_core.plugins import get_registry

    rows: list[dict[str, Any]] = []
    with quiet():
        for name, component in sorted(get_registry().entries("weights").items()):
            try:
                weights = component.load()
            except PluginError as error:
                # One broken plugin does not hide the others' weights.
                note(str(error))
                continue
            rows.append(
                {
                    "name": name,
                    "present": weights.present(),
                    "folder": str(weights.folder()),
                    "size_bytes": weights.size_bytes,
                    "license": weights.license,
                    "description": weights.description,
                    "plugin": component.plugin.label,
                }
            )
    if json:
        print_json({"models": rows})
    elif rows:
        _print_list(rows)
    else:
        print("No plugin brings weights. Install one, such as ipn-starter.")


def _print_list(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    for row in rows:
        here = "here" if row["present"] else f"not here: ipn models pull {row['name']}"
        console.print(f"{row['name']}  ({row['size_bytes'] / 1e6:,.0f} MB, {here})")
        console.print(f"    {row['description']}; {row['license']}; from {row['plugin']}")
        console.print(f"    {row['folder']}")
