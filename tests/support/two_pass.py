"""The published method, plainly: one prompt at a time, the whole LLM again after every look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ipn_core.model import IPN
from ipn_core.plan import DynamicSlot, ImageSlot, Tokens
from ipn_core.prompt import Prompt
from ipn_core.stages import InjectContext, LayerContext, LayerInjector, Request, RequestContext


@dataclass
class Whole:
    """A prompt with every slot filled."""

    percept: Any
    embeds: Tensor  # (T, D_in); what a look puts straight into the cache holds zeros here
    labels: list[int] = field(default_factory=list)  # T, -100 where nothing is to be learned
    ids: list[int] = field(default_factory=list)  # the text's
    maps: list[Any] = field(default_factory=list)  # (K, P) a look
    pictures: list[int] = field(default_factory=list)  # where each stands
    looks: list[tuple[int, Tensor]] = field(default_factory=list)  # the place after it, message
    cached: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)  # place, keys, values

    def add(self, part: Tensor, learned: list[int] | None = None) -> None:
        self.embeds = torch.cat([self.embeds, part])
        self.labels += [-100] * len(part) if learned is None else learned


def hidden_states(model: IPN, found: Whole, layer: int) -> Tensor:
    """Hidden states (T, D) of one layer over what a prompt has so far."""
    with injected(model, found):
        output = model.backbone.lm.base_model(
            inputs_embeds=found.embeds[None], use_cache=False, output_hidden_states=True
        )
    count = len(model.backbone.layers)
    last = layer % (count + 1) == count
    return (output.last_hidden_state if last else output.hidden_states[layer])[0]


def whole(model: IPN, prompt: Prompt, more: tuple[Any, ...] = ()) -> Whole:
    """Fill the slots of a prompt, and of pieces after it, from left to right."""
    plan = model.planner.plan(prompt)
    percept = model.perceive([plan.images], [plan.question])
    found = Whole(percept, torch.zeros(0, model.backbone.D_in))
    injection: Any = None
    for piece in (*plan.pieces, *more):
        at = len(found.embeds)
        if isinstance(piece, Tokens):
            embeds = model.backbone.embed(torch.tensor(piece.ids))
            found.add(embeds, list(piece.ids) if piece.learn else None)
            found.ids += piece.ids
        elif isinstance(piece, ImageSlot):
            found.pictures.append(at)
            if percept.tokens is not None:
                found.add(percept.tokens[piece.image] + model.slots.image)
        elif isinstance(piece, DynamicSlot):
            if injection.keys is not None:
                keys, values = injection.keys[0], injection.values[0]
                found.add(torch.zeros(keys.shape[1], model.backbone.D_in))
                found.cached.append((at, keys, values))
            if injection.tokens is not None:
                found.add(injection.tokens[0])
        else:
            found.add(model.slots.request)
            states = hidden_states(model, found, model.requester.layer)
            message, injection = look(model, states[-len(model.slots.request) :], percept, piece)
            found.maps.append(None if message.attention is None else message.attention[0])
            found.looks.append((len(found.embeds), message.values[0]))
    return found


def look(model: IPN, states: Tensor, percept: Any, piece: Any) -> tuple[Any, Any]:
    """Request, interact and inject for one sample; returns the message and what is injected."""
    context = RequestContext(states[None], [0], piece.round, model.requester.layer)
    request: Request = model.requester(context)
    request = Request(request.values, request.round, request.layer, return_map=True)
    message = model.interaction(request, percept.features.select([0], [piece.images]))
    return message, model.injector(message, InjectContext(model.slots.dynamic, piece.round))


@contextmanager
def injected(model: IPN, found: Whole) -> Iterator[None]:
    """Injection into forwards that start with a whole prompt, and into those that go on from it.

    Keys and values take the place of what the layers' own projections give there, which the LLM
    then rotates as it does all others.
    """
    with ExitStack() as stack:
        for index, layer in enumerate(model.backbone.layers if found.cached else ()):
            for name, at in (("k_proj", 1), ("v_proj", 2)):
                places = [(entry[0], entry[at][index].flatten(-2)) for entry in found.cached]
                projection = getattr(layer.self_attn, name)
                handle = projection.register_forward_hook(_in_place_of(places))
                stack.callback(handle.remove)
        if isinstance(model.injector, LayerInjector):
            before = _between(model, found)
            stack.enter_context(model.backbone.layer_callback(model.injector.layers, before))
        yield


def _in_place_of(places: list[tuple[int, Tensor]]) -> Any:
    def replaced(module: Any, args: Any, output: Tensor) -> Tensor:
        if output.shape[1] == 1:  # a token that goes on from the prompt
            return output
        for at, new in places:
            rest = output[:, at + len(new) :]
            output = torch.cat([output[:, :at], new.expand(len(output), -1, -1), rest], dim=1)
        return output

    return replaced


def _between(model: IPN, found: Whole) -> Any:
    def before(layer: int, hidden: Tensor, positions: Tensor) -> Tensor:
        rows, size = len(hidden), (0, 0)
        if model.interaction is not None:
            size = (model.interaction.length, model.interaction.width)
        positions = positions.expand(rows, -1)
        told = [message for _, message in found.looks]
        messages = torch.stack(told) if told else torch.zeros(0, *size)
        context = LayerContext(
            layer,
            positions,
            pictures=sum((positions >= at).long() for at in [1 << 30, *found.pictures]),
            features=found.percept.features.select([0] * rows),
            looks=sum((positions >= at).long() for at in [1 << 30, *(at for at, _ in found.looks)]),
            messages=messages.expand(rows, *messages.shape),
        )
        return model.injector.before_layer(hidden, context)

    return before


def forward(model: IPN, found: Whole, more: Tensor | None = None) -> Tensor:
    """Logits (T, vocabulary) of a whole prompt and more embeddings, by the LLM's own forward."""
    embeds = found.embeds if more is None else torch.cat([found.embeds, more])
    with injected(model, found):
        return model.backbone.lm(inputs_embeds=embeds[None], use_cache=False)["logits"][0]


def logits(model: IPN, prompt: Prompt) -> Tensor:
    """Logits (T, vocabulary) of a whole prompt."""
    return forward(model, whole(model, prompt))


def loss(model: IPN, prompt: Prompt) -> tuple[Tensor, int]:
    """Summed cross entropy of the answer to learn, and the number of its tokens."""
    filled = whole(model, prompt)
    targets = torch.tensor(filled.labels[1:])
    scores = forward(model, filled)[:-1].float()
    total = F.cross_entropy(scores, targets, reduction="sum", ignore_index=-100)
    return total, int((targets != -100).sum())


@torch.no_grad()
def greedy(model: IPN, prompt: Prompt, tokens: int) -> tuple[int, ...]:
    """The most likely ids after a whole prompt, which is run again for each of them."""
    filled, made = whole(model, prompt), []
    while len(made) < tokens and not (made and made[-1] in model.backbone.eos_ids):
        more = model.backbone.embed(torch.tensor(made, dtype=torch.long))
        made.append(int(forward(model, filled, more)[-1].argmax()))
    return tuple(made)


@torch.no_grad()
def generate(model: IPN, prompt: Prompt, **options: Any) -> list[tuple[int, ...]]:
    """Ids that transformers generates after a whole prompt, which it runs from its start.

    Padding after the end token is dropped.
    """
    filled = whole(model, prompt)
    embeds = filled.embeds[None]
    options = {"do_sample": False, **options}
    with injected(model, filled):
        found = model.backbone.lm.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            pad_token_id=model.backbone.tokenizer.pad_token_id,
            **options,
        )
    return [trimmed(row, model.backbone.eos_ids) for row in found.tolist()]


@torch.no_grad()
def looking(
    model: IPN, prompt: Prompt, tokens: int, choose: Any = lambda scores, text: scores.argmax()
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of an answer that looks again, and how many of them come before each of its looks.

    Prompt and answer are run again for each token and each look. `choose` maps the scores and the
    ids of the text so far to the next id; like generate, it also chooses where a look comes.
    """
    ids: list[int] = []
    looked: list[int] = []
    while len(ids) < tokens and not (ids and ids[-1] in model.backbone.eos_ids):
        turn = prompt.then_assistant(ids, looked=looked).turns[-1]
        filled = whole(model, prompt, model.planner.said(turn, len(prompt.images)))
        last = hidden_states(model, filled, -1)[-1]
        chosen = int(choose(model.backbone.logits(last), filled.ids))
        wants = model.look_head(last).sigmoid() > model.config.layout.look_threshold
        if wants and len(looked) < model.config.layout.look_again and prompt.images:
            looked.append(len(ids))
        else:
            ids.append(chosen)
    return tuple(ids), tuple(looked)


def trimmed(row: list[int], ends: tuple[int, ...]) -> tuple[int, ...]:
    """A row up to and with its first end token."""
    stop = next((i + 1 for i, id_ in enumerate(row) if id_ in ends), len(row))
    return tuple(row[:stop])
