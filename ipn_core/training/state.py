"""The states of an unfinished training: a safetensors file each, the last replaced atomically.

Order of data, learning rate and noise follow from seed, stage and step, so that weights, optimizer
and the two numbers are all there is to keep.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.errors import CheckpointError
from ipn_core.files import atomic_write
from ipn_core.training.processes import gathered, laid_out

if TYPE_CHECKING:
    from ipn_core.model import IPN

__all__ = ["Position", "collect", "load_moments", "load_state", "peek", "save_state", "weights_of"]

FILE = "state.safetensors"
_MODEL = "model."
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True, slots=True)
class Position:
    """How far a training has come.

    Attributes:
        stage: index of the stage that is running.
        step: optimizer steps done in it.
        config: digest of the config, which must be the same to go on.
        scaler: state of the fp16 loss scaler, if there is one.
        windows: where in its data the stage is, as `Sampler.state` says; None between stages.
    """

    stage: int
    step: int
    config: str
    scaler: dict[str, Any] | None = None
    windows: list[dict[str, Any]] | None = None


def collect(
    model: IPN, optimizer: torch.optim.Optimizer | None, names: dict[Tensor, str]
) -> dict[str, Tensor]:
    """Return copies on the CPU of what there is to save, whole; all processes must take part.

    Args:
        model: all its trainable weights and buffers are kept in full precision.
        optimizer: AdamW, or None between stages.
        names: of the parameters.
    """
    tensors = {f"{_MODEL}{k}": v for k, v in model.trained_state().items()}
    if optimizer is not None:
        for parameter, moments in optimizer.state.items():
            for key in _MOMENTS:
                tensors[f"optimizer.{names[parameter]}.{key}"] = moments[key]
    return {k: gathered(v.detach()).cpu().clone() for k, v in tensors.items()}


def save_state(folder: Path, position: Position, tensors: dict[str, Tensor], keep: int = 1) -> None:
    """Save; a crash at any moment leaves the last whole state.

    Args:
        folder: of the training.
        position: how far it is.
        tensors: what `collect` gave.
        keep: how many states to have, this one included; older ones get names of their own.
    """
    from safetensors.torch import save

    path = folder / FILE
    if keep > 1 and (before := peek(folder)) is not None:
        older = folder / f"state-{before.stage:02}-{before.step:08}.safetensors"
        atomic_write(older, lambda to: shutil.copyfile(path, to))
    atomic_write(path, save(tensors, metadata={"position": json.dumps(asdict(position))}))
    here = f"state-{position.stage:02}-{position.step:08}.safetensors"
    # A run that went on from an older state leaves later ones behind.
    others = sorted(folder.glob("state-*.safetensors"))
    stale = [one for one in others if one.name >= here]
    kept = [one for one in others if one.name < here]
    for one in [*stale, *kept[: max(len(kept) - keep + 1, 0)]]:
        one.unlink()


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's weights among what `collect` gave, by their names in the model."""
    return {k.removeprefix(_MODEL): v for k, v in tensors.items() if k.startswith(_MODEL)}


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
            f"'{path}' is damaged ({error}). Put an older 'state-*.safetensors' in its place, if "
            "the config keeps some, or delete it and start the training anew."
        ) from None


def load_state(folder: Path, model: IPN) -> None:
    """Put the weights of a saved state back into a model."""
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE)
    own = model.trained_state()
    missing = [k for k in own if _MODEL + k not in tensors]
    if missing:
        raise CheckpointError(
            f"'{folder / FILE}' does not fit the config: missing {', '.join(missing[:8])}."
        )
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(tensors[_MODEL + key])


def load_moments(folder: Path, optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> None:
    """Put the moments of a saved state back into the optimizer of a stage that had begun."""
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            moments = {k: tensors.get(f"optimizer.{names[parameter]}.{k}") for k in _MOMENTS}
            if moments["step"] is not None:
                optimizer.state[parameter] = {
                    k: v.clone() if k == "step" else laid_out(v, parameter)
                    for k, v in moments.items()
                    if v is not None
                }
