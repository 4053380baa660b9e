"""From the CPU to where a model runs, without waiting for what is still being computed there.

A plain `tensor.to(device)` waits until a GPU has done all that it was given before, and so do
`torch.tensor(values, device=device)` and a list, or a tensor on the CPU, as an index of what lies
there. The other way round nothing may be asked for without waiting: it would be read too early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["Lane", "send", "tensor_on"]

SMALL = 1 << 16
"""Bytes that CUDA takes along with the command to copy them. It may wait where it has to stage more
than these, unless they lie in pinned memory, which the GPU fetches by itself."""

_LATER = ("cuda", "meta")
"""Where a copy may be asked for and done later, the source being free at once; meta copies nothing,
and tests see there what a GPU would be asked for."""


def send(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor on a device, in another dtype if one is given.

    Args:
        tensor: wherever it lies; what lies in pinned memory already must stay as it is until the
            device has fetched it.
        device: where to.
        dtype: what it becomes there.
    """
    if tensor.device.type != "cpu" or device.type not in _LATER:
        return tensor.to(device=device, dtype=dtype)
    if device.type == "cuda" and tensor.nbytes > SMALL and not torch.compiler.is_compiling():
        tensor = tensor.pin_memory()
    # Converted there: what is converted on its way is copied from memory that is not pinned.
    return tensor.to(device=device, non_blocking=True).to(dtype=dtype or tensor.dtype)


def tensor_on(values: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return numbers as a tensor on a device: `torch.tensor(values, device=device, dtype=dtype)`.

    Args:
        values: a number, or lists of them.
        device: where to.
        dtype: of the tensor, by default as torch infers it.
    """
    return send(torch.tensor(values, dtype=dtype), device)


class Lane:
    """A stream of a GPU beside the one that computes, for copies that come before they are needed.

    On other devices it is no more than a place in the code.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Let what is sent inside the block go beside what is being computed."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield

    def arrive(self, tensors: Sequence[Tensor]) -> None:
        """Let what is computed from here on wait for tensors that were sent, and use them."""
        if self._stream is None:
            return
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        for tensor in tensors:
            # Their memory is the other stream's, which must not give it away too early.
            tensor.record_stream(computing)
