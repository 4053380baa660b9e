"""Seconds per stage: laps of one clock, so that the stages add up to the whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

__all__ = ["STAGES", "Clock"]

STAGES = ("perceive", "prefill", "request", "interact", "inject", "decode")


class Clock:
    """Attributes all time since the last lap to one of `STAGES`.

    Between `with clock.decoding(lm)` the first forward counts as prefill (it runs the last
    segment), what follows as decode. The first such block has the first token.

    A GPU is not waited for at a lap: an event goes along with its work, and takes the time when the
    work has come so far. Events are read when the seconds are asked for, which waits for the last.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stages: list[str] = []
        self._first: int | None = None
        self._marks: list[Any] = [self._mark()]

    def _mark(self) -> Any:
        """The present moment: seconds, or an event in the work of a GPU."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        """Seconds from one mark to a later one."""
        if self._device.type != "cuda":
            return float(end - start)
        return float(start.elapsed_time(end)) / 1000

    def _since_start(self, mark: int) -> float:
        return self._between(self._marks[0], self._marks[mark])

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as `stage`."""
        self._marks.append(self._mark())
        self._stages.append(stage)

    @contextmanager
    def decoding(self, lm: torch.nn.Module) -> Iterator[None]:
        """Split the time inside the block at the end of the first forward of `lm`."""

        def first(*_: object) -> None:
            handle.remove()
            self.lap("prefill")
            self._first = self._first or len(self._stages)

        handle = lm.register_forward_hook(first)
        try:
            yield
        finally:
            handle.remove()
            self.lap("decode")

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each of the six stages so far."""
        self._wait()
        found = dict.fromkeys(STAGES, 0.0)
        for stage, (start, end) in zip(self._stages, pairwise(self._marks), strict=True):
            found[stage] += self._between(start, end)
        return found

    @property
    def first_token(self) -> float:
        """The seconds from the start to the first token, 0 before there is one."""
        self._wait()
        return 0.0 if self._first is None else self._since_start(self._first)

    def report(self) -> dict[str, float]:
        """Return the seconds of the six stages, to the first token, and in total."""
        seconds, first = self.seconds, self.first_token
        return {**seconds, "first_token": first, "total": self._since_start(-1)}

    def _wait(self) -> None:
        """Wait until a GPU has reached the last mark; it has reached the others then."""
        if self._device.type == "cuda":
            self._marks[-1].synchronize()
