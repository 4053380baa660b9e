"""A cache that grows in place holds what transformers' own would, whoever else goes on from it."""

from __future__ import annotations

import copy
import random
import weakref
from typing import Any

import pytest
import torch
from toys import picture, toy_model
from transformers.cache_utils import DynamicLayer

from ipn_core.errors import StageError
from ipn_core.growing_cache import GrowingLayer
from ipn_core.plugins import Registry
from ipn_core.testing.tiny import tiny_backbone

HEADS, WIDTH = 2, 4


def states(count: int, rows: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    both = torch.randn(2, rows, HEADS, count, WIDTH, generator=numbers)
    return both[0], both[1]


def filled(count: int) -> GrowingLayer:
    layer = GrowingLayer()
    with torch.no_grad():
        layer.update(*states(count, seed=count))
    return layer


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


@pytest.mark.parametrize("seed", range(20))
@torch.no_grad()
def test_any_sequence_of_changes_gives_what_a_dynamic_layer_holds(seed: int) -> None:
    """Several caches that fork from each other, and change in turn, each beside a twin."""
    rng = random.Random(seed)
    pairs: list[tuple[Any, Any]] = [(GrowingLayer(), DynamicLayer())]
    for pair in pairs:
        for layer in pair:
            layer.update(*states(5))
    for step in range(120):
        mine, twin = pair = rng.choice(pairs)
        length, rows = mine.get_seq_length(), len(mine.keys)
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                new = states(rng.choice((1, 1, 1, 7, 80)), rows, seed=step)
                for layer in pair:
                    layer.update(*new)
            case 4:
                fewer = rng.randrange(length)
                for layer in pair:
                    layer.crop(-fewer)
            case 5 if len(pairs) < 6:
                pairs.append((mine.fork(), copy.copy(twin)))
            case 6:
                order = torch.tensor([rng.randrange(rows) for _ in range(rng.choice((1, 2)))])
                for layer in pair:
                    layer.batch_select_indices(order)
            case 7 if rows < 4:
                for layer in pair:
                    layer.batch_repeat_interleave(2)
                    layer.reorder_cache(torch.arange(2 * rows).flip(0))
            case 7:
                mine = copy.deepcopy(mine)
                pairs[pairs.index(pair)] = (mine, twin)
        assert all(same(one, other) for one, other in pairs)


@torch.no_grad()
def test_a_token_is_written_behind_what_is_held_and_nothing_is_moved() -> None:
    layer = filled(600)
    at = layer.keys.data_ptr()
    for step in range(30):
        layer.update(*states(1, seed=step))
    assert layer.keys.data_ptr() == at
    room = layer.keys.untyped_storage().nbytes() / (HEADS * WIDTH * 4)
    assert 630 <= room <= 600 + max(64, 600 // 16)


@torch.no_grad()
def test_forks_write_in_turn_and_one_that_comes_too_early_moves() -> None:
    layer = filled(600)
    first, early = layer.fork(), layer.fork()
    first.update(*states(3, seed=1))
    early.update(*states(3, seed=2))
    assert first.keys.data_ptr() == layer.keys.data_ptr()
    assert early.keys.data_ptr() != layer.keys.data_ptr()

    first.crop(-3)
    early.crop(-3)
    later = layer.fork()
    later.update(*states(3, seed=3))
    assert later.keys.data_ptr() == layer.keys.data_ptr()


@torch.no_grad()
def test_what_a_fork_may_hold_is_not_written_again() -> None:
    layer = filled(600)
    fork = layer.fork()
    held = fork.keys.clone()
    layer.crop(-100)
    layer.update(*states(100, seed=9))
    assert torch.equal(fork.keys, held)


@torch.no_grad()
def test_a_room_that_was_left_is_free_for_the_next_fork() -> None:
    layer = filled(600)
    fork = layer.fork()
    fork.update(*states(3, seed=1))
    fork.batch_repeat_interleave(2)  # holds tensors of its own now
    later = layer.fork()
    later.update(*states(3, seed=2))
    assert later.keys.data_ptr() == layer.keys.data_ptr()
    assert torch.equal(fork.keys[0, :, 600:], states(3, seed=1)[0][0])


def test_a_room_is_given_up_where_something_is_learned() -> None:
    layer = filled(600)
    room = weakref.ref(layer._room)
    keys, values = (t.requires_grad_() for t in states(2))
    layer.update(keys, values)
    assert room() is None


@torch.no_grad()
def test_another_dtype_is_joined_as_a_dynamic_layer_does() -> None:
    layer, twin = filled(6), DynamicLayer()
    twin.update(*states(6, seed=6))
    keys, values = (t.double() for t in states(2))
    layer.update(keys, values)
    twin.update(keys, values)
    assert layer.keys.dtype == torch.float64
    assert same(layer, twin)


def test_what_a_fork_holds_stays_also_where_inference_mode_wrote_it() -> None:
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*states(600))
    fork = layer.fork()
    held = fork.keys.clone()
    with torch.inference_mode():
        layer.crop(-100)
        layer.update(*states(100, seed=9))
    assert torch.equal(fork.keys, held)


def test_gradients_flow_as_through_a_dynamic_layer() -> None:
    mine, twin = filled(6), DynamicLayer()
    twin.update(*states(6, seed=6))
    grads = []
    for layer in (mine, twin):
        keys, values = (t.clone().requires_grad_() for t in states(2, seed=1))
        for _ in range(2):
            all_keys, all_values = layer.update(keys, values)
        (all_keys.square().sum() + (all_values**3).sum()).backward()
        grads.append((keys.grad, values.grad))
    assert same(mine, twin)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_inference_mode_wrote_can_be_gone_on_from_outside() -> None:
    layer = GrowingLayer()
    with torch.inference_mode():
        layer.update(*states(600))
    with torch.no_grad():
        layer.update(*states(2, seed=1))
    expected = [torch.cat(both, dim=2) for both in zip(states(600), states(2, seed=1), strict=True)]
    assert torch.equal(layer.keys, expected[0])
    assert torch.equal(layer.values, expected[1])


def test_only_layers_that_keep_every_position_grow_in_place() -> None:
    backbone = tiny_backbone()
    assert {type(one) for one in backbone.new_cache().layers} == {GrowingLayer}
    backbone.lm.config.sliding_window = 8
    backbone.lm.config.layer_types = ["full_attention", "sliding_attention"]
    kinds = [type(one) is GrowingLayer for one in backbone.new_cache().layers]
    assert kinds == [True, False]


def test_questions_about_a_picture_use_the_same_room_in_turn(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams, which take rooms of their own, and questions that fail are no hindrance."""
    seen: list[tuple[int, int]] = []
    update = GrowingLayer.update

    def watched(self: GrowingLayer, *args: Any, **kwargs: Any) -> Any:
        found = update(self, *args, **kwargs)
        seen.append((found[0].data_ptr(), self.get_seq_length()))
        return found

    monkeypatch.setattr(GrowingLayer, "update", watched)
    about = toy_model(registry, "static").about([picture(1)])
    places = []
    for question in ("What is it?", "And where is the dog?", "Who?"):
        seen.clear()
        about.ask(question, max_new_tokens=3)
        places.append({at for at, length in seen if length > about.prefilled})
        about.ask("Who?", max_new_tokens=3, num_beams=2)
        with monkeypatch.context() as patch:
            patch.setattr("ipn_core.finite.spoiled", lambda scores: torch.tensor(True))
            with pytest.raises(StageError):
                about.ask("Who?", max_new_tokens=3)
    assert about.prefilled > 0
    assert places[0] == places[1] == places[2]
