"""The four stages; what passes between them is in `ipn_core.records`.

Authors subclass one of `VisionEncoder`, `Connector`, `Requester`, `Interaction`, `Injector` (or
`LayerInjector`) and write `forward`; the base classes register it under the hook of its stage.

Letters: B batch, P patches, R request tokens, K dynamic tokens, S static tokens, D LLM width,
Dv vision width, Dm message width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ipn_core.features import VisualFeatures
from ipn_core.hooks import hookimpl
from ipn_core.images import crop
from ipn_core.records import (
    Dims,
    EncodedImage,
    InjectContext,
    Injection,
    Label,
    LayerContext,
    PerceiveContext,
    Percept,
    Request,
    RequestContext,
    VisualMessage,
)

if TYPE_CHECKING:
    from PIL import Image

    from ipn_core.vocabulary import Vocabulary

__all__ = [
    "Connector",
    "Dims",
    "EncodedImage",
    "InjectContext",
    "Injection",
    "Injector",
    "Interaction",
    "Label",
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


class Stage(nn.Module):
    """Base of all stages: a module with a config.

    Attributes:
        Config: the config class of this stage (a subclass of `ipn_core.Config`), or None.
    """

    Config: ClassVar[Any] = None

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def not_supported_reasons(cls, config: Any, dims: Dims) -> list[str]:
        """Return why it cannot work in a model of these sizes; empty means it can.

        Args:
            config: its own.
            dims: as its constructor would get them.
        """
        return []

    @property
    def borrowed(self) -> tuple[nn.Module, ...]:
        """Parts whose weights the config names: a model freezes them, and saves none of them."""
        return ()

    def meet(self, vocabulary: Vocabulary) -> None:
        """Read what it needs of the LLM's words, once, when a model is put together.

        What it keeps of them follows from the model's config: as buffers that are not persistent,
        no checkpoint holds them.
        """


class Perceiver(Stage):
    """Pictures to features and, optionally, static tokens.

    Attributes:
        placed: whether its features are of places, row by row on their grid: a map of them can be
            drawn over the picture.
        looks: whether these are places in the whole picture, so that they can look again at parts
            of it (`VisualFeatures.look`).
    """

    placed: ClassVar[bool] = True
    looks: ClassVar[bool] = True

    @property
    @abstractmethod
    def width(self) -> int:
        """Width Dv of the features."""

    @property
    def static_tokens(self) -> int | None:
        """Static tokens S a picture: 0 for none, None where it varies with the picture."""
        return 0

    @property
    def labels(self) -> tuple[Label, ...]:
        """Dv of them where each feature is the evidence (a logit) of one thing, else none."""
        return ()

    @abstractmethod
    def forward(self, context: PerceiveContext) -> Percept:
        """Perceive all pictures of a batch."""

    @hookimpl
    def perceive(self, context: PerceiveContext) -> Percept:
        """Answer the stage's hook; calling the module lets forward hooks fire."""
        result: Percept = self(context)
        return result


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

    def shows(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Return which part of a picture its patches show, all of it by default.

        Args:
            size: width and height in pixels.

        Returns:
            (left, top, right, bottom) as fractions of its sides; beyond 0 or 1 where it pads.
        """
        return (0.0, 0.0, 1.0, 1.0)

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

        def look(boxes: Any) -> VisualFeatures:
            crops = [crop(images[image], edges) for image, *edges in boxes]
            return self._pack(crops, [samples[image] for image, *_ in boxes], batch)

        empty = next(self.parameters()).new_zeros(0, self.width)
        return VisualFeatures.of(encoded, samples, batch, empty, look)


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

    @property
    def labels(self) -> tuple[Label, ...]:
        """The encoder's, unless other features take the place of static tokens."""
        return () if self.static_tokens == 0 else self.encoder.labels

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

    @property
    def asks(self) -> bool:
        """Whether a request may depend on the question; not so in a control."""
        return True

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
    def length(self) -> int:
        """Tokens M of the message: as many as the layout has dynamic tokens."""
        return self.dims.K

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

    def saying(self, texts: Sequence[str]) -> Tensor | None:
        """Return the messages (B, M, Dm) that say texts, for the objective `verbalise`.

        None, the default, for messages that stand for a whole answer by one direction, which the
        objective makes itself.
        """
        return None

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
            A message with values (B, M, Dm).
        """

    @hookimpl
    def interact(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Answer the stage's hook."""
        result: VisualMessage = self(request, features)
        return result


class Injector(Stage):
    """A message to what the LLM reads: inputs, keys and values, or changes between its layers.

    Attributes:
        needs_message: whether it does nothing until a look has brought a message.
    """

    needs_message: ClassVar[bool] = True

    def __init__(self, config: Any, dims: Dims) -> None:
        super().__init__(config)
        self.dims = dims

    @classmethod
    def not_supported_reasons(cls, config: Any, dims: Dims) -> list[str]:
        """What needs a message needs a look."""
        if dims.M or not cls.needs_message:
            return []
        return [
            "it injects what a look brings, and with layout.rounds 0 or layout.dynamic 0 there is "
            "nothing: name request and interact and set both, or use an injector that needs no "
            "message"
        ]

    @property
    def fills(self) -> int:
        """How many `<img-d>` slots its tokens fill after a look; the LLM processes these."""
        return self.dims.K

    @property
    def caches(self) -> int:
        """How many positions a look adds to the cache that the LLM never processes."""
        return 0

    def begin(self, embeddings: Tensor) -> None:
        """Start new weights from the LLM's own words; they stay as they are by default.

        Called once, when a model is built from a config, and before weights are loaded.

        Args:
            embeddings: (vocabulary, D_in) the LLM's input embeddings.
        """
        return

    @abstractmethod
    def forward(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Inject the message."""

    @hookimpl
    def inject(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Answer the stage's hook."""
        result: Injection = self(message, context)
        return result


class LayerInjector(Injector):
    """An injector that changes the hidden states before chosen layers of the LLM.

    It is called before each layer of `layers` in every forward of the LLM alike: in prefill, in
    decoding and under beams. There each hidden state (B, T, D) may be a request, so that a
    strategy of it alone needs no round (`layout.rounds: 0`). With `needs_message` it is called
    only once a row of the batch has looked, and must change no token before its own row's look.
    """

    needs_message: ClassVar[bool] = False

    @property
    def fills(self) -> int:
        """No slot."""
        return 0

    def forward(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Put nothing into the prompt after a look."""
        return Injection()

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers to stand before."""

    @abstractmethod
    def before_layer(self, hidden: Tensor, context: LayerContext) -> Tensor:
        """Return the hidden states (B, T, D) that the layer shall read."""
