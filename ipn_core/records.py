"""What passes between the stages, and the sizes that a model is built with.

Letters: B batch, P patches, R request tokens, K dynamic tokens, M message tokens, S static tokens,
D LLM width, Dv vision width, Dm message width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ipn_core.features import VisualFeatures

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Dims",
    "EncodedImage",
    "InjectContext",
    "Injection",
    "Label",
    "LayerContext",
    "PerceiveContext",
    "Percept",
    "Request",
    "RequestContext",
    "VisualMessage",
]


@dataclass(frozen=True, slots=True)
class Label:
    """What a feature is evidence of.

    Attributes:
        name: of the thing.
        also: what else it is called: other names, and the kinds of thing that it is one of.
    """

    name: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Dims:
    """The sizes that are fixed for a model; the number of patches P never is.

    Attributes:
        Dv: width of a patch's features.
        D_in: width of the LLM's input embeddings.
        D_hidden: width of the hidden states by layer, as transformers counts them: index 0 is
            the input of the first layer, the last one is after the final norm.
        D_out: width of the hidden states that the language head reads.
        S: static tokens a picture, 0 for none.
        R: request tokens a round.
        K: dynamic tokens a round, 0 without rounds.
        D_request: width of the request; set once the requester is built, 0 without rounds.
        M: tokens of a message, and
        Dm: their width; set once the interaction is built, 0 without rounds.
        H_kv: key-value heads of each layer of the LLM, 0 where its backbone takes no keys and
            values from outside.
        D_head: width of each of them.
        looks: whether the features can look again at parts of the picture (`VisualFeatures.look`).
        labels: Dv of them where each feature is the evidence of one thing, else none.
    """

    Dv: int
    D_in: int
    D_hidden: tuple[int, ...]
    D_out: int
    S: int = 0
    R: int = 1
    K: int = 0
    D_request: int = 0
    M: int = 0
    Dm: int = 0
    H_kv: int = 0
    D_head: int = 0
    looks: bool = True
    labels: tuple[Label, ...] = ()

    @property
    def layers(self) -> int:
        """Number of the LLM's layers."""
        return len(self.D_hidden) - 1


@dataclass(frozen=True, eq=False)
class PerceiveContext:
    """What there is to perceive.

    Attributes:
        images: the pictures of each sample, decoded to RGB.
        questions: the question text of each sample, for perceivers that read it themselves.
        features: the encoder's output if it is known already (from a cache), else None.
    """

    images: Sequence[Sequence[Image.Image]]
    questions: Sequence[str]
    features: VisualFeatures | None = None


@dataclass(frozen=True, eq=False)
class Percept:
    """What a perceiver gives.

    Attributes:
        features: for the interaction.
        tokens: the static tokens of each picture, (S, D_in) each, or None for none.
        boxes: for each picture, (left, top, right, bottom) of the part of it that its patches
            show. The model fills this in, where it opened the pictures and patches are places.
    """

    features: VisualFeatures
    tokens: Sequence[Tensor] | None = None
    boxes: tuple[tuple[float, float, float, float], ...] = ()


@dataclass(frozen=True, eq=False)
class RequestContext:
    """What the requester may read.

    Attributes:
        hidden: (B, R, D) hidden states at `<img-q>` from the requester's layer; B counts only
            the samples that look in this round.
        samples: the batch row of each.
        round: 0 for the first look.
        layer: the layer that `hidden` was read from.
    """

    hidden: Tensor
    samples: Sequence[int]
    round: int = 0
    layer: int = -1


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked of the pictures.

    Attributes:
        values: (B, R, D), in a layer injection (B, T, D).
        round: 0 for the first look.
        layer: the layer that it comes from, -1 after the final norm.
        return_map: whether the interaction should also return where it looked.
    """

    values: Tensor
    round: int = 0
    layer: int = -1
    return_map: bool = False


@dataclass(frozen=True, eq=False)
class VisualMessage:
    """What an interaction brings back.

    Attributes:
        values: (B, M, Dm), with M = K unless the interaction has a length of its own.
        attention: (B, M, P) where it looked, heads averaged, over the patches in the order of
            `VisualFeatures.padded()`; rows sum to 1; None where there is no such map.
    """

    values: Tensor
    attention: Tensor | None = None


@dataclass(frozen=True, eq=False)
class InjectContext:
    """What an injector may read.

    Attributes:
        slots: (K, D_in) the learned embeddings of the `<img-d>` slots.
        round: 0 for the first look.
        words: (vocabulary, D_in) the LLM's input embeddings, which do not learn.
    """

    slots: Tensor
    round: int = 0
    words: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Injection:
    """What goes into the LLM after a look: inputs, keys and values, or nothing at once.

    Attributes:
        tokens: (B, K, D_in) inputs for the K `<img-d>` slots, K being `Injector.fills`.
        keys: (B, layers, C, H_kv, D_head) for each layer's cache, as its own key projection would
            give them, without any code of their position; C is `Injector.caches`.
        values: the same shape.
    """

    tokens: Tensor | None = None
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What a layer injector may read before a layer of the LLM.

    Attributes:
        layer: index of the layer about to run.
        positions: (B, T) each token's position in its prompt.
        pictures: (B, T) how many of its sample's pictures stand before each token.
        features: the pictures, one sample a row of the batch.
        looks: (B, T) how many of its sample's looks came before each token.
        messages: (B, looks, M, Dm) what they brought, in their order; zeros where a sample has
            looked less often than others.
    """

    layer: int
    positions: Tensor
    pictures: Tensor
    features: VisualFeatures
    looks: Tensor
    messages: Tensor


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One picture through a vision encoder.

    Attributes:
        values: (h·w, Dv) patch features, row by row.
        grid: (h, w).
        global_token: (Dv,) a summary of the picture, or None.
    """

    values: Tensor
    grid: tuple[int, int]
    global_token: Tensor | None = None
