"""What is checked: at the very start, before a stage's first step, after each step, at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ipn_core.errors import ConfigError, TrainingError
from ipn_core.training.data import DataSource
from ipn_core.training.guards import check_template
from ipn_core.training.objectives import build_objectives
from ipn_core.training.parameters import groups, trainable
from ipn_core.training.processes import gathered
from ipn_core.training.sampler import Sampler

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.plugins import Registry
    from ipn_core.training.config import StageConfig

__all__ = [
    "FrozenBackbone",
    "awake",
    "check_gradients",
    "check_stages",
    "finite_gradients",
    "first_bad",
]

_TEXT = "The quick brown fox jumps over the lazy dog. 0123456789"


def check_stages(
    stages: Iterable[StageConfig],
    model: IPN,
    data: Sequence[DataSource],
    registry: Registry,
    seed: int,
) -> None:
    """Check what all stages ask of a model and its data; nothing is changed.

    Args:
        stages: those that will run.
        model: as built.
        data: opened, its pictures not encoded.
        registry: where objectives are looked up.
        seed: of the training.

    Raises:
        ConfigError: names every stage that cannot run, and what to change.
    """
    faults = []
    # An objective may draw numbers when it is built; what comes later must not depend on that.
    with torch.random.fork_rng():
        for stage in stages:
            try:
                groups(trainable(model, stage.train, stage.freeze), stage)
                Sampler(data, stage, seed)
                built = build_objectives(stage, model, data, registry)
                # Requests are read through it, too.
                if model.requester is not None or any(o.through_llm for o, _ in built):
                    check_template(model)
            except ConfigError as error:
                faults.append(f"stage '{stage.name}': {error}")
    if faults:
        raise ConfigError(" ".join(faults))


@contextmanager
def awake(trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Put small numbers into trained tensors that are all zero, for the length of the block.

    A gate that starts at zero keeps every gradient from what stands behind it until the first step
    has moved it; that is no fault.
    """
    asleep = [(p, p.detach().clone()) for p in trained.values() if not _any(p)]
    try:
        for parameter, _ in asleep:
            nn.init.normal_(parameter, std=0.02)
        yield
    finally:
        with torch.no_grad():
            for parameter, before in asleep:
                parameter.copy_(before)


def check_gradients(model: IPN, trained: dict[str, nn.Parameter]) -> None:
    """After a backward pass: every trained tensor has a finite gradient that is not all zero.

    Raises:
        TrainingError: names each tensor that does not, or a frozen one that has a gradient.
    """
    faults = []
    for name, parameter in trained.items():
        if parameter.grad is None:
            faults.append(f"{name} gets no gradient")
        elif not _finite(parameter.grad):
            faults.append(f"the gradient of {name} is not finite")
        elif not _any(parameter.grad):
            faults.append(f"the gradient of {name} is zero")
    for name, parameter in model.named_parameters():
        if name not in trained and parameter.grad is not None:
            faults.append(f"{name} is frozen, but a gradient reaches it")
    if faults:
        shown = faults[:8] + ([f"and {len(faults) - 8} more"] if len(faults) > 8 else [])
        raise TrainingError(
            "before the first step: " + "; ".join(shown) + ". Choose other objectives, or name in "
            "'train' only what they reach."
        )


def finite_gradients(trained: dict[str, nn.Parameter]) -> bool:
    """Whether no gradient holds an infinity or NaN."""
    return all(_finite(p.grad) for p in trained.values() if p.grad is not None)


def first_bad(
    trained: dict[str, nn.Parameter],
    losses: Mapping[str, float],
    within: Callable[[], str | None] | None = None,
) -> str | None:
    """Name the first weight, loss or gradient that is not finite: causes before their effects.

    Args:
        trained: weights with their gradients, by name.
        losses: by name.
        within: names the first tensor on the way to the losses, asked only if one is not finite.
    """
    for name, parameter in trained.items():
        if not _finite(parameter):
            return f"the weight {name}"
    for name, loss in losses.items():
        if not math.isfinite(loss):
            cause = within() if within else None
            return f"{cause}, and so the loss '{name}'," if cause else f"the loss '{name}'"
    for name, parameter in trained.items():
        if parameter.grad is not None and not _finite(parameter.grad):
            return f"the gradient of {name}"
    return None


def _any(tensor: Tensor) -> bool:
    return bool(gathered(tensor.detach()).any())


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(gathered(tensor.detach())).all())


class FrozenBackbone:
    """Remembers what the backbone says to a text, to show later that nothing changed.

    An adapter is switched off for that: what the config names must stay as it is.
    """

    def __init__(self, model: IPN) -> None:
        self.model = model
        self.before = self._logits()

    @torch.no_grad()
    def _logits(self) -> Tensor:
        backbone = self.model.backbone
        ids = torch.tensor([backbone.tokenizer(_TEXT)["input_ids"]], device=backbone.device)
        lora = backbone.lora
        with nullcontext() if lora is None else lora.switched_off():
            logits: Tensor = backbone.lm(input_ids=ids).logits
        return logits

    def check(self) -> str:
        """Compare, and return what was found, in words.

        Raises:
            TrainingError: the text-only logits are not the same bit for bit, or a frozen weight
                has a gradient.
        """
        if any(p.grad is not None for p in self.model.backbone.base_parameters()):
            raise TrainingError("a gradient has reached the frozen backbone.")
        if not torch.equal(self.before, self._logits()):
            raise TrainingError("the frozen backbone has changed: its text-only logits differ.")
        without = "" if self.model.backbone.lora is None else " without its adapter"
        return f"the backbone is unchanged: its text-only logits{without} are equal bit for bit"
