"""A cache on disk for what a frozen vision encoder makes of pictures.

Keyed by the encoder's fingerprint and each picture's pixels, so that a changed file, another
encoder or another size never meets a stale entry. A crop that an interaction looks at again is kept
like a picture, by its picture's key and its edges. Training rounds features to bfloat16 whether
they come from the disk or from the encoder. And the encoder is always given equally many pictures:
which kernels a library picks, and so the last bits, depend on how many there are. So features are
the same bits with and without the cache, in whatever order and company they were made.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakValueDictionary

import torch

from ipn_core.errors import IPNError
from ipn_core.features import Box, VisualFeatures
from ipn_core.files import claim, lock, make_folder
from ipn_core.images import content_key, crop
from ipn_core.training.shards import Entry, Shards, cache_size
from ipn_core.weights import cache_dir, cache_folder

if TYPE_CHECKING:
    from PIL import Image

    from ipn_core.stages import VisionEncoder
    from ipn_core.tasks import Picture

__all__ = ["FeatureCache"]

_BATCH, _BATCH_ON_CPU = 8, 1
"""Pictures that go through the encoder at once; a CPU is about as fast with one at a time."""
_SHARD = 64
"""Pictures a shard, at most."""
_LOCKS = 64
"""How many locks processes share for the pictures that each is encoding."""

_Crop = tuple[str, tuple[float, ...]]
"""The key of a picture, and the edges of a part of it."""
_T = TypeVar("_T")


class FeatureCache:
    """Features of pictures by content, computed once, and of their crops, once they are needed.

    Where there is no room left, pictures are encoded each time they are asked for.

    Attributes:
        encoder: whose features they are.
        folder: where they lie.
        size: the bytes that all caches next to this one, and it, may take.
        note: is told what was damaged, and when there is no room left.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        folder: Path | None = None,
        size: int | None = None,
        note: Callable[[str], object] = warnings.warn,
    ) -> None:
        """Open or start the cache of an encoder.

        Args:
            encoder: frozen; its fingerprint names the cache.
            folder: where caches lie, by default in the user's cache folder.
            size: the bytes that all caches in there may take, by default as `IPN_CACHE_SIZE` says.
            note: is told what was damaged, and when there is no room left.

        Raises:
            ConfigError: `IPN_CACHE_SIZE` is no size.
            IPNError: the user's cache folder cannot be written.
        """
        self.encoder = encoder
        name = hashlib.sha256(encoder.fingerprint.encode()).hexdigest()[:16]
        self.size = cache_size() if size is None else size
        if folder is None:  # which need not be there where nothing is kept
            folder = cache_folder("features") if self.size else cache_dir() / "features"
        self.folder = folder / name
        self.note = note
        self._shards = Shards(self.folder, encoder.width, self.size, note)
        self._full = self.size == 0
        self._waiting: dict[str, Entry] = {}
        self._decoded: dict[str, Image.Image] = {}
        self._pictures: WeakValueDictionary[str, Picture] = WeakValueDictionary()

    def add(
        self, pictures: Iterable[Picture], report: Callable[[int], None] | None = None
    ) -> dict[str, str]:
        """Make sure that pictures are in the cache; processes that add the same share the work.

        Args:
            pictures: opened here, a few at a time; a picture can be encoded or looked at again
                later for as long as something else holds it.
            report: receives how many are done.

        Returns:
            The content key of each picture's name.
        """
        keys: dict[str, str] = {}
        left: list[list[Picture]] = []
        self._shards.refresh()
        distinct = {picture.name: picture for picture in pictures}
        for chunk in _chunks(distinct.values(), _SHARD):
            images: dict[str, Image.Image] = {}
            for picture in chunk:
                image = picture.load()
                key = keys[picture.name] = content_key(image)
                self._pictures[key] = picture
                if key not in self._shards:
                    images[key] = image
                if report:
                    report(len(keys))
            if images and not self._full:
                make_folder(self.folder / "locks")
                with claim(self._lock_of(chunk, keys)) as free:
                    if free:
                        self._keep(images)
                    else:
                        left.append(chunk)
        for chunk in left:  # whoever has their locks is encoding them, or has died
            with lock(self._lock_of(chunk, keys)):
                self._shards.refresh()
                missing = [p for p in chunk if keys[p.name] not in self._shards]
                self._keep({keys[p.name]: p.load() for p in missing})
        return keys

    def know(self, pictures: Iterable[Picture]) -> dict[str, str]:
        """Return the content key of each picture's name; `get` encodes those that are missing."""
        keys: dict[str, str] = {}
        for picture in pictures:
            image = picture.load()
            key = keys[picture.name] = content_key(image)
            self._pictures[key] = picture
            if key not in self._shards and key not in self._waiting:
                self._decoded[key] = image
        return keys

    def get(self, keys: Sequence[Sequence[str]]) -> VisualFeatures:
        """Return the features of the pictures of each sample, each distinct picture once.

        Args:
            keys: for each sample, the content keys of its pictures.

        Returns:
            float32 features on the CPU; samples with the same picture share its patches. They can
            look at pictures that this cache was given by `add` or `know`.

        Raises:
            IPNError: a picture is not in the cache, and nothing holds it any more.
        """
        distinct = list(dict.fromkeys(key for row in keys for key in row))
        index = {key: i for i, key in enumerate(distinct)}
        found = self._entries({key: (key, ()) for key in distinct})
        loaded = [found[key].open() for key in distinct]
        return VisualFeatures.share(
            [one.values for one in loaded],
            [one.grid for one in loaded],
            [[index[key] for key in row] for row in keys],
            self.encoder.width,
            [one.global_token for one in loaded],
            self._looker(keys),
        )

    def flush(self) -> None:
        """Write what was encoded since pictures were added, such as crops."""
        entries, self._waiting = self._waiting, {}
        self._write(entries)

    # -- parts -----------------------------------------------------------------------------------

    def _looker(self, keys: Sequence[Sequence[str]]) -> Callable[[Sequence[Box]], VisualFeatures]:
        shown = [(row, key) for row, of_row in enumerate(keys) for key in of_row]

        def look(boxes: Sequence[Box]) -> VisualFeatures:
            crops: list[_Crop] = [
                (shown[image][1], tuple(map(float, edges))) for image, *edges in boxes
            ]
            found = self._entries({_crop_key(one): one for one in crops})
            return VisualFeatures.of(
                [found[_crop_key(one)].open() for one in crops],
                [shown[image][0] for image, *_ in boxes],
                len(keys),
                torch.zeros(0, self.encoder.width),
            )

        return look

    def _entries(self, wanted: Mapping[str, _Crop]) -> dict[str, Entry]:
        """Return entries by key; what is missing is encoded, and written with the next shard."""
        if any(key not in self._shards and key not in self._waiting for key in wanted):
            self._shards.refresh()
        found: dict[str, Entry] = {}
        missing: dict[str, _Crop] = {}
        for key, where in wanted.items():
            entry = self._waiting.get(key) or self._shards.read(key)
            if entry is None:
                missing[key] = where
            else:
                found[key] = entry
        new = self._encode(self._cut(missing))
        if not self._full:
            self._waiting |= new
            if len(self._waiting) >= _SHARD:
                self.flush()
        return found | new

    def _cut(self, missing: Mapping[str, _Crop]) -> dict[str, Image.Image]:
        """Open pictures, each once, and cut the wanted parts out."""
        opened: dict[str, Image.Image] = {}
        for key, _ in missing.values():
            if key not in opened:
                picture = self._pictures.get(key)
                if picture is None:
                    raise IPNError(
                        f"the features of picture {key} are not in the cache '{self.folder}', and "
                        "the picture itself is gone. Start again, so that it is encoded anew."
                    )
                opened[key] = self._decoded.pop(key) if key in self._decoded else picture.load()
        return {
            name: crop(opened[key], edges) if edges else opened[key]
            for name, (key, edges) in missing.items()
        }

    def _lock_of(self, pictures: Sequence[Picture], keys: Mapping[str, str]) -> Path:
        """Name the lock of some pictures: the same for processes that go through the same ones."""
        names = "".join(keys[picture.name] for picture in pictures)
        number = int(hashlib.sha256(names.encode()).hexdigest(), 16) % _LOCKS
        return self.folder / "locks" / f"{number:02}.lock"

    def _keep(self, images: Mapping[str, Image.Image]) -> None:
        """Encode pictures that no other process has written meanwhile."""
        self._shards.refresh()
        self._write(
            self._encode({k: image for k, image in images.items() if k not in self._shards})
        )

    def _encode(self, images: Mapping[str, Image.Image]) -> dict[str, Entry]:
        """Encode pictures in batches of one size, the last one filled up with copies."""
        device = next((p.device.type for p in self.encoder.parameters()), "cpu")
        size = _BATCH_ON_CPU if device == "cpu" else _BATCH
        found: dict[str, Entry] = {}
        for chunk in _chunks(images.items(), size):
            batch = [image for _, image in chunk]
            batch += batch[-1:] * (size - len(batch))
            with torch.inference_mode():
                encoded = self.encoder.encode(batch)
            for (key, _), one in zip(chunk, encoded[: len(chunk)], strict=True):
                found[key] = Entry.of(one)
        return found

    def _write(self, entries: Mapping[str, Entry]) -> None:
        if entries and not self._full and not self._shards.write(entries):
            self._full = True
            self.note(
                f"the feature cache '{self.folder.parent}' is full ({self.size / 1e9:.3g} GB) of "
                "what running processes use: further pictures are encoded each time they are "
                "shown. IPN_CACHE_SIZE sets its size."
            )


def _crop_key(crop: _Crop) -> str:
    key, edges = crop
    return f"{key}@{','.join(map(repr, edges))}"


def _chunks(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
