"""Requests that wait are answered together: one thread owns the model."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ipn_core.errors import IPNError
from ipn_core.serving.rows import Done, Row, Rows

if TYPE_CHECKING:
    from ipn_core.model import IPN

__all__ = ["Batcher", "ClosedError", "FullError"]


class FullError(Exception):
    """No further request may wait, or come in; the text says which."""


class ClosedError(Exception):
    """The server is shutting down."""


class Batcher:
    """Takes requests, and answers those that wait together if they decode alike.

    A batch takes the request that waited longest and the others that share its temperature and
    such; the rest keep their order. A request with a seed is answered alone, so that the same
    request gives the same answer whoever else asks.
    """

    def __init__(
        self,
        model: IPN,
        *,
        size: int = 16,
        waiting: int = 64,
        patience_s: float = 0.01,
        note: Callable[[int, float], object] = lambda size, seconds: None,
    ) -> None:
        """Start the thread.

        Args:
            model: answers.
            size: requests in a batch at most.
            waiting: requests that may wait; more are refused.
            patience_s: how long a batch that is not full waits for more.
            note: is told the size and the seconds of every batch.
        """
        self.model = model
        self.size, self.waiting, self.patience_s = size, waiting, patience_s
        self._note = note
        self._queue: deque[Row] = deque()
        self._kept = 0
        self._answering = False
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="ipn-batcher", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many requests wait, those among them that are still being read."""
        return len(self._queue) + self._kept

    @property
    def busy(self) -> bool:
        """Whether a request waits or is being answered, and there is a thread that does it."""
        with self._changed:
            return self._thread.is_alive() and (self._answering or self.depth > 0)

    @property
    def alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive() and not self._closed

    @contextmanager
    def place(self) -> Iterator[Callable[[Row], None]]:
        """Keep a place in the queue while the block reads a request, and yield what puts it there.

        So that nobody's pictures are decoded who would then be sent away.

        Raises:
            FullError: too many wait already.
            ClosedError: no more are taken; also raised by what is yielded.
        """
        with self._changed:
            if self._closed:
                raise ClosedError
            if self.depth >= self.waiting:
                raise FullError(f"{self.waiting} requests wait already.")
            self._kept += 1
        taken = False

        def put(row: Row) -> None:
            nonlocal taken
            with self._changed:
                if self._closed:
                    raise ClosedError
                self._kept, taken = self._kept - 1, True
                self._queue.append(row)
                self._changed.notify()

        try:
            yield put
        finally:
            if not taken:
                with self._changed:
                    self._kept -= 1

    def close(self) -> None:
        """Take no more requests, answer those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if not self._queue:
                    return
                self._wait_for_more()
                batch = self._take()
                self._answering = bool(batch)
            if batch:
                started = time.perf_counter()
                try:
                    self._answer(batch)
                    self._note(len(batch), time.perf_counter() - started)
                finally:
                    self._answering = False

    def _wait_for_more(self) -> None:
        until = time.monotonic() + self.patience_s
        while len(self._queue) < self.size and not self._closed:
            left = until - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _take(self) -> list[Row]:
        """Take what is answered together; nobody reads what was cancelled while it waited."""
        kept: deque[Row] = deque()
        batch: list[Row] = []
        for row in self._queue:
            if row.cancelled.is_set():
                row.tell(Done("cancelled"))
            elif len(batch) < self.size and (not batch or _together(batch[0], row)):
                batch.append(row)
            else:
                kept.append(row)
        self._queue = kept
        return batch

    def _answer(self, batch: Sequence[Row]) -> None:
        try:
            self._generate(batch)
        except Exception as error:
            started = any(row.ids for row in batch)
            if len(batch) > 1 and isinstance(error, IPNError) and not started:
                for row in batch:  # what is wrong with one is no fault of the others
                    self._answer([row])
                return
            for row in batch:
                row.tell(Done(error=error))

    def _generate(self, batch: Sequence[Row]) -> None:
        from transformers import StoppingCriteriaList

        asked = batch[0].asked
        backbone = self.model.backbone
        rows = Rows(batch, backbone.tokenizer, list(backbone.eos_ids))
        with torch.random.fork_rng(enabled=asked.seed is not None):
            if asked.seed is not None:
                torch.manual_seed(asked.seed)
            answers = self.model.generate(
                [row.asked.prompt for row in batch],
                max_new_tokens=max(row.asked.tokens for row in batch),
                streamer=rows,
                stopping_criteria=StoppingCriteriaList([rows]),
                **asked.options,
            )
        for row, answer in zip(batch, answers, strict=True):
            row.finish(sum(n for kind, n in answer.tokens.items() if kind != "generated"))


def _together(first: Row, other: Row) -> bool:
    """Whether two requests decode alike."""
    seeded = first.asked.seed is not None or other.asked.seed is not None
    sampled = first.asked.temperature or other.asked.temperature
    return first.asked.options == other.asked.options and not (seeded and sampled)
