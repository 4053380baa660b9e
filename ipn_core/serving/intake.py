"""Bodies on their way in: how many bytes at once, for how long, and none waited for at the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ipn_core.serving.batching import ClosedError, FullError
from ipn_core.serving.protocol import Limits, RequestError

__all__ = ["Body", "Intake"]

_AT_ONCE = 5
"""Bodies of the largest size that there is room for at once; of smaller ones there are more."""
_DROPPED_S = 30.0
"""How long the rest of a body is heard whose sender has been answered already."""
_SILENT_S = 5.0
"""How long that sender may be silent."""
_DROPPED = 4
"""How much of it, in bodies of the largest size."""
_LAST_S = 1.0
"""How long a body may still come once the server is told to end."""


class Intake:
    """Bounds the bodies of a server while they come in.

    Attributes:
        limits: of a body.
        free: bytes that further bodies may have together.
    """

    def __init__(self, limits: Limits) -> None:
        """Begin to take bodies.

        Args:
            limits: the bytes of a body, and its seconds.
        """
        self.limits = limits
        self.free = _AT_ONCE * limits.body
        self._open: set[asyncio.Timeout] = set()
        self._end: float | None = None

    @property
    def busy(self) -> bool:
        """Whether a body is coming in."""
        return bool(self._open)

    @property
    def closed(self) -> bool:
        """Whether the server is told to end."""
        return self._end is not None

    @contextlib.contextmanager
    def room(self, request: Request) -> Iterator[None]:
        """Keep room for a body as large as its header says while the block has it in hand.

        Raises:
            RequestError: it is too large.
            FullError: there is no room beside the others.
        """
        told = request.headers.get("content-length", "")
        # Beside a transfer encoding a length says nothing.
        known = told.isdecimal() and "transfer-encoding" not in request.headers
        size = int(told) if known else self.limits.body
        if size > self.limits.body:
            raise self.too_large()
        if size > self.free:
            raise FullError("the requests that are coming in take all the room there is.")
        self.free -= size
        try:
            yield
        finally:
            self.free += size

    def too_large(self) -> RequestError:
        """Return the refusal of a body that has too many bytes."""
        return RequestError(f"the body has more than {self.limits.body:,} bytes.", status=413)

    def close(self) -> None:
        """Wait for no body any longer than a moment; called in the loop that hears them."""
        now = asyncio.get_running_loop().time()
        self._end = now + _LAST_S
        for one in self._open:
            until = one.when()
            if until is not None and until > self._end:
                one.reschedule(self._end)

    @contextlib.asynccontextmanager
    async def within(self, seconds: float) -> AsyncIterator[None]:
        """Give the block so many seconds, or fewer if the server is told to end.

        Raises:
            TimeoutError: they are over.
        """
        until = asyncio.get_running_loop().time() + seconds
        async with asyncio.timeout_at(min(until, self._end or until)) as limit:
            self._open.add(limit)
            try:
                yield
            finally:
                self._open.discard(limit)


class Body:
    """The body of one request.

    Attributes:
        begun: whether its sender was heard, or told to go on who asks that first.
        whole: whether it was heard to its end.
    """

    def __init__(self, request: Request, intake: Intake) -> None:
        self._request, self._intake = request, intake
        self.begun = self.whole = False

    async def read(self) -> bytearray:
        """Return all of it.

        Raises:
            RequestError: it is too large, or takes too long.
            ClosedError: it had not come whole when the server was told to end.
            ClientDisconnect: its sender has gone.
        """
        limits, data = self._intake.limits, bytearray()
        try:
            async with self._intake.within(limits.seconds):
                while not self.whole:
                    data += await self._piece()
                    if len(data) > limits.body:
                        raise self._intake.too_large()
        except TimeoutError:
            if self._intake.closed:
                raise ClosedError from None
            raise RequestError(
                f"the body had not come whole after {limits.seconds:g} s; so far it has "
                f"{len(data):,} bytes.",
                status=408,
            ) from None
        return data

    def answered(self, response: Response) -> Response:
        """Return what sends an answer so that it is read, also before the body has come whole."""
        return response if self.whole else _Early(response, self)

    async def drop(self) -> None:
        """Hear the rest, within bounds, and keep nothing of it."""
        left = _DROPPED * self._intake.limits.body
        with contextlib.suppress(TimeoutError, ClientDisconnect):
            async with self._intake.within(_DROPPED_S):
                while not self.whole and left > 0:
                    left -= len(await asyncio.wait_for(self._piece(), _SILENT_S))

    async def _piece(self) -> bytes:
        self.begun = True  # what asks first whether to send is told to go on by this
        message = await self._request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        self.whole = not message.get("more_body", False)
        return bytes(message.get("body", b""))


class _Early(Response):
    """An answer to a request whose body has not come whole.

    A connection that is closed with something unread in it is reset, and its other end may lose the
    answer that it has not read yet. So the answer goes out, and what still comes is dropped for a
    while, before the connection is closed.
    """

    def __init__(self, response: Response, body: Body) -> None:
        super().__init__(response.body, response.status_code)
        self.raw_headers = response.raw_headers
        self.headers["connection"] = "close"
        self._rest = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, and hear the rest."""
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": bytes(self.body), "more_body": True})
        # Who asks first, and is refused at once, sends nothing.
        if self._rest.begun or b"expect" not in dict(scope["headers"]):
            await self._rest.drop()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
