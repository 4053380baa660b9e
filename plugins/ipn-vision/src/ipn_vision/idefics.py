"""The vision tower of Idefics, which in transformers is a plain module, as a model that loads."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import IdeficsVisionConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.idefics.modeling_idefics import IdeficsPreTrainedModel
from transformers.models.idefics.vision import IdeficsVisionEncoderLayer, IdeficsVisionTransformer
from transformers.utils.output_capturing import capture_outputs

__all__ = ["IdeficsVisionTower"]


class IdeficsVisionTower(IdeficsPreTrainedModel):
    """`IdeficsVisionTransformer`, under the name that Idefics has it by."""

    config_class = IdeficsVisionConfig
    main_input_name = "pixel_values"
    _can_record_outputs = {"hidden_states": IdeficsVisionEncoderLayer}  # noqa: RUF012 as the base

    def __init__(self, config: IdeficsVisionConfig) -> None:
        super().__init__(config)
        self.vision_model = IdeficsVisionTransformer(config)
        self.post_init()

    @capture_outputs
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode (B, 3, h, w); the base serves `output_hidden_states`."""
        return self.vision_model(pixel_values, interpolate_pos_encoding)
