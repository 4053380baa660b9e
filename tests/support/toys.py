"""Toy stages and strategies, small enough to be read at a glance, and models made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import ipn_core.testing.plugin
from ipn_core.hooks import hookimpl
from ipn_core.model import IPN
from ipn_core.plugins import Registry, add_plugin, discover
from ipn_core.prompt import Prompt
from ipn_core.stages import Connector
from ipn_core.tasks import Picture
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone, tiny_picture

FAMILIES = ("llama", "llama-gqa", "vicuna", "opt", "opt-projected")
K = 3


class LinearConnector(Connector):
    """One static token a patch."""

    def __init__(self, config: Any, dims: Any, encoder: Any) -> None:
        super().__init__(config, dims, encoder)
        self.linear = nn.Linear(dims.Dv, dims.D_in)

    @property
    def static_tokens(self) -> None:
        return None

    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        tokens = self.linear(features.values)
        return [tokens[span.offset : span.offset + span.length] for span in features.images]


class ToyPlugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.perceiver("toy-linear", LinearConnector)
        registry.strategy("toy-static", {"perceive": "toy-linear", "layout": {"rounds": 0}})
        looks = {"request": "hidden-state", "interact": "tiny-look", "inject": "tokens"}
        registry.strategy("toy-both", {**looks, "perceive": "toy-linear"})


def toy_registry() -> Registry:
    """Everything installed, and the toys."""
    registry = discover()
    add_plugin(registry, "tiny", ipn_core.testing.plugin)
    add_plugin(registry, "toys", ToyPlugin())
    return registry


SMALL: dict[str, dict[str, Any]] = {"rvii": {"interact": {"width": 16, "depth": 2, "heads": 2}}}
"""What makes an installed strategy small."""


def toy_config(registry: Registry, strategy: str, rounds: int = 1, **more: Any) -> dict[str, Any]:
    layout = {"dynamic": K, "rounds": rounds} if asks(registry, strategy) else {}
    return {
        "strategy": strategy,
        "backbone": "tiny",
        "encoder": "tiny",
        "layout": {**layout, **more.pop("layout", {})},
        **SMALL.get(strategy, {}),
        **more,
    }


def asks(registry: Registry, strategy: str) -> bool:
    """Whether a strategy looks with a request."""
    return "request" in registry.get("strategy", strategy).load()


def toy_model(
    registry: Registry,
    strategy: str = "tiny-look",
    family: Any = "llama",
    *,
    rounds: int = 1,
    backbone: Any = None,
    seed: int = 0,
    **more: Any,
) -> IPN:
    """A model whose every trained number is random, the slots' included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = IPN.from_config(
            toy_config(registry, strategy, rounds, **more),
            backbone=backbone or tiny_backbone(family),
            encoder=TinyEncoder(TinyEncoderConfig()),
            registry=registry,
        )
    noise = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for value in model.trained_state().values():
            value.add_(0.2 * torch.randn(value.shape, generator=noise).to(value.device))
    return model


picture = tiny_picture
"""The grid of `TinyEncoder` follows its proportions."""


SIZES = ((24, 24), (48, 24), (24, 48))
TEXTS = ("What is it?", "And where, if anywhere, is the dog?", "Who?")


def prompt_of(row: int, images: int, turns: int = 1, answer: str | None = None) -> Prompt:
    """A prompt with pictures of several shapes between its words, over several turns."""
    prompt = Prompt(())
    shown = [picture(7 * row + i, SIZES[(row + i) % 3]) for i in range(images)]
    for turn in range(turns):
        mine = shown[turn::turns]
        words = TEXTS[(row + turn) % 3]
        content = [*mine[:1], words[:4], *mine[1:], words[4:]]
        prompt = prompt.then_user(*content)
        if turn < turns - 1:
            prompt = prompt.then_assistant("yes")
    return prompt if answer is None else prompt.then_assistant(answer, learn=True)


SIZES = [(24, 24), (48, 24), (24, 48)]


def pictures(count: int, first: int = 0) -> list[Picture]:
    """Some of the same numbered pictures, of three shapes."""

    def named(seed: int) -> Picture:
        return Picture(f"p{seed}", lambda: picture(seed, SIZES[seed % 3]))

    return [named(seed) for seed in range(first, first + count)]
