"""Importing the core is cheap, and what it promises is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ipn_core

HEAVY = ("torch", "transformers", "xformers", "pydantic", "numpy", "PIL", "matplotlib")


@pytest.mark.parametrize("code", ["import ipn_core", "import ipn_core; dir(ipn_core)"])
def test_importing_the_core_imports_nothing_heavy(code: str) -> None:
    script = f"{code}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_discovery_imports_no_torch() -> None:
    script = (
        "from ipn_core.plugins import discover\nr = discover()\n"
        "assert r.entries('backbone'), r.faults\nimport sys\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize("name", ipn_core.__all__)
def test_every_exported_name_resolves(name: str) -> None:
    assert getattr(ipn_core, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ipn_core.Nothing  # noqa: B018 - looking it up is the test


def test_the_public_names_are_sorted_and_listed() -> None:
    assert ipn_core.__all__ == sorted(ipn_core.__all__) == dir(ipn_core)
