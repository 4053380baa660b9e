"""A beginning that rows share is stored once, and every way of answering says the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from toys import picture, toy_model

from ipn_core import shared_cache
from ipn_core.clock import Clock
from ipn_core.features import VisualFeatures
from ipn_core.generate import decode
from ipn_core.model import IPN
from ipn_core.prompt import Prompt
from ipn_core.shared_cache import SharedLayer

PICTURES = (picture(1, (48, 24)), picture(2, (24, 48)))
QUESTIONS = ("What is it?", "And where, if anywhere at all, is the dog?", "Who?")
ROWS = [(image, text) for image in range(len(PICTURES)) for text in QUESTIONS]
ORDER = ["images", "text", "look"]


@contextmanager
def storing_once(from_: int) -> Iterator[None]:
    before = shared_cache.WORTH_STORING_ONCE
    shared_cache.WORTH_STORING_ONCE = from_
    try:
        yield
    finally:
        shared_cache.WORTH_STORING_ONCE = before


def built(registry: Any, strategy: str, family: str, **more: Any) -> IPN:
    system = {"system": "Answer me in one word. " * 3}
    return toy_model(registry, strategy, family, prompt=system, **more)


@torch.no_grad()
def answered(model: IPN, rows: list[tuple[int, str]], **options: Any) -> tuple[Any, Any]:
    """The answers' ids, and the state after them."""
    encoded = model.encoder.encode(PICTURES)
    features = VisualFeatures.share(
        [e.values for e in encoded],
        [e.grid for e in encoded],
        [[image] for image, _ in rows],
        model.encoder.width,
    )
    prompts = [Prompt.ask(text, [PICTURES[image]], order=ORDER) for image, text in rows]
    plans = [model.planner.plan(prompt) for prompt in prompts]
    percept = model.perceive([], [plan.question for plan in plans], features)
    answers, state, _ = decode(
        model, plans, percept, {"max_new_tokens": 6, **options}, Clock(model.backbone.device)
    )
    return [answer.ids for answer in answers], state


def held(state: Any) -> int:
    """Numbers in the cache."""
    return sum(
        layer.keys.numel() + sum(one.keys.numel() for one in getattr(layer, "beginnings", ()))
        for layer in state.cache.layers
    )


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 2},
    {"min_new_tokens": 6},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("strategy", ["static", "toy-both"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_answers_are_those_of_a_copied_cache(
    registry: Any, family: str, strategy: str, pictures: int, options: dict[str, Any]
) -> None:
    model = built(registry, strategy, family)
    rows = [row for row in ROWS if row[0] < pictures] * 2
    found, sizes = [], []
    for threshold in (1 << 40, 1):
        torch.manual_seed(0)
        with storing_once(threshold):
            ids, state = answered(model, rows, **options)
        found.append(ids)
        sizes.append(held(state))
        shared = [isinstance(layer, SharedLayer) for layer in state.cache.layers]
        assert all(shared) if threshold == 1 else not any(shared)
    assert found[0] == found[1]
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize("inject", ["tokens", "prefix-kv"])
def test_logits_are_those_of_a_copied_cache_whatever_is_injected(
    registry: Any, inject: str
) -> None:
    model = built(registry, "toy-both", "llama", inject=inject, rounds=2)
    logits = []
    for threshold in (1 << 40, 1):
        with storing_once(threshold):
            options = {"output_logits": True, "min_new_tokens": 6}
            encoded = model.encoder.encode(PICTURES[:1])
            features = VisualFeatures.share(
                [e.values for e in encoded],
                [e.grid for e in encoded],
                [[0]] * 3,
                model.encoder.width,
            )
            plans = [
                model.planner.plan(Prompt.ask(text, [PICTURES[0]], order=ORDER))
                for text in QUESTIONS
            ]
            percept = model.perceive([], list(QUESTIONS), features)
            clock = Clock(model.backbone.device)
            with torch.no_grad():
                answers, _, _ = decode(
                    model, plans, percept, {"max_new_tokens": 6, **options}, clock
                )
            logits.append(torch.stack(answers.raw.logits))
    assert (logits[0] - logits[1]).abs().max() <= 1e-5 * logits[0].abs().max()


def test_many_queries_are_run_in_parts(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(registry, "static", "llama")
    with storing_once(1):
        expected, _ = answered(model, ROWS)
        monkeypatch.setattr(shared_cache, "LARGEST_SCORES", 6 * 4 * 100 * 3)
        assert answered(model, ROWS)[0] == expected


def test_a_little_is_copied(registry: Any) -> None:
    _, state = answered(built(registry, "static", "llama"), ROWS)
    assert not any(isinstance(layer, SharedLayer) for layer in state.cache.layers)


def test_what_is_learned_through_is_copied(registry: Any) -> None:
    model = built(registry, "static", "llama")
    assert not model.backbone.shares
    with torch.no_grad():
        assert model.backbone.shares


def test_a_beginning_cannot_be_cut() -> None:
    keys = torch.randn(1, 2, 5, 4)
    layer = SharedLayer.of(_layer(keys), [0, 0])
    layer.update(torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4))
    layer.crop(-2)
    assert layer.get_seq_length() == 6
    with pytest.raises(ValueError, match="cannot be cut"):
        layer.crop(-2)


def _layer(keys: torch.Tensor) -> Any:
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    layer.update(keys, keys)
    return layer
