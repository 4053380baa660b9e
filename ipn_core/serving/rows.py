"""The rows of a batch while it is decoded: each has its own length, stops, and reader."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ipn_core.serving.protocol import Asked

__all__ = ["Done", "Row", "Rows"]

_UNFINISHED = "\ufffd"
"""What a tokenizer shows of a character whose last byte has not come yet."""


@dataclass(frozen=True)
class Done:
    """The end of an answer.

    Attributes:
        reason: "stop" or "length"; "cancelled" where nobody reads it any more.
        usage: tokens, as the protocol counts them.
        error: what went wrong instead, if anything did.
    """

    reason: str = "stop"
    usage: dict[str, int] = field(default_factory=dict)
    error: Exception | None = None


class Row:
    """One request on its way: what it asks, and the pieces of its answer as they come."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.pieces: queue.SimpleQueue[str | Done] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.ids: list[int] = []
        self.reason: str | None = None
        self.ready: Any = None
        self._sent = 0
        self._text = ""

    def tell(self, piece: str | Done) -> None:
        """Hand a piece to the reader, and wake it up."""
        self.pieces.put(piece)
        if self.ready is not None:
            self.ready()

    def add(self, id_: int, tokenizer: Any, ends: Sequence[int]) -> None:
        """Take the next token of the answer, unless the answer is over."""
        if self.reason is not None:
            return
        self.ids.append(id_)
        text = tokenizer.decode(self.ids, skip_special_tokens=True).lstrip()
        cut = min((at for stop in self.asked.stops if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            text, self.reason = text[:cut], "stop"
        elif id_ in ends:
            self.reason = "stop"
        elif len(self.ids) >= self.asked.tokens:
            self.reason = "length"
        if self.cancelled.is_set():
            self.reason = "cancelled"
        self._text = text
        self._send(final=self.reason is not None)

    def finish(self, prompt_tokens: int) -> None:
        """Close the answer."""
        self._send(final=True)
        used = {"prompt_tokens": prompt_tokens, "completion_tokens": len(self.ids)}
        total = {"total_tokens": prompt_tokens + len(self.ids)}
        self.tell(Done(self.reason or "length", used | total))

    def _send(self, final: bool) -> None:
        """Hand on what is settled: no half character, no space at the end, no half of a stop."""
        settled = self._text.rstrip() if final else self._held_back()
        if len(settled) > self._sent:
            self.tell(settled[self._sent :])
            self._sent = len(settled)

    def _held_back(self) -> str:
        text = self._text.rstrip(_UNFINISHED)
        longest = max((len(stop) for stop in self.asked.stops), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.asked.stops):
                text = text[:-size]
                break
        return text.rstrip()


class Rows:
    """A batch: transformers' streamer and stopping criterion in one, for all rows at once.

    `generate` hands over the tokens of a step before it asks who stops, so that each row ends at
    its own length, stop or cancellation while the others go on.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any, ends: Sequence[int]) -> None:
        self.rows = rows
        self._tokenizer = tokenizer
        self._ends = tuple(ends)
        self._prompt = True

    def put(self, ids: Tensor) -> None:
        """Take the tokens (B,) of a step; what comes first is the prompt, which has none here."""
        if self._prompt:
            self._prompt = False
            return
        for row, id_ in zip(self.rows, ids.reshape(-1).tolist(), strict=True):
            row.add(id_, self._tokenizer, self._ends)

    def end(self) -> None:
        """Nothing is left to do: `Row.finish` knows how many tokens the prompt had."""

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows (B,) are over."""
        over = [row.reason is not None or row.cancelled.is_set() for row in self.rows]
        return torch.tensor(over, device=ids.device)
