"""Options of the benchmarks, the device that they run on, and where their rows go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.results import FOLDER, Row, command, store
from benchmarks.sections import Book
from ipn_core.memory import keep_freed_memory

KINDS = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
BOOK = pytest.StashKey[Book]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say how much is measured, for how long, and where it is written."""
    group = parser.getgroup("ipn benchmarks")
    group.addoption("--no-check", action="store_true", help="print ratios without checking them")
    group.addoption(
        "--grid",
        choices=("short", "usual", "full"),
        help="how many shapes of a grid: by default the usual ones on a CPU, all on CUDA",
    )
    group.addoption("--row-seconds", type=float, help="about how long a row is timed")
    group.addoption("--threads", type=int, help="of the CPU: by default one a CPU that may be used")
    group.addoption(
        "--results", type=Path, default=FOLDER, metavar="DIR", help="where results are written"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Open the book that rows are entered in, and let no row pay for what another gave back."""
    keep_freed_memory()
    config.stash[BOOK] = Book(config.getoption("--results"), config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Let what asks for a kind of device run on each; `gpu` marks those on CUDA."""
    if "kind" in metafunc.fixturenames and not hasattr(metafunc.module, "pytest_generate_tests"):
        metafunc.parametrize("kind", KINDS)


@pytest.fixture
def device(kind: str) -> torch.device:
    """The device of a kind, "cpu" or "cuda"."""
    if kind != "cuda":
        return torch.device(kind)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def book(request: pytest.FixtureRequest) -> Book:
    """Where benchmarks of many tests enter their rows; a section is written once it is whole."""
    return request.config.stash[BOOK]


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Write a section whose rows one test measures: `keep("engine", rows, notes=[…])`."""
    folder = request.config.getoption("--results")

    def write(name: str, rows: Sequence[Row], kind: str = "cpu", notes: Sequence[str] = ()) -> Path:
        again = command(request.path.name, kind)
        return store(name, rows, kind, notes=notes, again=again, folder=folder)

    return write


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what is whole."""
    session.config.stash[BOOK].close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which sections were written, and which were not, and why."""
    for line in terminalreporter.config.stash[BOOK].told:
        terminalreporter.write_line(line)
