"""Files that are either whole or absent: atomic writes, folders and locks between processes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

from ipn_core.errors import IPNError

__all__ = [
    "atomic_folder",
    "atomic_write",
    "atomic_writes",
    "claim",
    "lock",
    "make_folder",
    "remove_unfinished",
    "sha256_of",
]

Content: TypeAlias = bytes | Callable[[Path], object]
"""Of a file: its bytes, or a function that writes them to the path that it is given."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_POLL_S = 0.1
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\..+)?")


def atomic_write(path: str | os.PathLike[str], content: Content) -> None:
    """Write a file so that whoever reads `path` finds the old content or the new, never a part.

    The content goes to a temporary file in the same folder, which is flushed to the disk and then
    renamed; it is removed if anything fails, an interruption included.

    Args:
        path: the file; its folder must exist. A link is followed.
        content: the bytes, or a function that writes them to the path it receives (which has the
            same suffix), such as `lambda to: figure.savefig(to)`.

    Raises:
        IPNError: the system refused, for instance because the disk is full; `path` is as before.
    """
    atomic_writes({path: content})


def atomic_writes(contents: Mapping[str | os.PathLike[str], Content]) -> None:
    """Write files as `atomic_write` does one, and none where one finds no room or cannot be made.

    All are flushed to the disk before the first is renamed. What refuses a rename, which needs no
    space, or ends the process between two of them leaves those that were renamed before.

    Args:
        contents: by the file; see `atomic_write`.

    Raises:
        IPNError: the system refused one of them.
    """
    ready: list[tuple[Path, Path]] = []
    try:
        for path, content in contents.items():
            target = Path(path).resolve()
            mark = secrets.token_hex(4)
            temporary = target.with_name(f".{target.stem[:32]}.{mark}.tmp{target.suffix}")
            ready.append((temporary, target))
            with _refusing(path):
                _prepare(temporary, target, content)
        for path, (temporary, target) in zip(contents, ready, strict=True):
            with _refusing(path):
                os.replace(temporary, target)
                _sync(target.parent)
    finally:
        for temporary, _ in ready:
            with suppress(OSError):
                temporary.unlink()


def _prepare(temporary: Path, target: Path, content: Content) -> None:
    """Write what is to be renamed to `target`, and flush it."""
    with open(temporary, "xb") as file:
        if isinstance(content, bytes):
            file.write(content)
    # Some libraries make their files private; the new file is to be like any other.
    mode = (target if target.exists() else temporary).stat().st_mode & 0o777
    if not isinstance(content, bytes):
        content(temporary)
    temporary.chmod(mode)
    _sync(temporary)


def make_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder, and those that it lies in, unless it is there.

    Raises:
        IPNError: the system refused.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IPNError(_refusal(path, error)) from error


def remove_unfinished(folder: str | os.PathLike[str]) -> None:
    """Remove what `atomic_write` left in a folder because its process was killed.

    Nothing else may be writing there.
    """
    for path in Path(folder).iterdir():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to fill, and rename it to `path` if the block succeeds.

    One process at a time may do this for a `path`: hold a `lock`. What an earlier process left
    because it was killed is removed first.

    Raises:
        FileExistsError: `path` exists.
    """
    target = Path(path).resolve()
    if target.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for entry in temporary.rglob("*"):
            if entry.is_file():
                entry.chmod(mode)  # for the reason given in `atomic_write`
                _sync(entry)
        os.rename(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def lock(
    path: str | os.PathLike[str], waiting: Callable[[], object] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock between processes; the system frees it when its holder dies.

    Args:
        path: the lock's file, made where it is missing and left where it is.
        waiting: called once if another process holds the lock.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        held = _try_lock(file)
        if not held and waiting is not None:
            waiting()
        while not held:
            time.sleep(_POLL_S)
            held = _try_lock(file)
        yield


@contextmanager
def claim(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Hold the same lock if nobody does, without waiting; yields whether it is held.

    Args:
        path: the lock's file, made where it is missing and left where it is.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        yield _try_lock(file)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the hexadecimal sha256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def _try_lock(file: BinaryIO) -> bool:
        try:
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(file: BinaryIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders; its renames are journalled
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _refusing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say what the system refused, and what to do."""
    try:
        yield
    except OSError as error:
        raise IPNError(_refusal(path, error)) from error


def _refusal(path: str | os.PathLike[str], error: OSError) -> str:
    if error.errno in _NO_SPACE:
        step = "Free some space or choose another disk, and run it again"
    else:
        step = "Choose a folder that exists and that you may write to"
    reason = error.strerror or str(error)
    return f"cannot write '{os.fspath(path)}': {reason}. What was there is unchanged. {step}."
