"""What a comparison keeps in its folder from one call to the next, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipn_core.errors import CheckpointError
from ipn_core.files import atomic_write

__all__ = ["read_kept", "write_kept"]


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
        wrong = [key for key, kind in kinds.items() if not isinstance(found[key], kind)]
        why = ", ".join(wrong) if isinstance(found, dict) else "it is no object"
    except (OSError, ValueError, LookupError, TypeError) as error:
        why = type(error).__name__
    if why:
        raise CheckpointError(f"'{path}', kept of a comparison, is damaged ({why}). {cure}")
    return dict(found)
