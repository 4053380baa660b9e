"""Features on disk: files of many entries, each written once, checked when read, and shared.

A folder holds the shards of one encoder; the folder above it holds those of all encoders, and its
size is limited. A shard is a safetensors file with a bfloat16 tensor an entry, mapped into memory;
its metadata gives each entry's grid and a checksum of everything. Any number of processes may read
and write at once: a shard appears whole, and is never changed afterwards.

An entry that is damaged, or a shard that is cut short, takes its shard with it: it is named and
removed, and what it held is missing from then on. Where there is no room the shards that were
unused for longest go first, but none that a running process has read from.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipn_core.errors import ConfigError
from ipn_core.files import atomic_write, claim, lock, make_folder, remove_unfinished
from ipn_core.stages import EncodedImage
from ipn_core.training.first_cache import FirstCache

__all__ = ["DEFAULT_SIZE", "Entry", "Shards", "cache_size", "checksum"]

DEFAULT_SIZE = "50GB"
_SUFFIX = ".safetensors"
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True, eq=False)
class Entry:
    """The features of a picture as they are kept.

    Attributes:
        values: (h·w [+ 1], Dv) bfloat16, the patches row by row, then the global token if any.
        grid: (h, w).
        global_token: whether there is one.
    """

    values: Tensor
    grid: tuple[int, int]
    global_token: bool

    @classmethod
    def of(cls, encoded: EncodedImage) -> Entry:
        """Round what an encoder gives."""
        token = encoded.global_token
        rows = [encoded.values] if token is None else [encoded.values, token[None]]
        values = torch.cat(rows).detach().to(torch.bfloat16).cpu().contiguous()
        return cls(values, encoded.grid, token is not None)

    def open(self) -> EncodedImage:
        """Return float32 features of its own memory."""
        values = self.values.float()
        patches = self.grid[0] * self.grid[1]
        return EncodedImage(
            values[:patches], self.grid, values[patches] if self.global_token else None
        )

    def label(self, key: str) -> str:
        """Return grid, global token and checksum as a shard's metadata holds them."""
        where = f"{self.grid[0]} {self.grid[1]} {int(self.global_token)}"
        return f"{where} {checksum(self.values, where, before=key)}"


def checksum(values: Tensor, after: str, *, before: str = "") -> str:
    """Return the CRC-32 of a tensor (…) on the CPU, and of what is said before and after it."""
    crc = zlib.crc32(values.view(torch.uint8).numpy().data, zlib.crc32(before.encode()))
    return f"{zlib.crc32(after.encode(), crc):08x}"


def cache_size() -> int:
    """Return the bytes that all caches of features together may take, as `IPN_CACHE_SIZE` says.

    Raises:
        ConfigError: it is no size.
    """
    text = os.environ.get("IPN_CACHE_SIZE") or DEFAULT_SIZE
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?B)?", text.strip(), re.IGNORECASE)
    if found is None:
        raise ConfigError(
            f"IPN_CACHE_SIZE is '{text}': give a number of bytes or a size such as 500MB or 20GB; "
            "0 keeps nothing."
        )
    unit = (found[2] or "").upper()
    return int(float(found[1]) * _UNITS["" if unit == "B" else unit])


class Shards:
    """The entries of one encoder, by key."""

    def __init__(self, folder: Path, width: int, limit: int, note: Callable[[str], object]) -> None:
        """Open a folder, which need not exist.

        Args:
            folder: of the encoder; the size of the folder above it is limited.
            width: of a row.
            limit: in bytes.
            note: is told about what was damaged.
        """
        self.folder = folder
        self.limit = limit
        self._note = note
        self._first = FirstCache(folder, width)
        self._shard_of: dict[str, str] = {}
        self._labels: dict[str, dict[str, str]] = {}
        self._open: dict[str, Any] = {}
        self._checked: set[str] = set()
        self._using = ExitStack()
        self._used: Path | None = None
        weakref.finalize(self, self._using.close)

    def __contains__(self, key: str) -> bool:
        return key in self._shard_of or key in self._first

    def refresh(self) -> None:
        """Learn of the shards that other processes wrote or removed."""
        there = set(_shards(self.folder))
        for name in self._labels.keys() - there - self._open.keys():
            self._forget(name)
        for name in sorted(there - self._labels.keys()):
            self._learn(name)
        self._first.refresh()

    def read(self, key: str) -> Entry | None:
        """Return an entry; None if there is none, or none that is whole."""
        from safetensors import SafetensorError

        name = self._shard_of.get(key)
        if name is None:
            found = self._first.read(key)
            return None if found is None else Entry(*found)
        try:
            file = self._open.get(name) or self._use(name)
            entry = self._entry(file.get_tensor(key), self._labels[name][key])
            if key not in self._checked and entry.label(key) != self._labels[name][key]:
                raise ValueError("its checksum does not fit")
        except FileNotFoundError:
            self._forget(name)
            return None
        except (SafetensorError, ValueError) as error:
            self._remove(name, f"{key}: {error}")
            return None
        self._checked.add(key)
        return entry

    def write(self, entries: Mapping[str, Entry]) -> bool:
        """Keep some entries in a new shard; returns whether there was room for it."""
        from safetensors.torch import save

        labels = {key: entry.label(key) for key, entry in entries.items()}
        content = save({key: entry.values for key, entry in entries.items()}, metadata=labels)
        keys = hashlib.sha256("\n".join(sorted(entries)).encode()).hexdigest()[:32]
        make_folder(self.folder)
        with lock(self._room):
            remove_unfinished(self.folder)  # nobody else is writing now
            if not self._make_room(len(content)):
                return False
            atomic_write(self._path(keys), content)
        self._forget(keys)  # where a damaged one had this name
        self._learn(keys)
        return True

    # -- parts -----------------------------------------------------------------------------------

    @property
    def _room(self) -> Path:
        return self.folder.parent / "room.lock"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{_SUFFIX}"

    def _learn(self, name: str) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(name), "pt") as file:
                labels = file.metadata() or {}
                if set(file.keys()) != set(labels):
                    raise ValueError("its entries are not those of its metadata")
        except FileNotFoundError:
            return
        except (SafetensorError, OSError, ValueError) as error:
            self._remove(name, str(error))
            return
        self._labels[name] = labels
        self._shard_of.update(dict.fromkeys(labels, name))

    def _forget(self, name: str) -> None:
        self._open.pop(name, None)
        for key in self._labels.pop(name, {}):
            self._checked.discard(key)
            if self._shard_of.get(key) == name:
                del self._shard_of[key]

    def _remove(self, name: str, why: str) -> None:
        self._note(
            f"the feature cache's shard '{self._path(name)}' is damaged ({why}): it is removed, "
            "and what it held is encoded again"
        )
        self._forget(name)
        self._path(name).unlink(missing_ok=True)

    @staticmethod
    def _entry(values: Tensor, label: str) -> Entry:
        h, w, token, _ = label.split()
        entry = Entry(values, (int(h), int(w)), token == "1")
        if values.dtype != torch.bfloat16 or len(values) != int(h) * int(w) + int(token):
            raise ValueError("its shape does not fit its grid")
        return entry

    # -- use and room ----------------------------------------------------------------------------

    def _use(self, name: str) -> Any:
        """Map a shard, after saying so to others and moving it to the end of their queue."""
        from safetensors import safe_open

        if self._used is None:
            token = self.folder / "use" / secrets.token_hex(8)
            self._used, mine = token.with_suffix(".txt"), token.with_suffix(".lock")
            self._using.callback(mine.unlink, missing_ok=True)
            with lock(self._room):  # else it could be taken for a dead process's
                self._using.enter_context(lock(mine))
            self._using.callback(self._used.unlink, missing_ok=True)
        with open(self._used, "a", encoding="utf-8") as file:
            file.write(f"{name}\n")
        os.utime(self._path(name))
        self._open[name] = safe_open(self._path(name), "pt")
        return self._open[name]

    def _make_room(self, size: int) -> bool:
        """Remove shards that nobody uses until there is room; returns whether there is."""
        root = self.folder.parent
        total = size + sum(_size(path) for path in root.rglob("*"))
        if total > self.limit:
            folders = [path for path in root.iterdir() if path.is_dir()]
            used = {path for folder in folders for path in _in_use(folder)}
            found = {folder / f"{name}{_SUFFIX}" for folder in folders for name in _shards(folder)}
            for path in sorted(found - used, key=_last_use):
                if total <= self.limit:
                    break
                total -= _size(path)
                path.unlink(missing_ok=True)
        return total <= self.limit


def _shards(folder: Path) -> Iterator[str]:
    """Yield the names of a folder's shards; what is still being written has a dot in front."""
    if folder.is_dir():
        for entry in os.scandir(folder):
            if entry.name.endswith(_SUFFIX) and not entry.name.startswith("."):
                yield entry.name.removesuffix(_SUFFIX)


def _in_use(folder: Path) -> Iterator[Path]:
    """Yield the shards of a folder that running processes read from; forget dead processes."""
    for path in (folder / "use").glob("*.lock"):
        names = path.with_suffix(".txt")
        with claim(path) as dead:
            if dead:
                names.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            elif names.exists():
                for name in names.read_text(encoding="utf-8").split():
                    yield folder / f"{name}{_SUFFIX}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
