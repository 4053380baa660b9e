"""How long commands take to start, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ipn_core.benchmarking.engine.table import Found, against, took
from ipn_core.benchmarking.engine.timing import collected, in_turn
from ipn_core.benchmarking.rows import Row
from ipn_core.plugins import get_registry

if TYPE_CHECKING:
    from ipn_core.benchmarking.engine.table import Session

__all__ = ["measure"]

HELP, EMPTY = "ipn --help", "an empty typer app's --help"
PLUGINS, IMPORTS = "ipn plugins", 'python -c "import torch, transformers"'
COLD, NEEDED = "ipn ask, cold", "import, load and answer"
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
import sys, torch, transformers
from ipn_core import IPN
print(IPN.from_pretrained("starter").ask({image!r}, "Is there a dog?").text)
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
            f"'{NEEDED}' is a program of three lines that does just that",
            "answers are the starter's, with the picture encoded anew each time",
        ],
    )


def _answers(row: str, image: str, session: Session) -> list[Row]:
    known = get_registry().entries("weights").get(STARTER)
    weights = None if known is None else known.load()
    if weights is None or not weights.present():
        why = "needs the starter's weights: ipn models pull starter"
        return [Row.refused(f"{row}/{name}", [why]) for name in (COLD, NEEDED, WARM)]
    words = ("ask", image, "Is there a dog?")
    count = session.repeats(4, 2)
    found = _timed({COLD: _ipn(*words), NEEDED: _NEEDED.format(image=image)}, count)
    warm = {WARM: _warm(image)}
    once = collected(in_turn(warm, session.repeats(10, 5)))
    return [*took(row, {**found, **once}), against(row, found, COLD, NEEDED, COLD_GOAL)]


def _warm(image: str) -> Callable[[], object]:
    from ipn_core.model import IPN

    model = IPN.from_pretrained(STARTER)
    return lambda: model.ask(image, "Is there a dog?")


def _timed(programs: Mapping[str, str], repeats: int) -> dict[str, list[float]]:
    rows = {name: _run(program) for name, program in programs.items()}
    return collected(in_turn(rows, repeats, warm_up=1))


def _run(program: str) -> Callable[[], object]:
    command = [sys.executable, "-c", program]
    return lambda: subprocess.run(command, check=True, capture_output=True)


def _ipn(*words: str) -> str:
    return _IPN.format(words=list(words))


def _draw(path: str) -> None:
    from PIL import Image

    Image.new("RGB", (256, 256), (40, 90, 160)).save(path)
