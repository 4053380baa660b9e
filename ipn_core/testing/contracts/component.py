"""What components of every kind must do: closed configs, cheap imports."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, ClassVar

from ipn_core.config import Config
from ipn_core.errors import ConfigError
from ipn_core.plugins import Component, get_registry
from ipn_core.testing.contracts.clause import clause

__all__ = ["ComponentContract"]

_IMPORT = """
import importlib, sys
importlib.import_module(sys.argv[1])
print(*sorted(name for name in sys.argv[2].split(",") if name in sys.modules))
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
            assert not _loaded(module, "xformers"), f"'import {module}' imports xformers"
            top = module.partition(".")[0]
            heavy = _loaded(top, "torch,transformers,xformers")
            assert not heavy, f"'import {top}' imports {heavy}"


def _loaded(module: str, names: str) -> str:
    """Which of some modules an import brings into a fresh process."""
    run = subprocess.run(
        [sys.executable, "-c", _IMPORT, module, names], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"'import {module}' fails: {run.stderr.strip()[-300:]}"
    return run.stdout.strip()
