"""The published method, plainly: one prompt at a time, the whole LLM again after every look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.model import IPN
from ipn_core.plan import DynamicSlot, ImageSlot, Tokens
from ipn_core.prompt import Prompt
from ipn_core.stages import InjectContext, Request, RequestContext


@dataclass
class Whole:
    """A prompt with every slot filled."""

    embeds: Tensor  # (T, D_in)
    labels: Tensor  # (T,), -100 where nothing is to be learned
    ids: list[int]  # the text's
    maps: list[Tensor]  # (K, P) a look


def hidden_states(model: IPN, embeds: Tensor, layer: int) -> Tensor:
    """Hidden states (T, D) of one layer over a whole prompt."""
    output = model.backbone.lm.base_model(
        inputs_embeds=embeds[None], use_cache=False, output_hidden_states=True
    )
    count = len(model.backbone.layers)
    last = layer % (count + 1) == count
    return (output.last_hidden_state if last else output.hidden_states[layer])[0]


def whole(model: IPN, prompt: Prompt) -> Whole:
    """Fill the slots of a prompt from left to right."""
    plan = model.planner.plan(prompt)
    percept = model.perceive([plan.images], [plan.question])
    parts: list[Tensor] = []
    labels: list[int] = []
    found = Whole(torch.empty(0), torch.empty(0), [], [])
    filled: Tensor | None = None
    for piece in plan.pieces:
        learned: list[int] | None = None
        if isinstance(piece, Tokens):
            part = model.backbone.embed(torch.tensor(piece.ids))
            learned = list(piece.ids) if piece.learn else None
            found.ids += piece.ids
        elif isinstance(piece, ImageSlot):
            tokens = percept.tokens
            part = parts[0][:0] if tokens is None else tokens[piece.image] + model.slots.image
        elif isinstance(piece, DynamicSlot):
            assert filled is not None
            part = filled
        else:
            part = model.slots.request
            states = hidden_states(model, torch.cat([*parts, part]), model.requester.layer)
            filled, attention = look(model, states[-len(part) :], percept, piece)
            found.maps.append(attention)
        parts.append(part)
        labels += [-100] * len(part) if learned is None else learned
    found.embeds, found.labels = torch.cat(parts), torch.tensor(labels)
    return found


def look(model: IPN, states: Tensor, percept: Any, piece: Any) -> tuple[Tensor, Any]:
    """Request, interact and inject for one sample."""
    context = RequestContext(states[None], [0], piece.round, model.requester.layer)
    request: Request = model.requester(context)
    request = Request(request.values, request.round, request.layer, return_map=True)
    message = model.interaction(request, percept.features.select([0], [piece.images]))
    injection = model.injector(message, InjectContext(model.slots.dynamic, piece.round))
    return injection.tokens[0], None if message.attention is None else message.attention[0]


def logits(model: IPN, prompt: Prompt) -> Tensor:
    """Logits (T, vocabulary) of a whole prompt, by the language model's own forward."""
    return model.backbone.lm(inputs_embeds=whole(model, prompt).embeds[None], use_cache=False)[
        "logits"
    ][0]


def loss(model: IPN, prompt: Prompt) -> tuple[Tensor, int]:
    """Summed cross entropy of the answer to learn, and the number of its tokens."""
    filled = whole(model, prompt)
    scores = model.backbone.lm(inputs_embeds=filled.embeds[None], use_cache=False)["logits"][0]
    targets = filled.labels[1:]
    total = F.cross_entropy(scores[:-1].float(), targets, reduction="sum", ignore_index=-100)
    return total, int((targets != -100).sum())


@torch.no_grad()
def greedy(model: IPN, prompt: Prompt, tokens: int) -> tuple[int, ...]:
    """The most likely ids after a whole prompt, which is run again for each of them."""
    embeds, made = whole(model, prompt).embeds, []
    while len(made) < tokens and not (made and made[-1] in model.backbone.eos_ids):
        scores = model.backbone.lm(inputs_embeds=embeds[None], use_cache=False)["logits"]
        made.append(int(scores[0, -1].argmax()))
        embeds = torch.cat([embeds, model.backbone.embed(torch.tensor(made[-1:]))])
    return tuple(made)


@torch.no_grad()
def generate(model: IPN, prompt: Prompt, **options: Any) -> list[tuple[int, ...]]:
    """Ids that transformers generates after a whole prompt, which it runs from its start.

    Padding after the end token is dropped.
    """
    embeds = whole(model, prompt).embeds[None]
    options = {"do_sample": False, **options}
    found = model.backbone.lm.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        pad_token_id=model.backbone.tokenizer.pad_token_id,
        **options,
    )
    return [trimmed(row, model.backbone.eos_ids) for row in found.tolist()]


def trimmed(row: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    """A row up to and with its first end token."""
    stop = next((i + 1 for i, id_ in enumerate(row) if id_ in ends), len(row))
    return tuple(row[:stop])
