"""Discovery: which components are installed, from which distribution, and what failed.

Every distribution with an entry point in group `ipn` is a plugin. Its `register(registry)` hook
adds components by name; a component may be given as a string `"module:Class"`, so that listing
names imports nothing. A plugin that fails is reported and never takes the others down.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

import ipn_core
from ipn_core import patience
from ipn_core.errors import (
    IPNError,
    PluginError,
    UnknownNameError,
    UserError,
    near,
    unknown_name,
)
from ipn_core.faults import naming
from ipn_core.hooks import PROJECT, DiscoverySpec
from ipn_core.patience import GivenUpError, Watched

__all__ = [
    "KINDS",
    "Component",
    "Fault",
    "Plugin",
    "Registry",
    "chosen",
    "discover",
    "get_registry",
    "identify",
    "same_name",
]

KINDS = (
    "attention",
    "backbone",
    "importer",
    "injector",
    "interaction",
    "objective",
    "perceiver",
    "requester",
    "strategy",
    "task",
    "weights",
)
"""The kinds of component; each is also the name of the registry's method that adds one."""


@dataclass(frozen=True, slots=True)
class Component:
    """One registered name.

    Attributes:
        kind: one of `KINDS`.
        name: what configs and the command line call it.
        target: the class or object, or `"module:attribute"`, imported on first use.
        config: its config class or `"module:Class"`, or None where it takes none.
        plugin: the plugin that registered it.
    """

    kind: str
    name: str
    target: Any
    config: Any
    plugin: Plugin

    @property
    def label(self) -> str:
        """Return "interaction 'rvii' of plugin ipn-rvii 0.1.0" for messages."""
        return f"{self.kind} '{self.name}' of plugin {self.plugin.label}"

    def load(self) -> Any:
        """Import and return the target.

        Raises:
            PluginError: the import failed; the text names the plugin and its version.
        """
        return self._resolve(self.target)

    def load_config(self) -> Any:
        """Import and return the config class, or None."""
        return self._resolve(self.config)

    def _resolve(self, target: Any) -> Any:
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (Exception, GeneratorExit, SystemExit) as error:
            raise PluginError(
                f"{self.kind} '{self.name}' of {self.plugin.label} cannot be imported from "
                f"'{target}': {type(error).__name__}: {error}. Reinstall or upgrade it, or leave "
                f"it out with IPN_PLUGINS."
            ) from error
        return found

    @contextmanager
    def building(self) -> Iterator[None]:
        """Name the plugin in whatever goes wrong while the block builds this component.

        Raises:
            PluginError: anything but an `IPNError`, which speaks for itself, was raised.
        """
        try:
            yield
        except IPNError:
            raise
        except (Exception, GeneratorExit, SystemExit) as error:
            raise PluginError(
                f"{self.kind} '{self.name}' of {self.plugin.label} cannot be built: "
                f"{type(error).__name__}: {error}"
            ) from error

    def running(self, method: str) -> AbstractContextManager[None]:
        """Name the plugin in whatever goes wrong while the block runs a method of what was built.

        Raises:
            StageError: see `ipn_core.faults.naming`.
        """
        return naming(lambda: self.label, method)


@dataclass(frozen=True, slots=True)
class Plugin:
    """An installed plugin: the entry point's name and the distribution it came from."""

    name: str
    distribution: str
    version: str

    @property
    def label(self) -> str:
        """Return "ipn-rvii 0.1.0" for messages."""
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, slots=True)
class Fault:
    """What went wrong with a plugin."""

    plugin: Plugin
    reason: str


class Registry:
    """The components by kind and name, with the plugins that brought them and their faults."""

    def __init__(self) -> None:
        self.components: dict[str, dict[str, Component]] = {kind: {} for kind in KINDS}
        self.plugins: list[Plugin] = []
        self.faults: list[Fault] = []

    def entries(self, kind: str) -> dict[str, Component]:
        """Return the components of a kind by name."""
        return self.components[kind]

    def get(self, kind: str, name: str) -> Component:
        """Return one component.

        Raises:
            UnknownNameError: no plugin registered that name; the text lists those there are.
        """
        found = self.components[kind].get(name)
        if found is None:
            said = str(unknown_name(kind, name, self.components[kind], "ipn plugins"))
            others = [other for other in KINDS if name in self.components[other]]
            if others:
                named = (f"{'an' if other[0] in 'aeiou' else 'a'} {other}" for other in others)
                said += f" '{name}' is the name of {' and of '.join(named)}."
            raise UnknownNameError(said)
        return found

    def of(self, plugin: Plugin) -> Iterator[Component]:
        """Yield the components that a plugin registered."""
        for by_name in self.components.values():
            yield from (c for c in by_name.values() if c.plugin == plugin)


class Registrar:
    """What `register(registry)` receives: one method per kind, on behalf of one plugin.

    Components are collected here and added only when the whole hook has succeeded, so that a
    plugin that fails half-way leaves nothing behind.
    """

    def __init__(self, registry: Registry, plugin: Plugin) -> None:
        self._registry = registry
        self._plugin = plugin
        self.added: list[Component] = []
        self.refused: list[str] = []

    def __getattr__(self, kind: str) -> Callable[..., None]:
        if kind not in KINDS:
            raise AttributeError(f"the registry has no kind '{kind}': it has {', '.join(KINDS)}")

        def add(name: str, target: Any, config: Any = None) -> None:
            mine = any(c.kind == kind and c.name == name for c in self.added)
            holder = self._registry.components[kind].get(name)
            if holder is not None or mine:
                owner = holder.plugin.label if holder else self._plugin.label
                self.refused.append(f"{kind} '{name}' is already taken by {owner}")
                return
            self.added.append(Component(kind, name, target, config, self._plugin))

        return add


CORE = EntryPoint("core", "ipn_core.builtin", PROJECT)
"""The core's own components; they go through the same hook, and `IPN_PLUGINS` cannot drop them."""


@dataclass
class _Discovery:
    registry: Registry = field(default_factory=Registry)
    names: list[str] = field(default_factory=list)

    def run(self, points: Sequence[EntryPoint]) -> Registry:
        self.names = [point.name for point in points]
        holders: dict[str, Plugin] = {}
        for point in (CORE, *points):
            plugin = identify(point)
            self.registry.plugins.append(plugin)
            if (holder := holders.setdefault(plugin.name, plugin)) is not plugin:
                self._fault(plugin, same_name(plugin.name, holder.label))
            module = self._try(plugin, point.load, "import failed: ")
            if module is not _FAILED:
                self.register(plugin, module)
        return self.registry

    def register(self, plugin: Plugin, module: ModuleType | object) -> None:
        registrar = Registrar(self.registry, plugin)
        called = self._try(plugin, lambda: _call_hook(plugin, module, registrar))
        if called is _FAILED:
            return
        if not called:
            self._fault(plugin, "it has no `@hookimpl def register(registry)`")
        for component in registrar.added:
            self.registry.components[component.kind][component.name] = component
        for reason in registrar.refused:
            self._fault(plugin, reason)

    def _try(self, plugin: Plugin, call: Callable[[], Any], told: str = "") -> Any:
        """Call something of a plugin, and make a fault of whatever it raises, of its own accord."""
        others = ",".join(dict.fromkeys(name for name in self.names if name != plugin.name))
        advice = f"To leave it out, set IPN_PLUGINS='{others}'."
        with Watched(f"plugin {plugin.label}", advice) as watched:
            try:
                return call()
            except GivenUpError:
                self._fault(plugin, f"it took longer than {patience.LIMIT_S:g} s to import")
            except BaseException as error:
                if watched.signalled:
                    raise
                self._fault(plugin, f"{told}{type(error).__name__}: {error}")
        return _FAILED

    def _fault(self, plugin: Plugin, reason: str) -> None:
        self.registry.faults.append(Fault(plugin, reason))


_FAILED = object()


def _call_hook(plugin: Plugin, module: ModuleType | object, registrar: Registrar) -> bool:
    """Let a plugin register what it brings; returns whether it has the hook at all."""
    # A manager of its own for each plugin: one that raises cannot stop the next one.
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(DiscoverySpec)
    manager.register(module, name=plugin.name)
    manager.check_pending()
    if not manager.hook.register.get_hookimpls():
        return False
    manager.hook.register(registry=registrar)
    return True


def same_name(name: str, holder: str) -> str:
    """Say what is wrong with a plugin whose entry point is called as another's."""
    return f"its entry point has the name of that of {holder}, '{name}', and one must be renamed"


def _origin(point: EntryPoint) -> tuple[str, str]:
    """The distribution of an entry point and its version."""
    if point is CORE:
        return "ipn-core", ipn_core.__version__
    return (point.dist.name, point.dist.version) if point.dist else (point.value, "unknown")


def identify(point: EntryPoint) -> Plugin:
    """Return the plugin that an entry point belongs to, without importing it."""
    return Plugin(point.name, *_origin(point))


def chosen(only: str | None, points: Iterable[EntryPoint] | None = None) -> list[EntryPoint]:
    """Return the entry points of the plugins to load, in the order in which they are loaded.

    Args:
        only: names separated by commas; an empty text loads none, None loads all.
        points: to choose among, by default all that are installed.

    Raises:
        UnknownNameError: a name is none of theirs.
    """
    found = entry_points(group=PROJECT) if points is None else points
    found = sorted(found, key=lambda p: (p.name, p.dist.name if p.dist else ""))
    if only is None:
        return found
    names = {name.strip() for name in only.split(",") if name.strip()}
    known = {point.name for point in found}
    if unknown := sorted(names - known):
        raise UnknownNameError(
            f"unknown plugin in IPN_PLUGINS '{unknown[0]}': installed are "
            f"{', '.join(sorted(known)) or 'none'}{near(unknown[0], known)}. Name installed ones, "
            "or unset it to load all."
        )
    return [point for point in found if point.name in names]


def discover(only: str | None = None, points: Iterable[EntryPoint] | None = None) -> Registry:
    """Load plugins and return what they registered; see `chosen` for which."""
    return _Discovery().run(chosen(only, points))


@cache
def get_registry() -> Registry:
    """Return the process-wide registry, filled on the first call; `IPN_PLUGINS` limits it."""
    return discover(os.environ.get("IPN_PLUGINS"))


def add_plugin(registry: Registry, name: str, module: object) -> Plugin:
    """Register a module or object by hand, for tests and notebooks.

    Raises:
        UserError: the plugin is faulty; the text holds the reasons.
    """
    plugin = Plugin(name, name, "local")
    before = len(registry.faults)
    registry.plugins.append(plugin)
    _Discovery(registry).register(plugin, module)
    faults = registry.faults[before:]
    if faults:
        raise UserError(f"plugin '{name}': " + "; ".join(f.reason for f in faults) + ".")
    return plugin
