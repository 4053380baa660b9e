"""The page: what stands on it, and which of it calls what."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any

# Gradio reads it when it is imported: nothing of a visit is told to anybody.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr  # after the setting above

from ipn_core.demo.pictures import Sample
from ipn_core.demo.strategies import Strategies
from ipn_core.demo.visits import LONGEST, Visits
from ipn_core.showing.fragments import style

__all__ = ["build_page", "page_style"]

NOBODY = "nothing"
WAITING = 32
"""Questions that wait for the model; to a further one the page says that it is busy."""
CLEARED_S = 3600
"""After so many seconds a picture that was brought is removed."""


def page_style() -> str:
    """Return the style sheet."""
    own = files("ipn_core.demo").joinpath("page.css").read_text(encoding="utf-8")
    return f"{style()}\n{own}"


def build_page(visits: Visits, samples: Sequence[Sample] = (), known: str = "") -> gr.Blocks:
    """Make the page.

    Args:
        visits: answers.
        samples: pictures to begin with.
        known: what is said of which strategy knows what.
    """
    names = list(visits.strategies.names)

    def ask(
        path: str | None,
        question: str,
        first: str,
        second: str,
        goes_on: bool,
        request: gr.Request,
    ) -> Iterator[tuple[str, str]]:
        other = None if second == NOBODY else second
        yield from visits.ask(_visitor(request), path, question, first, other, goes_on)

    def forget(request: gr.Request) -> tuple[str, str]:
        return visits.forget(_visitor(request))

    def leave(request: gr.Request) -> None:
        visits.sessions.drop(_visitor(request))

    page = gr.Blocks(
        title=f"Ask a picture: {visits.strategies.name}",
        analytics_enabled=False,
        delete_cache=(CLEARED_S // 6, CLEARED_S),
    )
    with page:
        gr.Markdown(f"# Ask a picture\nModel `{visits.strategies.name}`", elem_id="ipn-title")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    sources=["upload"],
                    height=300,
                    elem_id="ipn-picture",
                    buttons=[],
                )
                picture.preprocess = _path  # type: ignore[method-assign]
                question = gr.Textbox(
                    label="Question",
                    placeholder="Is there a dog?",
                    max_length=LONGEST,
                    elem_id="ipn-question",
                    lines=1,
                    max_lines=4,
                )
                button = gr.Button("Ask", variant="primary", elem_id="ipn-ask")
            with gr.Column(scale=3, min_width=300), gr.Row(elem_id="ipn-answers"):
                left = gr.HTML(elem_id="ipn-left", min_height=60)
                right = gr.HTML(elem_id="ipn-right")
        with gr.Row():
            first = gr.Radio(
                names, value=names[0], label="Strategy", info=known or None, elem_id="ipn-first"
            )
            second = gr.Radio(
                [NOBODY, *names],
                value=NOBODY,
                label="Compare with",
                elem_id="ipn-second",
                visible=len(names) > 1,
            )
            with gr.Column(min_width=220):
                goes_on = gr.Checkbox(
                    False, label="Remember earlier questions (a conversation)", elem_id="ipn-on"
                )
                anew = gr.Button("Start over", size="sm", elem_id="ipn-anew")
        if samples:
            _samples(samples, visits.strategies, picture, question, first)
        gr.on(
            [button.click, question.submit],
            ask,
            [picture, question, first, second, goes_on],
            [left, right],
            concurrency_limit=1,
            concurrency_id="model",
            show_progress="minimal",
            api_visibility="private",
        )
        anew.click(forget, None, [left, right], api_visibility="private")
        page.unload(leave)
    page.queue(max_size=WAITING, api_open=False)
    for block in page.blocks.values():
        _fetch_nothing(block)
    return page


def _samples(
    samples: Sequence[Sample],
    strategies: Strategies,
    picture: gr.Image,
    question: gr.Textbox,
    first: gr.Radio,
) -> None:
    """Offer pictures; with one goes a question, and a strategy that knows such pictures."""
    shown = gr.Examples([[one.path] for one in samples], [picture], label="Pictures to begin with",
                        elem_id="ipn-examples", api_visibility="private")  # fmt: skip

    def fill(event: gr.SelectData, chosen: str) -> tuple[str, str]:
        sample = samples[_index(event.index)]
        own = strategies.own[0] if chosen in strategies.others else chosen
        return sample.question, sample.model or own

    shown.dataset.select(fill, [first], [question, first], api_visibility="private")


def _index(found: Any) -> int:
    return int(found[0] if isinstance(found, (list, tuple)) else found)


def _path(payload: Any) -> str | None:
    """Take a picture as the file that was brought; it is opened later, within limits."""
    return None if payload is None else payload.path


def _fetch_nothing(block: Any) -> None:
    """Let a component take files that were uploaded, and no address to fetch one from.

    Gradio fetches what a visitor names so, which the page never does.
    """
    move = block.async_move_resource_to_block_cache

    async def move_file(path: Any) -> Any:
        if "://" in str(path):
            raise gr.Error("Addresses are not fetched: upload the picture itself.")
        return await move(path)

    block.async_move_resource_to_block_cache = move_file


def _visitor(request: gr.Request) -> str:
    """Return the name of the page's session: one for each tab of a browser."""
    return str(request.session_hash)
