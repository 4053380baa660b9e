"""Training objectives that a stage names: through the LLM, or cheaper alignments on the way there.

`request-image`     request and patches meet in one space: what the question names is in the picture
`answer-embedding`  the message points at the answer's own input embedding, without the LLM
`verbalise`         injection is learnt without pictures: the LLM says the answer it is handed
`language`          the LLM's loss on the answer, end to end

An objective is registered under its name (`registry.objective`) and checks by itself whether a
model and its data can serve it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.errors import ConfigError
from ipn_core.hooks import hookimpl
from ipn_core.stages import RequestContext, VisualMessage
from ipn_core.training.data import Batch, Data

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.plugins import Registry
    from ipn_core.stages import Request
    from ipn_core.training.config import StageConfig

__all__ = [
    "AnswerEmbedding",
    "Language",
    "Objective",
    "RequestImage",
    "Verbalise",
    "build_objectives",
    "request_of",
]


class Objective(ABC):
    """One term of the loss.

    Attributes:
        name: what configs call it.
        through_llm: whether it runs the LLM itself, and so makes its own requests.
        unit: what `labels` counts, in the plural.
    """

    name: str
    through_llm = False
    unit = "examples"

    def __init__(self, model: IPN, data: Sequence[Data]) -> None:
        """Check that the model and the data can serve this objective.

        Raises:
            ConfigError: they cannot; the text says what to change.
        """
        self.model = model
        self.data = data

    @abstractmethod
    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Return the mean loss of a batch.

        Args:
            batch: the examples.
            request: of the batch, where the model asks.
        """

    def labels(self, batch: Batch) -> int:
        """Count what a batch offers to learn from, in `unit`; none in the first one is refused."""
        return len(batch.examples)

    def correct(self, batch: Batch, request: Request | None) -> list[bool] | None:
        """Say which examples come out right, where that is known without the LLM."""
        return None

    def refuse(self, why: str) -> ConfigError:
        """Return the error for a model or data that cannot serve this objective."""
        return ConfigError(f"the objective '{self.name}' {why}")


class RequestImage(Objective):
    """Binary cross-entropy over all pairs of a batch: does this picture show what this asks about?

    The score of a pair is log-sum-exp over the patches of 16 times the cosine of request and patch,
    in the space of `Interaction.shared_space`.
    """

    name = "request-image"
    unit = "pairs of question and picture"
    offset = 10.0
    """Where a score means even chances: between no similar patch (log P) and one (16)."""

    def __init__(self, model: IPN, data: Sequence[Data]) -> None:
        super().__init__(model, data)
        _asks(self)
        if not any(e.names for d in data for e in d.examples):
            raise self.refuse(
                "needs examples that say what they name and what their pictures show "
                f"(Example.names, .shown); {', '.join(d.name for d in data)} say neither."
            )

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Score each request that names something against each picture of the batch."""
        assert request is not None
        assert self.model.interaction is not None
        rows, pictures = self._pairs(batch)
        if not rows:
            text, patches = self.model.interaction.shared_space(request, batch.features)
            return (text.sum() + patches.sum()) * 0.0
        asking = replace(request, values=request.values[rows])
        features = batch.features.select(pictures)
        text, patches = self.model.interaction.shared_space(asking, features)
        scores = 16 * torch.einsum("qw,npw->qnp", text, features.spread(patches))
        scores = scores.float().masked_fill(~features.mask, -1e4).logsumexp(-1) - self.offset
        shown = [set(batch.examples[i].shown) for i in pictures]
        targets = torch.tensor(
            [[float(set(batch.examples[i].names) <= there) for there in shown] for i in rows],
            device=scores.device,
        )
        # Most pairs are negative; both kinds get half the weight.
        weight = torch.where(targets > 0, 0.5 / targets.mean(), 0.5 / (1 - targets.mean()))
        weight = weight.nan_to_num(0.5, 0.5, 0.5).clamp(max=50)
        return F.binary_cross_entropy_with_logits(scores, targets, weight)

    def labels(self, batch: Batch) -> int:
        """Count the pairs that are scored."""
        rows, pictures = self._pairs(batch)
        return len(rows) * len(pictures)

    @staticmethod
    def _pairs(batch: Batch) -> tuple[list[int], list[int]]:
        """Return the examples that name something, and one of them for each picture."""
        rows = [i for i, e in enumerate(batch.examples) if e.names]
        seen = {tuple(p.name for p in batch.examples[i].images): i for i in rows}
        return rows, list(seen.values())


class _TowardsAnswers(Objective):
    """Base of the objectives in which a message stands for an answer's input embedding."""

    def __init__(self, model: IPN, data: Sequence[Data]) -> None:
        super().__init__(model, data)
        _asks(self)
        _message_is_embedding(self)
        self.answers = _Answers(model, data)


class AnswerEmbedding(_TowardsAnswers):
    """Cross-entropy over all answers: each message token points at its answer's input embedding."""

    name = "answer-embedding"
    unit = "answers"
    sharpness = 20.0
    """What cosines are multiplied with; a temperature of 1/20."""

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Compare every token of the message with every answer."""
        logits = self._logits(batch, request)
        targets = self.answers.index(batch).to(logits.device)
        return F.cross_entropy(
            logits.flatten(0, 1), targets.repeat_interleave(logits.shape[1]), label_smoothing=0.02
        )

    def labels(self, batch: Batch) -> int:
        """Count the examples whose answer has an embedding."""
        return int((self.answers.index(batch) >= 0).sum())

    def correct(self, batch: Batch, request: Request | None) -> list[bool]:
        """Compare the answer that the tokens point at together with the right one."""
        best = self._logits(batch, request).mean(1).argmax(-1).cpu()
        found: list[bool] = (best == self.answers.index(batch)).tolist()
        return found

    def _logits(self, batch: Batch, request: Request | None) -> Tensor:
        message: VisualMessage = self.model.call(
            "interact", request=request, features=batch.features
        )
        directions = F.normalize(message.values.float(), dim=-1)
        logits: Tensor = self.sharpness * directions @ self.answers.directions.T
        return logits


class Verbalise(_TowardsAnswers):
    """The LLM's loss on answers whose embeddings are handed to it in place of the message.

    Noise, and a little of another answer, stand for the faults of a real message.
    """

    name = "verbalise"
    through_llm = True
    unit = "label tokens"

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Put the answers' embeddings where the interaction's message would stand."""
        with self.model.observing(_Instead(self._message(batch))):
            return _language(self.model, batch)

    def labels(self, batch: Batch) -> int:
        """Count the tokens that the LLM's loss is over."""
        return _label_tokens(self.model, batch)

    def _message(self, batch: Batch) -> Tensor:
        directions = self.answers.directions
        right = directions[self.answers.index(batch).to(directions.device)]
        assert self.model.interaction is not None
        M, device = self.model.interaction.length, right.device
        wrong = directions[torch.randint(len(directions), (len(right),), device=device)]
        wrong = wrong * torch.rand(len(right), 1, device=device) * 0.4
        noise = torch.randn(len(right), M, right.shape[1], device=device)
        noise = noise * torch.rand(len(right), 1, 1, device=device) / right.shape[1] ** 0.5
        message: Tensor = (right + wrong).unsqueeze(1) + noise
        return message


class Language(Objective):
    """The LLM's cross-entropy on the answer's tokens, through all four stages."""

    name = "language"
    through_llm = True
    unit = "label tokens"

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Run the model as it will be used."""
        return _language(self.model, batch)

    def labels(self, batch: Batch) -> int:
        """Count the tokens that the LLM's loss is over."""
        return _label_tokens(self.model, batch)


def build_objectives(
    stage: StageConfig, model: IPN, data: Sequence[Data], registry: Registry
) -> list[tuple[Objective, float]]:
    """Build the objectives of a stage, each with its weight.

    Raises:
        ConfigError: the model or the data cannot serve one.
        UnknownNameError: there is no such objective.
    """
    return [
        (registry.get("objective", name).load()(model, data), weight)
        for name, weight in stage.objectives.items()
    ]


class _Answers:
    """The distinct answers, and a unit direction for each in the LLM's input space.

    Attributes:
        directions: (A, D_in) mean input embedding of each answer's tokens, centred over them all.
    """

    def __init__(self, model: IPN, data: Sequence[Data]) -> None:
        answers = sorted({e.answers[0] for d in data for e in d.examples})
        self._index = {answer: i for i, answer in enumerate(answers)}
        backbone = model.backbone
        with torch.no_grad():
            means = [
                backbone.embed(torch.tensor([_ids(model, a)], device=backbone.device))[0].mean(0)
                for a in answers
            ]
            embeddings = torch.stack(means).float()
            self.directions = F.normalize(embeddings - embeddings.mean(0), dim=-1)

    def index(self, batch: Batch) -> Tensor:
        """Return (B,) the index of each example's answer.

        Answers that training never had get -1, which no message can point at.
        """
        return torch.tensor([self._index.get(e.answers[0], -1) for e in batch.examples])


class _Instead:
    """A wrapper on one model's `interact`: another message in place of the interaction's."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @hookimpl(tryfirst=True)
    def interact(self, request: Request, features: Any) -> VisualMessage:
        """Answer the hook first, so that the interaction is not run."""
        return VisualMessage(self.values.to(request.values.dtype))


def _language(model: IPN, batch: Batch) -> Tensor:
    total, count = model(batch.prompts(model), batch.features)
    mean: Tensor = total / max(count, 1)
    return mean


@torch.no_grad()
def _label_tokens(model: IPN, batch: Batch) -> int:
    """Return the number that the loss itself is divided by."""
    _, count = model(batch.prompts(model), batch.features)
    tokens: int = count
    return tokens


def _ids(model: IPN, text: str) -> list[int]:
    ids: list[int] = model.backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _asks(objective: Objective) -> None:
    model = objective.model
    if model.interaction is None:
        raise objective.refuse(
            f"needs a strategy that asks; '{model.strategy}' does not. Use 'language'."
        )
    if objective.name not in model.interaction.objectives:
        declared = ", ".join(sorted(model.interaction.objectives)) or "none"
        raise objective.refuse(
            f"is not among those that the interaction of {model.label('interact')} declares "
            f"({declared}). Use 'language', or add it to the interaction's 'objectives'."
        )


def _message_is_embedding(objective: Objective) -> None:
    model = objective.model
    assert model.interaction is not None
    if model.interaction.width != model.backbone.D_in:
        raise objective.refuse(
            f"needs a message as wide as the LLM's embeddings, {model.backbone.D_in}; it is "
            f"{model.interaction.width}."
        )


def request_of(model: IPN, batch: Batch) -> Request:
    """Return the requests of a batch, from the cache or by reading the questions now."""
    assert model.requester is not None
    hidden = batch.hidden
    if hidden is None:
        plans = [model.planner.plan(prompt) for prompt in batch.prompts(model)]
        percept = model.perceive([], [p.question for p in plans], batch.features)
        hidden = model.engine.hidden_at_request(plans, percept)
    context = RequestContext(
        hidden.to(model.backbone.device, model.stage_dtype),
        range(len(batch.examples)),
        0,
        model.requester.layer,
    )
    request: Request = model.call("request", context=context)
    return request
