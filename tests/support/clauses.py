"""Runs the clauses of contracts outside pytest's own collection."""

from __future__ import annotations

from typing import Any

import torch

from ipn_core.hooks import hookimpl
from ipn_core.plugins import add_plugin, get_registry


def contract(base: type, target: type, **attributes: Any) -> Any:
    """The contract of a class, which is registered for it under a name of its own."""
    kind = base.kind
    name = f"contract-{target.__name__.lower()}"

    class Plugin:
        @hookimpl
        def register(self, registry: Any) -> None:
            getattr(registry, kind)(name, target)

    if name not in get_registry().entries(kind):
        add_plugin(get_registry(), f"{kind}-{name}", Plugin())
    return type("Contract", (base,), {"name": name, **attributes})()


def clauses(base: type) -> list[str]:
    """The names of a contract's tests."""
    return [name for name in dir(base) if name.startswith("test_")]


def check(one: Any, name: str) -> None:
    """Run a clause as pytest would."""
    if name == "test_shape_and_dtype":
        for dtype in (torch.float32, torch.bfloat16):
            one.test_shape_and_dtype(dtype)
    else:
        getattr(one, name)()
