"""A cache on disk for what a frozen vision encoder makes of pictures.

Keyed by the encoder's fingerprint and each picture's pixels, so that a changed file, another
encoder or another size never meets a stale entry. A crop that an interaction looks at again is kept
like a picture, by its picture's key and its edges. Two files that only grow: `values.bin`, bfloat16
numbers, and `index.jsonl`, one line a picture or crop, written after its values.
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

from ipn_core.features import Box, VisualFeatures
from ipn_core.files import atomic_write, lock
from ipn_core.images import content_key, crop
from ipn_core.stages import EncodedImage
from ipn_core.weights import cache_dir

if TYPE_CHECKING:
    from ipn_core.stages import VisionEncoder
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


_Crop = tuple[str, tuple[float, ...]]
"""The key of a picture, and the edges of a part of it."""


class FeatureCache:
    """Features of pictures by content, computed once, and of their crops, once they are needed."""

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
        self._sizes = (0, 0)
        self._pictures: dict[str, Picture] = {}

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
            self._encode(self._missing(pictures, keys, report))
        return keys

    def get(self, keys: Sequence[Sequence[str]]) -> VisualFeatures:
        """Return the features of the pictures of each sample, each distinct picture once.

        Args:
            keys: for each sample, the content keys of its pictures.

        Returns:
            float32 features on the CPU; samples with the same picture share its patches. They can
            look at pictures that this cache was given by `add`.
        """
        distinct = list(dict.fromkeys(key for row in keys for key in row))
        index = {key: i for i, key in enumerate(distinct)}
        loaded = [self._load(key) for key in distinct]
        return VisualFeatures.share(
            [one.values for one in loaded],
            [one.grid for one in loaded],
            [[index[key] for key in row] for row in keys],
            self.encoder.width,
            [one.global_token for one in loaded],
            self._looker(keys),
        )

    def _looker(self, keys: Sequence[Sequence[str]]) -> Callable[[Sequence[Box]], VisualFeatures]:
        shown = [(row, key) for row, of_row in enumerate(keys) for key in of_row]

        def look(boxes: Sequence[Box]) -> VisualFeatures:
            crops: list[_Crop] = [
                (shown[image][1], tuple(map(float, edges))) for image, *edges in boxes
            ]
            if any(_crop_key(one) not in self._index for one in crops):
                with lock(self.folder / "lock"):
                    self._refresh()
                    self._encode(self._missing_crops(crops))
            return VisualFeatures.of(
                [self._load(_crop_key(one)) for one in crops],
                [shown[image][0] for image, *_ in boxes],
                len(keys),
                torch.zeros(0, self.encoder.width),
            )

        return look

    def _load(self, key: str) -> EncodedImage:
        entry = self._index[key]
        if self._values is None:
            size = self._values_path.stat().st_size // _BYTES
            self._values = torch.from_file(
                str(self._values_path), shared=True, size=size, dtype=torch.bfloat16
            )
        width = self.encoder.width
        rows = entry.h * entry.w + entry.global_token
        values = self._values[entry.offset : entry.offset + rows * width].float().view(rows, width)
        token = values[-1] if entry.global_token else None
        return EncodedImage(values[: entry.h * entry.w], (entry.h, entry.w), token)

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
                self._pictures[key] = picture
                if key not in self._index and key not in waiting:
                    waiting.add(key)
                    yield key, image
            if report:
                report(len(keys))

    def _missing_crops(self, crops: Sequence[_Crop]) -> Iterator[tuple[str, Any]]:
        by_picture: dict[str, list[_Crop]] = {}
        for one in dict.fromkeys(crops):
            if _crop_key(one) not in self._index:
                by_picture.setdefault(one[0], []).append(one)
        for key, of_picture in by_picture.items():
            image = self._pictures[key].load()
            for one in of_picture:
                yield _crop_key(one), crop(image, one[1])

    def _encode(self, missing: Iterator[tuple[str, Any]]) -> None:
        for chunk in _chunks(missing, _BATCH):
            with torch.inference_mode():
                encoded = self.encoder.encode([image for _, image in chunk])
            self._append([key for key, _ in chunk], encoded)

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
        self._sizes = self._sizes_now()
        self._values = None

    def _sizes_now(self) -> tuple[int, int]:
        return self._index_path.stat().st_size, self._values_path.stat().st_size

    def _refresh(self) -> None:
        """Read what is there; drop lines that an interrupted writer left without their values."""
        if not self._values_path.exists():
            self._values_path.touch()
        size = self._values_path.stat().st_size // _BYTES
        os.truncate(self._values_path, size * _BYTES)
        if not self._index_path.exists() or self._sizes == self._sizes_now():
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
        self._sizes = self._sizes_now()
        self._values = None


def _crop_key(crop: _Crop) -> str:
    key, edges = crop
    return f"{key}@{','.join(map(repr, edges))}"


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
