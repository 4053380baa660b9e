"""Prompts: interleaved text and pictures, over several turns, as the user writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union

from ipn_core.errors import PromptError

if TYPE_CHECKING:
    from ipn_core.images import ImageLike
    from ipn_core.tasks import Picture

__all__ = ["Content", "Ids", "LookAgain", "Prompt", "Text", "Turn"]

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text; whatever it holds, `<img>` and special tokens included, stays text."""

    text: str


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture at its place among the text."""

    image: Union[ImageLike, Picture]


@dataclass(frozen=True, slots=True)
class Ids:
    """An answer kept as the ids that were generated, so that nothing is tokenised twice."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LookAgain:
    """A look that the model took, or is to learn to take, at this place of its answer."""


Content: TypeAlias = Union[Text, Shown, Ids, LookAgain]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one party says.

    Attributes:
        role: "system", "user" or "assistant".
        content: text, pictures and ids in order.
        learn: whether training predicts this turn (assistant turns only).
    """

    role: Role
    content: tuple[Content, ...]
    learn: bool = False

    @property
    def text(self) -> str:
        """The text of the turn, pictures left out."""
        return "".join(c.text for c in self.content if isinstance(c, Text))

    @property
    def images(self) -> tuple[Any, ...]:
        """The pictures of the turn in order."""
        return tuple(c.image for c in self.content if isinstance(c, Shown))


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a user's turn, or with an answer to learn from."""

    turns: tuple[Turn, ...]

    @classmethod
    def ask(
        cls,
        question: str,
        images: Sequence[Any] = (),
        *,
        order: Sequence[str] = ("images", "text", "look"),
        answer: str | None = None,
        looks: int = 0,
    ) -> Prompt:
        """One question about pictures.

        Args:
            question: the user's words.
            images: the pictures.
            order: a layout's order; says whether the pictures stand before the text.
            answer: the answer to learn, in training.
            looks: how often to learn to look again before it.

        Raises:
            PromptError: the question is empty.
        """
        if not question.strip():
            raise PromptError("the question is empty. Ask something about the picture.")
        shown = [Shown(image) for image in images]
        text = [Text(question)]
        first = order.index("images") < order.index("text")
        content: list[Content] = [*shown, *text] if first else [*text, *shown]
        asked = cls((Turn("user", tuple(content)),))
        if answer is None:
            return asked
        return asked.then_assistant(answer, learn=True, looked=[0] * looks)

    @classmethod
    def user(cls, *content: Any) -> Prompt:
        """One user's turn of texts (str) and pictures (anything else) in the order given."""
        return cls(()).then_user(*content)

    def then_user(self, *content: Any) -> Prompt:
        """Add a user's turn of texts (str) and pictures (anything else) in the order given.

        A picture is given as bytes, a `pathlib.Path`, a PIL image, an array or a `Picture`.

        Raises:
            PromptError: there is no text in it.
        """
        items = tuple(Text(c) if isinstance(c, str) else Shown(c) for c in content)
        turn = Turn("user", items)
        if not turn.text.strip():
            raise PromptError("a user's turn needs some text. Ask something.")
        return Prompt((*self.turns, turn))

    def then_assistant(
        self, answer: str | Sequence[int], *, learn: bool = False, looked: Sequence[int] = ()
    ) -> Prompt:
        """Add an answer, as text or as the ids that were generated.

        Args:
            answer: the text or the ids.
            learn: whether training predicts it.
            looked: for each look within it, how many of its ids come before; before a text, 0.
        """
        if isinstance(answer, str):
            content: list[Content] = [*(LookAgain() for _ in looked), Text(answer)]
        else:
            content, done = [], 0
            for place in looked:
                content += [Ids(tuple(answer[done:place])), LookAgain()]
                done = place
            content.append(Ids(tuple(answer[done:])))
        return Prompt((*self.turns, Turn("assistant", tuple(content), learn)))

    @property
    def images(self) -> tuple[Any, ...]:
        """All pictures in order."""
        return tuple(image for turn in self.turns for image in turn.images)

    @property
    def question(self) -> str:
        """The text of the last user's turn."""
        return next((t.text for t in reversed(self.turns) if t.role == "user"), "")
