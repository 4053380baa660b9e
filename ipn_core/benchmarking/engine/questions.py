"""Questions about one picture: one after the other and as a batch, against transformers' LLaVA.

Both are the same model: a vision tower of 576 patches, an MLP, and one language model. The tower is
a toy, so that encoding the picture again costs LLaVA next to nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.benchmarking.engine.table import Found, against, took
from ipn_core.benchmarking.engine.timing import Timed, timing
from ipn_core.benchmarking.turns import turns
from ipn_core.clock import Clock
from ipn_core.features import VisualFeatures
from ipn_core.generate import decode
from ipn_core.model import IPN
from ipn_core.prompt import Prompt
from ipn_core.stages import EncodedImage, VisionEncoder
from ipn_core.subject import Subject

if TYPE_CHECKING:
    from PIL import Image

    from ipn_core.backbone import Backbone
    from ipn_core.benchmarking.engine.table import Session

__all__ = ["Album", "measure"]

SIDE, PATCH = 336, 14
TOKENS = (SIDE // PATCH) ** 2
NEW = 4
"""Tokens of an answer, so many whatever it says."""
QUESTIONS = tuple(
    f"{opening} {rest}?"
    for opening in (
        "Is there a dog",
        "What stands left of the house",
        "How many cats are",
        "Who is",
    )
    for rest in ("here", "in the first row", "next to the tall tree", "that nobody looks at")
)
LLAVA, OURS = "LLaVA", "one after the other"
COPIED, CUT = "LLaVA, its cache copied", "LLaVA, its cache cut back"
LLAVA_BATCH, BATCH = "LLaVA, one batch", "one batch"
GOALS = {LLAVA: 3.0, COPIED: 1.0, CUT: 1.0}
BATCH_GOAL = 6.0
FEW = 3
"""Questions of which it is seen, before anything is timed, that all ways answer them alike."""


def measure(session: Session) -> Found:
    """Measure all ways of asking 16 questions."""
    # All of them in the short form too: the goals are for so many.
    album = Album(session.backbone, QUESTIONS)
    album.check()
    count = session.repeats(2, 1)
    found: dict[str, list[float]] = {}
    for repeat in range(count):
        for name, seconds in album.time(seed=repeat).items():
            found.setdefault(name, []).append(seconds)
    row = "questions"
    return Found(
        row,
        f"{len(QUESTIONS)} questions on one picture of {TOKENS} image tokens, {NEW} tokens each",
        [
            *took(row, found),
            *(against(row, found, name, OURS, goal, "higher") for name, goal in GOALS.items()),
            against(row, found, LLAVA, BATCH, BATCH_GOAL, "higher"),
            against(row, found, LLAVA_BATCH, BATCH, None, "higher"),
            against(row, found, OURS, BATCH, None, "higher"),
        ],
        notes=[
            f"{LLAVA} is transformers' LlavaForConditionalGeneration, asked once for each question",
            f"both of its kept caches are of what all questions begin with: '{COPIED}' is given a "
            f"deep copy for each question, '{CUT}' the same one again, whose end is cropped",
            "what is read once for all questions is timed with the first of them",
            "all ways must give the same answers to all questions, in every repetition",
        ],
    )


class Album:
    """One picture, the questions about it, and two models that are the same."""

    def __init__(self, llm: Backbone, questions: Sequence[str]) -> None:
        from PIL import Image
        from transformers import CLIPImageProcessorPil

        self.lm: Any = llm.lm
        noise = torch.randint(0, 256, (SIDE, SIDE, 3), generator=torch.Generator().manual_seed(0))
        self.image = Image.fromarray(noise.to(torch.uint8).numpy())
        self.questions = list(questions)
        self.llava = _llava(self.lm)
        size = {"height": SIDE, "width": SIDE}
        self.processor = CLIPImageProcessorPil(size=size, crop_size=size)
        self.ours = IPN.from_config(
            {
                "strategy": "static",
                "backbone": "llama",
                "encoder": "tiny",
                "perceive": {"name": "static", "map": "mlp", "norm": False},
                "layout": {"order": ["images", "text", "look"]},
            },
            backbone=llm,
            encoder=Tower(self.llava.model.vision_tower, self.processor),
        )
        projector = self.llava.model.multi_modal_projector
        mlp: Any = self.ours.perceiver.get_submodule("map")
        mlp[0].load_state_dict(projector.linear_1.state_dict())
        mlp[2].load_state_dict(projector.linear_2.state_dict())
        self.ids = [self._ids(question) for question in self.questions]
        self._kept: dict[str, Any] = {}
        self._about: Subject | None = None

    def _prompt(self, question: str) -> Prompt:
        return Prompt.ask(question, [self.image], order=self.ours.config.layout.order)

    def _ids(self, question: str) -> list[int]:
        """Return what LLaVA is given: our own tokens, and a picture's token for each patch."""
        entries = self.ours.planner.plan(self._prompt(question)).entries
        slot = [int(self.llava.config.image_token_id)] * TOKENS
        return [id_ for entry in entries for id_ in ([entry] if isinstance(entry, int) else slot)]

    # -- ways of asking ----------------------------------------------------------------------------

    def one_by_one(self) -> dict[str, Callable[[int], tuple[int, ...]]]:
        """Return each way of asking the question of a number."""
        return {
            LLAVA: self._ask_llava,
            COPIED: self._ask_copied,
            CUT: self._ask_cut,
            OURS: self._ask_ours,
        }

    def batches(self) -> dict[str, Callable[[int], list[tuple[int, ...]]]]:
        """Return each way of asking the first so many at once."""
        return {LLAVA_BATCH: self._llava_batch, BATCH: self._our_batch}

    def _ask_llava(self, number: int) -> tuple[int, ...]:
        ids = torch.tensor([self.ids[number]])
        return self._generate(ids, pixel_values=self._pixels())[0]

    def _ask_copied(self, number: int) -> tuple[int, ...]:
        kept = self._beginning(COPIED, number)
        ids = torch.tensor([self.ids[number]])
        return self._generate(ids, past_key_values=copy.deepcopy(kept))[0]

    def _ask_cut(self, number: int) -> tuple[int, ...]:
        kept = self._beginning(CUT, number)
        before = kept.get_seq_length()
        answer = self._generate(torch.tensor([self.ids[number]]), past_key_values=kept)[0]
        kept.crop(before - kept.get_seq_length())
        return answer

    def _beginning(self, name: str, number: int) -> Any:
        """Return LLaVA's cache of what all questions begin with, read anew for the first one."""
        if number == 0:
            alike = (len(set(ids)) == 1 for ids in zip(*self.ids, strict=False))
            count = sum(takewhile(bool, alike))
            with torch.no_grad():
                beginning = torch.tensor([self.ids[0][:count]], device=self.lm.device)
                out = self.llava(
                    input_ids=beginning,
                    pixel_values=self._pixels(),
                    use_cache=True,
                    logits_to_keep=1,
                )
            self._kept[name] = out.past_key_values
        return self._kept[name]

    def _ask_ours(self, number: int) -> tuple[int, ...]:
        if number == 0 or self._about is None:
            self._about = self.ours.about([self.image])
        return self._about.ask(self.questions[number], **_exactly()).ids

    def _llava_batch(self, count: int) -> list[tuple[int, ...]]:
        some = self.ids[:count]
        longest = max(map(len, some))
        padding = [longest - len(ids) for ids in some]
        rows = torch.tensor([[0] * n + ids for n, ids in zip(padding, some, strict=True)])
        mask = torch.arange(longest) >= torch.tensor(padding)[:, None]
        pixels = self._pixels().expand(len(rows), -1, -1, -1)
        return self._generate(rows, mask, pixel_values=pixels)

    def _our_batch(self, count: int) -> list[tuple[int, ...]]:
        model, questions = self.ours, self.questions[:count]
        encoded = model.encoder.encode([self.image])
        plans = [model.planner.plan(self._prompt(question)) for question in questions]
        features = VisualFeatures.share(
            [one.values for one in encoded],
            [one.grid for one in encoded],
            [[0]] * len(plans),
            model.encoder.width,
        )
        with torch.no_grad():
            percept = model.perceive([], questions, features)
            clock = Clock(model.backbone.device)
            answers, _, _ = decode(model, plans, percept, _exactly(), clock)
        return [answer.ids for answer in answers]

    def _pixels(self) -> Tensor:
        pixels: Tensor = self.processor(images=[self.image], return_tensors="pt")["pixel_values"]
        return pixels.to(self.lm.device, self.lm.dtype)

    @torch.no_grad()
    def _generate(
        self, ids: Tensor, mask: Tensor | None = None, **more: Any
    ) -> list[tuple[int, ...]]:
        ids = ids.to(self.lm.device)
        mask = torch.ones_like(ids) if mask is None else mask.long().to(ids.device)
        made = self.llava.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            pad_token_id=0,
            **_exactly(),
            **more,
        )
        return [tuple(row) for row in made[:, ids.shape[1] :].tolist()]

    # -- timing ------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse to time ways that do not answer the first questions alike.

        Raises:
            AssertionError: they do not.
        """
        few = min(FEW, len(self.questions))
        _check_same(
            {name: [ask(n) for n in range(few)] for name, ask in self.one_by_one().items()}
            | {name: batch(few) for name, batch in self.batches().items()}
        )

    def time(self, seed: int = 0) -> dict[str, float]:
        """Return the seconds of all questions, by the way of asking; the ways take turns.

        Args:
            seed: of the order in which they do.

        Raises:
            AssertionError: some way gave another answer to any of them.
        """
        found: dict[str, float] = {}
        answers: dict[str, list[tuple[int, ...]]] = {}

        def timed(name: str, run: Callable[[], list[tuple[int, ...]]]) -> None:
            taken: Timed = {}
            with timing(taken, name):
                answers.setdefault(name, []).extend(run())
            found[name] = found.get(name, 0.0) + taken[name]

        singles, batches = self.one_by_one(), self.batches()
        count = len(self.questions)
        for number, order in enumerate(turns(list(singles), count, seed)):
            for name in order:
                timed(name, partial(_alone, singles[name], number))
        for name in next(turns(list(batches), 1, seed)):
            timed(name, partial(batches[name], count))
        _check_same(answers)
        return found


def _alone(ask: Callable[[int], tuple[int, ...]], number: int) -> list[tuple[int, ...]]:
    return [ask(number)]


def _check_same(answers: dict[str, list[tuple[int, ...]]]) -> None:
    """Refuse answers that are not LLaVA's, asked one by one."""
    for name, got in answers.items():
        if got != answers[LLAVA]:
            raise AssertionError(f"'{name}' answers {got}, not {answers[LLAVA]}")


def _exactly() -> dict[str, Any]:
    return {"max_new_tokens": NEW, "min_new_tokens": NEW}


class Tower(VisionEncoder):
    """LLaVA's own tower as an encoder of ours: its last layer but one, without the class token."""

    def __init__(self, tower: Any, processor: Any) -> None:
        super().__init__(None)
        self.tower, self.processor = tower, processor

    @property
    def width(self) -> int:
        """Width Dv of the features."""
        return int(self.tower.config.hidden_size)

    @property
    def fingerprint(self) -> str:
        """Nothing keeps what it makes."""
        return "benchmark"

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> list[EncodedImage]:
        """Encode pictures, 24 × 24 patches each."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        weight = next(self.tower.parameters())
        out = self.tower(pixels.to(weight), output_hidden_states=True)
        side = SIDE // PATCH
        return [EncodedImage(values, (side, side)) for values in out.hidden_states[-2][:, 1:]]


def _llava(lm: Any) -> Any:
    """Return a LLaVA around a language model, with a small random tower."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = copy.deepcopy(lm.config)
    text.num_hidden_layers, text.vocab_size = 1, 8  # what is built of it is replaced below
    torch.manual_seed(0)
    # The last id of the vocabulary stands for a picture: no question here has it.
    picture = {"image_token_id": lm.config.vocab_size - 1}
    config = LlavaConfig(vision_config=vision, text_config=text, **picture)
    llava: Any = LlavaForConditionalGeneration(config).eval().to(lm.device, lm.dtype)
    llava.model.language_model = lm.base_model
    llava.lm_head = lm.get_output_embeddings()
    llava.config.text_config = lm.config
    llava.generation_config = copy.deepcopy(lm.generation_config)
    return llava
