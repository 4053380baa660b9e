"""The web application: chat completions, health, and metrics of one model."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ipn_core.errors import UserError
from ipn_core.serving.batching import Batcher, ClosedError, FullError
from ipn_core.serving.intake import Body, Intake
from ipn_core.serving.metrics import Metrics
from ipn_core.serving.protocol import (
    Asked,
    Limits,
    RequestError,
    chunk,
    completion,
    error_body,
    new_id,
    read_request,
)
from ipn_core.serving.rows import Done, Row

if TYPE_CHECKING:
    from ipn_core.model import IPN

__all__ = ["create_app"]

_LOG = logging.getLogger(__name__)
_RETRY_S = 1
_DECODED_AT_ONCE = 2
"""Requests that are parsed and whose pictures are decoded at the same time: each may take 1 GB."""
_POLL_S = 0.5
"""How often it is looked whether somebody who waits for a piece of an answer is still there."""


def create_app(
    model: IPN,
    *,
    name: str | None = None,
    limits: Limits | None = None,
    batch: int = 16,
    waiting: int = 64,
    hosts: Sequence[str] = (),
    key: str | None = None,
) -> Starlette:
    """Make the application; its model answers from the first request until it shuts down.

    Args:
        model: answers.
        name: what requests call it, by default its own name.
        limits: what a request may ask for.
        batch: requests answered together at most.
        waiting: requests that may wait; a further one gets 429.
        hosts: values of the header Host that are accepted; none for all. A page in a browser that
            reaches a local server through a name of its own is kept out by it.
        key: what requests, but those for /healthz, must bring as "Authorization: Bearer …"; None
            for nothing.
    """
    service = _Service(model, name or model.name, limits or Limits(), batch, waiting, key)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", service.complete, methods=["POST"]),
            Route("/v1/models", service.models, methods=["GET"]),
            Route("/healthz", service.health, methods=["GET"]),
            Route("/metrics", service.metrics_text, methods=["GET"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))] if hosts else [],
        lifespan=service.lifespan,
    )
    app.state.service = service
    return app


class _Service:
    def __init__(
        self,
        model: IPN,
        name: str,
        limits: Limits,
        batch: int,
        waiting: int,
        key: str | None,
    ) -> None:
        self.name, self.limits, self.key = name, limits, key
        self.intake = Intake(limits)
        self.batcher = Batcher(model, size=batch, waiting=waiting, note=self._note_batch)
        self.metrics = Metrics(lambda: self.batcher.depth)
        self._decoding = asyncio.Semaphore(_DECODED_AT_ONCE)

    def _note_batch(self, size: int, seconds: float) -> None:
        self.metrics.note_batch(size, seconds)

    @property
    def busy(self) -> bool:
        """Whether a request is coming in, waits or is being answered."""
        return self.intake.busy or self.batcher.busy

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Serve; then answer what still waits."""
        yield
        await run_in_threadpool(self.batcher.close)

    # -- small pages -----------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """List the one model."""
        if (refused := self._locked(request)) is not None:
            return refused
        one = {"id": self.name, "object": "model", "created": 0, "owned_by": "ipn"}
        return JSONResponse({"object": "list", "data": [one]})

    async def health(self, request: Request) -> Response:
        """Say whether requests will be answered; without a key, which load balancers have not."""
        alive = self.batcher.alive and not self.intake.closed
        return JSONResponse(
            {"status": "ok" if alive else "closing", "waiting": self.batcher.depth},
            200 if alive else 503,
        )

    async def metrics_text(self, request: Request) -> Response:
        """Tell what was counted."""
        if (refused := self._locked(request)) is not None:
            return refused
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # -- asking ----------------------------------------------------------------------------------

    async def complete(self, request: Request) -> Response:
        """Answer a chat."""
        started = time.perf_counter()
        body = Body(request, self.intake)
        try:
            response = await self._complete(request, body, started)
        except ClientDisconnect:
            self.metrics.cancelled.inc()
            response = Response(status_code=499)  # nobody is there to read it
        except UserError as error:
            response = _refusal(error)
        except FullError as error:
            text = f"{error} Try again in a moment."
            response = _error(429, text, "rate_limit_error", retry=True)
        except ClosedError:
            response = _error(503, "the server is shutting down.", "server_error", retry=True)
        except Exception as error:
            response = _failure(error)
        self.metrics.requests.labels(str(response.status_code)).inc()
        return body.answered(response)

    async def _complete(self, request: Request, body: Body, started: float) -> Response:
        if (refused := self._locked(request)) is not None:
            return refused
        _check_type(request)
        ready = asyncio.Event()
        row = await self._taken(request, body, ready)
        if row.asked.stream:
            return await self._streamed(request, row, ready, started)
        return await self._whole(request, row, ready, started)

    async def _taken(self, request: Request, body: Body, ready: asyncio.Event) -> Row:
        """Put what a request asks into the queue; its body and its JSON are gone then."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is gone, and with it the reader
                loop.call_soon_threadsafe(ready.set)

        with self.intake.room(request):
            data = await body.read()
            with self.batcher.place() as put:
                async with self._decoding:
                    # Parsing and decoding take memory, and long enough to keep others waiting.
                    row = Row(await run_in_threadpool(self._read, data))
                row.ready = wake
                put(row)
        return row

    def _read(self, data: bytearray) -> Asked:
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the body is no JSON: {error}.") from None
        try:
            return read_request(values, self.name, self.limits)
        except RecursionError:  # telling what is wrong goes deeper than parsing did
            raise RequestError("the body is nested too deeply.") from None

    def _locked(self, request: Request) -> Response | None:
        """Refuse a request without the key, if there is one."""
        if self.key is None:
            return None
        given = request.headers.get("authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            return None
        return _error(401, "the key of this server is missing or wrong.", "authentication_error")

    async def _whole(
        self, request: Request, row: Row, ready: asyncio.Event, started: float
    ) -> Response:
        said: list[str] = []
        while not isinstance(piece := await self._awaited(request, row, ready), Done):
            if not said:
                self.metrics.first_token.observe(time.perf_counter() - started)
            said.append(piece)
        if piece.error is not None:
            return _failure(piece.error)
        self._count(piece, started)
        return JSONResponse(
            completion(new_id(), self.name, "".join(said), piece.reason, piece.usage)
        )

    async def _awaited(self, request: Request, row: Row, ready: asyncio.Event) -> str | Done:
        """Return the next piece of an answer, as long as its reader is there."""
        while True:
            try:
                return await asyncio.wait_for(_next(row, ready), _POLL_S)
            except TimeoutError:
                if await request.is_disconnected():
                    row.cancelled.set()
                    raise ClientDisconnect from None
            except asyncio.CancelledError:
                row.cancelled.set()
                raise

    async def _streamed(
        self, request: Request, row: Row, ready: asyncio.Event, started: float
    ) -> Response:
        """Wait for the first piece, so that a failure before it has its own status."""
        first = await self._awaited(request, row, ready)
        self.metrics.first_token.observe(time.perf_counter() - started)
        if isinstance(first, Done) and first.error is not None:
            return _failure(first.error)
        return StreamingResponse(
            self._events(row, ready, first, started), media_type="text/event-stream"
        )

    async def _events(
        self, row: Row, ready: asyncio.Event, piece: str | Done, started: float
    ) -> AsyncIterator[str]:
        id_ = new_id()
        delta: dict[str, str] = {"role": "assistant", "content": ""}
        try:
            yield _event(chunk(id_, self.name, delta))
            while not isinstance(piece, Done):
                yield _event(chunk(id_, self.name, {"content": piece}))
                piece = await _next(row, ready)
            if piece.error is not None:
                yield _event(json.loads(bytes(_failure(piece.error).body)))
                return
            self._count(piece, started)
            yield _event(chunk(id_, self.name, {}, piece.reason))
            if row.asked.usage:
                yield _event(chunk(id_, self.name, None, usage=piece.usage))
            yield "data: [DONE]\n\n"
        finally:
            if not isinstance(piece, Done):
                row.cancelled.set()
                self.metrics.cancelled.inc()

    def _count(self, done: Done, started: float) -> None:
        self.metrics.answer.observe(time.perf_counter() - started)
        for kind in ("prompt", "completion"):
            self.metrics.tokens.labels(kind).inc(done.usage[f"{kind}_tokens"])


async def _next(row: Row, ready: asyncio.Event) -> str | Done:
    """Return the next piece of an answer, once it is there."""
    while row.pieces.empty():
        await ready.wait()
        ready.clear()
    return row.pieces.get()


def _check_type(request: Request) -> None:
    # A form on a foreign web page cannot send this type without asking first.
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"the body must be sent as application/json, got '{kind or 'no type'}'.", status=415
        )


def _event(values: Any) -> str:
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n"


def _failure(error: Exception) -> JSONResponse:
    """Say what went wrong while answering: the user's input, or this server."""
    if isinstance(error, UserError):
        return _refusal(error)
    _LOG.error("a request failed", exc_info=error)
    return _error(500, f"answering failed: {type(error).__name__}: {error}", "server_error")


def _refusal(error: UserError) -> JSONResponse:
    if isinstance(error, RequestError):
        kind = "invalid_request_error"
        return JSONResponse(error_body(str(error), kind, error.param, error.code), error.status)
    return _error(400, str(error), "invalid_request_error")


def _error(status: int, text: str, kind: str, *, retry: bool = False) -> JSONResponse:
    headers = {"retry-after": str(_RETRY_S)} if retry else None
    return JSONResponse(error_body(text, kind), status, headers)
