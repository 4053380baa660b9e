"""Any `OPTForCausalLM`: learned positions with their offset, tied or projected embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ipn_core.backbone import Backbone

__all__ = ["Opt"]


class Opt(Backbone):
    """OPT (arXiv 2205.01068); positions are given, transformers adds the offset of two.

    OPT has no chat format; the question and answer form of its own few-shot evaluation is used.
    """

    MODEL_TYPES = ("opt",)
    SHARES = True
    TEMPLATE = (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'Question: ' + message['content'] + '\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ 'Answer: ' + message['content'] + '\\n' }}"
        "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
    )

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder's layers."""
        found: nn.ModuleList = self.lm.model.decoder.layers
        return found

    def place_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Leave keys as they are: OPT adds positions to the embeddings alone."""
        return keys
