"""A cache on disk for what a frozen vision encoder makes of pictures.

Keyed by the encoder's fingerprint and each picture's pixels, so that a changed file, another
encoder or another size never meets a stale entry. Two files that only grow: `values.bin`, bfloat16
numbers, and `index.jsonl`, one line a picture, written after its values.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.features import VisualFeatures
from ipn_core.files import atomic_write, lock
from ipn_core.images import content_key
from ipn_core.weights import cache_dir

if TYPE_CHECKING:
    from ipn_core.stages import EncodedImage, VisionEncoder
    from ipn_core.tasks import Picture

__all__ = ["FeatureCache"]

_BATCH = 32
_BYTES = 2


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a picture's numbers lie: h·w rows of patches, then the global token if it has one."""

    key: str
    offset: int
    h: int
    w: int
    global_token: bool


class FeatureCache:
    """Features of pictures by content, computed once."""

    def __init__(self, encoder: VisionEncoder, folder: Path | None = None) -> None:
        """Open or start the cache of an encoder.

        Args:
            encoder: frozen; its fingerprint names the cache.
            folder: where caches lie, by default in the user's cache folder.
        """
        self.encoder = encoder
        name = hashlib.sha256(encoder.fingerprint.encode()).hexdigest()[:16]
        self.folder = (folder or cache_dir() / "features") / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._index: dict[str, _Entry] = {}
        self._values: Tensor | None = None

    @property
    def _index_path(self) -> Path:
        return self.folder / "index.jsonl"

    @property
    def _values_path(self) -> Path:
        return self.folder / "values.bin"

    def add(
        self, pictures: Iterable[Picture], report: Callable[[int], None] | None = None
    ) -> dict[str, str]:
        """Make sure that pictures are in the cache.

        Args:
            pictures: opened here, one after the other.
            report: receives how many are done.

        Returns:
            The content key of each picture's name.
        """
        keys: dict[str, str] = {}
        with lock(self.folder / "lock"):
            self._refresh()
            missing = self._missing(pictures, keys, report)
            for chunk in _chunks(missing, _BATCH):
                with torch.inference_mode():
                    encoded = self.encoder.encode([image for _, image in chunk])
                self._append([key for key, _ in chunk], encoded)
        return keys

    def get(self, keys: Sequence[Sequence[str]]) -> VisualFeatures:
        """Return the features of the pictures of each sample, each distinct picture once.

        Args:
            keys: for each sample, the content keys of its pictures.

        Returns:
            float32 features on the CPU; samples with the same picture share its patches.
        """
        distinct = list(dict.fromkeys(key for row in keys for key in row))
        index = {key: i for i, key in enumerate(distinct)}
        entries = [self._index[key] for key in distinct]
        loaded = [self._load(entry) for entry in entries]
        return VisualFeatures.share(
            [patches for patches, _ in loaded],
            [(e.h, e.w) for e in entries],
            [[index[key] for key in row] for row in keys],
            self.encoder.width,
            [token for _, token in loaded],
        )

    def _load(self, entry: _Entry) -> tuple[Tensor, Tensor | None]:
        if self._values is None:
            size = self._values_path.stat().st_size // _BYTES
            self._values = torch.from_file(
                str(self._values_path), shared=True, size=size, dtype=torch.bfloat16
            )
        width = self.encoder.width
        rows = entry.h * entry.w + entry.global_token
        values = self._values[entry.offset : entry.offset + rows * width].float().view(rows, width)
        return values[: entry.h * entry.w], values[-1] if entry.global_token else None

    def _missing(
        self,
        pictures: Iterable[Picture],
        keys: dict[str, str],
        report: Callable[[int], None] | None,
    ) -> Iterator[tuple[str, Any]]:
        waiting: set[str] = set()
        for picture in pictures:
            if picture.name not in keys:
                image = picture.load()
                key = keys[picture.name] = content_key(image)
                if key not in self._index and key not in waiting:
                    waiting.add(key)
                    yield key, image
            if report:
                report(len(keys))

    def _append(self, keys: Sequence[str], encoded: Sequence[EncodedImage]) -> None:
        lines = []
        with open(self._values_path, "ab") as file:
            offset = file.tell() // _BYTES
            for key, one in zip(keys, encoded, strict=True):
                rows = [one.values, *([] if one.global_token is None else [one.global_token[None]])]
                values = torch.cat(rows).to(torch.bfloat16).cpu().contiguous()
                file.write(values.view(torch.uint8).numpy().tobytes())
                entry = _Entry(key, offset, *one.grid, one.global_token is not None)
                self._index[key] = entry
                lines.append(json.dumps(asdict(entry)))
                offset += values.numel()
            file.flush()
        with open(self._index_path, "a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
        self._values = None

    def _refresh(self) -> None:
        """Read what is there; drop lines that an interrupted writer left without their values."""
        if not self._values_path.exists():
            self._values_path.touch()
        size = self._values_path.stat().st_size // _BYTES
        os.truncate(self._values_path, size * _BYTES)
        if not self._index_path.exists():
            return
        self._index = {}
        text = self._index_path.read_text(encoding="utf-8")
        whole = []
        for line in text.splitlines(keepends=True):
            entry = _entry(line)
            if entry is None:
                continue
            rows = entry.h * entry.w + entry.global_token
            if entry.offset + rows * self.encoder.width <= size:
                self._index[entry.key] = entry
                whole.append(line)
        # A line kept without its values would later point into other pictures' values.
        kept = "".join(whole)
        if kept != text:
            atomic_write(self._index_path, kept.encode())
        self._values = None


def _entry(line: str) -> _Entry | None:
    """Read a line of the index; None if it is not whole."""
    if not line.endswith("\n"):
        return None
    try:
        return _Entry(**json.loads(line))
    except (ValueError, TypeError):
        return None


def _chunks(items: Iterable[tuple[str, Any]], size: int) -> Iterator[list[tuple[str, Any]]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
