"""Which CPU this is, and how many this process may use: in a container, fewer than there are.

torch counts the CPUs of the machine or of the process's affinity; it knows nothing of a quota. A
container with 2 of 64 CPUs would then run as many threads as the machine has cores, each of which
waits for the others' turns.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

__all__ = ["Allowed", "allowed_cpus", "allowed_threads", "cpu_model", "limit_threads"]

ROOT = Path("/")
VARIABLE = "OMP_NUM_THREADS"


class Allowed(NamedTuple):
    """A number, from 1, and what says so."""

    number: int
    source: str


def cpu_model() -> str:
    """Return the processor's model where the system tells, else its kind."""
    try:
        text = (ROOT / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def allowed_cpus() -> Allowed:
    """Return how many CPUs this process may use.

    These are the CPUs that it may run on (`os.sched_getaffinity`, else those of the machine), and
    no more than the CPU quota of its control group and of those around that, rounded up.
    """
    if hasattr(os, "sched_getaffinity"):
        found = Allowed(len(os.sched_getaffinity(0)), "the CPUs that this process may run on")
    else:
        found = Allowed(os.cpu_count() or 1, "the CPUs of this machine")
    quota = min(_quotas(), default=math.inf)
    if quota < found.number:
        found = Allowed(math.ceil(quota), f"the cgroup's quota of {quota:g} CPUs")
    return found._replace(number=max(1, found.number))


def allowed_threads() -> Allowed:
    """Return how many threads are to compute: `OMP_NUM_THREADS`, else one a CPU that is allowed."""
    first = os.environ.get(VARIABLE, "").split(",")[0].strip()
    if first.isdecimal() and int(first) > 0:
        return Allowed(int(first), VARIABLE)
    return allowed_cpus()


def limit_threads() -> None:
    """Let torch use no more threads than CPUs are allowed, for the commands of `ipn`.

    The number is only ever lowered, and stays where `OMP_NUM_THREADS` says it. A library has no
    business with its caller's threads, so nothing does this on import.
    """
    import torch

    found = allowed_threads()
    if found.source != VARIABLE and found.number < torch.get_num_threads():
        torch.set_num_threads(found.number)


def _quotas() -> Iterator[float]:
    """Yield the CPUs that each control group around this process may use, if it is limited."""
    for controllers, group in _groups():
        unified = not controllers
        if not unified and "cpu" not in controllers.split(","):
            continue
        mounts = (
            ("sys/fs/cgroup",) if unified else ("sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct")
        )
        for mount in mounts:
            # In a container, the group's own path may be that of the machine, and not be there.
            for place in (group, *group.parents):
                folder = ROOT / mount / place.relative_to("/")
                quota = _unified(folder) if unified else _legacy(folder)
                if quota is not None:
                    yield quota


def _groups() -> Iterator[tuple[str, PurePosixPath]]:
    """Yield the control groups of this process: controllers (none in version 2) and path."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    for line in lines.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/"):
            yield controllers, PurePosixPath(path)


def _unified(folder: Path) -> float | None:
    """Return the quota of a group of version 2: `cpu.max` is "QUOTA PERIOD" or "max PERIOD"."""
    return _share(*_words(folder / "cpu.max"))


def _legacy(folder: Path) -> float | None:
    """Return the quota of a group of version 1, where -1 is none."""
    return _share(*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us"))


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return []


def _share(*words: str) -> float | None:
    """Return quota over period, None unless both are positive numbers."""
    if len(words) != 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        return None
    quota, period = (int(word) for word in words)
    return quota / period
