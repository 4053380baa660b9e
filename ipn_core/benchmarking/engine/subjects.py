"""What is timed: the language model, and the shape of a picture's features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.plugins import get_registry
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_tokenizer

if TYPE_CHECKING:
    from ipn_core.backbone import Backbone

__all__ = ["GRID", "INTERACT", "SMOLLM2_SHAPE", "WIDTH", "asking_model", "backbone", "features_of"]

GRID = (8, 8)
WIDTH = 1280
SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_SHAPE: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
INTERACT = {
    "name": "rvii",
    "width": 256,
    "depth": 2,
    "heads": 8,
    "mlp_ratio": 2,
    "guide": {"width": 128, "tallies": 8},
}


def backbone(device: torch.device) -> tuple[Backbone, str]:
    """Return SmolLM2 where its weights are present, else a random LLaMA of its shape; and which.

    Args:
        device: where it is put, in float32 everywhere, so that all rows compute the same numbers.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # which `timing` waits for
    registry = get_registry()
    adapter: Any = registry.get("backbone", "llama").load()
    known = registry.entries("weights").get(SMOLLM2)
    weights = None if known is None else known.load()
    if weights is not None and weights.present():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = weights.folder()
        lm: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return adapter(
            lm.to(device), AutoTokenizer.from_pretrained(folder)
        ), "SmolLM2-135M-Instruct"
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    random: Any = LlamaForCausalLM(LlamaConfig(**SMOLLM2_SHAPE))
    return adapter(random.to(device), tiny_tokenizer()), "a random LLaMA of SmolLM2-135M's shape"


def asking_model(llm: Backbone, **config: Any) -> IPN:
    """Return a model with RVII, new weights, around a language model.

    Args:
        llm: the language model.
        config: what the model's config has besides.
    """
    torch.manual_seed(0)
    asks = {"strategy": "rvii", "backbone": "llama", "encoder": "tiny", "interact": INTERACT}
    return IPN.from_config(
        {**asks, **config},
        backbone=llm,
        encoder=TinyEncoder(TinyEncoderConfig(width=WIDTH)),
    )


def features_of(
    pictures: int, device: torch.device, grid: tuple[int, int] = GRID
) -> VisualFeatures:
    """Return random features of so many pictures, one a sample, on a device."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(grid[0] * grid[1], WIDTH, generator=generator) for _ in range(pictures)]
    packed = VisualFeatures.pack(values, [grid] * pictures, range(pictures), pictures)
    return packed.to(device)
