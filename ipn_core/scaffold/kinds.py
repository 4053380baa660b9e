"""The kinds of plugin that there are templates for, and what is said about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["KINDS", "Kind"]

_TRAIN = "ipn train $distribution/train.yaml --out runs/$name"
_ASK = 'Then ask it: `ipn ask IMAGE "Is there a dog?" --model runs/$name/model`.'


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind; its own templates are in `templates/` under its name.

    Attributes:
        summary: what the component does, after "the interaction 'x': ".
        use: the command that shows it at work; `$name` and `$distribution` stand for theirs.
        after: what the README says next.
        preset: the strategy of the same name, None for a kind that no strategy is made of.
        requires: distributions that it needs besides ipn-core.
        title: what texts call it, where that is not the kind's own name.
    """

    summary: str
    use: str
    after: str
    preset: Mapping[str, Any] | None = None
    requires: tuple[str, ...] = ()
    title: str | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of templates that all kinds like it share."""
        return ("common", "component" if self.preset is None else "strategy")


def _asking(**stages: str) -> dict[str, Any]:
    """A preset with one look, and three tokens for what it brings."""
    return {**stages, "layout": {"dynamic": 3}}


KINDS = {
    "interaction": Kind(
        "attention in which the request asks the patches",
        _TRAIN,
        _ASK,
        _asking(request="hidden-state", interact="$name", inject="tokens"),
    ),
    "perceiver": Kind(
        "a few static tokens, each for one part of the picture",
        _TRAIN,
        _ASK,
        {"perceive": "$name", "layout": {"rounds": 0}},
    ),
    "requester": Kind(
        "a learned projection of the hidden state at `<img-q>`",
        _TRAIN,
        _ASK,
        _asking(request="$name", interact="film", inject="tokens"),
        ("ipn-film",),
    ),
    "injector": Kind(
        "tokens whose share of the message is learned",
        _TRAIN,
        _ASK,
        _asking(request="hidden-state", interact="film", inject="$name"),
        ("ipn-film",),
    ),
    "backbone": Kind(
        "GPT-NeoX, the architecture of Pythia",
        _TRAIN,
        "With `model.backbone.weights=FOLDER` after the config, it takes a folder's weights.\n"
        + _ASK,
    ),
    "attention": Kind(
        "a softmax over a part of the keys at a time",
        "ipn doctor",
        "That lists it beside the others. An interaction that passes its option `backend` to "
        "`ipn_core.attention`\nuses it by name, as in `interact: {name: rvii, backend: $name}`.",
        title="attention backend",
    ),
    "task": Kind(
        "dots on a board, of which number and colour are asked",
        "ipn eval $name --limit 20",
        "In a training: `data: [{task: $name, options: {pictures: 1000}}]`.",
    ),
}
"""By name, in the order in which a question meets them."""
