"""Wheels and sdists of every distribution, and what is wrong with them.

They are built from what git tracks, each wheel from its sdist, with the setuptools of the tools'
environment, whose hash is checked, instead of one that is fetched for each build.
"""

from __future__ import annotations

import email.message
import email.parser
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

__all__ = ["Member", "build", "copy_of", "faults_of", "members"]

ROOT = Path(__file__).parents[1]
LICENSE = "Apache-2.0"
PYTHONS = ("3.11", "3.12", "3.13")
LICENCES = re.compile(r"(LICEN[CS]E|NOTICE)(\.\w+)?")
"""What has to travel with whatever is built, by its name."""
KEYWORDS = ("vision-language", "multimodal", "plugins")
"""Those of every distribution; a member may have more."""
CLASSIFIERS = (
    "Development Status :: 3 - Alpha",
    "Intended Audience :: Science/Research",
    *(f"Programming Language :: Python :: {one}" for one in PYTHONS),
    "Topic :: Scientific/Engineering :: Artificial Intelligence",
)
"""Those of every distribution; a licence that is an expression has no classifier."""
TYPED = "Typing :: Typed"
"""That of a package with a file `py.typed`."""
WEIGHTS = {"ipn-starter", "ipn-names"}
"""The distributions that carry trained weights."""
LARGE = 1_000_000
"""Bytes that no other distribution's file comes near."""
TOP = {
    "LICENSE",
    "MANIFEST.in",
    "NOTICE",
    "PKG-INFO",
    "README.md",
    "MODEL_CARD.md",
    "pyproject.toml",
    "setup.cfg",
}
SUFFIXES = {".css", ".json", ".py", ".safetensors", ".tmpl", ".tsv", ".typed", ".yaml"}


@dataclass
class Member:
    """A distribution of the workspace.

    Attributes:
        name: what pip calls it.
        folder: relative to the workspace.
        package: its import name.
        project: the table `project` of its `pyproject.toml`.
    """

    name: str
    folder: PurePosixPath
    package: str
    project: dict[str, Any]

    @property
    def registers(self) -> bool:
        """Whether it is a plugin, as the core is."""
        return not self.folder.parts or "ipn" in self.project.get("entry-points", {})

    @property
    def source(self) -> PurePosixPath:
        """Where its package lies, relative to the workspace."""
        inner = "src" if self.folder.parts else ""
        return self.folder / inner / self.package

    @property
    def licences(self) -> dict[str, bytes]:
        """The texts of licences and notices in its folder, by name."""
        return {
            path.name: path.read_bytes()
            for path in sorted((ROOT / self.folder).iterdir())
            if LICENCES.fullmatch(path.name)
        }

    @property
    def classifiers(self) -> list[str]:
        """What its metadata has to be sorted under."""
        typed = [TYPED] if (ROOT / self.source / "py.typed").exists() else []
        return [*CLASSIFIERS, *typed]


def members(root: Path = ROOT) -> list[Member]:
    """Return the distributions, ipn-core first."""
    found = []
    for path in [root / "pyproject.toml", *sorted(root.glob("*/ipn-*/pyproject.toml"))]:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        folder = PurePosixPath(path.parent.relative_to(root).as_posix())
        found.append(Member(project["name"], folder, project["name"].replace("-", "_"), project))
    return found


def copy_of(root: Path, to: Path, *, leave_out: tuple[str, ...] = ()) -> Path:
    """Copy what git tracks, or would track, into a folder.

    Args:
        root: of the workspace.
        to: the folder.
        leave_out: files and folders, relative to the workspace.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        if not any(PurePosixPath(name).is_relative_to(one) for one in leave_out):
            source, target = root / name, to / name
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
    return to


def build(member: Member, workspace: Path, to: Path) -> tuple[Path, Path]:
    """Build a distribution; returns its sdist and its wheel.

    Args:
        member: which one.
        workspace: a copy of the workspace, which the build may write to.
        to: the folder for both.

    Raises:
        SystemExit: it does not build.
    """
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(to)]
    command.append(str(workspace / member.folder))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{member.name} does not build:\n{done.stdout}{done.stderr}")
    stem = f"{member.package}-{member.project['version']}"
    return to / f"{stem}.tar.gz", to / f"{stem}-py3-none-any.whl"


def faults_of(member: Member, sdist: Path, wheel: Path, core: Member) -> list[str]:
    """Return what is wrong with a distribution's files; nothing is right."""
    with zipfile.ZipFile(wheel) as file:
        held = {PurePosixPath(one.filename): one.file_size for one in file.infolist()}
        info = PurePosixPath(f"{member.package}-{member.project['version']}.dist-info")
        metadata = email.parser.HeaderParser().parsestr(file.read(f"{info}/METADATA").decode())
        licences = {
            path.name: file.read(str(path)) for path in held if path.parent == info / "licenses"
        }
    faults = _metadata(member, metadata, core) + _unlicensed("wheel", member, licences)
    tracked = _tracked(member)
    inside = {path for path in held if not path.is_relative_to(info)}
    base = member.source.parent
    faults += [f"its wheel lacks {one}" for one in sorted(tracked - {base / p for p in inside})]
    faults += [f"its wheel holds {one}" for one in sorted(inside) if base / one not in tracked]
    faults += [
        f"its wheel's {one} is no kind of file of ours"
        for one in sorted(inside)
        if one.suffix not in SUFFIXES
    ]
    if member.name not in WEIGHTS:
        faults += [f"{one} has {size:,} bytes" for one, size in held.items() if size > LARGE]
    return faults + _sdist(member, sdist)


def _unlicensed(kind: str, member: Member, held: Mapping[str, bytes]) -> list[str]:
    """Return which licences and notices of its folder do not travel as they stand."""
    faults = [
        f"its {kind} does not hold the text of {name}"
        for name, text in member.licences.items()
        if held.get(name) != text
    ]
    return faults if "LICENSE" in member.licences else [*faults, "its folder holds no LICENSE"]


def _metadata(member: Member, metadata: email.message.Message, core: Member) -> list[str]:
    expected = {
        "Name": member.name,
        "Version": str(core.project["version"]),
        "License-Expression": LICENSE,
        "Description-Content-Type": "text/markdown",
        "Summary": str(member.project["description"]),
    }
    faults = [
        f"its {key} is {metadata[key]!r}, expected {value!r}"
        for key, value in expected.items()
        if metadata[key] != value
    ]
    lists = {
        "Classifier": member.classifiers,
        "License-File": list(member.licences),
    }
    for key, some in lists.items():
        found = sorted(metadata.get_all(key) or ())
        faults += [f"it has no {key} {one!r}" for one in some if one not in found]
        faults += [f"it has the {key} {one!r}" for one in found if one not in some]
    keywords = (metadata["Keywords"] or "").split(",")
    faults += [f"it has no keyword {one!r}" for one in KEYWORDS if one not in keywords]
    needed = SpecifierSet(metadata["Requires-Python"] or "")
    faults += [f"it refuses Python {one}" for one in PYTHONS if not needed.contains(one)]
    faults += [f"it takes Python {one}" for one in ("3.10",) if needed.contains(one)]
    if len(str(metadata.get_payload())) < 100:
        faults.append("its description is empty")
    for text in metadata.get_all("Requires-Dist") or ():
        one = Requirement(text)
        version = Version(str(core.project["version"]))
        if one.name.startswith("ipn-") and not one.specifier.contains(version):
            faults.append(f"it asks for {one}, and this is {version}")
    return faults


def _sdist(member: Member, sdist: Path) -> list[str]:
    """Return what does not belong into a source distribution."""
    with tarfile.open(sdist) as file:
        top = PurePosixPath(sdist.name.removesuffix(".tar.gz"))
        names, licences = [], {}
        for one in file:
            if one.isfile():
                names.append(PurePosixPath(one.name).relative_to(top))
                if str(names[-1]) in member.licences and (held := file.extractfile(one)):
                    licences[names[-1].name] = held.read()
        links = [one.name for one in file if one.islnk() or one.issym()]
    inner = member.source.relative_to(member.folder)
    info = PurePosixPath(*inner.parts[:-1], f"{member.package}.egg-info")
    faults = _unlicensed("sdist", member, licences)
    faults += [f"its sdist holds the link {one}" for one in links]
    for name in names:
        known = (
            str(name) in TOP
            or name.is_relative_to(info)
            or (name.is_relative_to(inner) and member.folder / name in _tracked(member))
            or (bool(member.folder.parts) and name.parts[0] == "tests" and name.suffix == ".py")
        )
        if not known:
            faults.append(f"its sdist holds {name}")
    return faults


def _tracked(member: Member) -> set[PurePosixPath]:
    """Return the files of its package that git knows."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    command.append(str(member.source))
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {PurePosixPath(one) for one in listed.splitlines() if (ROOT / one).exists()}
