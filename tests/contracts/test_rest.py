"""The contracts of attention backends, vision encoders and backbones bite, clause by clause."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from clauses import check, clauses, contract

from ipn_core.attention.eager import Eager
from ipn_core.plugins import get_registry
from ipn_core.testing.contracts import (
    AttentionContract,
    BackboneContract,
    ContractError,
    EncoderContract,
)
from ipn_core.testing.tiny import TinyEncoder, tiny_backbone

# -- attention -------------------------------------------------------------------------------------


def backend(**body: Any) -> type:
    """A backend like `eager` but for some of its body, under the name that it is registered by."""
    number = len(get_registry().entries("attention"))
    return type(f"Own{number}", (Eager,), {"name": f"contract-own{number}", **body})


def doubled(self: Any, inputs: Any) -> Any:
    found = Eager.forward(self, inputs)
    return (2 * found[0], found[1]) if inputs.return_map else 2 * found


def one_way(self: Any, inputs: Any) -> Any:
    found = Eager.forward(self, inputs)
    # Half of the gradient is lost.
    return found if inputs.return_map else (found + found.detach()) / 2


def silent(self: Any, inputs: Any) -> Any:
    return "no"


ATTENTION = [
    ({"name": "other"}, "test_it_states_what_it_is", "`name` is 'other'"),
    ({"not_supported_reasons": silent}, "test_refusals_are_lists_of_reasons", "reasons are a str"),
    ({"forward": doubled}, "test_it_gives_what_eager_gives", "differ by"),
    ({"forward": one_way}, "test_its_gradients_are_those_of_eager", "differ by"),
]


@pytest.mark.parametrize(("body", "name", "seen"), ATTENTION)
def test_a_broken_backend_is_told_the_clause(body: Any, name: str, seen: str) -> None:
    check(contract(AttentionContract, backend()), name)
    with pytest.raises(ContractError, match=rf"(?s)clause '.*{seen}.*What to do: "):
        check(contract(AttentionContract, backend(**body)), name)


# -- vision encoders -------------------------------------------------------------------------------


class Short(TinyEncoder):
    def encode(self, images: Any) -> Any:
        return super().encode(images)[:-1]


class Batchy(TinyEncoder):
    def encode(self, images: Any) -> Any:
        found = super().encode(images)
        for one in found[1:]:
            one.values.add_(found[0].values.mean())
        return found


class Blind(TinyEncoder):
    def encode(self, images: Any) -> Any:
        found = super().encode(images)
        for one in found:
            one.values.fill_(1.0)
        return found


class Unsure(TinyEncoder):
    COUNT = count()

    @property
    def fingerprint(self) -> str:
        return f"at {next(self.COUNT)}"


class Float(TinyEncoder):
    def encode(self, images: Any) -> Any:
        return [replace(one, values=one.values.float()) for one in super().encode(images)]


class Noisy(TinyEncoder):
    def encode(self, images: Any) -> Any:
        found = super().encode(images)
        return [replace(one, values=one.values + torch.rand(())) for one in found]


class Forgets(TinyEncoder):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.offset = float(torch.randn(()))

    def encode(self, images: Any) -> Any:
        found = super().encode(images)
        return [replace(one, values=one.values + self.offset) for one in found]


ENCODERS = {
    Short: ("test_shape_and_dtype", "2 for 3 pictures"),
    Float: ("test_shape_and_dtype", "values are torch.float32, not torch.bfloat16"),
    Noisy: ("test_eval_mode_is_deterministic", "two calls in eval mode differ"),
    Forgets: ("test_state_dict_round_trip", "differ by"),
    Batchy: ("test_pictures_do_not_mix", "differ by"),
    Blind: ("test_the_picture_decides", "both are equal"),
    Unsure: ("test_its_fingerprint", "then 'at"),
}


@pytest.mark.parametrize("target", ENCODERS, ids=lambda t: t.__name__)
def test_a_broken_encoder_is_told_the_clause(target: type) -> None:
    name, seen = ENCODERS[target]
    check(contract(EncoderContract, TinyEncoder), name)
    with pytest.raises(ContractError, match=rf"(?s)clause '.*{seen}.*What to do: "):
        check(contract(EncoderContract, target), name)


# -- backbones -------------------------------------------------------------------------------------


def changed(change: Any) -> Any:
    """A contract whose backbone is a tiny one that a function has changed."""

    class Changed(BackboneContract):
        name = "llama"

        def build(self) -> Any:
            backbone = tiny_backbone("llama")
            backbone.__class__ = type("Own", (type(backbone),), dict(change))
            return backbone

    return Changed()


def forgetful(
    self: Any, embeds: Any, cache: Any, positions: Any, mask: Any, layers: Any = ()
) -> Any:
    return tiny_extend(self, embeds, self.new_cache(), positions, None, layers)


def careless(
    self: Any, embeds: Any, cache: Any, positions: Any, mask: Any, layers: Any = ()
) -> Any:
    return tiny_extend(self, embeds, cache, positions, None, layers)


tiny_extend = type(tiny_backbone("llama")).extend


def remembering(self: Any, ids: Any) -> Any:
    if not hasattr(self, "remembered"):
        self.remembered = tiny_embed(self, ids)
    return self.remembered


tiny_embed = type(tiny_backbone("llama")).embed


def single(self: Any, last: Any) -> Any:
    return self.lm.get_output_embeddings()(last)


def blended(self: Any, embeds: Any, *arguments: Any, **options: Any) -> Any:
    return tiny_extend(self, embeds + embeds[:1], *arguments, **options)


def graphless(self: Any, embeds: Any, cache: Any, *arguments: Any, **options: Any) -> Any:
    found = tiny_extend(self, embeds, cache, *arguments, **options)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
    return found


def train(self: Any, mode: bool = True) -> Any:
    self.lm.train(mode)
    return self


BACKBONES = [
    ({"D_out": property(lambda self: 7)}, "test_its_sizes", "D_out 7"),
    ({"embed": remembering}, "test_its_embeddings_are_its_callers", "later tokens"),
    ({"extend": forgetful}, "test_segments_equal_the_whole", "differ by"),
    ({"extend": careless}, "test_padding_on_the_left_changes_nothing", "differ by"),
    ({"train": train}, "test_it_stays_frozen", "train mode"),
    ({"extend": blended}, "test_order_of_the_batch", "differ by"),
    ({"extend": graphless}, "test_gradients_flow_through_the_cache", "no gradient reaches token 0"),
    ({"logits": single}, "test_shape_and_dtype", "logits are torch.bfloat16, not float32"),
    (
        {"layers": property(lambda self: list(self.lm.model.layers)[::-1])},
        "test_each_layer_can_be_changed",
        "differ by",
    ),
    (
        {"template": "{% for m in messages[:1] %}{{ m['content'] }}{% endfor %}"},
        "test_its_chat_format_shows_every_turn_once",
        "must show each once",
    ),
]


@pytest.mark.parametrize(("change", "name", "seen"), BACKBONES)
def test_a_broken_backbone_is_told_the_clause(change: Any, name: str, seen: str) -> None:
    check(changed({}), name)
    with pytest.raises(ContractError, match=rf"(?s)clause '.*{seen}.*What to do: "):
        check(changed(change), name)


# -- all -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "broken"),
    [
        (AttentionContract, {name for _, name, _ in ATTENTION}),
        (EncoderContract, {name for name, _ in ENCODERS.values()}),
        (BackboneContract, {name for _, name, _ in BACKBONES}),
    ],
)
def test_every_clause_has_a_component_that_breaks_it(base: type, broken: set[str]) -> None:
    # What all kinds have in common is broken in the tests of the stages and interactions.
    common = {"test_config_is_closed", "test_imports_are_cheap"}
    assert broken == set(clauses(base)) - common
