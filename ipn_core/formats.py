"""What a record of a data file says, in any of the forms that people keep their data in.

question      {"image": …, "question": …, "answer": …}
conversation  {"image": …, "conversations": [{"from": "human", "value": …}, …]}, as LLaVA's
document      {"images": […], "texts": […]}, aligned as OBELICS', or MMC4's own
              {"image_info": […], "text_list": […]}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ipn_core.errors import DataError, near
from ipn_core.prompt import Content, Prompt, Shown, Text, Turn
from ipn_core.tasks import Example, Picture

__all__ = ["KEYS", "Record"]

KEYS = frozenset({"question", "conversations", "texts", "text_list"})
"""One of them is in every record."""

_QUESTION = ("image", "question", "answer", "type", "looks", "hops")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
_PLACE = "<image>"
_LIKE = '{"image": "a.png", "question": "…", "answer": "…"}'


@dataclass(frozen=True)
class Record:
    """One record, and what is around it.

    Attributes:
        row: the parsed JSON.
        where: names it, such as "'a.jsonl' line 3".
        picture: returns the picture of a name that the record gives; raises `ValueError` with the
            reason if there is none.
        shown: the names of the pictures of a record that names none itself.
    """

    row: Any
    where: str
    picture: Callable[[str], Picture]
    shown: tuple[str, ...] = ()

    def example(self) -> Example:
        """Return what it says.

        Raises:
            DataError: it is malformed, or a picture is missing.
        """
        row = self.row
        if not isinstance(row, dict):
            raise self._fail(f"expected an object, got {type(row).__name__}")
        if "conversations" in row:
            return self._conversation(row)
        if "texts" in row or "text_list" in row:
            return self._document(row)
        return self._question(row)

    def _fail(self, why: str, like: str = _LIKE) -> DataError:
        return DataError(f"{self.where}: {why}. Each record is like {like}.")

    def _pictures(self, names: Sequence[str]) -> list[Picture]:
        try:
            return [self.picture(name) for name in names]
        except ValueError as error:
            raise DataError(f"{self.where}: {error}.") from None

    # -- one question ----------------------------------------------------------------------------

    def _question(self, row: Mapping[str, Any]) -> Example:
        for key in row:
            if key not in _QUESTION:
                raise self._fail(f"unknown key '{key}'{near(key, _QUESTION)}")
        question = row.get("question")
        if not isinstance(question, str) or not question.strip():
            raise self._fail(f"'question' must be a non-empty text, got {question!r}")
        answers = _texts(row.get("answer"))
        if not answers:
            raise self._fail(
                f"'answer' must be a text or a list of texts, got {row.get('answer')!r}"
            )
        names = _texts(row["image"]) if "image" in row else self.shown
        if not names:
            raise self._fail(f"'image' must be a path or a list of paths, got {row.get('image')!r}")
        kind = row.get("type", "all")
        if not isinstance(kind, str) or not kind:
            raise self._fail(f"'type' must be a text, got {kind!r}")
        hops = _texts(row.get("hops", []))
        if row.get("hops") and not hops:
            raise self._fail(f"'hops' must be a text or a list of texts, got {row['hops']!r}")
        looks = row.get("looks", len(hops))
        if not isinstance(looks, int) or isinstance(looks, bool) or looks < 0:
            raise self._fail(f"'looks' must be a whole number of at least 0, got {looks!r}")
        shown = tuple(self._pictures(names))
        return Example(question, answers, shown, kind, looks=looks, hops=hops)

    # -- a conversation --------------------------------------------------------------------------

    def _conversation(self, row: Mapping[str, Any]) -> Example:
        said = [self._said(number, one) for number, one in enumerate(_list(row["conversations"]))]
        roles = [role for role, _ in said]
        first = int(roles[:1] == ["system"])
        if not roles[first:] or roles[first:] != ["user", "assistant"] * (len(roles[first:]) // 2):
            raise self._talk(
                "human and gpt must take turns and gpt have the last word, got "
                f"{', '.join(roles) or 'nothing'}"
            )
        names = _texts(row["image"]) if row.get("image") else self.shown
        if row.get("image") and not names:
            raise self._talk(f"'image' must be a path or a list of paths, got {row['image']!r}")
        pieces = [re.split(f"({_PLACE})", text) for role, text in said if role == "user"]
        places = sum(piece == _PLACE for split in pieces for piece in split)
        if places != len(names):
            raise self._talk(f"it has {len(names)} pictures and {places} times {_PLACE}")
        pictures = iter(self._pictures(names))
        shown = [
            tuple(
                Shown(next(pictures)) if piece == _PLACE else Text(piece.strip("\n"))
                for piece in split
                if piece.strip()
            )
            for split in pieces
        ]
        asked = iter(shown)
        return _dialogue(
            [
                Turn("user", next(asked)) if role == "user" else _told(role, text)
                for role, text in said
            ]
        )

    def _talk(self, why: str) -> DataError:
        turn = '{"from": "human", "value": "<image>\\n…"}'
        return self._fail(why, f'{{"image": "a.png", "conversations": [{turn}, …]}}')

    def _said(self, number: int, one: Any) -> tuple[str, str]:
        if not isinstance(one, dict) or not {"from", "value"} <= one.keys():
            raise self._talk(f"turn {number + 1} must have 'from' and 'value', got {one!r}")
        role, text = _ROLES.get(str(one["from"])), one["value"]
        if role is None:
            raise self._talk(f"turn {number + 1} is from {one['from']!r}, not human or gpt")
        if not isinstance(text, str) or not text.strip():
            raise self._talk(f"turn {number + 1} must say something, got {text!r}")
        return role, text

    # -- a document ------------------------------------------------------------------------------

    def _document(self, row: Mapping[str, Any]) -> Example:
        """Pictures are what a user shows; the text that follows is what there is to say."""
        names, texts = self._aligned(row) if "texts" in row else self._matched(row)
        for place, (name, text) in enumerate(zip(names, texts, strict=True)):
            if (name is None) == (text is None):
                raise self._page(f"place {place} must hold either a picture or a text")
            if not isinstance(name or text, str):
                raise self._page(f"place {place} holds {name or text!r}, not a text or a path")
        pictures = iter(self._pictures([name for name in names if name is not None]))
        turns: list[Turn] = []
        content: list[Content] = []
        for isnt, run in groupby(texts, lambda text: text is None):
            if isnt:
                content += [Shown(next(pictures)) for _ in run]
                continue
            said = "\n\n".join(text for text in run if text.strip())
            if not said:
                continue
            if content:
                turns += [Turn("user", tuple(content)), _told("assistant", said)]
                content = []
            else:
                content = [Text(said)]  # before the first picture
        if not turns:
            raise self._page("it has no text after a picture, so that there is nothing to learn")
        return _dialogue(turns)

    def _aligned(self, row: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        names, texts = _list(row.get("images")), _list(row["texts"])
        if len(names) != len(texts):
            raise self._page(f"'images' has {len(names)} places and 'texts' {len(texts)}")
        shown = zip(names, texts, strict=True)
        return names, [None if name is not None and _blank(text) else text for name, text in shown]

    def _matched(self, row: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        """MMC4: each picture says before which text it stands."""
        names: list[Any] = []
        texts: list[Any] = []
        infos = _list(row.get("image_info"))
        if not all(
            isinstance(i, dict) and {"image_name", "matched_text_index"} <= i.keys() for i in infos
        ):
            raise self._page("'image_info' must give 'image_name' and 'matched_text_index' each")
        said = _list(row["text_list"])
        for at in [i["matched_text_index"] for i in infos] if said else []:
            if at not in range(len(said)):
                raise self._page(
                    "'matched_text_index' must be the number of a text in 'text_list', from 0 to "
                    f"{len(said) - 1}, got {at!r}"
                )
        for number, text in enumerate(said):
            here = [i["image_name"] for i in infos if i["matched_text_index"] == number]
            names += [*here, None]
            texts += [*(None for _ in here), text]
        return names, texts

    def _page(self, why: str) -> DataError:
        return self._fail(why, '{"images": ["a.png", null], "texts": [null, "…"]}')


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(values) if all(isinstance(v, str) and v.strip() for v in values) else ()


def _blank(text: Any) -> bool:
    return not (text.strip() if isinstance(text, str) else text)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _told(role: str, text: str) -> Turn:
    if role == "system":
        return Turn("system", (Text(text),))
    return Turn("assistant", (Text(text.strip()),), learn=True)


def _dialogue(turns: Sequence[Turn]) -> Example:
    """Return an example; a single question with its pictures on one side is a plain one."""
    prompt = Prompt(tuple(turns))
    *before, asked, answer = turns
    kinds = [isinstance(c, Shown) for c in asked.content]
    on_one_side = kinds in (sorted(kinds), sorted(kinds, reverse=True))
    plain = not before and kinds.count(False) == 1 and on_one_side
    question = prompt.question.strip()
    return Example(question, (answer.text,), prompt.images, dialogue=None if plain else prompt)
