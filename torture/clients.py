"""Clients of a server, well and badly behaved, on the bare sockets of asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

__all__ = ["ask", "begin", "leave", "outcome", "send_slowly", "send_too_much", "through"]

PATIENCE_S = 240.0
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def _request(body: bytes, length: int | None = None) -> bytes:
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {length or len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _encoded(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


async def _read(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Return the status and the body, with the chunks of a stream put together."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = int(head.split()[1])
    if b"chunked" not in head.lower():
        return status, await reader.read()
    parts = []
    while size := int(await reader.readline(), 16):
        parts.append(await reader.readexactly(size))
        await reader.readline()
    return status, b"".join(parts)


def _said(body: bytes, streamed: bool) -> str:
    if not streamed:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    events = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        raise ValueError(f"the stream ended with {events[-1][:80]}")
    deltas = [json.loads(one)["choices"] for one in events[:-1]]
    return "".join(c[0]["delta"].get("content") or "" for c in deltas if c)


async def ask(
    port: int, body: dict[str, Any], *, pause: float = 0.0, gone: bool = False
) -> tuple[int, str]:
    """Ask; returns the status and the answer.

    Args:
        port: of the server.
        body: of the request.
        pause: seconds to wait before the answer is read.
        gone: whether the server may be gone already; the status is 0 where it gave none.
    """
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(_request(_encoded(body)))
            await writer.drain()
            await asyncio.sleep(pause)
            status, content = await _read(reader)
            writer.close()
    except (ConnectionError, asyncio.IncompleteReadError):
        if not gone:
            raise
        return 0, ""
    return status, _said(content, bool(body.get("stream"))) if status == 200 else ""


async def leave(port: int, body: dict[str, Any]) -> int:
    """Begin to read a stream, and be gone; returns the status that it began with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(_request(_encoded({**body, "stream": True})))
    head = await reader.readuntil(b"\r\n")
    await reader.read(64)
    writer.transport.abort()
    return int(head.split()[1])


async def send_slowly(port: int, body: dict[str, Any], seconds: float) -> tuple[int, str]:
    """Send a request in twenty pieces."""
    content = _request(_encoded(body))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    step = len(content) // 20 + 1
    for start in range(0, len(content), step):
        writer.write(content[start : start + step])
        await writer.drain()
        await asyncio.sleep(seconds / 20)
    status, answer = await _read(reader)
    writer.close()
    return status, _said(answer, False) if status == 200 else ""


async def begin(port: int, sent: int, announced: int) -> Connection:
    """Send so much of a body, and stall; with nothing announced, in the middle of the headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = _request(b"x" * sent, announced)
    writer.write(content if announced else content[:60])
    with contextlib.suppress(ConnectionError):
        await writer.drain()
    return reader, writer


async def outcome(connection: Connection) -> int:
    """Wait for the status that somebody who stalled gets; 0 for a connection that is closed."""
    reader, writer = connection
    try:
        async with asyncio.timeout(PATIENCE_S):
            return (await _read(reader))[0]
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0
    finally:
        writer.close()


async def send_too_much(port: int, size: int) -> int:
    """Send a body of so many bytes; returns the status, or 0 where it was cut off without one.

    A server that hears no more of a body may close before its answer is read: the system may then
    drop what has not been read.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(_request(b"", size))
        for sent in range(0, size, 2**20):
            writer.write(b"x" * min(2**20, size - sent))
            await writer.drain()
    except ConnectionError:  # it has heard enough
        pass
    try:
        return (await _read(reader))[0]
    except (ConnectionError, asyncio.IncompleteReadError):
        return 0
    finally:
        writer.close()


async def through(app: Any, content: bytes) -> tuple[int, bytes]:
    """Ask a web application for a completion without a socket; returns the status and the body."""
    heard, status, said = False, 0, b""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(content)).encode()),
        ],
    }

    async def receive() -> dict[str, Any]:
        nonlocal heard
        if heard:
            await asyncio.Event().wait()  # it stays
        heard = True
        return {"type": "http.request", "body": content, "more_body": False}

    async def send(message: Any) -> None:
        nonlocal status, said
        status = message.get("status", status)
        said += message.get("body", b"")

    await app(scope, receive, send)
    return status, said
