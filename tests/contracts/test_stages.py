"""The contracts of requesters, injectors and connectors bite, clause by clause."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from clauses import check, clauses, contract
from torch import nn

from ipn_core.builtin.injectors import TokenInjector, TokenInjectorConfig
from ipn_core.builtin.requesters import HiddenState, HiddenStateConfig
from ipn_core.config import Config
from ipn_core.features import VisualFeatures
from ipn_core.stages import Connector, Injection, Injector, LayerInjector, Percept, Request
from ipn_core.testing.contracts import (
    ConnectorContract,
    ContractError,
    InjectorContract,
    RequesterContract,
)


class OpenConfig(Config):
    model_config = {"extra": "allow"}  # noqa: RUF012 as a careless author writes it
    layer: int = -1
    hidden: int = 0


class ClosedConfig(Config):
    width: int = 1
    backend: str = "auto"


# -- breaks that every kind can have: each takes a good class and returns a bad one --------------


def noisy(good: type) -> type:
    return wrapped(good, lambda module, x: x + torch.randn_like(x))


def unused(good: type) -> type:
    def init(self: Any, *arguments: Any) -> None:
        good.__init__(self, *arguments)
        self.spare = nn.Linear(2, 2)

    return type("Unused", (good,), {"__init__": init})


def forgets(good: type) -> type:
    def init(self: Any, *arguments: Any) -> None:
        good.__init__(self, *arguments)
        self.offset = float(torch.randn(()))

    return type("Forgets", (wrapped(good, lambda m, x: x + m.offset),), {"__init__": init})


def compiled(good: type) -> type:
    return wrapped(good, lambda module, x: x + 1 if torch.compiler.is_compiling() else x)


def own_way(good: type) -> type:
    return wrapped(good, lambda module, x: x * (2 if module.config.backend == "sdpa" else 1))


def float_only(good: type) -> type:
    return wrapped(good, lambda module, x: x.float())


def narrow(good: type) -> type:
    return wrapped(good, lambda module, x: x[..., 1:])


def mixes(good: type) -> type:
    return wrapped(good, lambda module, x: x + x[:1])


def deaf(good: type) -> type:
    return wrapped(good, lambda module, x: x * 0 + 1)


def open_keys(good: type) -> type:
    return type("OpenKeys", (good,), {"Config": OpenConfig})


def wrapped(good: type, change: Any) -> type:
    """A class whose tensors are changed on the way out."""

    def forward(self: Any, *arguments: Any) -> Any:
        result = good.forward(self, *arguments)
        if isinstance(result, Request):
            return Request(change(self, result.values))
        return Injection(change(self, result.tokens))

    return type("Wrapped", (good,), {"forward": forward})


def miscounts(good: type) -> type:
    return type("Miscounts", (good,), {"fills": property(lambda self: 5)})


def accepts(good: type) -> type:
    return type("Accepts", (good,), {"not_supported_reasons": classmethod(lambda *_: [])})


class Between(LayerInjector):
    """Adds to a token after a look the last message that it has seen."""

    needs_message = True

    def __init__(self, config: Any, dims: Any) -> None:
        super().__init__(config, dims)
        self.map = nn.Linear(dims.Dm, dims.D_hidden[0], bias=False)

    @property
    def layers(self) -> tuple[int, ...]:
        return (0,)

    def before_layer(self, hidden: torch.Tensor, context: Any) -> torch.Tensor:
        told = self.map(context.messages.mean(2))
        last = told.gather(1, self.seen(context).expand(-1, -1, told.shape[2]))
        return hidden + last * (context.looks > 0).unsqueeze(-1)

    def seen(self, context: Any) -> torch.Tensor:
        return (context.looks - 1).clamp(min=0).unsqueeze(-1)


class Pools(Between):
    """Adds the mean of all patches, padding among them."""

    def __init__(self, config: Any, dims: Any) -> None:
        super().__init__(config, dims)
        self.look = nn.Linear(dims.Dv, dims.D_hidden[0])

    def before_layer(self, hidden: torch.Tensor, context: Any) -> torch.Tensor:
        mean = self.look(context.features.padded()[0]).mean(1, keepdim=True)
        return super().before_layer(hidden, context) + mean


class Foresees(Between):
    def seen(self, context: Any) -> torch.Tensor:
        return torch.ones_like(super().seen(context))


class Gathers(Between):
    def before_layer(self, hidden: torch.Tensor, context: Any) -> torch.Tensor:
        return super().before_layer(hidden, context) + hidden.mean(1, keepdim=True)


class Meddles(Between):
    def before_layer(self, hidden: torch.Tensor, context: Any) -> torch.Tensor:
        return super().before_layer(hidden, context) + 1


class OwnInjector(TokenInjector):
    """The core's, with an option that it does not need."""

    class Config(TokenInjectorConfig):
        backend: str = "auto"


class OwnRequester(HiddenState):
    """A hidden state through a linear map."""

    class Config(HiddenStateConfig):
        backend: str = "auto"

    def __init__(self, config: Any, dims: Any) -> None:
        super().__init__(config, dims)
        self.map = nn.Linear(super().width, super().width)

    def forward(self, context: Any) -> Request:
        return Request(self.map(context.hidden))


def nowhere(good: type) -> type:
    return type("Nowhere", (good,), {"layer": property(lambda self: 7)})


COMMON = {
    "test_shape_and_dtype": (float_only, "torch.float32, not torch.bfloat16"),
    "test_every_parameter_learns": (unused, "'spare.weight' gets no gradient"),
    "test_eval_mode_is_deterministic": (noisy, "two calls in eval mode differ"),
    "test_state_dict_round_trip": (forgets, "differ by"),
    "test_it_compiles": (compiled, "differ by"),
    "test_attention_backends_agree": (own_way, "differ by"),
    "test_order_of_the_batch": (mixes, "differ by"),
    "test_config_is_closed": (open_keys, "'no_such_option' was taken"),
}
BREAKS: dict[type, tuple[type, dict[str, tuple[Any, str]]]] = {
    RequesterContract: (OwnRequester, {**COMMON, "test_its_layer_exists": (nowhere, "IndexError")}),
    InjectorContract: (
        OwnInjector,
        {
            **COMMON,
            "test_what_is_injected_decides": (deaf, "tokens: both are equal"),
            "test_it_is_refused_where_it_cannot_work": (accepts, "no reason against no message"),
        },
    ),
}
CASES = [(base, name) for base, (_, breaks) in BREAKS.items() for name in breaks]


@pytest.mark.parametrize(("base", "name"), CASES)
def test_a_good_stage_keeps_the_clause(base: type, name: str) -> None:
    check(contract(base, BREAKS[base][0]), name)


@pytest.mark.parametrize(("base", "name"), CASES)
def test_a_broken_stage_is_told_the_clause_and_the_mend(base: type, name: str) -> None:
    good, breaks = BREAKS[base]
    breaking, seen = breaks[name]
    target = type(f"{breaking.__name__}{good.__name__}", (breaking(good),), {})
    with pytest.raises(ContractError, match=rf"(?s)clause '.*{seen}.*What to do: "):
        check(contract(base, target), name)


@pytest.mark.parametrize("base", BREAKS)
def test_every_clause_has_a_stage_that_breaks_it(base: type) -> None:
    # Imports are the same clause for all kinds; the interactions' tests break it.
    elsewhere = {"test_imports_are_cheap"} | {name for name, _ in BETWEEN.values()}
    assert set(BREAKS[base][1]) == set(clauses(base)) - elsewhere


# -- between the layers ----------------------------------------------------------------------------

BETWEEN = {
    Pools: ("test_padding_cannot_leak", "differ by"),
    Foresees: ("test_what_comes_later_stays_unseen", "differ by"),
    Meddles: ("test_what_comes_later_stays_unseen", "differ by"),
    Gathers: ("test_a_token_alone_is_as_among_others", "differ by"),
}


@pytest.mark.parametrize(
    "name",
    # It attends to nothing, and lives in this test module, which no fresh process can import.
    sorted(
        {*clauses(InjectorContract)} - {"test_attention_backends_agree", "test_imports_are_cheap"}
    ),
)
def test_a_good_layer_injector_keeps_every_clause(name: str) -> None:
    check(contract(InjectorContract, Between), name)


@pytest.mark.parametrize("target", BETWEEN, ids=lambda t: t.__name__)
def test_a_broken_layer_injector_is_told_the_clause_and_the_mend(target: type) -> None:
    name, seen = BETWEEN[target]
    with pytest.raises(ContractError, match=rf"(?s)clause '.*{seen}.*What to do: "):
        check(contract(InjectorContract, target), name)


def test_a_requester_may_say_that_it_borrows() -> None:
    good = OwnRequester
    target = type("Borrows", (mixes(good),), {})
    check(contract(RequesterContract, target, borrows=True), "test_order_of_the_batch")


def test_an_injector_that_takes_a_message_longer_than_its_slots_is_told() -> None:
    base = vars(Injector)["not_supported_reasons"]
    target = type("Longer", (TokenInjector,), {"not_supported_reasons": base})
    said = r"it cannot work'.*a message of 5 tokens, and fails: .*What to do: return a reason"
    with pytest.raises(ContractError, match=f"(?s){said}"):
        check(contract(InjectorContract, target), "test_it_is_refused_where_it_cannot_work")


def test_an_injector_that_miscounts_its_slots_is_told() -> None:
    target = type("Five", (miscounts(TokenInjector),), {})
    with pytest.raises(ContractError, match=r"tokens: the shape is \(4, 3, 28\), expected"):
        check(contract(InjectorContract, target), "test_shape_and_dtype")


# -- connectors ------------------------------------------------------------------------------------


class Linear(Connector):
    """One token a patch."""

    Config = ClosedConfig

    def __init__(self, config: Any, dims: Any, encoder: Any) -> None:
        super().__init__(config, dims, encoder)
        self.linear = nn.Linear(dims.Dv, dims.D_in)

    @property
    def static_tokens(self) -> int | None:
        return None

    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        tokens = self.linear(features.values)
        return [tokens[s.offset : s.offset + s.length] for s in features.images]


class Float(Linear):
    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        return [t.float() for t in super().connect(features, context)]


class Miscounts(Linear):
    static_tokens = 3


class Spare(Linear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.spare = nn.Linear(2, 2)


class Noise(Linear):
    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        return [t + torch.randn_like(t) for t in super().connect(features, context)]


class Loses(Linear):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.offset = float(torch.randn(()))

    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        return [t + self.offset for t in super().connect(features, context)]


class Compiles(Linear):
    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        more = 1 if torch.compiler.is_compiling() else 0
        return [t + more for t in super().connect(features, context)]


class Blends(Linear):
    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        mean = self.linear(features.values).mean(0)
        return [t + mean for t in super().connect(features, context)]


class Confuses(Linear):
    """Takes every picture for one of the first sample."""

    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        asked = len(context.questions[0])
        return [asked * t for t in super().connect(features, context)]


class OwnWay(Linear):
    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        scale = 2.0 if self.config.backend == "sdpa" else 1.0
        return [scale * t for t in super().connect(features, context)]


class Splits(Linear):
    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        lengths = [s.length for s in features.images]
        return list(self.linear(features.values).split(lengths))


class Blind(Linear):
    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        return [t[:1] * 0 + 1 for t in super().connect(features, context)]


class OpenConnector(Linear):
    Config = OpenConfig


CONNECTORS = {
    Float: ("test_shape_and_dtype", "torch.float32, not torch.bfloat16"),
    Miscounts: ("test_shape_and_dtype", "6 tokens, `static_tokens` says 3"),
    Spare: ("test_every_parameter_learns", "'spare.weight' gets no gradient"),
    Noise: ("test_eval_mode_is_deterministic", "two calls in eval mode differ"),
    Loses: ("test_state_dict_round_trip", "differ by"),
    Compiles: ("test_it_compiles", "differ by"),
    Blends: ("test_pictures_do_not_mix", "differ by"),
    Confuses: ("test_order_of_the_batch", "differ by"),
    Splits: ("test_samples_may_share_a_picture", "split_sizes"),
    OwnWay: ("test_attention_backends_agree", "differ by"),
    Blind: ("test_the_picture_decides", "they are equal"),
    OpenConnector: ("test_config_is_closed", "'no_such_option' was taken"),
}


@pytest.mark.parametrize("name", sorted({name for name, _ in CONNECTORS.values()}))
def test_a_good_connector_keeps_the_clause(name: str) -> None:
    check(contract(ConnectorContract, Linear), name)


@pytest.mark.parametrize("target", CONNECTORS, ids=lambda t: t.__name__)
def test_a_broken_connector_is_told_the_clause_and_the_mend(target: type) -> None:
    name, seen = CONNECTORS[target]
    with pytest.raises(ContractError, match=rf"(?s)clause '.*{seen}.*What to do: "):
        check(contract(ConnectorContract, target), name)


def test_every_clause_has_a_connector_that_breaks_it() -> None:
    broken = {name for name, _ in CONNECTORS.values()}
    assert broken == set(clauses(ConnectorContract)) - {"test_imports_are_cheap"}


class Pooled(Linear):
    """No tokens: the features of a picture are the mean of its patches."""

    static_tokens = 0

    def forward(self, context: Any) -> Percept:
        seen = context.features
        means = [self.pooled(seen.values[s.offset : s.offset + s.length]) for s in seen.images]
        samples = [span.sample for span in seen.images]
        return Percept(VisualFeatures.pack(means, [(1, 1)] * len(means), samples, seen.batch))

    def pooled(self, patches: torch.Tensor) -> torch.Tensor:
        return self.own(patches.mean(0, keepdim=True))

    def __init__(self, config: Any, dims: Any, encoder: Any) -> None:
        super().__init__(config, dims, encoder)
        self.own = nn.Linear(dims.Dv, dims.Dv)
        del self.linear


class Narrows(Pooled):
    def pooled(self, patches: torch.Tensor) -> torch.Tensor:
        return super().pooled(patches)[:, 1:]


class Sums(Pooled):
    def forward(self, context: Any) -> Percept:
        percept = super().forward(context)
        values = percept.features.values
        return Percept(replace(percept.features, values=values + values.sum(0)))


@pytest.mark.parametrize("name", sorted({name for name, _ in CONNECTORS.values()}))
def test_a_connector_that_makes_features_keeps_the_clause(name: str) -> None:
    check(contract(ConnectorContract, Pooled), name)


@pytest.mark.parametrize(
    ("target", "name", "seen"),
    [
        (Narrows, "test_shape_and_dtype", "19 wide, not 20"),
        (Sums, "test_pictures_do_not_mix", "differ by"),
    ],
)
def test_a_connector_that_makes_bad_features_is_told(target: type, name: str, seen: str) -> None:
    with pytest.raises(ContractError, match=seen):
        check(contract(ConnectorContract, target), name)
