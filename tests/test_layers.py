"""Between the layers: one call-back, the same in prefill, in decoding and under beams."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import two_pass
from lessons import lesson, lesson_registry, metrics, said, stage, training
from torch import nn
from toys import FAMILIES, picture, prompt_of, toy_model, toy_registry
from watching import check_loss, check_rows, gradients

from ipn_core.builtin.injectors import TokenInjector
from ipn_core.errors import ConfigError
from ipn_core.hooks import hookimpl
from ipn_core.model import IPN
from ipn_core.plugins import Registry, add_plugin
from ipn_core.prompt import Prompt
from ipn_core.stages import LayerInjector
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone
from ipn_core.training.run import Training


class Alone(LayerInjector):
    """Adds, before both layers, the mean patch of the pictures before a token, by its position."""

    def __init__(self, config: Any, dims: Any) -> None:
        super().__init__(config, dims)
        self.map = nn.Linear(dims.Dv, dims.D_hidden[0])
        self.contexts: list[Any] = []

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, 1)

    def before_layer(self, hidden: torch.Tensor, context: Any) -> torch.Tensor:
        self.contexts.append(context)
        patches = self.map(context.features.padded()[0])
        places = context.features.places()
        mask = context.features.mask
        seen = (places[:, None] < context.pictures[..., None]) & mask[:, None]
        weights = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        wave = (1 + 0.1 * context.positions + context.layer)[..., None]
        return hidden + (wave * (weights.to(hidden.dtype) @ patches)).sin()


class Between(Alone):
    """The same, and it fills the slots after a look."""

    def __init__(self, config: Any, dims: Any) -> None:
        super().__init__(config, dims)
        self.tokens = TokenInjector(TokenInjector.Config(), dims)

    @property
    def fills(self) -> int:
        return self.dims.K

    def forward(self, message: Any, context: Any) -> Any:
        return self.tokens(message, context)


class LayersPlugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.injector("toy-alone", Alone)
        registry.injector("toy-between", Between)
        registry.strategy("toy-alone", ALONE)


ALONE = {"inject": "toy-alone", "layout": {"rounds": 0, "dynamic": 0}}


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = toy_registry()
    add_plugin(registry, "toy-layers", LayersPlugin())
    return registry


def between(registry: Any, family: Any, rounds: int = 1) -> IPN:
    """A model that injects between the layers and, with rounds, into slots as well."""
    if not rounds:
        return toy_model(registry, "toy-alone", family)
    return toy_model(registry, "tiny-look", family, rounds=rounds, inject="toy-between")


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("rounds", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_injector_equals_one_without_a_cache(
    registry: Any, family: str, rounds: int, options: dict[str, Any]
) -> None:
    model = between(registry, family, rounds)
    prompts = [prompt_of(row, n) for row, n in enumerate((1, 2, 1))]
    answers = model.generate(prompts, max_new_tokens=4, **options)
    expected = []
    for prompt in prompts:
        expected += two_pass.generate(model, prompt, max_new_tokens=4, **options)
    assert [a.ids for a in answers] == expected
    if not options:
        check_rows(model, [*prompts, prompt_of(0, 0)])


@pytest.mark.parametrize("rounds", [0, 1])
def test_rows_of_one_question_about_other_pictures_stay_apart(registry: Any, rounds: int) -> None:
    model = between(registry, "llama", rounds)
    check_rows(model, [Prompt.user(picture(i), "What is it, and where?") for i in range(3)])


def test_it_changes_the_answer_and_is_gone_afterwards(registry: Any) -> None:
    model = between(registry, "llama")
    before = len(model.backbone.layers[0]._forward_pre_hooks)
    answer = model.generate([prompt_of(0, 1)], max_new_tokens=4)[0]
    assert answer.ids != toy_model(registry).generate([prompt_of(0, 1)], max_new_tokens=4)[0].ids
    assert len(model.backbone.layers[0]._forward_pre_hooks) == before


@pytest.mark.parametrize("rounds", [0, 1])
def test_its_loss_equals_the_reference_and_its_parameters_learn(registry: Any, rounds: int) -> None:
    model = between(registry, "llama", rounds)
    taught = [
        prompt_of(0, 2, answer="ab"),
        prompt_of(1, 1, answer="a"),
        prompt_of(1, 0, answer="b"),
    ]
    loss, count = model(taught)
    check_loss(model, taught, loss, count)
    found = gradients(model, model(taught)[0])
    assert found["injector.map.weight"].abs().sum() > 0


def test_it_is_told_which_pictures_stand_before_each_token(registry: Any) -> None:
    model = between(registry, "llama")
    prompt = prompt_of(0, 2)
    model.generate([prompt], max_new_tokens=2)
    first = next(c for c in model.injector.contexts if c.layer == 0)
    places = [i for i, e in enumerate(model.planner.plan(prompt).entries) if not isinstance(e, int)]
    seen = first.pictures[0].tolist()
    assert sorted(set(seen)) == [0, 1, 2]
    assert seen.index(1) == places[0]
    assert seen.index(2) == places[1] - 1  # without static tokens a slot takes no position


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_dialogue_with_a_layer_injector_equals_a_fresh_start(registry: Any, rounds: int) -> None:
    model = between(registry, "llama", rounds)
    prompt = prompt_of(0, 1)
    dialogue = model.dialogue(prompt.images)
    first = dialogue.ask("What?", max_new_tokens=3)
    second = dialogue.ask("Who?", max_new_tokens=3)
    ended = first.ids[-1] in model.backbone.eos_ids
    again = type(prompt)(()).then_user(*prompt.images, "What?")
    again = again.then_assistant(first.ids[:-1] if ended else first.ids).then_user("Who?")
    assert model.generate([again], max_new_tokens=3)[0].ids == second.ids


# -- a strategy without a round --------------------------------------------------------------------


def test_without_a_round_the_injector_is_all_there_is(registry: Any, tmp_path: Path) -> None:
    model = between(registry, "llama", rounds=0)
    assert (model.requester, model.interaction) == (None, None)
    assert (model.injector.dims.K, model.injector.dims.M, model.injector.dims.Dm) == (0, 0, 0)
    (answer,) = model.generate([prompt_of(0, 1)], max_new_tokens=3)
    assert answer.tokens["text"] > 0
    assert (answer.tokens["request"], answer.tokens["dynamic"]) == (0, 0)
    model.save_pretrained(tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["layout"]["rounds"] == 0
    again = IPN.from_pretrained(
        tmp_path / "m",
        backbone=tiny_backbone("llama"),
        encoder=TinyEncoder(TinyEncoderConfig()),
        registry=registry,
    )
    assert again.generate([prompt_of(0, 1)], max_new_tokens=3)[0].ids == answer.ids


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"inject": "tokens"},
            r"^injector 'tokens' does not fit this model: .* layout.rounds 0 .*: name request",
        ),
        ({"inject": "layers"}, r"^injector 'layers' does not fit this model: .*layout.rounds 0"),
        (
            {"inject": "prefix-kv"},
            r"^injector 'prefix-kv' does not fit this model: .*layout.rounds 0",
        ),
        (
            {"inject": "toy-alone", "request": "hidden-state"},
            "request and interact need layout.rounds > 0",
        ),
        (
            {"inject": "toy-alone", "layout": {"rounds": 1}},
            "with layout.rounds > 0, request, interact and inject are all needed",
        ),
    ],
)
def test_what_cannot_work_without_a_round_is_refused(
    registry: Any, config: dict[str, Any], reason: str
) -> None:
    values = {"backbone": "tiny", "encoder": "tiny", "layout": {"rounds": 0}, **config}
    with pytest.raises(ConfigError, match=reason):
        IPN.from_config(
            values,
            backbone=tiny_backbone(),
            encoder=TinyEncoder(TinyEncoderConfig()),
            registry=registry,
        )


def without_a_round(llm: Path, lesson_stage: dict[str, Any], folder: Path) -> Training:
    """A training of `toy-alone`."""
    registry = lesson_registry()
    add_plugin(registry, "toy-layers", LayersPlugin())
    values = lesson(llm, lesson_stage)
    kept = {key: values["model"][key] for key in ("backbone", "encoder")}
    values["model"] = {**kept, "strategy": "toy-alone"}
    return training(values, folder, registry=registry)


@pytest.mark.usefixtures("own_training")
def test_a_strategy_without_a_round_trains(llm: Path, tmp_path: Path) -> None:
    run = without_a_round(llm, stage("s", "language", train=["inject"], steps=3), tmp_path / "run")
    run.run()
    assert "every tensor gets a finite non-zero gradient" in said(run)
    losses = [line["loss"] for line in metrics(tmp_path / "run") if "loss" in line]
    assert len(losses) == 3


@pytest.mark.usefixtures("own_training")
@pytest.mark.parametrize("objective", ["answer-embedding", "request-image", "verbalise"])
def test_objectives_about_messages_are_refused_without_a_round(
    llm: Path, tmp_path: Path, objective: str
) -> None:
    with pytest.raises(ConfigError, match=f"'{objective}' needs an interaction"):
        without_a_round(llm, stage("s", objective, train=["inject"]), tmp_path / "run").run()
