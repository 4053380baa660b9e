"""One stage of training: objectives, AdamW with warm-up and cosine, checks, saved states."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ipn_core.errors import ConfigError, TrainingError
from ipn_core.prefixes import PrefixCache
from ipn_core.training.ahead import Ahead
from ipn_core.training.checks import awake, check_gradients, finite_gradients, first_bad
from ipn_core.training.data import Batch, Data, DataSource, Whole, known_features, make_batch
from ipn_core.training.guards import Pinned, check_batch, check_finite, first_not_finite
from ipn_core.training.objectives import Objective, build_objectives, request_of
from ipn_core.training.parameters import choose, groups
from ipn_core.training.processes import gathered, sharded, shares, together, whole
from ipn_core.training.requests import RequestCache, prefixes_come_again, requests_are_constant
from ipn_core.training.sampler import Sampler

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ipn_core.features import VisualFeatures
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
        # What FSDP2 shards by itself, unless its settings name other classes: the LLM's layers.
        self._no_split_modules = list(model.backbone.lm._no_split_modules or ())

    def forward(self, batch: Batch, share: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted loss of a batch and its parts, for a share of a step by its size."""
        check_batch(self.model, batch)
        asked = self.model.requester is not None
        asked = asked and any(not o.through_llm for o, _ in self.objectives)
        request = request_of(self.model, batch) if asked else None
        losses = {o.name: o.loss(batch, request) for o, _ in self.objectives}
        if share:
            losses = {name: loss * share[name] for name, loss in losses.items()}
        total = torch.stack([w * losses[o.name] for o, w in self.objectives]).sum()
        return total, {name: loss.detach() for name, loss in losses.items()}

    def correct(self, batch: Batch, judge: Objective) -> list[bool]:
        """Say which examples come out right."""
        return judge.correct(batch, request_of(self.model, batch)) or []


class StageRun:
    """A stage that is being trained.

    Attributes:
        trained: the parameters that it trains, by name.
        prefixes: keeps the LLM's keys and values of questions; None where that saves nothing.
        optimizer: AdamW over them.
        step: optimizer steps done.
    """

    def __init__(
        self,
        stage: StageConfig,
        model: IPN,
        data: Sequence[DataSource],
        *,
        cache: FeatureCache,
        registry: Registry,
        accelerator: Accelerator,
        seed: int,
        digest: Callable[[], str],
        prefixes: int = 0,
    ) -> None:
        """Choose what trains, and what of the rest is worth keeping.

        Args:
            stage: what to do.
            model: is changed in place.
            data: what it learns from.
            cache: of the features of all pictures.
            registry: where objectives are looked up.
            accelerator: one process or several.
            seed: of order and noise.
            digest: of the backbone's own weights, made only where it is needed.
            prefixes: bytes for the LLM's keys and values of questions that come again.

        Raises:
            ConfigError: model or data cannot serve the stage.
        """
        self.stage = stage
        self.model = model
        self.cache = cache
        self.accelerator = accelerator
        self.seed = seed
        self.step = 0
        self._ready: tuple[int, list[Batch] | Exception] | None = None
        self._ahead = Ahead(accelerator.device)
        self.pinned = Pinned()
        self.trained = choose(model, stage.train, stage.freeze)
        objectives = build_objectives(stage, model, data, registry)
        self.requests: RequestCache | None = None
        constant = requests_are_constant(model)
        if constant and any(not o.through_llm for o, _ in objectives):
            answers = next((o.answers for o, _ in objectives if o.answers is not None), None)
            self.requests = RequestCache(model, digest(), answers=answers, note=cache.note)
        self.prefixes = None
        # Processes that share weights out must run the LLM equally often.
        if prefixes and not sharded(accelerator) and prefixes_come_again(model, stage, data):
            self.prefixes = PrefixCache(model, prefixes)
        share = (accelerator.process_index, accelerator.num_processes)
        self.sampler = Sampler(data, stage, seed, share)
        optimizer = torch.optim.AdamW(groups(self.trained, stage), betas=stage.betas, eps=stage.eps)
        self.losses, self.optimizer = _Losses(model, objectives), optimizer
        self._judge = self.losses.correct
        self.objectives = objectives
        processes = accelerator.num_processes
        if stage.groups < processes:
            raise ConfigError(
                f"stage '{stage.name}': 'groups' is {stage.groups}, and {processes} processes "
                "share each batch out by groups. Make it at least as many."
            )

    def prepare(self) -> None:
        """Let the processes train together from here on; does nothing for one alone."""
        self.losses, self.optimizer = self.accelerator.prepare(self.losses, self.optimizer)
        own = dict(self.model.named_parameters())  # FSDP2 has put others in their place
        self.trained = {name: own[name] for name in self.trained}

    @property
    def names(self) -> dict[Tensor, str]:
        """Names by parameter."""
        return {p: name for name, p in self.trained.items()}

    @property
    def _terms(self) -> list[Objective]:
        return [objective for objective, _ in self.objectives]

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
        self, data: Sequence[DataSource], report: Callable[[int, int], None] | None = None
    ) -> None:
        """Let the LLM read each distinct question of some data once, if that is enough."""
        if self.requests is None:
            return
        for one in data:
            self.requests.add(one.examples, partial(known_features, one, self.cache), report)

    def fit(self) -> None:
        """Prepare new weights for the data: a sample of requests and of patches."""
        interaction = self.model.interaction
        if interaction is None:
            return
        at_most = range(8 * self.stage.accumulate)
        drawn = [pair for at in at_most for pair in self.sampler.draw(at)]
        distinct = list(
            {tuple(p.name for p in d.examples[i].images): (d, i) for d, i in drawn}.values()
        )[:256]
        batch = self._to_device(make_batch(distinct, self.cache, self.requests))
        check_finite(batch)
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
            batches = self._batches(self.step)
            offered = self._offered(batches)
            with awake(self.trained):
                self._backward(self._to_device(batches[0]))
            check_gradients(self.model, self.trained)
        self.optimizer.zero_grad(set_to_none=True)
        count = sum(p.numel() for p in self.trained.values())
        return (
            f"{self.stage.name}: {count:,} weights in {len(self.trained)} tensors train "
            f"({', '.join(self.stage.train)}); {offered} in the first batch; every tensor gets a "
            "finite non-zero gradient"
        )

    def _offered(self, batches: Sequence[Batch]) -> str:
        """Say how much there is to learn from, after checking that every objective has some."""
        counts = {
            o: sum(together(self.accelerator, [o.labels(batch) for batch in batches]))
            for o in self._terms
        }
        for objective, count in counts.items():
            if not count:
                examples = len(batches[0].step)
                raise TrainingError(
                    f"stage '{self.stage.name}': no label is left to learn from for the objective "
                    f"'{objective.name}': the first batch has {examples} examples and 0 "
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
            total, parts = self._losses(batch, self._shares([batch])[0])
            losses = {name: float(loss) for name, loss in parts.items()}
            # One of several processes may be alone in this: its forward would wait for the others.
            alone = self.accelerator.num_processes == 1
            within = (lambda: self._first_not_finite([batch])) if alone else None
            bad = first_bad(self.trained, losses, within)
            if bad:
                raise TrainingError(f"before the first step: {bad} is not finite.")
            if not any(losses.values()):
                raise TrainingError(
                    f"stage '{self.stage.name}': before the first step its loss is exactly 0 "
                    f"({', '.join(parts)}), so that there is nothing to learn from it."
                )
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
            group["lr"] = rate * group["factor"]
        parts: list[dict[str, Tensor]] = []
        batches = self._take()
        count = len(batches[0].step)
        following = [*batches[1:], None]
        for batch, share, after in zip(batches, self._shares(batches), following, strict=True):
            last = after is None
            waiting = contextlib.nullcontext() if last else self.accelerator.no_sync(self.losses)
            with waiting:
                total, terms = self._losses(self._to_device(batch), share)
                self.accelerator.backward(total / self.stage.accumulate)
            parts.append({"loss": total.detach(), **terms})
            if after is not None:
                self._ahead.send(after)
        if self.step + 1 < self.stage.steps:
            self._prepare(self.step + 1)  # a GPU still works on these, until their losses are read
        totals = {
            name: sum(float(part[name]) / self.stage.accumulate for part in parts)
            for name in parts[0]
        }
        if self.accelerator.num_processes > 1:
            means = torch.tensor(list(totals.values()), device=self.accelerator.device)
            totals = dict(zip(totals, self.accelerator.reduce(means, "mean").tolist(), strict=True))
        losses = {name: value for name, value in totals.items() if name != "loss"}
        whole_norm = self._norm()
        norm = float(gathered(whole_norm))
        if not math.isfinite(totals["loss"]) or not (math.isfinite(norm) or self._overflow()):
            bad = first_bad(self.trained, losses, lambda: self._first_anywhere(batches))
            bad = bad or "the norm of the gradient"
            rounded = self.accelerator.mixed_precision != "no"
            raise TrainingError(
                f"stage '{self.stage.name}', step {self.step + 1}: {bad} is not finite. Lower 'lr'"
                f"{' or use precision fp32' if rounded else ''}, and train anew in another folder "
                "with --out."
            )
        self.pinned.check(losses)
        nn.utils.clip_grads_with_norm_(self.trained.values(), self.stage.clip, whole_norm)
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
        batches = [
            (one, range(start, min(start + _VALIDATION_BATCH, len(one.examples))))
            for one in data
            for start in range(0, len(one.examples), _VALIDATION_BATCH)
        ]
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        mine: list[tuple[int, list[tuple[str, bool]]]] = []
        # Where weights are shared out, all processes must run equally many batches.
        for number in range(rank, math.ceil(len(batches) / processes) * processes, processes):
            one, indices = batches[min(number, len(batches) - 1)]
            batch = self._to_device(one.batch(indices, self.cache, self.requests))
            with whole(self.losses):
                correct = self._judge(batch, judge)
            types = [f"{one.name}/{one.split}/{example.type}" for example in batch.examples]
            if number < len(batches):
                mine.append((number, list(zip(types, correct, strict=True))))
        found: dict[str, list[bool]] = {}
        for _, judged in sorted(together(self.accelerator, mine)):
            for name, right in judged:
                found.setdefault(name, []).append(right)
        every = [right for rights in found.values() for right in rights]
        return {
            "accuracy": sum(every) / len(every),
            "by_type": {name: sum(rights) / len(rights) for name, rights in found.items()},
        }

    def _losses(self, batch: Batch, share: Mapping[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
        with self.accelerator.autocast():
            total, parts = self.losses(batch, share)
        return total, parts

    def _overflow(self) -> bool:
        """Whether gradients that are not finite may be too large for fp16 at the loss's scale.

        The loss scaler then skips the step, and halves the scale until they fit: at 1 it has tried
        everything, and what is still not finite never will be.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > 1

    def _first_anywhere(self, batches: Sequence[Batch]) -> str | None:
        """Name the first tensor that is not finite in a process's share of a step; all must ask."""
        found = together(self.accelerator, [self._first_not_finite(batches)])
        return next((name for name in found if name), None)

    def _first_not_finite(self, batches: Sequence[Batch]) -> str | None:
        """Name the first tensor that is not finite in this process's share of a step."""
        self._seed()
        # What DDP wraps: its own forward would wait for processes that may not come here.
        losses = self.accelerator.unwrap_model(self.losses)
        found: str | None = None
        for batch in map(self._to_device, batches):
            with self.accelerator.autocast():
                here = first_not_finite(self.model, batch, partial(losses, batch, {}))
            found = found or here  # all are run: FSDP2 gathers layers equally often everywhere
        return found

    def _norm(self) -> Tensor:
        """Return the norm of the whole gradient, before anything is clipped by it."""
        self.accelerator.unscale_gradients(self.optimizer)
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        return nn.utils.get_total_norm(gradients)

    def _prepare(self, step: int) -> None:
        """Make a step's batches; what goes wrong is no fault of the step before, and told later."""
        try:
            batches = self._batches(step)
            self._ahead.send(batches[0])
            self._ready = step, batches
        except Exception as error:
            self._ready = step, error

    def _take(self) -> list[Batch]:
        ready, self._ready = self._ready, None
        if ready is None or ready[0] != self.step:
            return self._batches(self.step)
        if isinstance(ready[1], Exception):
            raise ready[1]
        return ready[1]

    def _batches(self, step: int) -> list[Batch]:
        """Return this process's share of a step, on the CPU: a batch for each accumulated part."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = step * self.stage.accumulate
        parts = [self.sampler.groups(first + part) for part in range(self.stage.accumulate)]
        for later in range(self.stage.accumulate):
            self.sampler.ahead(first + self.stage.accumulate + later)
        groups = [group for part in parts for group in part]
        drawn = [pair for group in groups for pair in group]
        if processes * len(parts) == 1:
            return [make_batch(drawn, self.cache, self.requests)]

        def features(indices: Sequence[int]) -> VisualFeatures:
            some = make_batch([drawn[i] for i in indices], self.cache, None)
            return self._to_device(some).features

        whole = Whole([data.examples[i] for data, i in drawn], features, self._noise(step, 0))
        starts = [0, *accumulate(len(group) for group in groups)]
        batches, at = [], 0
        for part in parts:
            own = range(at + rank, at + len(part), processes)
            at += len(part)
            rows = [row for i in own for row in range(starts[i], starts[i + 1])]
            batch = make_batch([drawn[row] for row in rows], self.cache, self.requests)
            batches.append(replace(batch, whole=whole, rows=rows))
        return batches

    def _shares(self, batches: Sequence[Batch]) -> list[dict[str, float]]:
        """Weigh this process's parts of a step; nothing where one batch is all of it."""
        if batches[0].whole is None:
            return [{}]
        counts = [{o.name: o.labels(batch) for o in self._terms} for batch in batches]
        return shares(self.accelerator, counts)

    def _to_device(self, batch: Batch) -> Batch:
        """Make a batch ready for the model: features on its device, and where prefixes are kept."""
        return replace(self._ahead.take(batch), prefixes=self.prefixes)

    def _seed(self) -> None:
        """Let all noise of a step follow from seed, stage, step and process."""
        torch.manual_seed(self._noise(self.step, self.accelerator.process_index))

    def _noise(self, step: int, process: int) -> int:
        where = (self.seed, self.stage.name, step, process)
        digest = hashlib.sha256(repr(where).encode()).digest()
        return int.from_bytes(digest[:7], "big")
