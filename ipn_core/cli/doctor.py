"""`ipn doctor`: what this installation can do here, and what stands in its way."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
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
    """Show versions, device, attention backends with reasons, plugin faults and the cache."""
    from ipn_core.cli.probe import probe_plugins
    from ipn_core.cli.terminal import print_json, quiet

    with quiet():
        probes = probe_plugins(deep=True)
        device, trouble = _device()
        found = {
            "versions": _versions(),
            "device": device,
            "attention": {} if trouble else _attention(device["name"], probes),
            "attention_by": None if trouble else _chosen_by(device["name"]),
            "faults": [
                {"plugin": probe.label, "reason": reason}
                for probe in probes
                for reason in probe.faults
            ]
            + [{"plugin": "torch", "reason": reason} for reason in trouble],
            "cache": _cache(),
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


def _device() -> tuple[dict[str, Any], list[str]]:
    """Describe where models run, and what keeps torch from starting."""
    found: dict[str, Any] = {
        "name": "cpu",
        "description": platform.processor() or platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
    }
    try:
        import torch
    except Exception as error:  # a broken binary raises OSError, ImportError or its own
        return found, [f"import failed: {type(error).__name__}: {error}"]
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        found["name"] = "cuda"
        found["description"] = torch.cuda.get_device_name()
        found["count"] = torch.cuda.device_count()
        found["memory_bytes"] = {"free": free, "total": total}
    return found, []


def _attention(device: str, probes: Sequence[Probe]) -> dict[str, dict[str, Any]]:
    """Return each backend with its reasons against plain inputs in the device's usual dtype."""
    import torch

    from ipn_core.attention import backend_reasons
    from ipn_core.plugins import CORE

    # Plugins that ended the process that looked at them are not loaded into this one.
    broken = {probe.name for probe in probes if not probe.answered}
    os.environ["IPN_PLUGINS"] = ",".join({probe.name for probe in probes} - broken - {CORE.name})
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return {
        name: {"available": not why, "reasons": why, "dtype": str(dtype).removeprefix("torch.")}
        for name, why in backend_reasons(device, dtype).items()
    }


def _chosen_by(device: str) -> str:
    """Say what `auto` chooses among the backends by."""
    import torch

    from ipn_core.attention.choice import describe

    # With its number, as tensors have it.
    here = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else None
    return describe(here or torch.device(device))


def _cache() -> dict[str, Any]:
    import shutil

    from ipn_core.weights import cache_dir

    folder = cache_dir()
    there = next(p for p in (folder, *folder.parents) if p.exists())
    files = [f for f in folder.rglob("*") if f.is_file() and not f.is_symlink()]
    return {
        "folder": str(folder),
        "used_bytes": sum(f.stat().st_size for f in files),
        "free_bytes": shutil.disk_usage(there).free,
    }


def _print_findings(found: Mapping[str, Any]) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, soft_wrap=True)
    _section(console, "versions", {k: v or "not installed" for k, v in found["versions"].items()})
    device = dict(found["device"])
    memory = device.pop("memory_bytes", None)
    if memory:
        device["memory"] = f"{memory['free'] / 1e9:.1f} of {memory['total'] / 1e9:.1f} GB free"
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
    console.print("faults")
    for fault in found["faults"]:
        console.print(f"    {fault['plugin']}: {fault['reason']}")
    if not found["faults"]:
        console.print("    none")


def _section(console: Console, title: str, rows: Mapping[str, Any]) -> None:
    console.print(title)
    for name, value in rows.items():
        console.print(f"    {name:<20}{value}")
