"""What the processes of one training do together: start, weigh their shares, put shards together.

accelerate starts them (`accelerate launch`) and averages gradients; a share of a step is therefore
weighted so that the average is the mean over the whole step, however it is shared out.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ipn_core.errors import ConfigError
from ipn_core.files import claim

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "accelerate",
    "agree",
    "gathered",
    "held",
    "laid_out",
    "sharded",
    "shares",
    "together",
    "whole",
]

T = TypeVar("T")

_LOCK = "lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What a file system says that keeps no locks."""
_WAIT = timedelta(hours=6)
"""How long processes wait for one that encodes pictures; a dead one is noticed by the launcher."""


def accelerate(precision: str, trackers: Sequence[str], folder: Path) -> Accelerator:
    """Join the processes that a launcher started, or start alone.

    Args:
        precision: fp32, bf16 or fp16.
        trackers: which of accelerate's trackers follow the training.
        folder: where those that write files do so.

    Raises:
        ConfigError: the precision, a tracker or a way to share out work cannot be used here.
    """
    from accelerate import Accelerator
    from accelerate.utils import (
        DistributedDataParallelKwargs,
        InitProcessGroupKwargs,
        ProjectConfiguration,
    )

    check_trackers(trackers)
    # Every process reads the model itself: the questions are read before anything is shared out.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    try:
        made = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(str(folder), str(folder / "trackers")),
            # A share may hold nothing that reaches some weight, such as a look that it never takes.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=_WAIT),
            ],
        )
    except ValueError as error:
        # fp16 without a GPU, or a process that has trained in another precision.
        raise ConfigError(
            f"precision {precision} cannot be used in this process: {error}"
        ) from None
    _check_kind(made)
    _check_launch(made)
    if made.is_fsdp2:
        # Autocast decides what is computed in which precision, as it does without FSDP.
        made.state.fsdp_plugin.mixed_precision_policy = None
    return made


def check_trackers(names: Iterable[str]) -> None:
    """Refuse trackers that accelerate does not have, or whose package is not installed.

    Raises:
        ConfigError: names it, and what to install.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    present = {str(one) for one in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            raise ConfigError(f"'trackers': unknown tracker '{name}'. accelerate has {known}.")
        if name not in present:
            package = "'ipn-core[tensorboard]'" if name == "tensorboard" else name
            raise ConfigError(
                f"'trackers': '{name}' is not installed. Add it with: pip install {package}"
            )


def _check_kind(accelerator: Accelerator) -> None:
    from accelerate.utils import DistributedType as Kind

    kind = accelerator.distributed_type
    if kind in (Kind.DEEPSPEED, Kind.MEGATRON_LM, Kind.XLA):
        raise ConfigError(f"{kind.value} is not supported. Launch with DDP or FSDP2.")
    if kind == Kind.FSDP and not accelerator.is_fsdp2:
        raise ConfigError("FSDP is supported in version 2. Launch with --fsdp_version 2.")


def _check_launch(accelerator: Accelerator) -> None:
    """Refuse to train alone where a launcher was asked for several processes.

    `accelerate launch --cpu` starts a single process whatever `--num_processes` says; where that or
    `--num_machines` is above 1, it names a place to meet, but no number of processes.
    """
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    alone = accelerator.num_processes == 1
    if alone and (asked > 1 or (by_accelerate and "MASTER_ADDR" in os.environ)):
        raise ConfigError(
            "a launcher was told to start several processes, and this one knows of no other: each "
            "would train alone. On a CPU, set ACCELERATE_USE_CPU=true and use 'accelerate launch "
            "--multi_gpu', which works there too, instead of --cpu; for one process alone, use "
            "'ipn train'."
        )


def sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of every weight only (FSDP2)."""
    return bool(accelerator.is_fsdp2)


def agree(accelerator: Accelerator, value: Any, folder: Path) -> None:
    """Check that all processes found the same in a folder.

    Raises:
        ConfigError: they did not; each machine has a folder of its own, say.
    """
    if any(other != value for other in together(accelerator, [value])):
        raise ConfigError(
            f"the processes find different saved states in '{folder}'. Choose with --out a folder "
            "that all machines share."
        )


@contextmanager
def held(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """Keep a folder to the processes of one training; the system frees it when they die.

    A file system that knows no locks keeps nothing.

    Raises:
        ConfigError: another training runs there.
    """
    with ExitStack() as stack:
        free = True
        if accelerator.is_main_process:
            try:
                free = stack.enter_context(claim(folder / _LOCK))
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        if not all(together(accelerator, [free])):
            raise ConfigError(
                f"another process trains in '{folder}' at this moment. Wait for it, end it, or "
                "choose another folder with --out."
            )
        yield


def together(accelerator: Accelerator, mine: list[T]) -> list[T]:
    """Return the items of all processes, in the order of the processes."""
    from accelerate.utils import gather_object

    every: list[T] = gather_object(mine)
    return every


def shares(accelerator: Accelerator, counts: Sequence[Mapping[str, int]]) -> list[dict[str, float]]:
    """Weigh the mean losses of the parts of a step in this process.

    With these weights the mean over parts and processes is the mean over all that they count.

    Args:
        accelerator: knows the other processes.
        counts: for each part, what it offers to learn from to each objective.
    """
    names = list(counts[0])
    sums = [sum(part[name] for part in counts) for name in names]
    every = accelerator.reduce(torch.tensor(sums, device=accelerator.device), "sum").tolist()
    parts = accelerator.num_processes * len(counts)
    return [
        {name: part[name] * parts / max(n, 1) for name, n in zip(names, every, strict=True)}
        for part in counts
    ]


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Bring the weights of a prepared module together, to call parts of it from outside.

    FSDP2 does so by itself only inside its forward. Nothing where weights are not shared out; else
    all processes must take part.
    """
    shards: Any = module if hasattr(module, "unshard") else None
    if shards is None:
        yield
        return
    shards.unshard()
    try:
        yield
    finally:
        shards.reshard()


def gathered(tensor: Tensor) -> Tensor:
    """Return a tensor (…) whole, parts of which may lie in several processes; all must ask."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Lay a whole tensor (…) out over the processes as `like` (…) of its shape is; all must ask."""
    if not hasattr(like, "full_tensor"):
        return tensor.to(like.device)
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
