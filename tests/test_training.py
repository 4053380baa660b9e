"""A whole training, what is checked around it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import (
    four_stages,
    lesson,
    lesson_registry,
    metrics,
    stage,
    stop_at,
    training,
    two_colours,
    without_labels,
)
from safetensors.torch import load_file

from ipn_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    TrainingError,
    UnknownNameError,
    UserError,
)
from ipn_core.model import IPN
from ipn_core.plugins import get_registry
from ipn_core.tasks import open_task
from ipn_core.testing.checkpoints import register_tiny
from ipn_core.testing.tiny import tiny_backbone
from ipn_core.training.config import StageConfig
from ipn_core.training.guards import Pinned
from ipn_core.training.loop import StageRun, learning_rate
from ipn_core.training.run import read_config, train

pytestmark = pytest.mark.usefixtures("own_training")


# -- a whole run -----------------------------------------------------------------------------------


def test_four_objectives_train_a_checkpoint_that_answers(llm: Path, tmp_path: Path) -> None:
    values = lesson(llm, *four_stages(40), validate_on=[{"task": "colours", "split": "val"}])
    run = training(values, tmp_path / "run")
    target = run.run()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "best",
        "lock",
        "loss.png",
        "metrics.jsonl",
        "model",
        "state.safetensors",
        "train.json",
    }
    assert {p.name for p in target.iterdir()} == {"config.json", "model.safetensors"}
    assert not [key for key in load_file(target / "model.safetensors") if "backbone" in key]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "train.json").read_text())["model"] == values["model"]

    logged = metrics(tmp_path / "run")
    names = {"align": 0.7, "answer": 0.5, "verbalise": 0.95, "instruct": 0.98}
    for name, ratio in names.items():
        losses = [e["loss"] for e in logged if e["stage"] == name and "loss" in e]
        assert len(losses) == 40
        assert sum(losses[-8:]) < ratio * sum(losses[:8]), name
    (validated,) = [e for e in logged if "accuracy" in e]
    assert validated["stage"] == "answer"
    assert set(validated["by_type"]) == {"colours/val/colour", "colours/val/side"}

    model = IPN.from_pretrained(target, registry=run.registry)
    answer = model.ask(two_colours(("red", "tan")), "Colour left?", max_new_tokens=2)
    assert answer.attention.shape == (2, 8)


def test_a_config_file_overrides_and_a_jsonl_task(
    llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_tiny()
    rows = []
    for pair in (("red", "tan"), ("sky", "ink")):
        two_colours(pair).save(tmp_path / f"{pair[0]}.png")
        rows.append({"image": f"{pair[0]}.png", "question": "Colour left?", "answer": pair[0]})
    (tmp_path / "some.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    values = lesson(llm, stage("align", "language"), data=[{"task": str(tmp_path / "some.jsonl")}])
    (tmp_path / "colours.yaml").write_text(json.dumps(values))
    config = tmp_path / "colours.yaml"
    target = train(config, ["stages.align.steps=3", "seed=4"], out=tmp_path / "out")
    assert target == tmp_path / "out" / "model"
    written = json.loads((tmp_path / "out" / "train.json").read_text())
    assert (written["stages"][0]["steps"], written["seed"]) == (3, 4)
    assert [e["step"] for e in metrics(tmp_path / "out")] == [1, 2, 3]
    assert (
        f"in several processes: accelerate launch -m ipn_core.training {config} "
        f"stages.align.steps=3 seed=4 --out {tmp_path / 'out'}\n"
    ) in capsys.readouterr().err


def test_bf16_trains_float32_weights_and_saves_what_the_config_says(
    llm: Path, tmp_path: Path
) -> None:
    values = lesson(llm, stage("s", "language"), precision="bf16", save_dtype="bfloat16")
    training(values, tmp_path / "run").run()
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert {t.dtype for t in state.values()} == {torch.float32}
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.bfloat16}


def test_weights_to_start_from(llm: Path, tmp_path: Path) -> None:
    training(lesson(llm, stage("s", "language")), tmp_path / "first").run()
    still = stage("s", "language", lr=1e-12, weight_decay=0.0, steps=1)
    source = str(tmp_path / "first" / "model")
    training(lesson(llm, still, start_from=source), tmp_path / "second").run()
    first, second = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second")
    )
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=1e-9)


def test_some_weights_begin_anew_all_the_same(llm: Path, tmp_path: Path) -> None:
    training(lesson(llm, stage("s", "language")), tmp_path / "first").run()
    head = stage("s", "language", train=["slots.dynamic"], steps=1)
    source = str(tmp_path / "first" / "model")
    values = lesson(llm, head, start_from=source)
    values["model"]["layout"] = {"dynamic": 3, "look_again": 1}
    with pytest.raises(CheckpointError, match="look_head"):
        training(values, tmp_path / "second").run()
    values["anew"] = ["interact.queries", "slots.dynamic", "look_head"]
    training(values, tmp_path / "second").run()
    first, second = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("first", "second")
    )
    new = {"interaction.queries", "slots.dynamic", "look_head.score.weight", "look_head.score.bias"}
    kept = {k for k, v in first.items() if v.shape == second[k].shape and v.equal(second[k])}
    assert second.keys() - kept == new
    with pytest.raises(ConfigError, match=r"'interact\.query' names nothing"):
        training({**values, "anew": ["interact.query"]}, tmp_path / "third").run()


def test_the_next_batch_is_there_before_the_losses_of_a_step_are_read(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, int]] = []
    batches, check = StageRun._batches, Pinned.check

    def made(self: StageRun, step: int) -> Any:
        happened.append(("made", step))
        return batches(self, step)

    def read(self: Pinned, losses: Any) -> None:
        happened.append(("read", sum(kind == "read" for kind, _ in happened)))
        check(self, losses)

    monkeypatch.setattr(StageRun, "_batches", made)
    monkeypatch.setattr(Pinned, "check", read)
    training(lesson(llm, stage("s", "language", steps=3)), tmp_path / "run").run()
    assert happened == [
        ("made", 0),  # to check the stage
        ("made", 0),
        ("made", 1),
        ("read", 0),
        ("made", 2),
        ("read", 1),
        ("read", 2),
    ]


def test_what_is_wrong_with_the_next_batch_is_told_after_the_step_that_is_done(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = StageRun._batches

    def made(self: StageRun, step: int) -> Any:
        if step == 2:
            raise DataError("a line is broken")
        return batches(self, step)

    monkeypatch.setattr(StageRun, "_batches", made)
    values = {**lesson(llm, stage("s", "language", steps=4)), "save_every": 1}
    with pytest.raises(DataError, match="a line is broken"):
        training(values, tmp_path / "run").run()
    assert len(metrics(tmp_path / "run")) == 2
    monkeypatch.setattr(StageRun, "_batches", batches)
    steps: list[int] = []
    advance = StageRun.advance
    monkeypatch.setattr(
        StageRun, "advance", lambda self: (steps.append(self.step), advance(self))[1]
    )
    training(values, tmp_path / "run", resume=True).run()
    assert steps == [2, 3]


def test_accumulated_batches_give_the_gradient_of_one_large_batch(
    llm: Path, tmp_path: Path
) -> None:
    # Colours only: answers of as many tokens each, so that both means weigh them alike.
    whole = stage("s", "language", groups=4, per_group=4, steps=2, weight_decay=0.0)
    halves = {**whole, "groups": 2, "accumulate": 2}
    found = {}
    for name, one in (("whole", whole), ("halves", halves)):
        values = lesson(llm, one)
        values["model"]["interact"] |= {"dropout": 0.0, "noise": 0.0}
        run = training(values, tmp_path / name)
        run.registry = only_colours()
        run.run()
        found[name] = load_file(tmp_path / name / "state.safetensors"), metrics(tmp_path / name)
    for one, other in zip(found["whole"][1], found["halves"][1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for key, value in found["whole"][0].items():
        torch.testing.assert_close(found["halves"][0][key], value, rtol=1e-3, atol=2e-4)


def only_colours() -> Any:
    from lessons import Colours

    from ipn_core.hooks import hookimpl
    from ipn_core.plugins import add_plugin

    class OneKind(Colours):
        def examples(self, split: str) -> list[Any]:
            return [e for e in super().examples(split) if e.type == "colour"]

    class Plugin:
        @hookimpl
        def register(self, registry: Any) -> None:
            registry.task("colours", OneKind)

    import ipn_core.testing.plugin
    from ipn_core.plugins import discover

    registry = discover()
    add_plugin(registry, "tiny", ipn_core.testing.plugin)
    add_plugin(registry, "one-kind", Plugin())
    return registry


def test_the_learning_rate_rises_then_follows_a_cosine_to_the_floor() -> None:
    one = StageConfig.parse(stage("s", "language", steps=14, warmup=4, lr=1.0, floor=0.2), "stage")
    rates = [learning_rate(one, step) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[9] == pytest.approx(0.6)
    assert rates[14] == pytest.approx(0.2)


# -- checks ----------------------------------------------------------------------------------------


def test_a_trained_tensor_without_a_gradient_is_named(llm: Path, tmp_path: Path) -> None:
    values = lesson(llm, stage("s", "request-image", train=["interact"]))
    with pytest.raises(TrainingError) as raised:
        training(values, tmp_path / "run").run()
    assert "interaction.queries gets no gradient" in str(raised.value)
    assert "name in 'train' only what they reach" in str(raised.value)
    assert not (tmp_path / "run" / "state.safetensors").exists()


@pytest.mark.parametrize("prefix", ["request", "interakt", "backbone", "perceive"])
def test_what_cannot_be_trained_is_refused(llm: Path, tmp_path: Path, prefix: str) -> None:
    values = lesson(llm, stage("s", "language", train=[prefix]))
    with pytest.raises(ConfigError, match=f"'{prefix}' names nothing that can be trained"):
        training(values, tmp_path / "run").run()


def test_no_label_left_to_learn_is_refused(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_labels(monkeypatch)
    with pytest.raises(TrainingError, match="stage 's': no label is left to learn from"):
        training(lesson(llm, stage("s", "language")), tmp_path / "run").run()


@pytest.mark.parametrize(
    ("precision", "change"), [("fp32", "'lr'"), ("bf16", "'lr' or use precision fp32")]
)
def test_nan_stops_and_names_the_weight(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, change: str
) -> None:
    def spoil(run: StageRun) -> None:
        with torch.no_grad():
            run.model.interaction.patch_in.bias[3] = float("nan")

    stop_at(monkeypatch, 4, spoil)
    with pytest.raises(TrainingError) as raised:
        training(lesson(llm, stage("s", "language"), precision=precision), tmp_path / "run").run()
    # Not with --resume, which refuses another 'lr': it is part of the config.
    assert str(raised.value) == (
        "stage 's', step 4: the weight interaction.patch_in.bias is not finite. Lower "
        f"{change}, and train anew in another folder with --out."
    )
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(bool(torch.isfinite(t).all()) for t in state.values())


def test_nan_stops_and_names_the_gradient(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(run: StageRun) -> None:
        run.model.slots.dynamic.register_hook(lambda g: g * float("nan"))

    stop_at(monkeypatch, 2, spoil)
    with pytest.raises(TrainingError, match=r"the gradient of slots\.dynamic is not finite"):
        training(lesson(llm, stage("s", "language")), tmp_path / "run").run()


def test_the_backbone_is_bit_for_bit_unchanged(llm: Path, tmp_path: Path) -> None:
    values = lesson(llm, stage("s", "language", lr=1e-1))
    backbone = tiny_backbone("llama")
    before = {k: v.clone() for k, v in backbone.lm.state_dict().items()}
    model = IPN.from_config(values["model"], backbone=backbone, registry=lesson_registry())
    training(values, tmp_path / "run", model=model).run()
    after = backbone.lm.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.grad is None for p in backbone.lm.parameters())


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda p: p.data.mul_(1.001), "the frozen backbone has changed"),
        (lambda p: setattr(p, "grad", torch.ones_like(p)), "a gradient has reached"),
    ],
)
def test_a_changed_backbone_is_noticed(
    llm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[torch.Tensor], object],
    said: str,
) -> None:
    stop_at(monkeypatch, 3, lambda run: act(run.model.backbone.lm.get_input_embeddings().weight))
    with pytest.raises(TrainingError, match=said):
        training(lesson(llm, stage("s", "language")), tmp_path / "run").run()
    assert not (tmp_path / "run" / "model").exists()


# -- refusals --------------------------------------------------------------------------------------


def test_unknown_keys_are_refused_with_near_names(llm: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(lesson(llm)))
    for override, said in [
        ("sede=1", r"unknown key '.*sede'.*did you mean 'seed'"),
        ("stages.align.stesp=1", r"unknown key '.*stages\.0\.stesp'.*did you mean 'steps'"),
        ("stages.aline.steps=1", r"no 'aline' in the list: it has align, answer"),
        ("stages.align.steps=0", r"stages\.0\.steps"),
        ("precision=fp8", "precision"),
        ("stages.answer.name=align", "different names"),
        ("steps", "key=value"),
    ]:
        with pytest.raises(UserError, match=said):
            read_config(path, [override])
    with pytest.raises(ConfigError, match="no such file"):
        read_config(tmp_path / "absent.yaml")


def test_an_unknown_objective_is_refused_before_anything_is_loaded(
    llm: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'language'"):
        training(lesson(llm, stage("s", "langauge")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "objective", "said"),
    [
        ({"strategy": "tiny-look"}, "request-image", "is not among those that"),
        ({"strategy": "tiny-look"}, "answer-embedding", "a message as wide as the LLM's"),
        ({"strategy": "static"}, "answer-embedding", "needs an interaction"),
    ],
)
def test_objectives_refuse_what_cannot_serve_them(
    llm: Path, tmp_path: Path, model: dict[str, Any], objective: str, said: str
) -> None:
    values = lesson(
        llm,
        stage("s", objective, train=["perceive" if "static" in model["strategy"] else "interact"]),
    )
    kept = {key: values["model"][key] for key in ("backbone", "encoder")}
    with pytest.raises(ConfigError, match=said):
        training({**values, "model": {**kept, **model}}, tmp_path / "run").run()


def test_request_image_needs_examples_that_name_things(llm: Path, tmp_path: Path) -> None:
    unnamed = [{"task": "colours", "options": {"named": False}}]
    values = lesson(llm, stage("s", "request-image"), data=unnamed)
    with pytest.raises(ConfigError, match="needs examples that say what they name"):
        training(values, tmp_path / "run").run()


def looking(llm: Path, looks: int, again: int, **more: Any) -> dict[str, Any]:
    """A training of the head that asks for a further look, and of nothing else."""
    told = stage(
        "decide", "look-again", **{"train": ["look_head"], "steps": 150, "lr": 0.1, **more}
    )
    values = lesson(llm, told, data=[{"task": "colours", "options": {"looks": looks}}])
    values["model"]["layout"] = {"dynamic": 2, "look_again": again}
    return values


@pytest.mark.slow
def test_the_head_learns_when_to_look_again(llm: Path, tmp_path: Path) -> None:
    run = training(looking(llm, 1, 2), tmp_path / "run")
    model = IPN.from_pretrained(run.run(), registry=run.registry)
    for example in open_task("colours", registry=run.registry).examples("val"):
        answer = model.ask(two_colours(example.shown), example.question, max_new_tokens=1)
        assert answer.looked == ((0,) if example.type == "side" else ()), example.question


def test_look_again_needs_a_layout_and_examples_that_look(llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 'layout.look_again' of at least 1"):
        training(looking(llm, 1, 0, train=["interact"]), tmp_path / "run").run()
    with pytest.raises(ConfigError, match=r"how often to look again .* colours never say so"):
        training(looking(llm, 0, 1), tmp_path / "run").run()
    with pytest.raises(ConfigError, match="'look_head' names nothing that can be trained"):
        training(looking(llm, 1, 0), tmp_path / "run").run()


def test_a_batch_in_which_nothing_is_named_does_no_harm(llm: Path, tmp_path: Path) -> None:
    narrow = stage("s", "request-image", groups=1, per_group=1, steps=12)
    narrow["train"] = four_stages()[0]["train"]
    training(lesson(llm, narrow), tmp_path / "run").run()
    losses = [e["loss"] for e in metrics(tmp_path / "run")]
    assert 0.0 in losses
    assert any(loss > 0 for loss in losses)


def test_a_process_trains_in_one_precision(llm: Path, tmp_path: Path) -> None:
    training(lesson(llm, stage("s", "language")), tmp_path / "run").run()
    other = lesson(llm, stage("s", "language"), precision="bf16")
    with pytest.raises(ConfigError, match="precision bf16 cannot be used in this process"):
        training(other, tmp_path / "other").run()


def test_a_folder_with_another_training_is_refused(llm: Path, tmp_path: Path) -> None:
    values = lesson(llm, stage("s", "language"))
    training(values, tmp_path / "run").run()
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"holds a training already.*--resume"):
        training(values, tmp_path / "run")
    with pytest.raises(ConfigError, match="holds a training with another config"):
        training({**values, "seed": 1}, tmp_path / "run", resume=True)
    training({**values, "save_every": 1}, tmp_path / "run", resume=True)  # the same training
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_damaged_state_is_refused(llm: Path, tmp_path: Path) -> None:
    values = lesson(llm, stage("s", "language"))
    training(values, tmp_path / "run").run()
    path = tmp_path / "run" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        training(values, tmp_path / "run", resume=True)


def test_the_objectives_are_registered() -> None:
    names = {"request-image", "answer-embedding", "verbalise", "language", "look-again"}
    assert names <= set(get_registry().entries("objective"))
