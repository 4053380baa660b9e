"""Any `LlamaForCausalLM`, grouped-query attention included, and Vicuna's conversation format."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ipn_core.backbone import Backbone

__all__ = ["Llama", "Vicuna"]


class Llama(Backbone):
    """LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783) and models of its architecture.

    A tokenizer without a chat template gets plain text: the turns one after the other.
    """

    MODEL_TYPES = ("llama",)
    SHARES = True
    TEMPLATE = (
        "{{ bos_token or '' }}{% for message in messages %}"
        "{% if not loop.first %}{{ '\\n' }}{% endif %}{{ message['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '\\n' }}{% endif %}"
    )

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder's layers."""
        found: nn.ModuleList = self.lm.model.layers
        return found

    def place_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Rotate keys by their positions: LLaMA keeps them rotated (arXiv 2104.09864)."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        cos, sin = (x[:, None] for x in self.lm.model.rotary_emb(keys, positions))
        placed: Tensor = apply_rotary_pos_emb(keys, keys, cos, sin, unsqueeze_dim=3)[1]
        return placed


class Vicuna(Llama):
    """Vicuna: LLaMA weights with the v1.1 conversation format (FastChat, `vicuna_v1.1`)."""

    TEMPLATE = (
        "{{ bos_token or '' }}"
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% else %}"
        '{{ "A chat between a curious user and an artificial intelligence assistant. '
        "The assistant gives helpful, detailed, and polite answers to the user's questions. \" }}"
        "{% endif %}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )

    @property
    def template(self) -> str:
        """The v1.1 format, whatever the tokenizer brings: these weights were trained on it."""
        return self.TEMPLATE
