"""How long commands take to start, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipn_core.benchmarking.engine.table import Found, against, took
from ipn_core.benchmarking.engine.timing import Timed, collected, in_turn
from ipn_core.benchmarking.rows import Row
from ipn_core.plugins import get_registry

if TYPE_CHECKING:
    from ipn_core.benchmarking.engine.table import Session

__all__ = ["measure"]

HELP, EMPTY = "ipn --help", "an empty typer app's --help"
PLUGINS, IMPORTS = "ipn plugins", 'python -c "import torch, transformers"'
COLD, NEEDED, LOAD = "ipn ask, cold", "import, load and answer", "load the starter"
WARM = "a further answer, warm"
HELP_GOAL, COLD_GOAL = 1.5, 1.05

_IPN = "import sys; from ipn_core.cli import main; sys.exit(main({words!r}))"
_EMPTY = """
import typer
app = typer.Typer(name="empty", add_completion=False)
@app.command()
def empty() -> None:
    "Do nothing."
app(["--help"])
"""
_NEEDED = """
import time, torch, transformers
from ipn_core import IPN
from ipn_core.placing import place
started = time.perf_counter()
model = place(IPN.from_pretrained("starter"), {device!r})
seconds = time.perf_counter() - started
print(model.ask({image!r}, "Is there a dog?").text)
print(seconds)
"""
STARTER = "starter"


def measure(session: Session) -> Found:
    """Measure help and lists often, and answers now and then."""
    row = "commands"
    with tempfile.TemporaryDirectory() as folder:
        image = str(Path(folder) / "picture.png")
        _draw(image)
        help_ = _timed({HELP: _ipn("--help"), EMPTY: _EMPTY}, session.repeats(12, 5))
        rest = {IMPORTS: "import torch, transformers", PLUGINS: _ipn("plugins")}
        found = {**help_, **_timed(rest, session.repeats(4, 1))}
        rows = [*took(row, found), against(row, help_, HELP, EMPTY, HELP_GOAL)]
        rows += _answers(row, image, session)
    return Found(
        row,
        "commands from their start to their end, each in a process of its own",
        rows,
        notes=[
            f"'{NEEDED}' is a program of a few lines that does just that; '{LOAD}' is the loading "
            "in it, after torch and transformers were imported, with whatever else it imports",
            "answers are the starter's, with the picture encoded anew each time",
        ],
    )


def _answers(row: str, image: str, session: Session) -> list[Row]:
    known = get_registry().entries("weights").get(STARTER)
    weights = None if known is None else known.load()
    if weights is None or not weights.present():
        why = "needs the starter's weights: ipn models pull starter"
        return [Row.refused(f"{row}/{name}", [why]) for name in (COLD, NEEDED, LOAD, WARM)]
    device = str(session.device)
    programs = {
        COLD: _ipn("ask", image, "Is there a dog?", "--device", device),
        NEEDED: _NEEDED.format(image=image, device=device),
    }

    def parted() -> Iterator[tuple[Timed, Any]]:
        for timed, printed in _runs(programs, session.repeats(4, 2)):
            answers = {name: said.splitlines() for name, said in printed.items()}
            if answers[COLD][0] != answers[NEEDED][0]:
                raise AssertionError(f"the answers differ: {answers}")
            yield {**timed, LOAD: float(answers[NEEDED][1])}, printed

    found = collected(parted())
    once = collected(in_turn({WARM: _warm(image, device)}, session.repeats(10, 5)))
    return [*took(row, {**found, **once}), against(row, found, COLD, NEEDED, COLD_GOAL)]


def _warm(image: str, device: str) -> Callable[[], object]:
    from ipn_core.model import IPN
    from ipn_core.placing import place

    model = place(IPN.from_pretrained(STARTER), device)
    return lambda: model.ask(image, "Is there a dog?")


def _timed(programs: Mapping[str, str], repeats: int) -> dict[str, list[float]]:
    return collected(_runs(programs, repeats))


def _runs(programs: Mapping[str, str], repeats: int) -> Iterator[tuple[Timed, dict[str, str]]]:
    """Run programs in turn; yields the seconds of each, and what it printed."""
    return in_turn({name: partial(_run, one) for name, one in programs.items()}, repeats, warm_up=1)


def _run(program: str) -> str:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _ipn(*words: str) -> str:
    return _IPN.format(words=list(words))


def _draw(path: str) -> None:
    from PIL import Image

    Image.new("RGB", (256, 256), (40, 90, 160)).save(path)
