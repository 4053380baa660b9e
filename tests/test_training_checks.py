"""What a training checks before it computes, and before a stage's first step; what it says then."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lessons import (
    four_stages,
    lesson,
    lesson_registry,
    metrics,
    said,
    stage,
    stop_at,
    training,
    two_colours,
    weights,
    without_labels,
)
from rich.console import Console

from ipn_core.cli import main
from ipn_core.errors import ConfigError, TrainingError
from ipn_core.model import IPN
from ipn_core.plan import Tokens
from ipn_core.stages import Interaction
from ipn_core.testing.checkpoints import register_tiny
from ipn_core.testing.interactions import TinyLook
from ipn_core.training.checks import check_stages
from ipn_core.training.config import DataConfig, StageConfig, TrainConfig
from ipn_core.training.data import Data
from ipn_core.training.loop import StageRun
from ipn_core.training.objectives import Language
from ipn_core.training.report import bar
from ipn_core.training.run import Training

pytestmark = pytest.mark.usefixtures("own_training")

JOINT = {"language": 1.0, "answer-embedding": 0.3}


# -- before anything is computed -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_stage", "more", "text"),
    [
        ({"betas": [0.9, 1.5]}, {}, "'c.stages.0.betas.1': .*less than 1, got 1.5"),
        ({"objectives": {"language": 0}}, {}, "objectives.language': .*greater than 0, got 0"),
        ({"objectives": {"language": -1.0}}, {}, "objectives.language': .*greater than 0, got -1"),
        ({"steps": True}, {}, "'c.stages.0': steps must be a number, got true"),
        ({}, {"seed": 2**32}, "'c.seed': .*less than 4294967296, got 4294967296"),
        ({}, {"anew": ["interact"]}, "anew needs start_from"),
        ({}, {"model": [1]}, "'c': 'model' must be a mapping"),
        ({}, {"stages": [stage("a", "language")] * 2}, "stages must have different names"),
    ],
)
def test_numbers_that_no_training_can_use_are_refused(
    llm: Path, of_stage: dict[str, Any], more: dict[str, Any], text: str
) -> None:
    values = lesson(llm, {**stage("s", "language"), **of_stage}, **more)
    with pytest.raises(ConfigError, match=text):
        TrainConfig.parse(values, "c")


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (stage("second", "language", train=["interakt"]), "'interakt' names nothing that can be"),
        (stage("second", "language", train=["interact", ""]), "'' names nothing that can be"),
        (stage("second", "language", train=["slots.image"]), "'slots.image' names nothing that"),
        (stage("second", "request-image"), "needs examples that say what they name"),
        (stage("second", "language", groups=1), "'groups' must be at least 2, one a source, got 1"),
    ],
)
def test_every_stage_is_checked_before_anything_is_encoded_or_written(
    llm: Path, tmp_path: Path, second: dict[str, Any], reason: str
) -> None:
    unnamed = {"task": "colours", "options": {"named": False}}
    values = lesson(llm, stage("first", "language"), second, data=[unnamed, unnamed])
    with pytest.raises(ConfigError) as raised:
        training(values, tmp_path / "run").run()
    assert str(raised.value).startswith("stage 'second': ")
    assert reason in str(raised.value)
    assert raised.value.exit_code == 2
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_all_stages_that_cannot_run_are_named_at_once(llm: Path, tmp_path: Path) -> None:
    values = lesson(
        llm,
        stage("one", "language", train=["slots.imge"]),
        stage("two", "language"),
        stage("three", "language", train=["injekt"]),
    )
    with pytest.raises(ConfigError, match=r"stage 'one': .*stage 'three': .*'injekt'") as raised:
        training(values, tmp_path / "run").run()
    assert "stage 'two'" not in str(raised.value)


@pytest.mark.parametrize("slots", ["slots.request", "slots.dynamic"])
def test_slots_that_no_prompt_of_the_model_holds_cannot_be_trained(
    llm: Path, tmp_path: Path, slots: str
) -> None:
    values = lesson(llm, stage("s", "language", train=["perceive", slots]))
    kept = {key: values["model"][key] for key in ("backbone", "encoder")}
    with pytest.raises(ConfigError, match=f"stage 's': 'train': '{slots}' names nothing"):
        training({**values, "model": {**kept, "strategy": "static"}}, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


def test_the_command_line_refuses_a_late_stage_with_one_line(
    llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_tiny()
    two_colours(("red", "tan")).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "Colour left?", "answer": "red"}
    (tmp_path / "some.jsonl").write_text(json.dumps(row))
    late = stage("late", "language", train=["interakt"])
    values = lesson(
        llm, stage("s", "language"), late, data=[{"task": str(tmp_path / "some.jsonl")}]
    )
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    capsys.readouterr()
    assert main(["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ipn: stage 'late': 'train': 'interakt' names nothing that can be")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_file_where_the_folder_should_be_is_refused(llm: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"run' is no folder\. Choose another one with --out"):
        training(lesson(llm, stage("s", "language")), tmp_path / "run")


def test_checking_changes_neither_the_model_nor_the_noise_to_come(
    llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawing(self: Language, model: IPN, data: Any) -> None:
        super(Language, self).__init__(model, data)
        torch.rand(3)

    monkeypatch.setattr(Language, "__init__", drawing)
    registry = lesson_registry()
    model = IPN.from_config(lesson(llm)["model"], registry=registry)
    data = [Data(DataConfig.parse({"task": "colours"}, "data"), registry, training=True)]
    stages = [StageConfig.parse(s, "stage") for s in four_stages()]
    trains = [p.requires_grad for p in model.parameters()]
    before = torch.get_rng_state()
    check_stages(stages, model, data, registry, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.requires_grad for p in model.parameters()] == trains


def test_only_the_stages_that_are_left_are_checked(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def noted(stages: Any, *rest: Any) -> None:
        seen.append([one.name for one in stages])
        check_stages(stages, *rest)

    monkeypatch.setattr("ipn_core.training.run.check_stages", noted)
    values = lesson(llm, stage("one", "language", steps=2), stage("two", "language", steps=2))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3, lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            training(values, tmp_path / "run").run()
    training(values, tmp_path / "run", resume=True).run()
    assert seen == [["one", "two"], ["two"]]


# -- before the first step -------------------------------------------------------------------------


def test_labels_and_gradients_of_the_first_batch_are_told(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[StageRun] = []
    stop_at(monkeypatch, 1, runs.append)
    one = stage("s", JOINT, train=["interact", "inject", "slots.dynamic"], steps=1)
    run = training(lesson(llm, one), tmp_path / "run")
    run.run()
    batch, model = runs[0]._batches(0)[0], runs[0].model
    plans = [model.planner.plan(prompt) for prompt in batch.prompts(model)]
    learned = [p for plan in plans for p in plan.pieces if isinstance(p, Tokens) and p.learn]
    tokens = sum(len(piece.ids) for piece in learned)
    # Four groups of four; an answer is one token or more, and the turn ends with another.
    assert tokens >= 32
    assert (
        f"s: {sum(p.numel() for p in runs[0].trained.values()):,} weights in "
        f"{len(runs[0].trained)} tensors train (interact, inject, slots.dynamic); {tokens} label "
        "tokens (language) and 16 answers (answer-embedding) in the first batch; every tensor gets "
        "a finite non-zero gradient\n"
    ) in said(run)


def test_pairs_are_counted_where_questions_name_things(llm: Path, tmp_path: Path) -> None:
    run = training(lesson(llm, four_stages()[0]), tmp_path / "run")
    run.run()
    # Of four questions about each of four pictures, two name a colour.
    assert "; 32 pairs of question and picture (request-image) in the first batch" in said(run)


def test_a_loss_without_labels_is_refused_beside_one_that_has_some(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_labels(monkeypatch)
    values = lesson(llm, stage("s", JOINT, train=["interact"]))
    with pytest.raises(TrainingError) as raised:
        training(values, tmp_path / "run").run()
    assert (
        "stage 's': no label is left to learn from for the objective 'language': the first batch "
        "has 16 examples and 0 label tokens."
    ) in str(raised.value)
    assert "take the objective out of the stage" in str(raised.value)


def test_objectives_that_reach_nothing_trained_are_refused(llm: Path, tmp_path: Path) -> None:
    values = lesson(llm, stage("s", "verbalise", train=["interact"]))
    with pytest.raises(TrainingError, match=r"\(verbalise\) reach nothing that 'train' names"):
        training(values, tmp_path / "run").run()


def scaled(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Scale the loss of trainings as fp16 does, which accelerate allows on a GPU only."""

    def accelerator(self: Training) -> Accelerator:
        made = Accelerator(cpu=True)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return made

    monkeypatch.setattr(Training, "_accelerator", accelerator)


def test_an_overflow_that_the_loss_scaler_would_skip_is_no_fault(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(monkeypatch, 2.0**24)
    checks: list[tuple[float, float]] = []
    check = StageRun.check

    def watched(run: StageRun) -> str:
        before = run.accelerator.scaler.get_scale()
        text = check(run)
        checks.append((before, run.accelerator.scaler.get_scale()))
        return text

    monkeypatch.setattr(StageRun, "check", watched)
    values = lesson(llm, stage("s", "language", steps=1))
    model = IPN.from_config(values["model"], registry=lesson_registry())
    model.slots.dynamic.register_hook(lambda g: g.half().float())
    run = training(values, tmp_path / "run", model=model)
    run.run()
    assert "every tensor gets a finite non-zero gradient" in said(run)
    assert checks == [(2.0**24, 2.0**24)]
    (entry,) = metrics(tmp_path / "run")
    assert entry["grad_norm"] == float("inf")  # the overflow was real, and its step skipped


def test_a_gradient_that_no_scale_makes_finite_is_a_fault(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(monkeypatch, 2.0**4)
    values = lesson(llm, stage("s", "language"))
    model = IPN.from_config(values["model"], registry=lesson_registry())
    model.slots.dynamic.register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingError, match=r"the gradient of slots\.dynamic is not finite"):
        training(values, tmp_path / "run", model=model).run()


@pytest.mark.parametrize("scale", [1.0, 2.0**3])
def test_a_step_that_no_scale_makes_finite_ends_the_training(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float
) -> None:
    scaled(monkeypatch, scale)
    values = lesson(llm, stage("s", "language", steps=40))
    model = IPN.from_config(values["model"], registry=lesson_registry())

    def spoil(run: StageRun) -> None:
        run.model.slots.dynamic.register_hook(lambda g: g * float("nan"))

    stop_at(monkeypatch, 3, spoil)
    with pytest.raises(TrainingError) as raised:
        training(values, tmp_path / "run", model=model).run()
    last = 3 + int(math.log2(scale))  # skipped up to there, at half the scale each time
    text = f"stage 's', step {last}: the gradient of slots.dynamic is not finite. Lower 'lr'"
    assert text in str(raised.value)
    assert len(metrics(tmp_path / "run")) == last - 1


# -- what an interaction declares ------------------------------------------------------------------


class Undeclared(TinyLook):
    objectives = Interaction.objectives


@pytest.mark.parametrize("objective", ["answer-embedding", "verbalise", "request-image"])
def test_an_interaction_serves_only_what_it_declares(
    llm: Path, tmp_path: Path, objective: str
) -> None:
    registry = lesson_registry()
    values = lesson(llm, stage("s", objective))
    config = {key: values["model"][key] for key in ("backbone", "encoder")}
    model = IPN.from_config({**config, "strategy": "tiny-look"}, registry=registry)
    model.interaction.__class__ = Undeclared
    with pytest.raises(ConfigError) as raised:
        training(values, tmp_path / "run", model=model).run()
    assert f"the objective '{objective}' is not among those that the interaction of" in str(
        raised.value
    )
    assert "declares (none). Use 'language', or add it to" in str(raised.value)
    values = lesson(llm, stage("s", "language", steps=1))
    training(values, tmp_path / "run", model=model).run()


# -- what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objectives", "validate_on", "every", "note"),
    [
        ("language", True, 2, "s: none of its objectives (language) can tell right answers"),
        ("language", True, 0, "s: none of its objectives (language) can tell right answers"),
        (JOINT, False, 2, "s: 'validate_every' does nothing without 'validate_on'"),
        (JOINT, True, 2, None),
        ("language", False, 0, None),
    ],
)
def test_a_stage_that_looks_at_no_validation_examples_says_so_once(
    llm: Path,
    tmp_path: Path,
    objectives: Any,
    validate_on: bool,
    every: int,
    note: str | None,
) -> None:
    one = stage("s", objectives, validate_every=every)
    looked_at = [{"task": "colours", "split": "val", "limit": 4}] if validate_on else []
    run = training(lesson(llm, one, validate_on=looked_at), tmp_path / "run")
    run.run()
    text = said(run)
    assert text.count("s: none of its") + text.count("'validate_every' does") == bool(note)
    assert (note or "") in text
    accurate = [e for e in metrics(tmp_path / "run") if "accuracy" in e]
    assert len(accurate) == (2 if validate_on and not note else 0)


def test_workers_that_have_nothing_to_do_are_told(llm: Path, tmp_path: Path) -> None:
    text = "'workers' does nothing without 'stream': other data is encoded once, at the start\n"
    for workers in (0, 2):
        values = lesson(llm, stage("s", "language", steps=1), workers=workers)
        run = training(values, tmp_path / f"{workers}")
        run.run()
        assert said(run).count(text) == bool(workers)


def test_off_a_terminal_progress_is_a_line_every_ten_seconds() -> None:
    now = [0.0]
    file = io.StringIO()
    console = Console(file=file, get_time=lambda: now[0])
    with bar(console) as progress:
        task = progress.add_task("align [x]", total=1200, completed=1000, note="")
        for step in range(1001, 1201):
            now[0] += 0.25
            progress.update(task, completed=step, note=f"loss {step / 1000}")
        progress.update(task, completed=1200)
    assert file.getvalue().splitlines() == [
        "align [x]: 1,040 of 1,200 (4 a second, 0:00:40 left), loss 1.04",
        "align [x]: 1,080 of 1,200 (4 a second, 0:00:30 left), loss 1.08",
        "align [x]: 1,120 of 1,200 (4 a second, 0:00:20 left), loss 1.12",
        "align [x]: 1,160 of 1,200 (4 a second, 0:00:10 left), loss 1.16",
        "align [x]: 1,200 of 1,200 (4 a second, took 0:00:50), loss 1.2",
    ]


def test_slow_steps_have_a_line_each_and_a_rate() -> None:
    now = [0.0]
    file = io.StringIO()
    with bar(Console(file=file, get_time=lambda: now[0])) as progress:
        task = progress.add_task("align", total=90, note="")
        for step in (1, 2):
            now[0] += 40
            progress.update(task, completed=step)
    assert file.getvalue() == "align: 1 of 90\nalign: 2 of 90 (0.025 a second, 0:58:40 left)\n"


def test_a_training_off_a_terminal_says_no_blank_line(llm: Path, tmp_path: Path) -> None:
    run = training(lesson(llm, *four_stages(2)), tmp_path / "run")
    run.run()
    lines = said(run).splitlines()
    assert all(lines)
    assert any(line.startswith("pictures of colours train: 9 of 9") for line in lines)
    assert any(line.startswith("instruct: 2 of 2 (") and ", loss " in line for line in lines)
    assert weights(tmp_path / "run")
