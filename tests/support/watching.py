"""What a model does while it is used, against two passes; and what its backbone is fed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import two_pass
from toys import prompt_of

from ipn_core.model import IPN


def batch_of(
    batch: int, rounds: int, images: int, asking: bool, answer: str | None = None
) -> list[Any]:
    """Prompts of several lengths; a strategy that never looks gets several turns instead."""
    counts = [images] if batch == 1 else [images, (images + 1) % 3, images]
    turns = 1 if asking else rounds
    return [prompt_of(row, n, turns, answer and answer * (row + 1)) for row, n in enumerate(counts)]


def last_logits(model: IPN, prompts: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, L, vocabulary) of the last segment, and which of them are no padding."""
    plans = [model.planner.plan(p) for p in prompts]
    percept = model.perceive([p.images for p in plans], [p.question for p in plans])
    prefix = model.engine.prefix(plans, percept)
    mask = torch.cat([prefix.state.mask, prefix.mask], dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, prefix.state.length :]
    with model.engine.layers(prefix.state, percept):
        out = model.backbone.extend(prefix.embeds, prefix.state.cache, positions, mask)
    return model.backbone.logits(out.last), prefix.mask


def gradients(model: IPN, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, values = zip(
        *((n, p) for n, p in model.named_parameters() if p.requires_grad and p.numel()), strict=True
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
        # A gate's is a sum over all positions and channels that nearly cancels: without AVX-512,
        # which adds up in another order, 1.6e-5 was seen.
        assert (mine[name] - gradient).abs().max() <= 3e-5 * largest, name


def check_against_two_passes(model: IPN, batch: int, rounds: int, images: int) -> None:
    """Logits, loss, gradients, greedy and beam search of a batch against two passes a prompt."""
    asking = model.requester is not None
    prompts = batch_of(batch, rounds, images, asking)
    check_rows(model, prompts)
    taught = batch_of(batch, rounds, images, asking, answer="ab")
    loss, count = model(taught)
    check_loss(model, taught, loss, count)

    options = {"num_beams": 3, "max_new_tokens": 5}
    answers = model.generate(prompts, **options)
    assert [a.ids for a in answers] == [two_pass.generate(model, p, **options)[0] for p in prompts]


def check_rows(model: IPN, prompts: list[Any]) -> None:
    """Logits and greedy answers of every row against two passes over that row alone."""
    with torch.no_grad():
        logits, real = last_logits(model, prompts)
        for row, prompt in enumerate(prompts):
            mine = logits[row][real[row]]
            expected = two_pass.logits(model, prompt)[-len(mine) :]
            assert (mine - expected).abs().max() <= 1e-4 * expected.abs().max()
    answers = model.generate(prompts, max_new_tokens=5)
    assert [a.ids for a in answers] == [two_pass.greedy(model, p, 5) for p in prompts]


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
