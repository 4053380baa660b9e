"""Requests that are constants: the hidden states at `<img-q>` of repeated questions.

Where no static token, layer injection or trained `<img-q>` stands before the request, it depends on
the question alone, and the LLM need read each question only once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ipn_core.files import atomic_write
from ipn_core.prompt import Prompt
from ipn_core.stages import Connector
from ipn_core.tasks import Example
from ipn_core.weights import cache_dir

if TYPE_CHECKING:
    from ipn_core.features import VisualFeatures
    from ipn_core.model import IPN

__all__ = ["RequestCache", "backbone_digest", "requests_are_constant"]

_BATCH = 32


def requests_are_constant(model: IPN) -> bool:
    """Whether the hidden state at the first `<img-q>` depends on the question alone."""
    return (
        model.requester is not None
        and not isinstance(model.perceiver, Connector)
        and model.injector is not None
        and model.injector.needs_message
        and not model.slots.request.requires_grad
        and model.config.layout.order.index("look") > model.config.layout.order.index("text")
    )


def backbone_digest(model: IPN) -> str:
    """Return a digest of all weights of the backbone."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.backbone.lm.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class RequestCache:
    """Hidden states at `<img-q>` by question and number of pictures."""

    def __init__(self, model: IPN, digest: str, folder: Path | None = None) -> None:
        """Start a cache.

        Args:
            model: its prompts and slots decide what is asked.
            digest: of the backbone's weights.
            folder: where caches lie, by default in the user's cache folder.
        """
        assert model.requester is not None
        self.model = model
        self.folder = folder or cache_dir() / "requests"
        self.key = hashlib.sha256(
            repr(
                (
                    digest,
                    model.planner.template,
                    model.config.prompt.model_dump(),
                    model.config.layout.model_dump(),
                    model.requester.layer,
                )
            ).encode()
            + model.slots.request.detach().float().cpu().numpy().tobytes()
        ).hexdigest()
        self._known: dict[tuple[str, int], Tensor] = {}

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
        wanted = {(e.question, len(e.images)): e for e in examples}
        names = hashlib.sha256("\0".join(f"{q}\1{n}" for q, n in sorted(wanted)).encode())
        path = self.folder / f"{self.key[:16]}-{names.hexdigest()[:16]}.safetensors"
        keys = sorted(wanted, key=lambda k: (len(k[0]), k))
        if path.is_file():
            from safetensors.torch import load_file

            hidden = load_file(path)["hidden"]
        else:
            hidden = self._compute([wanted[key] for key in keys], features, report)
            from safetensors.torch import save

            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(path, save({"hidden": hidden}))
        self._known.update(zip(keys, hidden, strict=True))

    def get(self, examples: Sequence[Example]) -> Tensor:
        """Return (B, R, D) for examples that were added."""
        return torch.stack([self._known[e.question, len(e.images)] for e in examples])

    def all(self) -> Tensor:
        """Return (n, R, D) of all distinct questions."""
        return torch.stack(list(self._known.values()))

    @torch.no_grad()
    def _compute(
        self,
        examples: Sequence[Example],
        features: Callable[[Sequence[Example]], VisualFeatures],
        report: Callable[[int, int], None] | None,
    ) -> Tensor:
        found = []
        order = self.model.config.layout.order
        for start in range(0, len(examples), _BATCH):
            some = examples[start : start + _BATCH]
            plans = [
                self.model.planner.plan(Prompt.ask(e.question, e.images, order=order)) for e in some
            ]
            percept = self.model.perceive(
                [], [e.question for e in some], features(some).to(self.model.backbone.device)
            )
            found.append(self.model.engine.hidden_at_request(plans, percept).float().cpu())
            if report:
                report(start + len(some), len(examples))
        return torch.cat(found)
