"""Training objectives that a stage names: through the LLM, or cheaper alignments on the way there.

`request-image`     request and patches meet in one space: what the question names is in the picture
`answer-embedding`  the message points at the answer's own input embedding, without the LLM
`image-text`        where nothing is asked: the tokens name what is in the picture
`verbalise`         injection is learnt without pictures: the LLM says the answer it is handed
`language`          the LLM's loss on the answer, end to end
`look-again`        the head that asks for a further look learns when an example needs one

An objective is registered under its name (`registry.objective`) and checks by itself whether a
model and its data can serve it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.errors import ConfigError, PluginError, TrainingError
from ipn_core.faults import Guarded
from ipn_core.plan import Plan, RequestSlot, Tokens
from ipn_core.stages import RequestContext, VisualMessage
from ipn_core.training.answers import Answers, Told, looking, targets
from ipn_core.training.data import Batch, DataSource, prompt_of
from ipn_core.training.requests import read_requests
from ipn_core.transfer import send, tensor_on

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.plugins import Registry
    from ipn_core.stages import Request
    from ipn_core.tasks import Example
    from ipn_core.training.config import StageConfig

__all__ = [
    "AnswerEmbedding",
    "Language",
    "LookAgain",
    "Objective",
    "RequestImage",
    "Verbalise",
    "build_objective",
    "build_objectives",
    "request_of",
]


class Objective(Guarded, ABC):
    """One term of the loss.

    Attributes:
        name: what configs call it.
        through_llm: whether it runs the LLM itself, and so makes its own requests.
        unit: what `labels` counts, in the plural.
        answers: what looks shall bring, for objectives towards that.
        needs_question: whether it makes sense of no request that is the same for all questions.
    """

    GUARDED = ("loss", "labels", "correct")
    name: str
    through_llm = False
    unit = "examples"
    answers: Answers | None = None
    needs_question = True

    def __init__(self, model: IPN, data: Sequence[DataSource]) -> None:
        """Check that the model and the data can serve this objective.

        Raises:
            ConfigError: they cannot; the text says what to change.
        """
        self.model = model
        self.data = data

    @abstractmethod
    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Return the mean loss of a batch, over what `labels` counts; 0 where that is nothing.

        Where a batch is a share of a step, only what the step's losses are not simply a mean of
        (what is compared with each other, or weighted by its frequency) looks at `batch.step`.

        Args:
            batch: the examples.
            request: of the batch, where the model asks.
        """

    def labels(self, batch: Batch) -> int:
        """Count what a batch offers to learn from, in `unit`; none in the first one is refused.

        Losses of shares of a step are weighted by it, so that it must add up over them. It is
        counted often: do not run the LLM for it.
        """
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

    def __init__(self, model: IPN, data: Sequence[DataSource]) -> None:
        super().__init__(model, data)
        _asks(self)
        if not any(e.names for d in data for e in d.examples):
            raise self.refuse(
                "needs examples that say what they name and what their pictures show "
                f"(Example.names, .shown); {', '.join(d.name for d in data)} say neither."
            )

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Score requests (B, R, D) that name something against the pictures; a scalar ()."""
        assert request is not None
        assert self.model.interaction is not None
        rows, pictures = self._pairs(batch)
        if not rows:
            text, patches = self.model.interaction.shared_space(request, batch.features)
            return (text.sum() + patches.sum()) * 0.0
        place = {index: i for i, index in enumerate(batch.mine)}
        own = [place[index] for index in rows]
        asking = replace(request, values=request.values[tensor_on(own, request.values.device)])
        features = batch.features_of(pictures)
        text, patches = self.model.interaction.shared_space(asking, features)
        scores = 16 * torch.einsum("qw,npw->qnp", text, features.spread(patches))
        scores = scores.float().masked_fill(~features.mask, -1e4).logsumexp(-1) - self.offset
        asking_anywhere = [i for i, e in enumerate(batch.step) if e.names]
        shown = [set(batch.step[i].shown) for i in pictures]
        every = torch.tensor(
            [[float(set(batch.step[i].names) <= s) for s in shown] for i in asking_anywhere]
        )
        share = send(every.mean(), scores.device)
        mine = set(rows)
        targets = send(every[[i in mine for i in asking_anywhere]], scores.device)
        # Most pairs are negative; both kinds get half the weight.
        weight = torch.where(targets > 0, 0.5 / share, 0.5 / (1 - share))
        weight = weight.nan_to_num(0.5, 0.5, 0.5).clamp(max=50)
        return F.binary_cross_entropy_with_logits(scores, targets, weight)

    def labels(self, batch: Batch) -> int:
        """Count the pairs that are scored."""
        rows, pictures = self._pairs(batch)
        return len(rows) * len(pictures)

    @staticmethod
    def _pairs(batch: Batch) -> tuple[list[int], list[int]]:
        """Return which of the step's examples are here and name something, and one a picture.

        The pictures are those of the whole step, whoever asks about them.
        """
        rows = [i for i in batch.mine if batch.step[i].names]
        named = [(e, i) for i, e in enumerate(batch.step) if e.names]
        seen = {tuple(p.name for p in e.images): i for e, i in named}
        return rows, list(seen.values())


class _TowardsAnswers(Objective):
    """Base of the objectives in which a message stands for the input embedding of what was found.

    That is the answer, or where examples know it, the hop that a look before the last should find.
    """

    answers: Answers

    def __init__(self, model: IPN, data: Sequence[DataSource]) -> None:
        super().__init__(model, data)
        _asks(self)
        _message_is_embedding(self)
        self.answers = Answers(model, data)

    def _looks(self, examples: Sequence[Example]) -> list[list[int]]:
        """The examples that have each look."""
        layout = self.model.config.layout
        most = max(len(targets(e, layout)) for e in examples)
        return [looking(examples, layout, look) for look in range(most)]


class AnswerEmbedding(_TowardsAnswers):
    """Each message token points at its target's input embedding: nearest to it, and close to it.

    That is cross-entropy over all targets, plus one minus the cosine: what is only nearer to its
    target than to the other targets is, among all of the LLM's words, no word yet. A look after
    the first is asked for as if the ones before it had found theirs.
    """

    name = "answer-embedding"
    unit = "answers"
    sharpness = 20.0
    """What cosines are multiplied with; a temperature of 1/20."""

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Compare the messages' tokens (B, K, D_in) with the targets (n, D_in); a scalar ()."""
        found = self._compare(batch, request)
        logits = torch.cat([x for _, x, _ in found]).flatten(0, 1)
        wanted = send(torch.cat([x for *_, x in found]), logits.device)
        tokens = len(logits) // len(wanted)
        wanted = wanted.repeat_interleave(tokens)
        cosines = logits.gather(1, wanted.unsqueeze(1)) / self.sharpness
        nearest = F.cross_entropy(logits, wanted, label_smoothing=0.02)
        return nearest + (1 - cosines).mean()

    def labels(self, batch: Batch) -> int:
        """Count the looks whose target has an embedding."""
        some = [
            self.answers.index([batch.examples[i] for i in rows], look)
            for look, rows in enumerate(self._looks(batch.examples))
        ]
        return int((torch.cat(some) >= 0).sum())

    def correct(self, batch: Batch, request: Request | None) -> list[bool]:
        """Compare the target that the tokens point at together with the right one, at each look."""
        right = [True] * len(batch.examples)
        for rows, logits, wanted in self._compare(batch, request):
            best = logits.mean(1).argmax(-1).cpu()
            for row, hit in zip(rows, (best == wanted).tolist(), strict=True):
                right[row] &= hit
        return right

    def _compare(
        self, batch: Batch, request: Request | None
    ) -> list[tuple[list[int], Tensor, Tensor]]:
        """By look: the examples, the logits (B, M, A) of their messages, and their targets (B,)."""
        found = []
        for look, rows in enumerate(self._looks(batch.examples)):
            asked = request_of(self.model, batch, look, self.answers) if look else request
            part = batch if len(rows) == len(batch.examples) else batch.select(rows)
            message: VisualMessage = self.model.call(
                "interact", request=asked, features=part.features
            )
            directions = F.normalize(message.values.float(), dim=-1)
            logits: Tensor = self.sharpness * directions @ self.answers.directions.T
            found.append((rows, logits, self.answers.index(part.examples, look)))
        return found


class Verbalise(_TowardsAnswers):
    """The LLM's loss on answers whose embeddings are handed to it in place of the message.

    Noise, and a little of another answer, stand for the faults of a real message.
    """

    name = "verbalise"
    through_llm = True
    unit = "label tokens"
    needs_question = False

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Put the targets' embeddings where the interaction's messages would stand."""
        if batch.whole is None:
            messages = self._messages(batch.examples)
        else:
            with batch.whole.noise(self.model.backbone.device):
                every = self._messages(batch.step)
            layout, mine = self.model.config.layout, set(batch.mine)
            messages = [
                message[[i in mine for i in looking(batch.step, layout, look)]]
                for look, message in enumerate(every)
            ]
        with self.model.observing(Told(messages)):
            return _language(self.model, batch)

    def labels(self, batch: Batch) -> int:
        """Count the tokens that the LLM's loss is over."""
        return _label_tokens(self.model, batch)

    def _messages(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return the messages of each look, (B, M, D_in) of the examples that have it."""
        return [
            self._message([examples[i] for i in rows], look)
            for look, rows in enumerate(self._looks(examples))
        ]

    def _message(self, examples: Sequence[Example], look: int) -> Tensor:
        directions = self.answers.directions
        right = self.answers.of(examples, look)
        assert self.model.interaction is not None
        layout = self.model.config.layout
        told = self.model.interaction.saying([targets(e, layout)[look] for e in examples])
        if told is not None:
            return told
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


class LookAgain(Objective):
    """Binary cross-entropy of looking again, before every token to learn and every look to take.

    The hidden states before looks are as rare as looks are; both choices get half the weight.
    """

    name = "look-again"
    through_llm = True
    unit = "choices"

    def __init__(self, model: IPN, data: Sequence[DataSource]) -> None:
        super().__init__(model, data)
        if model.look_head is None:
            raise self.refuse("needs 'layout.look_again' of at least 1.")
        if not any(e.looks for d in data for e in d.examples):
            raise self.refuse(
                "needs examples that say how often to look again (Example.looks); "
                f"{', '.join(d.name for d in data)} never say so."
            )

    def loss(self, batch: Batch, request: Request | None) -> Tensor:
        """Compare what the head wants with what the examples need."""
        assert self.model.look_head is not None
        plans = [self.model.planner.plan(prompt) for prompt in batch.prompts(self.model)]
        percept = self.model.perceive([], [p.question for p in plans], batch.features)
        hidden, again = self.model.engine.decisions(plans, percept)
        share = again.float().mean()
        if batch.whole is not None:
            learned, looks = self._choices(batch.step)
            share = share.new_tensor(looks / (learned + looks))
        share = share.clamp(1e-3, 1 - 1e-3)
        weight = torch.where(again, 0.5 / share, 0.5 / (1 - share))
        wanted = self.model.look_head(hidden)
        return F.binary_cross_entropy_with_logits(wanted, again.float(), weight)

    def labels(self, batch: Batch) -> int:
        """Count the choices."""
        return sum(self._choices(batch.examples))

    def _choices(self, examples: Sequence[Example]) -> tuple[int, int]:
        """Count where not to look again, before tokens to learn, and where to."""
        layout = self.model.config.layout
        plans = [self.model.planner.plan(prompt_of(e, layout)) for e in examples]
        pieces = [piece for plan in plans for piece in plan.pieces]
        looks = [p for p in pieces if isinstance(p, RequestSlot) and p.round >= layout.rounds]
        return _learned(plans), len(looks)


def build_objectives(
    stage: StageConfig, model: IPN, data: Sequence[DataSource], registry: Registry
) -> list[tuple[Objective, float]]:
    """Build the objectives of a stage, each with its weight.

    Raises:
        ConfigError: the model or the data cannot serve one.
        PluginError: one cannot be built, or is no `Objective`.
        UnknownNameError: there is no such objective.
    """
    return [
        (build_objective(name, model, data, registry), weight)
        for name, weight in stage.objectives.items()
    ]


def build_objective(
    name: str, model: IPN, data: Sequence[DataSource], registry: Registry
) -> Objective:
    """Build one objective; see `build_objectives`."""
    component = registry.get("objective", name)
    target = component.load()
    with component.building():
        objective = target(model, data)
    if not isinstance(objective, Objective):
        raise PluginError(
            f"{component.label} must be a subclass of ipn_core.training.objectives.Objective, got "
            f"{target!r}."
        )
    objective.sign(component.label)
    return objective


def _language(model: IPN, batch: Batch) -> Tensor:
    total, count = model(batch.prompts(model), batch.features, batch.prefixes)
    if not count:
        raise TrainingError("a batch has no label left to learn from: all its tokens are masked.")
    mean: Tensor = total / count
    return mean


def _label_tokens(model: IPN, batch: Batch) -> int:
    """Return the number that the loss itself is divided by."""
    return _learned([model.planner.plan(prompt) for prompt in batch.prompts(model)])


def _learned(plans: Sequence[Plan]) -> int:
    pieces = [piece for plan in plans for piece in plan.pieces]
    return sum(len(p.ids) for p in pieces if isinstance(p, Tokens) and p.learn)


def _asks(objective: Objective) -> None:
    model = objective.model
    if model.interaction is None:
        raise objective.refuse(
            f"needs an interaction, whose message it is about; strategy '{model.strategy}' has "
            "none. Use 'language'."
        )
    assert model.requester is not None
    if objective.needs_question and not model.requester.asks:
        raise objective.refuse(
            f"needs a request that depends on the question; that of {model.label('request')} "
            "cannot. Use 'image-text', 'verbalise' or 'language'."
        )
    if any(e.dialogue is not None for d in objective.data for e in d.examples):
        raise objective.refuse("needs one question an example; some are dialogues. Use 'language'.")
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


def request_of(model: IPN, batch: Batch, look: int = 0, answers: Answers | None = None) -> Request:
    """Return the requests of the examples that have a look, from the cache or by reading them now.

    Args:
        model: asks.
        batch: the examples.
        look: its number; the looks before it are told that they found what they should.
        answers: says what that is, for a look after the first.
    """
    assert model.requester is not None
    rows = looking(batch.examples, model.config.layout, look)
    if look < len(batch.hidden):
        hidden = batch.hidden[look]
    else:
        part = batch if len(rows) == len(batch.examples) else batch.select(rows)
        hidden = read_requests(model, part.examples, part.features, look, answers)
    context = RequestContext(
        send(hidden, model.backbone.device, model.stage_dtype), rows, look, model.requester.layer
    )
    request: Request = model.call("request", context=context)
    return request
