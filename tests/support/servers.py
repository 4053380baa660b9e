"""A server of a small random model in this process, on a free port."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from toys import picture

from ipn_core.model import IPN
from ipn_core.serving.app import create_app
from ipn_core.serving.sockets import address_of, bound


@dataclass
class Served:
    """A running server."""

    address: str
    server: uvicorn.Server
    app: Any


@contextlib.contextmanager
def serving(model: IPN, *, host: str = "127.0.0.1", **options: Any) -> Iterator[Served]:
    """Serve a model until the block ends, and then shut down in order."""
    app = create_app(model, **{"name": "toy", **options})
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    with bound(host, 0) as socket:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield Served(address_of(host, socket), server, app)
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server has not shut down"


def png(seed: int = 0) -> bytes:
    """A small picture as a file."""
    out = io.BytesIO()
    picture(seed).save(out, "PNG")
    return out.getvalue()


def url_of(data: bytes) -> str:
    """The address that carries a picture."""
    return "data:image/png;base64," + base64.b64encode(data).decode()


def shown(seed: int, question: str, *files: bytes) -> list[dict[str, Any]]:
    """The messages that ask a question about pictures, by default about one of that seed."""
    urls = [url_of(one) for one in files or (png(seed),)]
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]


def post(address: str, body: object, **headers: str) -> tuple[int, Any]:
    """Ask for a completion; returns the status and the JSON that came back."""
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        body if isinstance(body, bytes) else json.dumps(body).encode(),
        {
            "content-type": "application/json",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        },
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text[:1] == b"{" else text.decode()
