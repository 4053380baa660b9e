"""Resizing and normalising: transformers' own processors over Pillow, by name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ipn_core.errors import CheckpointError, ConfigError, near

__all__ = ["WHOLE", "build_processor", "read_settings", "visible"]

WHOLE = (0.0, 0.0, 1.0, 1.0)
_PERCENT_BELOW = 384
"""ConvNeXt's processor crops a share of the middle where pictures become smaller than this."""
_FILES = ("preprocessor_config.json", "processor_config.json")


def read_settings(
    folder: Path,
    model_type: str,
    changes: Mapping[str, Any] | None,
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Return a processor's settings: the folder's, then what the config changes of them.

    Args:
        folder: the tower's.
        model_type: of the tower, which names the processor where no file does.
        changes: settings that win over the folder's; enough by themselves if it has none.
        image_size: (height, width) in pixels that whole pictures are resized to.

    Raises:
        CheckpointError: a file is damaged.
        ConfigError: there are no settings at all.
    """
    settings = {**_from_folder(folder), **(changes or {})}
    if not settings:
        raise ConfigError(
            f"the tower '{folder}' says nowhere how pictures are prepared ({' or '.join(_FILES)} "
            "is missing): give its settings as encoder.preprocess, such as "
            "{image_processor_type: CLIPImageProcessor, image_mean: […], image_std: […]}."
        )
    if "image_processor_type" not in settings:
        old = str(settings.pop("feature_extractor_type", ""))
        named = old.replace("FeatureExtractor", "ImageProcessor") or _named_by(model_type)
        settings["image_processor_type"] = named
    if image_size is not None:
        height, width = image_size
        settings.pop("image_size", None)  # Idefics' name for it, which would win
        settings["size"] = {"height": height, "width": width}
        settings["crop_size"] = {"height": height, "width": width}
        settings.update(do_resize=True, do_center_crop=False)
    return settings


def build_processor(settings: Mapping[str, Any]) -> Any:
    """Return the processor of some settings, the one that works on Pillow's pictures.

    Raises:
        ConfigError: transformers has no such processor, or it refuses a setting.
    """
    from transformers.models.auto.image_processing_auto import (
        IMAGE_PROCESSOR_MAPPING_NAMES,
        get_image_processor_class_from_name,
    )

    name = str(settings["image_processor_type"])
    base = name.removesuffix("Pil").removesuffix("Fast")
    known = {c for named in IMAGE_PROCESSOR_MAPPING_NAMES.values() for c in named.values()}
    chosen = next((n for n in (f"{base}Pil", base) if n in known), None)
    cls = get_image_processor_class_from_name(chosen) if chosen else None
    if cls is None or getattr(cls, "is_dummy", False):
        known_bases = sorted({c.removesuffix("Pil") for c in known if c and c.endswith("Pil")})
        raise ConfigError(
            f"transformers has no image processor '{name}' that works without torchvision"
            f"{near(base, known_bases)}. Name another one as encoder.preprocess."
            "image_processor_type."
        )
    try:
        return cls.from_dict(dict(settings))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the image processor '{name}' refuses its settings: {error}") from None


def visible(processor: Any, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the part of a picture (width, height) that a processor leaves, as fractions of it.

    Beyond 0 or 1 where it pads.
    """
    width, height = map(float, size)
    its, crop = processor.size, getattr(processor, "crop_size", None)
    edge = getattr(its, "shortest_edge", None)
    if getattr(processor, "do_resize", True) and edge:
        scale = edge / min(width, height)
        width, height = width * scale, height * scale
    elif getattr(processor, "do_resize", True) and getattr(its, "width", None):
        width, height = float(its.width), float(its.height)
    percent = getattr(processor, "crop_pct", None)
    if percent and edge and edge < _PERCENT_BELOW:
        across, down = percent * edge / width, percent * edge / height
    elif crop is not None and getattr(processor, "do_center_crop", False):
        across, down = crop.width / width, crop.height / height
    else:
        return WHOLE
    return ((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)


def _from_folder(folder: Path) -> dict[str, Any]:
    for name in _FILES:
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"'{path}' is not valid JSON ({error}).") from None
        # Newer processors keep the settings of pictures beside those of text.
        content = content.get("image_processor", content) if isinstance(content, dict) else {}
        if name == _FILES[0] or "image_processor_type" in content:
            return dict(content)
    return {}


def _named_by(model_type: str) -> str:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    short = model_type.removesuffix("_model").removesuffix("_vision")
    for name in (model_type, short):
        with contextlib.suppress(KeyError):
            return str(IMAGE_PROCESSOR_MAPPING_NAMES[name]["pil"])
    raise ConfigError(
        f"nothing names the image processor of a '{model_type}': give "
        "encoder.preprocess.image_processor_type."
    )
