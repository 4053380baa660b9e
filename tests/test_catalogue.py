"""Every published bridge is a plugin of its own, keeps a contract, and takes no other with it."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from catalogue import CATALOGUE, MEMBERS, ROOT

from ipn_core.plugins import Registry, discover
from ipn_core.testing import contracts

CONTRACTS = [getattr(contracts, name) for name in contracts.__all__ if name.endswith("Contract")]
NEED_A_GPU = {"sdpa-cudnn", "sdpa-efficient", "xformers"} | {
    f"xformers-{operator}"
    for operator in ("blackwell", "ck", "cutlass", "flash", "flash3", "splitk")
}


@cache
def everything() -> Registry:
    return discover()


def names(registry: Registry) -> set[tuple[str, str, str]]:
    """Everything that is registered: kind, name, and whose it is."""
    return {
        (kind, name, component.plugin.distribution)
        for kind, named in registry.components.items()
        for name, component in named.items()
    }


# -- each from its own distribution ----------------------------------------------------------------


@pytest.mark.parametrize("strategy", CATALOGUE)
def test_each_strategy_comes_from_a_distribution_of_its_own(strategy: str) -> None:
    assert everything().get("strategy", strategy).plugin.distribution == CATALOGUE[strategy]


@pytest.mark.parametrize("member", MEMBERS)
def test_without_one_exactly_its_own_is_missing(member: str) -> None:
    points = entry_points(group="ipn")
    (mine,) = [point for point in points if point.dist is not None and point.dist.name == member]
    without = discover(points=[point for point in points if point is not mine])
    own = {entry for entry in names(everything()) if entry[2] == member}
    assert own
    assert names(everything()) - names(without) == own
    assert names(without) <= names(everything())
    assert without.faults == []


def imports(folder: Path) -> set[str]:
    """The top modules that the sources in a folder import."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
    return {module.partition(".")[0] for module in found}


@pytest.mark.parametrize("member", MEMBERS)
def test_what_one_imports_of_another_it_depends_on(member: str) -> None:
    about = tomllib.loads((MEMBERS[member] / "pyproject.toml").read_text(encoding="utf-8"))
    needs = {re.split(r"[<>=]", needed)[0] for needed in about["project"]["dependencies"]}
    used = {module.replace("_", "-") for module in imports(MEMBERS[member] / "src")}
    assert used & {*MEMBERS, "ipn-core"} - {member} <= needs


# -- each keeps its contract -----------------------------------------------------------------------


def kept(tests: Path) -> set[tuple[str, str]]:
    """The kinds and names of the components whose contracts the tests in a folder inherit."""
    found = set()
    for path in tests.glob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef) or not node.name.startswith("Test"):
                continue
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            kinds = [one.kind for one in CONTRACTS if one.__name__ in bases]
            for line in node.body if kinds else []:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "name":
                    found.add((kinds[0], ast.literal_eval(line.value)))
    return found


def promised(distribution: str) -> set[tuple[str, str]]:
    """The components of a distribution that there is a contract for."""
    kinds = {one.kind for one in CONTRACTS}
    return {(k, n) for k, n, whose in names(everything()) if whose == distribution and k in kinds}


@pytest.mark.parametrize("member", MEMBERS)
def test_every_component_of_a_plugin_keeps_a_contract(member: str) -> None:
    assert promised(member) - kept(MEMBERS[member] / "tests") == set()


def test_every_component_of_the_core_keeps_a_contract() -> None:
    elsewhere = {("attention", name) for name in NEED_A_GPU}
    assert promised("ipn-core") - elsewhere - kept(ROOT / "tests") == set()


def test_every_kind_that_runs_has_a_contract() -> None:
    kinds = {one.kind for one in CONTRACTS}
    assert set(everything().components) - kinds == {"importer", "objective", "strategy", "weights"}


def test_a_component_without_a_contract_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "class TestMine(InteractionContract):\n    name = 'mine'\n\n"
        "class _Hidden(InteractionContract):\n    name = 'hidden'\n\n"
        "class TestOther:\n    name = 'other'\n"
    )
    assert kept(tmp_path) == {("interaction", "mine")}


@pytest.mark.parametrize("name", sorted(NEED_A_GPU))
def test_a_backend_for_gpus_keeps_its_contract_as_far_as_it_goes(name: str) -> None:
    one: Any = type("Contract", (contracts.AttentionContract,), {"name": name})()
    one.test_it_states_what_it_is()
    one.test_refusals_are_lists_of_reasons()
    assert list(one.inputs())
    assert not one._served()
