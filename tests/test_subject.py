"""Questions about pictures that are read once: each is answered as if it were the only one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import LinearConnector, picture, toy_model, toy_registry
from watching import seen_positions

from ipn_core.errors import PromptError
from ipn_core.hooks import hookimpl
from ipn_core.plugins import Registry, add_plugin

QUESTIONS = ("What is it?", "And where, if anywhere at all, is the dog?", "Who?", "What is it?")
IMAGES = [picture(1, (48, 24)), picture(2, (24, 48))]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("strategy", ["static", "toy-both", "tiny-look"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_every_question_is_answered_as_if_it_were_the_only_one(
    registry: Registry,
    family: str,
    strategy: str,
    images: int,
) -> None:
    model = toy_model(registry, strategy, family, prompt={"system": "Answer me in one word."})
    about = model.about(IMAGES[:images])
    for question in QUESTIONS:
        mine = about.ask(question, max_new_tokens=5)
        alone = model.ask(IMAGES[:images], question, max_new_tokens=5)
        assert mine.ids == alone.ids
        if alone.attention is None:
            assert mine.attention is None
        else:
            torch.testing.assert_close(mine.attention, alone.attention)


@pytest.mark.parametrize("order", ["images text look", "text images look", "look images text"])
def test_every_order_of_a_layout(registry: Registry, order: str) -> None:
    model = toy_model(registry, "toy-both", layout={"order": order.split()}, rounds=2)
    about = model.about(IMAGES)
    for question in QUESTIONS:
        alone = model.ask(IMAGES, question, max_new_tokens=5)
        assert about.ask(question, max_new_tokens=5).ids == alone.ids


def test_a_further_question_costs_only_its_own_tokens(registry: Registry) -> None:
    model = toy_model(registry, "static")
    about = model.about(IMAGES)
    about.ask(QUESTIONS[0], max_new_tokens=1)
    encoded, read = model.encoder.encoded, about.prefilled
    with seen_positions(model) as seen:
        answer = about.ask(QUESTIONS[1], max_new_tokens=1)
    assert model.encoder.encoded == encoded == len(IMAGES)
    assert read > 18  # the patches of both pictures
    assert answer.tokens["static"] == 0
    alone = model.ask(IMAGES, QUESTIONS[1], max_new_tokens=1)
    assert sum(alone.tokens.values()) == read + sum(tokens for _, tokens in seen)


class Reader(LinearConnector):
    """Tokens that depend on the question."""

    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        lengths = [len(question) for question in context.questions]
        found = super().connect(features, context)
        return [
            tokens * (1 + 0.1 * lengths[span.sample])
            for tokens, span in zip(found, features.images, strict=True)
        ]


class ReaderPlugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.perceiver("toy-reader", Reader)
        registry.strategy("toy-reads", {"perceive": "toy-reader", "layout": {"rounds": 0}})


def test_a_connector_that_reads_the_question_is_run_for_each() -> None:
    registry = toy_registry()
    add_plugin(registry, "reader", ReaderPlugin())
    model = toy_model(registry, "toy-reads")
    about = model.about(IMAGES)
    for question in QUESTIONS:
        alone = model.ask(IMAGES, question, max_new_tokens=5)
        assert about.ask(question, max_new_tokens=5).ids == alone.ids
    assert about.prefilled == 0


def test_a_question_that_begins_otherwise_is_run_whole(registry: Registry) -> None:
    model = toy_model(registry, "static")
    about = model.about(IMAGES)
    about.ask(QUESTIONS[0], max_new_tokens=1)
    about._fed = [*about._fed[:-1], 0]  # as if the tokenizer had joined the last token to it
    alone = model.ask(IMAGES, QUESTIONS[1], max_new_tokens=5)
    assert about.ask(QUESTIONS[1], max_new_tokens=5).ids == alone.ids


def test_a_question_that_is_refused_changes_nothing(registry: Registry) -> None:
    model = toy_model(registry, "static")
    about = model.about(IMAGES)
    with pytest.raises(PromptError, match="question is empty"):
        about.ask(" ")
    alone = model.ask(IMAGES, QUESTIONS[0], max_new_tokens=5)
    assert about.ask(QUESTIONS[0], max_new_tokens=5).ids == alone.ids
