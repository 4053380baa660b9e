"""`ipn demo`: a web page on which a model is asked, and shows where it looked."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ipn_core.cli.completing import installed
from ipn_core.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Interact, Model

__all__ = ["demo"]

_SAMPLES = "emoji-scenes"
"""The task whose pictures the starter knows."""


def demo(
    model: Model = DEFAULT_MODEL,
    interact: Interact = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Whom it listens to.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for a free one.")] = 7860,
    examples: Annotated[
        str | None,
        typer.Option(
            "--examples",
            metavar="TASK|FILE.jsonl",
            help="Whose first pictures the page offers.",
            autocompletion=installed("task"),
        ),
    ] = None,
    max_upload: Annotated[
        int, typer.Option("--max-upload", min=1, metavar="MB", help="Of a picture at most.")
    ] = 20,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Open a web page to ask about pictures, until it is interrupted; it is never shared."""
    from ipn_core.cli.loading import check_extra, load_model
    from ipn_core.cli.terminal import note, quiet
    from ipn_core.plugins import get_registry
    from ipn_core.serving.sockets import LOCAL, address_of, bound
    from ipn_core.tasks import open_task

    check_extra("demo", "gradio", "uvicorn")
    if examples is None and model == DEFAULT_MODEL:
        examples = _SAMPLES
    task = None if examples is None else open_task(examples)
    # Before the model is loaded: that the port is taken should not come out late.
    with bound(host, port) as socket, _own_folder() as folder:
        with quiet():
            first = load_model(model, interact, untrained=False, device=device, dtype=dtype)
            import uvicorn

            from ipn_core.checkpoint import open_source
            from ipn_core.demo.app import create_app
            from ipn_core.demo.pictures import draw_samples
            from ipn_core.demo.strategies import Strategies
            from ipn_core.demo.visits import Visits

            registry = get_registry()
            strategies = Strategies(first, open_source(model, registry), registry)
            app = create_app(
                Visits(strategies),
                samples=[] if task is None else draw_samples(task, folder),
                upload=max_upload * 1_000_000,
                hosts=LOCAL if host in LOCAL else (),
            )
        socket.listen()
        note(f"{first.name} waits for questions at {address_of(host, socket)}")
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=3
        )
        uvicorn.Server(config).run(sockets=[socket])


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """Give Gradio a folder for the pictures that visitors bring, which is gone in the end."""
    from ipn_core.interrupts import ending_on_sigterm

    with ending_on_sigterm(), tempfile.TemporaryDirectory(prefix="ipn-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield Path(folder)
