"""Looking again: the LLM asks for a further look while it answers.

A learned head reads the LLM's last hidden state before every token. Where it is surer than the
layout's threshold, the answer has `<img-q>` in place of the token: transformers' `generate` stops,
the engine looks, and `generate` is resumed from the same cache. Decoding stays transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ipn_core.errors import GenerationOptionError
from ipn_core.plan import Plan, RequestSlot, Tokens, look_slots
from ipn_core.transfer import tensor_on

if TYPE_CHECKING:
    from ipn_core.config import Layout

__all__ = ["REFUSED_LOOKING", "HeldStreamer", "LookHead", "Watch", "refuse_options"]


class LookHead(nn.Module):
    """Whether to look again, from the LLM's last hidden state.

    It starts out sure that it need not.
    """

    def __init__(self, width: int) -> None:
        """Start a head.

        Args:
            width: D_out of the LLM.
        """
        super().__init__()
        self.score = nn.Linear(width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.constant_(self.score.bias, -4.0)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states (…, D_out) to the logits (…) of looking before the next token."""
        logits: Tensor = self.score(hidden.to(self.score.weight.dtype)).squeeze(-1)
        return logits.float()


_ONE_CALL = "a look ends a call of transformers' generate, and it counts from that call's start"
_OUTPUTS = "an answer with looks is made by several calls of transformers' generate"
_ROWS = "its copies of a prompt would look at different times"

REFUSED_LOOKING: dict[str, str] = {
    "begin_suppress_tokens": _ONE_CALL,
    "exponential_decay_length_penalty": _ONE_CALL,
    "forced_eos_token_id": _ONE_CALL,
    "max_time": _ONE_CALL,
    "min_length": _ONE_CALL,
    "min_new_tokens": _ONE_CALL,
    "num_beams": _ROWS,
    "num_return_sequences": _ROWS,
    "output_attentions": _OUTPUTS,
    "output_hidden_states": _OUTPUTS,
    "output_logits": _OUTPUTS,
    "output_scores": _OUTPUTS,
}
"""Option names that a model which may look again refuses, with the reason."""


def refuse_options(options: Mapping[str, Any]) -> None:
    """Refuse what a model that may look again cannot serve.

    Raises:
        GenerationOptionError: an option of `REFUSED_LOOKING` asks for more than nothing.
    """
    for name, reason in REFUSED_LOOKING.items():
        neutral = (None, False, 0, 1) if reason is _ROWS else (None, False, 0)
        if options.get(name) not in neutral:
            raise GenerationOptionError(
                f"generation option '{name}' cannot be served while the model may look again: "
                f"{reason}. Leave it out, or set layout.look_again to 0."
            )


class Watch:
    """A stopping criterion of transformers' `generate`: stops the batch where a row looks again.

    The token just chosen by that row is dropped; its place is the look's. Ids that logits
    processors and stopping criteria see hold the padding id there.

    Attributes:
        looked: for each row, the places of its looks among the ids.
        looking: the rows that look now.
    """

    def __init__(
        self,
        head: LookHead,
        layout: Layout,
        plans: Sequence[Plan],
        ends: Sequence[int],
        limit: int,
        device: torch.device,
    ) -> None:
        """Watch a batch.

        Args:
            head: decides.
            layout: its threshold and how often an answer may look.
            plans: the prompts, one a row; one without a picture has nothing to look at.
            ends: ids that end an answer.
            limit: tokens of an answer, at most.
            device: of the ids.
        """
        self._head = head
        self._layout = layout
        self._limit = limit
        self._pictures = [_pictures(plan) for plan in plans]
        self._left = tensor_on(
            [layout.look_again if pictures else 0 for pictures in self._pictures], device
        )
        self._ends = tensor_on(list(ends), device, torch.long)
        self._length = torch.full((len(plans),), -1, device=device)
        self._hidden = torch.empty(0)
        self.looked: list[list[int]] = [[] for _ in plans]
        self.looking: list[int] = []

    def room(self, ids: Tensor | None) -> int:
        """Return how many ids may follow (B, n) so that every row can reach its limit."""
        emitted = 0 if ids is None else ids.shape[1]
        return self._limit + max(map(len, self.looked)) - emitted

    @contextmanager
    def reading(
        self, language_head: nn.Module, stops: Callable[[Tensor, Any], Tensor]
    ) -> Iterator[None]:
        """Keep the last hidden state of every forward inside the block.

        Args:
            language_head: of the LLM, which every family calls with its last hidden states.
            stops: the caller's own stopping criteria.
        """

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._hidden = inputs[0][:, -1]

        self._stops = stops
        handle = language_head.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Return which rows (B,) stop after the last of `ids` (B, n)."""
        everyone = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        if self.looking:  # a device that is told late runs one step more, which is undone
            return everyone
        n = ids.shape[1]
        taken = torch.tensor([len(places) for places in self.looked], device=ids.device)
        done = self._length >= 0
        wanted = self._head(self._hidden).sigmoid() > self._layout.look_threshold
        looks = wanted & (taken < self._left) & ~done
        over = self._stops(ids, scores) | torch.isin(ids[:, -1], self._ends)
        over = (over | (n - taken >= self._limit)) & ~looks & ~done
        self._length = torch.where(over, n, self._length)
        self.looking = looks.nonzero().flatten().tolist()
        for row in self.looking:
            self.looked[row].append(n - 1)
        return everyone if self.looking else done | over

    def next(self, ids: Tensor) -> list[Plan]:
        """Return what each row goes on with: a look, its last token, or nothing if it is done.

        Args:
            ids: (B, n) emitted so far; the last one of a row that looks is dropped.
        """
        plans = []
        done, last = (self._length >= 0).tolist(), ids[:, -1].tolist()
        for row, pictures in enumerate(self._pictures):
            if row in self.looking:
                round_ = self._layout.rounds + len(self.looked[row]) - 1
                plans.append(Plan(look_slots(round_, pictures)))
            else:
                plans.append(Plan(() if done[row] else (Tokens((last[row],)),)))
        self.looking = []
        return plans

    def answers(self, ids: Tensor) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Return each row's own ids, and how many of them came before each of its looks.

        Args:
            ids: (B, n) all that was emitted.
        """
        own, looked = [], []
        for row, length, places in zip(
            ids.tolist(), self._length.tolist(), self.looked, strict=True
        ):
            whole = row[: length if length >= 0 else len(row)]
            own.append(tuple(id_ for place, id_ in enumerate(whole) if place not in places))
            looked.append(tuple(place - index for index, place in enumerate(places)))
        return own, looked


class HeldStreamer:
    """A streamer between transformers and the caller's: never hands on a token that is dropped.

    A token is held until the next one, or the end of a call, shows that no look took its place.
    """

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._calls = 0
        self._prompt = True
        self._held: Any = None

    def put(self, value: Any) -> None:
        """Hold a token, and hand on the one before it; a later call's prompt was streamed."""
        if self._prompt:
            self._prompt = False
            self._calls += 1
            if self._calls == 1:
                self._streamer.put(value)
            return
        if self._held is not None:
            self._streamer.put(self._held)
        self._held = value

    def end(self) -> None:
        """Wait: only `settle` knows what the end of a call means."""

    def settle(self, looks: bool) -> None:
        """End a call of `generate`; `looks` says that its last token is none."""
        if self._held is not None and not looks:
            self._streamer.put(self._held)
        self._held, self._prompt = None, True
        if not looks:
            self._streamer.end()


def _pictures(plan: Plan) -> int:
    """How many of the prompt's pictures a further look sees."""
    return max((p.images for p in plan.pieces if isinstance(p, RequestSlot)), default=0)
