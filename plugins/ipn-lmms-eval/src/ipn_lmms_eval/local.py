"""IPN tasks as tasks of lmms-eval, from a folder: `python -m ipn_lmms_eval TASK FOLDER`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipn_core.errors import DataError, UserError
from ipn_core.evaluation.scoring import matches
from ipn_core.images import load_image
from ipn_core.tasks import Picture, open_task

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["pictures", "score", "write_task"]

_YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function ipn_lmms_eval.local.pictures
doc_to_text: question
doc_to_target: "{{{{answers[0]}}}}"
process_results: !function ipn_lmms_eval.local.score
generation_kwargs:
  max_new_tokens: {longest}
  temperature: 0
metric_list:
  - metric: accuracy
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
"""
_ROOM = 8
"""Tokens that an answer may have beyond the bytes of the task's longest one."""


def write_task(
    task: str, folder: Path, *, split: str | None = None, limit: int | None = None
) -> str:
    """Write a task into a folder, for `lmms_eval --include_path FOLDER --tasks NAME`.

    The folder stays where it is, for the questions name their pictures by full paths.

    Args:
        task: a task of `ipn plugins`, or a file of questions.
        folder: where to.
        split: of the task; by default what `ipn eval` asks.
        limit: only the first questions, at least 1.

    Returns:
        Its name in lmms-eval: `ipn-` and the task's, or the file's without its ending.

    Raises:
        UserError: the limit is below 1.
        DataError: there are no questions, or one is a dialogue.
    """
    if limit is not None and limit < 1:
        raise UserError(
            f"limit must be at least 1, got {limit}: it is how many questions are written."
        )
    opened = open_task(task)
    examples = list(islice(opened.examples(split or opened.default_split), limit))
    if not examples:
        raise DataError(f"there is nothing to write: task '{task}' has no questions there.")
    where = folder.absolute() / "pictures"
    where.mkdir(parents=True, exist_ok=True)
    lines = []
    for example in examples:
        if example.dialogue is not None:
            raise DataError(
                f"task '{task}' holds dialogues, such as the one that ends with "
                f"'{example.question}': only single questions can be written."
            )
        shown = [_save(picture, where) for picture in example.images]
        row = {"question": example.question, "answers": example.answers, "type": example.type}
        lines.append(json.dumps({**row, "pictures": shown}, ensure_ascii=False) + "\n")
    name = f"ipn-{Path(task).stem}"
    data = folder.absolute() / f"{name}.jsonl"
    data.write_text("".join(lines), encoding="utf-8")
    longest = _ROOM + max(len(a.encode()) for example in examples for a in example.answers)
    text = _YAML.format(name=name, data=json.dumps(str(data)), longest=longest)
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return name


def _save(picture: Picture, folder: Path) -> str:
    """Write a picture once, without loss; returns its path."""
    path = folder / f"{hashlib.sha256(picture.name.encode()).hexdigest()[:24]}.png"
    if not path.exists():
        picture.load().save(path)
    return str(path)


def pictures(row: Mapping[str, Any]) -> list[Image.Image]:
    """Open the pictures of a question, for lmms-eval's `doc_to_visual`."""
    return [load_image(path) for path in row["pictures"]]


def score(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer as `ipn eval` does, for lmms-eval's `process_results`."""
    return {"accuracy": float(matches(results[0], row["answers"]))}
