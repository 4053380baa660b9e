"""Results of benchmarks: what a row holds, how files are written, and how two are compared."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipn_core.benchmarking import Results, Row, Section, about, device_name, store
from ipn_core.benchmarking.compare import compare, ratio_interval
from ipn_core.benchmarking.results import _command
from ipn_core.benchmarking.rows import median_interval
from ipn_core.errors import ConfigError, DataError


def around(middle: float, count: int = 30, spread: float = 0.01, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [middle * (1 + spread * draw.uniform(-1, 1)) for _ in range(count)]


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "ranks"), [(1, (0, 0)), (5, (0, 4)), (9, (1, 7)), (30, (9, 20))])
def test_the_interval_of_a_median_is_that_of_the_tables(n: int, ranks: tuple[int, int]) -> None:
    samples = list(range(n))
    random.Random(0).shuffle(samples)
    assert median_interval(samples) == ranks


def test_the_interval_of_the_median_of_thousands() -> None:
    low, high = median_interval([float(n) for n in range(10_001)])
    assert (low, high) == (4901.0, 5099.0)  # 5,000 ∓ 1.96 · √10,001 / 2, and to the next rank


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    draw = random.Random(1)
    hits = 0
    for _ in range(2000):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(25)])
        hits += low <= 0.693147 <= high
    assert 0.945 <= hits / 2000 <= 0.99  # 95.7 % by theory


def test_a_row_sums_its_samples_up() -> None:
    samples = around(2.0)
    row = Row.of("a", samples, {"q": 5}, error=1e-7, more={"flops": 3.0})
    assert row.median == pytest.approx(statistics.median(samples), rel=1e-5)
    assert row.low <= row.p20 <= row.median or row.p20 <= row.low <= row.median  # type: ignore[operator]
    assert row.p20 < row.median < row.p80  # type: ignore[operator]
    assert row.samples == 30
    assert Row.of("a", [2.0]).p80 == 2.0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "a"}, "row 'a' has no median and does not say why"),
        ({"name": "a", "median": 1.0}, "must have a median with its interval"),
        ({"name": "a", "reasons": ["x"], "colour": 3}, "unknown key 'row.colour'"),
        (
            {"name": "a", "median": 1, "low": 2, "high": 1, "p20": 1, "p80": 1},
            "whose end is before its start",
        ),
        ({"name": "", "reasons": ["x"]}, "'row.name'"),
        ({"name": "a", "reasons": ["x"], "error": float("nan")}, "'row.error'"),
    ],
)
def test_a_row_that_says_nothing_or_too_much_is_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Row.parse(fields, "row")


def test_a_goal_is_missed_in_the_direction_that_is_worse() -> None:
    low = Row.of("a", [1.1], goal=1.0)
    assert low.misses_goal()
    assert not low.misses_goal(slack=0.2)
    high = Row.of("a", [0.9], goal=1.0, better="higher")
    assert high.misses_goal()
    assert not high.misses_goal(slack=0.2)
    for better in ("lower", "higher"):
        wide = Row.of("a", [0.5, 1.0, 1.5], goal=1.0, better=better)  # type: ignore[arg-type]
        worse = wide.model_copy(update={"median": 1.4 if better == "lower" else 0.6})
        assert worse.misses_goal(slack=0.2)
        assert not worse.misses_goal(slack=0.2, surely=True)
        goal = 0.4 if better == "lower" else 2.0
        assert worse.model_copy(update={"goal": goal}).misses_goal(slack=0.2, surely=True)
    assert not Row.of("a", [9.0]).misses_goal()
    assert not Row.refused("a", ["no"]).misses_goal()


# -- files -----------------------------------------------------------------------------------------


def test_sections_are_written_one_by_one_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    rows = (Row.of("a/x", around(1.0), {"q": 5, "dtype": "float32"}), Row.refused("a/y", ["no"]))
    first = Section(about={"torch": "1", "threads": 2}, notes=("of a grid",), rows=rows)
    store(path, "d", "attention", first)
    store(path, "d", "engine", Section(rows=rows[:1]))
    found = Results.read(path)
    assert found.device == "d"
    assert dict(found.sections) == {"attention": first, "engine": Section(rows=rows[:1])}
    store(path, "d", "attention", Section(rows=rows[1:]))
    assert [len(s.rows) for s in Results.read(path).sections.values()] == [1, 1]
    # A row a line, so that a change of one shows as one.
    assert sum('"name"' in line for line in path.read_text().splitlines()) == 2


def test_two_rows_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="there are two rows 'a'"):
        Section(rows=(Row.refused("a", ["x"]), Row.refused("a", ["y"])))


def test_it_says_what_was_measured_on() -> None:
    found = about("cpu", "make bench")
    assert found["command"] == "make bench"
    assert found["threads"] == 1
    assert found["torch"]
    assert found["device"] == device_name("cpu")
    assert str(found["device"]).endswith("-1-threads")
    assert json.dumps(found)


def test_a_command_is_kept_without_the_folders_of_a_machine() -> None:
    assert _command(["/some/where/bin/ipn", "bench", "engine"]) == "ipn bench engine"
    assert _command(["/x/pytest/__main__.py", "benchmarks"]) == "python -m pytest benchmarks"


GOOD = {"format": 1, "device": "d", "sections": {"a": {"rows": [{"name": "x", "reasons": ["n"]}]}}}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot read '"),
        (b"{", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[]", "holds no results of benchmarks"),
        (b'{"benchmarks": []}', "holds no results of benchmarks"),
        ({**GOOD, "format": 2}, "has format 2, and this version reads 1"),
        ({**GOOD, "more": 1}, "is damaged: unknown key 'results.more'"),
        ({**GOOD, "sections": {"a": {"rows": [{"name": "x"}]}}}, "no median and does not say why"),
        ({**GOOD, "sections": {"a": 3}}, "is damaged: "),
    ],
)
def test_a_file_that_holds_no_results_gives_one_message(
    content: Any, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(DataError) as raised:
        Results.read(path)
    assert "some.json" in str(raised.value)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_damaged_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text("{")
    with pytest.raises(DataError):
        store(path, "d", "attention", Section())
    assert path.read_text() == "{"


# -- comparing -------------------------------------------------------------------------------------


def results(*rows: Row, section: str = "attention", **about: Any) -> Results:
    return Results(device="d", sections={section: Section(about=about, rows=rows)})


def verdicts(before: Results, after: Results, **options: Any) -> dict[str, str]:
    return {c.name: c.verdict for c in compare(before, after, **options).changes}


def test_what_is_worse_or_better_is_told_from_what_is_alike() -> None:
    before = results(
        *(Row.of(name, around(1.0, seed=n)) for n, name in enumerate("abcd")),
        Row.of("rate", around(1.0), unit="tokens/s", better="higher"),
    )
    after = results(
        Row.of("a", around(1.2)),
        Row.of("b", around(0.8)),
        Row.of("c", around(1.04)),
        Row.of("d", around(1.2, spread=0.9, seed=4)),  # much, and not sure
        Row.of("rate", around(0.8), unit="tokens/s", better="higher"),
    )
    expected = {"a": "worse", "b": "better", "c": "alike", "d": "alike", "rate": "worse"}
    assert verdicts(before, after) == expected
    assert verdicts(before, after, tolerance=0.3) == dict.fromkeys(expected, "alike")
    assert verdicts(before, after, tolerance=0.001)["c"] == "worse"
    found = {change.name: change for change in compare(before, after).changes}
    assert found["a"].ratio == pytest.approx(1.2, rel=0.01)
    assert found["rate"].ratio == pytest.approx(1.25, rel=0.01)
    assert found["a"].low < found["a"].ratio < found["a"].high  # type: ignore[operator]


def test_the_interval_of_a_ratio_holds_it_as_often_as_it_says() -> None:
    draw = random.Random(2)
    hits = 0
    for _ in range(1000):
        a, b = ([draw.lognormvariate(m, 0.3) for _ in range(20)] for m in (0.0, 0.5))
        _, low, high = ratio_interval(Row.of("a", a), Row.of("a", b))
        hits += low <= 1.6487 <= high
    assert 0.94 <= hits / 1000 <= 0.99


def test_what_can_no_longer_be_measured_is_a_regression() -> None:
    ran, refused = Row.of("a", around(1.0)), Row.refused("a", ["needs a device of cuda"])
    found = compare(results(ran), results(refused))
    assert [(c.verdict, c.reasons) for c in found.changes] == [
        ("lost", ("needs a device of cuda",))
    ]
    assert len(found.regressions) == 1
    assert verdicts(results(refused), results(ran)) == {"a": "found"}
    assert verdicts(results(refused), results(refused)) == {"a": "alike"}


def test_peak_memory_is_compared_with_the_time() -> None:
    before, after = (
        results(Row.of("a", around(1.0), more={"peak_bytes": bytes_})) for bytes_ in (100.0, 200.0)
    )
    assert verdicts(before, after) == {"a": "alike", "a, peak memory": "worse"}
    assert verdicts(after, before)["a, peak memory"] == "better"


def test_zeros_have_no_ratio_and_are_compared_all_the_same() -> None:
    none, some = (results(Row.of("a", [v, v, v], unit="bytes")) for v in (0.0, 5.0))
    assert verdicts(none, some) == {"a": "worse"}
    assert verdicts(some, none) == {"a": "better"}
    assert verdicts(none, none) == {"a": "alike"}


def test_rows_and_machines_of_one_side_are_named() -> None:
    before = results(Row.of("a", [1.0]), Row.of("b", [1.0]), torch="1", day="x", command="y")
    after = results(Row.of("a", [1.0]), Row.of("c", [1.0]), torch="2", day="z")
    found = compare(before, after)
    assert found.only_before == ("attention: b",)
    assert found.only_after == ("attention: c",)
    assert found.differs == {"attention: torch": ("1", "2")}
    assert found.drift("attention") == 1.0
    assert found.drift("engine") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda: {"sections": ["atention"]},
            r"'atention': these results have attention \(did you mean",
        ),
        (lambda: {"after": results(Row.of("b", [1.0]))}, "no row in common: 1 and 1 rows"),
        (
            lambda: {"after": results(Row.of("a", [1.0], unit="bytes"))},
            r"is in s \(lower is better\) in one file and in bytes",
        ),
        (lambda: {"after": Results(device="d")}, "no row in common: 1 and 0 rows"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    change: Callable[[], dict[str, Any]], says: str
) -> None:
    given = {"before": results(Row.of("a", [1.0])), "after": results(Row.of("a", [1.0]))}
    with pytest.raises(DataError, match=says):
        compare(**{**given, **change()})
