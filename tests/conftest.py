"""What the tests of the core share."""

from __future__ import annotations

import pytest
from ipn_core.plugins import Registry
from toys import toy_registry


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Everything installed, and the toy strategies."""
    return toy_registry()
