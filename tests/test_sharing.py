"""What rows of a batch begin with alike is run once, and nothing changes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import two_pass
from toys import picture, toy_model
from watching import check_loss, seen_positions

from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.prompt import Prompt
from ipn_core.segments import Segment
from ipn_core.sharing import divide
from ipn_core.stages import Percept

QUESTIONS = ("What is it?", "And where, if anywhere at all, is the dog?", "Who?")
PICTURES = (picture(1, (48, 24)), picture(2, (24, 48)))


def asked(answer: str | None = None) -> list[Prompt]:
    """Every question about every picture, the first one twice."""
    rows = [(image, text) for image in PICTURES for text in QUESTIONS]
    order = ["images", "text", "look"]
    return [
        Prompt.ask(text, [image], order=order, answer=answer) for image, text in [*rows, rows[0]]
    ]


def shared(model: IPN) -> VisualFeatures:
    """The features of the prompts' pictures, each picture's once."""
    encoded = model.encoder.encode(PICTURES)
    rows = [[i] for i in range(len(PICTURES)) for _ in QUESTIONS]
    return VisualFeatures.share(
        [e.values for e in encoded],
        [e.grid for e in encoded],
        [*rows, rows[0]],
        model.encoder.width,
        [e.global_token for e in encoded],
    ).to()


def percept_of(model: IPN, plans: list[Any]) -> Any:
    return model.perceive([], [p.question for p in plans], shared(model))


def segment_of(model: IPN, prompts: list[Prompt]) -> Segment:
    """The only segment of prompts without pictures."""
    plans = [model.planner.plan(p) for p in prompts]
    nothing = Percept(VisualFeatures.share([], [], [[]] * len(plans), model.encoder.width))
    (segment,), _ = model.engine._segments(plans, nothing, None)
    return segment


def built(registry: Registry, strategy: str, family: str) -> IPN:
    system = {"system": "Answer me in one word. " * 3}
    return toy_model(registry, strategy, family, prompt=system)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_pictures_of_several_questions_are_read_once(registry: Registry, family: str) -> None:
    model = built(registry, "static", family)
    prompts = asked()
    plans = [model.planner.plan(p) for p in prompts]
    with seen_positions(model) as seen, torch.no_grad():
        percept = percept_of(model, plans)
        prefix = model.engine.prefix(plans, percept)
        state = prefix.state
        mask = torch.cat([state.mask, prefix.mask], dim=1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, state.length :]
        out = model.backbone.extend(prefix.embeds, state.cache, positions, mask)
        logits = model.backbone.logits(out.last)
    # The system message for one row, the pictures for two, the questions for all.
    assert [rows for rows, _ in seen] == [1, 2, len(prompts)]
    assert state.lengths == [int(n) for n in state.mask.sum(1)]
    for row, prompt in enumerate(prompts):
        mine = logits[row][prefix.mask[row]]
        expected = two_pass.logits(model, prompt)
        assert len(expected) == int(mask[row].sum())
        assert (mine - expected[-len(mine) :]).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("strategy", ["static", "toy-both", "tiny-look"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_loss_and_gradients_are_those_of_two_passes(
    registry: Registry, family: str, strategy: str
) -> None:
    model = built(registry, strategy, family)
    taught = asked("ab")
    with seen_positions(model) as seen:
        loss, count = model(taught, shared(model))
    assert seen[0][0] == 1
    check_loss(model, taught, loss, count)
    assert float(loss.detach()) > 0


def test_only_what_saves_enough_is_cut_off(registry: Registry) -> None:
    model = toy_model(registry, "static", "opt")
    segment = segment_of(model, [Prompt.user(text) for text in ("Who?", "What?")])
    parts, index = divide(segment, {})
    assert len(parts) == 1
    assert index == [0, 1]
    assert torch.equal(parts[0].mask, segment.mask)


def test_a_cut_leaves_the_token_that_predicts_what_is_learned(registry: Registry) -> None:
    model = toy_model(registry, "static", "opt")
    question = Prompt.user("Is it? " * 9)
    segment = segment_of(model, [question.then_assistant(a, learn=True) for a in ("yes", "yet")])
    parts, _ = divide(segment, {})
    assert len(parts) == 2
    learned = int((segment.labels[0] != -100).sum())
    assert parts[-1].mask.shape[1] == learned + 1
