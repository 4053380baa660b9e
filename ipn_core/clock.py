"""Seconds per stage: laps of one clock, so that the stages add up to the whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["STAGES", "Clock"]

STAGES = ("perceive", "prefill", "request", "interact", "inject", "decode")


class Clock:
    """Attributes all time since the last lap to one of `STAGES`.

    Between `with clock.decoding(lm)` the first forward counts as prefill (it runs the last
    segment), what follows as decode. The first such block has the first token.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.first_token = 0.0
        self._start = self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self, stage: str) -> None:
        """Count the time since the last lap as `stage`."""
        now = self._now()
        self.seconds[stage] += now - self._last
        self._last = now

    @contextmanager
    def decoding(self, lm: torch.nn.Module) -> Iterator[None]:
        """Split the time inside the block at the end of the first forward of `lm`."""

        def first(*_: object) -> None:
            handle.remove()
            self.lap("prefill")
            self.first_token = self.first_token or self._last - self._start

        handle = lm.register_forward_hook(first)
        try:
            yield
        finally:
            handle.remove()
            self.lap("decode")

    def report(self) -> dict[str, float]:
        """Return the seconds of the six stages, to the first token, and in total."""
        total = self._last - self._start
        return {**self.seconds, "first_token": self.first_token, "total": total}
