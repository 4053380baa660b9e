"""What may be wrong with an installation, each fault with what to do: for `ipn doctor`."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packaging.requirements import Requirement

__all__ = ["cache", "merged", "requirement_faults", "settings", "torch_fault"]

SPACE = 1_000_000_000
"""Bytes: the weights of the starter take about half of it, and features come on top."""
_COMPONENT = re.compile(
    r"^(?P<name>\w+ '[^']+') of .+? cannot be imported from '[^']+': (?P<why>.+)$", re.DOTALL
)


def settings() -> dict[str, str]:
    """Return the environment's settings of ours, without what is secret."""
    found = sorted((name, value) for name, value in os.environ.items() if name.startswith("IPN_"))
    return {name: "(set)" if name.endswith("_KEY") else value for name, value in found}


def torch_fault(error: Exception) -> str:
    """Say what to do about a torch that cannot be imported."""
    why = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"import failed: {why}. Nothing that computes works without it: install it anew, by the "
        "command that the selector on pytorch.org has for this machine."
    )


def requirement_faults(
    distributions: Iterable[str], *, missing: bool = True
) -> list[dict[str, str]]:
    """Hold what distributions ask for against what is installed; extras are left out.

    Args:
        distributions: their names.
        missing: whether what is not installed at all is a fault, too.

    Returns:
        a fault for each requirement that is of another version, or missing.
    """
    from importlib.metadata import PackageNotFoundError, distribution, requires, version

    from packaging.requirements import InvalidRequirement, Requirement

    found = []
    for name in sorted(set(distributions)):
        try:
            label = f"{name} {distribution(name).version}"
        except PackageNotFoundError:
            continue  # a plugin that was registered by hand
        for text in requires(name) or ():
            try:
                wanted = Requirement(text)
            except InvalidRequirement:
                continue  # pip would have refused it
            if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
                continue
            try:
                here = version(wanted.name)
            except PackageNotFoundError:
                here = None
            if missing if here is None else not wanted.specifier.contains(here, prereleases=True):
                found.append({"plugin": label, "reason": _unmet(wanted, here)})
    return found


def _unmet(wanted: Requirement, here: str | None) -> str:
    asked = f"{wanted.name}{wanted.specifier}"
    said = f"version {here} is installed" if here else "it is not installed"
    return f"it needs {asked}, and {said}. Run: pip install '{asked}'"


def cache(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Describe the cache folder, which need not be there, and what keeps it from being used."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    files = [f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()]
    free = shutil.disk_usage(there).free
    found = {
        "folder": str(folder),
        "used_bytes": sum(f.stat().st_size for f in files),
        "free_bytes": free,
    }
    other = "Set IPN_CACHE to a folder that can be written."
    if not there.is_dir():
        return found, [f"'{there}' is a file, no folder. {other}"]
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        why = error.strerror or type(error).__name__
        return found, [f"'{folder}' cannot be written: {why} ('{there}'). {other}"]
    if free < SPACE:
        return found, [
            f"{free / 1e9:.2f} GB are free for '{folder}': the starter alone takes 0.54 GB. Make "
            "room, or set IPN_CACHE to a folder of a larger disk."
        ]
    return found, []


def merged(reasons: Sequence[str], known: str | None = None) -> list[str]:
    """Put the components of a plugin that fail for the same reason into one line.

    Args:
        reasons: of one plugin.
        known: why torch cannot be imported: what fails for that is not said again.
    """
    alike: dict[str, list[str]] = {}
    for reason in reasons:
        match = _COMPONENT.match(reason)
        name, why = (match["name"], match["why"]) if match else ("", reason)
        if known is None or known not in why:
            alike.setdefault(why, []).append(name)
    return [_joined(names, why) for why, names in alike.items()]


def _joined(names: Sequence[str], why: str) -> str:
    if not names[0]:
        return why
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} cannot be imported: {why}"
