"""Where the jobs of a comparison run: processes on this machine, or a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ipn_core.comparison.job import Job, run_job_in_own_process
from ipn_core.errors import IPNError, UserError

__all__ = ["EXECUTORS", "Executor", "Local", "Ray"]

_POLL_S = 0.2
_TAIL = 400


class Executor(ABC):
    """Runs independent jobs; each leaves its result in its own folder."""

    def __init__(self, workers: int | None = None) -> None:
        """Choose how many jobs run at once.

        Args:
            workers: by default one a GPU, or one a core where there is none.
        """
        self.workers = workers or torch.cuda.device_count() or os.cpu_count() or 1

    @abstractmethod
    def run(self, jobs: Sequence[Job], ended: Callable[[Job, str | None], object]) -> None:
        """Run jobs until all have ended.

        Args:
            jobs: those whose result is missing.
            ended: called with every job that has ended, and with what it said if it failed.
        """


class Local(Executor):
    """Processes of this machine, `workers` at once; what they say goes to their `job.log`."""

    def run(self, jobs: Sequence[Job], ended: Callable[[Job, str | None], object]) -> None:
        """Start each job as soon as a worker is free; an interruption ends those that run."""
        waiting = list(jobs)
        running: list[tuple[Job, subprocess.Popen[bytes]]] = []
        try:
            while waiting or running:
                while waiting and len(running) < self.workers:
                    job = waiting.pop(0)
                    running.append((job, _start(job)))
                for job, process in list(running):
                    if process.poll() is not None:
                        running.remove((job, process))
                        ended(job, None if process.returncode == 0 else _last_words(job))
                time.sleep(_POLL_S)
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=10)
                process.kill()


def _start(job: Job) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ipn_core.comparison", str(job.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    with open(Path(job.folder) / "job.log", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _last_words(job: Job) -> str:
    log = Path(job.folder) / "job.log"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return f"{said[-_TAIL:]} (all of it is in '{log}')"


class Ray(Executor):
    """Tasks of a Ray cluster, which all machines reach the comparison's folder of.

    `RAY_ADDRESS` names the cluster; without it one is started on this machine.
    """

    def run(self, jobs: Sequence[Job], ended: Callable[[Job, str | None], object]) -> None:
        """Hand all jobs to the cluster and wait for them."""
        try:
            import ray  # type: ignore[import-not-found]
        except ImportError:
            raise UserError(
                "--executor ray needs the package ray: pip install 'ipn-core[ray]'."
            ) from None
        if not ray.is_initialized():
            local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": self.workers}
            ray.init(log_to_driver=False, include_dashboard=False, **local)
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(run_job_in_own_process)
        # One worker of `num_cpus` counts as one here: a job's threads are set inside it.
        tasks = {remote.options(num_cpus=1, num_gpus=gpus).remote(job): job for job in jobs}
        try:
            while tasks:
                done, _ = ray.wait(list(tasks), num_returns=1)
                for task in done:
                    ended(tasks.pop(task), _outcome(ray, task))
        finally:
            for task in tasks:
                ray.cancel(task, force=True)


def _outcome(ray: object, task: object) -> str | None:
    try:
        ray.get(task)  # type: ignore[attr-defined]
    except Exception as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, KeyboardInterrupt):
            raise
        said = str(cause) if isinstance(cause, IPNError) else " ".join(str(error).split())
        return said[-_TAIL:]
    return None


EXECUTORS: dict[str, type[Executor]] = {"local": Local, "ray": Ray}
