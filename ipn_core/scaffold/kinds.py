"""The kinds of plugin that there are templates for, and what is said about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Kind"]

_TRAIN = "ipn train $distribution/train.yaml --out runs/$name"
_ASK = 'Then ask it: `ipn ask IMAGE "Is there a dog?" --model runs/$name/model`.'
_GUESSES = (
    _ASK
    + "\nAfter so short a training it answers in words, and rightly no more often than who guesses."
)
_FILM = "\nOf what is in a place it says nothing: `film`, which looks for it, does not find that."
_TRAINED = ("ipn-llama", "ipn-starter")


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind; its own templates are in `templates/` under its name.

    Attributes:
        summary: what the component does, after "the interaction 'x': ".
        use: the command that shows it at work; `$name` and `$distribution` stand for theirs.
        after: what the README says next.
        preset: the strategy of the same name, None for a kind that no strategy is made of.
        requires: distributions that it needs besides ipn-core.
        tries: those that only the command of `use` needs besides.
        training: words for what differs in the trainings that kinds share.
        title: what texts call it, where that is not the kind's own name.
    """

    summary: str
    use: str
    after: str
    preset: Mapping[str, Any] | None = None
    requires: tuple[str, ...] = ()
    tries: tuple[str, ...] = _TRAINED
    training: Mapping[str, str] | None = None
    title: str | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of templates that all kinds like it share."""
        asking = () if self.training is None else ("asking",)
        return ("common", "component" if self.preset is None else "strategy", *asking)


def _asking(**stages: str) -> dict[str, Any]:
    """A preset with one look, and three tokens for what it brings."""
    return {**stages, "layout": {"dynamic": 3}}


def _learning(**differing: str) -> dict[str, str]:
    """What a training says of its stages; by default those of an interaction of one's own."""
    return {
        "request": "{name: hidden-state, layer: 26}",
        "inject": "  # A message is handed on as the words that it is nearest to.\n"
        "  inject: {name: tokens, start: words, lookup: 30}",
        "aligned": "interact",
        "verbalised": "40",
        "rates": "    rates: {inject: 0.3}",
        **differing,
    }


KINDS = {
    "interaction": Kind(
        "attention in which the request asks the patches",
        _TRAIN,
        _GUESSES,
        _asking(request="hidden-state", interact="$name", inject="tokens"),
        training=_learning(),
    ),
    "perceiver": Kind(
        "a few static tokens, each for one part of the picture",
        _TRAIN,
        _GUESSES,
        {"perceive": "$name", "layout": {"rounds": 0}},
    ),
    "requester": Kind(
        "a learned projection of the hidden state at `<img-q>`",
        _TRAIN,
        _GUESSES + _FILM,
        _asking(request="$name", interact="film", inject="tokens"),
        ("ipn-film",),
        training=_learning(request="{name: $name, layer: 26}", aligned="request, interact"),
    ),
    "injector": Kind(
        "tokens whose share of the message is learned",
        _TRAIN,
        _GUESSES + _FILM,
        _asking(request="hidden-state", interact="film", inject="$name"),
        ("ipn-film",),
        training=_learning(
            inject="  inject: {name: $name}", verbalised="300", rates="    warmup: 10"
        ),
    ),
    "backbone": Kind(
        "GPT-NeoX, the architecture of Pythia",
        _TRAIN,
        "With `model.backbone.weights=FOLDER` after the config, it takes a folder's weights.\n"
        + _ASK
        + "\nThe training is long enough to see it run, and no longer.",
        tries=("ipn-film", "ipn-starter"),
    ),
    "attention": Kind(
        "a softmax over a part of the keys at a time",
        "ipn doctor",
        "That lists it beside the others. An interaction that passes its option `backend` to "
        "`ipn_core.attention`\nuses it by name, as in `interact: {name: rvii, backend: $name}`.",
        tries=(),
        title="attention backend",
    ),
    "task": Kind(
        "dots on a board, of which number and colour are asked",
        "ipn eval $name --limit 20",
        "In a training: `data: [{task: $name, options: {pictures: 1000}}]`.",
    ),
}
"""By name, in the order in which a question meets them."""
