"""Time to the first token with one request round, against the least that it can cost.

The least is: prefill of the prefix, one forward over the dynamic and remaining tokens, and the
interaction alone, each timed by itself in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.benchmarking.engine.subjects import GRID, asking_model, features_of
from ipn_core.benchmarking.engine.table import Found, against, took
from ipn_core.benchmarking.engine.timing import Timed, collected, in_turn, timing
from ipn_core.clock import Clock
from ipn_core.generate import decode
from ipn_core.model import IPN
from ipn_core.prompt import Prompt
from ipn_core.segments import lay_out
from ipn_core.stages import InjectContext, Percept, Request, RequestContext

if TYPE_CHECKING:
    from ipn_core.backbone import Backbone
    from ipn_core.benchmarking.engine.table import Session

__all__ = ["Case", "K", "measure_128", "measure_512", "measure_2048", "setup_first_token"]

K = 5
"""Dynamic tokens."""
GOAL = 1.05
"""How much of its floor a first token may take."""


def measure_128(session: Session) -> Found:
    """Measure with 128 tokens up to and with `<img-q>`."""
    return _measure("first-token-128", setup_first_token(session.backbone, 128), session, (20, 6))


def measure_512(session: Session) -> Found:
    """Measure with 512 tokens."""
    return _measure("first-token-512", setup_first_token(session.backbone, 512), session, (10, 3))


def measure_2048(session: Session) -> Found:
    """Measure with 2,048 tokens."""
    return _measure("first-token-2048", setup_first_token(session.backbone, 2048), session, (4, 1))


def _measure(row: str, case: Case, session: Session, repeats: tuple[int, int]) -> Found:
    case.check()
    count = session.repeats(*repeats)
    # What takes seconds is warm after the check.
    found = time_parts(case, count, warm_up=2 if case.prefix < 500 else 0)
    return Found(
        row,
        f"first token, {case.prefix} tokens up to <img-q>, {K} dynamic and {case.rest - K} more; "
        f"RVII over {GRID[0]}x{GRID[1]} patches",
        [
            *took(row, found),
            against(row, found, "one request round", "its floor", GOAL),
            against(row, found, "one request round", "no request"),
            against(row, found, "two passes", "one request round"),
        ],
        notes=["the floor is the sum of its three parts, each timed alone"],
    )


# -- what is timed ---------------------------------------------------------------------------------


def setup_first_token(llm: Backbone, prefix: int) -> Case:
    """Build the model, and a prompt whose prefix has at least `prefix` tokens."""
    model = asking_model(llm, layout={"dynamic": K})
    words = "Is there a dog?"

    def asked(more: int) -> tuple[Prompt, int, int]:
        prompt = Prompt.ask(words + " a" * more, ["the picture"])
        first, last = lay_out([model.planner.plan(prompt)], [[0]], 1, K)[0]
        return prompt, first.length, last.length

    more, (prompt, length, rest) = 0, asked(0)
    while length < prefix:
        # A word may be several tokens, but none is less than one.
        more += max((prefix - length) // 2, 1)
        prompt, length, rest = asked(more)
    percept = model.perceive([], [words], features_of(1, llm.device))
    return Case(model, prompt, percept, length, rest)


@dataclass
class Case:
    """One prompt with one picture.

    Attributes:
        model: with RVII, new weights.
        prompt: one question.
        percept: of its picture, which every row below is given alike.
        prefix: tokens up to and with `<img-q>`.
        rest: tokens after it, the K dynamic ones included.
    """

    model: IPN
    prompt: Prompt
    percept: Percept
    prefix: int
    rest: int

    @torch.no_grad()
    def round(self) -> int:
        """Return the first token as a caller gets it: planned, asked and decoded."""
        plans = [self.model.planner.plan(self.prompt)]
        clock = Clock(self.model.backbone.device)
        answers, _, _ = decode(self.model, plans, self.percept, {"max_new_tokens": 1}, clock)
        return answers[0].ids[0]

    @torch.no_grad()
    def floor(self) -> tuple[int, Timed]:
        """Return the same token by the least that it can cost, and the seconds of each part."""
        backbone, timed = self.model.backbone, Timed()
        before, after = self.embeds[:, : self.prefix], self.embeds[:, self.prefix + K :]
        with timing(timed, "prefill of the prefix"):
            output = backbone.lm.base_model(inputs_embeds=before, use_cache=True)
        request = self._request(output.last_hidden_state[:, -1:])
        with timing(timed, "the interaction"):
            message = self._look(request)
        filled = torch.cat([self._inject(message), after], dim=1)
        with timing(timed, "the rest"):
            output = backbone.lm.base_model(
                inputs_embeds=filled, past_key_values=output.past_key_values, use_cache=True
            )
            scores = backbone.logits(output.last_hidden_state[:, -1])
        return int(scores.argmax()), timed

    @torch.no_grad()
    def two_passes(self) -> int:
        """Return the same token as the published code finds it: the whole LLM twice."""
        backbone = self.model.backbone
        before, after = self.embeds[:, : self.prefix], self.embeds[:, self.prefix + K :]
        first = backbone.lm.base_model(inputs_embeds=before, use_cache=False)
        message = self._look(self._request(first.last_hidden_state[:, -1:]))
        return self._generate(torch.cat([before, self._inject(message), after], dim=1))

    @torch.no_grad()
    def no_request(self) -> int:
        """Return the first token of the same words without `<img-q>` and `<img-d>`."""
        before, after = self.embeds[:, : self.prefix - 1], self.embeds[:, self.prefix + K :]
        return self._generate(torch.cat([before, after], dim=1))

    def check(self) -> None:
        """Refuse to time rows that do not find the same token.

        Raises:
            AssertionError: they do not.
        """
        tokens = {
            "one request round": self.round(),
            "its floor": self.floor()[0],
            "two passes": self.two_passes(),
        }
        if len(set(tokens.values())) > 1:
            raise AssertionError(f"the rows find different first tokens: {tokens}")

    @cached_property
    def embeds(self) -> Tensor:
        """(1, prefix + rest, D_in) the prompt's inputs, the `<img-d>` slots not yet filled."""
        model = self.model
        first, last = lay_out([model.planner.plan(self.prompt)], [[0]], 1, K)[0]
        ids = torch.cat([first.ids, last.ids], dim=1).to(model.backbone.device)
        embeds = model.backbone.embed(ids).detach()
        embeds[:, self.prefix - 1] = model.slots.request.detach()
        return embeds

    @cached_property
    def filled(self) -> Tensor:
        """(1, prefix + rest, D_in) the prompt's inputs, what the look brings among them."""
        before, after = self.embeds[:, : self.prefix], self.embeds[:, self.prefix + K :]
        lm: Any = self.model.backbone.lm.base_model
        with torch.no_grad():
            hidden = lm(inputs_embeds=before, use_cache=False).last_hidden_state[:, -1:]
            message = self._look(self._request(hidden))
            return torch.cat([before, self._inject(message), after], dim=1)

    def _request(self, hidden: Tensor) -> Request:
        assert self.model.requester is not None
        request = self.model.requester(RequestContext(hidden, [0]))
        return Request(request.values, return_map=True)

    def _look(self, request: Request) -> Any:
        assert self.model.interaction is not None
        return self.model.interaction(request, self.percept.features)

    def _inject(self, message: Any) -> Tensor:
        assert self.model.injector is not None
        injected = self.model.injector(message, InjectContext(self.model.slots.dynamic))
        tokens: Tensor = injected.tokens
        return tokens

    def _generate(self, embeds: Tensor) -> int:
        made: Any = self.model.backbone.lm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device),
            max_new_tokens=1,
            do_sample=False,
            pad_token_id=0,
        )
        return int(made[0, -1])


def time_parts(case: Case, repeats: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Time everything in turn; returns the seconds of each row and the parts of the floor."""
    rows: dict[str, Callable[[], Any]] = {
        "one request round": case.round,
        "its floor": case.floor,
        "no request": case.no_request,
        "two passes": case.two_passes,
    }

    def parted() -> Iterator[tuple[Timed, Any]]:
        for timed, results in in_turn(rows, repeats, warm_up):
            parts = results["its floor"][1]
            yield {**timed, "its floor": sum(parts.values()), **parts}, results

    return collected(parted())
