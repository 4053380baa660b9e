"""Reads what the first version of the feature cache wrote; nothing is added to it any more.

`values.bin` holds bfloat16 numbers, and `index.jsonl` a line an entry: where its rows begin, its
grid, and whether a global token follows the patches. It has no checksums.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["FirstCache"]

_BYTES = 2


class FirstCache:
    """The entries of one encoder, by key; a process of that version may still be adding some."""

    def __init__(self, folder: Path, width: int) -> None:
        """Open a folder that may hold none.

        Args:
            folder: of the encoder.
            width: of a row.
        """
        self._index_path = folder / "index.jsonl"
        self._values_path = folder / "values.bin"
        self._width = width
        self._index: dict[str, tuple[int, int, int, bool]] = {}
        self._values = torch.empty(0, dtype=torch.bfloat16)
        self._read = 0

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def refresh(self) -> None:
        """Read the lines that are new, and map as many values as there are now."""
        if not self._index_path.is_file() or not self._values_path.is_file():
            return
        size = self._values_path.stat().st_size // _BYTES
        if size > len(self._values):
            self._values = torch.from_file(
                str(self._values_path), shared=False, size=size, dtype=torch.bfloat16
            )
        with open(self._index_path, "rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                self._learn(line)

    def _learn(self, line: bytes) -> None:
        try:
            found: dict[str, Any] = json.loads(line)
            entry = (found["offset"], found["h"], found["w"], found["global_token"])
            if self._span(entry).stop <= len(self._values):
                self._index[found["key"]] = entry
        except (ValueError, TypeError, KeyError):
            return  # a line that was damaged: its picture is encoded again

    def _span(self, entry: tuple[int, int, int, bool]) -> slice:
        offset, h, w, global_token = entry
        return slice(offset, offset + (h * w + global_token) * self._width)

    def read(self, key: str) -> tuple[Tensor, tuple[int, int], bool] | None:
        """Return the rows of an entry (h·w [+ 1], Dv), its grid, and whether the last is global."""
        entry = self._index.get(key)
        if entry is None:
            return None
        _, h, w, global_token = entry
        return self._values[self._span(entry)].view(-1, self._width), (h, w), global_token
