"""Writing a plugin package: names that follow from one name, and templates filled with them."""

from __future__ import annotations

import ast
import importlib.util
import json
import keyword
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from string import Template

import ipn_core
from ipn_core.errors import UserError, near
from ipn_core.files import atomic_folder
from ipn_core.scaffold.kinds import KINDS, Kind

__all__ = ["LONGEST", "Package", "write_package"]

LONGEST = 24
"""Characters of a name: the templates' lines are at most 100 long with four of them."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_PLACES = {
    "pyproject.toml": "pyproject.toml",
    "README.md": "README.md",
    "train.yaml": "train.yaml",
    "__init__.py": "src/$module/__init__.py",
    "component.py": "src/$module/$stem.py",
    "test.py": "tests/test_$stem.py",
}
"""Where each template goes, `.tmpl` added to its name; a kind need not have them all."""


@dataclass(frozen=True, slots=True)
class Package:
    """A plugin package before it is written: all its names, and with them its files.

    Attributes:
        kind: a key of `KINDS`.
        name: of the component, such as "my-look".
    """

    kind: str
    name: str

    @property
    def distribution(self) -> str:
        """What pip calls it, and the folder that it is written to: "ipn-my-look"."""
        return f"ipn-{self.name}"

    @property
    def module(self) -> str:
        """What Python imports: "ipn_my_look"."""
        return self.distribution.replace("-", "_")

    @property
    def stem(self) -> str:
        """The module of the component in it: "my_look"."""
        return self.name.replace("-", "_")

    @property
    def class_name(self) -> str:
        """The component's class: "MyLook"."""
        return "".join(part.capitalize() for part in self.name.split("-"))

    @property
    def title(self) -> str:
        """What texts call its kind: "interaction"."""
        return self._described.title or self.kind

    @property
    def use(self) -> str:
        """The command that shows it at work, from the folder that it is written to."""
        return Template(self._described.use).substitute(self._names)

    @property
    def component(self) -> str:
        """Where the component is, in the package."""
        return Template(_PLACES["component.py"]).substitute(self._names)

    def files(self) -> dict[str, str]:
        """Return the text of each file by its path in the package."""
        words = {**self._names, **self._described_words()}
        words["training"] = self._filled("training.yaml", words).rstrip("\n")
        found = {}
        for place, target in _PLACES.items():
            text = self._filled(place, words)
            if text:
                found[Template(target).substitute(words)] = text
        return dict(sorted(found.items()))

    def _filled(self, place: str, words: Mapping[str, str]) -> str:
        """Return a template with its words; of several the nearest to the kind, none as empty."""
        for folder in (self.kind, *reversed(self._described.folders)):
            templates = files("ipn_core.scaffold").joinpath("templates", folder)
            template = templates.joinpath(f"{place}.tmpl")
            if template.is_file():
                return Template(template.read_text(encoding="utf-8")).substitute(words)
        return ""

    @property
    def _described(self) -> Kind:
        return KINDS[self.kind]

    @property
    def _names(self) -> dict[str, str]:
        return {
            "kind": self.kind,
            "title": self.title,
            "name": self.name,
            "distribution": self.distribution,
            "module": self.module,
            "stem": self.stem,
            "class": self.class_name,
        }

    def _described_words(self) -> dict[str, str]:
        kind = self._described
        major, minor, *_ = ipn_core.__version__.split(".")
        core = f"ipn-core>={major}.{minor},<{major}.{int(minor) + 1}"
        preset = [f"    {json.dumps(k)}: {json.dumps(v)}," for k, v in (kind.preset or {}).items()]
        return {
            "summary": kind.summary,
            "use": self.use,
            "after": Template(kind.after).substitute(self._names),
            "dependencies": ", ".join(json.dumps(need) for need in (core, *kind.requires)),
            "tries": "".join(f", {json.dumps(need)}" for need in kind.tries),
            **{
                word: Template(text).substitute(self._names)
                for word, text in (kind.training or {}).items()
            },
            "preset": Template("\n".join(preset)).substitute(self._names),
        }


def write_package(kind: str, name: str, into: str | os.PathLike[str] = ".") -> tuple[Package, Path]:
    """Write a package that installs, passes its tests, lints, and does something simple but real.

    Args:
        kind: a key of `KINDS`.
        name: of the component: small letters, digits and single hyphens.
        into: the folder to write it to, made where it is missing.

    Returns:
        The package, and its folder.

    Raises:
        UserError: there is no such kind, the name cannot be used or is taken, the folder exists or
            cannot be made. Nothing has been written.
    """
    if kind not in KINDS:
        raise UserError(
            f"unknown kind '{kind}': 'ipn new' writes {', '.join(KINDS)}{near(kind, KINDS)}. "
            "See 'ipn new --help'."
        )
    _check_name(kind, name)
    package = Package(kind, name)
    contents = package.files()
    _check_python(package, contents[package.component])
    _check_free(package)
    folder = Path(into) / package.distribution
    if os.path.lexists(folder):
        raise UserError(
            f"'{folder}' exists, and nothing is written over it. Choose another NAME, or another "
            "folder with --dir."
        )
    try:
        with atomic_folder(folder) as temporary:
            for place, text in contents.items():
                (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                (temporary / place).write_bytes(text.encode())
    except OSError as error:
        raise UserError(
            f"'{folder}' cannot be made: {error.strerror or error}. Name a folder that you may "
            "write to with --dir."
        ) from error
    return package, folder


def _check_name(kind: str, name: str) -> None:
    """Refuse what is no component's name, with the nearest one that is."""
    proper = _proper(name)
    if proper and name == proper:
        return
    hint = f" (did you mean '{proper}'?)" if proper else ""
    if _NAME.fullmatch(name) and len(name) <= LONGEST:
        raise UserError(
            f"'{name}' would make the package 'ipn-{name}': 'ipn-' is put before every name{hint}. "
            f"Run 'ipn new {kind} NAME' with a NAME without it."
        )
    raise UserError(
        f"{name!r} is no name for a component: a name is made of small letters, digits and single "
        f"hyphens, begins with a letter and is at most {LONGEST} characters long{hint}. Run "
        f"'ipn new {kind} NAME' with such a NAME."
    )


def _proper(name: str) -> str:
    """Return the component's name that a text is nearest to, or an empty text: MyLook, my-look."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()
    found = re.sub(r"[^a-z0-9]+", "-", spaced).strip("-").removeprefix("ipn-")
    return found if _NAME.fullmatch(found) and len(found) <= LONGEST else ""


def _check_python(package: Package, code: str) -> None:
    """Refuse a name whose module or class would not be what the package says it is."""
    for word in (package.stem, package.class_name):
        if keyword.iskeyword(word):
            raise UserError(
                f"'{package.name}' cannot be the name of a component: '{word}' is a word of Python "
                f"itself. {_another(package)}"
            )
    bound = list(_bound(ast.parse(code)))
    twice = [name for name in bound if bound.count(name) > 1]
    if twice:
        raise UserError(
            f"'{package.name}' would make a class '{twice[0]}', and its own module uses that name "
            f"for something else. {_another(package)}"
        )


def _bound(module: ast.Module) -> Iterator[str]:
    """Yield each name that a module's imports, classes and functions bind."""
    for node in module.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield node.name


def _check_free(package: Package) -> None:
    """Refuse what is installed already: its module, its distribution, its component."""
    from ipn_core.plugins import discover

    # Whatever IPN_PLUGINS leaves out is there all the same when it is left out no more.
    registry = discover()
    for kind in (package.kind, *(["strategy"] if KINDS[package.kind].preset else [])):
        taken = registry.entries(kind).get(package.name)
        if taken is not None:
            raise UserError(
                f"{kind} '{package.name}' is already taken by {taken.plugin.label}. "
                f"{_another(package)} See 'ipn plugins'."
            )
    try:
        there = f"{package.distribution} {version(package.distribution)}"
    except PackageNotFoundError:
        there = package.module if importlib.util.find_spec(package.module) else ""
    if there:
        raise UserError(
            f"'{package.name}' would make the package '{package.distribution}' with the module "
            f"'{package.module}', and {there} is installed already. {_another(package)}"
        )


def _another(package: Package) -> str:
    return f"Choose another NAME, such as 'my-{package.name}'."
