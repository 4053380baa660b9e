"""From weights of any Hugging Face model to its vision tower alone."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ipn_core.errors import UserError
from ipn_core.locate import fetch_from_hub, locate_weights
from ipn_core.pretrained import (
    TensorFiles,
    load_error,
    load_pretrained,
    quiet,
    read_config,
    refuse_misfits,
    refuse_pickles,
)

__all__ = ["TOWERS", "fetch", "load_tower", "named_tower"]

TOWERS = {
    "altclip_vision_model": "AltCLIPVisionModel",
    "blip_2_vision_model": "Blip2VisionModel",
    "blip_vision_model": "BlipVisionModel",
    "clipseg_vision_model": "CLIPSegVisionModel",
    "git_vision_model": "GitVisionModel",
    "idefics_vision": "ipn_vision.idefics:IdeficsVisionTower",
    "idefics2_vision": "Idefics2VisionTransformer",
    "instructblip_vision_model": "InstructBlipVisionModel",
    "instructblipvideo_vision_model": "InstructBlipVideoVisionModel",
    "kosmos_2_vision_model": "Kosmos2VisionModel",
    "metaclip_2_vision_model": "MetaClip2VisionModel",
    "xclip_vision_model": "XCLIPVisionModel",
}
"""The classes of towers that `AutoModel` refuses, by the `model_type` of their config; without a
module they stand beside the config."""

_UNUSED = re.compile(r"^(pooler|head|classifier|visual_projection)\b|mask_token$")
"""Weights of a tower that no patch feature depends on; some checkpoints leave them out."""


def fetch(name: str) -> Path:
    """Return the folder of some weights, fetched from the hub if need be; never pickles.

    Raises:
        UnknownNameError: it is no known name, folder or hub id.
        DownloadError: the hub cannot be reached or refuses.
    """
    found = locate_weights(name)
    if isinstance(found, Path):
        return found
    return fetch_from_hub(found, ["*.json", "*.safetensors"], f"vision weights '{name}'")


def load_tower(folder: Path, dtype: Any) -> Any:
    """Load the vision tower of a folder; of a composite model (CLIP, BLIP-2, …) only that part.

    Args:
        folder: config.json and safetensors.
        dtype: to hold it in, or "auto" for the one it was saved in.

    Returns:
        The tower, in eval mode.

    Raises:
        CheckpointError: files are missing, damaged or pickled, or lack weights of the tower.
        UserError: there is no vision tower in it, or none that takes pictures as pixels.
    """
    with quiet():
        whole = read_config(folder, f"vision weights '{folder}'")
        config = getattr(whole, "vision_config", None) or whole
        cls = _class_of(config, folder)
        return _load(cls, folder, config, dtype).eval()


def named_tower(config: Any) -> Any:
    """Return the class that `TOWERS` names for a config's class."""
    beside = config.__module__.replace(".configuration_", ".modeling_")
    module, _, name = TOWERS[config.model_type].rpartition(":")
    return getattr(importlib.import_module(module or beside), name)


def _class_of(config: Any, folder: Path) -> Any:
    from transformers import MODEL_MAPPING

    if config.model_type in TOWERS:
        cls = named_tower(type(config))
    elif type(config) in MODEL_MAPPING:
        cls = MODEL_MAPPING[type(config)]
    else:
        raise UserError(
            f"'{folder}' holds a {type(config).__name__}, for which transformers has no model of "
            f"its own. Known towers beside those of AutoModel: {', '.join(sorted(TOWERS))}."
        )
    if "pixel_values" not in inspect.signature(cls.forward).parameters:
        raise UserError(
            f"'{folder}' holds no vision tower that takes pixel values: its {cls.__name__} takes "
            f"'{cls.main_input_name}'. Give CLIP, SigLIP, DINOv2, ViT or the like."
        )
    return cls


def _load(cls: Any, folder: Path, config: Any, dtype: Any) -> Any:
    what = f"the vision weights in '{folder}'"
    refuse_pickles(folder, what)
    options = {"config": config, "dtype": dtype}
    tower, misfits = load_pretrained(cls, folder, what, **options)
    try:
        prefix = _prefix(folder, _needed(misfits))
    except Exception as error:  # another file of the folder is damaged
        raise load_error(folder, what, error) from error
    if prefix:
        options["key_mapping"] = {f"^{re.escape(prefix)}": ""}
        tower, misfits = load_pretrained(cls, folder, what, **options)
    refuse_misfits(_needed(misfits).values(), tower, what)
    return tower


def _needed(misfits: dict[str, str]) -> dict[str, str]:
    return {key: why for key, why in misfits.items() if not _UNUSED.search(key)}


def _prefix(folder: Path, lacking: Iterable[str]) -> str:
    """Return what stands before the tower's own names in the files, or an empty text."""
    keys = [key for key in TensorFiles(folder).names() if "vision" in key]
    for name in lacking:
        ends = [key for key in keys if key.endswith(f".{name}")]
        if len(ends) == 1:
            return ends[0].removesuffix(name)
    return ""
