"""On the command line, what goes wrong inside a plugin is one line that names it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, assert_refused, edit, shell

from ipn_core import hookimpl
from ipn_core.plugins import add_plugin, get_registry
from ipn_core.testing.interactions import TinyLook


class Unborn(TinyLook):
    def __init__(self, *arguments: Any) -> None:
        raise RuntimeError("no such cuda")


class Fails(TinyLook):
    def forward(self, *arguments: Any) -> Any:
        raise RuntimeError("no such cuda")


@pytest.fixture
def failing() -> Iterator[None]:
    """Interactions that raise in the constructor and in forward, in this process."""

    class Plugin:
        @hookimpl
        def register(self, registry: Any) -> None:
            registry.interaction("unborn", Unborn)
            registry.interaction("fails", Fails)

    registry = get_registry()
    plugin = add_plugin(registry, "failing", Plugin())
    yield
    registry.plugins.remove(plugin)
    for name in ("unborn", "fails"):
        del registry.components["interaction"][name]


@pytest.mark.usefixtures("failing")
def test_a_plugin_that_raises_in_its_constructor_is_named(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    edit(copied, lambda config: config.update(interact={"name": "unborn"}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(
        run, "interaction 'unborn' of failing local cannot be built: RuntimeError: no such cuda"
    )


@pytest.mark.usefixtures("failing")
def test_a_plugin_that_raises_in_forward_is_named_with_its_stage(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    edit(copied, lambda config: config.update(interact={"name": "fails"}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    said = "ipn: stage interact of plugin failing local failed: RuntimeError: no such cuda\n"
    assert (run.code, run.out, run.err) == (1, "", said)


@pytest.mark.parametrize("command", ["plugins", "doctor"])
def test_an_unknown_name_in_ipn_plugins_is_refused(command: str) -> None:
    run = shell(command, env={**os.environ, "IPN_PLUGINS": "rvi"})
    assert_refused(run, "unknown plugin in IPN_PLUGINS 'rvi'", "mean 'rvii'?", "unset it")


def test_a_name_that_ipn_plugins_may_have_left_out_says_so(home: Path, copied: Path) -> None:
    ask = ("ask", home / "scene.png", "hi", "-m")
    run = shell(*ask, copied, env={**os.environ, "IPN_PLUGINS": "film"})
    said = "IPN_PLUGINS leaves out all plugins but film."
    assert_refused(run, "unknown backbone 'llama': installed are none", said)
    run = shell(*ask, "startre", env={**os.environ, "IPN_PLUGINS": ""})
    assert_refused(run, "unknown model 'startre'", "IPN_PLUGINS leaves out all plugins.")


@pytest.mark.parametrize(
    ("value", "listed"),
    [("", ["ipn-core"]), ("film, llama", ["ipn-core", "ipn-film", "ipn-llama"])],
)
def test_ipn_plugins_limits_what_is_listed(value: str, listed: list[str]) -> None:
    run = shell("plugins", "--json", env={**os.environ, "IPN_PLUGINS": value})
    assert (run.code, run.err) == (0, "")
    assert [row["distribution"] for row in json.loads(run.out)["plugins"]] == listed
