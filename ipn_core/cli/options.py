"""Options that several commands share."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Annotated, TypeAlias

import typer

from ipn_core.cli.completing import installed

__all__ = [
    "DEBUGGING",
    "DEFAULT_MODEL",
    "Debug",
    "Device",
    "Dtype",
    "Interact",
    "Json",
    "Model",
    "Untrained",
]

DEFAULT_MODEL = "starter"

DEBUGGING: ContextVar[bool] = ContextVar("debugging", default=False)
"""Whether --debug stands anywhere on the command line; `main` sets it."""

Debug: TypeAlias = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of a failure, and libraries' warnings.")
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="NAME", help="cpu, cuda or cuda:1; by default the GPU if there is one."
    ),
]
Dtype: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16 or float16; by default bfloat16 on a GPU, elsewhere as stored.",
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Model: TypeAlias = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME|PATH",
        help="A name of 'ipn models', a folder, a hub id, or a published checkpoint as llava:ID.",
        autocompletion=installed("weights"),
    ),
]
Interact: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--interact",
        "-i",
        metavar="NAME",
        help="One of the interactions that the model has weights for; its default otherwise.",
        autocompletion=installed("strategy"),
    ),
]
Untrained: TypeAlias = Annotated[
    bool,
    typer.Option("--untrained", help="Allow an --interact that has no weights: random answers."),
]
