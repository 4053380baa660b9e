"""Loading an LLM in 8 or 4 bit (bitsandbytes), and over several devices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ipn_core.errors import ConfigError

if TYPE_CHECKING:
    from ipn_core.config import BackboneConfig

__all__ = ["load_options", "not_supported_reasons"]


def not_supported_reasons(config: BackboneConfig) -> list[str]:
    """Say why this machine cannot hold the LLM as a config asks; empty if it can."""
    from transformers.utils.import_utils import is_bitsandbytes_available

    asked = [f"backbone.quantize '{config.quantize}'"] if config.quantize != "none" else []
    asked += [f"backbone.device_map '{config.device_map}'"] if config.device_map else []
    if not asked:
        return []
    reasons = []
    if not torch.cuda.is_available():
        reasons.append(f"torch sees no CUDA device, which {' and '.join(asked)} must have")
    if config.quantize != "none" and not is_bitsandbytes_available():
        reasons.append(
            f"{asked[0]} needs the package bitsandbytes; pip install 'ipn-core[quantize]'"
        )
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if config.device_map and processes > 1:
        reasons.append(
            f"backbone.device_map '{config.device_map}' spreads the LLM over the GPUs of one "
            f"process, and there are {processes}"
        )
    return reasons


def load_options(config: BackboneConfig) -> dict[str, Any]:
    """Return what transformers' `from_pretrained` is told about dtype, bits and devices.

    Raises:
        ConfigError: this machine cannot do it.
    """
    if reasons := not_supported_reasons(config):
        raise ConfigError(f"{'; '.join(reasons)}.")
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if config.device_map:
        options["device_map"] = config.device_map
    if config.quantize != "none":
        from transformers import BitsAndBytesConfig

        if config.quantize == "8bit":
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
        else:
            # The settings of QLoRA (arXiv 2305.14314, section 3).
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
            )
    return options
