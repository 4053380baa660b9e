"""Decoding: the engine fills the cache up to the last segment, transformers' `generate` goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ipn_core.answer import Answer, Answers, Asked
from ipn_core.errors import GenerationOptionError
from ipn_core.finite import FiniteLogits, origin
from ipn_core.generation import check_options, prompt_processors, repeats_of, with_config
from ipn_core.look_again import HeldStreamer, Watch, refuse_options
from ipn_core.plan import Plan
from ipn_core.state import LookRecord, Prefix, State

if TYPE_CHECKING:
    from ipn_core.clock import Clock
    from ipn_core.model import IPN
    from ipn_core.stages import Percept

__all__ = ["decode"]

MAX_NEW_TOKENS = 64
"""Length limit of an answer where the caller sets none."""


def decode(
    model: IPN,
    plans: Sequence[Plan],
    percept: Percept,
    options: dict[str, Any],
    clock: Clock,
    *,
    state: State | None = None,
) -> tuple[Answers, State, bool]:
    """Answer planned prompts.

    Args:
        model: the model.
        plans: one a row; with `state`, what comes after it.
        percept: features and static tokens of all pictures of the rows.
        options: transformers' generation options.
        clock: counts the seconds of each stage.
        state: what is in the cache already.

    Returns:
        The answers; the state after them; and whether it holds the answers' tokens (all but the
        last, which no forward has seen). With several sequences a prompt it ends with the prompt.
    """
    options = with_config(options)
    check_options(options)
    layout = model.config.layout
    if layout.look_again:
        refuse_options(options)
    options = {"do_sample": False, **options}
    prefix = model.engine.prefix(
        plans, percept, state=state, clock=clock, return_map=_has_map(model)
    )
    limit = _limit(model, prefix, options)
    ends = options.get("eos_token_id")
    ends = model.backbone.eos_ids if ends is None else [ends] if isinstance(ends, int) else ends
    pad = model.backbone.tokenizer.pad_token_id
    options.setdefault("pad_token_id", pad if pad is not None else next(iter(ends), 0))
    repeats, returned = repeats_of(options)
    if model.look_head is not None:
        watch = Watch(model.look_head, layout, plans, ends, limit, prefix.mask.device)
        output = _with_looks(model, plans, percept, prefix, options, clock, watch)
        sequences, looked = watch.answers(output.sequences)
    else:
        options["max_new_tokens"] = limit
        output = _generate(model, plans, percept, prefix, options, clock)
        stops = options.get("stop_strings") or options.get("stopping_criteria")
        sequences = _trimmed(output.sequences, ends, options["pad_token_id"] if stops else None)
        looked = [()] * len(sequences)
    asked = [_asked(plan, percept, row) for row, plan in enumerate(plans)]
    answers = _answers(model, prefix.state, sequences, looked, returned, clock, asked)
    return Answers(answers, output), prefix.state, repeats == 1


def _generate(
    model: IPN,
    plans: Sequence[Plan],
    percept: Percept,
    prefix: Prefix,
    options: Mapping[str, Any],
    clock: Clock,
    looked: Sequence[Sequence[int]] = (),
    **more: Any,
) -> Any:
    """Call transformers' `generate` on the last segment, the rest lying in the cache.

    The prefix's state is left with all that was processed; with several sequences a prompt, with
    the prompts alone. `plans` are of the whole prompts, `looked` says for each row which of the ids
    so far are looks, and `more` holds arguments that the model's caller cannot set.
    """
    from transformers import LogitsProcessorList

    from ipn_core.shared_cache import reading

    options = dict(options)
    state, lm, rows = prefix.state, model.backbone.lm, len(prefix.mask)
    repeats, _ = repeats_of(options)
    if repeats > 1 and state.length:
        state.cache.batch_repeat_interleave(repeats)
    # `generate` reads only the length of what the cache holds; the embeddings there are not used.
    held = prefix.embeds.new_zeros(1).expand(rows, state.length, prefix.embeds.shape[2])
    mask = torch.cat([state.mask, prefix.mask], dim=1)
    finite = FiniteLogits(
        lambda: origin(model, percept, state, mask.repeat_interleave(repeats, dim=0))
    )
    texts = [plan.text_ids for plan in plans]
    processors = LogitsProcessorList([finite, *(options.pop("logits_processor", None) or [])])
    processors.extend(prompt_processors(options, lm.generation_config, texts, looked))
    layers, faults = model.engine.layers(state, percept, repeats), model.driving("forward", lm)
    with layers, clock.decoding(lm), faults, reading(lm, state.cache):
        output = lm.generate(
            inputs_embeds=torch.cat([held, prefix.embeds], dim=1),
            attention_mask=mask.long(),
            past_key_values=state.cache,
            logits_processor=processors,
            return_dict_in_generate=True,
            **({"tokenizer": model.backbone.tokenizer} if options.get("stop_strings") else {}),
            **options,
            **more,
        )
    fed = int(state.cache.get_seq_length()) - mask.shape[1]
    if repeats > 1:
        # All sequences of a prompt hold the same prompt; what they go on with differs.
        index = torch.arange(0, rows * repeats, repeats, device=mask.device)
        state.cache.batch_select_indices(index)
        state.cache.crop(-fed)
    else:
        mask = torch.cat([mask, mask.new_ones(rows, fed)], dim=1)
    kept = fed if repeats == 1 else 0
    state.lengths = [n + m + kept for n, m in zip(state.lengths, prefix.lengths, strict=True)]
    state.mask = mask
    return output


def _with_looks(
    model: IPN,
    plans: Sequence[Plan],
    percept: Percept,
    prefix: Prefix,
    options: dict[str, Any],
    clock: Clock,
    watch: Watch,
) -> Any:
    """Decode until a row looks again, look, and go on from the same cache; returns the last output.

    `watch` stops `generate` where a row looks, and evaluates the caller's stopping criteria.
    """
    from transformers import StoppingCriteriaList, StopStringCriteria

    stops = StoppingCriteriaList(options.pop("stopping_criteria", None) or [])
    if strings := options.pop("stop_strings", None):
        stops.append(StopStringCriteria(model.backbone.tokenizer, strings))
    streamer = options.pop("streamer", None)
    held = None if streamer is None else HeldStreamer(streamer)
    ids: Tensor | None = None
    while True:
        with watch.reading(model.backbone.lm.get_output_embeddings(), stops):
            output = _generate(
                model,
                plans,
                percept,
                prefix,
                {**options, "max_new_tokens": watch.room(ids)},
                clock,
                watch.looked,
                input_ids=ids,
                stopping_criteria=StoppingCriteriaList([watch]),
                streamer=held,
            )
        looks = bool(watch.looking)
        if held is not None:
            held.settle(looks)
        if not looks:
            return output
        ids = output.sequences
        ids[watch.looking, -1] = options["pad_token_id"]
        further = watch.next(ids)
        state = prefix.state
        prefix = model.engine.prefix(
            further, percept, state=state, clock=clock, return_map=_has_map(model)
        )
        for count, plan in zip(state.counts, further, strict=True):
            count.text -= len(plan.text_ids)  # the answer's, which counts these itself


def _has_map(model: IPN) -> bool:
    return model.interaction is not None and model.interaction.has_map


def _limit(model: IPN, prefix: Prefix, options: dict[str, Any]) -> int:
    """Return the tokens of an answer at most, and take the options that say so out.

    Every answer ends where the context does, which each prompt leaves room in.

    Raises:
        GenerationOptionError: `max_length` leaves no room for an answer.
    """
    asked, longest = options.pop("max_new_tokens", None), options.pop("max_length", None)
    if asked is None and longest is not None:
        # It counts the prompt, and its padding too.
        held = prefix.state.length + prefix.mask.shape[1]
        asked = longest - held
        if asked < 1:
            raise GenerationOptionError(
                f"generation option 'max_length' counts the prompt, which has {held} tokens, so "
                f"it must be at least {held + 1}, got {longest}. Give "
                "'max_new_tokens' instead, which counts the answer alone."
            )
    if asked is None:
        asked = MAX_NEW_TOKENS
    layout, injector = model.config.layout, model.injector
    look = layout.request + (injector.fills + injector.caches if injector else 0)
    taken = max(n + m for n, m in zip(prefix.state.lengths, prefix.lengths, strict=True))
    return min(int(asked), model.backbone.max_positions - taken - layout.look_again * look)


def _trimmed(sequences: Tensor, ends: Sequence[int], pad: int | None) -> list[tuple[int, ...]]:
    """The emitted ids of each row up to and with the first end token, without padding.

    Args:
        sequences: (rows, generated) ids.
        ends: ids that end an answer.
        pad: what follows where another rule may have ended a row before the others, else None.
    """
    rows = []
    for row in sequences.tolist():
        stop = next((i + 1 for i, id_ in enumerate(row) if id_ in ends), len(row))
        if pad is not None and len(sequences) > 1 and stop == len(row):
            while stop > 1 and row[stop - 1] == pad:
                stop -= 1
        rows.append(tuple(row[:stop]))
    return rows


def _answers(
    model: IPN,
    state: State,
    sequences: Sequence[tuple[int, ...]],
    looked: Sequence[tuple[int, ...]],
    returned: int,
    clock: Clock,
    asked: Sequence[Asked],
) -> list[Answer]:
    tokenizer = model.backbone.tokenizer
    seconds = clock.report()
    answers = []
    for index, ids in enumerate(sequences):
        row = index // returned
        counts = state.counts[row]
        maps, grids = _maps(state.looks, row)
        tokens = {
            "text": counts.text,
            "static": counts.static,
            "request": counts.request,
            "dynamic": counts.dynamic,
            "generated": max(len(ids) - 1, 0),
        }
        text = cast("str", tokenizer.decode(list(ids), skip_special_tokens=True))
        answers.append(
            Answer(
                text=text.strip(),
                ids=ids,
                attention=None if maps is None else maps[-1],
                attentions=maps,
                grids=grids,
                seconds=seconds,
                tokens=tokens,
                looked=looked[index],
                asked=asked[row],
            )
        )
    return answers


def _asked(plan: Plan, percept: Percept, row: int) -> Asked:
    """What a prompt asked, with the parts of its pictures that were seen."""
    spans, boxes = percept.features.images, percept.boxes
    if len(spans) != len(boxes):
        boxes = ()  # a wrapper of perceive has changed which pictures there are
    seen = tuple(box for span, box in zip(spans, boxes, strict=False) if span.sample == row)
    return Asked(plan.question, plan.images, seen)


def _maps(
    looks: Sequence[LookRecord], row: int
) -> tuple[Tensor | None, tuple[tuple[int, int], ...]]:
    """Where a row looked, (rounds, K, P), and the grids of the pictures that it saw last."""
    maps: list[Tensor] = []
    grids: tuple[tuple[int, int], ...] = ()
    for record in looks:
        for index, look in enumerate(record.looks):
            if look.row != row:
                continue
            grids = record.features.grids(index)
            if record.message.attention is None:
                return None, grids
            patches = record.features.lengths[index]
            maps.append(record.message.attention[index, :, :patches].detach().float().cpu())
    if not maps:
        return None, grids
    width = max(m.shape[1] for m in maps)
    padded = [torch.nn.functional.pad(m, (0, width - m.shape[1])) for m in maps]
    return torch.stack(padded), grids
