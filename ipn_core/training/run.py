"""`ipn train`: from a config to a trained checkpoint, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from ipn_core.checkpoint import open_source, save
from ipn_core.config import load_yaml
from ipn_core.errors import ConfigError
from ipn_core.files import atomic_write, make_folder, remove_unfinished
from ipn_core.plugins import Registry, get_registry
from ipn_core.training.checks import FrozenBackbone, check_stages
from ipn_core.training.config import TrainConfig
from ipn_core.training.data import Data, DataSource
from ipn_core.training.features import FeatureCache
from ipn_core.training.loop import StageRun
from ipn_core.training.parameters import trainable
from ipn_core.training.processes import accelerate, agree, held, sharded, whole
from ipn_core.training.report import Log, Moving, bar, plot
from ipn_core.training.requests import backbone_digest
from ipn_core.training.state import (
    Position,
    collect,
    load_moments,
    load_state,
    peek,
    save_state,
    weights_of,
)
from ipn_core.training.stream import Stream, open_data

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ipn_core.model import IPN

__all__ = ["Training", "read_config", "train"]

BEST = "best"
CONFIG = "train.json"


def train(
    config_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    out: Path | None = None,
) -> Path:
    """Train as a YAML config says.

    Args:
        config_path: the config.
        overrides: `key=value` with dotted keys, such as `stages.0.steps=10` or `seed=1`.
        resume: go on from the state in `out`.
        out: where everything is written, by default `runs/` and the config's name.

    Returns:
        The folder of the trained checkpoint.

    Raises:
        UserError: the config is wrong, or `out` holds another training.
        TrainingError: training stopped itself.
    """
    config_path = Path(config_path)
    config = read_config(config_path, overrides)
    folder = out or Path("runs") / config_path.stem
    words = [str(config_path), *overrides, *(["--resume"] if resume else [])]
    words += [] if out is None else ["--out", str(out)]
    hint = f"in several processes: accelerate launch -m ipn_core.training {shlex.join(words)}"
    return Training(config, folder, resume=resume, hint=hint).run()


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML config and lay overrides over it."""
    return TrainConfig.parse(load_yaml(path, overrides), str(path))


class Training:
    """A training in a folder."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        resume: bool = False,
        registry: Registry | None = None,
        console: Console | None = None,
        model: IPN | None = None,
        hint: str = "",
    ) -> None:
        """Check everything that can be checked before anything is loaded or written.

        Args:
            config: what to do.
            folder: for state, metrics, plot and the trained checkpoint.
            resume: go on from the state there.
            registry: where names are looked up.
            console: where progress goes, by default stderr.
            model: a ready one with new weights, else it is built from the config.
            hint: what to say at the start of a training in one process.
        """
        self.config = config
        self.folder = folder
        self.registry = registry or get_registry()
        self.console = console or Console(stderr=True)
        free = {"workers", "save_every", "keep", "log_every", "trackers", "checkpointing"}
        self.digest = hashlib.sha256(
            json.dumps(config.model_dump(mode="json", exclude=free)).encode()
        ).hexdigest()
        self.position = self._position(resume)
        self._model = model
        self._hint = hint
        for stage in config.stages:
            for name in stage.objectives:
                self.registry.get("objective", name)

    def _position(self, resume: bool) -> Position:
        if self.folder.exists() and not self.folder.is_dir():
            raise ConfigError(f"'{self.folder}' is no folder. Choose another one with --out.")
        found = peek(self.folder) if self.folder.is_dir() else None
        if found is None:
            if resume:
                self.console.print(f"no saved state in '{self.folder}': starting at the beginning")
            return Position(0, 0, self.digest)
        if not resume:
            raise ConfigError(
                f"'{self.folder}' holds a training already. Go on with --resume, or choose another "
                "folder with --out."
            )
        if found.config != self.digest:
            raise ConfigError(
                f"'{self.folder}' holds a training with another config, so that going on would mix "
                "the two. Use the same config and overrides, or another folder with --out."
            )
        return found

    def run(self) -> Path:
        """Train all stages and write the checkpoint; returns its folder."""
        from accelerate.utils import set_seed

        accelerator = self._accelerator()
        if not accelerator.is_main_process:
            self.console = Console(quiet=True)
        agree(accelerator, (self.position.stage, self.position.step), self.folder)
        if accelerator.scaler is not None and self.position.scaler is not None:
            accelerator.scaler.load_state_dict(self.position.scaler)
        set_seed(self.config.seed)
        begun = (self.position.stage, self.position.step) > (0, 0)
        model = self._load(accelerator, begun)
        workers = self.config.workers
        data = [open_data(entry, self.registry, workers) for entry in self.config.data]
        validation = [Data(entry, self.registry, True) for entry in self.config.validate_on]
        left = self.config.stages[self.position.stage :]
        check_stages(left, model, data, self.registry, self.config.seed)
        self._note_unused_workers(data)
        if self._hint and accelerator.num_processes == 1:
            self._note(self._hint)
        self._encode([*data, *validation], model)
        make_folder(self.folder)
        with held(accelerator, self.folder):
            there = peek(self.folder)
            here = None if there is None else (there.stage, there.step)
            if here != ((self.position.stage, self.position.step) if begun else None):
                raise ConfigError(
                    f"another process has trained in '{self.folder}' since this one looked. Go on "
                    "from there with --resume."
                )
            return self._train(accelerator, model, data, validation)

    def _train(
        self,
        accelerator: Accelerator,
        model: IPN,
        data: list[DataSource],
        validation: list[Data],
    ) -> Path:
        """Train the stages that are left, in a folder that nobody else writes to."""
        frozen = FrozenBackbone(model)
        if accelerator.is_main_process:
            remove_unfinished(self.folder)
            text = json.dumps(self.config.model_dump(mode="json"), indent=2) + "\n"
            atomic_write(self.folder / CONFIG, text.encode())
        log = Log(self.folder, self.position, self.config, accelerator)
        digest = cache(partial(backbone_digest, model))
        trained: nn.Module = model
        parted = sharded(accelerator)
        for index in range(self.position.stage, len(self.config.stages)):
            if parted and index > self.position.stage:
                # What is sharded for a stage stays so; the next one begins with what it saved.
                accelerator.wait_for_everyone()
                model = self._load(accelerator, begun=True)
                frozen, digest = FrozenBackbone(model), cache(partial(backbone_digest, model))
            run = StageRun(
                self.config.stages[index],
                model,
                data,
                cache=self.cache,
                registry=self.registry,
                accelerator=accelerator,
                seed=self.config.seed,
                digest=digest,
                prefixes=int(self.config.prefix_cache * 2**30),
            )
            self._stage(index, run, data, validation, accelerator, log)
            self.cache.flush()
            accelerator.free_memory()
            trained = run.losses
        with whole(trained):
            self._note(frozen.check())
        target = self.folder / "model"
        self._save(model, target, accelerator)
        if log.metrics is not None:
            plot(log.metrics)
        if log.best is not None:
            self._note(
                f"best: '{self.folder / BEST}', of stage '{log.best['stage']}', step "
                f"{log.best['step']}: {100 * log.best['accuracy']:.1f} % of the validation examples"
            )
        log.close()
        self._note(f"trained: '{target}'. Ask it with: ipn ask IMAGE QUESTION --model {target}")
        return target

    # -- parts -----------------------------------------------------------------------------------

    def _accelerator(self) -> Accelerator:
        return accelerate(self.config.precision, self.config.trackers, self.folder)

    def _load(self, accelerator: Accelerator, begun: bool) -> IPN:
        """Build the model, with the weights of the saved state if the training has `begun`."""
        model = self._build().to(accelerator.device)
        model.backbone.checkpointing = self.config.checkpointing
        if begun:
            load_state(self.folder, model)
        return model

    def _save(self, model: IPN, target: Path, accelerator: Accelerator) -> None:
        weights = weights_of(collect(model, None, {}))
        if accelerator.is_main_process:
            save(model, target, getattr(torch, self.config.save_dtype), weights)

    def _build(self) -> IPN:
        from ipn_core.model import IPN

        model = self._model or IPN.from_config(
            self._model_config(), registry=self.registry, name=str(self.folder)
        )
        if self.config.start_from is not None:
            source = open_source(self.config.start_from, self.registry)
            there = model.strategy in source.strategies
            anew = trainable(model, self.config.anew)
            source.fill(model, model.strategy if there else source.strategies[0], anew)
        return model

    def _model_config(self) -> dict[str, Any]:
        base = self.config.base
        taken = {} if base is None else open_source(base, self.registry).base(self.registry)
        return {**taken, **self.config.model}

    def _encode(self, data: Sequence[DataSource], model: IPN) -> None:
        self.cache = FeatureCache(model.encoder, note=self._note)
        with bar(self.console) as progress:
            for one in data:
                task = progress.add_task(
                    f"pictures of {one.name} {one.split}", total=len(one.pictures), note=""
                )
                one.encode(self.cache, Moving(progress, task))

    def _stage(
        self,
        index: int,
        run: StageRun,
        data: list[DataSource],
        validation: list[Data],
        accelerator: Accelerator,
        log: Log,
    ) -> None:
        stage = run.stage
        resumed = index == self.position.stage and self.position.step > 0
        if resumed:
            run.step = self.position.step
            if self.position.windows is not None:
                run.sampler.resume(self.position.windows)
        with bar(self.console) as progress:
            task = progress.add_task("questions read by the LLM", total=None, note="")
            run.read_requests([*data, *validation], Moving(progress, task))
        if not resumed and index == 0 and self.config.start_from is None:
            run.fit()
        run.prepare()
        if resumed:
            load_moments(self.folder, run.optimizer, run.names)
        else:
            self._note(run.check())
        self._note_unjudged(run, validation)
        with bar(self.console) as progress:
            task = progress.add_task(stage.name, total=stage.steps, completed=run.step, note="")
            started = time.perf_counter()
            while not run.done:
                entry = run.advance()
                note = f"loss {entry['loss']:.3f}, {entry['examples_per_s']:.0f} examples/s"
                progress.update(task, completed=run.step, note=note)
                entry["seconds"] = round(time.perf_counter() - started, 2)
                self._after(index, run, entry, validation, accelerator, log)

    def _after(
        self,
        index: int,
        run: StageRun,
        entry: dict[str, float],
        validation: list[Data],
        accelerator: Accelerator,
        log: Log,
    ) -> None:
        """Log, validate and save, where a step is due for it."""
        stage = run.stage
        here = {"stage": stage.name, "stage_index": index, "step": run.step}
        if run.done or run.step % self.config.log_every == 0:
            log.write(here, entry)
        if run.done or (stage.validate_every and run.step % stage.validate_every == 0):
            found = run.validate(validation)
            if found is not None:
                self._validated(run, here, found, accelerator, log)
        if not run.done and run.step % self.config.save_every:
            return
        if run.done:
            at, tensors = Position(index + 1, 0, self.digest), collect(run.model, None, {})
        else:
            windows = run.sampler.state(run.step * stage.accumulate)
            at = Position(index, run.step, self.digest, windows=windows)
            tensors = collect(run.model, run.optimizer, run.names)
        if accelerator.is_main_process:
            scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
            save_state(self.folder, replace(at, scaler=scaler), tensors, self.config.keep)

    def _validated(
        self,
        run: StageRun,
        here: dict[str, Any],
        found: dict[str, Any],
        accelerator: Accelerator,
        log: Log,
    ) -> None:
        """Log a validation, and keep the model if it is the best of its stage."""
        if log.write(here, found):
            self._save(run.model, self.folder / BEST, accelerator)
        by_type = ", ".join(f"{name} {100 * a:.1f}" for name, a in found["by_type"].items())
        self._note(
            f"{run.stage.name}, step {run.step}: {100 * found['accuracy']:.1f} % of the "
            f"validation examples ({by_type})"
        )

    def _note_unjudged(self, run: StageRun, validation: list[Data]) -> None:
        """Say that a stage looks at no validation examples, where the config asks for it."""
        stage = run.stage
        if validation and run.judge is None:
            self._note(
                f"{stage.name}: none of its objectives ({', '.join(stage.objectives)}) can tell "
                "right answers from wrong ones, so 'validate_on' is left out in this stage; "
                "'answer-embedding' can, and 'ipn eval' judges what comes out"
            )
        elif stage.validate_every and not validation:
            self._note(f"{stage.name}: 'validate_every' does nothing without 'validate_on'")

    def _note_unused_workers(self, data: Sequence[DataSource]) -> None:
        if self.config.workers and not any(isinstance(one, Stream) for one in data):
            self._note(
                "'workers' does nothing without 'stream': other data is encoded once, at the start"
            )

    def _note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
