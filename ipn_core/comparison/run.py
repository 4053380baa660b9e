"""Run a comparison: make the arms, fill the shared caches, run the jobs, write the report."""

from __future__ import annotations

import hashlib
import json
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ipn_core.comparison.arms import Arm, Arms
from ipn_core.comparison.config import CompareConfig
from ipn_core.comparison.executors import Executor, Local
from ipn_core.comparison.job import MODEL, Job
from ipn_core.comparison.kept import read_kept, write_kept
from ipn_core.comparison.report import write_report
from ipn_core.comparison.results import Results
from ipn_core.comparison.timing import first_token
from ipn_core.errors import ConfigError, DataError, TrainingError
from ipn_core.evaluation.choosing import choose_questions
from ipn_core.evaluation.shuffled import draw_partners
from ipn_core.files import make_folder, remove_unfinished
from ipn_core.model import IPN
from ipn_core.plugins import Registry, get_registry
from ipn_core.processors import allowed_cpus, allowed_threads
from ipn_core.tasks import check_pictures, open_task
from ipn_core.training.data import known_features
from ipn_core.training.features import FeatureCache
from ipn_core.training.report import Moving, bar
from ipn_core.training.requests import RequestCache, backbone_digest

__all__ = ["Comparison"]

PLAN = "compare.json"
FIRST_TOKEN = "first-token.json"
_FREE = {"arms", "seeds", "sweep", "batch_size", "evaluate"}
"""Keys that may change from call to call; each job knows its own arm, and what it is asked."""


class Comparison:
    """A comparison in a folder."""

    def __init__(
        self,
        config: CompareConfig,
        folder: Path,
        *,
        command: Sequence[str],
        resume: bool = False,
        executor: Executor | None = None,
        registry: Registry | None = None,
        console: Console | None = None,
    ) -> None:
        """Check everything that can be checked before anything is trained.

        Args:
            config: what to compare.
            folder: for jobs and report.
            command: the words of the command line, for the report.
            resume: go on with what is there.
            executor: where the jobs run, by default processes of this machine.
            registry: where names are looked up.
            console: where progress goes, by default stderr.

        Raises:
            ConfigError: an arm cannot be built or compared, or the folder holds something else.
        """
        self.config = config
        self.folder = folder
        self.command = list(command)
        self._commands: list[str] = []
        self._commits: list[str] = []
        self.registry = registry or get_registry()
        self.console = console or Console(stderr=True)
        same = config.model_dump(mode="json", exclude=_FREE)
        self.digest = hashlib.sha256(json.dumps(same).encode()).hexdigest()
        self._check_folder(resume)
        self.executor = executor or Local()
        self.threads = _threads(self.executor.workers)
        self._check_questions()

    def _check_folder(self, resume: bool) -> None:
        plan = self.folder / PLAN
        if not plan.is_file():
            if resume:
                self._note(f"'{self.folder}' holds no comparison yet: it begins")
            return
        if not resume:
            raise ConfigError(
                f"'{self.folder}' holds a comparison already. Go on with --resume, or choose "
                "another folder with --out."
            )
        kinds = {"digest": str, "commands": list, "commits": list}
        found = read_kept(plan, kinds, "Remove it, or choose another folder with --out.")
        if found["digest"] != self.digest:
            raise ConfigError(
                f"'{self.folder}' holds a comparison with another config, so that going on would "
                "mix the two. Use the same config, or another folder with --out."
            )
        self._commands = [str(one) for one in found["commands"]]
        self._commits = [str(one) for one in found["commits"]]

    def _check_questions(self) -> None:
        """Open what the arms are asked: what is missing should not come out after training."""
        seen: set[tuple[str, str]] = set()
        for entry in self.config.evaluate:
            task = open_task(entry.task, entry.options, self.registry)
            split = entry.split or task.default_split
            if (entry.task, split) in seen:
                raise ConfigError(
                    f"'evaluate' has {entry.task} split '{split}' twice: scores are told apart by "
                    "task and split. Take one of them out."
                )
            seen.add((entry.task, split))
            task.check_split(split)
            pool = task.examples(split)
            if not pool:
                raise DataError(f"'{entry.task}' split '{split}' holds no examples.")
            asked = choose_questions(pool, entry.limit, entry.per_picture)
            check_pictures(asked)
            if entry.shuffled:
                draw_partners(asked, pool, 0)  # refuses where there are none

    def run(self) -> Path:
        """Do everything that is missing; returns the path of `report.md`.

        Raises:
            TrainingError: a job failed; the others were finished.
        """
        maker = Arms(self.config, self.registry)
        arms = maker.make()
        self._note_arms(arms)
        make_folder(self.folder)
        remove_unfinished(self.folder)
        jobs = [job for arm in arms for job in self._jobs(arm)]
        for job in jobs:
            job.check()
        missing = [job for job in jobs if not job.is_done()]
        self._write_plan(trains=bool(missing))
        # Seed by seed, and the sweep last: what an interrupted run leaves is whole sets of arms.
        missing.sort(key=lambda job: (job.arm["dynamic"] != self.config.dynamic, job.seed))
        if missing:
            self._fill_caches(maker, arms)
            self._run(missing)
        results = Results(jobs, self.config.reference, self.config.control, self.config.dynamic)
        path = write_report(results, self.folder, self._facts(jobs), self._first_token(jobs))
        self._note(path.read_text(encoding="utf-8").split("\n", 1)[0].replace("**", ""))
        return path

    def _write_plan(self, trains: bool) -> None:
        """Write down what is compared, with which commands so far, and by which commits' jobs."""
        self._commands = list(dict.fromkeys([*self._commands, shlex.join(self.command)]))
        if trains:
            self._commits = list(dict.fromkeys([*self._commits, _commit()]))
        plan = {
            "digest": self.digest,
            "commands": self._commands,
            "commits": self._commits,
            "config": self.config.model_dump(mode="json"),
        }
        write_kept(self.folder / PLAN, plan, indent=1)

    def _jobs(self, arm: Arm) -> list[Job]:
        main = arm.dynamic == self.config.dynamic
        sweep = self.config.sweep
        seeds = self.config.seeds if main else sweep.seeds if sweep else 0
        jobs = []
        for seed in range(seeds):
            name = f"{arm.name}-k{arm.dynamic}-seed{seed}"
            training = {
                "model": arm.model,
                "data": [d.model_dump(mode="json", exclude_unset=True) for d in self.config.data],
                "stages": arm.stages,
                "seed": seed,
                "precision": self.config.precision,
                "save_every": self.config.save_every,
            }
            evaluate = [e.model_dump(mode="json") for e in self.config.evaluate]
            jobs.append(
                Job(
                    name,
                    str((self.folder / "jobs" / name).absolute()),
                    arm.to_json(),
                    seed,
                    training,
                    evaluate,
                    self.config.batch_size,
                    self.threads,
                )
            )
        return jobs

    def _fill_caches(self, maker: Arms, arms: Sequence[Arm]) -> None:
        """Encode all pictures and read all questions once, before the jobs need them."""
        arm = next(a for a in arms if a.name == self.config.reference)
        model = IPN.from_config(arm.model, registry=self.registry)
        cache = FeatureCache(model.encoder)
        requests = RequestCache(model, backbone_digest(model))
        with bar(self.console) as progress:
            for one in maker.data:
                what = f"pictures of {one.name} {one.split}"
                task = progress.add_task(what, total=len(one.pictures), note="")
                one.encode(cache, Moving(progress, task))
            for one in maker.data:
                task = progress.add_task("questions read by the LLM", total=None, note="")
                features = partial(known_features, one, cache)
                requests.add(one.examples, features, Moving(progress, task))

    def _run(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.write()
        failed: dict[str, str] = {}
        with bar(self.console) as progress:
            task = progress.add_task("jobs", total=len(jobs), note="")
            started, done = time.perf_counter(), 0

            def ended(job: Job, said: str | None) -> None:
                nonlocal done
                done += 1
                if said is not None:
                    failed[job.name] = said
                state = "done" if said is None else "failed"
                minutes = (time.perf_counter() - started) / 60
                note = f"{job.name} {state}, {minutes:.1f} min"
                progress.update(task, completed=done, note=note)

            self.executor.run(jobs, ended)
        if failed:
            told = " ".join(f"{name}: {' '.join(said.split())}" for name, said in failed.items())
            raise TrainingError(
                f"{len(failed)} of {len(jobs)} jobs failed; the others are kept. Mend the cause "
                f"and go on with --resume. {told}"
            )

    def _first_token(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Time the trained arms side by side, unless an earlier call did or weights are gone."""
        main = [j for j in jobs if j.arm["dynamic"] == self.config.dynamic and j.seed == 0]
        folders = {j.arm["name"]: Path(j.folder) / MODEL for j in main}
        path = self.folder / FIRST_TOKEN
        known = read_kept(path, {}, "Remove it, and it is taken anew.") if path.is_file() else {}
        timed = {name for name, one in known.items() if "seconds" in one}
        if timed >= folders.keys():
            return known
        gone = [name for name, folder in folders.items() if not folder.is_dir()]
        if gone:
            self._note(
                f"no first-token times of {', '.join(sorted(folders.keys() - timed))}: all arms "
                f"are timed side by side, and the weights of {', '.join(gone)} are gone"
            )
            return known
        entry = self.config.evaluate[0]
        task = open_task(entry.task, entry.options, self.registry)
        examples = task.examples(entry.split or task.default_split)[:6]
        found = first_token(folders, self.config.reference, examples, self.registry)
        write_kept(path, found, indent=1)
        return found

    def _facts(self, jobs: Sequence[Job]) -> dict[str, str]:
        packages = ("torch", "transformers", "accelerate", "numpy")
        first, *later = self._commands
        return {
            "command": first,
            **({"went on with": "; ".join(later)} if later else {}),
            "commits of the jobs": ", ".join(self._commits),
            "seeds": f"0 to {self.config.seeds - 1}",
            "jobs": f"{len(jobs)}, {self.executor.workers} at once, {self.threads} threads each",
            "machine": f"{platform.machine()}, {allowed_cpus().number} cores, {_device()}",
            "versions": ", ".join(
                [f"python {platform.python_version()}", f"ipn-core {version('ipn-core')}"]
                + [f"{name} {version(name)}" for name in packages]
            ),
            "config": json.dumps(self.config.model_dump(mode="json", exclude_unset=True)),
        }

    def _note_arms(self, arms: Sequence[Arm]) -> None:
        for arm in arms:
            self._note(
                f"{arm.name}, K = {arm.dynamic}: {arm.static} static + {arm.request} request + "
                f"{arm.message} dynamic tokens, {arm.parameters:,} parameters train "
                f"({arm.width} = {arm.width_value})"
            )

    def _note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def _threads(workers: int) -> int:
    """Return the threads of each of so many jobs at once: their share, unless the user set it."""
    cpus, threads = allowed_cpus(), allowed_threads()
    return max(1, cpus.number // workers) if threads == cpus else threads.number


def _commit() -> str:
    """Return the commit of the sources, and whether they differ from it."""
    here = Path(__file__)
    try:
        # What is installed may lie inside the checkout of something else.
        _git("ls-files", "--error-unmatch", here.name, folder=here.parent)
        return _git("describe", "--always", "--dirty", "--abbrev=12", folder=here.parent)
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def _git(*words: str, folder: Path) -> str:
    command = ["git", *words]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return found.stdout.strip()


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
