"""Checkpoints: `config.json` and `model.safetensors`, exactly what was trained, never pickle.

A model folder is one checkpoint, or a folder with an index `models.json` that names several, one
a strategy: `{"default": "rvii", "strategies": ["rvii", "static"]}`, each in a folder of its name.
A model may also come from a published checkpoint of another format; see `ipn_core.importing`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ipn_core.config import IPNConfig
from ipn_core.errors import CheckpointError, ConfigError, near
from ipn_core.files import atomic_write, make_folder
from ipn_core.importing import Imported, find_import, readers
from ipn_core.locate import PICKLES, locate_model
from ipn_core.plugins import Registry, get_registry

if TYPE_CHECKING:
    from ipn_core.backbone import Backbone
    from ipn_core.model import IPN
    from ipn_core.stages import VisionEncoder

Model = TypeVar("Model", bound="IPN")

__all__ = [
    "CONFIG",
    "INDEX",
    "WEIGHTS",
    "Source",
    "config_path",
    "load",
    "load_state",
    "open_source",
    "read_config",
    "save",
    "strategies_of",
]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "models.json"
DIGEST = "sha256"
"""The entry of the weights' header that holds the digest of their tensors."""
FORMAT = 1
"""Version of the folder's format, in `config.json`."""


def save(
    model: IPN,
    folder: Path,
    dtype: torch.dtype | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint, so that wherever this ends the folder holds the old one or the new one.

    What makes it the new one is the replacement of its weights. Until then the new config waits
    beside the old one, under a name that holds the digest of the weights it goes with.

    Args:
        model: what to save.
        folder: made if it is not there.
        dtype: cast floating-point tensors to it, None keeps theirs.
        weights: its `trained_state`, where that was put together from several processes.
    """
    from safetensors.torch import save as to_bytes

    state = {
        k: v.detach().cpu().to(dtype if dtype and v.is_floating_point() else v.dtype).contiguous()
        for k, v in (weights or model.trained_state()).items()
    }
    config = {"format": FORMAT, **model.config.model_dump(mode="json", exclude_none=True)}
    text = (json.dumps(config, indent=2) + "\n").encode()
    # One entry alone: safetensors writes several in any order, and equal weights are equal files.
    digest = _digest_of(state)
    content = to_bytes(state, metadata={DIGEST: digest})
    make_folder(folder)
    _settle(folder)
    path = folder / CONFIG
    if not path.is_file() or path.read_bytes() != text:
        atomic_write(folder / _waiting(digest), text)
    try:
        atomic_write(folder / WEIGHTS, content)
    finally:
        _settle(folder)


def _settle(folder: Path) -> None:
    """Keep the config that goes with the weights as `config.json`, and no other beside it."""
    if (found := config_path(folder)).name != CONFIG:
        atomic_write(folder / CONFIG, found.read_bytes())
    for waiting in folder.glob(_waiting("?" * 64)):
        waiting.unlink(missing_ok=True)


def _waiting(digest: str) -> str:
    return f".config.{digest}.json"


def load(
    cls: type[Model],
    source: str | Path | Source,
    *,
    interact: str | None = None,
    untrained: bool = False,
    backbone: Backbone | None = None,
    encoder: VisionEncoder | None = None,
    registry: Registry | None = None,
) -> Model:
    """Load a model by name, or one that `open_source` has found; see `IPN.from_pretrained`."""
    registry = registry or get_registry()
    found = source if isinstance(source, Source) else open_source(source, registry)
    chosen = found.strategies[0] if interact is None else interact
    trained = chosen in found.strategies
    if not trained and not untrained:
        raise CheckpointError(
            f"model '{found.name}' has no trained weights for interaction '{chosen}': it has "
            f"{', '.join(found.strategies)}{near(chosen, found.strategies)}. Choose one of them, "
            "train it with 'ipn train', or pass --untrained."
        )
    if trained:
        config = found.config(chosen, registry)
    else:
        registry.get("strategy", chosen)
        config = IPNConfig.resolve({**found.base(registry), "strategy": chosen}, registry, "config")
    model = cls.from_config(
        config, backbone=backbone, encoder=encoder, registry=registry, name=found.name
    )
    if trained:
        found.fill(model, chosen)
    return model


class Source(ABC):
    """Where a model comes from.

    Attributes:
        name: what the user called it.
        strategies: those that it has weights for, the default one first.
    """

    name: str
    strategies: tuple[str, ...]

    @abstractmethod
    def config(self, strategy: str, registry: Registry) -> IPNConfig:
        """Return the config of one of its strategies."""

    def base(self, registry: Registry) -> dict[str, Any]:
        """Return what a model with other stages takes over: backbone, encoder and prompt."""
        config = self.config(self.strategies[0], registry)
        # An adapter's weights go with the stages that it was trained with.
        without = {"backbone": {"lora"}}
        values = config.model_dump(mode="json", exclude_none=True, exclude=without)
        return {key: values[key] for key in ("backbone", "encoder", "prompt")}

    @abstractmethod
    def fill(self, model: IPN, strategy: str, anew: Collection[str] = ()) -> None:
        """Put the weights of a strategy into a model made from its config.

        Args:
            model: is filled.
            strategy: one of `strategies`.
            anew: names of weights that the model keeps as they are.

        Raises:
            CheckpointError: they do not fit; the model is left as it was.
        """


class _Folder(Source):
    """A model folder of ours."""

    def __init__(self, name: str, folders: dict[str, Path]) -> None:
        self.name = name
        self._folders = folders
        self.strategies = tuple(folders)

    def config(self, strategy: str, registry: Registry) -> IPNConfig:
        return read_config(self._folders[strategy])

    def fill(self, model: IPN, strategy: str, anew: Collection[str] = ()) -> None:
        weights = self._folders[strategy] / WEIGHTS
        load_state(model, {**read_weights(weights), **_own(model, anew)}, str(weights))


class _Import(Source):
    """A published checkpoint, through an importer."""

    def __init__(self, imported: Imported) -> None:
        self.name = imported.name
        self._imported = imported
        self._config = imported.config()
        self.strategies = (self._config.strategy or imported.component.name,)

    def config(self, strategy: str, registry: Registry) -> IPNConfig:
        return self._config

    def fill(self, model: IPN, strategy: str, anew: Collection[str] = ()) -> None:
        state = {**self._imported.state(model), **_own(model, anew)}
        load_state(model, state, self._imported.name)


def open_source(name: str | Path, registry: Registry) -> Source:
    """Find a model by known name, folder, hub id, or `importer:source`.

    Raises:
        UnknownNameError: there is nothing of that name.
        CheckpointError: it is no model, damaged, or pickled.
        DownloadError: it could not be fetched.
    """
    imported = find_import(name, registry)
    if imported is not None:
        return _Import(imported)

    found = partial(strategies_of, name=str(name), registry=registry)
    folder = locate_model(name, registry, check=found)
    return _Folder(str(name), found(folder))


def strategies_of(
    folder: Path, name: str = "", registry: Registry | None = None
) -> dict[str, Path]:
    """Return the checkpoints of a model folder by strategy, the default one first.

    Args:
        folder: of the model.
        name: what the user called it, by default the folder.
        registry: where the importers are looked up that could read it instead.

    Raises:
        CheckpointError: the folder is no model, its index is damaged, or it holds only pickles.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no model in '{folder}': no such folder.")
    index = folder / INDEX
    if index.is_file():
        content = _read_json(index)
        names, default = content.get("strategies"), content.get("default")
        plain = isinstance(names, list) and all(
            isinstance(n, str) and n and Path(n).name == n and n not in (".", "..") for n in names
        )
        if not plain or not names or default not in names:
            raise CheckpointError(
                f"'{index}' must hold 'strategies', a list of folder names, and 'default', one "
                "of them."
            )
        ordered = [default, *(n for n in names if n != default)]
        return {n: _inside(folder, folder / n) for n in ordered}
    if (path := config_path(folder)).is_file():
        content = _read_json(path)
        if "architectures" in content:
            raise _foreign(name or str(folder), content, registry or get_registry())
        interact = content.get("interact")
        if isinstance(interact, dict):
            interact = interact.get("name")
        return {str(content.get("strategy") or interact or "model"): folder}
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"'{folder}' holds pickled weights ({', '.join(pickles)}), which can run code when "
            "loaded: refused. Save them as safetensors."
        )
    raise CheckpointError(
        f"'{folder}' is no model of ours: it has neither {CONFIG} nor {INDEX}. Give a folder that "
        "'ipn train' wrote, or a name of 'ipn models list'."
    )


def _foreign(name: str, content: Mapping[str, Any], registry: Registry) -> CheckpointError:
    """Return the refusal of a folder in the format of transformers, which says how to name it."""
    held = content["architectures"]
    what = ", ".join(map(str, held)) if isinstance(held, list) else str(held)
    if found := readers(content.get("model_type"), registry):
        return CheckpointError(
            f"'{name}' holds a published model ({what}) in the format of transformers, which an "
            f"importer reads: name it {' or '.join(repr(f'{one}:{name}') for one in found)}."
        )
    return CheckpointError(
        f"'{name}' holds a model of transformers ({what}), and none of ours: no importer that is "
        "installed reads it. A language model alone is named in a config as backbone.weights."
    )


def read_config(folder: Path) -> IPNConfig:
    """Read and validate a checkpoint's config."""
    path = config_path(folder)
    content = _read_json(_inside(folder, path))
    version = content.pop("format", None)
    if version != FORMAT:
        raise CheckpointError(
            f"'{path}' has format {version!r}; this version reads {FORMAT}. Upgrade ipn-core or "
            "save the model again."
        )
    try:
        return IPNConfig.parse(content, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: it is missing, damaged, or no safetensors file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _inside(path.parent, path)
    if not path.is_file():
        others = sorted(p.name for p in path.parent.iterdir() if p.suffix in PICKLES)
        hint = (
            f"there is {', '.join(others)}, but pickled weights can run code when loaded: refused"
            if others
            else "the checkpoint is incomplete"
        )
        raise CheckpointError(f"no such file: '{path}' ({hint}). Save the model again.")
    try:
        state = load_file(path)
        promised = _promised(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' is damaged or no safetensors file ({error}). Fetch or save it again."
        ) from None
    if promised is not None and promised != _digest_of(state):
        raise CheckpointError(
            f"'{path}' is damaged: its tensors are not those that were saved (sha256). "
            "Fetch or save it again."
        )
    return state


def config_path(folder: Path) -> Path:
    """Return where the config of a checkpoint lies.

    That is `config.json`, unless a save was killed between replacing the weights and this.
    """
    from safetensors import SafetensorError

    path = folder / CONFIG
    if next(folder.glob(_waiting("?" * 64)), None) is None:
        return path
    try:
        waiting = folder / _waiting(_promised(folder / WEIGHTS) or "")
    except (SafetensorError, OSError, ValueError):
        return path
    return waiting if waiting.is_file() else path


def _promised(weights: Path) -> str | None:
    """Return the digest in a safetensors file's header; earlier versions wrote none."""
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        found: str | None = (file.metadata() or {}).get(DIGEST)
    return found


def _digest_of(state: Mapping[str, Tensor]) -> str:
    """Return the hexadecimal sha256 of tensors, their names, types and shapes.

    safetensors itself notices damage of its header alone.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_state(model: IPN, state: Mapping[str, Tensor], where: str) -> None:
    """Put trained weights into a model.

    Raises:
        CheckpointError: keys are missing, unexpected, of the wrong shape, or not finite; each is
            named and the model is left as it was.
    """
    expected = model.trained_state()
    faults = [f"missing {k}" for k in expected if k not in state]
    faults += [f"unexpected {k}{near(k, expected)}" for k in state if k not in expected]
    faults += [
        f"{k} has shape {tuple(v.shape)}, the config asks for {tuple(expected[k].shape)}"
        for k, v in state.items()
        if k in expected and v.shape != expected[k].shape
    ]
    faults += [
        f"{k} holds values that are not finite"
        for k, v in state.items()
        if v.is_floating_point() and not bool(torch.isfinite(v).all())
    ]
    if faults:
        shown = faults[:12] + ([f"and {len(faults) - 12} more"] if len(faults) > 12 else [])
        raise CheckpointError(
            f"the weights in '{where}' do not fit its config: " + "; ".join(shown) + "."
        )
    with torch.no_grad():
        for key, value in state.items():
            expected[key].copy_(value)


def _own(model: IPN, names: Collection[str]) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.trained_state().items() if k in names}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"no such file: '{path}'.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"'{path}' must hold an object.")
    return content


def _inside(folder: Path, path: Path) -> Path:
    """Refuse a link that leads out of the folder.

    The hub's cache links each file to its blobs, a folder beside the snapshot; that is allowed.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # links that lead round in a circle
        raise CheckpointError(f"'{path}' is a link that leads nowhere: refused.") from None
    if path.is_symlink() or not target.is_relative_to(folder.resolve()):
        blobs = folder.resolve().parent.parent / "blobs"
        if not target.is_relative_to(blobs):
            raise CheckpointError(f"'{path}' is a link out of its folder: refused.")
    return path
