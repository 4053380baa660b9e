"""What would let a training run on without learning is an error at the first step it concerns."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import Colours, lesson, lesson_registry, spoil, stage, stop_at, training
from toys import prompt_of, toy_model

from ipn_core.errors import ConfigError, DataError, IPNError, PromptError, TrainingError
from ipn_core.hooks import hookimpl
from ipn_core.model import IPN
from ipn_core.plugins import add_plugin
from ipn_core.tasks import Example
from ipn_core.testing.tiny import CHATML, tiny_backbone
from ipn_core.training.data import Batch, make_batch
from ipn_core.training.guards import Pinned, check_batch, check_template
from ipn_core.training.loop import StageRun
from ipn_core.training.objectives import Language

OTHER = CHATML.replace("<|im_start|>", "<|turn|>")


def stopped(values: dict[str, Any], folder: Path, error: type[IPNError], **more: Any) -> str:
    """What a training says that stops itself."""
    with pytest.raises(error) as raised:
        training(values, folder, **more).run()
    return str(raised.value)


# -- the template and the tokenizer ----------------------------------------------------------------


@pytest.mark.usefixtures("own_training")
@pytest.mark.parametrize("objective", ["language", "request-image"])
def test_a_template_with_markers_that_the_tokenizer_lacks_is_refused_before_anything_is_written(
    llm: Path, tmp_path: Path, objective: str
) -> None:
    values = lesson(llm, stage("s", objective, train=["interact"]))
    values["model"]["prompt"] = {"template": OTHER}
    text = stopped(values, tmp_path / "run", ConfigError)
    assert text.startswith(
        "stage 's': the chat template does not match the tokenizer: the tokenizer has no token "
        "<|turn|>. Use the tokenizer that belongs to the weights"
    )
    assert not (tmp_path / "run").exists()


def test_a_tokenizers_own_template_may_spell_markers_as_text(registry: Any) -> None:
    backbone = tiny_backbone()
    check_template(toy_model(registry, backbone=backbone))
    backbone.tokenizer.chat_template, before = OTHER, backbone.tokenizer.chat_template
    try:
        check_template(toy_model(registry, backbone=backbone))
    finally:
        backbone.tokenizer.chat_template = before


def test_an_answer_that_would_not_end_is_refused(registry: Any) -> None:
    model = toy_model(registry)
    model.backbone.lm.generation_config.eos_token_id = 2
    with pytest.raises(ConfigError, match=r"ends with '<\|im_end\|>', and generation stops at '<"):
        check_template(model)


def test_ids_without_an_embedding_are_refused(registry: Any) -> None:
    model = toy_model(registry)
    model.backbone.lm.resize_token_embeddings(80)
    with pytest.raises(ConfigError, match=r"gives the id \d+ \('.+'\), and the LLM has .* for 80"):
        check_template(model)


@pytest.mark.parametrize("family", ["llama", "llama-gqa", "vicuna", "opt", "opt-projected"])
def test_the_families_match(registry: Any, family: str) -> None:
    check_template(toy_model(registry, family=family))


# -- labels and losses -----------------------------------------------------------------------------


def test_a_batch_whose_labels_are_all_masked_is_no_loss_of_zero(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(registry)
    monkeypatch.setattr(Batch, "prompts", lambda *_: [prompt_of(0, 1)])
    monkeypatch.setattr(IPN, "forward", lambda *_: (torch.zeros(()), 0))
    with pytest.raises(TrainingError, match="a batch has no label left to learn from"):
        Language(model, []).loss(Batch([], None), None)  # type: ignore[arg-type]


def test_a_loss_that_stays_at_zero_is_named_at_the_tenth_step() -> None:
    pinned = Pinned()
    for step in range(8):
        pinned.check({"language": 0.0, "image-text": float(step == 3)})
    pinned.check({"language": 1e-30, "image-text": 0.0})
    for _ in range(4):
        pinned.check({"language": 0.0, "image-text": 0.0})
    with pytest.raises(TrainingError, match="the loss 'image-text' has been exactly 0 for 10 step"):
        pinned.check({"language": 0.0, "image-text": 0.0})


@pytest.mark.usefixtures("own_training")
def test_a_training_stops_whose_loss_is_pinned(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Language.loss

    def vanishing(run: StageRun) -> None:
        monkeypatch.setattr(Language, "loss", lambda *given: loss(*given) * 0.0)

    stop_at(monkeypatch, 3, vanishing)
    values = lesson(llm, stage("s", "language", steps=50))
    text = stopped(values, tmp_path / "run", TrainingError)
    assert text.startswith("the loss 'language' has been exactly 0 for 10 steps, so that nothing")
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.usefixtures("own_training")
def test_a_loss_of_zero_before_the_first_step_is_refused(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Language.loss
    monkeypatch.setattr(Language, "loss", lambda *given: loss(*given) * 0.0)
    text = stopped(lesson(llm, stage("s", "language")), tmp_path / "run", TrainingError)
    assert "stage 's': before the first step its loss is exactly 0 (language)" in text


# -- pictures --------------------------------------------------------------------------------------


class Placeholders(Colours):
    """Questions as a file of conversations has them, before it is read as one."""

    def examples(self, split: str) -> list[Example]:
        return [replace(e, question=f"<image>\n{e.question}") for e in super().examples(split)]


class Plugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.task("placeholders", Placeholders)


@pytest.mark.usefixtures("own_training")
def test_a_placeholder_that_no_picture_replaces_is_refused(llm: Path, tmp_path: Path) -> None:
    registry = lesson_registry()
    add_plugin(registry, "placeholders", Plugin())
    values = lesson(llm, stage("s", "language"), data=[{"task": "placeholders"}])
    text = stopped(values, tmp_path / "run", DataError, registry=registry)
    assert "holds '<image>', which no picture replaces: the LLM would read it as text" in text


def perceived(model: IPN, rows: int) -> tuple[list[Any], Any]:
    prompts = [prompt_of(row, 2, answer="ab") for row in range(rows)]
    pictures = [list(prompt.images) for prompt in prompts]
    return prompts, model.perceive(pictures, ["?"] * rows).features


@pytest.mark.parametrize("strategy", ["tiny-look", "toy-both"])
def test_more_places_than_pictures_are_refused(registry: Any, strategy: str) -> None:
    model = toy_model(registry, strategy)
    prompts, features = perceived(model, 2)
    fewer = features.select([0, 1], [2, 1])
    with pytest.raises(PromptError, match=r"places for 2 pictures or more, .* features of 1\."):
        model(prompts, fewer)


def test_a_batch_says_which_question_lacks_a_picture(
    registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(registry)
    prompts, features = perceived(model, 2)
    monkeypatch.setattr(Batch, "prompts", lambda *_: prompts)
    whole = Batch([None, None], features)  # type: ignore[list-item]
    check_batch(model, whole)
    lacking = replace(whole, features=features.select([0, 1], [2, 1]))
    with pytest.raises(
        DataError, match=r"has places for 2 pictures, and there are features of 1\."
    ):
        check_batch(model, lacking)


# -- what is not finite ----------------------------------------------------------------------------


@pytest.mark.usefixtures("own_training")
@pytest.mark.parametrize("step", [0, 3])
def test_the_first_tensor_that_is_not_finite_is_named(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    values = lesson(llm, stage("s", "language"))
    model = IPN.from_config(values["model"], registry=lesson_registry())
    if step:
        stop_at(monkeypatch, step, spoil)
    else:
        check = StageRun.check
        monkeypatch.setattr(StageRun, "check", lambda run: (spoil(run), check(run))[1])
    text = stopped(values, tmp_path / "run", TrainingError, model=model)
    where = f"stage 's', step {step}" if step else "before the first step"
    named = "the output of interaction.request_mlp, and so the loss 'language', is not finite."
    assert f"{where}: {named}" in text


@pytest.mark.usefixtures("own_training")
def test_features_that_are_not_finite_are_named_by_their_question(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*given: Any) -> Batch:
        batch = make_batch(*given)
        span = batch.features.images[1]
        values = batch.features.values.clone()
        values[span.offset] = float("inf")
        return replace(batch, features=replace(batch.features, values=values))

    values = lesson(llm, stage("s", "language"))
    bad = r"the features of picture 1 of the question '.*'"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ipn_core.training.loop.make_batch", spoiled)
        text = stopped(values, tmp_path / "new", TrainingError)
        assert re.search(rf"before the first step: {bad} are not finite\.", text)
    stop_at(
        monkeypatch,
        2,
        lambda _: monkeypatch.setattr("ipn_core.training.loop.make_batch", spoiled),
    )
    text = stopped(values, tmp_path / "later", TrainingError)
    # The batch of step 2 is there before it begins.
    assert re.search(rf"step 3: {bad}, and so the loss 'language', is not finite", text)
