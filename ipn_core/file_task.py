"""Examples from a file of records: JSONL, one a line, or JSON, a list of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipn_core.errors import DataError, ImageError
from ipn_core.formats import Record
from ipn_core.images import check_image, load_image
from ipn_core.tasks import Example, Picture, ShardedTask

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FileTask", "Folder", "matching", "parse_json", "parse_text"]

_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character that JSON escapes as two; alone it is no text."""


@dataclass(frozen=True)
class _File:
    """Opens a picture when it is needed; of a large file's, all would take as long as answering."""

    path: str
    where: str

    def __call__(self) -> Image.Image:
        with self._named():
            return load_image(self.path)

    def check(self) -> None:
        """Look at its beginning."""
        with self._named():
            check_image(self.path)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except ImageError as error:
            raise DataError(f"{self.where}: {error}") from error


@dataclass(frozen=True)
class Folder:
    """Where the pictures of a record lie.

    Attributes:
        path: a folder.
        where: names the record.
    """

    path: Path
    where: str

    def picture(self, name: str) -> Picture:
        """Return a picture of the folder; raises `ValueError` if there is none."""
        if "://" in name:
            raise ValueError(f"'{name}' is an address; fetch the picture and give its path")
        path = self.path / name
        if not os.path.isfile(path):
            raise ValueError(f"no such image: '{path}'")
        file = _File(str(path), self.where)
        return Picture(str(path), file, file.check)


class FileTask(ShardedTask):
    """Examples from JSONL or JSON files; `docs/data.md` shows what their records look like."""

    splits = ("all",)
    default_split = "all"

    def __init__(self, path: str | Path, images: str | None = None) -> None:
        """Name files; nothing is read yet.

        Args:
            path: `.json` for a list of records; anything else has one a line. It may be a pattern
                such as `part-*.jsonl`.
            images: the folder that pictures' paths start from, by default the file's own.
        """
        self.path = Path(path)
        self.images = images

    def examples(self, split: str = "all") -> Sequence[Example]:
        """Return the examples; every record is checked before the first is returned."""
        examples = super().examples(split)
        if not examples:
            raise DataError(f"'{self.path}' holds no examples.")
        return examples

    def shards(self, split: str) -> Sequence[str]:
        self.check_split(split)
        return matching(str(self.path)) or [str(self.path)]

    def read(self, shard: str, skip: int = 0) -> Iterator[Example]:
        path = Path(shard)
        images = path.parent if self.images is None else Path(self.images)
        rows = _listed(path) if path.suffix == ".json" else _lines(path)
        for row, where in islice(rows, skip, None):
            yield Record(row(), where, Folder(images, where).picture).example()


def matching(pattern: str) -> list[str]:
    """Return the files that a pattern with * or ? names, sorted; a plain name is none."""
    return sorted(glob(pattern)) if any(sign in pattern for sign in "*?") else []


def _lines(path: Path) -> Iterator[tuple[Callable[[], Any], str]]:
    """Yield what parses each line, and what names it."""
    with _reading(path), open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"'{path}' line {number}"
                yield partial(parse_json, line, where), where


def _listed(path: Path) -> Iterator[tuple[Callable[[], Any], str]]:
    """Yield the same for the records of a list."""
    with _reading(path):
        rows = parse_json(path.read_bytes(), f"'{path}'")
    if not isinstance(rows, list):
        raise DataError(
            f"'{path}': expected a list of records, got {type(rows).__name__}. One record a line "
            "is a .jsonl file."
        )
    for number, row in enumerate(rows, start=1):
        own = f" (id {row['id']})" if isinstance(row, dict) and "id" in row else ""
        yield partial(_same, row), f"'{path}' record {number}{own}"


def _same(row: Any) -> Any:
    return row


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say what cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"no such file: '{path}'. Give a task or a JSONL file.") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}).") from None
    except ValueError as error:  # no path at all, as one with a null character
        raise DataError(f"'{path}' cannot be read ({error}).") from None


def parse_text(content: bytes, where: str) -> str:
    """Parse text in UTF-8.

    Args:
        content: of a file, or a line of one. Editors on Windows begin a file with a mark of its
            byte order.
        where: names it in errors.

    Raises:
        DataError: it is none.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        at = f" line {line}" if line > 1 else ""
        byte = f"byte 0x{content[error.start]:02x}: {error.reason}"
        raise DataError(f"{where}{at} is not UTF-8 text ({byte}). Save it as UTF-8.") from None


def parse_json(content: bytes, where: str) -> Any:
    """Parse JSON in UTF-8; see `parse_text`.

    Raises:
        DataError: it is neither.
    """
    text = parse_text(content, where)
    try:
        value = json.loads(text)
        if _ESCAPED_HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{where}: {half} is half of a character. Write both halves.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from None
    return value
