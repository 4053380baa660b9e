"""Where a model runs, and in which number format, unless its user says otherwise.

On a GPU answers are bfloat16 by default: half the bytes, and on what has units for it several times
the speed of float32. Training keeps its own precision (`precision` of its config).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ipn_core.errors import UserError

if TYPE_CHECKING:
    from ipn_core.model import IPN

__all__ = ["DTYPES", "device_of", "dtype_on", "place"]

DTYPES = ("float32", "bfloat16", "float16")


def device_of(name: str | None = None) -> torch.device:
    """Return a device of this machine.

    Args:
        name: "cpu", "cuda" or "cuda:1"; None for the current GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if count else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    known = {"cpu": 1, "cuda": count}
    if (device.index or 0) >= known.get(device.type, 0):
        gpus = ["cuda", *(f"cuda:{i}" for i in range(count))] if count else []
        here = " or ".join(["cpu", *gpus])
        raise UserError(f"'--device' must be {here} here, got '{name}'. See 'ipn doctor'.")
    if str(device) == "cuda":
        # With its number, as tensors have it.
        return torch.device("cuda", torch.cuda.current_device())
    return device


def dtype_on(device: torch.device, name: str | None = None) -> torch.dtype | None:
    """Return the number format on a device; None to leave weights as they were loaded.

    Args:
        device: of `device_of`.
        name: one of `DTYPES`; None for bfloat16 on a GPU that has it, elsewhere what was loaded.

    Raises:
        UserError: there is no such format.
    """
    if name is None:
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else None
    if name not in DTYPES:
        raise UserError(f"'--dtype' must be one of {', '.join(DTYPES)}, got '{name}'.")
    found: torch.dtype = getattr(torch, name)
    return found


def place(model: IPN, device: str | None = None, dtype: str | None = None) -> IPN:
    """Move a model in place to where it shall answer, and return it.

    What a device map or quantization has put somewhere stays there.

    Args:
        model: of `IPN.from_pretrained`, which leaves it on the CPU.
        device: "cpu", "cuda" or "cuda:1"; None for the current GPU, else the CPU.
        dtype: one of `DTYPES`; None for bfloat16 on a GPU that has it, else as it was loaded.

    Raises:
        UserError: there is no such device or format here.
    """
    there = device_of(device)
    return model.to(device=there, dtype=dtype_on(there, dtype))
