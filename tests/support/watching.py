"""What a model does while it is used: its gradients, and what its backbone is fed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import two_pass

from ipn_core.model import IPN


def gradients(model: IPN, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, values = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True
    )
    if not loss.requires_grad:  # without a picture nothing trainable takes part
        return {n: torch.zeros_like(p) for n, p in zip(names, values, strict=True)}
    found = torch.autograd.grad(loss, values, allow_unused=True)
    return {
        n: torch.zeros_like(p) if g is None else g
        for n, p, g in zip(names, values, found, strict=True)
    }


def check_loss(model: IPN, taught: Sequence[Any], loss: torch.Tensor, count: int) -> None:
    """A batch's loss and gradients against two passes over each of its prompts alone."""
    parts = [two_pass.loss(model, p) for p in taught]
    assert count == sum(n for _, n in parts)
    total = sum(value for value, _ in parts)
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-5)
    mine, expected = gradients(model, loss), gradients(model, total)
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert (mine[name] - gradient).abs().max() <= 1e-5 * largest, name


@contextmanager
def seen_positions(model: IPN) -> Iterator[list[tuple[int, int]]]:
    """Rows and tokens of every forward of the first layer."""
    seen: list[tuple[int, int]] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(tuple(hidden.shape[:2]))

    handle = model.backbone.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
