"""Slots are filled in place where nothing is learned, and with what training puts there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import FAMILIES, prompt_of, toy_model

from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.stages import Percept
from ipn_core.testing.tiny import tiny_backbone

Laid = tuple[list[Any], Percept, dict[int, Tensor]]


class Allocations(TorchDispatchMode):
    """Collects the sizes in bytes of tensors that get memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        held = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **kwargs)
        made = {_place(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
        self.bytes += [t.untyped_storage().nbytes() for at, t in made.items() if at not in held]
        return out


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def allocated() -> Iterator[list[int]]:
    with Allocations() as mode:
        yield mode.bytes


@torch.no_grad()
def laid_out(model: IPN, rows: int = 3) -> Laid:
    """The segments of some ragged prompts, what they show, and messages for their slots."""
    plans = [model.planner.plan(prompt_of(row, 1 + row % 2)) for row in range(rows)]
    percept = model.perceive([p.images for p in plans], [p.question for p in plans])
    segments, _ = model.engine._segments(plans, percept, None)
    fills = 0 if model.injector is None else model.injector.fills
    messages = torch.randn(rows, fills, model.backbone.D_in)
    return segments, percept, dict(enumerate(messages.to(model.backbone.dtype)))


def filled_in_place(model: IPN, laid: Laid) -> list[Tensor]:
    segments, percept, messages = laid
    with torch.no_grad():
        return [model.engine._embed(one, percept, messages) for one in segments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("strategy", ["toy-both", "static", "rvii"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_filled_in_place_is_what_training_fills(
    registry: Registry, family: Any, strategy: str, dtype: torch.dtype
) -> None:
    backbone = tiny_backbone(family)
    backbone.lm.to(dtype)
    model = toy_model(registry, strategy, family, backbone=backbone, rounds=2)
    words = model.backbone.words.clone()
    laid = laid_out(model)
    segments, percept, messages = laid
    slots = 0
    for segment, found in zip(segments, filled_in_place(model, laid), strict=True):
        slots += len(segment.statics) + len(segment.dynamics) + len(segment.looks)
        learned = model.engine._embed(segment, percept, messages)
        assert learned.requires_grad or not (segment.statics or segment.looks)
        assert found.dtype == dtype
        assert torch.equal(found, learned)
    assert slots
    assert torch.equal(model.backbone.words, words)


@pytest.mark.parametrize("strategy", ["toy-both", "static", "rvii"])
def test_filling_in_place_allocates_nothing_beside_the_lookup(
    registry: Registry, strategy: str
) -> None:
    model = toy_model(registry, strategy, rounds=2)
    laid = laid_out(model)
    filled_in_place(model, laid)
    with allocated() as mine:
        found = filled_in_place(model, laid)
    assert sorted(mine) == sorted(one.nbytes for one in found)


def test_a_copy_would_be_noticed(registry: Registry) -> None:
    model = toy_model(registry, "toy-both", rounds=2)
    segments, percept, messages = laid_out(model)
    with allocated() as made:
        found = [model.engine._embed(one, percept, messages) for one in segments]
    assert len(made) > len(found)
    assert sum(made) >= 2 * sum(one.nbytes for one in found)


@pytest.mark.parametrize("how", ["a part of something", "one row for all"])
def test_what_does_not_belong_to_the_caller_alone_is_not_written_to(
    registry: Registry, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(registry, "toy-both")
    laid = laid_out(model)
    expected = filled_in_place(model, laid)
    plain = model.backbone.embed
    shared: list[Tensor] = []

    def embed(ids: Tensor) -> Tensor:
        if how == "one row for all":
            shared.append(plain(ids[:1]))
            return shared[-1].expand(len(ids), -1, -1)
        shared.append(torch.cat([plain(ids), plain(ids)]))
        return shared[-1][: len(ids)]

    monkeypatch.setattr(model.backbone, "embed", embed)
    found = filled_in_place(model, laid)
    before = [plain(segment.ids) for segment in laid[0]]
    for held, words in zip(shared, before, strict=True):
        assert torch.equal(held[0], words[0])
    if how != "one row for all":
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
