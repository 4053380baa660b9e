"""What `bench_modules.py` times: each strategy's own module, and the class of a library beside it.

The library's classes are imported and given the same sizes; around them stand linear maps of torch
where ours has its own, so that both read the same and give as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ipn_core.features import Box, ImageSpan, VisualFeatures
from ipn_core.plugins import get_registry
from ipn_core.records import Dims, LayerContext, PerceiveContext, Request
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig

__all__ = ["ENTRIES", "SIZES", "Entry", "Seen", "Size", "Subject", "see"]

Call = Callable[["nn.Module", "Seen"], Tensor]


@dataclass(frozen=True)
class Size:
    """How wide everything is.

    Attributes:
        Dv: width of a patch.
        grid: of a picture.
        D: width of the LLM.
        K: dynamic tokens.
        T: text tokens, for blocks between the layers of the LLM.
    """

    Dv: int
    grid: tuple[int, int]
    D: int
    K: int = 5
    T: int = 32

    @property
    def dims(self) -> Dims:
        """As a model has them."""
        return Dims(
            Dv=self.Dv,
            D_in=self.D,
            D_hidden=(self.D, self.D),
            D_out=self.D,
            K=self.K,
            D_request=self.D,
            M=self.K,
            Dm=self.D,
        )


SIZES = {
    "starter": Size(Dv=1280, grid=(8, 8), D=576),
    "llava-7b": Size(Dv=1024, grid=(24, 24), D=4096),
}


@dataclass(frozen=True)
class Seen:
    """What goes in.

    Attributes:
        features: a picture a sample.
        request: (B, 1, D).
        text: (B, T, D).
    """

    features: VisualFeatures
    request: Tensor
    text: Tensor

    @property
    def patches(self) -> Tensor:
        """(B, P, Dv)."""
        return self.features.spread(self.features.values)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Seen:
        """Return the same elsewhere, or in another type."""
        request, text = (t.to(device, dtype) for t in (self.request, self.text))
        return Seen(self.features.to(device, dtype), request, text)


def see(size: Size, batch: int) -> Seen:
    """Draw a picture and a request for each sample, the same on every call."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    count = size.grid[0] * size.grid[1]
    crop = normal(count, size.Dv)

    def look(boxes: Sequence[Box]) -> VisualFeatures:
        # Encoding them again is the encoder's time, and no module's.
        places = [ImageSpan(box[0], size.grid, i * count) for i, box in enumerate(boxes)]
        return VisualFeatures(crop.repeat(len(boxes), 1), tuple(places), batch)

    features = VisualFeatures.pack(
        [normal(count, size.Dv) for _ in range(batch)],
        [size.grid] * batch,
        range(batch),
        batch,
        looker=look,
    )
    return Seen(features, normal(batch, 1, size.D), normal(batch, size.T, size.D))


@dataclass(frozen=True)
class Subject:
    """A module, and how it is called."""

    module: nn.Module
    call: Call

    def __call__(self, seen: Seen) -> Tensor:
        """Run it."""
        return self.call(self.module, seen)


@dataclass(frozen=True)
class Entry:
    """One strategy.

    Attributes:
        kind, name: of its component.
        call: how ours is called.
        options: of its config.
        original: the class that stands beside it, or why there is none.
        theirs: builds that, given a size and "sdpa" or "eager".
        is_discrete: whether what it computes jumps, so that a rounding may change all of it.
    """

    kind: str
    name: str
    call: Call
    original: str
    theirs: Callable[[Size, str], Subject] | None = None
    options: dict[str, Any] | None = None
    is_discrete: bool = False

    def ours(self, size: Size, backend: str = "auto") -> Subject:
        """Build ours, as a model does.

        Args:
            size: how wide.
            backend: of `ipn_core.attention`, where it has the option.
        """
        component = get_registry().get(self.kind, self.name)
        target: Any = component.load()
        schema = component.load_config() or target.Config
        options = dict(self.options or {})
        if "backend" in schema.model_fields:
            options["backend"] = backend
        more = []
        if self.kind == "perceiver":
            more.append(TinyEncoder(TinyEncoderConfig(width=size.Dv, grid=size.grid[0])))
        return Subject(target(schema.parse(options, self.name), size.dims, *more), self.call)


# -- how ours are called ---------------------------------------------------------------------------


def _interact(module: Any, seen: Seen) -> Tensor:
    # As new features, so that nothing is kept from one call to the next.
    message = module(Request(seen.request), replace(seen.features))
    values: Tensor = message.values
    return values


def _connect(module: Any, seen: Seen) -> Tensor:
    return torch.stack(module.connect(replace(seen.features), PerceiveContext([], [])))


def _before_layer(module: Any, seen: Seen) -> Tensor:
    B, T = seen.text.shape[:2]
    ones = torch.ones(B, T, dtype=torch.long, device=seen.text.device)
    context = LayerContext(
        layer=0,
        positions=torch.arange(T, device=seen.text.device).expand(B, T),
        pictures=ones,
        features=replace(seen.features),
        looks=torch.zeros_like(ones),
        messages=seen.text.new_zeros(B, 0, 1, 1),
    )
    changed: Tensor = module.before_layer(seen.text, context)
    return changed


# -- the libraries' own ----------------------------------------------------------------------------


def _decoder(size: Size, attention: str) -> Subject:
    """Build torch's decoder between maps: queries with the request look at the patches."""
    width = 256
    layer = nn.TransformerDecoderLayer(
        width, 8, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    parts = nn.ModuleDict(
        {
            "patches": nn.Linear(size.Dv, width),
            "request": nn.Linear(size.D, width),
            "queries": nn.Embedding(size.K, width),
            "decoder": nn.TransformerDecoder(layer, 3, nn.LayerNorm(width)),
            "out": nn.Linear(width, size.D),
        }
    )

    def call(module: Any, seen: Seen) -> Tensor:
        asked = module["request"](seen.request)
        tokens = torch.cat([module["queries"].weight + asked, asked], dim=1)
        looked = module["decoder"](tokens, module["patches"](seen.patches))
        out: Tensor = module["out"](looked[:, : size.K])
        return out

    return Subject(parts, call)


def _projector(size: Size, attention: str) -> Subject:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=size.Dv, num_attention_heads=8),
        text_config=LlamaConfig(hidden_size=size.D, num_attention_heads=8),
    )
    return Subject(LlavaMultiModalProjector(config), lambda module, seen: module(seen.patches))


def _qformer(size: Size, attention: str) -> Subject:
    from transformers import Blip2QFormerConfig, Blip2QFormerModel

    config = Blip2QFormerConfig(encoder_hidden_size=size.Dv, attn_implementation=attention)
    parts = nn.ModuleDict(
        {
            "queries": nn.Embedding(32, config.hidden_size),
            "qformer": Blip2QFormerModel(config),
            "out": nn.Linear(config.hidden_size, size.D),
        }
    )

    def call(module: Any, seen: Seen) -> Tensor:
        patches = seen.patches
        queries = module["queries"].weight.expand(len(patches), -1, -1)
        looked = module["qformer"](queries, encoder_hidden_states=patches).last_hidden_state
        out: Tensor = module["out"](looked)
        return out

    return Subject(parts, call)


def _resampler(size: Size, attention: str) -> Subject:
    from transformers import IdeficsConfig
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = IdeficsConfig(vision_config={"embed_dim": size.Dv})
    inner = IdeficsPerceiverResampler(
        config, size.Dv, depth=6, n_heads=16, head_dim=96, n_latents=64
    )
    parts = nn.ModuleDict({"resampler": inner, "out": nn.Linear(size.Dv, size.D)})

    def call(module: Any, seen: Seen) -> Tensor:
        out: Tensor = module["out"](module["resampler"](seen.patches))
        return out

    return Subject(parts, call)


def _gated(size: Size, attention: str) -> Subject:
    from transformers import IdeficsConfig
    from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

    config = IdeficsConfig(
        hidden_size=size.D,
        num_attention_heads=8,
        intermediate_size=4 * size.D,
        vision_config={"embed_dim": size.Dv},
        alpha_initializer="ones",
        alpha_type="float",
        attn_implementation=attention,
    )

    def call(module: Any, seen: Seen) -> Tensor:
        B, T = seen.text.shape[:2]
        open_ = seen.text.new_zeros(B, 1, T, seen.features.lengths[0])
        out: Tensor = module(
            seen.text,
            image_hidden_states=seen.patches,
            image_attention_mask=open_,
            cross_attention_gate=seen.text.new_ones(B, T),
        )
        return out

    return Subject(IdeficsGatedCrossAttentionLayer(config, layer_idx=0), call)


def _clip(size: Size, attention: str) -> Subject:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    length = size.grid[0] * size.grid[1] + size.K + 2
    config = CLIPTextConfig(
        vocab_size=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=256,
        intermediate_size=1024,
        projection_dim=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=max(77, length),
        attn_implementation=attention,
    )

    def call(module: Any, seen: Seen) -> Tensor:
        ids = torch.zeros(len(seen.request), length, dtype=torch.long, device=seen.request.device)
        ids[:, -1] = 1
        hidden = module(input_ids=ids).last_hidden_state[:, -size.K :]
        out: Tensor = module.text_projection(hidden)
        return out

    return Subject(CLIPTextModelWithProjection(config), call)


NOTHING = "neither torch nor transformers has a class for it"

ENTRIES = {
    "c-abstractor": Entry("perceiver", "c-abstractor", _connect, NOTHING),
    "film": Entry("interaction", "film", _interact, NOTHING),
    "gated-xattn": Entry(
        "injector",
        "gated-xattn",
        _before_layer,
        "IdeficsGatedCrossAttentionLayer",
        _gated,
    ),
    "lmeye": Entry("interaction", "lmeye", _interact, "CLIPTextModelWithProjection", _clip),
    "qformer": Entry("perceiver", "qformer", _connect, "Blip2QFormerModel", _qformer),
    "resampler": Entry("perceiver", "resampler", _connect, "IdeficsPerceiverResampler", _resampler),
    "rvii": Entry("interaction", "rvii", _interact, "nn.TransformerDecoder", _decoder),
    "static": Entry(
        "perceiver",
        "static",
        _connect,
        "LlavaMultiModalProjector",
        _projector,
        {"map": "mlp", "norm": False},
    ),
    "zoom": Entry("interaction", "zoom", _interact, NOTHING, is_discrete=True),
}
"""By strategy, with its defaults; `static` as LLaVA-1.5 has it."""
