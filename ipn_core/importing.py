"""Importers: a published checkpoint in the format of transformers becomes a model of ours.

`llava:SOURCE` names the importer `llava` and a folder or hub id. It works wherever a model can be
named, and as `backbone.weights`, where it stands for the language model inside of the checkpoint.
A plugin adds an importer with `registry.importer("llava", "module:Class")`.
"""

from __future__ import annotations

import contextlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.config import IPNConfig
from ipn_core.errors import CheckpointError, IPNError, UserError, unknown_name
from ipn_core.locate import fetch_from_hub, locate_weights
from ipn_core.pretrained import TensorFiles, load_whole, quiet, read_config, refuse_pickles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ipn_core.model import IPN
    from ipn_core.plugins import Component, Registry

__all__ = ["Imported", "Importer", "find_import", "readers"]

_NAME = re.compile(r"([A-Za-z][\w-]+):(?!//)(.*)", re.DOTALL)
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_TEXT_PART = {
    r"^(?:model\.)?language_model\.(?=model\.|lm_head\.)": "",
    r"^(?:model\.)?language_model\.(?!model\.|lm_head\.)": "model.",
}
"""From the names of a composite model's tensors to those of its language model alone."""


class Importer(ABC):
    """Knows one published architecture.

    Attributes:
        MODEL_TYPES: the transformers `model_type`s of the checkpoints that it reads.
    """

    MODEL_TYPES: tuple[str, ...] = ()

    @abstractmethod
    def config(self, whole: Any, name: str, source: str, folder: Path) -> dict[str, Any]:
        """Return the mapping of an `IPNConfig` that makes the same model.

        Args:
            whole: the checkpoint's config, a transformers `PretrainedConfig`.
            name: such as "llava:SOURCE", what `backbone.weights` must say.
            source: SOURCE, what the perceiver `vision` is given as `weights`.
            folder: where the files lie.
        """

    @abstractmethod
    def state(self, whole: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the stages' weights by the names of `IPN.trained_state()`.

        Args:
            whole: the checkpoint's config.
            tensors: of the checkpoint by name, without a leading "model."; read when asked for.

        Raises:
            KeyError: a tensor is missing.
        """

    def language_model(self, folder: Path, dtype: Any) -> PreTrainedModel:
        """Load the language model alone, by default that of the config's text part.

        Args:
            folder: of the whole checkpoint.
            dtype: to hold it in, or "auto".

        Raises:
            CheckpointError: its weights are missing or do not fit.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        what = f"the language model in '{folder}'"
        config = read_config(folder, f"the weights in '{folder}'").get_text_config()
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise CheckpointError(
                f"{what} is a {type(config).__name__}, for which transformers has no causal "
                "language model. Import a checkpoint on LLaMA, Vicuna or OPT."
            )
        with quiet():
            lm: PreTrainedModel = load_whole(
                MODEL_FOR_CAUSAL_LM_MAPPING[type(config)],
                folder,
                what,
                config=config,
                dtype=dtype,
                key_mapping=_TEXT_PART,
            )
        return lm


@dataclass(frozen=True)
class Imported:
    """A checkpoint and the importer that reads it.

    Attributes:
        name: as the user gave it, such as "llava:SOURCE".
        source: the part after the colon.
        folder: where the files lie.
        importer: what reads them.
        component: under which the importer is registered.
        registry: where it was looked up.
    """

    name: str
    source: str
    folder: Path
    importer: Importer
    component: Component
    registry: Registry

    @cached_property
    def whole(self) -> Any:
        """The checkpoint's config, checked to be of the importer's architecture.

        Raises:
            CheckpointError: it is of another one, unreadable, or its weights are pickled.
        """
        refuse_pickles(self.folder, f"the weights '{self.name}'")
        config = read_config(self.folder, f"the weights '{self.name}'")
        if config.model_type not in self.importer.MODEL_TYPES:
            others = readers(config.model_type, self.registry)
            named = " or ".join(f"'{other}:{self.source}'" for other in others)
            raise CheckpointError(
                f"'{self.name}': '{self.source}' holds a model of type '{config.model_type}', "
                f"which {self.component.name} does not read. "
                f"{named or 'No importer that is installed'} does."
            )
        return config

    def config(self) -> IPNConfig:
        """Return the config of the model that it becomes.

        Raises:
            StageError: the importer failed; the text names its plugin.
        """
        whole = self.whole
        with self.component.running("config"):
            values = self.importer.config(whole, self.name, self.source, self.folder)
        return IPNConfig.resolve(values, self.registry, f"the config of '{self.name}'")

    def state(self, model: IPN) -> dict[str, Tensor]:
        """Return the weights of a model that was made from the config; slots add nothing.

        Raises:
            CheckpointError: the checkpoint lacks a tensor.
            StageError: the importer failed; the text names its plugin.
        """
        whole, tensors = self.whole, TensorFiles(self.folder)
        with self.component.running("state"):
            try:
                state = self.importer.state(whole, tensors)
            except KeyError as error:
                raise CheckpointError(
                    f"the weights '{self.name}' have no tensor {error}. Fetch them again."
                ) from None
        slots = {f"slots.{k}": v for k, v in model.slots.state_dict().items()}
        return {**slots, "slots.image": torch.zeros_like(slots["slots.image"]), **state}

    def language_model(self, dtype: Any) -> PreTrainedModel:
        """Load its language model alone; see `Importer.language_model`."""
        _ = self.whole
        with self.component.running("language_model"):
            return self.importer.language_model(self.folder, dtype)


def find_import(name: str | Path, registry: Registry) -> Imported | None:
    """Find what `importer:source` names, fetching from the hub; None for any other name.

    Raises:
        UserError: nothing stands after the colon.
        UnknownNameError: there is no such importer, folder or hub id.
        DownloadError: the hub cannot be reached.
    """
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None or os.path.exists(name):
        return None
    prefix, source = found.groups()
    known = registry.entries("importer")
    if prefix not in known:
        raise unknown_name("importer", prefix, known, "ipn plugins")
    if not source:
        raise UserError(
            f"'{name}' names no checkpoint: give a folder or a hub id after the colon, such as "
            f"'{prefix}:owner/name'."
        )
    place = locate_weights(source, registry)
    if isinstance(place, str):
        place = fetch_from_hub(place, _FILES, f"the weights '{name}'")
    target: Any = known[prefix].load()
    with known[prefix].building():
        importer: Importer = target()
    return Imported(str(name), source, place, importer, known[prefix], registry)


def readers(model_type: object, registry: Registry) -> list[str]:
    """Return the importers that read checkpoints of a transformers `model_type`."""
    found = []
    for name, component in sorted(registry.entries("importer").items()):
        with contextlib.suppress(IPNError):  # one that cannot be imported reads nothing
            if model_type in component.load().MODEL_TYPES:
                found.append(name)
    return found
