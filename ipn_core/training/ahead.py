"""The next batch's features go to the device while the batch before it is computed there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ipn_core.transfer import Lane

if TYPE_CHECKING:
    import torch

    from ipn_core.training.data import Batch

__all__ = ["Ahead"]


class Ahead:
    """Sends one batch ahead of the one that is computed, so that the device holds two at most."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lane = Lane(device)
        self._sent: tuple[Batch, Batch] | None = None

    def send(self, batch: Batch) -> None:
        """Let a batch's features go to the device beside what is computed there."""
        with self._lane.sending():
            self._sent = batch, _moved(batch, self._device)

    def take(self, batch: Batch) -> Batch:
        """Return a batch with its features on the device: as it was sent, or sent now."""
        if self._sent is None or self._sent[0] is not batch:
            return _moved(batch, self._device)
        (_, there), self._sent = self._sent, None
        features = there.features
        tokens = () if features.global_tokens is None else (features.global_tokens,)
        self._lane.arrive((features.values, *tokens))
        return there


def _moved(batch: Batch, device: torch.device) -> Batch:
    return replace(batch, features=batch.features.to(device))
