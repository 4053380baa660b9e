"""Counting what becomes of many cases: refused, taken, or broken."""

from __future__ import annotations

import contextlib
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ipn_core.benchmarking import Row
from ipn_core.errors import IPNError, UserError

__all__ = ["Tally", "TooLongError", "peak_mib", "reset_peak"]

SHOWN = 12
"""Of what broke, so many are told in full."""
_STATUS = Path("/proc/self/status")


class TooLongError(BaseException):
    """A case ran past its limit; no `except Exception` of what is tried may catch it."""


@dataclass
class Tally:
    """Cases of one kind.

    Attributes:
        name: what is tried.
        limit_s: seconds that one case may take.
        needed: whether it is a failure that there is no case.
        refused, taken: how many ended so.
        broken: what is wrong with each of the others.
        seconds: of each.
        more: further numbers for the row.
    """

    name: str
    limit_s: float = 10.0
    needed: bool = True
    refused: int = 0
    taken: int = 0
    broken: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    more: dict[str, float] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        """How many cases there were."""
        return len(self.seconds)

    def attempt(
        self,
        label: str,
        call: Callable[[], Any],
        *,
        good: Callable[[Any], bool] | None = None,
        refusal: type[IPNError] = UserError,
        holds: Callable[[], str] | None = None,
    ) -> Any:
        """Try one case.

        Args:
            label: names it, so that it can be made again.
            call: must return, or raise a refusal.
            good: whether what it returned is what it should be; None for whatever it is.
            refusal: the error that is a refusal, with a text that says something.
            holds: says what does not hold any more afterwards, such as that there is output.

        Returns:
            What the call returned, or the refusal.
        """
        started = time.perf_counter()
        found: Any = None
        fault = ""
        try:
            with self._in_time():
                found = call()
            if good is not None and not good(found):
                fault = f"it returned {str(found)[:200]!r}"
        except refusal as error:
            found = error
            fault = _faults_of(str(error))
        except TooLongError:
            fault = f"it took more than {self.limit_s:.0f} s"
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {str(error)[:200]}"
            fault = f"{said} ({Path(where.filename).name}:{where.lineno})"
        if not fault and holds is not None:
            fault = holds()
        self.count(time.perf_counter() - started, isinstance(found, refusal), fault, label)
        return found

    def count(self, seconds: float, refused: bool, fault: str = "", label: str = "") -> None:
        """Count a case whose end is known."""
        self.seconds.append(seconds)
        if fault:
            self.broken.append(f"{label}: {fault}")
        elif refused:
            self.refused += 1
        else:
            self.taken += 1

    def row(self) -> Row:
        """Return the counts as a row of results."""
        counts = {"tried": self.tried, "refused": self.refused, "taken": self.taken}
        return Row.of(
            self.name,
            self.seconds,
            more={**counts, "broken": len(self.broken), "slowest": max(self.seconds), **self.more},
        )

    def check(self) -> None:
        """Fail if a case broke something."""
        assert self.tried or not self.needed, f"{self.name}: nothing was tried"
        shown = "\n".join(self.broken[:SHOWN])
        assert not self.broken, f"{self.name}: {len(self.broken)} of {self.tried} broke:\n{shown}"

    @contextlib.contextmanager
    def _in_time(self) -> Iterator[None]:
        def late(*_: Any) -> None:
            raise TooLongError

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, self.limit_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _faults_of(text: str) -> str:
    """Return what is wrong with the text of a refusal."""
    if not text.strip():
        return "it was refused without a word"
    if "Traceback (most recent call last)" in text:
        return "its refusal holds a traceback"
    if len(text) > 20_000:
        return f"its refusal has {len(text):,} characters"
    return ""


def reset_peak() -> None:
    """Begin to measure the process's peak of memory anew (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(of: str = "VmHWM") -> float:
    """Return the process's peak of resident memory in MiB, or with "VmRSS" what it has now."""
    found = re.search(rf"^{of}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0
