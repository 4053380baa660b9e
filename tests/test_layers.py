"""Between the layers: one call-back, the same in prefill, in decoding and under beams."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
import two_pass
from torch import nn
from toys import FAMILIES, K, prompt_of, toy_model

from ipn_core.builtin.injectors import TokenInjector
from ipn_core.model import IPN
from ipn_core.stages import LayerContext, LayerInjector


class Between(LayerInjector):
    """Adds, before both layers, the mean patch of the pictures before a token, by its position."""

    def __init__(self, tokens: TokenInjector, width: int) -> None:
        super().__init__(None, tokens.dims)
        self.tokens = tokens
        self.map = nn.Linear(tokens.dims.Dv, width)
        self.contexts: list[Any] = []

    @property
    def layers(self) -> tuple[int, ...]:
        return (0, 1)

    def forward(self, message: Any, context: Any) -> Any:
        return self.tokens(message, context)

    def before_layer(self, hidden: torch.Tensor, context: Any) -> torch.Tensor:
        self.contexts.append(context)
        patches = self.map(context.features.padded()[0])
        places = context.features.places()
        mask = context.features.mask
        seen = (places[:, None] < context.pictures[..., None]) & mask[:, None]
        weights = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        wave = (1 + 0.1 * context.positions + context.layer)[..., None]
        return hidden + (wave * (weights.to(hidden.dtype) @ patches)).sin()


def between(registry: Any, family: str, rounds: int = 1) -> IPN:
    model = toy_model(registry, "tiny-look", family, rounds=rounds)
    model.pm.unregister(model.injector)
    torch.manual_seed(0)
    model.injector = Between(model.injector, int(model.backbone.lm.config.hidden_size))
    model.pm.register(model.injector)
    return model


@contextmanager
def hung_on_every_whole_forward(model: IPN, prompt: Any) -> Any:
    """The reference: the same call-back, in forwards over whole prompts of one row."""
    plan = model.planner.plan(prompt)
    percept = model.perceive([plan.images], [plan.question])
    starts, at = [], 0
    for piece in plan.entries:
        name = type(piece).__name__
        if name == "ImageSlot":
            starts.append(at)
        at += {"ImageSlot": 0, "RequestSlot": 1, "DynamicSlot": K}.get(name, 1)

    def before(layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rows = hidden.shape[0]
        positions = positions.expand(rows, -1)
        seen = sum(((positions >= s).long() for s in starts), torch.zeros_like(positions))
        features = percept.features.select([0] * rows)
        return model.injector.before_layer(hidden, LayerContext(layer, positions, seen, features))

    with model.backbone.layer_callback(model.injector.layers, before):
        yield


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}]
)
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_injector_equals_one_without_a_cache(
    registry: Any, family: str, rounds: int, options: dict[str, Any]
) -> None:
    model = between(registry, family, rounds)
    prompts = [prompt_of(row, n) for row, n in enumerate((1, 2, 1))]
    answers = model.generate(prompts, max_new_tokens=4, **options)
    expected = []
    for prompt in prompts:
        with hung_on_every_whole_forward(model, prompt):
            expected += two_pass.generate(model, prompt, max_new_tokens=4, **options)
    assert [a.ids for a in answers] == expected


def test_it_changes_the_answer_and_is_gone_afterwards(registry: Any) -> None:
    model = between(registry, "llama")
    before = len(model.backbone.layers[0]._forward_pre_hooks)
    answer = model.generate([prompt_of(0, 1)], max_new_tokens=4)[0]
    assert answer.ids != toy_model(registry).generate([prompt_of(0, 1)], max_new_tokens=4)[0].ids
    assert len(model.backbone.layers[0]._forward_pre_hooks) == before


def test_its_loss_equals_the_reference_and_its_parameters_learn(registry: Any) -> None:
    model = between(registry, "llama")
    prompt = prompt_of(0, 2, answer="ab")
    loss, _ = model([prompt])
    with hung_on_every_whole_forward(model, prompt):
        expected, _ = two_pass.loss(model, prompt)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    assert model.injector.map.weight.grad.abs().sum() > 0


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


def test_a_dialogue_with_a_layer_injector_equals_a_fresh_start(registry: Any) -> None:
    model = between(registry, "llama")
    prompt = prompt_of(0, 1)
    dialogue = model.dialogue(prompt.images)
    first = dialogue.ask("What?", max_new_tokens=3)
    second = dialogue.ask("Who?", max_new_tokens=3)
    ended = first.ids[-1] in model.backbone.eos_ids
    again = type(prompt)(()).then_user(*prompt.images, "What?")
    again = again.then_assistant(first.ids[:-1] if ended else first.ids).then_user("Who?")
    assert model.generate([again], max_new_tokens=3)[0].ids == second.ids
