"""Keys and values of a picture's patches are computed once, for all blocks, looks and questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from toys import picture, prompt_of, toy_model

from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.plugins import Registry

IMAGES = [picture(1, (48, 24)), picture(2, (24, 48))]
PATCHES = (18, 6)
LATENTS = 3
QUESTIONS = ("What is it?", "And where, if anywhere, is the dog?")
SMALL: dict[str, dict[str, Any]] = {
    "rvii": {"rounds": 2, "interact": {"name": "rvii", "width": 16, "depth": 2, "heads": 2}},
    "gated-xattn": {
        "perceive": {"name": "latents", "latents": 3, "depth": 1, "heads": 2, "head_width": 4},
        "inject": {"name": "gated-xattn", "every": 1, "heads": 2, "hidden": 24},
    },
}
STRATEGIES = pytest.mark.parametrize("strategy", SMALL)


def built(registry: Registry, strategy: str, **more: Any) -> IPN:
    return toy_model(registry, strategy, **{**SMALL[strategy], **more})


def projections(model: IPN) -> list[torch.nn.Module]:
    """What makes keys, and values, of patches: one or two for each block."""
    if model.interaction is not None:
        return [block.cross_attention.kv for block in model.interaction.blocks]
    injector: Any = model.injector
    return [part for block in injector.blocks for part in (block.k, block.v)]


@contextmanager
def projected(model: IPN) -> Iterator[dict[int, list[int]]]:
    """Write down, for each projection, of how many patches it made keys or values, each time."""
    found: dict[int, list[int]] = {n: [] for n in range(len(projections(model)))}

    def watch(number: int) -> Any:
        return lambda _, inputs, __: found[number].append(inputs[0].shape[:-1].numel())

    handles = [m.register_forward_hook(watch(n)) for n, m in enumerate(projections(model))]
    yield found
    for handle in handles:
        handle.remove()


def rows_of(model: IPN, images: Sequence[Any]) -> int:
    """What the first of the pictures have for the projections: their patches, or their latents."""
    count = len(images)
    return sum(PATCHES[:count]) if model.interaction is not None else LATENTS * count


@STRATEGIES
@pytest.mark.parametrize("count", [1, 2])
def test_questions_about_a_picture_share_them(
    registry: Registry, strategy: str, count: int
) -> None:
    model, images = built(registry, strategy), IMAGES[:count]
    about = model.about(images)
    with projected(model) as seen:
        found = [about.ask(question, max_new_tokens=3).ids for question in QUESTIONS]
    assert set(map(tuple, seen.values())) == {(rows_of(model, images),)}
    assert found == [model.ask(images, q, max_new_tokens=3).ids for q in QUESTIONS]


@STRATEGIES
def test_turns_of_a_dialogue_share_them(registry: Registry, strategy: str) -> None:
    model = built(registry, strategy)
    dialogue = model.dialogue(IMAGES)
    with projected(model) as seen:
        for question in QUESTIONS:
            dialogue.ask(question, max_new_tokens=3)
    assert set(map(tuple, seen.values())) == {(rows_of(model, IMAGES),)}


@STRATEGIES
def test_after_a_further_picture_the_turns_share_them_again(
    registry: Registry, strategy: str
) -> None:
    model = built(registry, strategy)
    dialogue = model.dialogue(IMAGES[:1])
    with projected(model) as seen:
        dialogue.ask(QUESTIONS[0], max_new_tokens=3)
        for images in (IMAGES[1:], (), ()):
            dialogue.ask(QUESTIONS[1], images, max_new_tokens=3)
    once = (rows_of(model, IMAGES[:1]), rows_of(model, IMAGES))
    assert set(map(tuple, seen.values())) == {once}


@STRATEGIES
@pytest.mark.parametrize("beams", [1, 2])
def test_rows_that_see_different_pictures_share_them(
    registry: Registry, strategy: str, beams: int
) -> None:
    # Several looks by turns: rows look with different others, at one picture and at several.
    model = built(registry, strategy)
    prompts = [prompt_of(row, images, turns=1 + row % 2) for row, images in enumerate((2, 3, 0, 1))]
    with projected(model) as seen:
        found = model.generate(prompts, max_new_tokens=3, num_beams=beams)
    assert {len(sizes) for sizes in seen.values()} == {1}
    alone = [model.generate([p], max_new_tokens=3, num_beams=beams)[0] for p in prompts]
    assert [one.ids for one in found] == [one.ids for one in alone]


@STRATEGIES
def test_features_of_another_dtype_than_the_stages_share_them(
    registry: Registry, strategy: str
) -> None:
    model = built(registry, strategy)
    model.encoder.register_forward_hook(
        lambda *given: type(given[-1])(given[-1].features.to(dtype=torch.bfloat16))
    )
    about = model.about(IMAGES)
    with projected(model) as seen:
        for question in QUESTIONS:
            about.ask(question, max_new_tokens=3)
    assert set(map(tuple, seen.values())) == {(rows_of(model, IMAGES),)}


@STRATEGIES
def test_other_weights_make_others(registry: Registry, strategy: str) -> None:
    model = built(registry, strategy)
    about = model.about(IMAGES)
    about.ask(QUESTIONS[0], max_new_tokens=1)
    with torch.no_grad():
        projections(model)[0].weight.mul_(1.5)
    with projected(model) as seen:
        found = about.ask(QUESTIONS[1], max_new_tokens=3)
    assert len(seen[0]) == 1
    assert found.ids == model.ask(IMAGES, QUESTIONS[1], max_new_tokens=3).ids


@STRATEGIES
def test_what_learns_makes_them_anew(registry: Registry, strategy: str) -> None:
    model = built(registry, strategy)
    plans = [model.planner.plan(prompt_of(0, 2, answer="ab"))]
    percept = model.perceive([p.images for p in plans], [p.question for p in plans])
    with projected(model) as seen:
        for _ in range(2):
            model.engine.loss(plans, percept)
    assert all(len(sizes) > 1 for sizes in seen.values())


# -- what was picked -------------------------------------------------------------------------------


def features() -> VisualFeatures:
    values = [torch.randn(4, 6), torch.randn(2, 6), torch.randn(3, 6)]
    return VisualFeatures.pack(values, [(2, 2), (1, 2), (3, 1)], [0, 0, 1], 2, torch.randn(3, 6))


def test_picks_of_picks_know_where_their_pictures_are_from() -> None:
    whole = features()
    assert whole.picked == (whole, range(3))
    some = whole.select([1, 0, 0], [1, 1, 2])
    assert some.picked == (whole, [2, 0, 0, 1])
    fewer = some.select([2, 0])
    assert fewer.picked == (whole, [0, 1, 2])
    for image, index in zip(fewer.images, fewer.picked[1], strict=True):
        assert (image.offset, image.grid) == (
            whole.images[index].offset,
            whole.images[index].grid,
        )
    assert fewer.global_tokens is not None
    assert whole.global_tokens is not None
    assert torch.equal(fewer.global_tokens, whole.global_tokens[[0, 1, 2]])


def test_what_has_other_patches_is_picked_from_nothing() -> None:
    picked = features().select([1, 0])
    other = replace(picked, values=picked.values + 1)
    assert other.picked == (other, range(3))
    assert picked.to(dtype=torch.bfloat16).picked[0].values.dtype == torch.bfloat16


def test_something_is_made_once_unless_something_is_learned() -> None:
    whole, owner = features(), torch.nn.Linear(6, 6)
    made: list[int] = []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    with torch.no_grad():
        assert [whole.keep("x", owner, owner.parameters(), make) for _ in range(2)] == [0, 0]
        assert whole.keep("y", owner, owner.parameters(), make) == 1
        owner.bias.add_(1)
        assert whole.keep("x", owner, owner.parameters(), make) == 2
        owner.bfloat16()
        assert whole.keep("x", owner, owner.parameters(), make) == 3
        assert whole.select([1, 0]).keep("x", owner, owner.parameters(), make) == 4
    assert [whole.keep("x", owner, owner.parameters(), make) for _ in range(2)] == [5, 6]


@torch.no_grad()
def test_features_in_another_dtype_are_kept_and_those_on_another_device_are_not() -> None:
    whole = features()
    half = whole.to(dtype=torch.bfloat16)
    assert whole.to(dtype=torch.bfloat16) is half
    meta = torch.device("meta")
    assert whole.to(meta) is not whole.to(meta)
    with torch.enable_grad():
        assert whole.to(dtype=torch.bfloat16) is not half
