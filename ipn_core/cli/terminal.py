"""What goes to the terminal: the result to stdout, everything else to stderr or nowhere."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ipn_core.cli.options import DEBUGGING
from ipn_core.progress import NOTE_EVERY_S

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["Bar", "note", "print_json", "quiet"]

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries off the terminal: their warnings and bars vanish, their prints go to stderr.

    With --debug, warnings and logs are let through.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not DEBUGGING.get():
            for name, value in _QUIET.items():
                os.environ.setdefault(name, value)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            before = logging.root.manager.disable
            logging.disable(logging.ERROR)
            stack.callback(logging.disable, before)
        stack.callback(_bars_off())
        yield


def _bars_off() -> Any:
    """Switch transformers' bars off, if it is there already; return what undoes that."""
    if "transformers" not in sys.modules:
        return lambda: None
    from transformers.utils import logging as its

    shown = its.is_progress_bar_enabled()
    its.disable_progress_bar()
    return its.enable_progress_bar if shown else lambda: None


def note(text: str) -> None:
    """Tell the user something on stderr."""
    print(f"ipn: {text}", file=sys.stderr)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


class Bar:
    """Progress on stderr: a bar on a terminal, else a line now and then.

    Its method `bytes` is an `ipn_core.weights.Report`, `steps` a callback of (done, total).
    """

    def __init__(self, title: str = "") -> None:
        self.title = title
        self._progress: Progress | None = None
        self._task: Any = None
        self._what = ""
        self._said = 0.0

    def __enter__(self) -> Self:
        """Start; nothing is drawn before there is something to report."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Take the bar away, so that a message stands on a line of its own."""
        self._stop()

    def bytes(self, what: str, done: int, total: int | None) -> None:
        """Report bytes of something."""
        if not sys.stderr.isatty():
            share = f" {done / 1e6:,.0f} of {total / 1e6:,.0f} MB" if total else ""
            self._say(what, share, what != self._what or done == total)
        else:
            self._draw(what, done, total, counts_bytes=True)
        self._what = what

    def steps(self, done: int, total: int) -> None:
        """Report how many of something are done."""
        if not sys.stderr.isatty():
            self._say(self.title, f" {done:,} of {total:,}", done == total)
        else:
            self._draw(self.title, done, total, counts_bytes=False)

    def _say(self, what: str, share: str, always: bool) -> None:
        now = time.monotonic()
        if always or now - self._said >= NOTE_EVERY_S:
            self._said = now
            note(f"{what}{share}")

    def _draw(self, what: str, done: int, total: int | None, counts_bytes: bool) -> None:
        if self._progress is None or what != self._what:
            self._stop()
            self._progress = _progress(counts_bytes)
            self._progress.start()
            self._task = self._progress.add_task(what, total=total)
        self._progress.update(self._task, completed=done, total=total)
        self._what = what

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _progress(counts_bytes: bool) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = [DownloadColumn(), TransferSpeedColumn()] if counts_bytes else [MofNCompleteColumn()]
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *counts,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
