"""`ipn plugins` lists each distribution; pip takes one away, and nothing else goes with it."""

from __future__ import annotations

import json

import pytest
from catalogue import CATALOGUE, MEMBERS
from layered import Environment

from ipn_core.scaffold.package import write_package

KINDS = ("interaction", "task")


def plugins(environment: Environment) -> dict[str, dict[str, object]]:
    """What `ipn plugins --json` lists, by distribution."""
    listed = json.loads(environment.ipn("plugins", "--json"))["plugins"]
    return {row["distribution"]: row for row in listed}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """Two packages of `ipn new`, installed beside everything else."""
    folder = tmp_path_factory.mktemp("uninstalling")
    made = Environment(folder / "venv")
    packages = [str(write_package(kind, f"gone-{kind}", folder)[1]) for kind in KINDS]
    made.pip("install", "--no-deps", "--no-build-isolation", "--no-index", *packages)
    return made


@pytest.mark.slow
def test_uninstalling_one_removes_exactly_it(environment: Environment) -> None:
    before = plugins(environment)
    for strategy, distribution in CATALOGUE.items():
        components: dict[str, list[str]] = before[distribution]["components"]  # type: ignore[assignment]
        assert components["strategy"] == [strategy]
    assert {"ipn-core", *MEMBERS} <= set(before)
    assert before["ipn-gone-task"]["components"] == {"task": ["gone-task"]}
    assert not any(row["faults"] for row in before.values())

    environment.pip("uninstall", "--yes", "ipn-gone-interaction")

    after = plugins(environment)
    gone = before.pop("ipn-gone-interaction")
    assert gone["components"] == {
        "interaction": ["gone-interaction"],
        "strategy": ["gone-interaction"],
    }
    assert after == before
