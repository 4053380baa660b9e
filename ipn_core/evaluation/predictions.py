"""Files of answers: one JSON object a line, and read again as they were written."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pydantic
from pydantic import BaseModel, ConfigDict

from ipn_core.errors import DataError
from ipn_core.files import atomic_write

if TYPE_CHECKING:
    from ipn_core.evaluation.evaluate import Prediction

__all__ = ["Reply", "Verdict", "read_verdicts", "verdicts_of", "write_verdicts"]


class Reply(BaseModel):
    """What a model said to a question.

    Attributes:
        text: its words.
        right: whether that counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    text: str
    right: bool


class Verdict(BaseModel):
    """One line of the file.

    Attributes:
        question: the user's words.
        type: the kind of question.
        pictures: the names of its pictures; `statistics.by_pictures` makes clusters of them.
        answers: the accepted answers.
        text: what the model said.
        right: whether that counts.
        against: what another model said to the same question, where one was asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    question: str
    type: str
    pictures: tuple[str, ...]
    answers: tuple[str, ...]
    text: str
    right: bool
    against: Reply | None = None


def verdicts_of(
    predictions: Sequence[Prediction], against: Sequence[Prediction] | None = None
) -> list[Verdict]:
    """Return the line of each prediction.

    Args:
        predictions: of a report.
        against: of another model's report on the same questions.
    """
    others = [None] * len(predictions) if against is None else against
    return [
        Verdict(
            question=p.example.question,
            type=p.example.type,
            pictures=tuple(picture.name for picture in p.example.images),
            answers=p.example.answers,
            text=p.text,
            right=p.right,
            against=Reply(text=other.text, right=other.right) if other else None,
        )
        for p, other in zip(predictions, others, strict=True)
    ]


def write_verdicts(path: str | os.PathLike[str], verdicts: Sequence[Verdict]) -> None:
    """Write verdicts, one JSON object a line, in their order.

    Raises:
        IPNError: the system refused; what was there is unchanged.
    """
    rows = [json.dumps(v.model_dump(exclude_none=True), ensure_ascii=False) for v in verdicts]
    # Half a surrogate pair, as in names of files that are no UTF-8, becomes JSON's own escape.
    atomic_write(path, "".join(row + "\n" for row in rows).encode(errors="backslashreplace"))


def read_verdicts(path: str | os.PathLike[str]) -> list[Verdict]:
    """Return what `write_verdicts` wrote.

    Raises:
        DataError: there is no such file, or a line is not a verdict; the text names it.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror}).") from None
    return [_verdict(f"'{path}' line {number}", line) for number, line in enumerate(lines, start=1)]


def _verdict(where: str, line: bytes) -> Verdict:
    try:
        return Verdict.model_validate_json(line)
    except pydantic.ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        at = f"'{key}': " if key else ""
        raise DataError(
            f"{where}: {at}{fault['msg']}. Write it again with --predictions."
        ) from None
