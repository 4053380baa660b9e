from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_refused

from ipn_core.benchmarking import Row, Section, store


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Two files: the second has one row that is slower, one that is lost and one that is alike."""
    made = []
    for name, slow in (("A.json", 1.0), ("B.json", 1.5)):
        rows = [
            Row.of("q5/sdpa", [slow * t for t in (1e-3, 1.01e-3, 0.99e-3)]),
            Row.of("q5/eager", [2e-3] * 3) if slow == 1.0 else Row.refused("q5/eager", ["broken"]),
            Row.of("q5/flex", [3e-3] * 3),
        ]
        store(tmp_path / name, "d", "attention", Section(about={"torch": name[0]}, rows=rows))
        made.append(tmp_path / name)
    return made[0], made[1]


def test_regressions_are_shown_with_intervals_and_fail(
    ipn: Callable[..., Run], files: tuple[Path, Path]
) -> None:
    run = ipn("bench", "compare", *files)
    assert run.code == 1
    assert run.err == ""
    head, worse, lost, counts, differs = run.out.splitlines()
    assert head.startswith("attention: 3 in both, the median at 1.250 of what it was")
    assert worse.split() == [
        *("worse", "q5/sdpa", "1", "->", "1.5", "ms", "1.500", "(1.479", "to", "1.521)")
    ]
    assert lost.split() == ["lost", "q5/eager", "broken"]
    assert counts == "1 worse, 1 lost, 0 better, 0 found, 1 alike; tolerance 5 %"
    assert differs == "attention: measured with another torch, A -> B"
    assert "q5/flex" in ipn("bench", "compare", *files, "--all").out


def test_nothing_worse_is_a_success(ipn: Callable[..., Run], files: tuple[Path, Path]) -> None:
    assert ipn("bench", "compare", files[0], files[0]).code == 0
    assert ipn("bench", "compare", *files, "--tolerance", "0.6").code == 1  # one is still lost
    back = ipn("bench", "compare", files[1], files[0])
    assert back.code == 0
    assert "better q5/sdpa" in back.out
    assert "found  q5/eager" in back.out


def test_rows_of_one_file_alone_are_named_and_are_no_regression(
    ipn: Callable[..., Run], files: tuple[Path, Path]
) -> None:
    fewer = files[0].with_name("fewer.json")
    rows = [Row.of("q5/flex", [3e-3] * 3)]
    store(fewer, "d", "attention", Section(about={"torch": "A"}, rows=rows))
    run = ipn("bench", "compare", files[0], fewer)
    assert (run.code, run.err) == (0, "")
    assert run.out.splitlines()[-1] == "only in A: 2, such as attention: q5/sdpa"
    assert "0 worse, 0 lost, 0 better, 0 found, 1 alike" in run.out
    back = ipn("bench", "compare", fewer, files[0])
    assert back.code == 0
    assert back.out.splitlines()[-1] == "only in B: 2, such as attention: q5/sdpa"
    found = json.loads(ipn("bench", "compare", files[0], fewer, "--json").out)
    assert found["only_before"] == ["attention: q5/sdpa", "attention: q5/eager"]
    assert found["regressions"] == 0


def test_json_holds_all_of_it(ipn: Callable[..., Run], files: tuple[Path, Path]) -> None:
    run = ipn("bench", "compare", *files, "--json")
    assert run.code == 1
    found = json.loads(run.out)
    assert found["regressions"] == 2
    assert [c["verdict"] for c in found["changes"]] == ["worse", "lost", "alike"]
    assert found["differs"] == {"attention: torch": ["A", "B"]}


def test_bad_files_give_one_message(
    ipn: Callable[..., Run], files: tuple[Path, Path], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    assert_refused(ipn("bench", "compare", files[0], bad), "bad.json", "holds no results")
    assert_refused(ipn("bench", "compare", tmp_path / "no.json", files[0]), "No such file")
    assert_refused(ipn("bench", "compare", tmp_path, files[0]), "cannot read")
    assert_refused(ipn("bench", "compare", *files, "--section", "x"), "unknown section 'x'")
    assert_refused(ipn("bench", "compare", *files, "--tolerance", "-1"), "--tolerance")
