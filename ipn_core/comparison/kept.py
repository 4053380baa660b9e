"""What a comparison keeps in its folder from one call to the next, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ipn_core.errors import CheckpointError
from ipn_core.files import atomic_write

__all__ = ["damaged", "read_kept", "write_kept", "wrong_keys"]


def write_kept(path: Path, values: Mapping[str, Any], indent: int | None = None) -> None:
    """Write a file whole or not at all.

    Raises:
        IPNError: the system refused.
    """
    atomic_write(path, (json.dumps(values, indent=indent) + "\n").encode())


def read_kept(path: Path, kinds: Mapping[str, type], cure: str) -> dict[str, Any]:
    """Return what `write_kept` wrote.

    Args:
        path: the file.
        kinds: keys that must be there, and the type of each one's value.
        cure: what its reader may do where it is damaged, as a sentence.

    Raises:
        CheckpointError: it cannot be read, is no JSON object, or lacks a key.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        wrong = wrong_keys(found, kinds)
    except (OSError, ValueError) as error:
        wrong = [type(error).__name__]
    if wrong:
        raise damaged(path, wrong, cure)
    return dict(found)


def wrong_keys(values: object, kinds: Mapping[str, type]) -> list[str]:
    """Return the keys that an object of JSON lacks, or has of another type."""
    if not isinstance(values, dict):
        return ["it is no object"]
    return [key for key, kind in kinds.items() if not isinstance(values.get(key), kind)]


def damaged(path: Path, wrong: Iterable[str], cure: str) -> CheckpointError:
    """Return what to raise where a file is not as it was written, or an earlier version wrote it.

    Args:
        path: the file.
        wrong: what is wrong with it: keys, or an error.
        cure: what its reader may do, as a sentence.
    """
    return CheckpointError(
        f"'{path}', kept of a comparison, is damaged or of an earlier version "
        f"({', '.join(wrong)}). {cure}"
    )
