"""Small random models for tests: real architectures, two layers, no download.

They say nonsense, but every code path of a real model runs through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from ipn_core.config import Config
from ipn_core.plugins import get_registry
from ipn_core.stages import EncodedImage, Label, VisionEncoder

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ipn_core.backbone import Backbone

__all__ = ["TinyEncoder", "TinyEncoderConfig", "tiny_backbone", "tiny_picture", "tiny_tokenizer"]

Family = Literal["llama", "llama-gqa", "vicuna", "opt", "opt-projected"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tiny_picture(seed: int = 0, size: tuple[int, int] = (24, 24)) -> Image.Image:
    """Return a picture of noise, always the same for the same seed.

    Args:
        seed: of the noise.
        size: width and height in pixels.
    """
    from PIL import Image

    width, height = size
    noise = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=noise)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


@cache
def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer: one token a byte, with chat markers as special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>" if chat else "</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    fast.chat_template = CHATML if chat else None
    return fast


def tiny_backbone(family: Family = "llama", *, seed: int = 0, positions: int = 512) -> Backbone:
    """Return a random two-layer backbone.

    Args:
        family: "llama-gqa" has fewer key-value heads, "opt-projected" narrower embeddings.
        seed: of the weights.
        positions: the longest context.
    """
    lm = _tiny_lm(family, seed, positions)
    name = family.split("-")[0]
    adapter: Any = get_registry().get("backbone", name).load()
    backbone: Backbone = adapter(lm, tiny_tokenizer(chat=name == "llama"))
    return backbone


def _tiny_lm(family: Family, seed: int, positions: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    tokenizer = tiny_tokenizer(chat=family.startswith("llama"))
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # Wide enough for logits that differ clearly between tokens.
        "initializer_range": 0.2,
        "init_std": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family.startswith("opt"):
            inner = 16 if family == "opt-projected" else 32
            return OPTForCausalLM(OPTConfig(**common, ffn_dim=64, word_embed_proj_dim=inner))
        groups = 2 if family == "llama-gqa" else None
        return LlamaForCausalLM(
            LlamaConfig(**common, intermediate_size=64, num_key_value_heads=groups)
        )


class TinyEncoderConfig(Config):
    """A patch embedding of random weights.

    Attributes:
        width: Dv.
        grid: patches a side of a square picture; wider pictures get more columns.
        seed: of the weights.
    """

    width: int = Field(default=24, ge=1, le=65536)
    grid: int = Field(default=3, ge=1, le=1024)
    seed: int = 0


class TinyEncoder(VisionEncoder):
    """One convolution with random weights: pictures of other proportions get other grids."""

    Config = TinyEncoderConfig

    def __init__(self, config: TinyEncoderConfig) -> None:
        super().__init__(config)
        self.encoded = 0
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.patch = nn.Conv2d(3, config.width, kernel_size=4, stride=4)

    @property
    def width(self) -> int:
        """Width Dv of the features."""
        width: int = self.config.width
        return width

    @property
    def labels(self) -> tuple[Label, ...]:
        """Made-up ones; every second thing is a kind of another."""
        return tuple(Label(f"it {i}", ("odd",) * (i % 2)) for i in range(self.config.width))

    @property
    def fingerprint(self) -> str:
        """The config."""
        return f"tiny-{self.config.width}-{self.config.grid}-{self.config.seed}"

    def encode(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Encode each picture on its own; `encoded` counts them."""
        import numpy as np

        found = []
        for image in images:
            side = self.config.grid
            columns = max(1, round(side * image.width / image.height))
            small = image.resize((columns * 4, side * 4))
            pixels = torch.from_numpy(np.asarray(small, dtype=np.float32) / 255).permute(2, 0, 1)
            values = self.patch(pixels[None].to(self.patch.weight))[0]
            found.append(EncodedImage(values.flatten(1).T, (side, columns), values.mean((1, 2))))
            self.encoded += 1
        return found
