"""Faults stay inside: whatever a plugin raises, the error names it, its version and the stage."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import OddError, install, raises
from installed import installed
from pydantic import model_validator
from toys import LinearConnector, picture, toy_model, toy_registry

from ipn_core.attention import AttentionBackend, attend
from ipn_core.builtin.injectors import TokenInjector
from ipn_core.builtin.requesters import HiddenState
from ipn_core.config import Config
from ipn_core.errors import IPNError, PluginError, ShapeError, StageError
from ipn_core.hooks import hookimpl
from ipn_core.importing import Importer, find_import
from ipn_core.model import IPN
from ipn_core.plugins import KINDS, Registry, discover, get_registry
from ipn_core.stages import LayerInjector
from ipn_core.tasks import Example, Task, open_task
from ipn_core.testing.interactions import TinyLook
from ipn_core.testing.tiny import TinyEncoder, tiny_backbone


class Attends(AttentionBackend):
    name = "born-broken"

    def forward(self, inputs: Any) -> torch.Tensor:
        return inputs.q


class Asks(Task):
    def examples(self, split: str) -> list[Example]:
        return []


class Imports(Importer):
    def config(self, *arguments: Any) -> dict[str, Any]:
        return {}

    def state(self, *arguments: Any) -> dict[str, torch.Tensor]:
        return {}


FORWARD: dict[str, tuple[str, type, str, dict[str, Any]]] = {
    "encoder": ("perceiver", TinyEncoder, "encode", {"encoder": "broken-encoder"}),
    "connector": ("perceiver", LinearConnector, "connect", {"perceive": "broken-connector"}),
    "requester": ("requester", HiddenState, "forward", {"request": "broken-requester"}),
    "interaction": ("interaction", TinyLook, "forward", {"interact": "broken-interaction"}),
    "injector": ("injector", TokenInjector, "forward", {"inject": "broken-injector"}),
}
"""What can raise while a model runs: kind, a good class, the method, what names it in a config."""
STAGES = {
    "encoder": "perceive",
    "connector": "perceive",
    "requester": "request",
    "interaction": "interact",
    "injector": "inject",
}


class Layers(LayerInjector):
    """Changes nothing, before the first layer."""

    needs_message = False

    @property
    def layers(self) -> tuple[int, ...]:
        return (0,)

    def before_layer(self, hidden: torch.Tensor, context: Any) -> torch.Tensor:
        return hidden


class Narrow(Layers):
    def before_layer(self, hidden: torch.Tensor, context: Any) -> torch.Tensor:
        return hidden[..., 1:]


class NarrowConnector(LinearConnector):
    def connect(self, features: Any, context: Any) -> list[torch.Tensor]:
        return [tokens[:, 1:] for tokens in super().connect(features, context)]


class OddConfig(Config):
    @model_validator(mode="before")
    @classmethod
    def _check(cls, values: Any) -> Any:
        raise OddError("of its own")


OTHERS: dict[str, type] = {"attention": Attends, "importer": Imports, "task": Asks}


class Broken:
    """A plugin whose components raise while they run, as NAME, or already when they are built."""

    @hookimpl
    def register(self, registry: Any) -> None:
        for part, (kind, good, method, _) in FORWARD.items():
            add = getattr(registry, kind)
            add(f"broken-{part}", raises(good, method))
            add(f"born-broken-{part}", raises(good, "__init__"))
        registry.injector("broken-layers", raises(Layers, "before_layer"))
        registry.injector("narrow-layers", Narrow)
        registry.perceiver("narrow-connector", NarrowConnector)
        registry.interaction("odd-config", type("Odd", (TinyLook,), {"Config": OddConfig}))
        registry.interaction("no-stage", Layers.before_layer)
        llama = discover().get("backbone", "llama").load()
        registry.backbone("born-broken", raises(llama, "__init__"))
        for kind, good in OTHERS.items():
            getattr(registry, kind)("born-broken", raises(good, "__init__"))
        fails = raises(Attends, "forward")
        fails.name = "broken"  # type: ignore[attr-defined]
        registry.attention("broken", fails)


@pytest.fixture(scope="module")
def registry() -> Registry:
    """Everything installed, the toys, and the broken plugin."""
    return install(toy_registry(), Broken())


def config(named: dict[str, Any], **more: Any) -> dict[str, Any]:
    base = {"strategy": "tiny-look", "encoder": "tiny", "backbone": "tiny", **more}
    return {**base, "layout": {"dynamic": 3}, **named}


# -- on import -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["raise LookupError('gone')", "raise SystemExit('gone')"])
def test_what_raises_on_import_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, source: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_top.py").write_text(
        "from ipn_core import hookimpl\n@hookimpl\ndef register(registry):\n"
        f"    registry.{kind}('broken', 'broken_parts:Part')\n"
    )
    (tmp_path / "broken_parts.py").write_text(source)
    for module in ("broken_top", "broken_parts"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    registry = discover(points=[installed("broken", "broken_top")])
    assert not registry.faults
    with pytest.raises(PluginError) as caught:
        registry.get(kind, "broken").load()
    error = source.removeprefix("raise ").partition("(")[0]
    assert str(caught.value) == (
        f"{kind} 'broken' of ipn-broken 1.2 cannot be imported from 'broken_parts:Part': "
        f"{error}: gone. Reinstall or upgrade it, or leave it out with IPN_PLUGINS."
    )


# -- in the constructor ----------------------------------------------------------------------------


@pytest.mark.parametrize("part", FORWARD)
def test_a_stage_that_raises_in_its_constructor_is_named(registry: Registry, part: str) -> None:
    kind, _, _, named = FORWARD[part]
    broken = {key: f"born-{name}" for key, name in named.items()}
    with pytest.raises(PluginError) as caught:
        IPN.from_config(config(broken), backbone=tiny_backbone(), registry=registry)
    (name,) = broken.values()
    assert str(caught.value) == (
        f"{kind} '{name}' of ipn-broken 1.2 cannot be built: OddError: of its own"
    )


def test_a_backbone_that_raises_in_its_constructor_is_named(registry: Registry, llm: Path) -> None:
    broken = {"backbone": {"name": "born-broken", "weights": str(llm)}}
    said = "backbone 'born-broken' of ipn-broken 1.2 cannot be built: OddError: of its own"
    with pytest.raises(PluginError, match=said):
        IPN.from_config(config(broken), registry=registry)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("odd-config", "OddError: of its own"), ("no-stage", "AttributeError: .* 'Config'")],
)
def test_a_config_that_cannot_be_made_is_named(registry: Registry, name: str, reason: str) -> None:
    said = f"interaction '{name}' of ipn-broken 1.2 cannot be built: {reason}"
    with pytest.raises(PluginError, match=said):
        IPN.from_config(config({"interact": name}), backbone=tiny_backbone(), registry=registry)


def test_a_task_that_raises_in_its_constructor_is_named(registry: Registry) -> None:
    said = "task 'born-broken' of ipn-broken 1.2 cannot be built: OddError: of its own"
    with pytest.raises(PluginError, match=said):
        open_task("born-broken", None, registry)


def test_an_importer_that_raises_in_its_constructor_is_named(
    registry: Registry, tmp_path: Path
) -> None:
    said = "importer 'born-broken' of ipn-broken 1.2 cannot be built: OddError: of its own"
    with pytest.raises(PluginError, match=said):
        find_import(f"born-broken:{tmp_path}", registry)


# -- in forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", FORWARD)
def test_a_stage_that_raises_in_forward_is_named(registry: Registry, part: str) -> None:
    named = FORWARD[part][3]
    backbone = tiny_backbone()
    other = toy_model(registry, backbone=backbone)
    before = other.ask(picture(), "What?", max_new_tokens=4).ids
    broken = IPN.from_config(config(named), backbone=backbone, registry=registry)
    with pytest.raises(StageError) as caught:
        broken.ask(picture(), "What?", max_new_tokens=4)
    assert str(caught.value) == (
        f"stage {STAGES[part]} of plugin ipn-broken 1.2 failed: OddError: of its own"
    )
    assert isinstance(caught.value.__cause__, OddError)
    assert other.ask(picture(), "What?", max_new_tokens=4).ids == before


def test_between_the_layers_it_is_named_too(registry: Registry) -> None:
    alone = {"strategy": None, "inject": "broken-layers", "layout": {"rounds": 0, "dynamic": 0}}
    model = IPN.from_config({**config({}), **alone}, backbone=tiny_backbone(), registry=registry)
    said = "stage inject of plugin ipn-broken 1.2 failed: OddError: of its own"
    with pytest.raises(StageError, match=said):
        model.ask(picture(), "What?", max_new_tokens=1)
    assert not model.backbone.layers[0]._forward_pre_hooks


def test_an_encoder_is_named_and_not_the_connector_over_it(registry: Registry) -> None:
    over = config({"encoder": "broken-encoder", "perceive": "toy-linear"})
    model = IPN.from_config(over, backbone=tiny_backbone(), registry=registry)
    said = "stage perceive of plugin ipn-broken 1.2 failed: OddError: of its own"
    with pytest.raises(StageError, match=said):
        model.ask(picture(), "What?")


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (
            {"inject": "narrow-layers"},
            r"stage inject of plugin ipn-broken 1.2 \(Narrow\) returned \(1, \d+, 31\), "
            r"expected \(1, \d+, 32\)",
        ),
        (
            {"perceive": "narrow-connector"},
            r"stage perceive of plugin ipn-broken 1.2 \(NarrowConnector\) returned tokens of "
            r"\[\(9, 31\)\], expected \(S, 32\) for each of 1 picture",
        ),
    ],
)
def test_a_wrong_shape_is_refused_with_both_shapes(
    registry: Registry, named: dict[str, Any], said: str
) -> None:
    model = IPN.from_config(config(named), backbone=tiny_backbone(), registry=registry)
    with pytest.raises(ShapeError, match=said):
        model.ask(picture(), "What?")


def test_an_error_of_ours_is_handed_on_as_it_is(registry: Registry) -> None:
    model = toy_model(registry)
    told = IPNError("told by itself")

    def tell(*arguments: Any) -> Any:
        raise told

    model.interaction.forward = tell  # type: ignore[union-attr, method-assign]
    with pytest.raises(IPNError) as caught:
        model.ask(picture(), "What?")
    assert caught.value is told


# -- attention, which is looked up in the process's own registry ---------------------------------


@pytest.fixture
def everywhere() -> Iterator[None]:
    """The broken plugin, in this process."""
    mine = get_registry()
    before = {kind: dict(named) for kind, named in mine.components.items()}
    listed = list(mine.plugins)
    install(mine, Broken())
    yield
    mine.plugins[:] = listed
    for kind, named in before.items():
        mine.components[kind].clear()
        mine.components[kind].update(named)


@pytest.mark.usefixtures("everywhere")
def test_a_backend_that_raises_in_its_constructor_is_named() -> None:
    q = torch.zeros(1, 2, 1, 8)
    said = "attention 'born-broken' of ipn-broken 1.2 cannot be built: OddError: of its own"
    with pytest.raises(PluginError, match=said):
        attend(q, q, q, backend="born-broken")
    assert attend(q, q, q).shape == q.shape


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_backend_that_raises_in_forward_is_named_and_not_who_attends(autocast: bool) -> None:
    interact = {"name": "rvii", "width": 16, "depth": 1, "heads": 2, "backend": "broken"}
    model = toy_model(toy_registry(), "rvii", interact=interact)
    with (
        torch.autocast("cpu", enabled=autocast),
        pytest.raises(StageError) as caught,
    ):
        model.ask(picture(), "What?")
    assert str(caught.value) == (
        "attention 'broken' of plugin ipn-broken 1.2 failed: OddError: of its own"
    )
