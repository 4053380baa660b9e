"""The web server around the application: how it ends."""

from __future__ import annotations

import asyncio
from socket import socket
from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    from starlette.applications import Starlette

__all__ = ["Server"]

_LOOK_S = 0.05


class Server(uvicorn.Server):
    """Uvicorn, but that nobody can keep it from ending.

    Told to end, it waits for what was begun, as uvicorn does; but not for bodies that do not come,
    nor for long for readers who do not take their answer.
    """

    grace_s = 10.0
    """Seconds that readers have to take what is left, once the last answer is there."""

    def __init__(self, app: Starlette) -> None:
        """Prepare to serve.

        Args:
            app: what `create_app` made.
        """
        super().__init__(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on"))
        self._service = app.state.service

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Take no more requests, finish those that were begun, and end."""
        self._service.intake.close()
        last = asyncio.create_task(self._cut_off())
        try:
            await super().shutdown(sockets)
        finally:
            last.cancel()

    async def _cut_off(self) -> None:
        """Close what connections are left a while after the last answer was there."""
        while self._service.busy:
            await asyncio.sleep(_LOOK_S)
        await asyncio.sleep(self.grace_s)
        for connection in tuple(self.server_state.connections):
            connection.transport.abort()
