"""The four stages, and what passes between them.

Authors subclass one of `VisionEncoder`, `Connector`, `Requester`, `Interaction`, `Injector` (or
`LayerInjector`) and write `forward`; the base classes register it under the hook of its stage.

Letters: B batch, P patches, R request tokens, K dynamic tokens, S static tokens, D LLM width,
Dv vision width, Dm message width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ipn_core.features import VisualFeatures
from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "Connector",
    "Dims",
    "EncodedImage",
    "InjectContext",
    "Injection",
    "Injector",
    "Interaction",
    "LayerContext",
    "LayerInjector",
    "PerceiveContext",
    "Perceiver",
    "Percept",
    "Request",
    "RequestContext",
    "Requester",
    "Stage",
    "VisionEncoder",
    "VisualMessage",
]


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
        K: dynamic tokens a round.
        D_request: width of the request; set once the requester is built.
        Dm: width of the message; set once the interaction is built.
    """

    Dv: int
    D_in: int
    D_hidden: tuple[int, ...]
    D_out: int
    S: int = 0
    R: int = 1
    K: int = 0
    D_request: int = 0
    Dm: int = 0


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
    """

    features: VisualFeatures
    tokens: Sequence[Tensor] | None = None


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
        values: (B, K, Dm).
        attention: (B, K, P) where it looked, heads averaged, over the patches in the order of
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
    """

    slots: Tensor
    round: int = 0


@dataclass(frozen=True, eq=False)
class Injection:
    """What goes into the LLM after a look.

    Attributes:
        tokens: (B, K, D_in) inputs for the `<img-d>` slots, or None when the layout has none.
    """

    tokens: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LayerContext:
    """What a layer injector may read before a layer of the LLM.

    Attributes:
        layer: index of the layer about to run.
        positions: (B, T) each token's position in its prompt.
        pictures: (B, T) how many of its sample's pictures stand before each token.
        features: the pictures, one sample a row of the batch.
    """

    layer: int
    positions: Tensor
    pictures: Tensor
    features: VisualFeatures


class Stage(nn.Module):
    """Base of all stages: a module with a config.

    Attributes:
        Config: the config class of this stage (a subclass of `ipn_core.Config`), or None.
    """

    Config: ClassVar[Any] = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class Perceiver(Stage):
    """Pictures to features and, optionally, static tokens."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Width Dv of the features."""

    @property
    def static_tokens(self) -> int | None:
        """Static tokens S a picture: 0 for none, None where it varies with the picture."""
        return 0

    @abstractmethod
    def forward(self, context: PerceiveContext) -> Percept:
        """Perceive all pictures of a batch."""

    @hookimpl
    def perceive(self, context: PerceiveContext) -> Percept:
        """Answer the stage's hook; calling the module lets forward hooks fire."""
        result: Percept = self(context)
        return result


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


class VisionEncoder(Perceiver):
    """A vision tower on its own: features and no static tokens. Frozen unless trained."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A text that changes whenever the features of some picture would: keys caches."""

    @abstractmethod
    def encode(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Encode pictures; resizing and normalising are the encoder's own business."""

    def forward(self, context: PerceiveContext) -> Percept:
        """Encode the pictures, unless the context brings their features."""
        if context.features is not None:
            return Percept(context.features)
        flat = [image for images in context.images for image in images]
        samples = [row for row, images in enumerate(context.images) for _ in images]
        return Percept(self._pack(flat, samples, len(context.images)))

    def _pack(
        self, images: Sequence[Image.Image], samples: Sequence[int], batch: int
    ) -> VisualFeatures:
        encoded = self.encode(images) if images else []
        parameter = next(self.parameters())
        summaries = [e.global_token for e in encoded if e.global_token is not None]

        def look(boxes: Any) -> VisualFeatures:
            crops = [_crop(images[image], edges) for image, *edges in boxes]
            return self._pack(crops, [samples[image] for image, *_ in boxes], batch)

        from torch import stack

        return VisualFeatures.pack(
            [e.values for e in encoded] or [parameter.new_zeros(0, self.width)],
            [e.grid for e in encoded],
            samples,
            batch,
            stack(summaries) if summaries and len(summaries) == len(encoded) else None,
            look,
        )


def _crop(image: Image.Image, edges: Sequence[float]) -> Image.Image:
    left, top, right, bottom = edges
    box = (
        round(left * image.width),
        round(top * image.height),
        max(round(right * image.width), round(left * image.width) + 1),
        max(round(bottom * image.height), round(top * image.height) + 1),
    )
    return image.crop(box)


class Connector(Perceiver):
    """A vision encoder plus a map into the LLM's width: fills the `<img>` slots."""

    def __init__(self, config: Any, dims: Dims, encoder: VisionEncoder) -> None:
        super().__init__(config)
        self.dims = dims
        self.encoder = encoder

    @property
    def width(self) -> int:
        """Width Dv of the encoder's features."""
        return self.encoder.width

    @abstractmethod
    def connect(self, features: VisualFeatures, context: PerceiveContext) -> list[Tensor]:
        """Return the static tokens of each picture, (S, D_in) each.

        Where samples share a picture's patches and its tokens do not depend on the question, give
        all of them the same tensor: the LLM then reads it once for the batch.
        """

    def forward(self, context: PerceiveContext) -> Percept:
        """Encode, then connect."""
        percept: Percept = self.encoder(context)
        encoder = {id(p) for p in self.encoder.parameters()}
        own = next((p.dtype for p in self.parameters() if id(p) not in encoder), None)
        features = percept.features.to(dtype=own)
        return Percept(features, self.connect(features, context))


class Requester(Stage):
    """Hidden states at `<img-q>` to a request."""

    def __init__(self, config: Any, dims: Dims) -> None:
        super().__init__(config)
        self.dims = dims

    @property
    @abstractmethod
    def width(self) -> int:
        """Width D of the request."""

    @property
    def layer(self) -> int:
        """The hidden layer to read, counted as transformers does; -1 is after the final norm."""
        return -1

    @abstractmethod
    def forward(self, context: RequestContext) -> Request:
        """Make the request."""

    @hookimpl
    def request(self, context: RequestContext) -> Request:
        """Answer the stage's hook."""
        result: Request = self(context)
        return result


class Interaction(Stage):
    """A request and the features to a message.

    Implementations must honour `features.mask`: padded patches never change the result.
    """

    def __init__(self, config: Any, dims: Dims) -> None:
        super().__init__(config)
        self.dims = dims

    @property
    @abstractmethod
    def width(self) -> int:
        """Width Dm of the message."""

    @property
    def has_map(self) -> bool:
        """Whether it can say where it looked (`VisualMessage.attention`)."""
        return False

    @property
    def objectives(self) -> frozenset[str]:
        """Which training objectives besides `language` it declares that it can serve; none yet.

        `answer-embedding` and `verbalise` need a message whose tokens may stand for the answer's
        input embedding, as wide as the LLM's; `request-image` needs `shared_space`.
        """
        return frozenset()

    def shared_space(self, request: Request, features: VisualFeatures) -> tuple[Tensor, Tensor]:
        """Map requests and patches into one space, for the objective `request-image`.

        Args:
            request: values (B, R, D_request).
            features: of any pictures.

        Returns:
            Unit vectors (B, w) and, for the packed patches, (N, w).
        """
        raise NotImplementedError(f"{type(self).__name__} has no shared space")

    def fit(self, requests: Tensor, patches: Tensor) -> None:
        """Prepare new weights for the data, before the first step of a training.

        Args:
            requests: (n, R, D_request) a sample of requests.
            patches: (m, Dv) a sample of patches.
        """

    @abstractmethod
    def forward(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Look at the features with the request.

        Args:
            request: values (B, R, D_request).
            features: of the same B samples.

        Returns:
            A message with values (B, K, Dm).
        """

    @hookimpl
    def interact(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Answer the stage's hook."""
        result: VisualMessage = self(request, features)
        return result


class Injector(Stage):
    """A message to inputs of the LLM."""

    def __init__(self, config: Any, dims: Dims) -> None:
        super().__init__(config)
        self.dims = dims

    @abstractmethod
    def forward(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Inject the message."""

    @hookimpl
    def inject(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Answer the stage's hook."""
        result: Injection = self(message, context)
        return result


class LayerInjector(Injector):
    """An injector that also changes the hidden states before chosen layers of the LLM.

    It is called before each layer of `layers` in every forward of the LLM alike: in prefill, in
    decoding and under beams.
    """

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers to stand before."""

    @abstractmethod
    def before_layer(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return the hidden states (B, T, D) that the layer shall read."""
