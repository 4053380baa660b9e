"""The importer `llava`: LLaVA-1.5 and what has its form (arXiv 2310.03744)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ipn_core.errors import CheckpointError
from ipn_core.importing import Importer

__all__ = ["Llava"]

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""The conversation format of LLaVA-1.5, Vicuna's v1.1 without a system message."""

_ACTIVATION = "gelu"


class Llava(Importer):
    """transformers' `LlavaForConditionalGeneration` as the strategy `static`: every patch a token.

    A vision tower's layer, a two-layer MLP, and a LLaMA.
    """

    MODEL_TYPES = ("llava",)

    def config(self, whole: Any, name: str, source: str, folder: Path) -> dict[str, Any]:
        """Return the config of the same model; see `Importer.config`.

        Raises:
            CheckpointError: the checkpoint uses something that LLaVA-1.5 does not.
        """
        text = whole.get_text_config()
        for what, found, wanted in (
            ("vision_feature_select_strategy", whole.vision_feature_select_strategy, "default"),
            ("projector_hidden_act", whole.projector_hidden_act, _ACTIVATION),
            ("text_config.model_type", text.model_type, "llama"),
        ):
            if found != wanted:
                raise CheckpointError(
                    f"'{name}' has {what} {found!r}; this importer reads {wanted!r} alone."
                )
        layer = whole.vision_feature_layer
        if not isinstance(layer, int):
            raise CheckpointError(
                f"'{name}' joins the vision tower's layers {list(layer)}; this importer reads one."
            )
        return {
            "strategy": "static",
            "backbone": {"name": "llama", "weights": name},
            "encoder": {
                "name": "vision",
                "weights": source,
                "layer": layer,
                "keep_class_token": False,
            },
            "perceive": {"name": "static", "map": "mlp", "norm": False},
            "prompt": {"template": TEMPLATE, "after_image": "\n", "add_special_tokens": True},
        }

    def state(self, whole: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the projector's weights; see `Importer.state`."""
        layers = {"linear_1": "map.0", "linear_2": "map.2"}
        return {
            f"perceiver.{ours}.{kind}": tensors[f"multi_modal_projector.{theirs}.{kind}"]
            for theirs, ours in layers.items()
            for kind in ("weight", "bias")
        }
