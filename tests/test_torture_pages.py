"""The page about reliability says what all sections counted together, and how long that took."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ipn_core import benchmarking
from ipn_core.benchmarking import Results, Row, Section

ROOT = Path(__file__).parents[1]


@pytest.fixture
def torture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The workspace's own programs, which are no part of a wheel."""
    monkeypatch.syspath_prepend(str(ROOT))
    import torture.conftest
    import torture.render

    return torture


def section(seconds: float | None, *names: str) -> Section:
    more = {"tried": 1200.0, "refused": 1000.0, "taken": 199.0, "broken": 1.0, "slowest": 1.0}
    about = {"threads": 1, "cores": 2, "seconds": seconds, "day": "2026-11-28", "command": "c"}
    rows = tuple(Row.of(name, [0.1], more=more) for name in names)
    return Section(about={**about, "cpu": "x", "torch": "2"}, rows=rows)


def test_one_line_adds_up_all_sections(torture: Any) -> None:
    sections = {"inputs": section(80.4, "a", "b"), "numbers": section(20.0, "c")}
    said = torture.render.total(sections)
    assert said == (
        "3,600 tried, 3,000 refused, 597 taken, 3 broken, in 2 sections: 100 s, torch with 1 "
        "thread(s), 2 cores."
    )
    sections["numbers"] = section(None, "c")
    assert "in a time that was not kept" in torture.render.total(sections)


def test_the_page_asks_for_the_line_and_gets_it(
    torture: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = re.findall(
        r"<!-- torture (\w+): begin -->", (ROOT / "docs" / "reliability.md").read_text()
    )
    assert marks[0] == "total"
    assert set(marks[1:]) == {p.stem[8:] for p in (ROOT / "torture").glob("torture_*.py")}
    counts, page = tmp_path / "counts.json", tmp_path / "page.md"
    benchmarking.store(counts, "any", "inputs", section(7.0, "a"))
    page.write_text("<!-- torture total: begin -->\n<!-- torture total: end -->\n")
    assert torture.render.main(counts, page) == 0
    line = torture.render.total(Results.read(counts).sections)
    assert ": 7 s, " in line
    assert line in page.read_text()
    assert line in capsys.readouterr().out


def test_the_time_of_a_part_does_not_pass_for_that_of_the_whole(torture: Any) -> None:
    old, (row,) = section(50.0, "a", "b"), section(1.0, "b").rows
    merged = torture.conftest.merged
    part = merged([row], {"day": "2026-11-28", "seconds": 1.0}, old)
    assert (len(part.rows), part.about["seconds"]) == (2, 50.0)
    assert merged([row], {"day": "2026-11-28", "seconds": 1.0}, None).about["seconds"] == 1.0
