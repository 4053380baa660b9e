"""Which backend `auto` tries first: the one that was the fastest for such a call, if measured here.

`ipn bench attention --tune` measures, and keeps the winners in the user's cache folder: one file
for each device and versions of what computes. Without such a file the priority list decides.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ipn_core.attention.inputs import AttentionInputs
from ipn_core.files import atomic_write, lock
from ipn_core.processors import cpu_model
from ipn_core.weights import cache_dir

__all__ = [
    "Case",
    "answers",
    "describe",
    "forget",
    "machine",
    "measured",
    "table_path",
    "write_table",
]

FORMAT = 1
SWITCH = "IPN_ATTENTION_TABLE"
"""`off` in this variable of the environment leaves the choice to the priority list."""

_tables: dict[tuple[torch.device, int], dict[Case, str]] = {}
"""By device and number of threads, which may change within a process."""
answers: dict[Any, Any] = {}
"""What was decided for kinds of calls by a table, or for want of one; `forget` empties it."""


class Case(NamedTuple):
    """What the time of one call depends on; sequences end to end count as the batch.

    Attributes:
        masking: what is given of mask, bias, lengths and query_lengths, joined by "+", or "none".
        grad: whether a backward pass follows.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    masking: str
    grad: bool

    @classmethod
    def of(cls, inputs: AttentionInputs) -> Case:
        """Describe a call."""
        B, H, M, N = inputs.shape
        given = [
            name
            for name, there in (
                ("mask", inputs.mask is not None),
                ("bias", inputs.bias is not None),
                ("lengths", inputs.lengths is not None and not inputs.is_packed),
                ("packed", inputs.is_packed),
            )
            if there
        ]
        return cls(
            B if inputs.query_lengths is None else len(inputs.query_lengths),
            M,
            N,
            H,
            inputs.kv_heads,
            inputs.q.shape[-1],
            inputs.v.shape[-1],
            str(inputs.q.dtype).removeprefix("torch."),
            "+".join(given) or "none",
            inputs.needs_grad,
        )

    def rounded(self) -> Case:
        """Return the case with batch, queries and keys raised to powers of two."""
        batch, queries, keys = (1 << (n - 1).bit_length() for n in self[:3])
        return self._replace(batch=batch, queries=queries, keys=keys)


def measured(inputs: AttentionInputs) -> str | None:
    """Return the backend that was the fastest for calls like this one, None where none was timed.

    The very shape is looked up first, then the next powers of two. The table of a device and a
    number of threads is read once in a process.
    """
    device = inputs.q.device
    key = (device, torch.get_num_threads())
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = _read(device)
    if not table:
        return None
    case = Case.of(inputs)
    return table.get(case) or table.get(case.rounded())


def forget() -> None:
    """Read the tables anew on the next call."""
    _tables.clear()
    answers.clear()


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a measurement holds for: the device, its settings, and what computes there."""
    found: dict[str, Any] = {"format": FORMAT}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda or torch.version.hip
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        found["device"] = f"{cpu_model()} {capability}"
        found["threads"] = torch.get_num_threads()
    for library in ("ipn-core", "torch", "triton", "xformers", "mslk"):
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return found


def table_path(device: torch.device) -> Path:
    """Return the file of the winners for a device; it need not exist."""
    words = json.dumps(machine(device), sort_keys=True).encode()
    return cache_dir() / "attention" / f"{hashlib.sha256(words).hexdigest()[:16]}.json"


def describe(device: torch.device) -> str:
    """Say in a few words what "auto" goes by on a device."""
    if _is_off():
        return f"the priority list ({SWITCH}=off)"
    path = table_path(device)
    try:
        return f"{len(_parse(path, device))} timed cases in {path}"
    except FileNotFoundError:
        return "the priority list ('ipn bench attention --tune' times the backends here)"
    except (OSError, ValueError) as error:
        return f"the priority list ('{path}' is ignored: {error})"


def write_table(device: torch.device, winners: dict[Case, str]) -> Path:
    """Add winners to the table of a device, those of the same cases replaced.

    Returns:
        Its file.

    Raises:
        IPNError: it cannot be written.
    """
    path = table_path(device)
    with lock(path.with_suffix(".lock")):
        try:
            known = _parse(path, device)
        except (OSError, ValueError):
            known = {}
        rows = [{**case._asdict(), "winner": name} for case, name in {**known, **winners}.items()]
        content = json.dumps({"machine": machine(device), "rows": rows}, indent=1)
        atomic_write(path, content.encode())
    forget()
    return path


def _read(device: torch.device) -> dict[Case, str]:
    """Return the winners by case, and by rounded case where no such case was measured itself."""
    if _is_off():
        return {}
    path = table_path(device)
    try:
        rows = _parse(path, device)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the measured attention backends in '{path}' are ignored: {error}. Run "
            "'ipn bench attention --tune' again, or delete the file.",
            stacklevel=2,
        )
        return {}
    near: dict[Case, str] = {}
    for case, winner in rows.items():
        near.setdefault(case.rounded(), winner)
    return near | rows


def _is_off() -> bool:
    return os.environ.get(SWITCH, "").lower() == "off"


def _parse(path: Path, device: torch.device) -> dict[Case, str]:
    """Read a table.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or about another device or other versions.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        raise ValueError("it is no table of attention backends")
    if found.get("machine") != machine(device):
        raise ValueError("it was measured on another device or with other versions")
    winners: dict[Case, str] = {}
    for row in found["rows"]:
        try:
            winner = row.pop("winner")
            case = Case(**row)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"a row of it is damaged ({error!r})") from error
        numbers = [n for n in case[:7] if type(n) is int and n > 0]
        if len(numbers) < 7 or not isinstance(winner, str):
            raise ValueError(f"a row of it is damaged ({row})")
        winners[case] = winner
    return winners
