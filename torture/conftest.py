"""How much is tried, and where the counts go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from toys import toy_registry

from ipn_core import benchmarking
from ipn_core.benchmarking import Results, Row, Section
from ipn_core.plugins import Registry
from torture.tally import Tally

RESULTS = Path(__file__).parent / "results" / "counts.json"
COMMAND = "make torture"
ROWS = pytest.StashKey[dict[str, list[Row]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Say how much is tried, and where it is written."""
    group = parser.getgroup("ipn torture")
    group.addoption(
        "--scale", type=float, default=1.0, help="times the usual number of cases, such as 0.02"
    )
    group.addoption("--counts", type=Path, default=RESULTS, metavar="FILE", help="of the counts")


def pytest_configure(config: pytest.Config) -> None:
    """Begin without a count."""
    config.stash[ROWS] = {}


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Everything installed, and the toy strategies."""
    return toy_registry()


@pytest.fixture
def scaled(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """Return a number of cases at the scale that was asked for."""
    scale: float = request.config.getoption("--scale")
    return lambda count: max(1, round(count * scale))


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Callable[..., Tally]]:
    """Open a tally by its name; when the test is done it is kept, and broken cases fail it."""
    section = request.path.stem.removeprefix("torture_")
    opened: list[Tally] = []

    def open_(name: str, **options: float) -> Tally:
        opened.append(Tally(name, **options))
        return opened[-1]

    yield open_
    rows = request.config.stash[ROWS].setdefault(section, [])
    rows += [one.row() for one in opened if one.tried]
    for one in opened:
        one.check()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was counted over what there was of the same names."""
    path: Path = session.config.getoption("--counts")
    scale = session.config.getoption("--scale")
    again = COMMAND if scale == 1 else f"{COMMAND} SCALE={scale:g}"
    for name, rows in session.config.stash[ROWS].items():
        before = Results.read(path).sections if path.exists() else {}
        kept = {row.name: row for row in before[name].rows} if name in before else {}
        kept.update({row.name: row for row in rows})
        section = Section(about=benchmarking.about("cpu", again), rows=tuple(kept.values()))
        path.parent.mkdir(parents=True, exist_ok=True)
        benchmarking.store(path, "any", name, section)
