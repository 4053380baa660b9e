"""First-token times of the arms, side by side in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.tasks import Example

__all__ = ["first_token"]

_ROUNDS = 12


def first_token(
    folders: Mapping[str, Path],
    reference: str,
    examples: Sequence[Example],
    registry: Registry | None = None,
) -> dict[str, Any]:
    """Ask the same questions with each arm in turn, and compare the times to the first token.

    Args:
        folders: a checkpoint by arm; backbone and encoder are loaded once.
        reference: the arm that the others are divided by.
        examples: some questions.
        registry: where names are looked up.

    Returns:
        By arm the median seconds, the median ratio, and as text the ratio's quartiles.
    """
    models: dict[str, IPN] = {}
    for name, folder in folders.items():
        first = next(iter(models.values()), None)
        models[name] = IPN.from_pretrained(
            folder,
            backbone=first.backbone if first else None,
            encoder=first.encoder if first else None,
            registry=registry,
        )
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(_ROUNDS + 1):
        example = examples[number % len(examples)]
        for name, model in models.items():
            pictures = list(example.images)
            answer = model.ask(pictures, example.question, max_new_tokens=1)
            if number:  # the first round warms up
                seconds[name].append(answer.seconds["first_token"])
    base = np.array(seconds[reference])
    found = {}
    for name, times in seconds.items():
        low, middle, high = np.percentile(np.array(times) / base, [25, 50, 75])
        found[name] = {
            "seconds": float(np.median(times)),
            "median": float(middle),
            "spread": f"{low:.2f}-{high:.2f}",
        }
    return found
