"""Where the jobs of a comparison run: processes on this machine, or a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ipn_core.comparison.job import Job, run_job_in_own_process
from ipn_core.errors import IPNError, UserError, first_line
from ipn_core.interrupts import ending_on_sigterm
from ipn_core.processors import allowed_cpus

__all__ = ["EXECUTORS", "Executor", "Local", "Ray"]

_POLL_S = 0.2
_TAIL = 400
_STORE = 100_000_000
"""Bytes that a cluster of this machine sets aside for objects; jobs read and write files."""


class Executor(ABC):
    """Runs independent jobs; each leaves its result in its own folder."""

    def __init__(self, workers: int | None = None) -> None:
        """Choose how many jobs run at once.

        Args:
            workers: by default one a GPU, or where there is none one a CPU that may be used.
        """
        self.workers = workers or torch.cuda.device_count() or allowed_cpus().number

    @abstractmethod
    def run(self, jobs: Sequence[Job], ended: Callable[[Job, str | None], object]) -> None:
        """Run jobs until all have ended.

        Args:
            jobs: those that are not done.
            ended: called with every job that has ended, and with what it said if it failed.
        """


class Local(Executor):
    """Processes of this machine, `workers` at once; what they say goes to their `job.log`.

    Where there are GPUs, each job sees one; more workers than GPUs share them in turn.
    """

    def run(self, jobs: Sequence[Job], ended: Callable[[Job, str | None], object]) -> None:
        """Start each job as soon as a worker is free; an interruption ends those that run."""
        waiting = list(jobs)
        running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}
        gpus = _gpus()
        with ending_on_sigterm(), _ended(running):
            while waiting or running:
                for worker in range(self.workers):
                    if waiting and worker not in running:
                        job, gpu = waiting.pop(0), gpus[worker % len(gpus)] if gpus else None
                        running[worker] = (job, _start(job, gpu))
                for worker, (job, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[worker]
                        ended(job, None if process.returncode == 0 else _last_words(job))
                time.sleep(_POLL_S)


@contextlib.contextmanager
def _ended(running: Mapping[int, tuple[Job, subprocess.Popen[bytes]]]) -> Iterator[None]:
    """End the processes that still run when the block does."""
    try:
        yield
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
            process.kill()


def _gpus() -> list[str]:
    """Return the names of the GPUs that may be used, as CUDA_VISIBLE_DEVICES has them."""
    number = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[:number] if given else [str(i) for i in range(number)]


def _start(job: Job, gpu: str | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ipn_core.comparison", str(job.path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with open(job.log, "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _last_words(job: Job) -> str:
    lines = job.log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return f"{said[-_TAIL:]} (all of it is in '{job.log}')"


class Ray(Executor):
    """Tasks of a Ray cluster, all of whose machines reach the comparison's folder.

    `RAY_ADDRESS` names the cluster, whose own size then says how many jobs run at once; without it
    one of `workers` is started on this machine.
    """

    def __init__(self, workers: int | None = None) -> None:
        """Choose how many jobs run at once on a cluster of this machine.

        Raises:
            UserError: ray is not installed.
        """
        super().__init__(workers)
        # Ray tells its makers about clusters unless it is told not to.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray  # noqa: F401  # as early as it can be said
        except ImportError:
            raise UserError(
                "--executor ray needs the package ray: pip install 'ipn-core[ray]'."
            ) from None

    def run(self, jobs: Sequence[Job], ended: Callable[[Job, str | None], object]) -> None:
        """Hand all jobs to the cluster and wait for them; an interruption ends those that run."""
        import ray

        threads = max((job.threads for job in jobs), default=1)
        with _cluster(ray, self.workers * threads):
            threads = min(threads, _most_cores(ray))
            gpus = 1 if ray.cluster_resources().get("GPU") else 0
            # A process of its own for each job, as its peak memory is that of its process.
            remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_calls=1)(_run_task)
            tasks = {remote.remote(job, os.getcwd()): job for job in jobs}
            try:
                while tasks:
                    done, _ = ray.wait(list(tasks), num_returns=1)
                    for task in done:
                        ended(tasks.pop(task), _outcome(ray, task))
            finally:
                for task in tasks:
                    ray.cancel(task, force=True)


@contextlib.contextmanager
def _cluster(ray: Any, cores: int) -> Iterator[None]:
    """Use the cluster that there is, or start one and end it.

    Args:
        ray: the module.
        cores: of a cluster on this machine.
    """
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        # Its processes were started elsewhere, with the settings of whoever did it.
        ours = {name: value for name, value in os.environ.items() if name.startswith("IPN_")}
        options: dict[str, Any] = {"runtime_env": {"env_vars": ours}}
    else:
        options = {"address": "local", "num_cpus": cores, "include_dashboard": False}
        options["object_store_memory"] = _STORE
    try:
        ray.init(log_to_driver=False, logging_level="error", **options)
    except Exception as error:  # ray raises bare ones, too
        if os.environ.get("RAY_ADDRESS"):
            raise UserError(
                f"the Ray cluster of RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be joined: "
                f"{first_line(error)} Check that it runs, and RAY_AUTH_MODE, which joining one "
                "with tokens needs."
            ) from error
        raise IPNError(
            f"no Ray cluster could be started on this machine: {first_line(error)} Try again when "
            "it has less to do, or leave --executor out, and go on with --resume."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _most_cores(ray: Any) -> int:
    """Return the cores of the largest machine: a task that asks for more would wait for ever."""
    return max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])


def _run_task(job: Job, folder: str) -> None:
    """Do a job on a machine of the cluster; what it says goes to its `job.log`.

    Args:
        job: what to do.
        folder: where the comparison was started, for relative paths in its config.
    """
    if os.path.isdir(folder):
        os.chdir(folder)
    with open(job.log, "ab") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    try:
        run_job_in_own_process(job)
    except Exception:
        traceback.print_exc()
        raise


def _outcome(ray: Any, task: object) -> str | None:
    try:
        ray.get(task)
    except Exception as error:
        cause = getattr(error, "cause", error)
        if isinstance(cause, KeyboardInterrupt):
            raise
        said = str(cause) if isinstance(cause, IPNError) else " ".join(str(error).split())
        return said[-_TAIL:]
    return None


EXECUTORS: dict[str, type[Executor]] = {"local": Local, "ray": Ray}
