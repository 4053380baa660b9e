"""Models of transformers: loaded from safetensors alone, and no tensor is left at random unsaid."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.errors import CheckpointError, IPNError, first_line
from ipn_core.locate import hub_error, locate_weights

if TYPE_CHECKING:
    from ipn_core.plugins import Registry

__all__ = [
    "TensorFiles",
    "load_error",
    "load_named",
    "load_pretrained",
    "load_whole",
    "quiet",
    "read_config",
    "refuse_misfits",
    "refuse_pickles",
]

SHOWN = 6
"""How many tensors an error names."""


def load_pretrained(
    cls: Any, source: Path | str, what: str, **options: Any
) -> tuple[Any, dict[str, str]]:
    """Load a model with transformers, which leaves what it cannot fill at random.

    Args:
        cls: a model's class or an `AutoModel…`.
        source: a folder or a hub id.
        what: names the weights in errors, such as "the weights 'smollm2'".
        options: further arguments of `from_pretrained`.

    Returns:
        The model, and for each tensor that the weights do not fill, by name, what is wrong with
        it; see `refuse_misfits`. A tensor that is tied to one that is there is not among them.

    Raises:
        CheckpointError: files are missing, damaged, or of no architecture that `cls` takes.
        UnknownNameError: the hub has no such repository.
        DownloadError: the hub cannot be reached.
    """
    try:
        model, info = cls.from_pretrained(
            source,
            use_safetensors=True,
            # Said, because transformers asks the user on the terminal where it is not.
            trust_remote_code=False,
            output_loading_info=True,
            # Else transformers raises at a wrong shape, and does not say of which tensor.
            ignore_mismatched_sizes=True,
            **options,
        )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise load_error(source, what, error) from error
    misfits = {key: f"missing {key}" for key in sorted(info["missing_keys"])}
    for key, got, wanted in sorted(info["mismatched_keys"]):
        misfits[key] = f"{key} has shape {tuple(got)}, the config asks for {tuple(wanted)}"
    return model, misfits


def load_whole(cls: Any, source: Path | str, what: str, **options: Any) -> Any:
    """Load a model with transformers, every tensor of it; see `load_pretrained`.

    Raises:
        CheckpointError: the weights leave tensors at random; these are named.
    """
    model, misfits = load_pretrained(cls, source, what, **options)
    refuse_misfits(misfits.values(), model, what)
    return model


def load_named(
    cls: Any, name: str, what: str, registry: Registry | None = None, **options: Any
) -> tuple[Any, Path | str]:
    """Load a model with transformers by a known name, a folder or a hub id.

    Args:
        cls: a model's class or an `AutoModel…`.
        name: of the weights.
        what: names them in errors, such as "the weights 'smollm2'".
        registry: where known names are looked up.
        options: further arguments of `from_pretrained`.

    Returns:
        The model, and where it came from: a folder or a hub id.

    Raises:
        CheckpointError: files are missing, damaged or pickled, or leave tensors at random.
        UnknownNameError: there is nothing of that name.
        DownloadError: they could not be fetched.
    """
    source = locate_weights(name, registry)
    if isinstance(source, Path):
        refuse_pickles(source, what)
    return load_whole(cls, source, what, **options), source


def read_config(folder: Path, what: str) -> Any:
    """Read the config of weights in the format of transformers.

    Args:
        folder: where they lie.
        what: names them in errors, such as "the weights 'smollm2'".

    Raises:
        CheckpointError: there is none that transformers can read.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{what} have no config.json: there is none in '{folder}'. Give the folder of a "
            "checkpoint in the format of transformers, or its hub id."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{what} have no config.json that transformers can read: {first_line(error)}"
        ) from None


def load_error(source: Path | str, what: str, error: Exception) -> IPNError:
    """Return what to raise where transformers fails to load something."""
    found = hub_error(what, error, source) if isinstance(source, str) else None
    return found or CheckpointError(
        f"{what} cannot be loaded: {first_line(error)} Fetch or save them again."
    )


def refuse_misfits(misfits: Collection[str], model: Any, what: str) -> None:
    """Refuse weights that leave tensors of a model at random.

    Args:
        misfits: what is wrong with each.
        model: the model, for its name.
        what: names the weights.

    Raises:
        CheckpointError: there are any; the first of them are named.
    """
    if misfits:
        faults = list(misfits)[:SHOWN]
        if len(misfits) > SHOWN:
            faults.append(f"and {len(misfits) - SHOWN} more")
        raise CheckpointError(
            f"{what} do not fit their config of a {type(model).__name__}: {'; '.join(faults)}. "
            "Fetch or save them again."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting the parts of a checkpoint that are left out on purpose."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def refuse_pickles(folder: Path, what: str) -> None:
    """Refuse a folder whose weights are pickled; pickles beside safetensors are never read.

    Raises:
        CheckpointError: they are.
    """
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{what} are pickled ({', '.join(pickles)}), which can run code when loaded: refused. "
            "Convert them to safetensors first."
        )


class TensorFiles(Mapping[str, Tensor]):
    """The tensors in a folder's safetensors by name, a leading "model." removed; read on demand.

    Attributes:
        folder: one file, or several with or without an index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _places(self) -> dict[str, tuple[Path, str]]:
        """The file and the full name of each."""
        from safetensors import SafetensorError, safe_open

        index = self.folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                names = [(self.folder / file, name) for name, file in listed.items()]
            else:
                names = []
                for path in sorted(self.folder.glob("*.safetensors")):
                    with safe_open(path, "pt") as file:
                        names += [(path, name) for name in file.keys()]  # noqa: SIM118 no mapping
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"the weights in '{self.folder}' cannot be read: {first_line(error)} Fetch them "
                "again."
            ) from None
        return {name.removeprefix("model."): (path, name) for path, name in names}

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: there is none of that name.
            CheckpointError: its file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        path, full = self._places[name]
        try:
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(full)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"'{path}' cannot be read: {first_line(error)} Fetch the weights again."
            ) from None
        return tensor

    def names(self) -> list[str]:
        """Return the full names, a leading "model." kept; only headers are read."""
        return [full for _, full in self._places.values()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
