"""From what a user calls weights or a model to where they lie."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ipn_core.errors import (
    CheckpointError,
    DownloadError,
    IPNError,
    UnknownNameError,
    first_line,
    near,
)
from ipn_core.plugins import Registry, get_registry

__all__ = ["PICKLES", "fetch_from_hub", "hub_error", "locate_model", "locate_weights"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""How the names of pickled weights end."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_PICKLED = (b"\x80", b"PK\x03\x04")
"""How pickles begin: with their protocol, or inside of torch's zip file."""


def locate_weights(name: str, registry: Registry | None = None) -> Path | str:
    """Find the weights of a backbone or tower, fetching a known name that is not here yet.

    Args:
        name: a name of `ipn models list`, a folder, or a hub id `owner/name`.
        registry: where names are looked up.

    Returns:
        A folder, or the hub id itself for transformers to fetch.

    Raises:
        UnknownNameError: it is none of these.
        CheckpointError: it is a file.
        DownloadError: a known name could not be fetched.
    """
    registry = registry or get_registry()
    found = _find(name, registry)
    if found is not None:
        return found
    known = registry.entries("weights")
    raise UnknownNameError(
        f"unknown weights '{name}': not a known name ({', '.join(sorted(known)) or 'none'}), a "
        f"folder or a hub id{near(name, known)}. See 'ipn models list'."
    )


def locate_model(
    name: str | Path,
    registry: Registry | None = None,
    check: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """Find a checkpoint folder of ours by known name, folder or hub id.

    Args:
        name: one of these.
        registry: where known names are looked up.
        check: is called with a folder from the hub before its weights are fetched; what it raises
            is handed on.

    Raises:
        UnknownNameError: it is none of these, or the hub has no such repository.
        CheckpointError: it is a file.
        DownloadError: it could not be fetched, or the hub cannot be reached.
    """
    registry = registry or get_registry()
    found = _find(name, registry)
    if isinstance(found, str):
        what, light = f"model '{found}'", ["*.json", "*.md"]
        check(fetch_from_hub(found, light, what))
        return fetch_from_hub(found, [*light, "*.safetensors"], what)
    if found is not None:
        return found
    known = registry.entries("weights")
    raise UnknownNameError(
        f"unknown model '{name}': known are {', '.join(sorted(known)) or 'none'}"
        f"{near(str(name), known)}, or give a checkpoint folder, or a published checkpoint as "
        f"IMPORTER:SOURCE ({', '.join(sorted(registry.entries('importer'))) or 'none installed'}). "
        "See 'ipn models list'."
    )


def _find(name: str | Path, registry: Registry) -> Path | str | None:
    """Return a known name's folder, a folder, or what looks like a hub id; None for others."""
    known = registry.entries("weights")
    if isinstance(name, str) and name in known:
        weights = known[name].load()
        folder: Path = weights.folder() if weights.present() else weights.pull(None)
        return folder
    # `os.path` instead of `Path`: a text too long for a file's name is no file, and no failure.
    if os.path.isdir(name):
        return Path(name)
    if os.path.isfile(name):
        raise _file_error(Path(name))
    return name if isinstance(name, str) and _HUB_ID.fullmatch(name) else None


def _file_error(path: Path) -> CheckpointError:
    """Return the refusal of a file where a folder is wanted."""
    try:
        with path.open("rb") as file:
            pickled = file.read(4).startswith(_PICKLED)
    except OSError:
        pickled = False
    if pickled or path.suffix in PICKLES:
        return CheckpointError(
            f"'{path}' is a pickle, which can run code when loaded: refused. Give a folder with "
            "safetensors, or a name of 'ipn models list'."
        )
    return CheckpointError(
        f"'{path}' is a file: weights and models are folders. Give the folder, such as "
        f"'{path.parent}', or a name of 'ipn models list'."
    )


def fetch_from_hub(name: str, patterns: Sequence[str], what: str) -> Path:
    """Fetch files of a hub repository; returns their folder.

    Args:
        name: the repository, `owner/name`.
        patterns: of the files' names.
        what: names it in errors, such as "model 'owner/name'".

    Raises:
        UnknownNameError: the hub has no such repository.
        DownloadError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        raise hub_error(what, error, name) or _not_fetched(what, error) from error


def hub_error(what: str, error: BaseException, name: str) -> IPNError | None:
    """Return what to raise where a library failed because of the hub; None if it is not to blame.

    Args:
        what: was to be fetched, such as "model 'owner/name'".
        error: of huggingface_hub, or of a library that called it.
        name: the repository, or a path that was taken for one.
    """
    from huggingface_hub import errors as hub

    for cause in _causes(error):
        if isinstance(cause, hub.RemoteEntryNotFoundError):
            return None  # it answered: there is no such file
        if isinstance(cause, hub.GatedRepoError):
            return _not_fetched(what, error)
        if isinstance(
            cause,
            (hub.RepositoryNotFoundError, hub.RevisionNotFoundError, hub.HFValidationError),
        ):
            return UnknownNameError(
                f"cannot find {what} here or on the hub: {first_line(error)} Give a name of "
                "'ipn models list', a folder, or a hub id."
            )
        if isinstance(
            cause, (hub.HfHubHTTPError, hub.LocalEntryNotFoundError, ConnectionError, TimeoutError)
        ):
            return _no_such_path(what, name) or _not_fetched(what, error)
    return None


def _no_such_path(what: str, name: str) -> UnknownNameError | None:
    """Return the error for a path of which only the last part is not there; None for others."""
    folder, _, last = name.rpartition("/")
    if not os.path.isdir(folder):
        return None
    near_it = near(name, [f"{folder}/{one}" for one in sorted(os.listdir(folder))])
    return UnknownNameError(
        f"cannot find {what}: the folder '{folder}' has no '{last}'{near_it}, and the hub cannot "
        "be reached to look there. Give a name of 'ipn models list', a folder, or a hub id."
    )


def _not_fetched(what: str, error: BaseException) -> DownloadError:
    return DownloadError(
        f"cannot fetch {what} from the hub, and there is no such folder here: {first_line(error)} "
        "Give a name of 'ipn models list' or a folder, or try again online."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
