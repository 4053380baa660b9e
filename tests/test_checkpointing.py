"""Gradient checkpointing that keeps the cache: the same gradients from less memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import FAMILIES, prompt_of, toy_model

from ipn_core.errors import StageError
from ipn_core.model import IPN

PROMPTS = [prompt_of(row, 1 + row % 2, answer="ab") for row in range(3)]


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside and are still held."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.bytes = 0
        # Views of weights are made inside, and hold nothing of their own.
        self._seen = {t.untyped_storage()._cdata for t in model.state_dict().values()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        # A storage's Python object is made anew each time; its implementation stays.
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return
        self._seen.add(place)
        self.bytes += size
        weakref.finalize(storage, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.bytes -= size


def gradients(model: IPN, checkpointing: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.backbone.checkpointing = checkpointing
    loss, count = model.train()(PROMPTS)
    (loss / count).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize("llm_trains", [False, True])
@pytest.mark.parametrize("strategy", ["tiny-look", "toy-both"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without(
    registry: Any, family: str, strategy: str, llm_trains: bool
) -> None:
    model = toy_model(registry, strategy, family, rounds=2)
    model.backbone.lm.requires_grad_(llm_trains)
    plain, again = gradients(model, False), gradients(model, True)
    assert plain.keys() == again.keys()
    assert any(name.startswith("backbone.") for name in plain) == llm_trains
    for name, value in plain.items():
        difference = (value - again[name]).abs().max()
        assert difference <= 1e-6 * value.abs().max(), name


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_cache_is_as_long_and_holds_the_same(registry: Any, family: str) -> None:
    model = toy_model(registry, "toy-both", family)
    plans = [model.planner.plan(prompt) for prompt in PROMPTS]
    states = []
    for checkpointing in (False, True):
        model.backbone.checkpointing = checkpointing
        percept = model.perceive([p.images for p in plans], [p.question for p in plans])
        loss, _, state = model.engine.loss(plans, percept)
        lengths = [state.cache.get_seq_length(layer) for layer in range(2)]
        loss.backward()
        assert [state.cache.get_seq_length(layer) for layer in range(2)] == lengths
        assert lengths == [state.length] * 2
        states.append(state)
    for plain, again in zip(states[0].cache.layers, states[1].cache.layers, strict=True):
        assert torch.equal(plain.keys, again.keys)
        assert torch.equal(plain.values, again.values)
        assert again.keys.requires_grad


def test_less_is_held_between_the_passes(registry: Any) -> None:
    model = toy_model(registry, "toy-both")
    held = {}
    for checkpointing in (False, True):
        model.backbone.checkpointing = checkpointing
        with Held(model) as counter:
            loss, _ = model(PROMPTS)
            held[checkpointing] = counter.bytes
        assert loss.requires_grad
        del loss
    assert held[True] < 0.5 * held[False]


def test_without_gradients_nothing_changes(registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model(registry)
    plain = model.generate([prompt_of(0, 1)], max_new_tokens=4)[0]
    model.backbone.checkpointing = True
    monkeypatch.setattr("ipn_core.checkpointing.checkpoint", None)
    assert model.generate([prompt_of(0, 1)], max_new_tokens=4)[0].text == plain.text
    assert not any("forward" in vars(layer) for layer in model.backbone.layers)


def test_layers_are_as_before_also_after_a_fault(registry: Any) -> None:
    model = toy_model(registry)
    model.backbone.checkpointing = True
    layer = model.backbone.layers[1]
    layer.forward = lambda *_, **__: 1 / 0
    mine = layer.forward
    with pytest.raises(StageError, match="failed in extend: ZeroDivisionError"):
        model(PROMPTS[:1])
    assert layer.forward is mine
    assert "forward" not in vars(model.backbone.layers[0])
