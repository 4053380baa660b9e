"""What a training leaves behind: saved states, the best model, and what trackers were told."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking
from lessons import lesson, metrics, stage, stop_at, training, weights
from safetensors.torch import load_file

from ipn_core.errors import CheckpointError, ConfigError
from ipn_core.training.config import TrainConfig
from ipn_core.training.loop import StageRun
from ipn_core.training.run import Training

pytestmark = pytest.mark.usefixtures("own_training")

STATE = "state.safetensors"


def interrupt(_: StageRun) -> None:
    raise KeyboardInterrupt


def judged(llm: Path, **more: Any) -> dict[str, Any]:
    """Two stages with a validation every step, and one after them that has none."""
    seen = {"train": ["interact"], "steps": 4, "validate_every": 1}
    stages = [stage(name, "answer-embedding", **seen) for name in ("first", "second")]
    last = stage("last", "language", train=["inject"], steps=2)
    val = [{"task": "colours", "split": "val"}]
    return lesson(llm, *stages, last, validate_on=val, **more)


@pytest.fixture
def accuracies(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the validations of each stage find, one after the other."""
    given = [0.5, 0.9, 0.7, 0.6, 0.2, 0.8, 0.8, 0.3]

    def validate(run: StageRun, _: object) -> dict[str, Any] | None:
        if run.judge is None:
            return None
        before = 4 if run.stage.name == "second" else 0
        return {"accuracy": given[before + run.step - 1], "by_type": {"colour": 1.0}}

    monkeypatch.setattr(StageRun, "validate", validate)
    return given


def weights_at(llm: Path, folder: Path, step: int) -> dict[str, Any]:
    """The weights just before an optimizer step, counted over the stages."""
    found: dict[str, Any] = {}

    def note(run: StageRun) -> None:
        found.update({k: v.clone() for k, v in run.model.trained_state().items()})
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, note)
        with pytest.raises(KeyboardInterrupt):
            training(judged(llm), folder).run()
    return found


@pytest.mark.usefixtures("accuracies")
def test_the_best_model_of_the_last_stage_that_validates_is_kept(llm: Path, tmp_path: Path) -> None:
    run = training(judged(llm), tmp_path / "run")
    run.run()
    best = load_file(tmp_path / "run" / "best" / "model.safetensors")
    # The second step of the second stage; the third found no more, and the first stage counts no
    # longer.
    wanted = weights_at(llm, tmp_path / "again", 7)
    assert best.keys() == wanted.keys()
    assert all(bool((best[key] == value).all()) for key, value in wanted.items())
    final = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert any(bool((best[key] != value).any()) for key, value in final.items())
    folder = tmp_path / "run" / "best"
    said = run.console.file.getvalue()  # type: ignore[attr-defined]
    assert f"best: '{folder}', of stage 'second', step 2: 80.0 % of the validation" in said


@pytest.mark.usefixtures("accuracies")
@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 8, 10])
def test_resuming_never_loses_the_best_model(llm: Path, tmp_path: Path, step: int) -> None:
    training(judged(llm), tmp_path / "whole").run()
    values = judged(llm, save_every=3)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            training(values, tmp_path / "run").run()
    training(values, tmp_path / "run", resume=True).run()
    for name in ("best", "model"):
        whole, again = (tmp_path / run / name / "model.safetensors" for run in ("whole", "run"))
        assert again.read_bytes() == whole.read_bytes()


def test_the_last_states_are_kept_and_no_more(llm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    values = lesson(llm, stage("a", "language", steps=6), save_every=1, keep=3)
    seen: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        before = StageRun.advance

        def advance(run: StageRun) -> dict[str, float]:
            seen.append(sorted(path.name for path in folder.glob("state*")))
            return before(run)

        patch.setattr(StageRun, "advance", advance)
        training(values, folder).run()
    names = [f"state-00-0000000{step}.safetensors" for step in range(1, 7)]
    assert seen[:4] == [[], [STATE], [names[0], STATE], [*names[:2], STATE]]
    assert seen[5] == [*names[2:4], STATE]
    assert sorted(path.name for path in folder.glob("state*")) == [*names[3:5], STATE]
    whole = weights(folder)

    # From an older state, the training goes on to the same end, and forgets what came after it.
    (folder / STATE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"is damaged .* Put an older 'state-\*.safetensors'"):
        training(values, folder, resume=True)
    (folder / STATE).write_bytes((folder / names[3]).read_bytes())
    training({**values, "keep": 1}, folder, resume=True).run()
    assert weights(folder) == whole
    assert [path.name for path in folder.glob("state*")] == [STATE]


def test_how_much_is_kept_and_who_follows_is_no_other_training(llm: Path, tmp_path: Path) -> None:
    values = lesson(llm)
    plain = training(values, tmp_path / "a")
    other = training({**values, "keep": 2, "trackers": ["tensorboard"]}, tmp_path / "b")
    assert other.digest == plain.digest
    assert training({**values, "seed": 1}, tmp_path / "c").digest != plain.digest


def events(folder: Path) -> Iterator[Any]:
    """The events that a TensorBoard writer left, in their order."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="no tensorboardX")
    (file,) = folder.rglob("events.out.tfevents.*")
    data, at = file.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4


def test_tensorboard_is_told_what_the_metrics_say(llm: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="the extra 'tensorboard' is not installed")
    stages = [stage("a", "answer-embedding", train=["interact"], steps=3), stage("b", "language")]
    val = [{"task": "colours", "split": "val"}]
    values = lesson(llm, *stages, validate_on=val, trackers=["tensorboard"])
    training(values, tmp_path / "run").run()
    told = {
        (value.tag, event.step): value.simple_value
        for event in events(tmp_path / "run" / "trackers" / "run")
        for value in event.summary.value
    }
    entries = metrics(tmp_path / "run")
    for entry in entries:
        step = entry["step"] + 3 * entry["stage_index"]
        for name in ("loss", "grad_norm", "accuracy"):
            if name in entry:
                assert told[f"{entry['stage']}/{name}", step] == pytest.approx(entry[name])
    assert max(step for _, step in told) == 7
    assert ("a/accuracy", 3) in told


def test_a_tracker_that_is_missing_or_unknown_is_refused(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="'trackers': unknown tracker 'tensorbored'"):
        training(lesson(llm, trackers=["tensorbored"]), tmp_path / "run").run()
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(ConfigError) as raised:
        training(lesson(llm, trackers=["tensorboard"]), tmp_path / "run").run()
    assert str(raised.value) == (
        "'trackers': 'tensorboard' is not installed. Add it with: pip install "
        "'ipn-core[tensorboard]'"
    )
    assert not (tmp_path / "run").exists()


def test_a_config_as_json_is_read_like_yaml(llm: Path, tmp_path: Path) -> None:
    """So that the `train.json` of a run is itself a config."""
    from ipn_core.training.run import read_config

    run = Training(TrainConfig.parse(lesson(llm), "lesson"), tmp_path / "run")
    path = tmp_path / "train.json"
    path.write_text(json.dumps(run.config.model_dump(mode="json"), indent=2))
    assert read_config(path) == run.config
