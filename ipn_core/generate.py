"""Decoding: the engine fills the cache up to the last segment, transformers' `generate` goes on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.answer import Answer, Answers
from ipn_core.engine import LookRecord, Prefix, State
from ipn_core.errors import PromptError
from ipn_core.generation import check_options, prompt_processors, repeats_of
from ipn_core.plan import Plan, Tokens

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
    keep_prompt: bool = False,
) -> tuple[Answers, State, int]:
    """Answer planned prompts.

    Args:
        model: the model.
        plans: one a row; with `state`, what comes after it.
        percept: features and static tokens of all pictures of the rows.
        options: transformers' generation options.
        clock: counts the seconds of each stage.
        state: what is in the cache already.
        keep_prompt: decode on a copy, so that the returned state ends before the last segment.

    Returns:
        The answers; the state after them; and with `keep_prompt` how many entries of the plan the
        state does not hold, else 0.
    """
    check_options(options)
    options = {"do_sample": False, **options}
    if options.get("max_length") is None and "generation_config" not in options:
        options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    before = 0 if state is None else state.length
    prefix = model.engine.prefix(
        plans, percept, state=state, clock=clock, return_map=_has_map(model)
    )
    _check_room(model, prefix, options)
    state, repeats = prefix.state, repeats_of(options)
    cache = copy.deepcopy(state.cache) if keep_prompt else state.cache
    output = _generate(model, plans, percept, prefix, cache, options, clock)
    sequences = _trimmed(output.sequences, model.backbone.eos_ids)
    answers = _answers(model, state, sequences, repeats[1], clock)
    if keep_prompt:
        left = sum(len(p.ids) if isinstance(p, Tokens) else 1 for p in plans[0].segments[-1])
        return Answers(answers, output), state, left
    rows = state.mask.shape[0]
    new = prefix.mask.shape[1]
    fed = int(cache.get_seq_length()) - state.length - new
    grown = torch.ones(rows, fed, dtype=torch.bool, device=state.mask.device)
    if repeats[0] == 1:
        state.mask = torch.cat([state.mask, prefix.mask, grown], dim=1)
        state.lengths = [int(n) for n in state.mask.sum(1).tolist()]
    assert before <= state.length
    return Answers(answers, output), state, 0


def _generate(
    model: IPN,
    plans: Sequence[Plan],
    percept: Percept,
    prefix: Prefix,
    cache: Any,
    options: dict[str, Any],
    clock: Clock,
) -> Any:
    """Call transformers' `generate` on the last segment, the rest lying in the cache."""
    from transformers import LogitsProcessorList

    state, lm = prefix.state, model.backbone.lm
    repeats, _ = repeats_of(options)
    if repeats > 1 and state.length:
        cache.batch_repeat_interleave(repeats)
    # `generate` reads only the length of what the cache holds; the embeddings there are not used.
    held = prefix.embeds.new_zeros(len(plans), state.length, prefix.embeds.shape[2])
    mask = torch.cat([state.mask, prefix.mask], dim=1).long()
    texts = [[i for p in plan.pieces if isinstance(p, Tokens) for i in p.ids] for plan in plans]
    processors = LogitsProcessorList(options.pop("logits_processor", None) or [])
    processors.extend(prompt_processors(options, texts))
    pad = model.backbone.tokenizer.pad_token_id
    eos = model.backbone.eos_ids
    options.setdefault("pad_token_id", pad if pad is not None else (eos[0] if eos else 0))
    with model.engine.layers(state, percept, repeats), clock.decoding(lm):
        return lm.generate(
            inputs_embeds=torch.cat([held, prefix.embeds], dim=1),
            attention_mask=mask,
            past_key_values=cache,
            logits_processor=processors,
            return_dict_in_generate=True,
            **({"tokenizer": model.backbone.tokenizer} if options.get("stop_strings") else {}),
            **options,
        )


def _has_map(model: IPN) -> bool:
    return model.interaction is not None and model.interaction.has_map


def _check_room(model: IPN, prefix: Prefix, options: dict[str, Any]) -> None:
    asked = options.get("max_new_tokens") or 1
    longest = max(
        length + int(n)
        for length, n in zip(prefix.state.lengths, prefix.mask.sum(1).tolist(), strict=True)
    )
    limit = model.backbone.max_positions
    if longest + 1 > limit:
        raise PromptError(
            f"the prompt has {longest} tokens; the context of this LLM is {limit}. "
            "Shorten the question or show fewer pictures."
        )
    if longest + asked > limit:
        options["max_new_tokens"] = limit - longest


def _trimmed(sequences: Tensor, eos: Sequence[int]) -> list[tuple[int, ...]]:
    """The emitted ids of each row up to and with the first end token; padding is dropped."""
    rows = []
    for row in sequences.tolist():
        end = next((i + 1 for i, id_ in enumerate(row) if id_ in eos), len(row))
        rows.append(tuple(row[:end]))
    return rows


def _answers(
    model: IPN,
    state: State,
    sequences: Sequence[tuple[int, ...]],
    returned: int,
    clock: Clock,
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
        answers.append(
            Answer(
                text=tokenizer.decode(ids, skip_special_tokens=True).strip(),
                ids=ids,
                attention=None if maps is None else maps[-1],
                attentions=maps,
                grids=grids,
                seconds=seconds,
                tokens=tokens,
            )
        )
    return answers


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
