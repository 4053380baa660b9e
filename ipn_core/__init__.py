"""IPN: a modular plugin framework for Interactive Perception Networks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipn_core.answer import Answer as Answer
    from ipn_core.answer import Answers as Answers
    from ipn_core.backbone import Backbone as Backbone
    from ipn_core.config import Config as Config
    from ipn_core.dialogue import Dialogue as Dialogue
    from ipn_core.features import VisualFeatures as VisualFeatures
    from ipn_core.hooks import hookimpl as hookimpl
    from ipn_core.model import IPN as IPN
    from ipn_core.prompt import Prompt as Prompt
    from ipn_core.stages import Connector as Connector
    from ipn_core.stages import Dims as Dims
    from ipn_core.stages import Injector as Injector
    from ipn_core.stages import Interaction as Interaction
    from ipn_core.stages import LayerInjector as LayerInjector
    from ipn_core.stages import Request as Request
    from ipn_core.stages import Requester as Requester
    from ipn_core.stages import VisionEncoder as VisionEncoder
    from ipn_core.stages import VisualMessage as VisualMessage
    from ipn_core.tasks import Example as Example
    from ipn_core.tasks import Picture as Picture
    from ipn_core.tasks import Task as Task

_EXPORTS = {
    "answer": ("Answer", "Answers"),
    "backbone": ("Backbone",),
    "config": ("Config",),
    "dialogue": ("Dialogue",),
    "features": ("VisualFeatures",),
    "hooks": ("hookimpl",),
    "model": ("IPN",),
    "prompt": ("Prompt",),
    "stages": ("Connector", "Dims", "Injector", "Interaction", "LayerInjector", "Request",
               "Requester", "VisionEncoder", "VisualMessage"),
    "tasks": ("Example", "Picture", "Task"),
}  # fmt: skip
_HOME = {name: module for module, names in _EXPORTS.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ipn_core' has no attribute '{name}'")
    return getattr(import_module(f"ipn_core.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
