"""The page as a web application, with limits, and without a word to anybody else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from ipn_core.demo.page import build_page, page_style
from ipn_core.demo.visits import Visits

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ipn_core.demo.pictures import Sample

__all__ = ["create_app"]

_OWN = "'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
_HEADERS = {
    # A browser fetches nothing from elsewhere for this page: no fonts, no scripts, no counters.
    b"content-security-policy": f"default-src {_OWN}; frame-ancestors 'none'".encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
_SLACK = 100_000
"""Bytes of a request that brings a picture, beside the picture's own."""


def create_app(
    visits: Visits,
    *,
    samples: Sequence[Sample] = (),
    known: str = "",
    upload: int = 20_000_000,
    hosts: Sequence[str] = (),
) -> ASGIApp:
    """Make the application.

    Args:
        visits: answers.
        samples: pictures to begin with.
        known: what is said of which strategy knows what.
        upload: bytes of a picture at most.
        hosts: values of the header Host that are accepted; none for all. A page elsewhere that
            reaches a local server through a name of its own is kept out by it.
    """
    page = build_page(visits, samples, known)
    inner = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        max_file_size=upload,
        footer_links=[],
        run_history=False,
        css=page_style(),
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        ssr_mode=False,
        pwa=False,
        show_error=False,
    )
    # Only of a page that was launched does Gradio check that a visitor's file is one that was
    # uploaded, and no other one of this machine; mounting does not count as that by itself.
    page.has_launched = True
    app: Any = _Guard(inner, upload + _SLACK)
    return TrustedHostMiddleware(app, allowed_hosts=list(hosts)) if hosts else app


class _Guard:
    """Refuses what is too large, and adds headers to whatever goes out."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        body = _Counted(receive, self.most)

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                status = 413 if body.left < 0 else message["status"]
                own = [(k, v) for k, v in message["headers"] if k.lower() not in _HEADERS]
                message = {**message, "status": status, "headers": [*own, *_HEADERS.items()]}
            await send(message)

        size = dict(scope["headers"]).get(b"content-length", b"0")
        if not size.isdigit() or int(size) > self.most:
            refusal = PlainTextResponse(f"at most {self.most:,} bytes are taken.", 413)
            await refusal(scope, receive, tell)
            return
        try:
            await self.app(scope, body, tell)
        except ClientDisconnect:
            if body.left >= 0:
                raise


class _Counted:
    """The body of a request, which ends where it becomes too large, whatever its header says."""

    def __init__(self, receive: Receive, most: int) -> None:
        self.receive, self.left = receive, most

    async def __call__(self) -> Message:
        message = await self.receive()
        self.left -= len(message.get("body", b""))
        return message if self.left >= 0 else {"type": "http.disconnect"}
