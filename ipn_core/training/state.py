"""The state of an unfinished training: one safetensors file, replaced atomically.

Order of data, learning rate and noise follow from seed, stage and step, so that weights, optimizer
and the two numbers are all there is to keep.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.errors import CheckpointError
from ipn_core.files import atomic_write

if TYPE_CHECKING:
    from ipn_core.model import IPN

__all__ = ["Position", "load_state", "peek", "save_state"]

FILE = "state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class Position:
    """How far a training has come.

    Attributes:
        stage: index of the stage that is running.
        step: optimizer steps done in it.
        config: digest of the config, which must be the same to go on.
        scaler: state of the fp16 loss scaler, if there is one.
    """

    stage: int
    step: int
    config: str
    scaler: dict[str, Any] | None = None


def save_state(
    folder: Path,
    position: Position,
    model: IPN,
    optimizer: torch.optim.Optimizer | None,
    names: dict[Tensor, str],
) -> None:
    """Save; a crash at any moment leaves the last whole state.

    Args:
        folder: of the training.
        position: how far it is.
        model: all its trainable weights and buffers are kept in full precision.
        optimizer: AdamW, or None between stages.
        names: of the parameters.
    """
    from safetensors.torch import save

    tensors = {f"model.{k}": v.detach().cpu().clone() for k, v in model.trained_state().items()}
    if optimizer is not None:
        for parameter, moments in optimizer.state.items():
            for key in _MOMENTS:
                value = moments[key].detach().cpu().clone()
                tensors[f"optimizer.{names[parameter]}.{key}"] = value
    atomic_write(folder / FILE, save(tensors, metadata={"position": json.dumps(asdict(position))}))


def peek(folder: Path) -> Position | None:
    """Return the position of a saved state, or None where there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return Position(**json.loads(file.metadata()["position"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{path}' is damaged ({error}). Delete it and start the training anew."
        ) from None


def load_state(
    folder: Path,
    model: IPN,
    optimizer: torch.optim.Optimizer | None,
    names: dict[Tensor, str],
) -> None:
    """Put a saved state back into a model and, where the stage had begun, its optimizer."""
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE)
    own = model.trained_state()
    missing = [k for k in own if f"model.{k}" not in tensors]
    if missing:
        raise CheckpointError(
            f"'{folder / FILE}' does not fit the config: missing {', '.join(missing[:8])}."
        )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(tensors[f"model.{key}"])
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {k: tensors.get(f"optimizer.{names[parameter]}.{k}") for k in _MOMENTS}
            if moments["step"] is not None:
                optimizer.state[parameter] = {
                    k: v.clone() if k == "step" else v.to(parameter.device)
                    for k, v in moments.items()
                    if v is not None
                }
