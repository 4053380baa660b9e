"""What each visitor has shown and asked: nobody sees another's."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

from ipn_core.images import content_key

if TYPE_CHECKING:
    from PIL import Image

    from ipn_core.dialogue import Dialogue
    from ipn_core.model import IPN
    from ipn_core.subject import Subject

__all__ = ["Session", "Sessions"]


class Session:
    """One visitor's picture, and what was asked about it.

    Attributes:
        picture: the one shown last, None before the first.
        exchanges: the questions about it so far, each with the answers by strategy.
    """

    def __init__(self) -> None:
        self.picture: Image.Image | None = None
        self.exchanges: list[tuple[str, dict[str, str]]] = []
        self._key = ""
        self._dialogues: dict[tuple[str, str], Dialogue] = {}
        self._subjects: dict[tuple[str, str], Subject] = {}

    def show(self, picture: Image.Image) -> None:
        """Take a picture; another one than before starts everything anew."""
        key = content_key(picture)
        if key != self._key:
            self.forget()
            self.picture, self._key = picture, key

    def forget(self) -> None:
        """Start anew with the same picture."""
        self.exchanges.clear()
        self._dialogues.clear()
        self._subjects.clear()

    def about(self, model: IPN, *, goes_on: bool) -> Dialogue | Subject:
        """Return what answers the next question: it has read the picture once.

        Args:
            model: with the strategy that is asked.
            goes_on: whether the model is to remember its earlier questions of this kind.
        """
        asked = (model.name, model.strategy)
        if goes_on:
            if asked not in self._dialogues:
                self._dialogues[asked] = model.dialogue([self.picture])
            return self._dialogues[asked]
        if asked not in self._subjects:
            self._subjects[asked] = model.about([self.picture])
        return self._subjects[asked]


class Sessions:
    """The sessions of the visitors that came last.

    Each may hold a picture and caches of the language model, so that their number is limited:
    whoever was away longest is forgotten first.
    """

    def __init__(self, most: int = 64) -> None:
        """Choose how many.

        Args:
            most: sessions that are kept.
        """
        self.most = most
        self._kept: OrderedDict[str, Session] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._kept)

    def of(self, visitor: str) -> Session:
        """Return a visitor's session, a new one for a new visitor."""
        with self._lock:
            session = self._kept.setdefault(visitor, Session())
            self._kept.move_to_end(visitor)
            while len(self._kept) > self.most:
                self._kept.popitem(last=False)
        return session

    def drop(self, visitor: str) -> None:
        """Forget a visitor, who has left."""
        with self._lock:
            self._kept.pop(visitor, None)
