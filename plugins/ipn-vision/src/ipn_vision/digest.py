"""A digest of weights as they are, for the fingerprints of encoders."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

__all__ = ["Digest"]


class Digest:
    """The digest of a module's weights; computed anew only when one of them has changed."""

    def __init__(self, module: nn.Module) -> None:
        # In a list, so that a module that keeps its own digest does not hold itself as a part.
        self._module = [module]
        self._found: tuple[tuple[int, ...], str] | None = None

    def __call__(self) -> str:
        """Return it in hexadecimal digits."""
        state = self._module[0].state_dict()
        versions = tuple(tensor._version for tensor in state.values())
        if self._found is None or self._found[0] != versions:
            digest = hashlib.sha256()
            for name, tensor in state.items():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(flat.view(torch.uint8).numpy())
            self._found = versions, digest.hexdigest()
        return self._found[1]
