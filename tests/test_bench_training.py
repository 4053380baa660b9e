"""The benchmark of trainings with and without caches measures both, and refuses what differs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipn_core.benchmarking.engine import subjects
from ipn_core.benchmarking.engine.training import SHARED, setup_prompts
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone

ROOT = Path(__file__).parents[1]


@pytest.mark.usefixtures("own_training", "small_interaction")
def test_trainings_with_and_without_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import bench_training as runs

    monkeypatch.setattr(runs, "PICTURES", 8)
    llm = tiny_backbone()
    prompts, _ = setup_prompts(subjects.asking_model(llm, **SHARED), 40)
    checked: list[Any] = []
    check = runs.Runs.check
    monkeypatch.setattr(runs.Runs, "check", lambda self: checked.append(self) or check(self))
    eyes = (TinyEncoder(TinyEncoderConfig()), "a toy encoder")
    found = runs.measure(llm, prompts, eyes, tmp_path, 2)
    ratios = {row.name: row for row in found.rows if row.unit == "ratio"}
    assert list(ratios) == [
        f"{name}/{runs.NONE} : {runs.CACHES}" for name in (*runs.KINDS, "a whole training")
    ]
    assert [row.goal for row in ratios.values()] == [None, None, runs.GOAL]
    assert sum(runs.mix().values()) == pytest.approx(1)
    assert [one.caches.prefixes.reads for one in checked] == [0, 8]
    checked[-1].none.step += 1  # other questions
    with pytest.raises(AssertionError, match="with caches 'loss' is"):
        check(checked[-1])
