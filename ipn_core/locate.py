"""From what a user calls weights or a model to where they lie."""

from __future__ import annotations

import re
from pathlib import Path

from ipn_core.errors import UnknownNameError, near
from ipn_core.plugins import Registry, get_registry

__all__ = ["locate_model", "locate_weights"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate_weights(name: str, registry: Registry | None = None) -> Path | str:
    """Find the weights of a backbone or tower, fetching a known name that is not here yet.

    Args:
        name: a name of `ipn models list`, a folder, or a hub id `owner/name`.
        registry: where names are looked up.

    Returns:
        A folder, or the hub id itself for transformers to fetch.

    Raises:
        UnknownNameError: it is none of these.
        DownloadError: a known name could not be fetched.
    """
    registry = registry or get_registry()
    known = registry.entries("weights")
    if name in known:
        weights = known[name].load()
        folder: Path = weights.folder() if weights.present() else weights.pull(None)
        return folder
    if Path(name).is_dir():
        return Path(name)
    if _HUB_ID.fullmatch(name) and not Path(name).exists():
        return name
    raise UnknownNameError(
        f"unknown weights '{name}': not a known name ({', '.join(sorted(known)) or 'none'}), a "
        f"folder or a hub id{near(name, known)}. See 'ipn models list'."
    )


def locate_model(name: str | Path, registry: Registry | None = None) -> Path:
    """Find a checkpoint folder of ours by known name, folder or hub id.

    Raises:
        UnknownNameError: it is none of these, or the hub cannot be reached.
    """
    registry = registry or get_registry()
    known = registry.entries("weights")
    if isinstance(name, str) and name in known:
        weights = known[name].load()
        folder: Path = weights.folder() if weights.present() else weights.pull(None)
        return folder
    path = Path(name)
    if path.is_dir():
        return path
    if isinstance(name, str) and _HUB_ID.fullmatch(name) and not path.exists():
        return _from_hub(name)
    raise UnknownNameError(
        f"unknown model '{name}': known are {', '.join(sorted(known)) or 'none'}"
        f"{near(str(name), known)}, or give a checkpoint folder. See 'ipn models list'."
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.md"])
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnknownNameError(
            f"model '{name}' could not be fetched from the hub: {first} "
            "Give a name of 'ipn models list' or a checkpoint folder."
        ) from None
    return Path(found)
