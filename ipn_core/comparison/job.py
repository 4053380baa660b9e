"""One job of a comparison: an arm with one seed is trained, asked, and measured.

Every part is a file that is written whole; a job that is started again does what is missing.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ipn_core.checkpoint import WEIGHTS
from ipn_core.comparison.config import EvaluationConfig
from ipn_core.comparison.kept import damaged, read_kept, write_kept, wrong_keys
from ipn_core.errors import ConfigError, TrainingError
from ipn_core.evaluation.choosing import choose_questions
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.files import lock, make_folder, remove_unfinished
from ipn_core.memory import keep_freed_memory
from ipn_core.model import IPN
from ipn_core.plugins import Registry, get_registry
from ipn_core.tasks import open_task
from ipn_core.training.config import TrainConfig
from ipn_core.training.data import Data
from ipn_core.training.features import FeatureCache
from ipn_core.training.loop import StageRun
from ipn_core.training.metrics import METRICS, read_metrics
from ipn_core.training.requests import backbone_digest
from ipn_core.training.run import Training

__all__ = ["MODEL", "Job", "run_job", "run_job_in_own_process"]

JOB = "job.json"
RESULT = "result.json"
MODEL = Path("train") / "model"
"""Where the checkpoint lies in a job's folder."""
_FLOP_STEPS = 2
"""Steps of a stage that are counted."""
_ANEW = "Remove its folder, so that the job is done anew."
_JOB = {
    "name": str,
    "arm": dict,
    "seed": int,
    "training": dict,
    "evaluate": list,
    "batch_size": int,
    "threads": int,
}
_SCORE = {
    "shuffled": bool,
    "right": list,
    "types": list,
    "pictures": list,
    "guess_by_type": dict,
    "cpu_s": float,
}
_PARTS: dict[str, dict[str, type]] = {
    "trained": {"peak_memory": int, "examples_per_s": dict, "cpu_s": float},
    "measured": {"train_flops": float, "cpu_s": float},
}
"""What the files of a job's parts hold; all others are scores."""
_RESULT = {
    "seed": int,
    "arm": dict,
    "training": dict,
    "measured": dict,
    "scores": list,
    "cpu_s": float,
}


@dataclass(frozen=True)
class Job:
    """What a process needs to know.

    Attributes:
        name: of the job, and of its folder.
        folder: where everything of it lies.
        arm: of `arms.Arm`, as JSON.
        seed: of weights, order and noise.
        training: a training config.
        evaluate: as in the comparison's config.
        batch_size: questions at once.
        threads: of the CPU, where the job has a process of its own.
    """

    name: str
    folder: str
    arm: dict[str, Any]
    seed: int
    training: dict[str, Any]
    evaluate: list[dict[str, Any]]
    batch_size: int
    threads: int

    @property
    def result(self) -> Path:
        """The file that is written once everything is done."""
        return Path(self.folder) / RESULT

    @property
    def path(self) -> Path:
        """Where it is written down."""
        return Path(self.folder) / JOB

    @property
    def log(self) -> Path:
        """What it says where it has a process of its own."""
        return Path(self.folder) / "job.log"

    def is_done(self) -> bool:
        """Whether everything that it is asked is answered.

        Raises:
            CheckpointError: the result is damaged.
        """
        return self.result.is_file() and self._is_of(self.found())

    def _is_of(self, found: dict[str, Any]) -> bool:
        scores = found["scores"]
        return [score.get("asked") for score in scores if not score["shuffled"]] == self.evaluate

    def answers(self) -> dict[str, Any]:
        """Return the result, if it answers what is asked.

        Raises:
            CheckpointError: it is damaged.
            TrainingError: a process of another comparison has just written other answers.
        """
        found = self.found()
        if not self._is_of(found):
            raise TrainingError(
                f"'{self.result}' answers other questions: another comparison runs in this folder. "
                "Go on with --resume once it has ended."
            )
        return found

    def found(self) -> dict[str, Any]:
        """Return the result.

        Raises:
            CheckpointError: it is damaged.
        """
        found = read_kept(self.result, _RESULT, _ANEW)
        wrong = [key for score in found["scores"] for key in wrong_keys(score, _SCORE)]
        if wrong:
            raise damaged(self.result, dict.fromkeys(wrong), _ANEW)
        return found

    def check(self) -> None:
        """Refuse a folder that holds something else under the same name.

        Raises:
            ConfigError: what it trains is not what is there, or it has not answered what it is
                asked and what it would answer with is gone.
            CheckpointError: what is there is damaged.
        """
        same = True
        if self.path.is_file():
            same = Job.read(self.path).training == self.training
        if self.result.is_file():
            arm = self.found()["arm"]
            same = same and all(arm.get(key) == self.arm[key] for key in ("model", "stages"))
        if not same:
            raise ConfigError(
                f"'{self.path}' holds arm '{self.arm['name']}' with another config, so that going "
                "on would mix the two. Use the same config, or another folder with --out."
            )
        needed = [Path(self.folder) / name for name in ("trained.json", MODEL / WEIGHTS)]
        gone = [path for path in needed if not path.is_file()]
        trained = needed[0] not in gone or self.result.is_file()
        if trained and gone and not self.is_done():
            raise ConfigError(
                f"'{self.path}' has not answered these questions, and '{gone[0]}' is gone, which "
                "it needs for that. Use the 'evaluate' of before, or another folder with --out."
            )

    def write(self) -> None:
        """Write it down, for a process to read and for a later call to compare with."""
        make_folder(self.path.parent)
        values = {k: v for k, v in asdict(self).items() if k != "folder"}  # it may be moved
        write_kept(self.path, values, indent=1)

    @classmethod
    def read(cls, path: Path) -> Job:
        """Read what `write` wrote.

        Raises:
            CheckpointError: it is damaged.
        """
        values = read_kept(path, _JOB, _ANEW)
        return cls(folder=str(path.parent.absolute()), **{key: values[key] for key in _JOB})


def run_job(job: Job, registry: Registry | None = None) -> None:
    """Do what is missing of a job.

    A process that an earlier comparison left behind, because only that was killed, is waited for.
    It does nothing more where the job is asked something else by then.

    Args:
        job: what to do.
        registry: where names are looked up, by default everything installed.
    """
    with lock(Path(job.folder) / "lock"):
        if Job.read(job.path).evaluate == job.evaluate and not job.is_done():
            _Run(job, registry or get_registry()).run()


def run_job_in_own_process(job: Job) -> None:
    """Do what is missing of a job, in a process that does nothing else and takes its threads."""
    torch.set_num_threads(job.threads)
    keep_freed_memory()
    run_job(job)


class _Run:
    """A job that runs in this process."""

    def __init__(self, job: Job, registry: Registry) -> None:
        self.job = job
        self.folder = Path(job.folder)
        self.registry = registry
        self.config = TrainConfig.parse(job.training, job.name)

    def run(self) -> None:
        """Do what is missing, and write the result."""
        remove_unfinished(self.folder)
        training = self._kept("trained", self._train)
        measured = self._kept("measured", self._count_flops)
        model = IPN.from_pretrained(self.folder / MODEL, registry=self.registry)
        entries = list(enumerate(self.job.evaluate))
        asked = [(i, entry, False) for i, entry in entries]
        if self.job.arm["asks"]:
            asked += [(i, entry, True) for i, entry in entries if entry["shuffled"]]
        scores = []
        for index, values, shuffled in asked:
            entry = EvaluationConfig.parse(values, self.job.name)
            name = f"eval-{index}-shuffled" if shuffled else f"eval-{index}"
            scores.append(self._kept(name, partial(self._ask, model, entry, shuffled), values))
        facts = {"name": self.job.name, "seed": self.job.seed, "arm": self.job.arm}
        found = {"training": training, "measured": measured, "scores": scores}
        facts["cpu_s"] = sum(part["cpu_s"] for part in (training, measured, *scores))
        write_kept(self.job.result, {**facts, **found})

    def _kept(
        self, name: str, make: Callable[[], dict[str, Any]], asked: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return what a file holds; it is made if it is not there, or answers what was not asked.

        Args:
            name: of the file.
            make: what it is to hold; its seconds of CPU are added.
            asked: the entry of `evaluate`, of answers.
        """
        path = self.folder / f"{name}.json"
        kinds, cure = _PARTS.get(name, _SCORE), "Remove it, so that this is done anew."
        if path.is_file():
            found = read_kept(path, kinds, cure)
            if found.get("asked") == asked:
                return found
        started = time.process_time()
        made = make()
        told = {} if asked is None else {"asked": asked}
        write_kept(path, {**told, **made, "cpu_s": time.process_time() - started})
        return read_kept(path, kinds, cure)

    def _train(self) -> dict[str, Any]:
        """Train, or go on with it; return the peak memory and how fast the steps were."""
        folder = self.folder / "train"
        Training(self.config, folder, resume=True, registry=self.registry).run()
        rates: dict[str, list[float]] = {}
        for entry in read_metrics(folder / METRICS):
            if "examples_per_s" in entry:
                rates.setdefault(entry["stage"], []).append(entry["examples_per_s"])
        return {
            "peak_memory": _peak_memory(),
            "examples_per_s": {name: median(found) for name, found in rates.items()},
        }

    def _count_flops(self) -> dict[str, Any]:
        """Count the floating-point operations of some steps of each stage, times all its steps.

        What is read once and kept for all arms, features and requests, is not counted.
        """
        accelerator = Accelerator()
        model = IPN.from_pretrained(self.folder / MODEL, registry=self.registry)
        model = model.to(accelerator.device)
        data = [Data(entry, self.registry, training=True) for entry in self.config.data]
        cache = FeatureCache(model.encoder)
        for one in data:
            one.encode(cache)
        by_stage: dict[str, float] = {}
        for stage in self.config.stages:
            run = StageRun(
                stage,
                model,
                data,
                cache=cache,
                registry=self.registry,
                accelerator=accelerator,
                seed=self.config.seed,
                digest=partial(backbone_digest, model),
            )
            run.read_requests(data)
            # The counter knows the products of plain attention, not every fused kernel of a CPU.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                for _ in range(_FLOP_STEPS):
                    run.advance()
            by_stage[stage.name] = counter.get_total_flops() / _FLOP_STEPS * stage.steps
        return {"train_flops": sum(by_stage.values()), "train_flops_by_stage": by_stage}

    def _ask(self, model: IPN, entry: EvaluationConfig, shuffled: bool) -> dict[str, Any]:
        """Ask the questions of one entry, and say which answers were right."""
        task = open_task(entry.task, entry.options, self.registry)
        split = entry.split or task.default_split
        pool = task.examples(split)
        report = evaluate(
            model,
            choose_questions(pool, entry.limit, entry.per_picture),
            task=entry.task,
            split=split,
            batch_size=self.job.batch_size,
            seed=self.job.seed,
            shuffled=shuffled,
            pool=pool,
        )
        return {
            "task": entry.task,
            "split": split,
            "shuffled": shuffled,
            "guess_by_type": {t: g.accuracy for t, g in report.guess_by_type.items()},
            "seconds": report.seconds,
            "types": [p.example.type for p in report.predictions],
            "pictures": [[image.name for image in p.example.images] for p in report.predictions],
            "said": [p.text for p in report.predictions],
            "right": [p.right for p in report.predictions],
        }


def _peak_memory() -> int:
    """Return the most bytes that this process held, on the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
