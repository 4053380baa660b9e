"""Messages of lmms-eval as prompts of IPN."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ipn_core.errors import DataError, UserError
from ipn_core.prompt import Prompt, Text, Turn

__all__ = ["to_prompt"]

_INLINE = "data:image/"


def to_prompt(messages: Sequence[Mapping[str, Any]], order: Sequence[str]) -> Prompt:
    """Return the prompt that messages say.

    A single question whose pictures all stand before its text is laid out as the model was trained;
    everything else keeps the order in which it comes.

    Args:
        messages: each with `role` and `content`, text or a list of parts with `type` text or image.
        order: of the model's layout; says whether pictures stand before the question.

    Raises:
        UserError: a part is a video or audio, or a picture that would have to be fetched.
        DataError: a picture written into the message is damaged.
    """
    spoken = [(message["role"], _parts(message["content"])) for message in messages]
    if len(spoken) == 1 and spoken[0][0] == "user":
        *images, last = spoken[0][1]
        if isinstance(last, str) and not any(isinstance(image, str) for image in images):
            return Prompt.ask(last, images, order=order)
    prompt = Prompt(())
    for role, parts in spoken:
        if role == "user":
            prompt = prompt.then_user(*parts)
            continue
        if not all(isinstance(part, str) for part in parts):
            raise UserError(f"a message of role '{role}' shows a picture: only the user's may.")
        text = "".join(parts)
        said = Turn("system", (Text(text),))
        prompt = Prompt((*prompt.turns, said)) if role == "system" else prompt.then_assistant(text)
    return prompt


def _parts(content: Any) -> list[Any]:
    """Texts as str, pictures as anything else."""
    return [content] if isinstance(content, str) else [_part(part) for part in content]


def _part(part: Mapping[str, Any]) -> Any:
    kind = part["type"]
    if kind == "text":
        return part["text"]
    if kind != "image":
        raise UserError(
            f"the task shows {kind}, and IPN models read text and pictures alone. "
            "Choose a task of pictures."
        )
    image = part["url"]
    if not isinstance(image, str):
        return image
    if image.startswith(_INLINE):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise DataError(f"a picture in a message is not valid base64: {error}.") from None
    if "://" in image:
        raise UserError(f"the picture '{image}' would have to be fetched. Give a file of it.")
    return Path(image)
