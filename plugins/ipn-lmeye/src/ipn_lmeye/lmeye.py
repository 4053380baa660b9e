"""The interaction `lmeye`: visual tokens and a request through a CLIP text encoder."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.masking_utils import create_causal_mask

from ipn_core.config import Config
from ipn_core.features import VisualFeatures
from ipn_core.pretrained import load_named, quiet
from ipn_core.stages import Dims, Interaction, Request, VisualMessage
from ipn_core.transfer import tensor_on

__all__ = ["LMEye", "LMEyeConfig"]


class LMEyeConfig(Config):
    """Which text encoder carries the request.

    Attributes:
        weights: a CLIP model or text encoder with its projection: a folder or a hub id, such as
            the published `openai/clip-vit-large-patch14`. It stays frozen, and checkpoints name
            it. None for an encoder of the sizes below with new weights, which is trained and saved
            like the rest.
        width: of the new encoder, and of the message.
        depth: its layers.
        heads: its attention heads.
    """

    weights: str | None = None
    width: int = Field(default=256, ge=1, le=65536)
    depth: int = Field(default=4, ge=1, le=64)
    heads: int = Field(default=4, ge=1, le=64)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        sizes = self.model_fields_set & {"width", "depth", "heads"}
        if self.weights is not None and sizes:
            raise ValueError(
                f"weights bring their own sizes: leave out {', '.join(sorted(sizes))}, or weights"
            )
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads, got {self.width} and {self.heads}"
            )
        return self


class LMEye(Interaction):
    """The last K outputs of CLIP's text encoder for `[start, visual tokens, requests, end]`.

    In plain torch, for one sample with tokens (P, Dv) and a request (R, D), w being the encoder's
    width:

        start, end = token[[-2, -1]] + position[[0, P + K + 1]]            # (w,) each
        sequence = cat([start, see(tokens), ask(request) as (K, w), end])  # (P + K + 2, w)
        message = projection(final_norm(causal_encoder(sequence))[-K:])    # (K, Dm)

    As in the released code of LMEye (YunxinLi/LingCloud, `Lmeye/lmeye_model.py` and
    `Lmeye/clip/clip_model.py`; the paper, arXiv 2305.03701, describes RVII instead): the encoder
    is frozen, and `see` (its `instruction_linear`) and `ask` (`instruction_blip22clip`) are linear
    maps that are trained. Only the start and end tokens have positions. As the end token is one
    of the last K, the first of the K requests is read by the others alone. The last linear map
    (`instruction_imgdLinear`), whose result is added to the `<img-d>` embeddings, is the
    injector's: `tokens` without its norm. Published sizes: R = 1, K = 5, P = 32 tokens of a frozen
    Q-Former with Dv = 768, w = Dm = 768.

    Ours: any visual features may stand for the Q-Former's tokens, and those of all pictures of a
    sample stand one after the other; there may be several request tokens, which `ask` reads
    together; where P + K + 1 is past the encoder's last position, the end token has that one.
    """

    Config = LMEyeConfig

    def __init__(self, config: LMEyeConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.clip: Any = _load(config.weights) if config.weights is not None else _new(config)
        width = self.clip.config.hidden_size
        self.see = nn.Linear(dims.Dv, width)
        self.ask = nn.Linear(dims.R * dims.D_request, dims.K * width)

    @property
    def width(self) -> int:
        """Width Dm of the message: that of CLIP's projection."""
        return int(self.clip.text_projection.out_features)

    @property
    def borrowed(self) -> tuple[nn.Module, ...]:
        """The text encoder, if the config names its weights."""
        return () if self.config.weights is None else (self.clip,)

    def forward(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Send the request behind the visual tokens; see `Interaction.forward`."""
        K, text = self.dims.K, self.clip.text_model
        seen = features.spread(self.see(features.values))  # (B, P, w)
        asked = self.ask(request.values.flatten(1)).unflatten(-1, (K, -1))  # (B, K, w)
        start, end = self._ends(features)
        sequence = torch.cat([start, seen, asked, end], dim=1)  # (B, P + K + 2, w)
        # Tokens in the middle have no positions, so that padding among them is merely not seen.
        mask = create_causal_mask(
            config=text.config,
            inputs_embeds=sequence,
            attention_mask=F.pad(F.pad(features.mask, (1, 0), value=True), (0, K + 1), value=True),
            past_key_values=None,
        )
        hidden = text.encoder(sequence, attention_mask=mask, is_causal=True).last_hidden_state
        return VisualMessage(self.clip.text_projection(text.final_layer_norm(hidden[:, -K:])))

    def _ends(self, features: VisualFeatures) -> tuple[Tensor, Tensor]:
        """Return the start and the end token of each sample, (B, 1, w) each, with positions."""
        embeddings = self.clip.text_model.embeddings
        device = features.values.device
        last = embeddings.position_embedding.num_embeddings - 1
        places = [[0, min(length + self.dims.K + 1, last)] for length in features.lengths]
        # CLIP's vocabulary ends with the two.
        words = embeddings.token_embedding.num_embeddings
        both = tensor_on([[words - 2, words - 1]], device).expand(len(places), -1)
        ends: Tensor = embeddings(both, tensor_on(places, device))
        return ends[:, :1], ends[:, 1:]


def _load(weights: str) -> Any:
    what = f"the CLIP text encoder '{weights}'"
    with quiet():
        clip, _ = load_named(CLIPTextModelWithProjection, weights, what, dtype=torch.float32)
    return clip


def _new(config: LMEyeConfig) -> Any:
    """Return an encoder with new weights, and with a vocabulary of the start and end tokens."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            projection_dim=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
        )
    )
