"""How many CPUs and threads there are for this process, and who lowers torch's number to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import shell
from PIL import Image

from ipn_core import processors
from ipn_core.benchmarking.engine.first_token import setup_first_token
from ipn_core.benchmarking.engine.timing import threads
from ipn_core.cli import main
from ipn_core.comparison.executors import Local
from ipn_core.comparison.run import _threads
from ipn_core.processors import Allowed, allowed_cpus, allowed_threads, limit_threads
from ipn_core.testing.tiny import tiny_backbone


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 CPUs that this process may run on, without control groups."""
    monkeypatch.setattr(processors, "ROOT", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return tmp_path


def put(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_a_quota_the_affinity_decides(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert allowed_cpus() == Allowed(64, "the CPUs that this process may run on")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert allowed_cpus().number == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert allowed_cpus() == Allowed(6, "the CPUs of this machine")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert allowed_cpus().number == 1


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu"
GROUPS = {
    "a container of version 2": (
        {"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "200000 100000\n"},
        2,
    ),
    "rounded up": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "150000 100000\n"}, 2),
    "never below one": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "10000 100000\n"}, 1),
    "no limit": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "max 100000\n"}, 64),
    "more than there are": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "9000000 100000"}, 64),
    "a group inside of a limited one": (
        {
            "proc/self/cgroup": "0::/user/job\n",
            f"{V2}/user/job/cpu.max": "800000 100000",
            f"{V2}/user/cpu.max": "300000 100000",
        },
        3,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/job\n0::/\n",
            f"{V1}/job/cpu.cfs_quota_us": "250000\n",
            f"{V1}/job/cpu.cfs_period_us": "50000\n",
        },
        5,
    ),
    "version 1, in a container that sees its own group as the root": (
        {
            "proc/self/cgroup": "4:cpuacct,cpu:/docker/0123\n",
            f"{V1},cpuacct/cpu.cfs_quota_us": "400000",
            f"{V1},cpuacct/cpu.cfs_period_us": "100000",
        },
        4,
    ),
    "version 1 without a limit": (
        {
            "proc/self/cgroup": "4:cpu:/\n",
            f"{V1}/cpu.cfs_quota_us": "-1",
            f"{V1}/cpu.cfs_period_us": "100000",
        },
        64,
    ),
    "another controller's group": (
        {
            "proc/self/cgroup": "4:cpuacct:/\n",
            f"{V1}/cpu.cfs_quota_us": "200000",
            f"{V1}/cpu.cfs_period_us": "100000",
        },
        64,
    ),
    "damaged": (
        {"proc/self/cgroup": "0\n0:\n0::relative\n0::/\n", f"{V2}/cpu.max": "a lot 100000"},
        64,
    ),
    "a period of nothing": ({"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "200000 0"}, 64),
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_quota_bounds_it(machine: Path, name: str) -> None:
    files, number = GROUPS[name]
    put(machine, files)
    found = allowed_cpus()
    assert found.number == number
    assert ("the cgroup's quota of" in found.source) is (number < 64)


def test_a_quota_says_how_much_it_is(machine: Path) -> None:
    put(machine, GROUPS["rounded up"][0])
    assert allowed_cpus().source == "the cgroup's quota of 1.5 CPUs"


@pytest.mark.parametrize(
    ("value", "number"), [("3", 3), ("128", 128), ("4,2", 4), ("", 2), ("many", 2), ("0", 2)]
)
def test_what_the_user_set_wins(
    machine: Path, monkeypatch: pytest.MonkeyPatch, value: str, number: int
) -> None:
    put(machine, GROUPS["a container of version 2"][0])
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    found = allowed_threads()
    assert found.number == number
    assert (found.source == "OMP_NUM_THREADS") is (number != 2)
    assert allowed_cpus().number == 2


# -- who lowers it ---------------------------------------------------------------------------------


@pytest.fixture
def torchs() -> Iterator[list[int]]:
    """What torch is told its number of threads is, from 32 on."""
    now = [32]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: now[-1])
        patch.setattr(torch, "set_num_threads", now.append)
        yield now


def test_the_number_is_only_ever_lowered(machine: Path, torchs: list[int]) -> None:
    limit_threads()
    assert torchs == [32]  # 64 CPUs may have 32 cores, which torch knows and we do not
    put(machine, GROUPS["a container of version 2"][0])
    limit_threads()
    assert torchs == [32, 2]


def test_the_users_number_is_torchs_own_business(
    machine: Path, torchs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    limit_threads()
    assert torchs == [32]


def test_jobs_of_a_comparison_share_what_may_be_used(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(machine, {"proc/self/cgroup": "0::/\n", f"{V2}/cpu.max": "800000 100000"})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert Local().workers == 8
    assert [_threads(workers) for workers in (1, 3, 8, 20)] == [8, 2, 1, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _threads(3) == 5


@pytest.mark.parametrize(
    "words",
    [
        ["ask", "picture.png", "What is it?", "--model", "nowhere"],
        ["chat", "picture.png", "--model", "nowhere"],
        ["eval", "questions.jsonl", "--model", "nowhere"],
        ["serve", "--model", "nowhere", "--port", "0"],
        ["demo", "--model", "nowhere", "--port", "0"],
        ["train", "nothing.yaml"],
        ["compare", "nothing.yaml"],
        ["bench", "attention", "--shape", "1,2,1,8,1", "--seconds", "0"],
    ],
    ids=lambda words: words[0],
)
def test_every_command_that_computes_lowers_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    row = {"image": "picture.png", "question": "What?", "answer": "it"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    lowered: list[bool] = []
    monkeypatch.setattr(processors, "limit_threads", lambda: lowered.append(True))
    main(words)
    assert lowered


# -- what they are worth ---------------------------------------------------------------------------


@pytest.mark.usefixtures("small_interaction")
@pytest.mark.parametrize(
    ("number", "names"),
    [(1, ["1 thread"]), (2, ["1 thread", "2 threads", "1 thread : 2 threads"])],
)
def test_numbers_of_threads_are_timed_side_by_side(
    number: int, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks.bench_threads import measure

    with threads(1):
        found = measure(setup_first_token(tiny_backbone(), 40), number, 3)
    assert [row.name for row in found.rows] == [f"threads/{name}" for name in names]
    assert all(row.samples == 3 for row in found.rows)


LIMITED = """
import os
os.sched_getaffinity = lambda pid: {0}
import torch
torch.set_num_threads(2)
import ipn_core.model, ipn_core.attention.timing, ipn_core.comparison.run
print(torch.get_num_threads())
ipn_core.processors.limit_threads()
print(torch.get_num_threads())
"""


@pytest.mark.slow
def test_a_library_leaves_its_callers_threads_alone() -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, env=env, check=True
    )
    assert done.stdout.split() == ["2", "1"]


@pytest.mark.slow
def test_doctor_says_how_many_and_why() -> None:
    run = shell("doctor", env={**os.environ, "IPN_PLUGINS": ""})  # `shell` sets the variable
    assert "threads             1, by OMP_NUM_THREADS" in run.out
