"""What components of every kind must do: closed configs, cheap imports."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any, ClassVar

from ipn_core.config import Config
from ipn_core.errors import ConfigError
from ipn_core.plugins import KINDS, Component, get_registry
from ipn_core.testing.contracts.clause import clause

__all__ = ["ComponentContract"]

_IMPORT = """
import importlib, json, sys

def loaded(module):
    before = set(sys.modules)
    try:
        importlib.import_module(module)
    except BaseException as error:
        return {"fault": f"{type(error).__name__}: {error}"}
    heavy = {"torch", "transformers", "xformers"} & (set(sys.modules) - before)
    return {"heavy": sorted(heavy)}

print(json.dumps({module: loaded(module) for module in dict.fromkeys(sys.argv[1:])}))
"""


class ComponentContract:
    """Base of the contracts.

    Attributes:
        kind: "interaction", "perceiver", ...
        name: as the component is registered.
    """

    kind: ClassVar[str]
    name: ClassVar[str]

    def component(self) -> Component:
        """The registered component."""
        with clause("it is registered", "register it in the hook `register(registry)`."):
            return get_registry().get(self.kind, self.name)

    def target(self) -> Any:
        """The class, imported."""
        return self.component().load()

    def config_class(self) -> Any:
        """The class of its config, or None."""
        return self.component().load_config() or self.target().Config

    def config_fields(self) -> set[str]:
        """The options that its config has."""
        schema = self.config_class()
        return set(schema.model_fields) if schema is not None else set()

    def make(self, options: dict[str, Any], *arguments: Any) -> Any:
        """Build one as a model does."""
        schema = self.config_class()
        config = None if schema is None else schema.parse(options, f"{self.kind} {self.name}")
        return self.target()(config, *arguments)

    def test_config_is_closed(self) -> None:
        """An unknown key is refused and the near ones are named."""
        with clause(
            "the config is closed",
            "derive the config from ipn_core.Config, which is frozen and forbids unknown keys.",
        ):
            schema = self.config_class()
            if schema is None:
                return
            assert issubclass(schema, Config), f"{schema.__name__} is no ipn_core.Config"
            refused = ""
            try:
                schema.parse({"no_such_option": 1}, self.name)
            except ConfigError as error:
                refused = str(error)
            assert refused, "the unknown key 'no_such_option' was taken"
            assert "no_such_option" in refused, f"the error does not name the key: {refused}"

    def test_imports_are_cheap(self) -> None:
        """The plugin's top module imports no torch, and nothing imports xformers."""
        with clause(
            "imports are cheap",
            'register "module:Class" strings instead of importing classes in the plugin\'s top '
            "module, and import xformers only where attention runs.",
        ):
            module = self.target().__module__
            top = module.partition(".")[0]
            found = _imports(top, *_modules(self.component(), module), file=_file(top))
            for name in (top, module):
                assert "fault" not in found[name], f"'import {name}' fails: {found[name]}"
            heavy = ", ".join(found[top]["heavy"])
            assert not heavy, f"'import {top}' imports {heavy}"
            assert "xformers" not in found[module]["heavy"], f"'import {module}' imports xformers"


def _modules(component: Component, module: str) -> list[str]:
    """The modules of all that a component's plugin registers: one process then serves them all."""
    registry = get_registry()
    every = [one for kind in KINDS for one in registry.entries(kind).values()]
    targets = [one.target for one in every if one.plugin.name == component.plugin.name]
    return sorted({module, *(t.partition(":")[0] for t in targets if isinstance(t, str))})


def _file(module: str) -> str | None:
    """Where a module lies: another one of the same name is another one."""
    return getattr(sys.modules.get(module), "__file__", None)


@functools.cache
def _imports(*modules: str, file: str | None) -> dict[str, dict[str, Any]]:
    """What each of some modules brings when they are imported one after the other, or its fault."""
    run = subprocess.run(
        [sys.executable, "-c", _IMPORT, *modules], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"Python fails: {run.stderr.strip()[-300:]}"
    found: dict[str, dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return found
