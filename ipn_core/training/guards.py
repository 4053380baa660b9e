"""What would let a training run on without learning, found at the first step that it concerns."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ipn_core.errors import ConfigError, DataError, TrainingError
from ipn_core.finite import spoiled, tensors
from ipn_core.plan import Tokens
from ipn_core.prompt import Prompt, Text

if TYPE_CHECKING:
    from ipn_core.model import IPN
    from ipn_core.training.data import Batch

__all__ = ["Pinned", "check_batch", "check_finite", "check_template", "first_not_finite"]

_MARKER = re.compile(r"<\|[^|<>\s]{1,40}\|>")
_PLACEHOLDER = "<image>"
_PINNED_STEPS = 10
"""A loss that is exactly 0 that often in a row is not learned from."""


def check_template(model: IPN) -> None:
    """Check that the chat template and the tokenizer of a model go together.

    Raises:
        ConfigError: the tokenizer does not know the template's markers, gives ids that the LLM has
            no embedding for, or generation would not stop at what ends an answer to learn.
    """
    tokenizer, template = model.backbone.tokenizer, model.planner.template
    unknown = tokenizer.unk_token_id
    faults = []
    # A tokenizer's own template may spell its markers as plain text, as some published ones do.
    if template != tokenizer.chat_template:
        known = tokenizer.get_vocab()
        split = sorted({m for m in _MARKER.findall(template) if m not in known})
        if split:
            faults.append(f"the tokenizer has no token {' or '.join(split)}")
    plan = model.planner.plan(Prompt.user("one").then_assistant("two", learn=True))
    runs = [piece for piece in plan.pieces if isinstance(piece, Tokens)]
    ids = [id_ for run in runs for id_ in run.ids]
    embeddings = int(model.backbone.lm.get_input_embeddings().weight.shape[0])
    if max(ids) >= embeddings:
        faults.append(
            f"the tokenizer gives the id {max(ids)} ({tokenizer.decode([max(ids)])!r}), and the "
            f"LLM has embeddings for {embeddings}"
        )
    if unknown is not None and unknown in ids:
        faults.append(f"a short prompt holds {tokenizer.unk_token!r}, the token of unknown text")
    last, ends = [run for run in runs if run.learn][-1].ids[-1], model.backbone.eos_ids
    if last not in ends:
        stops = ", ".join(repr(tokenizer.decode([end])) for end in ends) or "nothing"
        faults.append(
            f"an answer to learn ends with {tokenizer.decode([last])!r}, and generation stops at "
            f"{stops}"
        )
    if faults:
        raise ConfigError(
            f"the chat template does not match the tokenizer: {'; '.join(faults)}. Use the "
            "tokenizer that belongs to the weights, or set model.prompt.template."
        )


def check_batch(model: IPN, batch: Batch) -> None:
    """Check that every place for a picture has one.

    Raises:
        DataError: there are more or fewer pictures than places, or a text holds a placeholder.
    """
    shown: list[set[int]] = [set() for _ in batch.examples]
    for span in batch.features.images:
        shown[span.sample].add(span.place)
    for prompt, places in zip(batch.prompts(model), shown, strict=True):
        if len(prompt.images) != len(places):
            raise DataError(
                f"the question {prompt.question!r} has places for {len(prompt.images)} pictures, "
                f"and there are features of {len(places)}."
            )
        texts = [p.text for t in prompt.turns for p in t.content if isinstance(p, Text)]
        if any(_PLACEHOLDER in text for text in texts):
            raise DataError(
                f"the question {prompt.question!r} holds '{_PLACEHOLDER}', which no picture "
                "replaces: the LLM would read it as text. Take it out, and name the picture as "
                "'image'."
            )


def check_finite(batch: Batch) -> None:
    """Check the features that new weights are fitted to.

    Raises:
        TrainingError: some are not finite; the text names the picture.
    """
    if bad := _bad_features(batch):
        raise TrainingError(f"before the first step: {bad} are not finite.")


class Pinned:
    """Notices losses that stay at exactly 0."""

    def __init__(self) -> None:
        self._steps: dict[str, int] = {}

    def check(self, losses: Mapping[str, float]) -> None:
        """Count one more step.

        Raises:
            TrainingError: a loss has been 0 for too long; the text names it.
        """
        for name, loss in losses.items():
            self._steps[name] = 0 if loss else self._steps.get(name, 0) + 1
            if self._steps[name] == _PINNED_STEPS:
                raise TrainingError(
                    f"the loss '{name}' has been exactly 0 for {_PINNED_STEPS} steps, so that "
                    "nothing is learned from it. Check the examples and their answers, or take the "
                    "objective out of the stage."
                )


@torch.no_grad()
def first_not_finite(model: IPN, batch: Batch, run: Callable[[], Any]) -> str | None:
    """Name the first tensor of a forward pass that is not finite, None where all are.

    Args:
        model: whose modules are watched.
        batch: what goes in.
        run: does the forward pass again, in every case: other processes may take part in it.
    """
    bad = _bad_features(batch)
    found = [bad] if bad else []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(map(spoiled, tensors(output))):
                found.append(f"the output of {name}")

        return after

    # Inner modules come out first, so that the first one found is the innermost.
    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _bad_features(batch: Batch) -> str | None:
    for span in batch.features.images:
        if spoiled(batch.features.values[span.offset : span.offset + span.length]):
            example = batch.examples[span.sample]
            return f"the features of picture {span.place + 1} of the question {example.question!r}"
    return None
