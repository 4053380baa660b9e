"""What lmms-eval's entry-point group `lmms_eval.models` calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["manifest"]


def manifest() -> ModelManifest:
    """Name the model `ipn`; its class is imported when somebody asks for it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("ipn", chat_class_path="ipn_lmms_eval.model.IPNModel")
