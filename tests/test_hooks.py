"""No hook without its documentation and its use."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pluggy
import pytest
from toys import picture, toy_model

from ipn_core.hooks import PROJECT, DiscoverySpec, StageSpec, hookimpl
from ipn_core.plugins import Registry, add_plugin
from ipn_core.testing import plugin

DOCS = Path(__file__).parent.parent / "docs" / "hooks.md"


def specs() -> list[Any]:
    found = []
    for holder in (DiscoverySpec, StageSpec):
        manager = pluggy.PluginManager(PROJECT)
        manager.add_hookspecs(holder)
        names = [n for n in vars(holder) if manager.parse_hookspec_opts(holder, n) is not None]
        found += [pytest.param(holder, name, id=name) for name in names]
    return found


def arguments(holder: type, name: str) -> list[str]:
    return [a for a in inspect.signature(getattr(holder, name)).parameters if a != "self"]


def test_the_hooks_are_discovery_and_the_four_stages() -> None:
    names = [param.values[1] for param in specs()]
    assert names == ["register", "perceive", "request", "interact", "inject"]


@pytest.mark.parametrize(("holder", "name"), specs())
def test_every_hook_has_a_docstring(holder: type, name: str) -> None:
    assert inspect.getdoc(getattr(holder, name))


@pytest.mark.parametrize(("holder", "name"), specs())
def test_every_hook_is_documented_with_exactly_its_arguments(holder: type, name: str) -> None:
    wanted = rf"{name}\((?:self, )?{', '.join(arguments(holder, name))}\)"
    assert re.search(wanted, DOCS.read_text()), wanted


class Witness:
    """Wraps every stage and keeps the names of what was called, with its arguments."""

    def __init__(self) -> None:
        self.called: dict[str, list[Any]] = {}

    def _saw(self, name: str, *arguments: Any) -> Any:
        self.called[name] = list(arguments)
        return (yield)

    @hookimpl(wrapper=True)
    def perceive(self, context: Any) -> Any:
        return (yield from self._saw("perceive", context))

    @hookimpl(wrapper=True)
    def request(self, context: Any) -> Any:
        return (yield from self._saw("request", context))

    @hookimpl(wrapper=True)
    def interact(self, request: Any, features: Any) -> Any:
        return (yield from self._saw("interact", request, features))

    @hookimpl(wrapper=True)
    def inject(self, message: Any, context: Any) -> Any:
        return (yield from self._saw("inject", message, context))


@pytest.mark.parametrize(("holder", "name"), specs())
def test_every_hook_is_called_with_all_its_arguments(
    registry: Any, holder: type, name: str
) -> None:
    if holder is DiscoverySpec:
        mine = Registry()
        add_plugin(mine, "tiny", plugin)
        assert "tiny" in mine.entries("perceiver")
        return
    model, witness = toy_model(registry), Witness()
    with model.observing(witness):
        model.ask(picture(), "What?", max_new_tokens=1)
    assert list(witness.called) == ["perceive", "request", "interact", "inject"]
    assert len(witness.called[name]) == len(arguments(holder, name))
    assert all(value is not None for value in witness.called[name])


def test_what_the_stages_receive_is_what_their_contexts_promise(registry: Any) -> None:
    model, witness = toy_model(registry), Witness()
    with model.observing(witness):
        model.ask(picture(), "What?", max_new_tokens=1)
    (perceived,) = witness.called["perceive"]
    assert perceived.questions == ["What?"]
    assert perceived.images[0][0].mode == "RGB"
    (asked,) = witness.called["request"]
    assert asked.hidden.shape == (1, 1, model.backbone.D_out)
    assert (list(asked.samples), asked.round, asked.layer) == ([0], 0, -1)
    request, features = witness.called["interact"]
    assert request.return_map
    assert features.batch == 1
    message, context = witness.called["inject"]
    assert message.values.shape == (1, 3, model.interaction.width)
    assert context.slots is model.slots.dynamic
