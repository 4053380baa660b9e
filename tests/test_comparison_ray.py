"""A Ray cluster of this machine finds what processes of this machine find."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from comparing import comparing, outcomes
from layered import Environment, environment_with

from ipn_core.comparison.job import Job

pytestmark = pytest.mark.slow

LESSONS = "from lessons import LessonPlugin\n\nregister = LessonPlugin().register\n"
POINTS = "tiny = ipn_core.testing.plugin\nlessons = ipn_lessons"
ALONE = """
import sys
from pathlib import Path
from ipn_core.comparison.executors import Ray
from ipn_core.comparison.job import Job

Ray(1).run([Job.read(Path(sys.argv[1]))], lambda job, said: print(job.name, "said", said))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """One with ray, where the tiny components and the task `colours` are an installed plugin."""
    folder = tmp_path_factory.mktemp("ray")
    with environment_with(folder / "venv", "ray", ["ray"]) as made:
        made.declare("ipn-lessons", POINTS)
        (made.site / "ipn_lessons.py").write_text(LESSONS)
        (made.site / "support.pth").write_text(f"{Path(__file__).parent / 'support'}\n")
        # Ray writes into the home folder.
        made.settings |= {"HOME": str(folder), "IPN_CACHE": str(folder / "cache")}
        made.settings["OMP_NUM_THREADS"] = "1"
        yield made


@pytest.fixture(scope="module")
def done(environment: Environment, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    (folder / "comparing.yaml").write_text(json.dumps(comparing(llm)))
    for executor in ("local", "ray"):
        told = ["compare", str(folder / "comparing.yaml"), "--out", str(folder / executor)]
        environment.ipn(*told, "--executor", executor, "--workers", "2")
    return folder


def test_it_finds_what_processes_find(done: Path) -> None:
    assert outcomes(done / "ray") == outcomes(done / "local")
    models = [p.relative_to(done / "ray") for p in (done / "ray").glob("jobs/*/train/model/*.saf*")]
    assert len(models) == 3
    for model in models:
        assert (done / "ray" / model).read_bytes() == (done / "local" / model).read_bytes()


def test_each_job_writes_its_log(done: Path) -> None:
    logs = {p.parent.name: p.read_text() for p in (done / "ray").glob("jobs/*/job.log")}
    assert len(logs) == 3
    assert all("instruct" in log for log in logs.values())


def test_a_job_that_fails_says_why(environment: Environment, done: Path, tmp_path: Path) -> None:
    job = Job.read(next((done / "ray").glob("jobs/static*/job.json")))
    broken = {**job.training["model"], "encoder": {"name": "tinny"}}
    values = {**vars(job), "folder": str(tmp_path), "training": {**job.training, "model": broken}}
    bad = Job(**values)
    bad.write()

    said = environment.run("-c", ALONE, str(bad.path))

    assert said.startswith(f"{job.name} said unknown perceiver 'tinny': installed are ")
    assert "did you mean 'tiny'?" in said
    assert "Traceback" in bad.log.read_text()
