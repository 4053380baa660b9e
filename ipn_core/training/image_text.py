"""The objective `image-text`: tokens that no question changes name what their picture shows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.stages import Connector
from ipn_core.training.answers import directions
from ipn_core.training.objectives import Objective, request_of
from ipn_core.transfer import send

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.stages import Percept, Request, VisualMessage
    from ipn_core.training.data import Batch, DataSource

__all__ = ["ImageText"]


class ImageText(Objective):
    """Binary cross-entropy over words: does the picture show what this word names?

    The score of a word is the log-sum-exp over a picture's tokens of 20 times the cosine of the
    token and the word's direction in the LLM's input space. It serves tokens that are the same
    whatever is asked: static ones, and the messages of a request that cannot ask.
    """

    name = "image-text"
    unit = "pairs of word and picture"
    sharpness = 20.0
    """What cosines are multiplied with, as in `answer-embedding`."""
    offset = 10.0
    """Where a score means even chances: between no similar token and one that is the word."""

    def __init__(self, model: IPN, data: Sequence[DataSource]) -> None:
        super().__init__(model, data)
        if model.requester is not None and model.requester.asks:
            assert model.config.request is not None
            raise self.refuse(
                f"needs tokens that no question changes, and the requester "
                f"'{model.config.request.name}' asks. Use 'answer-embedding'."
            )
        if model.interaction is None and not isinstance(model.perceiver, Connector):
            raise self.refuse("needs static tokens or messages; this strategy has neither.")
        width = model.backbone.D_in
        if model.interaction is not None and model.interaction.width != width:
            raise self.refuse(
                f"needs a message as wide as the LLM's embeddings, {width}; it is "
                f"{model.interaction.width}."
            )
        words = sorted({word for d in data for e in d.examples for word in e.shown})
        if not words:
            raise self.refuse(
                "needs examples that say what their pictures show (Example.shown); "
                f"{', '.join(d.name for d in data)} do not."
            )
        self.words = {word: i for i, word in enumerate(words)}
        self.directions = directions(model, words)

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Score each word against each distinct picture, or set of them; returns a scalar ()."""
        place = {index: i for i, index in enumerate(batch.mine)}
        every = self._rows(batch)
        rows = [place[index] for index in every if index in place]
        if not rows:
            return torch.cat(list(self._tokens(batch))).sum() * 0.0
        tokens = self._tokens(batch.select(rows))
        scores = torch.stack([self._scores(one) for one in tokens])  # (n, words)
        shown = torch.zeros(len(every), len(self.words))
        for row, index in enumerate(every):
            shown[row, [self.words[word] for word in batch.step[index].shown]] = 1
        targets = send(shown[[index in place for index in every]], scores.device)
        # Most pairs are negative; both kinds get half the weight.
        share = send(shown.mean(), scores.device)
        weight = torch.where(targets > 0, 0.5 / share, 0.5 / (1 - share)).clamp(max=50)
        return F.binary_cross_entropy_with_logits(scores, targets, weight)

    def labels(self, batch: Batch) -> int:
        """Count the pairs that are scored."""
        mine = set(batch.mine)
        return sum(index in mine for index in self._rows(batch)) * len(self.words)

    @staticmethod
    def _rows(batch: Batch) -> list[int]:
        """One example of the step for each set of pictures of which it is known what they show."""
        found = {tuple(p.name for p in e.images): i for i, e in enumerate(batch.step) if e.shown}
        return list(found.values())

    def _scores(self, tokens: Tensor) -> Tensor:
        """Return (words,) for the tokens (n, D_in) of one example."""
        cosines = F.normalize(tokens.float(), dim=-1) @ self.directions.T
        return (self.sharpness * cosines).logsumexp(0) - self.offset

    def _tokens(self, batch: Batch) -> Sequence[Tensor]:
        """Return the tokens (n, D_in) of each example."""
        if self.model.interaction is not None:
            message: VisualMessage = self.model.call(
                "interact", request=request_of(self.model, batch), features=batch.features
            )
            return message.values.unbind()
        questions = [e.question for e in batch.examples]
        percept: Percept = self.model.perceive([], questions, batch.features)
        assert percept.tokens is not None
        samples: list[list[Tensor]] = [[] for _ in batch.examples]
        for span, tokens in zip(batch.features.images, percept.tokens, strict=True):
            samples[span.sample].append(tokens)
        return [torch.cat(mine) for mine in samples]
