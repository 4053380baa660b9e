"""What the contracts' tests register is gone after each of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ipn_core.plugins import get_registry


@pytest.fixture(autouse=True)
def _own_names() -> Iterator[None]:
    registry = get_registry()
    components = {kind: dict(named) for kind, named in registry.components.items()}
    plugins = list(registry.plugins)
    yield
    registry.plugins[:] = plugins
    for kind, named in components.items():
        registry.components[kind].clear()
        registry.components[kind].update(named)
