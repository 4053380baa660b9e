"""An answer piece by piece, from a thread that the model runs in."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteriaList, TextStreamer

if TYPE_CHECKING:
    from ipn_core.answer import Answer
    from ipn_core.dialogue import Dialogue
    from ipn_core.subject import Subject

__all__ = ["stream"]


class _Pieces(TextStreamer):
    """Hands whole words on as they come."""

    def __init__(self, tokenizer: Any, told: queue.SimpleQueue[Any]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._told = told

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._told.put(text)


class _Left:
    """Stops an answer that nobody waits for any more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), self.event.is_set(), device=ids.device)


def stream(
    asker: Dialogue | Subject, question: str, lock: threading.Lock, **options: Any
) -> Iterator[str | Answer]:
    """Yield an answer's text so far, longer each time, and then the answer.

    Whoever stops reading ends it at the next token.

    Args:
        asker: answers.
        question: the user's words.
        lock: of the language model.
        options: transformers' generation options.

    Raises:
        IPNError: what `asker` raises.
    """
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    left = _Left()
    pieces = _Pieces(asker.model.backbone.tokenizer, told)

    def work() -> None:
        try:
            with lock:
                if left.event.is_set():
                    return
                stops = StoppingCriteriaList([left])
                more = {**options, "streamer": pieces, "stopping_criteria": stops}
                told.put(asker.ask(question, **more))
        except Exception as error:  # whoever reads is told, whatever it is
            told.put(error)

    thread = threading.Thread(target=work, name="ipn-demo-answer", daemon=True)
    thread.start()
    text = ""
    try:
        while True:
            piece = told.get()
            if isinstance(piece, Exception):
                raise piece
            if not isinstance(piece, str):
                yield piece
                return
            text += piece
            yield text.strip()
    finally:
        left.event.set()
