"""A server of a small random model in this process, on a free port."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from toys import picture

from ipn_core.model import IPN
from ipn_core.serving.app import create_app
from ipn_core.serving.server import Server
from ipn_core.serving.sockets import address_of, bound


@dataclass
class Served:
    """A running server."""

    address: str
    server: Server
    service: Any
    thread: threading.Thread

    def ended(self) -> None:
        """Wait until the server, which was told to, has ended."""
        self.thread.join(timeout=30)
        assert not self.thread.is_alive(), "the server has not shut down"


@contextlib.contextmanager
def serving(model: IPN, *, host: str = "127.0.0.1", **options: Any) -> Iterator[Served]:
    """Serve a model until the block ends, and then shut down in order."""
    app = create_app(model, **{"name": "toy", **options})
    server = Server(app)
    with bound(host, 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        served = Served(address_of(host, listening), server, app.state.service, thread)
        yield served
        server.should_exit = True
        served.ended()


@contextlib.contextmanager
def gate(model: IPN) -> Iterator[threading.Event]:
    """Keep the model from its next step until the event is set."""
    opened = threading.Event()
    handle = model.backbone.lm.register_forward_pre_hook(lambda *_: opened.wait(30) and None)
    try:
        yield opened
    finally:
        opened.set()
        handle.remove()


def wait_for(holds: Callable[[], bool]) -> None:
    """Wait until something holds."""
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until, "it never held"
        time.sleep(0.01)


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


@contextlib.contextmanager
def connection(served: Served, *, buffer: int | None = None) -> Iterator[socket.socket]:
    """Connect, with a small buffer for what comes if that is asked for."""
    host, port = served.address.removeprefix("http://").split(":")
    with socket.socket() as one:
        one.settimeout(25)
        if buffer:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        one.connect((host, int(port)))
        yield one


def head(length: int | None = None, **more: str) -> bytes:
    """The header of a request whose body has so many bytes."""
    given = {"host": "127.0.0.1", "content-type": "application/json", **more}
    if length is not None:
        given["content-length"] = str(length)
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in given.items()]
    return "\r\n".join(["POST /v1/chat/completions HTTP/1.1", *lines, "", ""]).encode()


def reply(one: socket.socket) -> tuple[int, Any]:
    """Read an answer that is not a stream; returns the status and the JSON."""
    with one.makefile("rb") as lines:
        status = int(lines.readline().split()[1])
        length = 0
        while (line := lines.readline()) not in (b"\r\n", b""):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, json.loads(lines.read(length))
