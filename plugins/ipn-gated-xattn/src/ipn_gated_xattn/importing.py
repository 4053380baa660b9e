"""The importer `idefics`: Idefics, the open Flamingo (Laurençon et al. 2023, arXiv 2306.16527)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ipn_resampler.idefics import from_idefics
from ipn_resampler.resampler import ResamplerConfig
from torch import Tensor

from ipn_core.backbone import load_tokenizer
from ipn_core.errors import CheckpointError
from ipn_core.importing import Importer
from ipn_core.pretrained import TensorFiles, load_whole, quiet, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Idefics", "blocks_from_idefics"]

FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"

_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{{ 'User:' + ('' if message['image_first'] else ' ') + message['content'] + 'END\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + 'END\n' }}"
    "{% else %}{{ message['content'] + '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The format of the model card of idefics-9b-instruct; without END that of idefics-9b."""

_NAMES = {
    "input_layernorm": "norm",
    "cross_attn.q_proj": "q",
    "cross_attn.k_proj": "k",
    "cross_attn.v_proj": "v",
    "cross_attn.o_proj": "out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_QK_NORM = {"cross_attn.q_layer_norm": "q_norm", "cross_attn.k_layer_norm": "k_norm"}
_GATES = {"alpha_cross_attn": "attention_gate", "alpha_dense": "mlp_gate"}


class Idefics(Importer):
    """transformers' `IdeficsForVisionText2Text` as the strategy `gated-xattn`.

    A LLaMA with a few tokens more, a vision tower with its class token, a perceiver resampler if
    the checkpoint uses one, and gated cross-attention.
    """

    MODEL_TYPES = ("idefics",)

    def config(self, whole: Any, name: str, source: str, folder: Path) -> dict[str, Any]:
        """Return the config of the same model; see `Importer.config`.

        Raises:
            CheckpointError: its blocks do not stand before every n-th layer.
        """
        every, layers = whole.cross_layer_interval, whole.num_hidden_layers
        if layers % every:
            raise CheckpointError(
                f"'{name}' has cross_layer_interval {every}, which does not divide its {layers} "
                "layers; transformers cannot run it either."
            )
        tokenizer = load_tokenizer(folder, f"the weights '{name}'")
        end = END if END in tokenizer.get_vocab() else ""
        return {
            "strategy": "gated-xattn",
            "backbone": {"name": "llama", "weights": name},
            "encoder": {"name": "vision", "weights": source},
            "perceive": {"name": "latents", **_resampler(whole)} if whole.use_resampler else None,
            "inject": {
                "name": "gated-xattn",
                "every": every,
                "heads": whole.num_attention_heads,
                "hidden": whole.intermediate_size,
                "activation": whole.hidden_act,
                "qk_norm": whole.qk_layer_norms,
                "gate": "vector" if whole.alpha_type == "vector" else "scalar",
                "epsilon": whole.rms_norm_eps,
            },
            "prompt": {
                "template": _TEMPLATE.replace("END", end),
                # A picture has no position of its own. The token that stands for it sees it.
                "before_image": FAKE,
                "after_image": IMAGE + FAKE,
                "before_next_image": "",
            },
        }

    def state(self, whole: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of the blocks and the resampler; see `Importer.state`."""
        count = whole.num_hidden_layers // whole.cross_layer_interval
        blocks = blocks_from_idefics(
            tensors, count, whole.qk_layer_norms, "gated_cross_attn_layers."
        )
        state = {f"injector.blocks.{key}": value for key, value in blocks.items()}
        if whole.use_resampler:
            config = ResamplerConfig(**_resampler(whole))
            found = from_idefics(tensors, config, "perceiver_resampler.")
            state |= {f"perceiver.resampler.{key}": value for key, value in found.items()}
        return state

    def language_model(self, folder: Path, dtype: Any) -> PreTrainedModel:
        """Load the LLaMA, the rows of the further tokens appended; see `Importer.language_model`.

        As the model card has it, `<end_of_utterance>` ends an answer, and an answer shows no
        picture.
        """
        from transformers import LlamaConfig, LlamaForCausalLM

        what = f"the language model in '{folder}'"
        whole = read_config(folder, f"the weights in '{folder}'")
        shared = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
            "hidden_act max_position_embeddings rms_norm_eps rope_parameters tie_word_embeddings "
            "pad_token_id bos_token_id eos_token_id dtype"
        )
        config = LlamaConfig(**{key: getattr(whole, key) for key in shared.split()})
        with quiet():
            lm = load_whole(LlamaForCausalLM, folder, what, config=config, dtype=dtype)
        if whole.additional_vocab_size:
            _append(lm, TensorFiles(folder), whole.additional_vocab_size, what)
        ids = load_tokenizer(folder, what).get_vocab()
        if FAKE not in ids or IMAGE not in ids:
            raise CheckpointError(
                f"the tokenizer of {what} has no {FAKE} or no {IMAGE}. Put the checkpoint's own "
                "tokenizer files beside its weights."
            )
        settings = lm.generation_config
        settings.suppress_tokens = [ids[token] for token in (FAKE, IMAGE)]
        if END in ids:
            settings.eos_token_id = ids[END]
        loaded: PreTrainedModel = lm
        return loaded


def blocks_from_idefics(
    tensors: Mapping[str, Tensor], count: int, qk_norm: bool, prefix: str = ""
) -> dict[str, Tensor]:
    """Return the state of the injector's blocks.

    Args:
        tensors: with the names of a list of `IdeficsGatedCrossAttentionLayer`s' state.
        count: how many there are.
        qk_norm: whether they normalise queries and keys.
        prefix: before the names.

    Raises:
        KeyError: a tensor is missing.
    """
    names = _NAMES | (_QK_NORM if qk_norm else {})
    state = {}
    for index in range(count):
        for theirs, ours in names.items():
            state[f"{index}.{ours}.weight"] = tensors[f"{prefix}{index}.{theirs}.weight"]
        for theirs, ours in _GATES.items():
            state[f"{index}.{ours}"] = tensors[f"{prefix}{index}.{theirs}"].flatten()
    return state


def _resampler(whole: Any) -> dict[str, Any]:
    its = whole.perceiver_config
    return {
        "latents": its.resampler_n_latents,
        "depth": its.resampler_depth,
        "heads": its.resampler_n_heads,
        "head_width": its.resampler_head_dim,
        "qk_norm": its.qk_layer_norms_perceiver,
    }


@torch.no_grad()
def _append(lm: Any, tensors: Mapping[str, Tensor], count: int, what: str) -> None:
    """Give a LLaMA the further rows that Idefics keeps in tables of their own."""
    own, width = lm.config.vocab_size, lm.config.hidden_size
    lm.resize_token_embeddings(own + count, mean_resizing=False)
    tables = {"embed_tokens.additional_embedding.weight": lm.get_input_embeddings()}
    if not lm.config.tie_word_embeddings:
        tables["lm_head.additional_fc.weight"] = lm.get_output_embeddings()
    for name, table in tables.items():
        rows = tensors.get(name)
        if rows is None or rows.shape != (count, width):
            got = "is missing" if rows is None else f"has shape {tuple(rows.shape)}"
            raise CheckpointError(
                f"{what} does not fit its config: {name} {got}, the config asks for "
                f"{(count, width)}. Fetch it again."
            )
        table.weight[own:] = rows
