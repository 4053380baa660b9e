"""`ipn bench engine`: every row is measured and held to its goal, and what differs is not timed."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch

from ipn_core.benchmarking.engine import memory, subjects
from ipn_core.benchmarking.engine.first_token import setup_first_token
from ipn_core.benchmarking.engine.memory import SIDES, growth, slope
from ipn_core.benchmarking.engine.questions import FEW, QUESTIONS, Album
from ipn_core.benchmarking.engine.report import text
from ipn_core.benchmarking.engine.table import Found, Session, measure
from ipn_core.benchmarking.engine.training import Steps, setup_steps
from ipn_core.benchmarking.rows import Row
from ipn_core.testing.tiny import tiny_backbone

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("small_interaction")


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setattr(
        subjects, "backbone", lambda device: (tiny_backbone(positions=2048), "a toy")
    )
    return Session(short=True, count=2)


GOALS = {
    "first-token-128": {"one request round : its floor": 1.05},
    "questions": {
        "LLaVA : one after the other": 3.0,
        "LLaVA, its cache copied : one after the other": 1.0,
        "LLaVA, its cache cut back : one after the other": 1.0,
        "LLaVA : one batch": 6.0,
    },
    "decoding": {"plain generate : after a look": 0.98},
    "ragged-batch": {"8 single runs : the batch": 2.5},
    "training": {
        "asked, the beginning run each step : static tokens in front": 0.6,
        "asked, the beginning from the cache : static tokens in front": 0.25,
    },
    "training-all": {"asked, the beginning trained through : one pass over the same tokens": 1.07},
    "machinery": {"what hooks add : a first token": 0.01},
}


@pytest.mark.parametrize("row", GOALS)
def test_a_row_is_measured_and_held_to_its_goals(session: Session, row: str) -> None:
    found = measure(row, session)
    assert found.row == row
    assert all(one.median is not None and one.samples == 2 for one in found.rows)
    goals = {one.name.removeprefix(f"{row}/"): one.goal for one in found.rows if one.goal}
    assert goals == GOALS[row]
    said = text(found)
    assert said.count("goal at ") == len(goals)
    assert all(one.name.removeprefix(f"{row}/") in said for one in found.rows)


def test_rows_that_find_different_tokens_are_not_timed() -> None:
    case = setup_first_token(tiny_backbone(), 128)
    case.check()
    with torch.no_grad():
        case.embeds[:, -1] += 100.0
    with pytest.raises(AssertionError, match="the rows find different first tokens"):
        case.check()


def test_growth_is_one_where_memory_is_linear_and_four_where_quadratic() -> None:
    linear = [5000.0 + 100 * side**2 for side in SIDES]
    assert growth(linear) == pytest.approx(1)
    assert slope(linear) == pytest.approx(100)
    assert growth([float(side**4) for side in SIDES]) == pytest.approx(4)


def test_on_a_gpu_the_peak_is_that_of_torchs_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"now": 1000, "peak": 9000}
    fakes = {
        "synchronize": lambda device: None,
        "reset_peak_memory_stats": lambda device: held.update(peak=held["now"]),
        "memory_allocated": lambda device: held["now"],
        "max_memory_allocated": lambda device: held["peak"],
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    task = lambda: held.update(peak=held["now"] + 500)  # noqa: E731
    assert memory._peak(task, torch.device("cuda", 0)) == 500


@pytest.mark.skipif(not memory.RESET.exists(), reason="needs Linux")
def test_on_a_cpu_the_peak_is_that_of_the_process() -> None:
    size = 1 << 27

    def task() -> None:
        # Not from the C library, which may have kept as much from an earlier test.
        with mmap.mmap(-1, size) as pages:
            for start in range(0, size, mmap.PAGESIZE):
                pages[start] = 1

    assert 0.9 * size < memory._peak(task, torch.device("cpu")) < 1.5 * size


def test_features_lie_where_they_are_asked_for() -> None:
    for device in (torch.device("cpu"), torch.device("meta")):
        assert subjects.features_of(2, device).values.device == device


def test_ways_of_asking_that_answer_otherwise_are_not_timed() -> None:
    album = Album(tiny_backbone("llama-gqa", positions=2048), QUESTIONS[::4])
    album.check()
    with torch.no_grad():
        album.ours.slots.image += 1
    with pytest.raises(AssertionError, match="'one after the other' answers"):
        album.check()


def test_a_late_question_that_is_answered_otherwise_is_found_out() -> None:
    album = Album(tiny_backbone("llama-gqa", positions=2048), QUESTIONS[::4])
    album.check()
    assert len(album.questions) > FEW
    assert album.time().keys() == {*album.one_by_one(), *album.batches()}
    batch = album._our_batch
    spoilt = lambda count: batch(count)[:FEW] + [(0,)] * (count - FEW)  # noqa: E731
    album._our_batch = spoilt  # type: ignore[method-assign]
    album.check()
    with pytest.raises(AssertionError, match="'one batch' answers"):
        album.time()


@pytest.fixture
def steps() -> Steps:
    return setup_steps(tiny_backbone(), 40)


def test_a_cache_that_gives_something_else_is_not_timed(steps: Steps) -> None:
    steps.check()
    steps.kept.reads = 0
    with torch.no_grad():
        steps.asking.slots.request += 1  # the cache still has what was read before
    with pytest.raises(AssertionError, match=r"'kept' has the loss .*, not "):
        steps.check()


def test_beginnings_that_are_read_again_are_not_timed(steps: Steps) -> None:
    steps.kept.limit = 0
    with pytest.raises(AssertionError, match=r"16 beginnings were read, not 8"):
        steps.check()


def test_a_pass_that_is_told_something_else_is_not_timed(steps: Steps) -> None:
    steps.check_all()
    assert steps.told is not None
    steps.told += 1
    with pytest.raises(AssertionError, match="one pass has the loss"):
        steps.check_all()


def test_every_way_to_lower_the_floor_gives_the_plain_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import floor

    monkeypatch.setattr(floor, "EARLY", (1, 26))  # the second is above the toy's last layer
    found = floor.measure(tiny_backbone("llama-gqa"), 2, compiles=False)
    errors = {row.name: row.error for row in found.rows if row.error is not None}
    assert len(errors) == 6
    for name, error in errors.items():
        assert error <= (3e-2 if "bf16" in name else 1e-5), name


def test_goals_that_are_missed_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.checking import missed

    def of(value: float, better: Any) -> Found:
        row = Row.of("r/a : b", [value], unit="ratio", better=better, goal=2.0)
        return Found("r", "", [row])

    assert missed([of(2.0, "lower"), of(2.0, "higher")]) is None
    assert missed([of(2.3, "lower"), of(1.7, "higher")], slack=0.2) is None
    said = missed([of(2.5, "lower"), of(1.6, "higher")], slack=0.2)
    assert said is not None
    assert "r/a : b is 2.500 (goal at most 2: NOT MET)" in said
    assert "r/a : b is 1.600 (goal at least 2: NOT MET)" in said
