"""The one-pass engine says what the two-pass method says, and processes every token once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import two_pass
from toys import FAMILIES, K, picture, prompt_of, toy_model
from watching import check_against_two_passes, check_rows, last_logits, seen_positions

from ipn_core.errors import PromptError, ShapeError, StageError
from ipn_core.prompt import Prompt
from ipn_core.testing.interactions import TinyLook
from ipn_core.testing.tiny import tiny_backbone

STRATEGIES = ("static", "rvii")


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_pass_equals_two_passes(
    registry: Any, family: str, strategy: str, batch: int, rounds: int, images: int
) -> None:
    check_against_two_passes(
        toy_model(registry, strategy, family, rounds=rounds), batch, rounds, images
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_static_tokens_and_two_looks_together_equal_two_passes(registry: Any, family: str) -> None:
    check_against_two_passes(toy_model(registry, "toy-both", family, rounds=2), 3, 2, 2)


@pytest.mark.parametrize("layer", [0, 1, -2])
def test_a_request_from_an_inner_layer_equals_two_passes(registry: Any, layer: int) -> None:
    request = {"name": "hidden-state", "layer": layer}
    model = toy_model(registry, "tiny-look", request=request)
    check_against_two_passes(model, 3, 1, 1)


@pytest.mark.parametrize("order", ["images text look", "text images look", "look images text"])
def test_every_order_of_a_layout_equals_two_passes(registry: Any, order: str) -> None:
    layout = {"order": order.split(), "request": 2}
    model = toy_model(registry, "toy-both", "opt", rounds=2, layout=layout)
    check_against_two_passes(model, 3, 2, 2)


def test_rows_of_one_question_share_its_prefix_and_equal_two_passes(registry: Any) -> None:
    model = toy_model(registry)
    prompts = [Prompt.user(picture(i), "What?") for i in range(3)] + [Prompt.user("What?")]
    with seen_positions(model) as seen, torch.no_grad():
        logits, real = last_logits(model, prompts)
    assert seen[0][0] < len(prompts)
    for row, prompt in enumerate(prompts):
        mine = logits[row][real[row]]
        torch.testing.assert_close(mine, two_pass.logits(model, prompt)[-len(mine) :])


@pytest.mark.parametrize("strategy", ["tiny-look", "toy-both"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rows_that_begin_alike_share_the_beginning_and_equal_two_passes(
    registry: Any, family: str, strategy: str
) -> None:
    model = toy_model(registry, strategy, family, prompt={"system": "Answer me in one word. " * 3})
    first = prompt_of(0, 2)
    prompts = [first, prompt_of(1, 1), first, prompt_of(2, 0), prompt_of(2, 1)]
    with seen_positions(model) as seen, torch.no_grad():
        last_logits(model, prompts)
    alone, head = seen[0]
    assert alone == 1
    assert head >= 16
    # What follows the head is run for the distinct rows, or where pictures stand in it, for all.
    assert seen[1][0] == (4 if strategy == "tiny-look" else 5)
    assert seen[1][1] <= max(len(two_pass.whole(model, p).embeds) for p in prompts) - head
    check_rows(model, prompts)


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "toy-both"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_no_token_is_processed_twice_and_the_answer_counts_them_all(
    registry: Any, family: str, strategy: str, images: int, rounds: int
) -> None:
    model = toy_model(registry, strategy, family, rounds=rounds)
    prompt = prompt_of(0, images)
    with seen_positions(model) as seen:
        (answer,) = model.generate([prompt], max_new_tokens=4)
    filled = two_pass.whole(model, prompt)
    looks = rounds if images and model.requester is not None else 0
    assert all(rows == 1 for rows, _ in seen)
    assert sum(tokens for _, tokens in seen) == len(filled.embeds) + len(answer.ids) - 1
    assert answer.tokens == {
        "text": len(filled.ids),
        "static": len(filled.embeds) - len(filled.ids) - looks * (1 + K),
        "request": looks,
        "dynamic": looks * K,
        "generated": len(answer.ids) - 1,
    }
    assert len(seen) == 1 + looks + answer.tokens["generated"]


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("rounds", [1, 2])
def test_conversations_of_different_length_answer_as_each_alone(
    registry: Any, family: str, rounds: int
) -> None:
    model = toy_model(registry, "toy-both", family, rounds=rounds)
    prompts = [prompt_of(row, 1 + row % 2, turns=turns) for row, turns in enumerate((1, 3, 2, 1))]
    answers = model.generate(prompts, max_new_tokens=4)
    assert [a.ids for a in answers] == [two_pass.greedy(model, p, 4) for p in prompts]


def test_seconds_of_the_stages_add_up_to_the_total(registry: Any) -> None:
    (answer,) = toy_model(registry).generate([prompt_of(0, 1)], max_new_tokens=4)
    seconds = dict(answer.seconds)
    total, first = seconds.pop("total"), seconds.pop("first_token")
    assert set(seconds) == {"perceive", "prefill", "request", "interact", "inject", "decode"}
    assert all(value > 0 for value in seconds.values())
    assert sum(seconds.values()) == pytest.approx(total)
    assert 0 < first < total


@pytest.mark.parametrize("rounds", [1, 2])
def test_the_answer_says_where_each_look_went(registry: Any, rounds: int) -> None:
    model = toy_model(registry, rounds=rounds)
    prompts = [prompt_of(0, 2), prompt_of(1, 0), prompt_of(2, 1)]
    answers = model.generate(prompts, max_new_tokens=2)
    assert [a.grids for a in answers] == [((3, 3), (3, 6)), (), ((3, 2),)]
    assert answers[1].attention is None
    assert answers[1].grid is None
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = two_pass.whole(model, prompt).maps
        if not expected:
            continue
        assert answer.attentions.shape == (rounds, K, sum(h * w for h, w in answer.grids))
        torch.testing.assert_close(answer.attentions, torch.stack(expected))
        torch.testing.assert_close(answer.attention, answer.attentions[-1])


def test_a_prompt_that_does_not_fit_the_context_is_refused(registry: Any) -> None:
    model = toy_model(registry, backbone=tiny_backbone(positions=64))
    with pytest.raises(PromptError, match=r"has \d+ tokens; .* at most 64 .*Shorten the question"):
        model.ask(picture(), "Is it? " * 20)


def test_an_answer_ends_where_the_context_does(registry: Any) -> None:
    model = toy_model(registry, backbone=tiny_backbone(positions=64))
    answer = model.ask(picture(), "Is it?", max_new_tokens=500, eos_token_id=-1)
    assert sum(answer.tokens.values()) <= 64


class Short(TinyLook):
    def forward(self, request: Any, features: Any) -> Any:
        message = super().forward(request, features)
        return replace(message, values=message.values[:, :-1])


def test_a_message_of_the_wrong_shape_names_the_stage_and_both_shapes(registry: Any) -> None:
    model = toy_model(registry)
    model.pm.unregister(model.interaction)
    model.interaction = Short(model.interaction.config, model.interaction.dims)
    model.pm.register(model.interaction)
    with pytest.raises(ShapeError, match=r"stage interact .*Short.* returned \(1, 2, 16\)"):
        model.ask(picture(), "What?")


def test_a_stage_that_fails_is_named_with_its_reason(registry: Any) -> None:
    model = toy_model(registry)
    model.interaction.forward = lambda *_: 1 / 0
    reason = r"stage interact .*ZeroDivisionError: division by zero"
    with pytest.raises(StageError, match=reason) as caught:
        model.ask(picture(), "What?")
    # Nothing was wrong with what the user gave.
    assert caught.value.exit_code == 1
