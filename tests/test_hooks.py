"""No hook without its documentation and its use."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pluggy
import pytest
from toys import picture, toy_model

from ipn_core.hooks import PROJECT, DiscoverySpec, StageSpec, hookimpl, hookspec
from ipn_core.plugins import KINDS, Registrar, Registry, add_plugin
from ipn_core.stages import Percept
from ipn_core.testing import plugin

PAGE = (Path(__file__).parent.parent / "docs" / "hooks.md").read_text(encoding="utf-8")


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


def documented(holder: type, name: str, page: str) -> bool:
    """Whether a page has a heading or an item for a hook, with exactly what it takes and returns.

    An example alone, in a block of code, is no documentation.
    """
    prose = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    result = inspect.signature(getattr(holder, name)).return_annotation
    returns = "" if result in (None, "None") else f" -> {result}"
    wanted = re.escape(f"`{name}({', '.join(arguments(holder, name))}){returns}`")
    return re.search(rf"^(?:#+ .*{wanted}$|- {wanted}: \S)", prose, re.MULTILINE) is not None


def test_the_hooks_are_discovery_and_the_four_stages() -> None:
    names = [param.values[1] for param in specs()]
    assert names == ["register", "perceive", "request", "interact", "inject"]


@pytest.mark.parametrize(("holder", "name"), specs())
def test_every_hook_has_a_docstring(holder: type, name: str) -> None:
    assert inspect.getdoc(getattr(holder, name))


@pytest.mark.parametrize(("holder", "name"), specs())
def test_every_hook_is_documented_with_exactly_its_arguments(holder: type, name: str) -> None:
    assert documented(holder, name, PAGE)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_component_is_documented(kind: str) -> None:
    rows = re.findall(r"^\| (`.*?) \| \S.* \| \S.* \|$", PAGE, re.MULTILINE)
    assert f"`{kind}`" in {name for row in rows for name in row.split(", ")}


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


def call(holder: type, name: str, registry: Any) -> None:
    """Have a hook called as users have it, and look at what it was given."""
    if name == "register":
        given: list[Any] = []
        mine = Registry()
        add_plugin(mine, "tiny", Registers(given))
        assert [type(one) for one in given] == [Registrar]
        assert "tiny" in mine.entries("perceiver")
        return
    model, witness = toy_model(registry), Witness()
    with model.observing(witness):
        model.ask(picture(), "What?", max_new_tokens=1)
    assert list(witness.called) == ["perceive", "request", "interact", "inject"]
    assert len(witness.called[name]) == len(arguments(holder, name))
    assert all(value is not None for value in witness.called[name])


class Registers:
    """Keeps what it is given, and hands it on to the plugin of the tiny components."""

    def __init__(self, given: list[Any]) -> None:
        self.given = given

    @hookimpl
    def register(self, registry: Any) -> None:
        self.given.append(registry)
        plugin.register(registry)


@pytest.mark.parametrize(("holder", "name"), specs())
def test_every_hook_is_called_with_all_its_arguments(
    registry: Any, holder: type, name: str
) -> None:
    call(holder, name, registry)


@pytest.mark.parametrize("base", [DiscoverySpec, StageSpec])
def test_a_hook_without_documentation_or_test_would_be_found(registry: Any, base: type) -> None:
    class More(base):  # type: ignore[misc, valid-type]
        @hookspec
        def blink(self, context: Any, times: int) -> Percept:
            """Blink."""

    said = "`blink(context, times) -> Percept`"
    assert documented(More, "blink", f"{PAGE}\n- {said}: it blinks.")
    assert documented(More, "blink", f"{PAGE}\n## Blinking: {said}\n")
    for page in (
        PAGE,
        f"{PAGE}\nSomewhere {said} is mentioned.",
        f"{PAGE}\n```python\n- {said}: it blinks.\n```\n",
        f"{PAGE}\n- `blink(context) -> Percept`: it blinks.",
        f"{PAGE}\n- `blink(context, times) -> Request`: it blinks.",
    ):
        assert not documented(More, "blink", page)
    with pytest.raises(KeyError, match="blink"):
        call(More, "blink", registry)


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
