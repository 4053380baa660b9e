"""`ipn doctor`: what this installation can do here, and what stands in its way."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ipn_core.cli.options import Debug, Json

if TYPE_CHECKING:
    from rich.console import Console

    from ipn_core.cli.probe import Probe

__all__ = ["doctor"]

LIBRARIES = (
    "ipn-core",
    "torch",
    "transformers",
    "accelerate",
    "xformers",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "pluggy",
    "pydantic",
    "pillow",
    "numpy",
)


def doctor(json: Json = False, debug: Debug = False) -> None:
    """Show versions, device, attention backends with reasons, the cache, and every fault."""
    from ipn_core.cli.health import cache, settings
    from ipn_core.cli.probe import probe_plugins
    from ipn_core.cli.terminal import print_json, quiet
    from ipn_core.weights import cache_dir

    with quiet():
        probes = probe_plugins(deep=True)
        device, broken = _device()
        kept, unkept = cache(cache_dir())
        found = {
            "versions": _versions(),
            "device": device,
            "attention": {} if broken else _attention(device["name"], probes),
            "attention_by": None if broken else _chosen_by(device["name"]),
            "faults": [
                *_faults(probes, broken),
                *({"plugin": "cache", "reason": reason} for reason in (*unkept, *_size(broken))),
            ],
            "cache": kept,
            "settings": settings(),
        }
    if json:
        print_json(found)
    else:
        _print_findings(found)


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str | None] = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return found


def _faults(probes: Sequence[Probe], broken: Exception | None) -> list[dict[str, str]]:
    """Return what is wrong with torch, with what is installed, and with plugins."""
    from ipn_core.cli.health import merged, requirement_faults, torch_fault

    found = [{"plugin": "torch", "reason": torch_fault(broken)}] if broken else []
    found += requirement_faults(["ipn-core", *(probe.distribution for probe in probes)])
    known = " ".join(str(broken).split()) if broken else None
    for probe in probes:
        reasons = merged(probe.faults, known)
        found += [{"plugin": probe.label, "reason": reason} for reason in reasons]
    return found


def _size(broken: Exception | None) -> list[str]:
    """Return what is wrong with the size that the cache of features may have."""
    if broken:
        return []
    from ipn_core.errors import ConfigError
    from ipn_core.training.shards import cache_size

    try:
        cache_size()
    except ConfigError as error:
        return [str(error)]
    return []


def _device() -> tuple[dict[str, Any], Exception | None]:
    """Describe where models run, and what keeps torch from starting."""
    from ipn_core.processors import allowed_threads, cpu_model, limit_threads

    found: dict[str, Any] = {
        "name": "cpu",
        "description": cpu_model(),
        "system": f"{platform.system()} {platform.release()}",
    }
    try:
        import torch
    except Exception as error:  # a broken binary raises OSError, ImportError or its own
        return found, error
    limit_threads()
    found["threads"] = torch.get_num_threads()
    allowed = allowed_threads()
    found["threads_by"] = allowed.source if allowed.number == found["threads"] else "torch's choice"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["name"] = "cuda"
        found["description"] = torch.cuda.get_device_name()
        found["count"] = torch.cuda.device_count()
        found["memory_bytes"] = {"free": free, "total": total}
    return found, None


def _attention(device: str, probes: Sequence[Probe]) -> dict[str, dict[str, Any]]:
    """Return each backend with its reasons against plain inputs in the device's usual dtype."""
    import torch

    from ipn_core.attention import backend_reasons

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with _sound_plugins(probes):
        found = backend_reasons(device, dtype)
    return {
        name: {"available": not why, "reasons": why, "dtype": str(dtype).removeprefix("torch.")}
        for name, why in found.items()
    }


@contextmanager
def _sound_plugins(probes: Sequence[Probe]) -> Iterator[None]:
    """Have no plugin loaded into this process that ended the one that looked at it."""
    from ipn_core.plugins import CORE

    before = os.environ.get("IPN_PLUGINS")
    sound = {probe.name for probe in probes if probe.answered} - {CORE.name}
    os.environ["IPN_PLUGINS"] = ",".join(sorted(sound))
    try:
        yield
    finally:
        if before is None:
            del os.environ["IPN_PLUGINS"]
        else:
            os.environ["IPN_PLUGINS"] = before


def _chosen_by(device: str) -> str:
    """Say what `auto` chooses among the backends by."""
    import torch

    from ipn_core.attention.choice import describe

    # With its number, as tensors have it.
    here = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None
    return describe(here or torch.device(device))


def _print_findings(found: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    _section(console, "versions", {k: v or "not installed" for k, v in found["versions"].items()})
    device = dict(found["device"])
    memory = device.pop("memory_bytes", None)
    if memory:
        device["memory"] = f"{memory['free'] / 1e9:.1f} of {memory['total'] / 1e9:.1f} GB free"
    if "threads" in device:
        device["threads"] = f"{device['threads']}, by {device.pop('threads_by')}"
    _section(console, "device", device)
    _section(
        console,
        "attention",
        {
            name: "works" if row["available"] else "no: " + "; ".join(row["reasons"])
            for name, row in found["attention"].items()
        }
        | ({"auto": f"by {found['attention_by']}"} if found["attention_by"] else {}),
    )
    cache = found["cache"]
    used, free = cache["used_bytes"] / 1e9, cache["free_bytes"] / 1e9
    _section(
        console,
        "cache",
        {"folder": cache["folder"], "used": f"{used:.2f} GB", "free on its disk": f"{free:.1f} GB"},
    )
    if found["settings"]:
        _section(console, "settings", found["settings"])
    console.print("faults")
    for fault in found["faults"]:
        console.print(f"    {fault['plugin']}: {fault['reason']}")
    if not found["faults"]:
        console.print("    none")


def _section(console: Console, title: str, rows: Mapping[str, Any]) -> None:
    console.print(title)
    for name, value in rows.items():
        console.print(f"    {name:<20}{value}")
