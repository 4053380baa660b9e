"""What a training measures, in `metrics.jsonl`; read without anything that trains."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ipn_core.files import atomic_write

__all__ = ["METRICS", "Metrics", "best_validation", "last_validation", "read_metrics"]

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return all whole lines of a file, none where there is none."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def last_validation(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the entry of the last validation."""
    return next((entry for entry in reversed(entries) if "accuracy" in entry), None)


def best_validation(entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the entry of the best validation, the first one, of the last stage with any."""
    last = last_validation(entries)
    if last is None:
        return None
    of_stage = [e for e in entries if e["stage_index"] == last["stage_index"] and "accuracy" in e]
    return max(of_stage, key=lambda e: e["accuracy"])


class Metrics:
    """Lines of JSON, one an entry; resuming forgets those after the saved state."""

    def __init__(self, folder: Path, stage: int = 0, step: int = 0) -> None:
        """Open the file, keeping what was logged up to a step of a stage."""
        self.path = folder / METRICS
        kept = [e for e in self.read() if (e["stage_index"], e["step"]) <= (stage, step)]
        atomic_write(self.path, "".join(json.dumps(e) + "\n" for e in kept).encode())

    def read(self) -> list[dict[str, Any]]:
        """Return all whole lines."""
        return read_metrics(self.path)

    def best(self) -> dict[str, Any] | None:
        """Return the entry of the best validation."""
        return best_validation(self.read())

    def write(self, **entry: Any) -> None:
        """Append a line."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
