"""`ipn ask`: one question about one picture."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ipn_core.cli.options import (
    DEFAULT_MODEL,
    Debug,
    Device,
    Dtype,
    Interact,
    Json,
    Model,
    Untrained,
)

if TYPE_CHECKING:
    from ipn_core.answer import Answer
    from ipn_core.model import IPN

__all__ = ["ask"]


def ask(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="A picture's file.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="What to ask about it.")],
    model: Model = DEFAULT_MODEL,
    interact: Interact = None,
    untrained: Untrained = False,
    heatmap: Annotated[
        str | None,
        typer.Option("--heatmap", metavar="FILE.png", help="Draw where the model looked."),
    ] = None,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            metavar="FILE.html",
            help="Write a page of what was read, where each look went, and the seconds.",
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer a question about a picture; prints the answer alone."""
    from ipn_core.cli.loading import check_page, check_png, check_question, load_model
    from ipn_core.cli.terminal import note, print_json, quiet
    from ipn_core.images import load_image

    check_question(question)
    picture = load_image(image)
    if heatmap is not None:
        check_png(heatmap, image)
    if trace is not None:
        check_page(trace, image)
    with quiet():
        from ipn_core.evaluation.heatmap import drawn_heatmap, require_map
        from ipn_core.files import Content, atomic_writes

        loaded = load_model(
            model,
            interact,
            untrained,
            check=None if heatmap is None else require_map,
            device=device,
            dtype=dtype,
        )
        answer = loaded.ask(picture, question)
        # Nothing is written before the answer is there, which is said whatever the disk does.
        made: dict[str | os.PathLike[str], Content] = {}
        if heatmap is not None:
            made[heatmap] = drawn_heatmap(
                answer,
                [picture],
                question,
                boxes=[loaded.encoder.shows(picture.size)],
                model=model,
                interact=loaded.strategy,
            )
        if trace is not None:
            from ipn_core.showing.trace import trace_page

            made[trace] = trace_page(loaded, answer).encode()
    if json:
        print_json(_report(answer, loaded))
    else:
        print(answer.text, flush=True)
    with quiet():
        atomic_writes(made)
    if heatmap is not None:
        note(f"where it looked: {heatmap}")
    if trace is not None:
        note(f"how it answered: {trace}")


def _report(answer: Answer, model: IPN) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "model": model.name,
        "interact": model.strategy,
        "seconds": answer.seconds,
        "tokens": answer.tokens,
        "answer_tokens": len(answer.ids),
    }
