"""What is checked: at the very start, before a stage's first step, after each step, at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ipn_core.errors import ConfigError, TrainingError
from ipn_core.training.data import Data, Sampler
from ipn_core.training.objectives import build_objectives

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.plugins import Registry
    from ipn_core.training.config import StageConfig

__all__ = [
    "FrozenBackbone",
    "awake",
    "check_gradients",
    "check_stages",
    "choose",
    "finite_gradients",
    "first_bad",
    "trainable",
]

_PARTS = {"request": "requester", "interact": "interaction", "inject": "injector"}
_TEXT = "The quick brown fox jumps over the lazy dog. 0123456789"


def check_stages(
    stages: Iterable[StageConfig], model: IPN, data: Sequence[Data], registry: Registry, seed: int
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
                trainable(model, stage.train)
                Sampler(data, stage, seed)
                build_objectives(stage, model, data, registry)
            except ConfigError as error:
                faults.append(f"stage '{stage.name}': {error}")
    if faults:
        raise ConfigError(" ".join(faults))


def choose(model: IPN, prefixes: Iterable[str]) -> dict[str, nn.Parameter]:
    """Make exactly the named parameters of a model trainable, and return them by name.

    Raises:
        ConfigError: see `trainable`.
    """
    chosen = trainable(model, prefixes)
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


def trainable(model: IPN, prefixes: Iterable[str]) -> dict[str, nn.Parameter]:
    """Return the named parameters of a model by their full names.

    Args:
        model: whose stages and slots.
        prefixes: starts of names as configs write them: stages by their hook.

    Raises:
        ConfigError: a prefix names nothing that the model uses, or the backbone.
    """
    unused = _unused_slots(model)
    # The vision encoder stays frozen, and so does what stages borrow.
    frozen = {id(p) for part in (model.encoder, *model.borrowed) for p in part.parameters()}
    chosen: dict[str, nn.Parameter] = {}
    for prefix in prefixes:
        inner = _inner(prefix)
        found = {
            name: p
            for name, p in model.named_parameters()
            if (name == inner or name.startswith(inner + "."))
            and name not in unused
            and id(p) not in frozen
        }
        if not found or inner.startswith("backbone"):
            slots = ("slots.image", "slots.request", "slots.dynamic")
            stages = ["perceive", *_PARTS, *(slot for slot in slots if slot not in unused)]
            raise ConfigError(
                f"'train': '{prefix}' names nothing that can be trained in this model. Start with "
                f"one of {', '.join(stages)}."
            )
        chosen |= found
    return chosen


def _unused_slots(model: IPN) -> set[str]:
    """Name the slots that no prompt of this model holds."""
    unused = {
        "slots.image": model.perceiver.static_tokens == 0,
        "slots.request": model.requester is None,
        "slots.dynamic": model.injector is None or not model.injector.fills,
    }
    return {slot for slot, idle in unused.items() if idle}


def _inner(prefix: str) -> str:
    head, _, rest = prefix.partition(".")
    head = _PARTS.get(head, "perceiver" if head == "perceive" else head)
    return f"{head}.{rest}" if rest else head


@contextmanager
def awake(trained: dict[str, nn.Parameter]) -> Iterator[None]:
    """Put small numbers into trained tensors that are all zero, for the length of the block.

    A gate that starts at zero keeps every gradient from what stands behind it until the first step
    has moved it; that is no fault.
    """
    asleep = [(p, p.detach().clone()) for p in trained.values() if not bool(p.any())]
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
        elif not bool(torch.isfinite(parameter.grad).all()):
            faults.append(f"the gradient of {name} is not finite")
        elif not bool(parameter.grad.any()):
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
    return all(bool(torch.isfinite(p.grad).all()) for p in trained.values() if p.grad is not None)


def first_bad(trained: dict[str, nn.Parameter], losses: dict[str, Tensor]) -> str | None:
    """Name the first weight, loss or gradient that is not finite: causes before their effects."""
    for name, parameter in trained.items():
        if not bool(torch.isfinite(parameter).all()):
            return f"the weight {name}"
    for name, loss in losses.items():
        if not bool(torch.isfinite(loss)):
            return f"the loss '{name}'"
    for name, parameter in trained.items():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of {name}"
    return None


class FrozenBackbone:
    """Remembers what the backbone says to a text, to show later that nothing changed."""

    def __init__(self, model: IPN) -> None:
        self.model = model
        self.before = self._logits()

    @torch.no_grad()
    def _logits(self) -> Tensor:
        backbone = self.model.backbone
        ids = torch.tensor([backbone.tokenizer(_TEXT)["input_ids"]], device=backbone.device)
        logits: Tensor = backbone.lm(input_ids=ids).logits
        return logits

    def check(self) -> None:
        """Raise `TrainingError` unless the text-only logits are the same bit for bit."""
        if any(p.grad is not None for p in self.model.backbone.parameters()):
            raise TrainingError("a gradient has reached the frozen backbone.")
        if not torch.equal(self.before, self._logits()):
            raise TrainingError("the frozen backbone has changed: its text-only logits differ.")
