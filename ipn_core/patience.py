"""Foreign code that is run while a command starts: how long it may take, and who ended it.

A plugin's import is ended by an exception, so that whatever comes after it goes on. Whether an
exception is the plugin's own, or a Ctrl-C that came while it was imported, only a look at the
signals tells: a plugin may raise `KeyboardInterrupt` by itself.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["GivenUpError", "Watched"]

NOTE_S = 10.0
"""After so long the user is told who keeps the command waiting."""
LIMIT_S = 60.0
"""After so long it is given up: a plugin's top module imports nothing heavy."""
GRACE_S = 10.0
"""After so long again the process is ended: what runs cannot be interrupted, such as C code."""
_SIGNALS = ("SIGINT", "SIGTERM", "SIGALRM")


class GivenUpError(BaseException):
    """What was watched has taken too long; no `except Exception` of its own may catch it."""


class Watched:
    """A context around foreign code.

    Only in the main thread of a process can it be interrupted, and only there do signals arrive;
    elsewhere the user is told, and that is all.

    Attributes:
        signalled: whether a signal of someone else arrived meanwhile, such as Ctrl-C: an exception
            is not the foreign code's own then.
    """

    ends_process = False
    """Whether a process may be ended that cannot be interrupted: where it is one of ours."""

    def __init__(self, who: str, advice: str) -> None:
        """Prepare to watch.

        Args:
            who: is run, such as "plugin ipn-mine 0.1.0".
            advice: what the user may do about it, a sentence.
        """
        self.who, self.advice = who, advice
        self.signalled = False
        self._late = False
        self._before: dict[int, Any] = {}
        self._done = threading.Event()
        self._clock = threading.Thread(target=self._tick, name="ipn-patience", daemon=True)

    def __enter__(self) -> Self:
        """Begin."""
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
                before = signal.getsignal(number)
                # Nothing can be put back in the place of what is not Python's.
                if callable(before) or (number == signal.SIGINT and before is not None):
                    self._before[number] = before
                    signal.signal(number, self._hear)
        self._clock.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the signals' handlers back that were there, unless others were set meanwhile."""
        self._done.set()
        self._clock.join()
        for number, before in self._before.items():
            if signal.getsignal(number) == self._hear:
                signal.signal(number, before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._late:
            if not self._done.is_set():
                raise GivenUpError
            return
        self.signalled = True
        before = self._before[number]
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(number, before)
            signal.raise_signal(number)

    def _tick(self) -> None:
        if self._done.wait(NOTE_S):
            return
        ends = f"It is given up after {LIMIT_S:g} s. " if self._before else ""
        self._say(f"{self.who} has been importing for {NOTE_S:g} s. {ends}{self.advice}")
        if self._done.wait(LIMIT_S - NOTE_S) or signal.SIGINT not in self._before:
            return
        self._late = True
        if hasattr(signal, "pthread_kill"):  # unlike the other, it ends a sleep
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        else:  # pragma: no cover
            _thread.interrupt_main()
        if not self._done.wait(GRACE_S) and self.ends_process:
            self._say(f"{self.who} can be neither imported nor interrupted. {self.advice}")
            os._exit(1)

    def _say(self, text: str) -> None:
        print(f"ipn: {text}", file=sys.stderr, flush=True)
