"""The benchmark of training steps: its rows are all there, and it refuses those that differ."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone

ROOT = Path(__file__).parents[1]
SMALL = {"name": "rvii", "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import bench_training, cached_training

    for module in (bench_training, cached_training):
        monkeypatch.setattr(module, "INTERACT", SMALL)
    return bench_training


@pytest.fixture
def rows(bench: ModuleType) -> Any:
    return bench.setup_steps(tiny_backbone(), 40)


def test_every_row_is_timed_and_reported(bench: ModuleType, rows: Any) -> None:
    found = bench.measure(rows, 2)
    assert {name: len(seconds) for name, seconds in found.items()} == dict.fromkeys(bench.NAMES, 2)
    text = bench.report(rows, found, goals=True)
    assert all(name in text for name in bench.NAMES.values())
    assert all(f"{name} / static" in text for name in bench.NAMES if name != "static")
    assert text.count("goal 0.") == 2


def test_a_cache_that_gives_something_else_is_not_timed(bench: ModuleType, rows: Any) -> None:
    rows.check()
    rows.kept.reads = 0
    with torch.no_grad():
        rows.asking.slots.request += 1  # the cache still has what was read before
    with pytest.raises(AssertionError, match=r"'kept' has the loss .*, not "):
        bench.measure(rows, 2)


def test_beginnings_that_are_read_again_are_not_timed(bench: ModuleType, rows: Any) -> None:
    rows.kept.limit = 0
    with pytest.raises(AssertionError, match=r"16 beginnings were read, not 8"):
        bench.measure(rows, 2)


def test_goals_that_are_missed_are_named(bench: ModuleType) -> None:
    assert bench.verdict({"frozen": 0.6, "kept": 0.25, "caches": 3.0}) is None
    text = bench.verdict({"frozen": 0.61, "kept": 0.2, "caches": 2.5})
    assert "'asked, beginning run each step' takes 0.610 of the static model's step" in text
    assert "2.50 times as fast" in text
    assert "from the cache" not in text


@pytest.mark.usefixtures("own_training")
def test_trainings_with_and_without_caches(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = bench.cached_training
    eyes = TinyEncoder(TinyEncoderConfig())
    monkeypatch.setattr(runs, "encoder", lambda: (eyes, "a toy encoder"))
    monkeypatch.setattr(runs, "PICTURES", 8)
    prompts, _ = bench.setup_prompts(bench.setup_steps(tiny_backbone(), 40).asking, 40)
    checked: list[Any] = []
    check = runs.Runs.check
    monkeypatch.setattr(runs.Runs, "check", lambda self: checked.append(self) or check(self))
    shared = {**bench.SHARED, "layout": {"dynamic": bench.K}}
    text, _ = runs.run(tiny_backbone(), prompts, shared, tmp_path, 2)
    assert all(f"stages {kind}, " in text for kind in runs.KINDS)
    assert text.count("times as fast") == 3
    assert sum(runs.mix().values()) == pytest.approx(1)
    assert [one.caches.prefixes.reads for one in checked] == [0, 8]
    checked[-1].none.step += 1  # other questions
    with pytest.raises(AssertionError, match="with caches 'loss' is"):
        check(checked[-1])
