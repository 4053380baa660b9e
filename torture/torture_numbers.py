"""Results that do not depend on who else is in the batch, nor on when; overflow that is named."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import torch
from toys import FAMILIES, picture, prompt_of, toy_model
from watching import last_logits

from ipn_core.errors import StageError
from ipn_core.finite import spoiled, tensors
from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.testing.tiny import tiny_backbone

CLOSE = 1e-5
"""Of the largest logit."""
STRATEGIES = ("tiny-look", "toy-both", "toy-static", "rvii")


def _largest_difference(model: IPN, prompts: list[Any]) -> float:
    """How far a row's logits are from what it gives alone, as a share of the largest logit."""
    worst = 0.0
    logits, real = last_logits(model, prompts)
    for row, prompt in enumerate(prompts):
        alone, mine = last_logits(model, [prompt])
        # Where a segment begins depends on the batch; all end with the prompt.
        both = alone[0][mine[0]], logits[row][real[row]]
        expected, found = (one[-min(map(len, both)) :] for one in both)
        difference = (found - expected).abs().max() / expected.abs().max()
        worst = max(worst, float(difference))
    return worst


@torch.no_grad()
def test_a_batch_gives_what_each_row_gives_alone(
    tally: Any, scaled: Any, registry: Registry
) -> None:
    counts = tally("batches of random rows against each row alone, in fp32", limit_s=60)
    rng = random.Random(0)
    for family in FAMILIES:
        backbone = tiny_backbone(family)
        for strategy in STRATEGIES:
            model = toy_model(registry, strategy, family, backbone=backbone).eval()
            for number in range(scaled(12)):
                rows = rng.randint(2, 6)
                prompts = [
                    prompt_of(rng.randrange(6), rng.randint(0, 2), rng.randint(1, 2))
                    for _ in range(rows)
                ]
                found = counts.attempt(
                    f"{family}, {strategy}, batch {number}",
                    lambda m=model, p=prompts: _largest_difference(m, p),
                    good=lambda value: value <= CLOSE,
                )
                if isinstance(found, float):
                    worst = max(counts.more.get("largest difference", 0.0), found)
                    counts.more["largest difference"] = worst


def test_an_overflow_of_float16_anywhere_is_named(
    tally: Any, scaled: Any, registry: Registry
) -> None:
    """Each module in turn gives numbers that float16 cannot hold."""
    counts = tally("overflows of float16, in every module of a model in turn", limit_s=60)
    for family in FAMILIES:
        backbone = tiny_backbone(family)
        for strategy in STRATEGIES:
            model = toy_model(registry, strategy, family, backbone=backbone).eval()
            model.to(torch.float16)
            modules = [(name, one) for name, one in model.named_modules() if name]
            for name, module in modules[:: 13 - scaled(12)]:
                over: list[bool] = []
                handle = module.register_forward_hook(partial(_overflow, over))
                counts.attempt(
                    f"{family}, {strategy}, {name}",
                    lambda m=model: m.ask(picture(1), "What is it?", max_new_tokens=2),
                    good=lambda _, over=over: not any(over),
                    refusal=StageError,
                )
                handle.remove()


def _overflow(over: list[bool], module: Any, inputs: Any, output: Any) -> None:
    for tensor in tensors(output):
        over.append(bool(spoiled(tensor.mul_(1e6))))


def test_a_seed_gives_the_same_sample(tally: Any, scaled: Any, registry: Registry) -> None:
    counts = tally("samples of one seed, alone and again", limit_s=60)
    for strategy in STRATEGIES:
        model = toy_model(registry, strategy).eval()

        def sample(seed: int, model: IPN = model) -> list[Any]:
            torch.manual_seed(seed)
            options = {"do_sample": True, "temperature": 1.3, "max_new_tokens": 6}
            return [a.ids for a in model.generate([prompt_of(seed % 5, 1)], **options)]

        for seed in range(scaled(25)):
            counts.attempt(
                f"{strategy}, seed {seed}",
                lambda seed=seed, sample=sample: sample(seed) == sample(seed),
                good=bool,
            )
