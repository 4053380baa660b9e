"""Examples from WebDataset shards, which the `webdataset` library reads.

A shard is a tar file in which files of one name before the dot, such as `0001.json` and `0001.jpg`,
are one sample.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ipn_core.errors import DataError, ImageError, IPNError
from ipn_core.file_task import matching, parse_json, parse_text
from ipn_core.formats import KEYS, Record
from ipn_core.images import load_image
from ipn_core.tasks import Example, Picture, ShardedTask

if TYPE_CHECKING:
    from typing import Self

    from PIL import Image

__all__ = ["TarTask"]

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_META = re.compile("__[^/]*__(/|$)")
"""Names of files that belong to no sample, as the library has it."""
_END = tarfile.EOFHeaderError  # type: ignore[attr-defined]  # the stubs leave it out
"""For a block of zeros."""


class TarTask(ShardedTask):
    """Examples from one or several tar files.

    A sample has pictures and either `.json`, any record that a JSONL file may have, or `.txt`, what
    there is to say about them. A record names its pictures by what follows the dot, as `1.jpg`;
    one that names none, or has only one, means all of its sample's.
    """

    splits = ("all",)
    default_split = "all"

    def __init__(self, path: str) -> None:
        """Name files; nothing is read yet.

        Args:
            path: a file, or several: `a-{000..127}.tar`, `a-*.tar`.

        Raises:
            IPNError: the library that reads them is not installed.
        """
        try:
            import braceexpand
            import webdataset  # noqa: F401  # as early as it can be said
        except ImportError:
            raise IPNError(
                f"'{path}': to read WebDataset shards, install the library that does: "
                "pip install 'ipn-core[shards]'"
            ) from None
        self.path = path
        self._files = [
            file for one in braceexpand.braceexpand(path) for file in matching(one) or [one]
        ]

    def shards(self, split: str) -> Sequence[str]:
        self.check_split(split)
        for file in self._files:
            if not os.path.isfile(file):
                raise DataError(f"no such file: '{file}'. Give tar files.")
        return self._files

    def read(self, shard: str, skip: int = 0) -> Iterator[Example]:
        from webdataset.tariterators import group_by_keys

        done = "the beginning"
        samples = group_by_keys(_files(shard))
        try:
            for sample in islice(samples, skip, None):
                yield _example(sample, f"'{shard}' sample '{sample['__key__']}'")
                done = f"sample '{sample['__key__']}'"
        except IPNError:
            raise
        except Exception as error:  # tarfile, zlib and the library have types of their own
            # The library puts a message and what it was about into one error.
            said = next((a for a in error.args if isinstance(a, str)), type(error).__name__)
            raise DataError(
                f"'{shard}' is damaged or no tar file after {done} ({said}). Fetch or write it "
                "again."
            ) from None


class _Header(tarfile.TarInfo):
    """A file in a tar file: `tarfile` takes any broken header but the first for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Read the next one.

        Raises:
            ReadError: it is broken, or the tar file ends without a block of zeros. One is enough:
                not every writer has two, or fills up what follows.
        """
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if archive.offset == 0 or isinstance(error, _END):
                raise
            raise tarfile.ReadError(f"neither a file nor the end follows: {error}") from None


def _files(shard: str) -> Iterator[dict[str, Any]]:
    """Yield what the library makes samples of; its own reader would not notice a cut."""
    with tarfile.open(shard, "r|*", tarinfo=_Header) as archive:
        for member in archive:
            if member.isreg() and not _META.match(member.name):
                content = archive.extractfile(member)
                assert content is not None
                yield {"fname": member.name, "data": content.read(), "__url__": shard}
            # Else it keeps all headers; the library does the same.
            archive.members = []  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Bytes:
    """Decodes a picture when it is needed, in whatever process."""

    content: bytes
    where: str

    def __call__(self) -> Image.Image:
        try:
            return load_image(self.content)
        except ImageError as error:
            raise DataError(f"{self.where}: {error}") from error


def _example(sample: Mapping[str, Any], where: str) -> Example:
    members = {
        name: Picture(f"{sample['__url__']}/{sample['__key__']}.{name}", _Bytes(content, where))
        for name, content in sample.items()
        if f".{name}".lower().endswith(_PICTURES)
    }

    def picture(name: str) -> Picture:
        short = os.path.basename(name).removeprefix(os.path.basename(sample["__key__"]) + ".")
        found = members.get(short.lower())
        if found is None and len(members) == 1:
            found = next(iter(members.values()))
        if found is None:
            raise ValueError(f"no picture '{name}': the sample has {', '.join(members) or 'none'}")
        return found

    row = _row(sample, where)
    if not (isinstance(row, dict) and KEYS & row.keys()) and "txt" in sample:
        text = parse_text(sample["txt"], f"{where}: its .txt").strip()
        row = {
            "images": [*members, None],
            "texts": [*(None for _ in members), text],
        }
    return Record(row, where, picture, tuple(members)).example()


def _row(sample: Mapping[str, Any], where: str) -> Any:
    if "json" not in sample:
        if "txt" not in sample:
            has = ", ".join(key for key in sample if not key.startswith("__"))
            raise DataError(f"{where}: it has neither .json nor .txt, but {has or 'nothing'}.")
        return None
    return parse_json(sample["json"], f"{where}: its .json")
