"""The tested set is hashed and in step with what is pinned; its audit tells silence from safety."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release.audit import CANARY, audit, pinned

ROOT = Path(__file__).parents[1]
UNHASHED = {"torch"}
"""Its file differs by build."""


def entries(name: str) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """The requirements of a lock by name, each with its hashes."""
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for block in re.split(r"\n(?=[^\s#])", (ROOT / name).read_text()):
        lines = [line for line in block.splitlines() if not line.lstrip().startswith("#")]
        if text := " ".join(line.rstrip("\\ ") for line in lines).strip():
            head, *hashes = re.split(r"\s+--hash=", text)
            one = Requirement(head)
            found.setdefault(canonicalize_name(one.name), []).append((one, hashes))
    return found


LOCKS = {
    "requirements.lock": "requirements.txt",
    "release/tools.lock": "release/tools.txt",
    "docs/making/requirements.lock": "docs/making/requirements.txt",
}


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_of_a_lock_has_one_version_and_its_hashes(name: str) -> None:
    locked = entries(name)
    assert len(locked) > 20
    assert not UNHASHED & locked.keys()
    for some in locked.values():
        for one, hashes in some:
            assert re.fullmatch(r"==[^*,]+", str(one.specifier)), one
            assert hashes, one
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), one
        assert len(some) == 1 or all(one.marker for one, _ in some), some


@pytest.mark.parametrize(("name", "asked"), LOCKS.items())
def test_a_lock_is_in_step_with_what_is_asked_for(name: str, asked: str) -> None:
    locked = entries(name)
    lines = [line.partition(" #")[0].strip() for line in (ROOT / asked).read_text().splitlines()]
    wanted = [Requirement(one) for one in lines if one and not one.startswith(("#", "-e"))]
    assert wanted
    for one in wanted:
        if one.name not in UNHASHED:
            ((mine, _),) = locked[canonicalize_name(one.name)]
            assert mine.specifier == one.specifier, f"run 'make lock': {one}"


def test_the_lock_holds_what_the_workspace_asks_for_here() -> None:
    from importlib.metadata import distributions, requires

    locked = entries("requirements.lock")
    mine = [d.name for d in distributions() if d.name and d.name.startswith("ipn-")]
    assert len(mine) > 10
    for name in mine:
        for text in requires(name) or ():
            one = Requirement(text)
            known = canonicalize_name(one.name)
            if known.startswith("ipn-") or known in UNHASHED or "extra" in str(one.marker):
                continue
            assert all(one.specifier.contains(str(v.specifier)[2:]) for v, _ in locked[known]), one


# -- the audit -------------------------------------------------------------------------------------

FAKE = """#!{python}
import json, sys
answers = json.loads({answers!r})
words = sys.argv
names = [line.split("==") for line in open(words[words.index("-r") + 1]).read().split()]
known = answers.get(words[words.index("--vulnerability-service") + 1])
if known is None:
    sys.exit("requests.exceptions.ConnectionError: no such host")
if known == "silent":
    rows = [{{"name": n, "skip_reason": "not found"}} for n, _ in names]
elif known == "misused":
    sys.exit("usage: pip-audit\\nerror: argument -r not allowed")
elif known == "broken" and names[0][0] != "pillow":
    sys.exit("out of order")
else:
    known = {{}} if known == "broken" else known
    rows = [
        {{"name": n, "skip_reason": "not found"}} if n in known.get("lacks", [])
        else {{"name": n, "version": v,
              "vulns": [{{"id": "V-1"}}] if n in ["pillow", *known.get("bad", [])] else []}}
        for n, v in names
    ]
print(json.dumps({{"dependencies": rows, "fixes": []}}))
sys.exit(any(row.get("vulns") for row in rows))
"""


@pytest.fixture
def fake(tmp_path: Path) -> Any:
    """Make a pip-audit whose databases answer as told."""

    def make(**answers: Any) -> str:
        path = tmp_path / "pip-audit"
        path.write_text(FAKE.format(python=sys.executable, answers=json.dumps(answers)))
        path.chmod(0o755)
        return str(path)

    return make


SAFE = "audit: 2 packages looked up in {}, 0 vulnerable, 0 not known there."


@pytest.mark.parametrize("answers", [{"pypi": {}}, {"pypi": "silent", "osv": {}}, {"osv": {}}])
def test_a_set_that_is_safe_passes(fake: Any, answers: Any) -> None:
    found = audit([["a==1"], ["b==2"]], fake(**answers))
    assert (found.code, len(found.lines)) == (0, 1)
    assert found.lines[0] == SAFE.format("pypi" if answers.get("pypi") == {} else "osv")


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"pypi": {"bad": ["b"]}}, "audit: b 2 is vulnerable: V-1"),
        ({"pypi": {"lacks": ["b"]}}, "audit: b was not looked up"),
        ({"pypi": "broken"}, "audit: pip-audit failed: out of order"),
        ({"pypi": "misused"}, "audit: pip-audit failed: error: argument -r not allowed"),
        ({"osv": {"bad": ["a"], "lacks": ["b"]}}, "audit: a 1 is vulnerable: V-1"),
    ],
)
def test_whatever_a_database_holds_against_it_fails(fake: Any, answers: Any, said: str) -> None:
    found = audit([["a==1"], ["b==2"]], fake(**answers))
    assert found.code == 1
    assert said in found.lines


@pytest.mark.parametrize("answers", [{}, {"pypi": "silent"}, {"pypi": "silent", "osv": "silent"}])
def test_no_database_is_told_and_counted_and_no_success(fake: Any, answers: Any) -> None:
    found = audit([["a==1"], ["b==2"]], fake(**answers))
    assert found.code == 0
    assert found.lines[0].startswith("audit: could not reach a database of vulnerabilities: pypi (")
    assert found.lines[1].startswith("audit: 0 of 2 packages were looked up. Run 'make audit'")


def test_every_package_is_asked_about_and_torch_too() -> None:
    some, tools, _site = pinned(ROOT)
    assert len(some) == len(set(some)) > 100
    assert len(tools) == len(set(tools)) > 20
    assert [one for one in some if one.startswith("torch==")]
    assert CANARY not in some
    assert all(Requirement(one).specifier for one in some)


def test_every_test_that_the_threat_model_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), (path, test)
