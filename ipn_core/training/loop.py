"""One stage of training: objectives, AdamW with warm-up and cosine, checks, saved states."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ipn_core.errors import TrainingError
from ipn_core.training.checks import awake, check_gradients, choose, finite_gradients, first_bad
from ipn_core.training.data import Batch, Data, Sampler, make_batch
from ipn_core.training.objectives import Objective, build_objectives, request_of
from ipn_core.training.requests import RequestCache, requests_are_constant

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ipn_core.model import IPN
    from ipn_core.plugins import Registry
    from ipn_core.training.config import StageConfig
    from ipn_core.training.features import FeatureCache

__all__ = ["StageRun", "learning_rate"]

_VALIDATION_BATCH = 256
_FIT_SAMPLE = 4096
"""Requests that new weights are fitted to, at most."""


def learning_rate(stage: StageConfig, step: int) -> float:
    """Return the rate of a step, counted from 0: linear warm-up, then a cosine to the floor."""
    if step < stage.warmup:
        return stage.lr * (step + 1) / stage.warmup
    along = (step - stage.warmup) / max(stage.steps - stage.warmup, 1)
    low = stage.floor
    return stage.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(along, 1.0))))


class _Losses(nn.Module):
    """All objectives of a stage as one module, so that DDP and FSDP wrap one forward."""

    def __init__(self, model: IPN, objectives: Sequence[tuple[Objective, float]]) -> None:
        super().__init__()
        self.model = model
        self.objectives = objectives

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        asks = any(not o.through_llm for o, _ in self.objectives)
        request = request_of(self.model, batch) if asks else None
        losses = {o.name: o.loss(batch, request) for o, _ in self.objectives}
        total = torch.stack([w * losses[o.name] for o, w in self.objectives]).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}


class StageRun:
    """A stage that is being trained.

    Attributes:
        trained: the parameters that it trains, by name.
        optimizer: AdamW over them.
        step: optimizer steps done.
    """

    def __init__(
        self,
        stage: StageConfig,
        model: IPN,
        data: Sequence[Data],
        *,
        cache: FeatureCache,
        registry: Registry,
        accelerator: Accelerator,
        seed: int,
        digest: Callable[[], str],
    ) -> None:
        self.stage = stage
        self.model = model
        self.cache = cache
        self.accelerator = accelerator
        self.seed = seed
        self.step = 0
        self.trained = choose(model, stage.train)
        objectives = build_objectives(stage, model, data, registry)
        self.requests: RequestCache | None = None
        constant = requests_are_constant(model)
        if constant and any(not o.through_llm for o, _ in objectives):
            self.requests = RequestCache(model, digest())
        self.sampler = Sampler(data, stage, seed)
        decayed = [p for p in self.trained.values() if p.ndim > 1]
        plain = [p for p in self.trained.values() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": stage.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=stage.betas)
        self.losses, self.optimizer = accelerator.prepare(_Losses(model, objectives), optimizer)
        self.objectives = objectives

    @property
    def names(self) -> dict[Tensor, str]:
        """Names by parameter."""
        return {p: name for name, p in self.trained.items()}

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.stage.steps

    @property
    def judge(self) -> Objective | None:
        """The first objective that can tell whether an example came out right."""
        return next(
            (o for o, _ in self.objectives if type(o).correct is not Objective.correct), None
        )

    def read_requests(
        self, data: Sequence[Data], report: Callable[[int, int], None] | None = None
    ) -> None:
        """Let the LLM read each distinct question of some data once, if that is enough."""
        if self.requests is None:
            return
        owner = {id(e): d for d in data for e in d.examples}

        def features(some: Sequence[Any]) -> Any:
            keys = [[owner[id(e)].keys[p.name] for p in e.images] for e in some]
            return self.cache.get(keys)

        for one in data:
            self.requests.add(one.examples, features, report)

    def fit(self) -> None:
        """Prepare new weights for the data: a sample of requests and of patches."""
        interaction = self.model.interaction
        if interaction is None:
            return
        drawn = [pair for at in range(8) for pair in self.sampler.draw(at)]
        distinct = list(
            {tuple(p.name for p in d.examples[i].images): (d, i) for d, i in drawn}.values()
        )[:256]
        batch = self._to_device(make_batch(distinct, self.cache, self.requests))
        if self.requests is not None:
            hidden = self.requests.all()
            hidden = hidden[:: math.ceil(len(hidden) / _FIT_SAMPLE)]
        else:
            with torch.no_grad():
                hidden = request_of(self.model, batch).values
        interaction.fit(hidden, batch.features.values)

    def check(self) -> str:
        """Check labels and gradients on the first batch; returns what trains, in words.

        Raises:
            TrainingError: an objective finds no label, something is not finite, or a tensor gets
                no gradient; the text names it.
        """
        with torch.random.fork_rng():
            batch = self._batch(0)
            offered = self._offered(batch)
            with awake(self.trained):
                self._backward(batch)
            check_gradients(self.model, self.trained)
        self.optimizer.zero_grad(set_to_none=True)
        count = sum(p.numel() for p in self.trained.values())
        return (
            f"{self.stage.name}: {count:,} weights in {len(self.trained)} tensors train "
            f"({', '.join(self.stage.train)}); {offered} in the first batch; every tensor gets a "
            "finite non-zero gradient"
        )

    def _offered(self, batch: Batch) -> str:
        """Say how much there is to learn from, after checking that every objective has some."""
        with self.accelerator.autocast():
            counts = {o: o.labels(batch) for o, _ in self.objectives}
        for objective, count in counts.items():
            if not count:
                raise TrainingError(
                    f"stage '{self.stage.name}': no label is left to learn from for the objective "
                    f"'{objective.name}': the first batch has {len(batch.examples)} examples and 0 "
                    f"{objective.unit}. Check what the examples ask and answer, make batches "
                    "larger ('groups', 'per_group'), or take the objective out of the stage."
                )
        return " and ".join(f"{n:,} {o.unit} ({o.name})" for o, n in counts.items())

    def _backward(self, batch: Batch) -> None:
        """Fill the gradients of a batch, at the largest scale of the loss that fp16 can hold.

        The loss scaler answers gradients that overflow with a smaller scale, until they fit, and so
        does this; the scaler itself is left as it is.
        """
        scaler = self.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        while True:
            self._seed()
            total, parts = self._losses(batch)
            bad = first_bad(self.trained, parts)
            if bad:
                raise TrainingError(f"before the first step: {bad} is not finite.")
            if not total.requires_grad:
                raise TrainingError(
                    f"stage '{self.stage.name}': its objectives ({', '.join(parts)}) reach nothing "
                    f"that 'train' names ({', '.join(self.stage.train)}). Change one of them."
                )
            if scaler is None:
                self.accelerator.backward(total)
                return
            (total * scale).backward()
            if scale <= 1 or finite_gradients(self.trained):
                return
            self.optimizer.zero_grad(set_to_none=True)
            scale *= scaler.get_backoff_factor()

    def advance(self) -> dict[str, float]:
        """Do one optimizer step; returns its losses, gradient norm and rates.

        Raises:
            TrainingError: something is not finite; the text names the first such tensor.
        """
        start = time.perf_counter()
        self._seed()
        self.model.train()
        rate = learning_rate(self.stage, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        totals: dict[str, float] = {}
        count = 0
        for part in range(self.stage.accumulate):
            batch = self._batch(part)
            count += len(batch.examples)
            last = part == self.stage.accumulate - 1
            waiting = contextlib.nullcontext() if last else self.accelerator.no_sync(self.losses)
            with waiting:
                total, parts = self._losses(batch)
                self.accelerator.backward(total / self.stage.accumulate)
            for name, value in {"loss": total.detach(), **parts}.items():
                totals[name] = totals.get(name, 0.0) + float(value) / self.stage.accumulate
        norm = self._norm()
        # In fp16 the loss scaler skips a step whose gradients overflow.
        scaled = self.accelerator.scaler is not None
        if not math.isfinite(totals["loss"]) or not (scaled or math.isfinite(norm)):
            bad = first_bad(self.trained, parts) or "the norm of the gradient"
            raise TrainingError(
                f"stage '{self.stage.name}', step {self.step + 1}: {bad} is not finite. The last "
                "saved state is intact; lower 'lr' or use precision fp32, and --resume."
            )
        nn.utils.clip_grads_with_norm_(
            self.trained.values(), self.stage.clip, torch.tensor(norm, device=total.device)
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        seconds = time.perf_counter() - start
        return {**totals, "grad_norm": norm, "lr": rate, "examples_per_s": count / seconds}

    @torch.no_grad()
    def validate(self, data: Sequence[Data]) -> dict[str, Any] | None:
        """Return accuracy, overall and by type, from the first objective that can tell."""
        judge = self.judge
        if judge is None or not data:
            return None
        self.model.eval()
        found: dict[str, list[bool]] = {}
        for one in data:
            for start in range(0, len(one.examples), _VALIDATION_BATCH):
                indices = range(start, min(start + _VALIDATION_BATCH, len(one.examples)))
                batch = one.batch(indices, self.cache, self.requests)
                batch = self._to_device(batch)
                correct = judge.correct(batch, request_of(self.model, batch)) or []
                for example, right in zip(batch.examples, correct, strict=True):
                    found.setdefault(f"{one.name}/{one.split}/{example.type}", []).append(right)
        every = [right for rights in found.values() for right in rights]
        return {
            "accuracy": sum(every) / len(every),
            "by_type": {name: sum(rights) / len(rights) for name, rights in found.items()},
        }

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        with self.accelerator.autocast():
            total, parts = self.losses(batch)
        return total, parts

    def _norm(self) -> float:
        """Return the norm of the whole gradient, before anything is clipped by it."""
        self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        return float(nn.utils.get_total_norm(gradients))

    def _batch(self, part: int) -> Batch:
        processes = self.accelerator.num_processes
        at = (self.step * self.stage.accumulate + part) * processes
        drawn = self.sampler.draw(at + self.accelerator.process_index)
        return self._to_device(make_batch(drawn, self.cache, self.requests))

    def _to_device(self, batch: Batch) -> Batch:
        features = batch.features.to(self.accelerator.device)
        return Batch(batch.examples, features, batch.hidden)

    def _seed(self) -> None:
        """Let all noise of a step follow from seed, stage, step and process."""
        where = (self.seed, self.stage.name, self.step, self.accelerator.process_index)
        digest = hashlib.sha256(repr(where).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:7], "big"))
