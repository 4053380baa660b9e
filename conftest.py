"""Settings of every test: one thread each, the hub offline, and no settings of the user's.

Of these only `IPN_CACHE` stays, for it says where the real weights lie that some tests need.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before anything is imported that reads them once, and before what outlives a single test.
for _name in ("IPN_PLUGINS", "IPN_SMOLLM2"):
    os.environ.pop(_name, None)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["IPN_ATTENTION_TABLE"] = "off"

import pytest  # noqa: E402  # after the settings above
import torch  # noqa: E402

torch.set_num_threads(1)


SLOW = (
    "test_it_compiles",  # seconds a component
    "Compile",  # what breaks that clause
    "test_imports_are_cheap",  # a process a plugin, which imports torch anew
)
"""What the names of tests of slow clauses hold; these are the same for every component."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the slow clauses of the contracts."""
    for item in items:
        if any(word in item.name for word in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep what one test has set, as `ipn doctor` does in its process, out of the next."""
    monkeypatch.delenv("IPN_PLUGINS", raising=False)
    yield
    # Sums of several threads round otherwise, so that weights would differ from other processes'.
    assert torch.get_num_threads() == 1, "a test has changed the number of threads"
