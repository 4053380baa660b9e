"""From the resampler of Idefics in transformers to ours: other names for the same weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ipn_resampler.resampler import ResamplerConfig

__all__ = ["from_idefics"]

_NORM = ("weight", "bias")
_LINEAR = ("weight",)
_BLOCK = {
    "0.latents_layer_norm": ("attention.latents_norm", _NORM),
    "0.context_layer_norm": ("attention.tokens_norm", _NORM),
    "0.q_proj": ("attention.q", _LINEAR),
    "0.k_proj": ("attention.k", _LINEAR),
    "0.v_proj": ("attention.v", _LINEAR),
    "0.output_proj": ("attention.out", _LINEAR),
    "1.ln": ("mlp.0", _NORM),
    "1.fc": ("mlp.1", _LINEAR),
    "1.c_proj": ("mlp.3", _LINEAR),
}
_QK_NORM = {
    "0.q_layer_norm": ("attention.q_norm", _NORM),
    "0.k_layer_norm": ("attention.k_norm", _NORM),
}


def from_idefics(
    tensors: Mapping[str, Tensor], config: ResamplerConfig, prefix: str = ""
) -> dict[str, Tensor]:
    """Return the state of a `PerceiverResampler`.

    Args:
        tensors: with the names of an `IdeficsPerceiverResampler`'s state.
        config: of the resampler that they are for.
        prefix: before the names.

    Raises:
        KeyError: a tensor is missing.
    """
    names = _BLOCK | (_QK_NORM if config.qk_norm else {})
    state = {"latents": tensors[f"{prefix}latents"]}
    state |= {f"norm.{kind}": tensors[f"{prefix}layer_norm.{kind}"] for kind in _NORM}
    for index in range(config.depth):
        for theirs, (ours, kinds) in names.items():
            block = f"blocks.{index}."
            for kind in kinds:
                state[f"{block}{ours}.{kind}"] = tensors[f"{prefix}{block}{theirs}.{kind}"]
    return state
