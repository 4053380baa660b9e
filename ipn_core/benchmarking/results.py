"""The file of one device: sections of rows, each with what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ipn_core.benchmarking.rows import Row, Value
from ipn_core.config import Config
from ipn_core.errors import ConfigError, DataError
from ipn_core.files import atomic_write, lock
from ipn_core.processors import cpu_model

__all__ = ["FORMAT", "Results", "Section", "about", "device_name", "store"]

FORMAT: Literal[1] = 1
LIBRARIES = ("ipn-core", "torch", "transformers", "xformers", "triton", "numpy")


class Section(Config):
    """What one benchmark measured.

    Attributes:
        about: the device, versions, the command and the day (`about`).
        notes: sentences that belong to the rows, such as which part of a grid they are.
        rows: by whatever order they are to be shown in.
    """

    about: Mapping[str, Value] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    @model_validator(mode="after")
    def _are_unique(self) -> Self:
        seen: set[str] = set()
        for row in self.rows:
            if row.name in seen:
                raise ValueError(f"there are two rows '{row.name}'")
            seen.add(row.name)
        return self


class Results(Config):
    """All sections of a device.

    Attributes:
        format: of the file.
        device: its name, as in the file's.
        sections: by the benchmark's name.
    """

    format: Literal[1] = FORMAT
    device: str
    sections: Mapping[str, Section] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file.

        Raises:
            DataError: it is not there, damaged, or of another format.
        """
        where = os.fspath(path)
        again = "Name a file that 'make bench' wrote, such as benchmarks/results/DEVICE.json"
        try:
            found = json.loads(Path(where).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read '{where}': {error.strerror}. {again}.") from error
        except ValueError as error:
            raise DataError(f"'{where}' is no JSON: {error}. {again}.") from error
        if not isinstance(found, dict) or "sections" not in found:
            raise DataError(f"'{where}' holds no results of benchmarks. {again}.")
        if found.get("format") != FORMAT:
            raise DataError(
                f"'{where}' has format {found.get('format')!r}, and this version reads {FORMAT}. "
                "Measure again, or use the version that wrote it."
            )
        try:
            return cls.parse(found, "results")
        except ConfigError as error:
            raise DataError(f"'{where}' is damaged: {str(error).splitlines()[0]}") from error

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a file, a row a line.

        Raises:
            IPNError: the system refused.
        """
        atomic_write(path, "".join(self._text()).encode())

    def _text(self) -> Iterator[str]:
        yield f'{{"format": {self.format}, "device": {json.dumps(self.device)}, "sections": {{'
        for place, (name, section) in enumerate(self.sections.items()):
            head = section.model_dump(mode="json", exclude={"rows"})
            yield f"{',' if place else ''}\n{json.dumps(name)}: {{"
            yield "".join(f'\n"{key}": {_json(value)},' for key, value in head.items())
            rows = (_json(r.model_dump(mode="json", exclude_defaults=True)) for r in section.rows)
            yield '\n"rows": [\n' + ",\n".join(rows) + "\n]}"
        yield "\n}}\n"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def store(path: str | os.PathLike[str], device: str, name: str, section: Section) -> None:
    """Put a section into the file of a device, in the place of its last one.

    Args:
        path: the file, made where it is missing, and so is its folder.
        device: the name of the device.
        name: of the section.
        section: what to put.

    Raises:
        DataError: there is such a file, and it cannot be read.
        IPNError: the system refused.
    """
    target = Path(path)
    with lock(target.with_suffix(".lock")):
        before = Results.read(target).sections if target.exists() else {}
        Results(device=device, sections={**before, name: section}).write(target)


def about(device: str = "cpu", command: str | None = None) -> dict[str, Value]:
    """Return what a measurement holds for: the device, its settings, versions, and the day.

    Args:
        device: "cpu" or "cuda", with a number or not.
        command: what measures it again, by default what runs now.
    """
    import torch

    found: dict[str, Value] = {"device": device_name(device)}
    if device.startswith("cuda"):
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda or torch.version.hip
    found["cpu"] = cpu_model()
    found["capability"] = torch.backends.cpu.get_cpu_capability()
    found["cores"] = os.cpu_count()
    found["threads"] = torch.get_num_threads()
    found["system"] = f"{platform.system()} {platform.machine()}"
    found["python"] = platform.python_version()
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    found["command"] = command or _command(sys.argv)
    found["day"] = datetime.now(UTC).strftime("%Y-%m-%d")
    return found


def device_name(device: str = "cpu") -> str:
    """Return the name of a device as files have it: what computes, and for a CPU its threads."""
    import torch

    if device.startswith("cuda"):
        return _slug(torch.cuda.get_device_name(device))
    return f"{_slug(cpu_model())}-{torch.get_num_threads()}-threads"


def _command(words: Sequence[str]) -> str:
    """Return a command line without the folders that programs lie in."""
    first = words[0] if words else ""
    if first.endswith("__main__.py"):
        first = f"python -m {Path(first).parent.name}"
    elif "/" in first:
        first = Path(first).name
    return shlex.join(first.split() + list(words[1:]))


def _slug(name: str) -> str:
    plain = re.sub(r"\((?:r|tm)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "unknown"
