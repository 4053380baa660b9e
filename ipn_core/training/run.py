"""`ipn train`: from a config to a trained checkpoint, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ipn_core.checkpoint import open_source, save
from ipn_core.config import load_yaml, set_by_path
from ipn_core.errors import ConfigError
from ipn_core.files import atomic_write
from ipn_core.plugins import Registry, get_registry
from ipn_core.training.checks import FrozenBackbone, check_stages
from ipn_core.training.config import DataConfig, TrainConfig
from ipn_core.training.data import Data
from ipn_core.training.features import FeatureCache
from ipn_core.training.loop import StageRun
from ipn_core.training.report import Metrics, Moving, bar, plot
from ipn_core.training.requests import backbone_digest
from ipn_core.training.state import Position, load_state, peek, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

    from ipn_core.model import IPN

__all__ = ["Training", "read_config", "train"]

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
    return Training(config, folder, resume=resume).run()


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML config and lay overrides over it."""
    values = load_yaml(path)
    for assignment in overrides:
        set_by_path(values, assignment)
    return TrainConfig.parse(values, str(path))


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
    ) -> None:
        """Check everything that can be checked before anything is loaded or written.

        Args:
            config: what to do.
            folder: for state, metrics, plot and the trained checkpoint.
            resume: go on from the state there.
            registry: where names are looked up.
            console: where progress goes, by default stderr.
            model: a ready one with new weights, else it is built from the config.
        """
        self.config = config
        self.folder = folder
        self.registry = registry or get_registry()
        self.console = console or Console(stderr=True)
        self.digest = hashlib.sha256(
            json.dumps(config.model_dump(mode="json", exclude={"save_every", "log_every"})).encode()
        ).hexdigest()
        self.position = self._position(resume)
        self._model = model
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
        if accelerator.scaler is not None and self.position.scaler is not None:
            accelerator.scaler.load_state_dict(self.position.scaler)
        set_seed(self.config.seed)
        model = self._build().to(accelerator.device)
        if (self.position.stage, self.position.step) > (0, 0):
            load_state(self.folder, model, None, {})
        data, validation = self._open(self.config.data), self._open(self.config.validate_on)
        left = self.config.stages[self.position.stage :]
        check_stages(left, model, data, self.registry, self.config.seed)
        frozen = FrozenBackbone(model)
        self._encode([*data, *validation], accelerator, model)
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config.model_dump(mode="json"), indent=2) + "\n"
        atomic_write(self.folder / CONFIG, text.encode())
        self.metrics = Metrics(self.folder, self.position.stage, self.position.step)
        digest = cache(partial(backbone_digest, model))
        for index in range(self.position.stage, len(self.config.stages)):
            run = StageRun(
                self.config.stages[index],
                model,
                data,
                cache=self.cache,
                registry=self.registry,
                accelerator=accelerator,
                seed=self.config.seed,
                digest=digest,
            )
            self._stage(index, run, data, validation, accelerator)
        frozen.check()
        self._note("the backbone is unchanged: its text-only logits are equal bit for bit")
        target = self.folder / "model"
        if accelerator.is_main_process:
            save(model, target, getattr(torch, self.config.save_dtype))
            plot(self.metrics)
        self._note(f"trained: '{target}'. Ask it with: ipn ask IMAGE QUESTION --model {target}")
        return target

    # -- parts -----------------------------------------------------------------------------------

    def _accelerator(self) -> Accelerator:
        from accelerate import Accelerator

        precision = self.config.precision
        try:
            return Accelerator(mixed_precision="no" if precision == "fp32" else precision)
        except ValueError as error:
            # fp16 without a GPU, or a process that has trained in another precision.
            raise ConfigError(
                f"precision {precision} cannot be used in this process: {error}"
            ) from None

    def _build(self) -> IPN:
        from ipn_core.model import IPN

        model = self._model or IPN.from_config(
            self._model_config(), registry=self.registry, name=str(self.folder)
        )
        if self.config.start_from is not None:
            source = open_source(self.config.start_from, self.registry)
            there = model.strategy in source.strategies
            source.fill(model, model.strategy if there else source.strategies[0])
        return model

    def _model_config(self) -> dict[str, Any]:
        base = self.config.base
        taken = {} if base is None else open_source(base, self.registry).base(self.registry)
        return {**taken, **self.config.model}

    def _open(self, entries: Sequence[DataConfig]) -> list[Data]:
        return [Data(entry, self.registry, training=True) for entry in entries]

    def _encode(self, data: Sequence[Data], accelerator: Accelerator, model: IPN) -> None:
        self.cache = FeatureCache(model.encoder)
        with bar(self.console) as progress:
            for one in data:
                task = progress.add_task(
                    f"pictures of {one.name} {one.split}", total=len(one.pictures), note=""
                )
                with accelerator.local_main_process_first():
                    one.encode(self.cache, Moving(progress, task))

    def _stage(
        self,
        index: int,
        run: StageRun,
        data: list[Data],
        validation: list[Data],
        accelerator: Accelerator,
    ) -> None:
        stage = run.stage
        with bar(self.console) as progress:
            task = progress.add_task("questions read by the LLM", total=None, note="")
            run.read_requests([*data, *validation], Moving(progress, task))
        resumed = index == self.position.stage and self.position.step > 0
        if resumed:
            load_state(self.folder, run.model, run.optimizer, run.names)
            run.step = self.position.step
        elif index == 0 and self.config.start_from is None:
            run.fit()
        if not resumed:
            self._note(run.check())
        self._note_unjudged(run, validation)
        with bar(self.console) as progress:
            task = progress.add_task(stage.name, total=stage.steps, completed=run.step, note="")
            started = time.perf_counter()
            while not run.done:
                entry = run.advance()
                note = f"loss {entry['loss']:.3f}, {entry['examples_per_s']:.0f} examples/s"
                progress.update(task, completed=run.step, note=note)
                if accelerator.is_main_process:
                    seconds = round(time.perf_counter() - started, 2)
                    self._after(index, run, {**entry, "seconds": seconds}, validation, accelerator)

    def _after(
        self,
        index: int,
        run: StageRun,
        entry: dict[str, float],
        validation: list[Data],
        accelerator: Accelerator,
    ) -> None:
        """Log, validate and save, where a step is due for it."""
        stage = run.stage
        here = {"stage": stage.name, "stage_index": index, "step": run.step}
        if run.done or run.step % self.config.log_every == 0:
            self.metrics.write(**here, **entry)
        if run.done or (stage.validate_every and run.step % stage.validate_every == 0):
            self._validate(run, validation, here)
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        if run.done:
            at = Position(index + 1, 0, self.digest, scaler)
            save_state(self.folder, at, run.model, None, {})
        elif run.step % self.config.save_every == 0:
            at = Position(index, run.step, self.digest, scaler)
            save_state(self.folder, at, run.model, run.optimizer, run.names)

    def _validate(self, run: StageRun, validation: list[Data], here: dict[str, Any]) -> None:
        found = run.validate(validation)
        if found is None:
            return
        self.metrics.write(**here, **found)
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

    def _note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
