"""`ipn serve`: a model behind an OpenAI-compatible address."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from ipn_core.cli.options import Debug, Device, Dtype

__all__ = ["serve"]


def serve(
    model: Annotated[
        str, typer.Option("--model", metavar="NAME|PATH", help="A known model, folder or hub id.")
    ] = "starter",
    interact: Annotated[
        str | None, typer.Option("--interact", metavar="NAME", help="One of its strategies.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Whom it listens to.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for a free one.")] = 8000,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Requests at once.")] = 16,
    waiting: Annotated[
        int, typer.Option("--waiting", min=1, help="Requests that may wait; more get 429.")
    ] = 64,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, help="Of an answer at most.")
    ] = 256,
    max_body: Annotated[
        int, typer.Option("--max-body", min=1, metavar="MB", help="Of a request at most.")
    ] = 20,
    body_seconds: Annotated[
        int, typer.Option("--body-seconds", min=1, help="In which a request must have come.")
    ] = 60,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Serve /v1/chat/completions with pictures, /healthz and /metrics until it is interrupted.

    With IPN_API_KEY set, requests must bring that key.
    """
    from ipn_core.cli.loading import check_extra, load_model
    from ipn_core.cli.terminal import note, quiet

    check_extra("serve", "uvicorn", "starlette", "prometheus_client")
    from ipn_core.serving.sockets import address_of, bound, hosts_of

    # Before the model is loaded: that the port is taken should not come out late.
    with bound(host, port) as socket:
        with quiet():
            loaded = load_model(model, interact, untrained=False, device=device, dtype=dtype)
            from ipn_core.serving.app import create_app
            from ipn_core.serving.protocol import Limits
            from ipn_core.serving.server import Server
        limits = Limits(body=max_body * 1_000_000, seconds=body_seconds, tokens=max_tokens)
        app = create_app(
            loaded,
            limits=limits,
            batch=batch,
            waiting=waiting,
            hosts=hosts_of(host),
            key=os.environ.get("IPN_API_KEY") or None,
        )
        socket.listen()
        note(f"{loaded.name} listens at {address_of(host, socket)}/v1")
        Server(app).run(sockets=[socket])
