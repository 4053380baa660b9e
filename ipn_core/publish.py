"""Publishing a checkpoint folder on the hub, with a model card that says how it came about."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ipn_core.checkpoint import CONFIG, WEIGHTS, config_path, strategies_of
from ipn_core.errors import IPNError, UserError, first_line
from ipn_core.training.metrics import METRICS, best_validation, last_validation, read_metrics

__all__ = ["model_card", "push"]

CARD = "README.md"
TRAINING = "train.json"
"""The resolved config that a training leaves in its folder."""
_BEST = "best"
"""The folder of the model of the best validation, in that of its training."""
_LIBRARIES = ("ipn-core", "torch", "transformers", "accelerate")


def push(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a checkpoint in one commit; a `README.md` that is there already is the card.

    Args:
        folder: one that `save_pretrained` or `ipn train` wrote, or an index of several.
        repository: `user/name` on the hub; made if it is not there.
        private: make it visible to nobody else, where it is made.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: the folder is no checkpoint.
        UserError: there is no token, the hub refuses it, or the repository's name is wrong.
        IPNError: the hub cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    files = dict(_files(folder))
    if not get_token():
        raise UserError(
            "there is no token for the hub. Log in with 'hf auth login' or set HF_TOKEN."
        )
    if CARD not in files:
        files[CARD] = model_card(folder, repository).encode()
    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(
            made.repo_id,
            [CommitOperationAdd(path, content) for path, content in files.items()],
            commit_message="Upload a model of ipn-core",
        )
    except Exception as error:  # of huggingface_hub or of the HTTP client that it uses now
        raise _refusal(repository, error) from error
    return str(made)


def model_card(folder: Path, repository: str) -> str:
    """Return a model card: what the model is, its scores, how it was trained and with what.

    Args:
        folder: a checkpoint; scores come from the files in it that `ipn eval --json` wrote, and the
            training from `train.json` in it or next to it, with the validations of its
            `metrics.jsonl`.
        repository: where it will lie.
    """
    from huggingface_hub import ModelCardData

    path = config_path(next(iter(strategies_of(folder).values())))
    config = json.loads(path.read_text("utf-8"))
    base = config.get("backbone", {}).get("weights")
    data = ModelCardData(
        library_name="ipn-core",
        pipeline_tag="image-text-to-text",
        tags=["interactive-perception-network", *strategies_of(folder)],
        base_model=base
        if isinstance(base, str) and base.count("/") == 1 and base[0] != "/"
        else None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {repository.rpartition('/')[2]}",
        "A frozen language model that asks a picture for what a question needs, trained with "
        f"ipn-core. It holds what was trained; language model ({base}) and vision encoder are "
        "named in its config and fetched from where they lie.",
        f'```python\nfrom ipn_core import IPN\n\nmodel = IPN.from_pretrained("{repository}")\n'
        'print(model.ask("picture.png", "Is there a dog?").text)\n```',
    ]
    if scores := list(_scores(folder)):
        head = "| task | split | questions | right | 95 % interval |\n|---|---|---|---|---|"
        parts += ["## Scores", "\n".join([head, *scores])]
    if (training := _training(folder)) is not None:
        parts += [
            "## Training",
            f"With [`{TRAINING}`]({TRAINING}) of this repository:",
            f"```\nipn train {TRAINING}\n```",
        ]
        if validated := _validated(training.with_name(METRICS), folder.resolve().name == _BEST):
            head = "| validated on | right |\n|---|---|"
            parts += ["\n".join([head, *validated])]
    parts += [
        "## Config",
        f"```json\n{json.dumps(config, indent=2, ensure_ascii=False)}\n```",
        "## Versions",
        ", ".join(f"{name} {number}" for name, number in _versions().items()),
    ]
    return "\n\n".join(parts) + "\n"


def _files(folder: Path) -> Iterator[tuple[str, Path | bytes]]:
    """Return what belongs into the repository, by its path there."""
    if (folder / "model" / CONFIG).is_file() and (folder / TRAINING).is_file():
        best = folder / _BEST
        other = f", or '{best}' for the best one on its validation examples"
        raise UserError(
            f"'{folder}' is a training. Push the model in it: '{folder / 'model'}'"
            f"{other if config_path(best).is_file() else ''}."
        )
    parts = {folder, *strategies_of(folder).values()}
    for part in sorted(parts):
        found = {
            path.name: path
            for path in sorted(part.iterdir())
            # Not what a killed process left, whose name starts with a dot.
            if (path.suffix in (".json", ".md") or path.name == WEIGHTS)
            and not path.name.startswith(".")
            and path.is_file()
        }
        if (config := config_path(part)).is_file():
            found[CONFIG] = config  # which has another name where a save was killed
        for name, path in found.items():
            yield (part / name).relative_to(folder).as_posix(), path
    training = _training(folder)
    if training is not None and training.parent != folder:
        yield TRAINING, training


def _training(folder: Path) -> Path | None:
    places = (folder / TRAINING, folder.resolve().parent / TRAINING)
    return next((place for place in places if place.is_file()), None)


def _scores(folder: Path) -> Iterator[str]:
    """Return a row of the table for each file that `ipn eval --json` wrote."""
    for path in sorted(folder.glob("*.json")):
        try:
            found = json.loads(path.read_text("utf-8"))
        except ValueError:
            continue
        if (
            isinstance(found, Mapping)
            and {"task", "split", "n", "accuracy", "ci95"} <= found.keys()
        ):
            yield _score(found)


def _validated(path: Path, best: bool) -> list[str]:
    """Return rows of the validation that shows a training's model: the best, or the last one."""
    entries = read_metrics(path)
    entry = best_validation(entries) if best else last_validation(entries)
    if entry is None:
        return []
    where = f"stage {entry['stage']}, step {entry['step']}"
    rows = {f"all, after {where}": entry["accuracy"], **entry["by_type"]}
    return [f"| {name} | {100 * accuracy:.1f} % |" for name, accuracy in rows.items()]


def _score(found: Mapping[str, Any]) -> str:
    shuffled = ", requests shuffled" if found.get("shuffled") else ""
    low, high = found["ci95"]
    return (
        f"| {found['task']} | {found['split']}{shuffled} | {found['n']:,} | "
        f"{100 * found['accuracy']:.1f} % | {100 * low:.1f}–{100 * high:.1f} % |"
    )


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}}


def _refusal(repository: str, error: Exception) -> IPNError:
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, HFValidationError):
        return UserError(f"'{repository}' is no name for a repository: {first_line(error)}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return UserError(
            f"the hub does not let you write to '{repository}': {first_line(error)} Use a token "
            "with write access: 'hf auth login'."
        )
    return IPNError(
        f"cannot push to '{repository}': {first_line(error)} Nothing was published; try again "
        "where the hub can be reached."
    )
