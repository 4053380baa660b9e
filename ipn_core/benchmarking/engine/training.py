"""Seconds of a training step: a question asked with its beginning frozen, kept, and in two passes.

All train through the same LLM, on the same questions, answers and features, with as many tokens in
front of the answer: the static model has its tokens in front of the question, where gradients must
go through all that follows; the others ask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ipn_core.benchmarking.engine.subjects import WIDTH, asking_model, features_of
from ipn_core.benchmarking.engine.table import Found, against, took
from ipn_core.benchmarking.engine.timing import collected, in_turn
from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.prefixes import PrefixCache
from ipn_core.prompt import Prompt
from ipn_core.segments import IGNORED, lay_out
from ipn_core.stages import InjectContext, Request, RequestContext
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig
from ipn_core.training.parameters import choose

if TYPE_CHECKING:
    from ipn_core.backbone import Backbone
    from ipn_core.benchmarking.engine.table import Session

__all__ = ["SHARED", "K", "Steps", "measure", "measure_all", "setup_prompts", "setup_steps"]

LENGTH = 128
"""Tokens up to and with `<img-q>`."""
K = 8
FIRST_WORDS = ("red", "tan", "dog", "cat", "sky", "yes", "box", "cup")
"""One a row of the batch, each as long as the others: no two questions begin alike."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""SmolLM2's own without its system message, which would make every question longer."""
SHARED = {"prompt": {"template": TEMPLATE}, "layout": {"dynamic": K}}
FROZEN, KEPT, ALL = 0.60, 0.25, 1.07
"""How much of a static model's step they may take, and how much of one pass."""

STATIC = "static tokens in front"
ASKED = "asked, the beginning run each step"
CACHED = "asked, the beginning from the cache"
TWICE = "asked, the LLM run twice"
TRAINED = "asked, the beginning trained through"
ONCE = "one pass over the same tokens"


def measure(session: Session) -> Found:
    """Measure with nothing to train before `<img-q>`."""
    steps = setup_steps(session.backbone, LENGTH)
    steps.check()
    count = session.repeats(6, 3)
    found = collected(in_turn(steps.frozen, count, warm_up=1))
    return Found(
        "training",
        _title(steps, f"or {K + 1} static ones of {steps.length}"),
        [
            *took("training", found),
            against("training", found, ASKED, STATIC, FROZEN),
            against("training", found, CACHED, STATIC, KEPT),
            against("training", found, TWICE, STATIC),
        ],
    )


def measure_all(session: Session) -> Found:
    """Measure with everything to train, what stands before `<img-q>` included."""
    steps = setup_steps(session.backbone, LENGTH)
    steps.check_all()
    count = session.repeats(6, 3)
    found = collected(in_turn(steps.through, count, warm_up=0))  # both have run just now
    row = "training-all"
    return Found(
        row,
        _title(steps, "the embedding of <img-q> trained too"),
        [*took(row, found), against(row, found, TRAINED, ONCE, ALL)],
        notes=["the one pass is told what the request is, so that it need not run the LLM for it"],
    )


def _title(steps: Steps, rest: str) -> str:
    return (
        f"a training step, batch {len(steps.prompts)}, {steps.prefix} tokens up to <img-q>, {K} "
        f"dynamic ones, {steps.length} in all, {rest}"
    )


# -- what is timed ---------------------------------------------------------------------------------


@dataclass
class Steps:
    """Steps of three models on one batch, and the losses and gradients that they are checked by.

    Attributes:
        asking: with RVII, new weights; trains what follows `<img-q>`.
        whole: the same, and `<img-q>` trains too.
        static: the same LLM with as many tokens in front of the question.
        prompts: B questions with their answers, all of one length.
        features: of their pictures.
        prefix: tokens up to and with `<img-q>`.
        length: tokens that the LLM runs over for a row, in every model.
    """

    asking: IPN
    whole: IPN
    static: IPN
    prompts: list[Prompt]
    features: VisualFeatures
    prefix: int
    length: int

    def __post_init__(self) -> None:
        self.kept = PrefixCache(self.asking, 1 << 31)
        self.told: Tensor | None = None
        models = (self.asking, self.whole, self.static)
        self._optimizers = {id(m): torch.optim.AdamW(_trained(m), lr=0.0) for m in models}

    @property
    def frozen(self) -> dict[str, Callable[[], float]]:
        """A step of each with nothing to train before `<img-q>`; returns its loss."""
        return {
            STATIC: self._step(self.static, lambda: self._loss(self.static)),
            ASKED: self._step(self.asking, lambda: self._loss(self.asking)),
            CACHED: self._step(self.asking, lambda: self._loss(self.asking, self.kept)),
            TWICE: self._step(self.asking, lambda: self._two_passes(self.asking)),
        }

    @property
    def through(self) -> dict[str, Callable[[], float]]:
        """A step of each with everything to train."""
        return {
            TRAINED: self._step(self.whole, lambda: self._loss(self.whole)),
            ONCE: self._step(self.whole, self._one_pass),
        }

    def _step(self, model: IPN, loss: Callable[[], Tensor]) -> Callable[[], float]:
        """Return a training step; its rate is 0, so that all stay alike."""
        optimizer = self._optimizers[id(model)]

        def step() -> float:
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(_trained(model), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value.item()

        return step

    def check(self) -> None:
        """Refuse to time steps that do not compute the same, from the cache cold and warm.

        Raises:
            AssertionError: losses differ by more than 1e-4 of themselves, or gradients of the
                largest one.
        """
        others = {
            "kept": lambda: self._loss(self.asking, self.kept),
            "kept, again": lambda: self._loss(self.asking, self.kept),
            "two passes": lambda: self._two_passes(self.asking),
        }
        _check_same(self.asking, self._loss(self.asking), others)
        if self.kept.reads != len(self.prompts):
            raise AssertionError(f"{self.kept.reads} beginnings were read, not {len(self.prompts)}")

    def check_all(self) -> None:
        """Refuse to time a step that does not train as two passes do, or a pass of another loss.

        Raises:
            AssertionError: as `check`.
        """
        loss = self._loss(self.whole)
        once = self._one_pass().item()
        if not math.isclose(once, loss.item(), rel_tol=1e-4):
            raise AssertionError(f"one pass has the loss {once:.6f}, not {loss.item():.6f}")
        _check_same(
            self.whole, loss, {"two passes": lambda: self._two_passes(self.whole, grad=True)}
        )

    def _loss(self, model: IPN, kept: PrefixCache | None = None) -> Tensor:
        loss, count = model(self.prompts, self.features, kept)
        mean: Tensor = loss / count
        return mean

    def _two_passes(self, model: IPN, grad: bool = False) -> Tensor:
        """Return the loss as the published code finds it: the LLM runs over the question twice."""
        before, _ = self._inputs(model)
        with torch.set_grad_enabled(grad):
            lm: Any = model.backbone.lm.base_model
            hidden = lm(inputs_embeds=before, use_cache=False).last_hidden_state[:, -1:]
        return self._answered(model, hidden)

    def _one_pass(self) -> Tensor:
        """Return the loss of one pass over all tokens, which is told what is asked."""
        if self.told is None:
            before, _ = self._inputs(self.whole)
            lm: Any = self.whole.backbone.lm.base_model
            with torch.no_grad():
                self.told = lm(inputs_embeds=before, use_cache=False).last_hidden_state[:, -1:]
        return self._answered(self.whole, self.told)

    def _inputs(self, model: IPN) -> tuple[Tensor, Any]:
        """Return the inputs (B, prefix, D_in) up to `<img-q>`, and the segment after it."""
        plans = [model.planner.plan(prompt) for prompt in self.prompts]
        (first, last), _, _ = lay_out(plans, [[0]] * len(plans), 1, K)
        before = model.backbone.embed(first.ids.to(model.backbone.device))
        at = torch.tensor([before.shape[1] - 1], device=before.device)
        request = model.slots.request.expand(len(plans), 1, -1)
        return before.index_copy(1, at, request), last

    def _answered(self, model: IPN, hidden: Tensor) -> Tensor:
        """Return the loss of one run over everything, asked with these hidden states."""
        before, last = self._inputs(model)
        assert model.requester is not None
        assert model.interaction is not None
        assert model.injector is not None
        request: Request = model.requester(RequestContext(hidden, list(range(len(before)))))
        message = model.interaction(request, self.features)
        tokens = model.injector(message, InjectContext(model.slots.dynamic)).tokens
        after = model.backbone.embed(last.ids.to(before.device))[:, K:]
        whole = torch.cat([before, tokens, after], dim=1)
        lm: Any = model.backbone.lm.base_model
        states = lm(inputs_embeds=whole, use_cache=False).last_hidden_state[:, self.prefix :]
        labels = last.labels[:, 1:].to(before.device)
        learned = labels != IGNORED
        return F.cross_entropy(model.backbone.logits(states[:, :-1][learned]), labels[learned])


def _check_same(model: IPN, loss: Tensor, others: dict[str, Callable[[], Tensor]]) -> None:
    expected = loss.item()
    gradients = torch.autograd.grad(loss, _trained(model))
    largest = max(float(g.abs().max()) for g in gradients)
    for name, make in others.items():
        other = make()
        if not math.isclose(other.item(), expected, rel_tol=1e-4):
            raise AssertionError(f"'{name}' has the loss {other.item():.6f}, not {expected:.6f}")
        mine = torch.autograd.grad(other, _trained(model))
        off = max(float((a - b).abs().max()) for a, b in zip(mine, gradients, strict=True))
        if off > 1e-4 * largest:
            raise AssertionError(f"the gradients of '{name}' differ by {off / largest:.1e}")


def setup_steps(llm: Backbone, length: int) -> Steps:
    """Build the models around one LLM, and a batch whose questions have `length` tokens or more.

    Raises:
        AssertionError: the models put different numbers of tokens into the LLM.
    """
    asking, whole = (asking_model(llm, **SHARED).train() for _ in range(2))
    torch.manual_seed(0)
    static = IPN.from_config(
        {
            "strategy": "static",
            "backbone": "llama",
            "encoder": "tiny",
            "perceive": {"name": "static", "map": "mlp", "tokens": K + 1},
            "prompt": SHARED["prompt"],
        },
        backbone=llm,
        encoder=TinyEncoder(TinyEncoderConfig(width=WIDTH)),
    ).train()
    parts = ["interact", "inject", "slots.dynamic"]
    choose(asking, parts)
    choose(whole, [*parts, "slots.request"])
    choose(static, ["perceive", "slots.image"])
    prompts, prefix = setup_prompts(asking, length)
    features = features_of(len(prompts), llm.device)
    totals = []
    for model in (asking, static):
        plans = [model.planner.plan(prompt) for prompt in prompts]
        percept = model.perceive([], [plan.question for plan in plans], features)
        with torch.no_grad():
            _, _, state = model.engine.loss(plans, percept)
        totals += [count.total() for count in state.counts]
    if len(set(totals)) > 1:
        raise AssertionError(f"the models put {totals} tokens into the LLM")
    return Steps(asking, whole, static, prompts, features, prefix, totals[0])


def setup_prompts(model: IPN, length: int) -> tuple[list[Prompt], int]:
    """Return a batch whose rows have equally many tokens, and how many up to `<img-q>`.

    Raises:
        AssertionError: the tokenizer makes some question or answer longer than others.
    """
    text = "?"
    while True:
        answers = (*FIRST_WORDS[1:], FIRST_WORDS[0])
        prompts = [
            Prompt.ask(word + text, ["the picture"], answer=answer)
            for word, answer in zip(FIRST_WORDS, answers, strict=True)
        ]
        plans = [model.planner.plan(prompt) for prompt in prompts]
        first, last = lay_out(plans, [[0]] * len(plans), 1, K)[0]
        if first.padded or last.padded:
            raise AssertionError("the questions or answers differ in length")
        if first.length >= length:
            return prompts, first.length
        text += " a"


def _trained(model: IPN) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
