"""Where the jobs of a comparison run: one GPU each, a cluster, and ended with their comparison."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import types

import pytest

from ipn_core.comparison import executors
from ipn_core.comparison.executors import Ray
from ipn_core.comparison.job import Job
from ipn_core.errors import IPNError, UserError


def test_each_job_sees_one_gpu_and_more_jobs_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str | None]] = []

    def start(job: Job, gpu: str | None) -> subprocess.Popen[bytes]:
        seen.append((job.name, gpu))
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])

    monkeypatch.setattr(executors, "_start", start)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    jobs = [Job(str(i), "nowhere", {}, 0, {}, [], 1, 1) for i in range(5)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    executors.Local(3).run(jobs[:3], lambda *_: None)
    assert seen == [("0", "0"), ("1", "1"), ("2", "0")]
    seen.clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    executors.Local().run(jobs, lambda *_: None)
    assert sorted(gpu for _, gpu in seen[:2]) == ["4", "7"]
    assert {gpu for _, gpu in seen} == {"4", "7"}


def test_ray_is_missed_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"needs the package ray: pip install 'ipn-core\[ray\]'"):
        Ray(1)


@pytest.mark.parametrize(
    ("address", "error", "kind", "said"),
    [
        (None, Exception("timed out"), IPNError, "no Ray cluster could be started.*timed out"),
        ("a:1", ConnectionError("refused"), UserError, "RAY_ADDRESS=a:1 cannot be joined: refused"),
    ],
)
def test_a_cluster_that_does_not_start_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
    address: str | None,
    error: Exception,
    kind: type[IPNError],
    said: str,
) -> None:
    def init(**_: object) -> None:
        raise error

    stub = types.SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", stub)
    monkeypatch.setenv("RAY_ADDRESS", address or "")
    with pytest.raises(IPNError, match=said) as caught:
        Ray(1).run([], lambda *_: None)
    assert type(caught.value) is kind


def test_jobs_end_with_the_process_that_started_them(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(_: Job, gpu: str | None) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[0]

    monkeypatch.setattr(executors, "_start", start)
    job = Job("one", "nowhere", {}, 0, {}, [], 1, 1)
    with pytest.raises(SystemExit, match="143"):
        executors.Local(1).run([job], lambda *_: None)
    assert started[0].poll() is not None
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
