"""Settings of every test: one thread each, no network, and no settings of the user's."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the developer has set in the environment out of the tests."""
    monkeypatch.delenv("IPN_PLUGINS", raising=False)
