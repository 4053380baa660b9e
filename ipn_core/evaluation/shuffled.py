"""The control that cannot ask: every example gets the request of another one.

If the request is what answers, the score falls to guessing; if it does not fall, the answer comes
from elsewhere.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ipn_core.errors import DataError
from ipn_core.features import VisualFeatures
from ipn_core.hooks import hookimpl
from ipn_core.stages import Percept, Request, RequestContext
from ipn_core.transfer import send

if TYPE_CHECKING:
    from ipn_core.evaluation.pictures import PictureCache
    from ipn_core.model import IPN
    from ipn_core.plan import Plan
    from ipn_core.tasks import Example

__all__ = ["ForeignRequests", "draw_partners", "requests_of"]

TRIES = 200
"""Random draws of a partner before the whole split is searched for one."""


def draw_partners(
    examples: Sequence[Example], pool: Sequence[Example], seed: int
) -> list[Example | None]:
    """Draw for each example one of the pool that has another question and no picture in common.

    Args:
        examples: the examples to answer.
        pool: the whole split.
        seed: the same seed draws the same partners.

    Returns:
        The partners; None for an example without a picture, which never asks one.

    Raises:
        DataError: an example has no possible partner.
    """
    draw = random.Random(seed)
    asking = [example for example in pool if example.images]
    return [_partner(e, asking, draw) if e.images else None for e in examples]


def _partner(example: Example, pool: Sequence[Example], draw: random.Random) -> Example:
    names = {picture.name for picture in example.images}

    def fits(other: Example) -> bool:
        return other.question != example.question and names.isdisjoint(
            picture.name for picture in other.images
        )

    for _ in range(TRIES if pool else 0):
        if fits(other := draw.choice(pool)):
            return other
    found = [other for other in pool if fits(other)]
    if not found:
        raise DataError(
            f"no request can be taken for '{example.question}': no other example of the split has "
            "another question and another picture. Shuffled requests need a larger split."
        )
    return draw.choice(found)


def requests_of(
    model: IPN, examples: Sequence[Example], plans: Sequence[Plan], pictures: PictureCache
) -> Tensor:
    """Return what each example asks, (B, rounds, R, D).

    Args:
        model: with a requester.
        examples: each with a picture.
        plans: of their prompts.
        pictures: their features.
    """
    if not requests_depend_on_pictures(model):
        # Nothing visual stands before the first look: any picture gives the same request.
        width = model.encoder.width
        places = [row for row, example in enumerate(examples) for _ in example.images]
        blank = VisualFeatures.pack(
            [model.slots.request.new_zeros(1, width)] * len(places),
            [(1, 1)] * len(places),
            places,
            len(examples),
        )
        hidden = model.engine.hidden_at_request(plans, Percept(blank))
        assert model.requester is not None
        context = RequestContext(hidden, list(range(len(plans))), 0, model.requester.layer)
        request: Request = model.call("request", context=context)
        return request.values[:, None]
    features = pictures.features(examples)
    percept = model.perceive([p.images for p in plans], [p.question for p in plans], features)
    state = model.engine.prefix(plans, percept).state
    rounds = sorted(state.looks, key=lambda record: record.request.round)
    return torch.stack([record.request.values for record in rounds], dim=1)


def requests_depend_on_pictures(model: IPN) -> bool:
    """Whether a question's request changes with the picture: static tokens, or a second look."""
    return (
        model.config.layout.rounds > 1
        or bool(model.config.perceive)
        or not (model.injector is None or model.injector.needs_message)
    )


class ForeignRequests:
    """An observer for `IPN.observing` that replaces what each sample asks.

    Attributes:
        rows: by row of the batch, the requests (rounds, R, D) that it shall make, or None for a
            row that makes none.
        replaced: how many requests were replaced so far.
    """

    def __init__(self) -> None:
        self.rows: Sequence[Tensor | None] = ()
        self.replaced = 0

    @hookimpl(wrapper=True)
    def request(self, context: RequestContext) -> Generator[None, Request, Request]:
        """Let the requester run, then put the foreign requests (B, R, D) in its place."""
        own = yield
        foreign: list[Tensor] = []
        for row in context.samples:
            requests = self.rows[row]
            assert requests is not None
            foreign.append(requests[context.round])
        self.replaced += len(foreign)
        values = send(torch.stack(foreign), own.values.device, own.values.dtype)
        assert values.shape == own.values.shape
        return replace(own, values=values)
