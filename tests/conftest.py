"""What the tests of the core share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from lessons import save_llm
from toys import toy_registry

from ipn_core.attention import choice
from ipn_core.plugins import Registry


@pytest.fixture(scope="session")
def registry() -> Registry:
    """Everything installed, and the toy strategies."""
    return toy_registry()


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny language model."""
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def small_interaction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the models of benchmarks an interaction of a few weights."""
    small = {"name": "rvii", "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2}
    monkeypatch.setattr("ipn_core.benchmarking.engine.subjects.INTERACT", small)


@pytest.fixture
def own_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train as a process of its own would: with empty caches, and in whatever precision."""
    monkeypatch.setenv("IPN_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let `auto` go by a table, which no test has written before this one."""
    monkeypatch.setenv("IPN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(choice.SWITCH)
    choice.forget()
    yield
    choice.forget()
