"""Notices transfers to a device that make the CPU wait for it, without a device.

The meta device stands in for a GPU: what is copied there from the CPU, and how, is what a GPU would
be asked for. `torch.cuda.set_sync_debug_mode` notices the same transfers, and needs one.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_COPIES = (aten._to_copy.default, aten.copy_.default)
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_AWAY = "meta"


@contextmanager
def waiting_transfers() -> Iterator[list[str]]:
    """Collect what was done inside the block that would wait, each with the line that did it."""
    found: list[str] = []
    with _Operators(found), _Calls(found):
        yield found


class _Operators(TorchDispatchMode):
    """Sees copies, and operators that fetch a tensor of the CPU by themselves."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = _tensors((args, kwargs))
        here = [t for t in given if t.device.type == "cpu" and t.numel()]
        if here and any(t.device.type == _AWAY for t in (*given, *_tensors(out))):
            if func in _COPIES:
                waits = not (kwargs.get("non_blocking") or (func is _COPIES[1] and args[2:3]))
            else:
                # A single number goes along with the command, but not where it is an index.
                waits = func in _INDEXING or any(t.ndim for t in here)
            if waits:
                self.found.append(f"{func} at {_where()}")
        return out


class _Calls(TorchFunctionMode):
    """Sees numbers and lists become tensors there, which no operator does."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor):
            waits = out.device.type == _AWAY and out.numel()
        elif func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].device.type == _AWAY:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            number = func is Tensor.__setitem__ and isinstance(args[2], (bool, int, float))
            waits = any(isinstance(i, list) for i in index) or (number and _tensors(index))
        else:
            waits = False
        if waits:
            self.found.append(f"{func.__name__} at {_where()}")
        return out


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _where() -> str:
    """The innermost line that is neither torch's nor of this file."""
    frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename]
    at = next(f for f in reversed(frames) if f.filename != __file__)
    return f"{at.filename}:{at.lineno}"
