"""The engine: segmented prefill over one key-value cache.

    segment 0: [text, <img>×S, question, <img-q>]   one forward, the cache is kept
               request -> interact -> inject
    segment 1: [<img-d>×K, rest of the prompt]      one forward over the new tokens only

Every token is processed once, however many looks a prompt has. The two-pass method of the
published system (LMEye, arXiv 2305.03701) runs the prefix twice and gives the same logits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.clock import Clock
from ipn_core.errors import PromptError
from ipn_core.looking import at_request, look_at
from ipn_core.plan import Plan
from ipn_core.segments import IGNORED, Segment, lay_out
from ipn_core.shapes import expect
from ipn_core.sharing import Part, divide, undivided
from ipn_core.stages import (
    Injection,
    LayerContext,
    LayerInjector,
    Percept,
)
from ipn_core.state import Prefix, State
from ipn_core.transfer import send, tensor_on

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.prefixes import PrefixCache

__all__ = ["Engine"]

_SHOWN = 40
"""Characters of a question that an error quotes."""


class _Filling(NamedTuple):
    """What stands in slots next to each other: values (n, D_in), plus `added` (D_in,) if given."""

    row: int
    start: int
    values: Tensor
    added: Tensor | None = None


class Engine:
    """Runs prompts through a model's backbone and stages."""

    def __init__(self, model: IPN) -> None:
        self.model = model

    # -- public ----------------------------------------------------------------------------------

    def prefix(
        self,
        plans: Sequence[Plan],
        percept: Percept,
        *,
        state: State | None = None,
        clock: Clock | None = None,
        return_map: bool = False,
    ) -> Prefix:
        """Run everything before the last segment of each prompt.

        Args:
            plans: one a row; with `state`, what comes after it.
            percept: features and static tokens of all pictures of the rows.
            state: what is in the cache already; it is extended in place.
            clock: counts the seconds of each stage.
            return_map: ask the interaction for its attention map.
        """
        (*segments, last), state = self._segments(plans, percept, state)
        filled: dict[int, Tensor] = {}
        with self.layers(state, percept):
            for segment in segments:
                embeds = self._embed(segment, percept, filled)
                hidden = self._extend(segment, embeds, percept, state)
                if clock:
                    clock.lap("prefill")
                filled |= look_at(self.model, segment, hidden, percept, state, clock, return_map)
            embeds = self._embed(last, percept, filled)
            (*shared, rest), _ = self._divide(last, percept, state, every=True)
            self._run(shared, embeds, state)
        own = self._enter(rest, embeds, state)
        self._count(state, last.mask.sum(1) - rest.mask.sum(1))
        if shared and clock:
            clock.lap("prefill")
        lengths = [int(n) for n in rest.mask.sum(1)]
        return Prefix(state, own, send(rest.mask, own.device), lengths)

    def read(self, plans: Sequence[Plan], percept: Percept) -> State:
        """Run plans to their end, for prompts that go on from them; returns what is in the cache.

        Args:
            plans: beginnings of prompts.
            percept: features and static tokens of the prompts' pictures.
        """
        segments, state = self._segments(plans, percept, None)
        with closing(self._walk(segments, state, percept)) as steps:
            for _ in steps:
                pass
        return state

    def loss(
        self, plans: Sequence[Plan], percept: Percept, prefixes: PrefixCache | None = None
    ) -> tuple[Tensor, int, State]:
        """Return the summed cross entropy of the tokens to learn, their number, and the state.

        Language-head logits are computed only where a token is to be learned.

        Args:
            plans: prompts whose last turn is the answer to learn.
            percept: features and static tokens of their pictures.
            prefixes: keeps first segments that never change, if given.
        """
        total = self.model.slots.request.new_zeros(())
        count = 0
        segments, state = self._segments(plans, percept, None)
        with closing(self._walk(segments, state, percept, prefixes)) as steps:
            for segment, hidden in steps:
                if not segment.learns:
                    continue
                last = hidden[-1]
                # What rows share holds nothing to be learned; the rest ends the segment.
                targets = segment.labels[:, segment.length - last.shape[1] + 1 :]
                learned = targets != IGNORED
                labels = send(targets[learned], last.device)
                with self.model.driving("logits"):
                    logits = self.model.backbone.logits(_chosen(last[:, :-1], learned))
                total = total + F.cross_entropy(logits, labels, reduction="sum")
                count += len(labels)
        return total, count, state

    def decisions(self, plans: Sequence[Plan], percept: Percept) -> tuple[Tensor, Tensor]:
        """Return the last hidden states (n, D_out) before each token to learn or look to take.

        With them come the n choices, whether to look again there.

        Args:
            plans: prompts whose last turn is the answer to learn.
            percept: features and static tokens of their pictures.
        """
        found: list[Tensor] = []
        choices: list[Tensor] = []
        segments, state = self._segments(plans, percept, None)
        with closing(self._walk(segments, state, percept)) as steps:
            for segment, hidden in steps:
                last = hidden[-1]
                places = F.pad(segment.labels[:, 1:] != IGNORED, (0, 1))
                again = torch.zeros_like(places)
                for look in segment.looks:
                    before = segment.length - segment.request - 1
                    again[look.row, before] = look.round >= self.model.config.layout.rounds
                again, places = (x[:, -last.shape[1] :] for x in (again, places))
                found.append(_chosen(last, places | again))
                choices.append(send(again[places | again], last.device))
        return torch.cat(found), torch.cat(choices)

    def _walk(
        self,
        segments: Sequence[Segment],
        state: State,
        percept: Percept,
        prefixes: PrefixCache | None = None,
    ) -> Generator[tuple[Segment, dict[int, Tensor]], None, None]:
        """Run segments; yields each with its hidden states (B, ≤ L, D) by layer, -1 the last.

        Those of a first segment that `prefixes` knows are of its end alone, (B, R, D).
        """
        filled: dict[int, Tensor] = {}
        with self.layers(state, percept):
            for index, segment in enumerate(segments):
                embeds = self._embed(segment, percept, filled)
                hidden = self._extend(segment, embeds, percept, state, prefixes)
                yield segment, hidden
                if index < len(segments) - 1:
                    filled |= look_at(self.model, segment, hidden, percept, state, None, False)

    def hidden_at_request(self, plans: Sequence[Plan], percept: Percept, look: int = 0) -> Tensor:
        """Return the hidden states (B, R, D) at one `<img-q>` of each prompt.

        Those at the first do not depend on the pictures where the layout has no static tokens, so
        that a repeated question's may be kept.

        Args:
            plans: of a single turn each, with more than `look` looks.
            percept: features and static tokens of their pictures.
            look: which one, from 0.
        """
        segments, state = self._segments(plans, percept, None)
        with closing(self._walk(segments[: look + 1], state, percept)) as steps:
            *_, (segment, hidden) = steps
        return at_request(self.model, segment, segment.looks, hidden)

    @contextmanager
    def layers(self, state: State, percept: Percept, repeats: int = 1) -> Iterator[None]:
        """Put a layer injector, if the model has one, between the layers of the backbone.

        Args:
            state: knows where the pictures stand; may grow inside the block.
            percept: the features.
            repeats: copies of each row next to each other, as beams are.
        """
        injector = self.model.injector
        if not isinstance(injector, LayerInjector):
            yield
            return
        dtype = self.model.stage_dtype
        rows = [row for row in range(percept.features.batch) for _ in range(repeats)]
        features = percept.features.to(dtype=dtype).select(rows)
        interaction = self.model.interaction
        size = (0, 0) if interaction is None else (interaction.length, interaction.width)
        read: list[tuple[Tensor, LayerContext]] = []

        def before(layer: int, hidden: Tensor, positions: Tensor) -> Tensor:
            if injector.needs_message and not any(state.told):
                return hidden
            # All layers of one forward are handed the same positions.
            if not read or read[0][0] is not positions:
                context = state.between(rows, positions.expand(len(rows), -1), features, size)
                read[:] = [(positions, context)]
            with self.model.running("inject"):
                changed = injector.before_layer(hidden.to(dtype), replace(read[0][1], layer=layer))
            expect(self.model, "inject", Injection(changed), "tokens", tuple(hidden.shape))
            return changed.to(hidden.dtype)

        with self.model.backbone.layer_callback(injector.layers, before):
            yield

    # -- segments --------------------------------------------------------------------------------

    def _segments(
        self, plans: Sequence[Plan], percept: Percept, state: State | None
    ) -> tuple[list[Segment], State]:
        layout = self.model.config.layout
        injector = self.model.injector
        fills, caches = (0, 0) if injector is None else (injector.fills, injector.caches)
        segments, counts, pictures = lay_out(
            plans,
            self._static_lengths(len(plans), percept),
            layout.request,
            fills,
            caches,
            None if state is None else state.lengths,
        )
        device = self.model.backbone.device
        if state is None:
            empty = torch.zeros(len(plans), 0, dtype=torch.bool, device=device)
            with self.model.driving("new_cache"):
                cache = self.model.backbone.new_cache()
            state = State(
                cache,
                empty,
                [0] * len(plans),
                pictures,
                counts,
                told=[[] for _ in plans],
            )
        else:
            state.counts = [a + b for a, b in zip(state.counts, counts, strict=True)]
            for row, more in enumerate(pictures):
                state.pictures[row] += more
        for before, count, plan in zip(state.lengths, counts, plans, strict=True):
            self._check_length(before + count.total() + plan.rounds * caches, plan.question)
        return segments, state

    def _check_length(self, tokens: int, question: str) -> None:
        limit = self.model.backbone.max_positions
        if tokens >= limit:
            begins = question if len(question) <= _SHOWN else f"{question[:_SHOWN].rstrip()}…"
            raise PromptError(
                f"the prompt of {begins!r} has {tokens} tokens; with the answer, at most {limit} "
                "fit into the context of this LLM. Shorten the question or show fewer pictures."
            )

    @staticmethod
    def _static_lengths(rows: int, percept: Percept) -> list[list[int]]:
        lengths: list[list[int]] = [[] for _ in range(rows)]
        for index, span in enumerate(percept.features.images):
            tokens = percept.tokens
            lengths[span.sample].append(0 if tokens is None else int(tokens[index].shape[0]))
        return lengths

    def _embed(self, segment: Segment, percept: Percept, filled: Mapping[int, Tensor]) -> Tensor:
        """Return the input embeddings (B, L, D_in) of a segment, its slots filled.

        `filled` has what each row's last look brought; rows that sit out segments read it later.
        """
        backbone = self.model.backbone
        with self.model.driving("embed"):
            embeds = backbone.embed(send(segment.ids, backbone.device))
        fillings = self._fillings(segment, percept, filled)
        if not torch.is_grad_enabled():
            return _write(embeds, fillings)
        index = [(f.row, f.start + i) for f in fillings for i in range(len(f.values))]
        if not index:
            return embeds
        where = tensor_on(index, embeds.device)
        values = [f.values if f.added is None else f.values + f.added for f in fillings]
        return embeds.index_put((where[:, 0], where[:, 1]), torch.cat(values).to(embeds.dtype))

    def _fillings(
        self, segment: Segment, percept: Percept, filled: Mapping[int, Tensor]
    ) -> list[_Filling]:
        """Return what stands in the slots of a segment."""
        slots, found = self.model.slots, []
        if segment.statics and percept.tokens is not None:
            by_place = {
                (span.sample, span.place): tokens
                for span, tokens in zip(percept.features.images, percept.tokens, strict=True)
            }
            for place in segment.statics:
                tokens = by_place[place.row, place.image]
                found.append(_Filling(place.row, place.start, tokens, slots.image))
        for place in segment.dynamics:
            found.append(_Filling(place.row, place.start, filled[place.row]))
        start = segment.length - segment.request
        return found + [_Filling(look.row, start, slots.request) for look in segment.looks]

    def _divide(
        self, segment: Segment, percept: Percept, state: State, every: bool = False
    ) -> tuple[list[Part], list[int]]:
        """Cut a segment into parts that rows share; only the first one has any."""
        alone = len(segment.ids) == 1
        injector = self.model.injector
        acts = injector is not None and not injector.needs_message
        if alone or state.length or acts:
            return undivided(segment)
        tokens = percept.tokens or ()
        # A connector gives one tensor for what is the same picture to it.
        pictures = {
            (span.sample, span.place): id(own)
            for span, own in zip(percept.features.images, tokens, strict=False)
        }
        return divide(segment, pictures, every=every)

    def _run(
        self, parts: Sequence[Part], embeds: Tensor, state: State, wanted: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Run parts of a segment one after the other.

        Args:
            parts: each is left with its own rows in the cache and the state.
            embeds: (B, L, D_in) of the whole segment.
            state: is extended in place.
            wanted: further hidden layers to return.

        Returns:
            Hidden states of the last part by layer, -1 the last.
        """
        hidden: dict[int, Tensor] = {}
        full = sum(state.lengths) == state.length * len(state.lengths)
        for part in parts:
            mine = self._enter(part, embeds, state)
            state.mask = torch.cat([state.mask, send(part.mask, mine.device)], dim=1)
            full = full and not part.padded
            positions = (state.mask.long().cumsum(1) - 1).clamp(min=0)[:, -mine.shape[1] :]
            mask = None if full else state.mask
            with self.model.driving("extend"):
                out = self.model.backbone.extend(mine, state.cache, positions, mask, wanted)
            hidden = {**out.hidden, -1: out.last}
        return hidden

    def _enter(self, part: Part, embeds: Tensor, state: State) -> Tensor:
        """Give a part its rows of the cache; returns its embeddings (n, L, D_in)."""
        if part.parents != list(range(len(state.mask))):
            state.select(part.parents, self.model.backbone.shares)
        if part.order is None:
            return embeds
        rows = tensor_on(part.rows, embeds.device)
        return embeds[rows[:, None], send(part.order, embeds.device)]

    def _extend(
        self,
        segment: Segment,
        embeds: Tensor,
        percept: Percept,
        state: State,
        prefixes: PrefixCache | None = None,
    ) -> dict[int, Tensor]:
        """Run the backbone over a segment, or take a first one from what is kept.

        Returns:
            Hidden states by layer, -1 the last, for every row; of a first segment that was divided
            or kept only the last part, which ends where the segment does.
        """
        requester = self.model.requester
        wanted = [] if requester is None or not segment.looks else [requester.layer]
        first = not state.length
        if first and prefixes and not prefixes.not_supported_reasons(segment):
            hidden = prefixes.begin(segment, embeds, state)
            self._count(state, segment.mask.sum(1))
            return hidden
        parts, index = self._divide(segment, percept, state)
        hidden = self._run(parts, embeds, state, wanted)
        if index != list(range(len(state.mask))):
            state.select(index, self.model.backbone.shares)
            spread = tensor_on(index, embeds.device)
            hidden = {layer: states[spread] for layer, states in hidden.items()}
        self._count(state, segment.mask.sum(1))
        return hidden

    @staticmethod
    def _count(state: State, more: Tensor) -> None:
        state.lengths = [n + m for n, m in zip(state.lengths, more.tolist(), strict=True)]


def _write(embeds: Tensor, fillings: Sequence[_Filling]) -> Tensor:
    """Fill slots of embeddings (B, L, D_in) that the backbone has just made, without a copy."""
    if embeds.untyped_storage().nbytes() != embeds.nbytes:
        embeds = embeds.clone()  # they lie, at least in part, in what is not theirs alone
    for row, start, values, added in fillings:
        slots = embeds[row, start : start + len(values)]
        if added is None:
            slots.copy_(values)
        else:
            torch.add(values, added, out=slots)
    return embeds


def _chosen(states: Tensor, where: Tensor) -> Tensor:
    """Return the states (B, T, D) at the places (B, T) that are True, known on the CPU, (n, D)."""
    rows, places = (send(index, states.device) for index in where.nonzero(as_tuple=True))
    return states[rows, places]
