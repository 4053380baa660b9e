"""`ipn chat`: several questions about the same pictures, each encoded once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from ipn_core.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Interact, Model, Untrained

__all__ = ["chat"]


def chat(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE…", help="The pictures' files.")],
    model: Model = DEFAULT_MODEL,
    interact: Interact = None,
    untrained: Untrained = False,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Answer questions about pictures, one a line, until the input ends (Ctrl-D)."""
    from ipn_core.cli.loading import check_question, load_model
    from ipn_core.cli.terminal import note, quiet
    from ipn_core.errors import UserError
    from ipn_core.images import load_image

    pictures = [load_image(image) for image in images]
    with quiet():
        loaded = load_model(model, interact, untrained, device=device, dtype=dtype)
        dialogue = loaded.dialogue(pictures)
    failed = False
    for question in _questions():
        try:
            check_question(question)
            with quiet():
                answer = dialogue.ask(question)
        except UserError as error:
            # The dialogue is as it was before this question, so the next one may be asked.
            note(str(error))
            failed = True
        else:
            print(answer.text, flush=True)
    if failed and not sys.stdin.isatty():
        raise typer.Exit(2)


def _questions() -> Iterator[str]:
    """Yield the lines of stdin that hold anything, with a prompt where a person types them."""
    typed = sys.stdin.isatty()
    if typed and sys.stdout.isatty():
        # Gives `input` its line editing and history, where the system has it.
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    while True:
        try:
            if typed and sys.stdout.isatty():
                line = input("> ")
            else:
                if typed:
                    print("> ", end="", file=sys.stderr, flush=True)
                line = sys.stdin.readline()
                if not line:
                    return
        except EOFError:
            print(file=sys.stderr)
            return
        if line.strip():
            yield line.strip()
