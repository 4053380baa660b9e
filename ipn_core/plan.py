"""From a prompt to token plans: ids, slots and segments.

The chat template is rendered once with placeholders that cannot occur in text; the rendered text
is tokenised in one piece, with the slots as added tokens that split it, so that text without slots
gets exactly the tokenizer's own ids. Special tokens that a user typed are tokenised as text.
"""

from __future__ import annotations

import copy
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ipn_core.config import PromptConfig
from ipn_core.errors import IPNError, PromptError
from ipn_core.prompt import Ids, LookAgain, Prompt, Shown, Text, Turn
from ipn_core.templates import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ipn_core.config import Layout

__all__ = ["DynamicSlot", "ImageSlot", "Plan", "Planner", "RequestSlot", "Tokens", "look_slots"]

_KEPT = 256
"""Rendered shapes of dialogues; one that grows has three for each turn."""
_KEPT_TEXT = 50_000
"""Characters of a rendered text that is kept; longer ones are rare, and would fill the memory."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """A run of text.

    Attributes:
        ids: its token ids.
        learn: whether training predicts them.
    """

    ids: tuple[int, ...]
    learn: bool = False


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """`<img>`: where a picture's static tokens go; `image` counts the pictures of the prompt."""

    image: int


@dataclass(frozen=True, slots=True)
class RequestSlot:
    """`<img-q>`: R positions whose hidden states become the request; ends a segment.

    Attributes:
        round: 0 for the first look of its turn.
        images: how many of the prompt's pictures stand before it.
    """

    round: int
    images: int


@dataclass(frozen=True, slots=True)
class DynamicSlot:
    """`<img-d>`: K positions that the look before them fills."""

    round: int


Piece = Tokens | ImageSlot | RequestSlot | DynamicSlot


def look_slots(round_: int, images: int) -> tuple[Piece, ...]:
    """Return the slots of one look."""
    return RequestSlot(round_, images), DynamicSlot(round_)


@dataclass(frozen=True)
class Plan:
    """The tokens of one prompt in order, with its slots.

    Attributes:
        pieces: runs of ids and slots.
        images: the pictures, in the order in which the image slots count them.
        question: the text of the last user's turn.
        past: the text ids before the pieces, which are in the cache already.
    """

    pieces: tuple[Piece, ...]
    images: tuple[Any, ...] = ()
    question: str = ""
    past: tuple[int, ...] = ()
    _segments: list[tuple[Piece, ...]] = field(default_factory=list, repr=False, compare=False)

    @property
    def segments(self) -> list[tuple[Piece, ...]]:
        """The pieces cut after every request slot."""
        if not self._segments:
            current: list[Piece] = []
            for piece in self.pieces:
                current.append(piece)
                if isinstance(piece, RequestSlot):
                    self._segments.append(tuple(current))
                    current = []
            self._segments.append(tuple(current))
        return self._segments

    @property
    def rounds(self) -> int:
        """How many looks the prompt has over all its turns."""
        return sum(isinstance(p, RequestSlot) for p in self.pieces)

    @property
    def entries(self) -> list[int | Piece]:
        """One entry a token (its id) or slot."""
        return [x for p in self.pieces for x in (p.ids if isinstance(p, Tokens) else (p,))]

    def after(self, fed: Sequence[int | Piece]) -> Plan | None:
        """Return what is left of the plan once `fed` is in the cache; None if it is no prefix."""
        mine = self.entries
        if mine[: len(fed)] != list(fed):
            return None
        past = tuple(entry for entry in fed if isinstance(entry, int))
        return Plan(_joined(mine[len(fed) :]), self.images, self.question, past)

    def until(self, count: int) -> Plan:
        """Return what the plan begins with, so many entries, nothing of which is learned."""
        return Plan(_joined(self.entries[:count]), self.images)

    @property
    def text_ids(self) -> list[int]:
        """All ids of text, those in the cache included."""
        return [*self.past, *(i for p in self.pieces if isinstance(p, Tokens) for i in p.ids)]


def _joined(entries: Sequence[int | Piece]) -> tuple[Piece, ...]:
    """Return the pieces that entries came from."""
    found: list[Piece] = []
    for entry in entries:
        if not isinstance(entry, int):
            found.append(entry)
        elif found and isinstance(found[-1], Tokens):
            found[-1] = Tokens((*found[-1].ids, entry))
        else:
            found.append(Tokens((entry,)))
    return tuple(found)


class Planner:
    """Turns prompts into plans for one tokenizer, chat template and layout."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        layout: Layout,
        prompt: PromptConfig | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        self.layout = layout
        # Some LLMs stop at another id than their tokenizer's (BLIP-2's OPT at a line break).
        own = tokenizer.eos_token_id
        self._end = own if own in ends or not ends else ends[0]
        self.prompt = prompt or PromptConfig()
        self.template = self.prompt.template or template
        self._original = tokenizer
        nonce = secrets.token_hex(8)
        self._slot_mark = f"\ue000ipn-slot-{nonce}\ue001"
        self._content_mark = f"\ue000ipn-content-{nonce}-%d\ue001"
        self._content_marks = re.compile("(" + self._content_mark.replace("%d", r"\d+") + ")")
        self._special = self._special_tokens(tokenizer)
        self._escapes = {
            text: f"\ue000ipn-text-{nonce}-{i}\ue001" for i, text in enumerate(self._special)
        }
        # Slots and escaped special tokens are added to a copy: the user's tokenizer is untouched.
        self._tokenizer = copy.deepcopy(tokenizer)
        from tokenizers import AddedToken

        marks = [self._slot_mark, *self._escapes.values()]
        self._tokenizer.add_tokens(
            [AddedToken(m, special=True, normalized=False) for m in marks], special_tokens=True
        )
        # One id for each of several tokens; transformers' types also allow a single id.
        ids = cast("list[int]", self._tokenizer.convert_tokens_to_ids(marks))
        self._slot_id = ids[0]
        self._escape_ids = {
            id_: tuple(
                tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            )
            for id_, text in zip(ids[1:], self._escapes, strict=True)
        }
        self._kept: dict[tuple[Any, ...], str] = {}
        self._trims = self._template_trims()

    def plan(self, prompt: Prompt) -> Plan:
        """Plan a prompt.

        Raises:
            PromptError: it is none, has no user's turn, pictures outside a user's turn, or what is
                no text, or the chat template refuses its turns.
        """
        _check(prompt)
        turns = self._with_system(prompt.turns)
        if not any(turn.role == "user" for turn in turns):
            raise PromptError("a prompt needs a user's turn. Ask something.")
        pieces = list(self._tokenise(*self._render(turns)))
        return Plan(tuple(pieces), prompt.images, prompt.question)

    def answer_ids(self, text: str) -> list[int]:
        """Return the tokens of an answer as they follow a question, without what ends it.

        Most tokenizers have other tokens for " cake", after a template's "ANSWER:", than for "cake"
        at the start of a line.
        """
        before = self._with_system([Turn("user", (Text("?"),))])
        marks = [self._content_mark % i for i in range(len(before))]
        return self._answer_ids(self._gap(before, marks) + text)

    # -- rendering -------------------------------------------------------------------------------

    def _with_system(self, turns: Sequence[Turn]) -> list[Turn]:
        """Begin with the configured system message, unless the turns bring their own."""
        system = self.prompt.system
        if system is None or (turns and turns[0].role == "system"):
            return list(turns)
        return [Turn("system", (Text(system),)), *turns]

    def _render(self, turns: Sequence[Turn]) -> tuple[str, str, list[tuple[Piece, ...]]]:
        """Return what stands before the template, and the rendered template, with slot marks.

        With them comes what each mark stands for, in their order.
        """
        continues = turns[-1].role != "assistant"
        marks = [self._content_mark % i for i in range(len(turns))]
        # Between the template's own parts stand the marks. Cut once: going through the whole text
        # for every turn would take the square of their number.
        parts = self._content_marks.split(self._apply(turns, marks, continues))
        shown = Counter(parts[1::2])
        places = {mark: place for place, mark in enumerate(parts) if place % 2}
        slots: list[tuple[Piece, ...]] = []
        state = _Pictures()
        for index, (mark, turn) in enumerate(zip(marks, turns, strict=True)):
            if shown[mark] != 1:
                raise PromptError(
                    f"the chat template shows a {turn.role}'s turn {shown[mark]} times; "
                    "it must show each once. Leave the system message out, or use another template."
                )
            place = places[mark]
            parts[place] = self._content(turn, state, slots)
            if parts[place] == self._slot_mark and turn.role == "assistant":
                # Generated ids carry the space after "ASSISTANT:" themselves.
                gap = self._gap(turns[:index], marks)
                parts[place - 1] = parts[place - 1].removesuffix(gap)
                # What ends an answer to learn belongs to it: the end of the template's closer.
                closer = self._closer(parts[place + 1]) if turn.learn else ""
                parts[place + 1] = parts[place + 1].removeprefix(closer)
                slots[-1] = self.said(turn, state.images, gap, closer)
        text = "".join(parts)
        if turns[-1].learn:
            text = text[: text.rindex(self._slot_mark) + len(self._slot_mark)]
        return state.first, text, slots

    def _gap(self, before: Sequence[Turn], marks: Sequence[str]) -> str:
        """White space that the template puts before an answer but not at the end of a prompt."""
        if not before:
            return ""
        bare, probe = marks[: len(before)], self._content_mark % len(before)
        start = self._apply(before, bare, True)
        whole = self._apply([*before, Turn("assistant", (Text(""),))], [*bare, probe], False)
        gap = whole[len(start) : whole.find(probe)] if whole.startswith(start) else ""
        return gap if gap.isspace() else ""

    def _apply(self, turns: Sequence[Turn], marks: Sequence[str], continues: bool) -> str:
        messages: list[dict[str, Any]] = [
            {
                "role": t.role,
                "content": m,
                "image_first": any(isinstance(c, Shown) for c in t.content[:1]),
            }
            for t, m in zip(turns, marks, strict=True)
        ]
        try:
            return self._rendered(messages, continues)
        except Exception as error:  # a checkpoint's template may do whatever its sandbox lets it
            if isinstance(error, IPNError) and not isinstance(error, PromptError):
                raise  # the template is not to blame
            said = str(error).rstrip(".") or type(error).__name__
            raise PromptError(
                f"the chat template refuses these turns: {said}. Set 'prompt.template' to one that "
                "takes them."
            ) from None

    def _rendered(self, messages: Sequence[Mapping[str, Any]], continues: bool) -> str:
        """Render messages whose contents are marks, once for all prompts of the same shape."""
        if "strftime_now" in self.template:
            return render(self._original, self.template, messages, continues)
        shape = (continues, *(tuple(message.values()) for message in messages))
        text = self._kept.get(shape)
        if text is None:
            text = render(self._original, self.template, messages, continues)
            if len(text) <= _KEPT_TEXT:
                self._kept[shape] = text
                # Other threads may add and leave out, too.
                for old in list(self._kept)[:-_KEPT]:
                    self._kept.pop(old, None)
        return text

    def _content(self, turn: Turn, state: _Pictures, slots: list[tuple[Piece, ...]]) -> str:
        if turn.learn or any(isinstance(c, (Ids, LookAgain)) for c in turn.content):
            slots.append(())
            return self._slot_mark
        text, looks = "", self.layout.rounds if turn.role == "user" else 0
        before = state.images
        content = list(turn.content)
        if self._trims and content and isinstance(content[0], Text):
            content[0] = Text(content[0].text.lstrip())
        if self._trims and content and isinstance(content[-1], Text):
            content[-1] = Text(content[-1].text.rstrip())
        pictures = sum(isinstance(c, Shown) for c in content)
        look = self._look(looks, before + pictures)
        order = self.layout.order
        look_first = order.index("look") < order.index("text")
        if look_first and look:
            # The pictures come first whatever the order says: a look needs something to look at.
            shown = [c for c in content if isinstance(c, Shown)]
            content = [*shown, *(c for c in content if not isinstance(c, Shown))]
        for index, piece in enumerate(content):
            if look_first and look and index == pictures:
                slots.append(look)
                text += self._slot_mark
            if isinstance(piece, Shown):
                if turn.role != "user":
                    raise PromptError(
                        f"a picture stands in the {turn.role}'s turn; only a user shows pictures."
                    )
                slot = (ImageSlot(state.images),)
                follows = index > 0 and isinstance(content[index - 1], Shown)
                before_it = self.prompt.before_next_image if follows else None
                before_it = self.prompt.before_image if before_it is None else before_it
                shown_as = f"{before_it}{self._slot_mark}{self.prompt.after_image}"
                if self.prompt.images_first:
                    slots.insert(state.images, slot)
                    state.first += shown_as
                else:
                    slots.append(slot)
                    text += shown_as
                state.images += 1
            elif isinstance(piece, Text):
                text += self._escape(piece.text)
        if look and not look_first:
            slots.append(look)
            text += self._slot_mark
        return text

    @staticmethod
    def _look(rounds: int, images: int) -> tuple[Piece, ...]:
        """The slots of a turn's looks; without a picture so far there is nothing to look at."""
        looks = range(rounds if images else 0)
        return tuple(piece for round_ in looks for piece in look_slots(round_, images))

    def _closer(self, tail: str) -> str:
        """The part of the template right after an answer that the LLM must learn to emit."""
        ends = [t for t in self._special if tail.startswith(t)]
        return max(ends, key=len, default="")

    def said(self, turn: Turn, images: int, gap: str = "", closer: str = "") -> tuple[Piece, ...]:
        """Return the tokens of an answer that is kept as ids or is to be learned, and its looks.

        Args:
            turn: the assistant's.
            images: how many of the prompt's pictures stand before it.
            gap: white space that the template puts before a text.
            closer: the special token that ends an answer to learn, if the template has one.

        Raises:
            PromptError: it looks more often than `layout.look_again` or has no picture to look at.
        """
        pieces: list[Piece] = []
        ids: list[int] = []
        looks = 0
        for piece in turn.content:
            if isinstance(piece, Ids):
                ids.extend(piece.ids)
            elif isinstance(piece, Text):
                text = piece.text.strip() if self._trims else piece.text
                ids.extend(self._answer_ids(gap + text))
            elif isinstance(piece, LookAgain):
                if ids:
                    pieces.append(Tokens(tuple(ids), turn.learn))
                ids = []
                if looks == self.layout.look_again or images == 0:
                    raise PromptError(
                        f"an answer looks again {looks + 1} times after {images} pictures; it may "
                        f"{self.layout.look_again} times (layout.look_again), and after a picture."
                    )
                pieces += look_slots(self.layout.rounds + looks, images)
                looks += 1
        if closer:
            ids += cast("list[int]", self._original.convert_tokens_to_ids([closer]))
        elif turn.learn and self._end is not None:
            ids.append(int(self._end))
        if ids:
            pieces.append(Tokens(tuple(ids), turn.learn))
        return tuple(pieces)

    def _answer_ids(self, text: str) -> list[int]:
        found: list[int] = self._original(
            text, add_special_tokens=False, split_special_tokens=True
        )["input_ids"]
        return found

    def _escape(self, text: str) -> str:
        """Replace special tokens in the user's text by marks that become text again."""
        for special in sorted(self._escapes, key=len, reverse=True):
            text = text.replace(special, self._escapes[special])
        return text

    # -- tokenising ------------------------------------------------------------------------------

    def _tokenise(
        self, first: str, text: str, slots: Sequence[tuple[Piece, ...]]
    ) -> Iterator[Piece]:
        own = self.prompt.add_special_tokens
        encoded: list[int] = self._tokenizer(text, add_special_tokens=own)["input_ids"]
        if first:
            encoded = self._tokenizer(first, add_special_tokens=False)["input_ids"] + encoded
        waiting = iter(slots)
        run: list[int] = []
        for id_ in encoded:
            if id_ == self._slot_id:
                if run:
                    yield Tokens(tuple(run))
                run = []
                yield from next(waiting)
            else:
                run.extend(self._escape_ids.get(id_, (id_,)))
        if run:
            yield Tokens(tuple(run))

    @staticmethod
    def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
        added = [str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special]
        return sorted({*tokenizer.all_special_tokens, *added} - {""})

    def _template_trims(self) -> bool:
        """Whether the template strips a turn's white space (some do), which we then do too."""
        probe = [Turn("user", (Text("x"),))]
        return " x " not in self._apply(probe, [" x "], True)


@dataclass
class _Pictures:
    images: int = 0
    first: str = ""


def _check(prompt: object) -> None:
    """Refuse what is no prompt, and text that no tokenizer can encode."""
    if not isinstance(prompt, Prompt):
        raise PromptError(
            f"a prompt must be an ipn_core.Prompt, got {type(prompt).__name__}. Make one: "
            "Prompt.ask(question, [image])."
        )
    for turn in prompt.turns:
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            raise PromptError(
                f"{turn.text!r} is no text: {half} is half of a character. Leave it out, or write "
                "both halves."
            ) from None
