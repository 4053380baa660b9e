"""Loading a model for a command: what is missing is fetched with progress, and said on stderr."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ipn_core.cli.terminal import Bar, note
from ipn_core.errors import UserError

if TYPE_CHECKING:
    from ipn_core.model import IPN

__all__ = [
    "check_extra",
    "check_file",
    "check_folder",
    "check_page",
    "check_png",
    "check_question",
    "load_model",
    "pull",
]


def check_extra(extra: str, *packages: str) -> None:
    """Refuse a command whose packages are not installed; it is called like the extra with them.

    Raises:
        UserError: one of them is not there.
    """
    for package in packages:
        if find_spec(package) is None:
            raise UserError(
                f"ipn {extra} needs a package that is not installed ({package}): "
                f"pip install 'ipn-core[{extra}]'."
            )


def check_question(question: str) -> None:
    """Refuse a question that is empty or not text, before anything is loaded."""
    if not question.strip():
        raise UserError('the question is empty. Ask something, such as "Is there a dog?".')
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError(
            "the question is not valid text: it holds bytes that are no characters in this "
            "terminal's encoding. Type it in UTF-8."
        ) from None


def check_png(path: str, image: str) -> None:
    """Refuse a heatmap's path that is no PNG's name, or that `check_file` refuses.

    Raises:
        UserError: it is one of these.
    """
    if not path.lower().endswith(".png"):
        raise UserError(f"--heatmap '{path}' does not end in .png. A heatmap is written as PNG.")
    check_file("--heatmap", path, "a PNG file", image, "the picture itself")


def check_page(path: str, image: str) -> None:
    """Refuse a trace's path that is no HTML file's name, or that `check_file` refuses.

    Raises:
        UserError: it is one of these.
    """
    if not path.lower().endswith((".html", ".htm")):
        raise UserError(f"--trace '{path}' does not end in .html. A trace is written as HTML.")
    check_file("--trace", path, "an HTML file", image, "the picture itself")


def check_file(option: str, path: str, kind: str, source: str, what: str) -> None:
    """Refuse a file that `atomic_write` could not write, or that would overwrite what is read.

    Args:
        option: what the user gave it with.
        path: of the file.
        kind: what is written, such as "a PNG file".
        source: the file that is read; there may be none of this name.
        what: says what the source is.

    Raises:
        UserError: it is the source, a folder or no ordinary file, or it or its folder is missing
            or read-only, or its name is too long.
    """
    folder = os.path.dirname(os.path.realpath(path))
    there = os.path.exists(path)
    if not path:
        why = f"names no file. Give the name of {kind}"
    elif _too_long(path):
        why = "is longer than a file's name can be. Choose a shorter one"
    elif os.path.isdir(path):
        why = f"is a folder. Give the name of {kind} in it"
    elif not os.path.isdir(folder):
        why = f"cannot be written: there is no folder '{folder}'. Make it first"
    elif there and not os.path.isfile(path):
        why = "is no ordinary file. Choose another name"
    elif not all(os.access(p, os.W_OK) for p in (folder, *([path] if there else []))):
        why = "may not be written. Choose another place"
    elif there and os.path.exists(source) and os.path.samefile(path, source):
        why = f"is {what}. Choose another name"
    else:
        return
    raise UserError(f"{option} '{path}' {why}.")


def check_folder(option: str, path: Path) -> None:
    """Refuse a folder that cannot be made or written into, before anything is loaded.

    Raises:
        UserError: it or a part of its path is a file, is read-only, or has too long a name.
    """
    there = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
    if _too_long(path):
        why = "is longer than a folder's name can be. Choose a shorter one"
    elif not os.path.isdir(there):
        why = "is a file" if there == path else f"cannot be made: '{there}' is a file"
        why += ". Name a folder, which is made if it is not there"
    elif not os.access(there, os.W_OK):
        why = f"may not be written: '{there}' is read-only. Choose another place"
    else:
        return
    raise UserError(f"{option} '{path}' {why}.")


def _too_long(path: str | Path) -> bool:
    try:
        os.lstat(path)
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def pull(name: str) -> None:
    """Fetch known weights with progress, unless they are there."""
    from ipn_core.plugins import get_registry

    weights = get_registry().get("weights", name).load()
    if not weights.present():
        with Bar() as bar:
            weights.pull(bar.bytes)


def load_model(
    model: str,
    interact: str | None,
    untrained: bool,
    check: Callable[[IPN], object] | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
) -> IPN:
    """Load a model by name, folder, hub id, or `importer:source`.

    Args:
        model: what the user called it.
        interact: the strategy, None for the model's default.
        untrained: allow a strategy without weights, and say so.
        check: raises if the model will not do, before anything is said of it.
        device: where it runs, None for the GPU if there is one.
        dtype: of its weights, None for the device's usual one; see `ipn_core.placing`.

    Raises:
        UserError: there is no such model, strategy, device or format, or its files are not right.
        DownloadError: something that it needs could not be fetched.
    """
    from ipn_core.placing import device_of, dtype_on, place
    from ipn_core.plugins import get_registry
    from ipn_core.processors import limit_threads

    limit_threads()
    dtype_on(device_of(device), dtype)  # refuses what there is not before anything is fetched
    registry = get_registry()
    known = registry.entries("weights")
    if model in known:
        pull(model)
    from ipn_core.checkpoint import load, open_source
    from ipn_core.model import IPN

    source = open_source(model, registry)
    trained = interact is None or interact in source.strategies
    if trained or untrained:
        chosen = interact if interact in source.strategies else source.strategies[0]
        needed = source.config(str(chosen), registry)
        if needed.backbone.weights in known:
            pull(str(needed.backbone.weights))
    loaded = load(IPN, source, interact=interact, untrained=untrained, registry=registry)
    place(loaded, device, dtype)
    if check is not None:
        check(loaded)
    if not trained:
        note(
            f"model '{model}' has no trained weights for interaction '{interact}': it starts from "
            "random ones, and so do its answers."
        )
    for fault in registry.faults:
        reason = " ".join(fault.reason.split())
        what = "has a fault" if any(registry.of(fault.plugin)) else "was left out"
        note(f"plugin {fault.plugin.label} {what}: {reason}. See 'ipn plugins'.")
    return loaded
