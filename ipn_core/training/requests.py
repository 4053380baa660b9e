"""What is constant about repeated questions: above all the hidden states at `<img-q>`.

Where no static token, layer injection or trained `<img-q>` stands before the request, it depends on
the question alone, and the LLM need read each question only once. So does that of a further look,
once it is settled what the looks before it are told and how that is injected.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ipn_core.files import atomic_write, make_folder
from ipn_core.prefixes import changing_reasons
from ipn_core.stages import Connector
from ipn_core.tasks import Example
from ipn_core.training.answers import Answers, Told, looking, targets
from ipn_core.training.data import DataSource, Examples, prompt_of
from ipn_core.training.shards import checksum
from ipn_core.weights import cache_folder

if TYPE_CHECKING:
    from ipn_core.features import VisualFeatures
    from ipn_core.model import IPN
    from ipn_core.training.config import StageConfig

__all__ = [
    "RequestCache",
    "backbone_digest",
    "prefixes_come_again",
    "read_requests",
    "requests_are_constant",
]

_BATCH = 32
_PART = 32 * _BATCH
"""Questions a file, so that reading that was interrupted goes on; whole batches."""
_CHECKSUM = "crc32"
"""Where a file's metadata has it."""
_AGAIN = 4
"""How often a question comes on average, from which on it pays to read it once and alone."""


def requests_are_constant(model: IPN) -> bool:
    """Whether the hidden state at the first `<img-q>` depends on the question alone."""
    return (
        not changing_reasons(model)
        and not isinstance(model.perceiver, Connector)
        and model.config.layout.order.index("look") > model.config.layout.order.index("text")
    )


def prefixes_come_again(model: IPN, stage: StageConfig, data: Sequence[DataSource]) -> bool:
    """Whether it pays to keep what the LLM makes of the questions of a stage.

    It follows from the config and the data alone, so that a resumed training decides alike.
    """
    if changing_reasons(model) or not all(isinstance(one, Examples) for one in data):
        return False
    distinct = {(e.question, len(e.images)) for one in data for e in one.examples}
    drawn = stage.steps * stage.accumulate * stage.groups * stage.per_group
    return drawn >= _AGAIN * len(distinct)


def backbone_digest(model: IPN) -> str:
    """Return a digest of all weights of the backbone that never change: an adapter's are not."""
    digest = hashlib.blake2b(digest_size=16)
    lora = model.backbone.lora
    adapter = set() if lora is None else {id(p) for p in lora.parameters()}
    for name, tensor in model.backbone.lm.state_dict(keep_vars=True).items():
        if id(tensor) in adapter:
            continue
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_requests(
    model: IPN,
    examples: Sequence[Example],
    features: VisualFeatures,
    look: int = 0,
    answers: Answers | None = None,
) -> Tensor:
    """Return the hidden states (B, R, D) at one `<img-q>` of each example.

    Args:
        model: reads.
        examples: that have such a look.
        features: of their pictures.
        look: its number, from 0; the ones before it are told that they found what they should.
        answers: says what that is, for a look after the first.
    """
    plans = [model.planner.plan(prompt_of(e, model.config.layout)) for e in examples]
    percept = model.perceive([], [e.question for e in examples], features)
    if look == 0:
        return model.engine.hidden_at_request(plans, percept)
    assert answers is not None
    assert model.interaction is not None
    size = (-1, model.interaction.length, -1)
    told = [answers.of(examples, i).unsqueeze(1).expand(*size) for i in range(look)]
    with model.observing(Told(told)):
        return model.engine.hidden_at_request(plans, percept, look)


class RequestCache:
    """Hidden states at `<img-q>` by question, number of pictures, and what was told before."""

    def __init__(
        self,
        model: IPN,
        digest: str,
        folder: Path | None = None,
        answers: Answers | None = None,
        note: Callable[[str], object] = warnings.warn,
    ) -> None:
        """Start a cache.

        Args:
            model: its prompts and slots decide what is asked.
            digest: of the backbone's own weights; an adapter's are looked at here.
            folder: where caches lie, by default in the user's cache folder.
            answers: what looks before the last are told; None to keep first looks alone.
            note: is told which file was damaged.

        Raises:
            IPNError: the user's cache folder cannot be written.
        """
        assert model.requester is not None
        self.model = model
        self._note = note
        self.folder = folder or cache_folder("requests")
        self.answers = answers if _injection_is_constant(model) else None
        read_with = [model.slots.request]
        read_with += [] if model.backbone.lora is None else model.backbone.lora.parameters()
        self.key = hashlib.sha256(
            repr(
                (
                    digest,
                    model.planner.template,
                    # Only what was set: an option that is new keeps what is there.
                    model.config.prompt.model_dump(exclude_defaults=True),
                    model.config.layout.order,
                    model.requester.layer,
                )
            ).encode()
            + b"".join(p.detach().float().cpu().numpy().tobytes() for p in read_with)
        ).hexdigest()
        self._known: dict[tuple[str, int, tuple[str, ...]], Tensor] = {}

    def add(
        self,
        examples: Iterable[Example],
        features: Callable[[Sequence[Example]], VisualFeatures],
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute what is missing for these examples, and keep it on disk.

        Args:
            examples: their questions.
            features: gives the features of some examples, for the shape of their prompts.
            report: receives how many of how many are done.
        """
        every = list(examples)
        for look in range(self._looks(every)):
            rows = looking(every, self.model.config.layout, look)
            self._add([every[i] for i in rows], look, features, report)

    def _add(
        self,
        examples: Sequence[Example],
        look: int,
        features: Callable[[Sequence[Example]], VisualFeatures],
        report: Callable[[int, int], None] | None,
    ) -> None:
        wanted = {self._place(e, look): e for e in examples}
        key = self.key
        if look:
            key = hashlib.sha256(key.encode() + self._injection()).hexdigest()
        keys = sorted(wanted, key=lambda k: (len(k[0]), k))
        for start in range(0, len(keys), _PART):
            part = keys[start : start + _PART]
            told = None if report is None else partial(_from, report, start, len(keys))
            hidden = self._kept(key, part, [wanted[k] for k in part], look, features, told)
            self._known.update(zip(part, hidden, strict=True))

    def _kept(
        self,
        key: str,
        places: Sequence[tuple[str, int, tuple[str, ...]]],
        examples: Sequence[Example],
        look: int,
        features: Callable[[Sequence[Example]], VisualFeatures],
        report: Callable[[int, int], None] | None,
    ) -> Tensor:
        """Return what is on disk of these questions, after reading them if nothing is."""
        names = hashlib.sha256(
            "\0".join("\1".join((q, str(n), *told)) for q, n, told in sorted(places)).encode()
        )
        path = self.folder / f"{key[:16]}-{names.hexdigest()[:16]}.safetensors"
        kept = self._read(path, len(places))
        if kept is not None:
            return kept
        hidden = self._compute(examples, look, features, report)
        from safetensors.torch import save

        make_folder(self.folder)
        atomic_write(path, save({"hidden": hidden}, metadata={_CHECKSUM: _sum_of(hidden)}))
        return hidden

    def _read(self, path: Path, count: int) -> Tensor | None:
        """Return what a file holds of some questions; None if there is none, or it is damaged."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                written = (file.metadata() or {}).get(_CHECKSUM)
                hidden: Tensor = file.get_tensor("hidden")
            if len(hidden) != count:
                raise ValueError(f"it holds {len(hidden)} requests, not {count}")
            # The first version wrote none.
            if written is not None and written != _sum_of(hidden):
                raise ValueError("its checksum does not fit")
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError) as error:
            self._note(
                f"the file of requests '{path}' is damaged ({error}): it is removed, and its "
                "questions are read again"
            )
            path.unlink(missing_ok=True)
            return None
        return hidden

    def get(self, examples: Sequence[Example]) -> list[Tensor]:
        """Return by look (B, R, D) for those of the examples, which were added, that have it."""
        layout = self.model.config.layout
        return [
            torch.stack([self._known[self._place(examples[i], look)] for i in rows])
            for look in range(self._looks(examples))
            if (rows := looking(examples, layout, look))
        ]

    def all(self) -> Tensor:
        """Return (n, R, D) of the first looks of all distinct questions."""
        return torch.stack([hidden for (*_, told), hidden in self._known.items() if not told])

    def _looks(self, examples: Sequence[Example]) -> int:
        """How many looks are constant."""
        if self.answers is None:
            return 1
        return max(len(targets(e, self.model.config.layout)) for e in examples)

    def _place(self, example: Example, look: int) -> tuple[str, int, tuple[str, ...]]:
        told = targets(example, self.model.config.layout)[:look]
        return example.question, len(example.images), told

    def _injection(self) -> bytes:
        """Everything that decides how the looks before are told what they found."""
        assert self.answers is not None
        assert self.model.injector is not None
        parts = [self.answers.directions, self.model.slots.dynamic]
        parts += self.model.injector.state_dict().values()
        layout = self.model.config.layout.model_dump_json(exclude_defaults=True)
        return layout.encode() + b"".join(p.detach().float().cpu().numpy().tobytes() for p in parts)

    @torch.no_grad()
    def _compute(
        self,
        examples: Sequence[Example],
        look: int,
        features: Callable[[Sequence[Example]], VisualFeatures],
        report: Callable[[int, int], None] | None,
    ) -> Tensor:
        found = []
        for start in range(0, len(examples), _BATCH):
            some = examples[start : start + _BATCH]
            pictures = features(some).to(self.model.backbone.device)
            found.append(
                read_requests(self.model, some, pictures, look, self.answers).float().cpu()
            )
            if report:
                report(start + len(some), len(examples))
        return torch.cat(found)


def _sum_of(hidden: Tensor) -> str:
    """Return the checksum of a tensor with its shape; its dtype is that of all files."""
    return checksum(hidden, repr(tuple(hidden.shape)))


def _from(report: Callable[[int, int], None], start: int, total: int, done: int, _: int) -> None:
    """Report what is done of a part as what is done of all."""
    report(start + done, total)


def _injection_is_constant(model: IPN) -> bool:
    assert model.injector is not None
    trained = [model.slots.dynamic, *model.injector.parameters()]
    return not any(p.requires_grad for p in trained)
