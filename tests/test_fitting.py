"""What does not fit is refused with the reason, also where a model is put together by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from toys import LinearConnector, picture, toy_config, toy_registry

from ipn_core.builtin.injectors import TokenInjector
from ipn_core.builtin.prefix_kv import PrefixKV
from ipn_core.builtin.requesters import HiddenState
from ipn_core.config import IPNConfig
from ipn_core.errors import ConfigError
from ipn_core.fitting import declared, sizes
from ipn_core.hooks import hookimpl
from ipn_core.model import IPN
from ipn_core.plugins import Registry, add_plugin, discover
from ipn_core.stages import Connector, Dims
from ipn_core.testing.interactions import TinyLook
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone


class Demanding(TinyLook):
    """An interaction that does not work everywhere."""

    @classmethod
    def not_supported_reasons(cls, config: Any, dims: Dims) -> list[str]:
        reasons = [] if dims.R == 2 else [f"it reads 2 request tokens, not {dims.R}"]
        return reasons if dims.looks else [*reasons, "it looks again"]


class Blurred(LinearConnector):
    """Features that are no places of the picture."""

    looks = False


class Plugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.interaction("toy-picky", Demanding)
        registry.perceiver("toy-blurred", Blurred)


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = toy_registry()
    add_plugin(registry, "toy-fitting", Plugin())
    return registry


class Parts:
    """The parts of a model that fit, to be exchanged one by one."""

    def __init__(self, registry: Registry, **layout: Any) -> None:
        values = toy_config(registry, "tiny-look", layout=layout)
        self.config = IPNConfig.resolve(values, registry, "model")
        self.backbone = tiny_backbone("llama-gqa")
        self.encoder = TinyEncoder(TinyEncoderConfig())
        self.dims = sizes(self.backbone, self.encoder, self.config.layout)
        self.requester = HiddenState(HiddenState.Config(), self.dims)
        self.asked = declared(self.dims, self.requester)
        self.interaction = TinyLook(TinyLook.Config(), self.asked)
        self.told = declared(self.asked, self.interaction)
        self.injector = TokenInjector(TokenInjector.Config(), self.told)

    def assemble(self, **others: Any) -> IPN:
        stages = {name: getattr(self, name) for name in ("requester", "interaction", "injector")}
        parts = {"perceiver": self.encoder, **stages, **others}
        return IPN(self.config, self.backbone, **parts)


def test_parts_that_fit_make_a_model(registry: Registry) -> None:
    model = Parts(registry).assemble()
    assert model.ask(picture(), "What?", max_new_tokens=1).tokens["dynamic"] == 3


def test_what_a_stage_cannot_do_is_refused_when_it_is_put_in_by_hand(registry: Registry) -> None:
    parts = Parts(registry)
    demanding = Demanding(Demanding.Config(), replace(parts.asked, R=2))
    with pytest.raises(ConfigError) as caught:
        parts.assemble(interaction=demanding)
    assert str(caught.value) == (
        "interaction 'tiny-look' (Demanding) does not fit this model: it reads 2 request tokens, "
        "not 1."
    )


def test_a_message_that_is_too_long_for_the_slots_is_refused(registry: Registry) -> None:
    parts = Parts(registry)
    longer = TinyLook(TinyLook.Config(), replace(parts.asked, K=5))
    with pytest.raises(
        ConfigError, match=r"^interaction .* \(TinyLook\) .* made for K 5, .* has K 3\.$"
    ):
        parts.assemble(interaction=longer)


@pytest.mark.parametrize(
    ("stage", "make"),
    [
        ("requester", lambda dims: HiddenState(HiddenState.Config(), dims)),
        ("interaction", lambda dims: TinyLook(TinyLook.Config(), dims)),
        ("injector", lambda dims: TokenInjector(TokenInjector.Config(), dims)),
    ],
)
def test_a_stage_that_was_made_for_other_sizes_is_refused(
    registry: Registry, stage: str, make: Any
) -> None:
    parts = Parts(registry)
    with pytest.raises(ConfigError, match=f"^{stage} .* made for D_in 9, and this model has D_in"):
        parts.assemble(**{stage: make(replace(parts.told, D_in=9))})


def test_sizes_that_a_stage_was_not_told_are_not_missed(registry: Registry) -> None:
    parts = Parts(registry)
    bare = Dims(parts.dims.Dv, 32, parts.dims.D_hidden, 32, K=3, D_request=32)
    assert parts.assemble(interaction=TinyLook(TinyLook.Config(), bare)) is not None


def test_a_connector_over_another_encoder_is_refused(registry: Registry) -> None:
    parts = Parts(registry)
    connector = LinearConnector(None, replace(parts.dims, Dv=7), parts.encoder)
    with pytest.raises(ConfigError, match=r"^perceiver .* \(LinearConnector\) .* made for Dv 7"):
        parts.assemble(perceiver=connector)


@pytest.mark.parametrize("missing", ["requester", "interaction", "injector"])
def test_a_look_needs_all_three_stages(registry: Registry, missing: str) -> None:
    with pytest.raises(
        ConfigError, match=f"layout.rounds 1 needs a requester, an .*: no {missing} was"
    ):
        Parts(registry).assemble(**{missing: None})


def test_without_a_look_a_stage_of_it_is_refused(registry: Registry) -> None:
    parts = Parts(registry)
    values = toy_config(registry, "toy-static")
    parts.config = IPNConfig.resolve(values, registry, "model")
    with pytest.raises(
        ConfigError, match=r"layout\.rounds 0 has no look at <img-q>: a requester was given"
    ):
        parts.assemble()


def test_a_stage_in_the_place_of_another_is_refused(registry: Registry) -> None:
    parts = Parts(registry)
    with pytest.raises(ConfigError, match=r"^the requester is a TinyLook, which is no Requester"):
        parts.assemble(requester=parts.interaction)


def test_looking_again_needs_slots_also_by_hand(registry: Registry) -> None:
    parts = Parts(registry, look_again=1)
    with pytest.raises(ConfigError, match=r"look_again .* \(PrefixKV\) fills no slot"):
        parts.assemble(injector=PrefixKV(PrefixKV.Config(), parts.told))


def test_what_a_stage_cannot_do_is_refused_when_a_config_names_it(registry: Registry) -> None:
    with pytest.raises(ConfigError) as caught:
        IPN.from_config(
            toy_config(registry, "tiny-look", interact="toy-picky"),
            backbone=tiny_backbone(),
            encoder=TinyEncoder(TinyEncoderConfig()),
            registry=registry,
        )
    assert str(caught.value) == (
        "interaction 'toy-picky' does not fit this model: it reads 2 request tokens, not 1."
    )


def test_what_looks_again_is_told_whether_the_features_can(registry: Registry) -> None:
    named = {"interact": "toy-picky", "layout": {"request": 2}}
    backbone, encoder = tiny_backbone(), TinyEncoder(TinyEncoderConfig())

    def build(**more: Any) -> IPN:
        config = toy_config(registry, "tiny-look", **named, **more)
        return IPN.from_config(config, backbone=backbone, encoder=encoder, registry=registry)

    assert build().interaction.dims.looks
    named["layout"] = {"request": 2}
    with pytest.raises(ConfigError, match=r"^interaction 'toy-picky' .*: it looks again\.$"):
        build(perceive="toy-blurred")
    named["layout"] = {"request": 2}
    encoder.looks = False  # type: ignore[misc]
    with pytest.raises(ConfigError, match="it looks again"):
        build(perceive="toy-linear")


# -- whatever is installed -------------------------------------------------------------------------

TINY = {"width": 16, "depth": 1, "heads": 2}
LATENTS = {"latents": 5, "depth": 1, "heads": 2, "head_width": 4}
SMALL: dict[str, dict[str, Any]] = {
    "c-abstractor": {"tokens": 4, "depth": 1, "hidden": 16},
    "gated-xattn": {"every": 1, "heads": 4, "hidden": 16},
    "latents": LATENTS,
    "layers": {"every": 1, "heads": 2, "head_width": 4, "mlp_ratio": 1},
    "lmeye": TINY,
    "prefix-kv": {"hidden": 8},
    "qformer": {**TINY, "queries": 3, "hidden": 16},
    "resampler": LATENTS,
    "rvii": TINY,
    "zoom": TINY,
}
"""What makes components small that are large by themselves."""
REFUSED = {
    ("names", "latents"),  # latents are no evidence of labels
    ("zoom", "latents"),  # and no places to look at again
}
"""Interactions, each with what it never fits."""
WHOLE = discover()
CONNECTORS = [
    name for name, one in WHOLE.entries("perceiver").items() if issubclass(one.load(), Connector)
]


@pytest.mark.slow
@pytest.mark.parametrize("injector", WHOLE.entries("injector"))
@pytest.mark.parametrize("interaction", [None, *WHOLE.entries("interaction")])
@pytest.mark.parametrize("perceiver", [None, *CONNECTORS])
def test_what_is_not_refused_when_it_is_built_runs(
    registry: Registry, perceiver: str | None, interaction: str | None, injector: str
) -> None:
    backbone, encoder = tiny_backbone("opt-projected"), TinyEncoder(TinyEncoderConfig())
    layouts: list[dict[str, int]] = [{"rounds": 0}, {"rounds": 1}, {"rounds": 2, "look_again": 1}]
    named = {"perceive": perceiver, "interact": interaction, "inject": injector}
    parts = {key: {"name": name, **SMALL.get(name, {})} for key, name in named.items() if name}
    parts |= {"request": {"name": "hidden-state"}} if interaction else {}
    built = 0
    for layout in layouts:
        config = {"backbone": "tiny", "encoder": "tiny", "layout": layout, **parts}
        try:
            model = IPN.from_config(config, backbone=backbone, encoder=encoder, registry=registry)
        except ConfigError:
            continue
        built += 1
        assert model.ask(picture(size=(48, 24)), "What?", max_new_tokens=2).ids
    if (interaction, perceiver) in REFUSED or (interaction, injector) in REFUSED:
        assert not built
    elif interaction or not WHOLE.get("injector", injector).load().needs_message:
        assert built
