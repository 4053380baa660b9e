"""How much is tried, and where the counts go."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from toys import toy_registry

from ipn_core import benchmarking
from ipn_core.benchmarking import Results, Row, Section
from ipn_core.plugins import Registry
from torture.render import total
from torture.tally import Tally

RESULTS = Path(__file__).parent / "results" / "counts.json"
COMMAND = "make torture"
ROWS = pytest.StashKey[dict[str, list[Row]]]()
CHOSEN = pytest.StashKey[set[str]]()
SECONDS = pytest.StashKey[dict[str, float]]()


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
    config.stash[CHOSEN] = set()
    config.stash[SECONDS] = {}


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
    section = _section(request.node)
    opened: list[Tally] = []

    def open_(name: str, **options: float) -> Tally:
        opened.append(Tally(name, **options))
        return opened[-1]

    yield open_
    rows = request.config.stash[ROWS].setdefault(section, [])
    rows += [one.row() for one in opened if one.tried]
    for one in opened:
        one.check()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, bool, bool]:
    """Count how long a section takes, with what it sets up."""
    began = time.monotonic()
    done = yield
    seconds, section = item.config.stash[SECONDS], _section(item)
    seconds[section] = seconds.get(section, 0.0) + time.monotonic() - began
    return done


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Remember that a section is not counted as a whole."""
    for item in items:
        item.config.stash[CHOSEN].add(_section(item))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was counted in place of what there was.

    Where only some tests of a section were run, the rows of the others stay, and the day says so.
    """
    path: Path = session.config.getoption("--counts")
    scale = session.config.getoption("--scale")
    again = COMMAND if scale == 1 else f"{COMMAND} SCALE={scale:g}"
    by_name = any("::" in word for word in session.config.args)
    for name, rows in session.config.stash[ROWS].items():
        before = Results.read(path).sections if path.exists() else {}
        old = before.get(name) if by_name or name in session.config.stash[CHOSEN] else None
        taken = {"seconds": round(session.config.stash[SECONDS][name], 1)}
        section = merged(rows, {**benchmarking.about("cpu", again), **taken}, old)
        path.parent.mkdir(parents=True, exist_ok=True)
        benchmarking.store(path, "any", name, section)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what came of the sections that were run."""
    config = terminalreporter.config
    names = config.stash[ROWS].keys()
    if names:
        sections = Results.read(config.getoption("--counts")).sections
        terminalreporter.write_line(total({name: sections[name] for name in names}))


def merged(rows: Sequence[Row], about: Mapping[str, Any], old: Section | None) -> Section:
    """Return a section of new rows, and of those old ones that were not counted again.

    Args:
        rows: new ones.
        about: what they were counted on.
        old: the section that there was, None to keep none of it.
    """
    kept = {row.name: row for row in old.rows} if old else {}
    stays = bool(kept.keys() - {row.name for row in rows})
    kept.update({row.name: row for row in rows})
    if old and stays and (first := str(old.about["day"]).split(" ")[0]) != about["day"]:
        about = {**about, "day": f"{first} to {about['day']}"}
    if old and stays:  # the time of a part is not that of the whole
        about = {**about, "seconds": old.about.get("seconds")}
    return Section(about=about, rows=tuple(kept.values()))


def _section(item: pytest.Item) -> str:
    return item.path.stem.removeprefix("torture_")
