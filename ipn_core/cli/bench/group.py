"""The group of commands `ipn bench`."""

from __future__ import annotations

import typer

from ipn_core.cli.bench import attention, compare, engine

__all__ = ["app"]

app = typer.Typer(help="Time what this machine computes.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Time what this machine computes."""


app.command("attention")(attention.attention)
app.command("engine")(engine.engine)
app.command("compare")(compare.compare)
