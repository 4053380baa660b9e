"""The importers `blip2` (arXiv 2301.12597) and `instructblip` (arXiv 2305.06500)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.errors import CheckpointError
from ipn_core.importing import Importer
from ipn_qformer.qformer import NORM_EPS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Blip2", "InstructBlip"]

ASKING = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + ' Answer:' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '\\n' }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
)
"""How BLIP-2 is asked (section 4.2); on OPT a line break ends what it learned to say."""

PLAIN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}"
    "{% endfor %}"
)
"""InstructBLIP takes the instruction as it is, in the LLM as in the Q-Former."""

BACKBONES = ("llama", "opt")
"""Text models that it may stand on, by `model_type` and by our name; the published T5 is none."""


class _Blip(Importer):
    """A ViT, a Q-Former and a linear map in front of an LLM.

    Attributes:
        TEMPLATE: of the prompt.
        NORM: what the norm before the Q-Former's layers is called.
    """

    TEMPLATE: str
    NORM: str

    def config(self, whole: Any, name: str, source: str, folder: Path) -> dict[str, Any]:
        """Return the config of the same model; see `Importer.config`.

        Raises:
            CheckpointError: the checkpoint uses something that the published ones do not.
        """
        text, its = whole.get_text_config(), whole.qformer_config
        for what, found, allowed in (
            ("text_config.model_type", text.model_type, BACKBONES),
            ("qformer_config.hidden_act", its.hidden_act, ("gelu",)),
            ("qformer_config.layer_norm_eps", its.layer_norm_eps, (NORM_EPS,)),
        ):
            if found not in allowed:
                raise CheckpointError(
                    f"'{name}' has {what} {found!r}; this importer reads "
                    f"{' or '.join(repr(one) for one in allowed)} alone."
                )
        return {
            "strategy": "qformer",
            "backbone": {"name": text.model_type, "weights": name},
            "encoder": {"name": "vision", "weights": source},
            "perceive": {
                "name": "qformer",
                "queries": whole.num_query_tokens,
                "width": its.hidden_size,
                "depth": its.num_hidden_layers,
                "heads": its.num_attention_heads,
                "hidden": its.intermediate_size,
                "every": its.cross_attention_frequency,
                "dropout": its.hidden_dropout_prob,
            },
            # As their processors: the pictures, then what the tokenizer makes of the text.
            "prompt": {"template": self.TEMPLATE, "images_first": True, "add_special_tokens": True},
        }

    def state(self, whole: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the Q-Former's weights and the map's; see `Importer.state`."""
        its = whole.qformer_config
        found = {
            "queries": tensors["query_tokens"][0],
            **_both(tensors, {self.NORM: "norm", "language_projection": "out"}),
        }
        for index in range(its.num_hidden_layers):
            theirs, ours = f"qformer.encoder.layer.{index}", f"layers.{index}"
            found |= _attention(tensors, f"{theirs}.attention", f"{ours}.self_attention")
            if index % its.cross_attention_frequency == 0:
                found |= _attention(tensors, f"{theirs}.crossattention", f"{ours}.cross_attention")
            found |= _mlp(tensors, theirs, "_query", f"{ours}.mlp")
        return {f"perceiver.{name}": tensor for name, tensor in found.items()}

    def language_model(self, folder: Path, dtype: Any) -> PreTrainedModel:
        """Load the language model alone; see `Importer.language_model`."""
        from transformers import GenerationConfig

        lm = super().language_model(folder, dtype)
        # Theirs answers by the language model's own `generate`, which follows its config and not
        # the checkpoint's generation_config.json.
        lm.generation_config = GenerationConfig.from_model_config(lm.config)
        return lm


class Blip2(_Blip):
    """transformers' `Blip2ForConditionalGeneration` on OPT."""

    MODEL_TYPES = ("blip-2",)
    TEMPLATE = ASKING
    NORM = "qformer.layernorm"


class InstructBlip(_Blip):
    """transformers' `InstructBlipForConditionalGeneration` on Vicuna."""

    MODEL_TYPES = ("instructblip",)
    TEMPLATE = PLAIN
    NORM = "qformer.embeddings.layernorm"

    def config(self, whole: Any, name: str, source: str, folder: Path) -> dict[str, Any]:
        """Return the same with the question's tokenizer; see `Importer.config`."""
        config = super().config(whole, name, source, folder)
        config["perceive"]["instruction"] = {
            "tokenizer": source,
            "subfolder": "qformer_tokenizer",
            "vocabulary": whole.qformer_config.vocab_size,
            "positions": whole.qformer_config.max_position_embeddings,
        }
        return config

    def state(self, whole: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same with the weights for words; see `Importer.state`."""
        found = super().state(whole, tensors)
        for kind in ("word", "position"):
            weight = tensors[f"qformer.embeddings.{kind}_embeddings.weight"]
            found[f"perceiver.{kind}s.weight"] = weight
        # What the last layer makes of the words is read by nobody.
        for index in range(whole.qformer_config.num_hidden_layers - 1):
            theirs, ours = f"qformer.encoder.layer.{index}", f"perceiver.layers.{index}.text_mlp"
            found |= _mlp(tensors, theirs, "", ours)
        return found


def _attention(tensors: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    inner = f"{theirs}.attention"
    found = _both(
        tensors,
        {
            f"{inner}.query": f"{ours}.q",
            f"{theirs}.output.dense": f"{ours}.out",
            f"{theirs}.output.LayerNorm": f"{ours}.norm",
        },
    )
    for kind in ("weight", "bias"):
        parts = [tensors[f"{inner}.{which}.{kind}"] for which in ("key", "value")]
        found[f"{ours}.kv.{kind}"] = torch.cat(parts)
    return found


def _mlp(tensors: Mapping[str, Tensor], theirs: str, which: str, ours: str) -> dict[str, Tensor]:
    return _both(
        tensors,
        {
            f"{theirs}.intermediate{which}.dense": f"{ours}.hidden",
            f"{theirs}.output{which}.dense": f"{ours}.out",
            f"{theirs}.output{which}.LayerNorm": f"{ours}.norm",
        },
    )


def _both(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return weight and bias of each, under our name for it."""
    return {
        f"{ours}.{kind}": tensors[f"{theirs}.{kind}"]
        for theirs, ours in names.items()
        for kind in ("weight", "bias")
    }
