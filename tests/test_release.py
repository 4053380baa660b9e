"""The tested set is hashed and in step with what is pinned; its audit tells silence from safety."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The workspace's own programs, which are no part of a wheel."""
    monkeypatch.syspath_prepend(str(ROOT))
    import release.artifacts
    import release.audit

    return release


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
def test_a_set_that_is_safe_passes(release: Any, fake: Any, answers: Any) -> None:
    found = release.audit.audit([["a==1"], ["b==2"]], fake(**answers), strict=True)
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
def test_whatever_a_database_holds_against_it_fails(
    release: Any, fake: Any, answers: Any, said: str
) -> None:
    found = release.audit.audit([["a==1"], ["b==2"]], fake(**answers))
    assert found.code == 1
    assert said in found.lines


@pytest.mark.parametrize("answers", [{}, {"pypi": "silent"}, {"pypi": "silent", "osv": "silent"}])
def test_no_database_is_told_and_counted_and_no_success(
    release: Any, fake: Any, answers: Any
) -> None:
    found = release.audit.audit([["a==1"], ["b==2"]], fake(**answers))
    assert found.code == 0
    assert found.lines[0].startswith("audit: could not reach a database of vulnerabilities: pypi (")
    assert found.lines[1].startswith("audit: 0 of 2 packages were looked up. Run 'make audit'")
    strict = release.audit.audit([["a==1"], ["b==2"]], fake(**answers), strict=True)
    assert (strict.code, strict.lines) == (1, found.lines)


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--strict"], 1)])
def test_strict_is_a_word_of_the_command(release: Any, fake: Any, words: Any, code: int) -> None:
    assert release.audit.main(["--pip-audit", fake(), *words]) == code


def test_every_package_is_asked_about_and_torch_too(release: Any) -> None:
    some, tools, _site = release.audit.pinned(ROOT)
    assert len(some) == len(set(some)) > 100
    assert len(tools) == len(set(tools)) > 20
    assert [one for one in some if one.startswith("torch==")]
    assert release.audit.CANARY not in some
    assert all(Requirement(one).specifier for one in some)


def test_every_test_that_the_threat_model_names_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    for path, test in named:
        assert f"def {test}(" in (ROOT / path).read_text(), (path, test)


# -- the distributions -----------------------------------------------------------------------------


def test_every_distribution_is_in_step_with_the_core(release: Any) -> None:
    core, *rest = release.artifacts.members()
    assert (core.name, len(rest)) == ("ipn-core", 15)
    for one in rest:
        assert one.project["version"] == core.project["version"], one.name
        assert (ROOT / one.source / "__init__.py").is_file()
        assert (ROOT / one.folder / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_metadata_of_every_distribution_are_in_step(release: Any) -> None:
    for one in release.artifacts.members():
        project, mine = one.project, one.name
        assert project["classifiers"] == one.classifiers, mine
        shared, own = project["keywords"][:3], project["keywords"][3:]
        assert tuple(shared) == release.artifacts.KEYWORDS, mine
        assert own, mine
        assert (ROOT / one.source / "py.typed").exists() == (mine == "ipn-core")
        assert project["license"] == release.artifacts.LICENSE, mine
        assert project["requires-python"] == ">=3.11", mine
        # Nothing is said of people or places that this repository does not know of.
        assert not project.keys() & {"authors", "maintainers", "urls"}, mine
    assert [c for c in one.classifiers if "Python" in c] == [
        f"Programming Language :: Python :: {version}" for version in release.artifacts.PYTHONS
    ]


def repack(wheel: Path, change: dict[str, bytes | None]) -> None:
    """Add, replace or take out files of a wheel."""
    with zipfile.ZipFile(wheel) as file:
        held = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(wheel, "w") as file:
        for name, content in {**held, **change}.items():
            if content is not None:
                file.writestr(name, content)


def thin(sdist: Path, lost: str) -> None:
    """Take a file out of an sdist."""
    with tarfile.open(sdist) as file:
        held = [(one, file.extractfile(one)) for one in file.getmembers()]
        held = [(one, content and io.BytesIO(content.read())) for one, content in held]
    with tarfile.open(sdist, "w:gz", compresslevel=1) as file:
        for one, content in held:
            if PurePosixPath(one.name).name != lost:
                file.addfile(one, content)


INFO = "ipn_film-0.1.0.dist-info"


@pytest.fixture
def built(release: Any, tmp_path: Path) -> Any:
    """Build a member; returns it with its sdist and its wheel."""

    def make(name: str) -> tuple[Any, Path, Path]:
        (mine,) = (m for m in release.artifacts.members() if m.name == name)
        folder = release.artifacts.copy_of(ROOT / mine.folder, tmp_path / mine.folder)
        for shared in ("LICENSE", "NOTICE"):
            shutil.copy(ROOT / shared, tmp_path)  # which its own are links to
        for kind in ("sdist", "wheel"):
            code = f"from setuptools import build_meta; build_meta.build_{kind}({str(tmp_path)!r})"
            subprocess.run(
                [sys.executable, "-c", code], cwd=folder, check=True, capture_output=True
            )
        stem = f"{mine.package}-0.1.0"
        return mine, tmp_path / f"{stem}.tar.gz", tmp_path / f"{stem}-py3-none-any.whl"

    return make


@pytest.fixture
def film(release: Any, built: Any) -> Any:
    """Say what is wrong with the wheel of ipn-film after a change."""
    core = release.artifacts.members()[0]
    mine, sdist, wheel = built("ipn-film")

    def faults(change: dict[str, bytes | None]) -> list[str]:
        repack(wheel, change)
        found: list[str] = release.artifacts.faults_of(mine, sdist, wheel, core)
        return found

    return faults


def test_notices_have_to_travel_with_what_they_are_about(release: Any, built: Any) -> None:
    core, *rest = release.artifacts.members()
    noticed = {one.name: one.licences for one in (core, *rest) if "NOTICE" in one.licences}
    assert noticed.keys() == {"ipn-core", *release.artifacts.WEIGHTS}
    for held in noticed.values():
        assert held == {name: (ROOT / name).read_bytes() for name in ("LICENSE", "NOTICE")}
    assert b"OpenMoji" in noticed["ipn-starter"]["NOTICE"]
    assert b"WordNet" in noticed["ipn-names"]["NOTICE"]
    mine, sdist, wheel = built("ipn-names")
    assert release.artifacts.faults_of(mine, sdist, wheel, core) == []
    notice = "ipn_names-0.1.0.dist-info/licenses/NOTICE"
    for change in (None, b"another's"):
        repack(wheel, {notice: change})
        (said,) = release.artifacts.faults_of(mine, sdist, wheel, core)
        assert said == "its wheel does not hold the text of NOTICE"
    thin(sdist, "NOTICE")
    assert "its sdist does not hold the text of NOTICE" in release.artifacts.faults_of(
        mine, sdist, wheel, core
    )


def test_what_is_built_of_a_member_is_right_and_what_is_wrong_is_found(film: Any) -> None:
    assert film({}) == []
    assert film({"ipn_film/film.py": None}) == [
        "its wheel lacks plugins/ipn-film/src/ipn_film/film.py"
    ]
    assert "its wheel holds tests/junk.py" in film({"tests/junk.py": b""})
    large = film({"ipn_film/cache.bin": bytes(2_000_000)})
    assert "its wheel's ipn_film/cache.bin is no kind of file of ours" in large
    assert "ipn_film/cache.bin has 2,000,000 bytes" in large
    said = film({f"{INFO}/licenses/LICENSE": b""})
    assert "its wheel does not hold the text of LICENSE" in said
    metadata = (
        b"Metadata-Version: 2.4\nName: ipn-film\nVersion: 0.2.0\nRequires-Dist: ipn-core<0.1\n"
        b"Classifier: License :: OSI Approved\nKeywords: film\n"
    )
    said = film({f"{INFO}/METADATA": metadata})
    for part in (
        "its Version is '0.2.0', expected '0.1.0'",
        "its License-Expression is None, expected 'Apache-2.0'",
        "it asks for ipn-core<0.1, and this is 0.1.0",
        "it takes Python 3.10",
        "it has the Classifier 'License :: OSI Approved'",
        "it has no Classifier 'Programming Language :: Python :: 3.12'",
        "it has no License-File 'LICENSE'",
        "it has no keyword 'multimodal'",
        "its description is empty",
    ):
        assert part in said


# -- which Pythons were tried ----------------------------------------------------------------------


@pytest.fixture
def check(release: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command, with nothing to build and no Python but this one."""
    from release import check

    monkeypatch.setattr(check._Check, "artifacts", lambda self: [])
    monkeypatch.setattr(check._Check, "tests", None)
    monkeypatch.setattr(check, "interpreter", lambda version: None)
    return check


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--strict"], 1)])
def test_a_python_that_was_not_tried_is_told_and_fails_if_strict(
    check: Any, capsys: pytest.CaptureFixture[str], words: list[str], code: int
) -> None:
    assert check.main(["--part", "torchless", *words]) == code
    said = capsys.readouterr()
    assert "Python 3.13: not installed here, so not tried" in said.out
    result = "3 failures" if code else "nothing wrong"
    last = f"release-check: {result}; tried on Python none; not tried on 3.11, 3.12, 3.13\n"
    assert (said.err if code else said.out).endswith(last)


def test_the_last_line_says_how_each_python_was_tried(check: Any, tmp_path: Path) -> None:
    one = check._Check(tmp_path)
    one.tried = {"3.12": "what needs no torch", "3.11": "all"}
    said = "tried on Python 3.11 (all), 3.12 (what needs no torch)"
    assert one.closing(strict=False) == (
        0,
        f"release-check: nothing wrong; {said}; not tried on 3.13",
    )
    assert one.closing(strict=True)[0] == 1
    one.tried["3.13"] = "what needs no torch"
    assert one.closing(strict=True)[0] == 0
    one.fail("a fault")
    assert one.closing(strict=False) == (
        1,
        f"release-check: 1 failures; {said}, 3.13 (what needs no torch)",
    )


# -- without torch ---------------------------------------------------------------------------------

TORCHLESS = """
import pytest

def test_passes():
    pass

def test_needs_torch():
    raise ModuleNotFoundError("No module named 'torch'")

def test_lacks_a_fixture(registry):
    pass

def test_fails():
    raise ModuleNotFoundError("No module named 'numpy'")
"""


def test_without_torch_only_what_needs_it_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text(TORCHLESS)
    (tmp_path / "test_two.py").write_text("raise ImportError(\"No module named 'torch'\")")
    words = ["-m", "pytest", "-q", "-p", "release.torchless", "--noconftest", "."]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 1 passed, 3 skipped" in done.stdout, done.stdout
    assert "test_fails" in done.stdout
