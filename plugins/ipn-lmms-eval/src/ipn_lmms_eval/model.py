"""The model `ipn` of lmms-eval, which alone here imports it."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Never

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ipn_core.errors import UserError, near
from ipn_core.model import IPN
from ipn_lmms_eval.options import cut, to_options
from ipn_lmms_eval.prompts import to_prompt

__all__ = ["IPNModel"]

_ARGUMENTS = ("pretrained", "interact", "device", "batch_size")


class IPNModel(lmms):
    """Answers what lmms-eval asks, `batch_size` questions at once.

    Args:
        pretrained: a name of `ipn models list`, a checkpoint folder or a hub id.
        interact: which of its strategies; by default the one it names first.
        device: where to compute; by default the one that accelerate gives this process.
        batch_size: questions at once.

    Raises:
        UserError: there is no such argument, or `batch_size` is no number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "starter",
        interact: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        **unknown: Any,
    ) -> None:
        super().__init__()
        for name in unknown:
            allowed = ", ".join(_ARGUMENTS)
            raise UserError(
                f"--model ipn takes no argument '{name}': allowed are {allowed}"
                f"{near(name, _ARGUMENTS)}."
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(
                f"--batch_size must be a whole number of at least 1, got '{batch_size}': with "
                "--model ipn it is not found by trying."
            )
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self.device = torch.device(device or self.accelerator.device)
        self.model = IPN.from_pretrained(str(pretrained), interact=interact).to(self.device)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests, those with the same options together, in their own order."""
        found: dict[int, GenerationResult] = {}
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in self._batches(requests):
                some = [requests[i] for i in batch]
                found.update(zip(batch, self._answer(some), strict=True))
                bar.update(len(batch))
        return [found[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[2], sort_keys=True, default=str)].append(index)
        for indices in alike.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _answer(self, requests: Sequence[Instance]) -> Iterator[GenerationResult]:
        """Answer requests of the same options in one batch."""
        prompts = []
        for request in requests:
            _, to_messages, _, doc, task, split = request.args
            messages = to_messages(self.task_dict[task][split][doc])
            prompts.append(to_prompt(messages, self.model.config.layout.order))
        options, stops = to_options(requests[0].args[2])
        for answer in self.model.generate(prompts, **options):
            read = sum(n for kind, n in answer.tokens.items() if kind != "generated")
            counts = TokenCounts(input_tokens=read, output_tokens=len(answer.ids))
            yield GenerationResult(cut(answer.text, stops).strip(), counts)

    def loglikelihood(self, requests: list[Instance]) -> Never:
        """Refuse: an answer is generated, and none is weighed."""
        _refuse("loglikelihood", requests)

    def generate_until_multi_round(self, requests: list[Instance]) -> Never:
        """Refuse: each request is a conversation of its own."""
        _refuse("generate_until_multi_round", requests)


def _refuse(kind: str, requests: Sequence[Instance]) -> Never:
    tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
    raise UserError(
        f"--model ipn does not serve requests of type {kind}, which {tasks} makes: it serves "
        "generate_until. Choose tasks of that output_type, such as seedbench for seedbench_ppl."
    )
