"""Going on after an interruption gives what an unbroken run gives, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from kills import run_killed
from lessons import four_stages, lesson, metrics, stage, stop_at, training, weights
from safetensors.torch import load_file

pytestmark = pytest.mark.usefixtures("own_training")

SCRIPT = Path(__file__).parent / "support" / "lessons.py"
STAGES = [
    {**s, "steps": 5, "accumulate": 2 if s["name"] == "instruct" else 1} for s in four_stages()
]


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def run_until_interrupted(values: dict[str, Any], folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        training(values, folder).run()


@pytest.fixture(scope="module")
def unbroken(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPN_CACHE", str(folder / "cache"))
        AcceleratorState._reset_state(reset_partial_state=True)
        training(going(llm), folder / "run").run()
    return folder / "run"


def going(llm: Path) -> dict[str, Any]:
    return lesson(llm, *STAGES, validate_on=[{"task": "colours", "split": "val", "limit": 4}])


SLOWER = [pytest.param(step, marks=pytest.mark.slow) for step in (1, 4, 6, 8, 20)]


@pytest.mark.parametrize("step", [2, *SLOWER])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    llm: Path, tmp_path: Path, unbroken: Path, step: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, interrupt)
        run_until_interrupted(going(llm), tmp_path / "run")
    torch.manual_seed(step)  # whatever state the noise is in
    training(going(llm), tmp_path / "run", resume=True).run()
    assert weights(tmp_path / "run") == weights(unbroken)
    assert metrics(tmp_path / "run") == metrics(unbroken)


@pytest.mark.slow
def test_a_run_interrupted_after_its_last_step_saves_the_trained_weights(
    llm: Path, tmp_path: Path, unbroken: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ipn_core.training.run.save", interrupt)
        run_until_interrupted(going(llm), tmp_path / "run")
    training(going(llm), tmp_path / "run", resume=True).run()
    assert weights(tmp_path / "run") == weights(unbroken)
    training(going(llm), tmp_path / "run", resume=True).run()  # nothing is left to do
    assert weights(tmp_path / "run") == weights(unbroken)


@pytest.mark.slow
def test_a_trained_request_slot_is_back_before_requests_are_read(llm: Path, tmp_path: Path) -> None:
    first = stage("first", "language", train=["interact", "inject", "slots.request"], lr=1e-2)
    values = lesson(llm, first, stage("second", "answer-embedding", train=["interact"]))
    training(values, tmp_path / "whole").run()
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 6, interrupt)
        run_until_interrupted(values, tmp_path / "broken")
    training(values, tmp_path / "broken", resume=True).run()
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


@pytest.mark.slow
def test_another_seed_gives_other_weights(llm: Path, tmp_path: Path, unbroken: Path) -> None:
    training({**going(llm), "seed": 1}, tmp_path / "run").run()
    assert weights(tmp_path / "run") != weights(unbroken)


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_goes_on_to_the_same_weights(
    llm: Path, tmp_path: Path
) -> None:
    values = {**lesson(llm, *[{**s, "steps": 10} for s in four_stages()]), "save_every": 1}
    training(values, tmp_path / "unbroken").run()
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(values))
    state = run / "state.safetensors"
    run_killed(
        [sys.executable, str(SCRIPT), str(config), str(run)],
        lambda: state.stat().st_mtime_ns if state.exists() else 0,
        kills=20,
    )
    assert weights(run) == weights(tmp_path / "unbroken")
    assert metrics(run) == metrics(tmp_path / "unbroken")
    kept = {path.name for path in run.rglob("*")}
    assert kept == {path.name for path in (tmp_path / "unbroken").rglob("*")}


@pytest.mark.slow
def test_two_processes_hold_the_same_weights(llm: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    short = [{**s, "steps": 2} for s in four_stages()]
    config.write_text(json.dumps(lesson(llm, *short)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(config), str(tmp_path / "run"), str(tmp_path / "rank")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert first.keys() == second.keys() == saved.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
        assert torch.equal(value, saved[key]), key
    assert len(metrics(tmp_path / "run")) == 8
