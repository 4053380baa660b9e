"""The chat-completions protocol: what a request's JSON asks for, and what goes back."""

from __future__ import annotations

import base64
import binascii
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ipn_core.errors import UserError, near
from ipn_core.images import KEPT_SIDE, MAX_PIXELS, check_image, load_image, shrunk
from ipn_core.prompt import Content, Prompt, Shown, Text, Turn

__all__ = ["Asked", "Limits", "RequestError", "chunk", "completion", "error_body", "read_request"]

_OPTIONS = (
    "max_completion_tokens",
    "max_tokens",
    "messages",
    "model",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
)
_UNREAD = ("metadata", "service_tier", "store", "user")
"""Keys that change no answer."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MOST_STOPS = 4
_MOST_SAID = 1_000
"""Characters of an error's text, which may repeat what was sent."""


class RequestError(UserError):
    """A request that is refused; has the HTTP status and the name of the key at fault."""

    def __init__(
        self, text: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(text)
        self.status, self.param, self.code = status, param, code


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        body: bytes of its JSON.
        seconds: in which its JSON must have come.
        messages: of a conversation.
        pictures: of all messages together.
        pixels: width × height, of all pictures together.
        tokens: of an answer; also what an answer has at most if it does not say.
    """

    body: int = 20_000_000
    seconds: float = 60.0
    messages: int = 1_000
    pictures: int = 8
    pixels: int = MAX_PIXELS
    tokens: int = 256


@dataclass(frozen=True)
class Asked:
    """A request that was read.

    Attributes:
        prompt: the conversation, its pictures decoded and no larger than they are kept.
        tokens: of the answer at most.
        temperature: 0 for greedy decoding.
        top_p: of sampling.
        seed: of sampling, None for any.
        stops: texts that end the answer, and are left out of it.
        stream: whether the answer goes out in pieces.
        usage: whether the last piece counts tokens.
    """

    prompt: Prompt
    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    stream: bool = False
    usage: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Transformers' generation options, those that a batch shares."""
        if not self.temperature:
            return {"do_sample": False}
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


def read_request(body: Any, model: str, limits: Limits) -> Asked:
    """Read the JSON of a request, and decode its pictures.

    Args:
        body: parsed JSON.
        model: the name that is served.
        limits: what it may ask for.

    Raises:
        RequestError: it is not of the protocol, or asks for what is not served.
        ImageError: a picture is none, damaged or too large.
    """
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, got {_kind(body)}.")
    for name in body:
        if name not in (*_OPTIONS, *_UNREAD) and body[name] is not None:
            raise RequestError(
                f"'{_short(name)}' is not served{near(_short(name), _OPTIONS)}. Served are "
                f"{', '.join(_OPTIONS)}.",
                param=name,
                code="unsupported_parameter",
            )
    if (name := body.get("model", model)) != model:
        raise RequestError(
            f"unknown model {name!r}: '{model}' is served here.",
            status=404,
            param="model",
            code="model_not_found",
        )
    if body.get("n") not in (None, 1):
        raise RequestError("'n' must be 1: ask several times for several answers.", param="n")
    newer = body.get("max_completion_tokens") is not None
    key = "max_completion_tokens" if newer else "max_tokens"
    temperature = _number(body, "temperature", 0.0, 0.0, 2.0)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise RequestError("'stream_options' must be an object.", param="stream_options")
    return Asked(
        prompt=_prompt(body.get("messages"), limits),
        tokens=_whole(body, key, limits.tokens, 1, limits.tokens) or limits.tokens,
        temperature=temperature,
        top_p=_number(body, "top_p", 1.0, 0.0, 1.0),
        seed=_whole(body, "seed", None, 0, 2**63 - 1),
        stops=_stops(body.get("stop")),
        stream=_flag(body, "stream"),
        usage=_flag(options, "include_usage"),
    )


# -- messages ------------------------------------------------------------------------------------


def _prompt(messages: Any, limits: Limits) -> Prompt:
    if not isinstance(messages, list) or not messages:
        raise RequestError("'messages' must be a list of at least one message.", param="messages")
    if len(messages) > limits.messages:
        raise RequestError(
            f"the conversation has {len(messages):,} messages; at most {limits.messages:,} are "
            "accepted. Leave out the earliest ones.",
            param="messages",
        )
    turns = tuple(_turn(message, f"messages[{i}]") for i, message in enumerate(messages))
    prompt = Prompt(turns)
    if turns[-1].role != "user" or not turns[-1].text.strip():
        raise RequestError("the last message must be a user's, with some text.", param="messages")
    if any(turn.role == "system" for turn in turns[1:]):
        raise RequestError("a system message must come first.", param="messages")
    if len(prompt.images) > limits.pictures:
        raise RequestError(
            f"the messages show {len(prompt.images)} pictures; at most {limits.pictures} are "
            "accepted.",
            param="messages",
        )
    sizes = [check_image(one, max_pixels=limits.pixels) for one in prompt.images]
    if (pixels := sum(width * height for width, height in sizes)) > limits.pixels:
        raise RequestError(
            f"the pictures of all messages have {pixels:,} pixels together; at most "
            f"{limits.pixels:,} are accepted. Scale them down first.",
            param="messages",
        )
    return Prompt(tuple(_decoded(turn, limits) for turn in turns))


def _turn(message: Any, where: str) -> Turn:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(
            f"{where} must be an object whose 'role' is one of {', '.join(_ROLES)}.", param=where
        )
    content = message.get("content")
    if isinstance(content, str):
        items: tuple[Any, ...] = (Text(content),)
    elif isinstance(content, list):
        items = tuple(_part(p, f"{where}.content[{i}]") for i, p in enumerate(content))
    else:
        raise RequestError(f"{where}.content must be a text or a list of parts.", param=where)
    turn = Turn(_ROLES[role], items)  # type: ignore[arg-type]
    if turn.images and turn.role != "user":
        raise RequestError(f"{where}: only a user's message may show pictures.", param=where)
    return turn


def _part(part: Any, where: str) -> Content:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Text(part["text"])
    if kind == "image_url":
        given = part.get("image_url")
        url = given.get("url") if isinstance(given, dict) else given
        if isinstance(url, str):
            return Shown(_bytes_of(url, where))
    raise RequestError(
        f'{where} must be {{"type": "text", "text": …}} or {{"type": "image_url", "image_url": '
        '{"url": "data:image/…;base64,…"}}.',
        param=where,
    )


def _bytes_of(url: str, where: str) -> bytes:
    head, comma, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64") or not comma:
        raise RequestError(
            f"{where}: pictures are sent as data:image/…;base64,…; addresses are not fetched. Got "
            f"'{_short(url)}'.",
            param=where,
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{where}: this is no base64 ({error}).", param=where) from None


def _decoded(turn: Turn, limits: Limits) -> Turn:
    content = [
        Shown(shrunk(load_image(c.image, max_pixels=limits.pixels), KEPT_SIDE))
        if isinstance(c, Shown) and isinstance(c.image, bytes)
        else c
        for c in turn.content
    ]
    return Turn(turn.role, tuple(content))


# -- values --------------------------------------------------------------------------------------


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise RequestError(
            f"'{name}' must be a number from {low:g} to {high:g}, got {value!r}.", param=name
        )
    return float(value)


def _whole(
    body: Mapping[str, Any], name: str, default: int | None, low: int, high: int
) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(
            f"'{name}' must be a whole number from {low:,} to {high:,}, got {value!r}.", param=name
        )
    return value


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name) or False
    if not isinstance(value, bool):
        raise RequestError(f"'{name}' must be true or false, got {value!r}.", param=name)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value or []
    texts = isinstance(found, list) and all(isinstance(s, str) and s for s in found)
    if not texts or len(found) > _MOST_STOPS:
        raise RequestError(
            f"'stop' must be a text or a list of at most {_MOST_STOPS}, none empty.", param="stop"
        )
    return tuple(found)


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[:most] + "…"


def _kind(value: Any) -> str:
    names: dict[type, str] = {list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


# -- what goes back ------------------------------------------------------------------------------


def new_id() -> str:
    """Return a name for an answer."""
    return f"chatcmpl-{uuid.uuid4().hex}"


def completion(
    id_: str, model: str, text: str, reason: str, usage: Mapping[str, int]
) -> dict[str, Any]:
    """Return the JSON of a whole answer."""
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return _object(id_, "chat.completion", model, [choice], usage)


def chunk(
    id_: str,
    model: str,
    delta: Mapping[str, str] | None,
    reason: str | None = None,
    usage: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the JSON of a piece of an answer; without `delta` the one that counts tokens."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": reason}]
    return _object(id_, "chat.completion.chunk", model, choices, usage)


def _object(
    id_: str,
    kind: str,
    model: str,
    choices: Sequence[Any],
    usage: Mapping[str, int] | None,
) -> dict[str, Any]:
    return {
        "id": id_,
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "usage": None if usage is None else dict(usage),
    }


def error_body(
    text: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return the JSON of a refusal, bounded and in valid Unicode whatever it repeats."""
    message, about = (None if t is None else _sayable(t) for t in (text, param))
    return {"error": {"message": message, "type": kind, "param": about, "code": code}}


def _sayable(text: str) -> str:
    # JSON may hold halves of characters, which nothing can be encoded with.
    return _short(text.encode("utf-8", "backslashreplace").decode(), _MOST_SAID)
