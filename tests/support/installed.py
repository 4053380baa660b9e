"""Plugins that are installed only as far as `importlib.metadata` is asked."""

from __future__ import annotations

from importlib.metadata import Distribution, EntryPoint
from pathlib import Path
from typing import Any


class Installed(Distribution):
    """A distribution that lies nowhere, in version 1.2."""

    def __init__(self, name: str) -> None:
        self.files_of = name

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: ipn-{self.files_of}\nVersion: 1.2\n"

    def locate_file(self, path: Any) -> Any:
        return Path(path)


def installed(name: str, module: str) -> EntryPoint:
    """The entry point of a plugin of the distribution ipn-NAME."""
    point = EntryPoint(name, module, "ipn")
    vars(point)["dist"] = Installed(name)
    return point
