"""`ipn demo`: a web page on which a model is asked, and shows where it looked."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ipn_core.cli.completing import installed
from ipn_core.cli.options import DEFAULT_MODEL, Debug, Device, Dtype, Interact, Model
from ipn_core.errors import DataError, IPNError

if TYPE_CHECKING:
    from ipn_core.demo.pictures import Sample
    from ipn_core.plugins import Registry
    from ipn_core.weights import Weights

__all__ = ["demo"]


def demo(
    model: Model = DEFAULT_MODEL,
    interact: Interact = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Whom it listens to.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for a free one.")] = 7860,
    examples: Annotated[
        str | None,
        typer.Option(
            "--examples",
            metavar="TASK|FILE.jsonl",
            help="Whose first pictures the page offers.",
            autocompletion=installed("task"),
        ),
    ] = None,
    max_upload: Annotated[
        int, typer.Option("--max-upload", min=1, metavar="MB", help="Of a picture at most.")
    ] = 20,
    device: Device = None,
    dtype: Dtype = None,
    debug: Debug = False,
) -> None:
    """Open a web page to ask about pictures, until it is interrupted; it is never shared."""
    from ipn_core.cli.loading import check_extra, load_model
    from ipn_core.cli.terminal import note, quiet
    from ipn_core.plugins import get_registry
    from ipn_core.serving.sockets import address_of, bound, hosts_of

    check_extra("demo", "gradio", "uvicorn")
    # Before the model is loaded: that the port is taken should not come out late.
    with bound(host, port) as socket, _own_folder() as folder:
        samples = _samples(examples, model, folder)
        with quiet():
            first = load_model(model, interact, untrained=False, device=device, dtype=dtype)
            import uvicorn

            from ipn_core.checkpoint import open_source
            from ipn_core.demo.app import create_app
            from ipn_core.demo.strategies import Strategies
            from ipn_core.demo.visits import Visits

            registry = get_registry()
            source = open_source(model, registry)
            beside = _beside(model, registry, (first.strategy, *source.strategies))
            samples += _samples_beside(beside, registry, folder)
            strategies = Strategies(first, source, registry, [one.name for one in beside])
            app = create_app(
                Visits(strategies),
                samples=samples,
                known=_known(model, strategies.own, beside, registry),
                upload=max_upload * 1_000_000,
                hosts=hosts_of(host),
            )
        socket.listen()
        note(f"{first.name} waits for questions at {address_of(host, socket)}")
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, timeout_graceful_shutdown=3
        )
        uvicorn.Server(config).run(sockets=[socket])


def _samples(examples: str | None, model: str, folder: Path) -> list[Sample]:
    """Write the pictures of a task, by default of the one whose pictures a known model knows."""
    from ipn_core.cli.terminal import note
    from ipn_core.demo.pictures import copy_samples, draw_samples
    from ipn_core.plugins import get_registry
    from ipn_core.tasks import open_task

    weights = _weights(model, get_registry())
    task = examples or (weights.examples if weights is not None else None)
    if task is None:
        return []
    try:
        return draw_samples(open_task(task), folder)
    except DataError as error:
        if examples is not None or weights is None:
            raise
        samples = copy_samples(weights, folder)
        note(f"{'fewer' if samples else 'no'} pictures to begin with: {error}")
        return samples


def _weights(model: str, registry: Registry) -> Weights | None:
    """Return what a known model's plugin says of it."""
    known = registry.entries("weights")
    return known[model].load() if model in known else None


def _beside(model: str, registry: Registry, own: Sequence[str] = ()) -> list[Weights]:
    """Return the known models that answer beside a known one: those that nothing is fetched for.

    Args:
        model: the known one.
        registry: where the others are looked up.
        own: names of its strategies, which stand for these alone.
    """
    known = registry.entries("weights")
    found: list[Weights] = []
    for name, one in known.items() if model in known else ():
        with _going_on(f"model '{name}' is not offered"), one.running("present"):
            if name not in (model, *own) and one.load().knows and one.load().present():
                found.append(one.load())
    return found


def _samples_beside(beside: Sequence[Weights], registry: Registry, folder: Path) -> list[Sample]:
    """Write the pictures that go with the models beside the page's own."""
    from ipn_core.demo.pictures import copy_samples

    found: list[Sample] = []
    for one in beside:
        with (
            _going_on(f"model '{one.name}' is offered without its pictures"),
            registry.get("weights", one.name).running("pictures"),
        ):
            found += copy_samples(one, folder, beside=True)
    return found


@contextlib.contextmanager
def _going_on(without: str) -> Iterator[None]:
    """Tell of a plugin that is broken, which is no reason to have no page."""
    from ipn_core.cli.terminal import note

    try:
        yield
    except IPNError as error:
        note(f"{without}: {error}")


def _known(model: str, own: Sequence[str], beside: Sequence[Weights], registry: Registry) -> str:
    """Say which strategy knows what: "rvii, static: drawings. photo: photographs."."""
    weights = _weights(model, registry)
    if weights is None or not beside:
        return ""
    said = [(", ".join(own), weights.knows), *((one.name, one.knows) for one in beside)]
    return " ".join(f"{names}: {what}." for names, what in said)


@contextlib.contextmanager
def _own_folder() -> Iterator[Path]:
    """Give Gradio a folder for the pictures that visitors bring, which is gone in the end."""
    from ipn_core.interrupts import ending_on_sigterm

    with ending_on_sigterm(), tempfile.TemporaryDirectory(prefix="ipn-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield Path(folder)
