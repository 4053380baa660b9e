"""`ipn compare`: its flags, its example, and the command killed while its jobs run on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Run, assert_refused
from comparing import comparing, outcomes
from kills import LIMIT, PACE
from safetensors.torch import load_file

from ipn_core.comparison.arms import Arms
from ipn_core.comparison.config import CompareConfig
from ipn_core.config import load_yaml
from ipn_core.plugins import get_registry
from ipn_core.processors import Allowed

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "compare.yaml"
LESSONS = """
import os
from lessons import LessonPlugin, pace_steps
from kills import PACE
pace_steps(float(os.environ.get(PACE, "0")))
register = LessonPlugin().register
"""
COMMAND = "import sys; from ipn_core.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """What comparisons are made of, in a folder of their own and on 3 CPUs; none is run."""
    made: list[tuple[Any, ...]] = []

    class Recorded:
        def __init__(self, config: CompareConfig, folder: Path, **more: Any) -> None:
            made.append((config, folder, more["resume"], more["executor"]))

        def run(self) -> Path:
            return Path("there/report.md")

    monkeypatch.setattr("ipn_core.comparison.run.Comparison", Recorded)
    monkeypatch.setattr("ipn_core.comparison.executors.allowed_cpus", lambda: Allowed(3, "here"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.chdir(tmp_path)
    return made


def test_flags_choose_arms_seeds_executor_and_folder(
    ipn: Callable[..., Run], calls: list[tuple[Any, ...]]
) -> None:
    assert ipn("compare", EXAMPLE).out == "there/report.md\n"
    words = ("--arms", "film", "--seeds", "2", "--resume", "--out", "here", "--workers", "5")
    assert ipn("compare", EXAMPLE, "dynamic=8", *words).code == 0
    every = ["rvii", "film", "resampler", "static"]
    found = [
        (list(config.arms), config.seeds, config.dynamic, folder, resume, type(how).__name__)
        for config, folder, resume, how in calls
    ]
    assert found == [
        (every, 3, 4, Path("runs/compare"), False, "Local"),
        (["rvii", "film"], 2, 8, Path("here"), True, "Local"),
    ]
    assert [how.workers for *_, how in calls] == [3, 5]


def test_the_control_can_be_trained_at_rates_of_its_own(
    ipn: Callable[..., Run], calls: list[tuple[Any, ...]]
) -> None:
    words = ("--arms", "rvii-constant", "--seeds", "1", "--out", "runs/control", "sweep=null")
    asked = "evaluate=[{task: emoji-scenes, split: val, limit: 300, shuffled: true}]"
    rates = ("stages.2.rates={perceive: 4}", "stages.3.rates={perceive: 4}")
    assert ipn("compare", EXAMPLE, *words, asked, *rates).code == 0
    ((config, folder, *_),) = calls
    assert (list(config.arms), config.sweep, folder) == (["rvii"], None, Path("runs/control"))
    assert [(e.task, e.split, e.limit, e.shuffled) for e in config.evaluate] == [
        ("emoji-scenes", "val", 300, True)
    ]
    assert [stage.rates for stage in config.stages[2:]] == [{"perceive": 4}] * 2


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--arms", "flim"), ("no arm 'flim'", "film")),
        (("--seeds", "0"), ("--seeds", "greater than or equal to 1")),
        (("--executor", "slurm"), ("'slurm'", "local", "ray")),
        (("dynamik=3",), ("dynamik", "dynamic")),
    ],
)
def test_what_it_does_not_know_is_refused(
    words: tuple[str, ...], parts: tuple[str, ...], ipn: Callable[..., Run], tmp_path: Path
) -> None:
    assert_refused(ipn("compare", EXAMPLE, *words, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.weights
def test_the_arms_of_the_example_differ_in_nothing_but_their_way() -> None:
    config = CompareConfig.parse(load_yaml(EXAMPLE, ["data.0.options={scenes: 20}"]), "example")
    config = config.model_copy(update={"sweep": None})
    arms = Arms(config, get_registry()).make()
    assert [arm.name for arm in arms] == ["rvii", "film", "resampler", "static", "rvii-constant"]
    assert {arm.tokens for arm in arms} == {12}
    steps = {arm.name: [(s["name"], s["steps"]) for s in arm.stages] for arm in arms}
    assert all(each == steps["rvii"] for each in steps.values()), steps
    parameters = [arm.parameters for arm in arms]
    assert max(parameters) <= 1.05 * min(parameters)
    # What asks is told answers, and never only what there is in the picture.
    film = next(arm for arm in arms if arm.name == "film")
    assert [next(iter(s["objectives"])) for s in film.stages][:2] == ["answer-embedding"] * 2


# -- killed ----------------------------------------------------------------------------------------


@pytest.fixture
def environment(
    fake_plugin: Callable[[str, str], dict[str, str]], tmp_path: Path
) -> dict[str, str]:
    """Where the tiny components and the task `colours` are installed plugins."""
    fake_plugin("tiny", "from ipn_core.testing.plugin import register\n")
    made = fake_plugin("lessons", LESSONS)
    paths = [made["PYTHONPATH"], str(ROOT / "tests" / "support")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    own = {"PYTHONPATH": os.pathsep.join(paths), "IPN_CACHE": str(tmp_path / "cache")}
    return {**made, **own, "OMP_NUM_THREADS": "1"}


def check_files(folder: Path) -> None:
    """Every file that has its name is whole, whatever was killed meanwhile."""
    for path in folder.rglob("*"):
        if path.suffix == ".json" and not path.name.startswith("."):
            json.loads(path.read_text())
        if path.suffix == ".safetensors" and ".tmp" not in path.name:
            assert load_file(path)


@pytest.mark.slow
def test_the_command_is_killed_and_gone_on_with_while_its_jobs_live_on(
    llm: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "it.yaml").write_text(json.dumps(comparing(llm, steps=4)))
    command = [
        sys.executable,
        "-c",
        COMMAND,
        "compare",
        str(tmp_path / "it.yaml"),
        "--workers",
        "2",
    ]
    whole = [*command, "--out", str(tmp_path / "unbroken")]
    subprocess.run(whole, env=environment, check=True, capture_output=True, timeout=LIMIT)
    broken = [*command, "--resume", "--out", str(tmp_path / "out")]
    moments, slowly = random.Random(0), {**environment, PACE: "0.3"}
    for _ in range(4):
        process = subprocess.Popen(broken, env=slowly, stderr=subprocess.PIPE)
        jobs = tmp_path / "out" / "jobs"
        started = time.monotonic()
        while process.poll() is None and not list(jobs.glob("*/lock")):
            assert time.monotonic() - started < LIMIT
            time.sleep(0.02)
        time.sleep(moments.uniform(0.0, 3.0))
        process.kill()
        process.communicate()
        check_files(tmp_path / "out")
    subprocess.run(broken, env=environment, check=True, capture_output=True, timeout=LIMIT)
    check_files(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp*"))
    assert outcomes(tmp_path / "out") == outcomes(tmp_path / "unbroken")
    models = list((tmp_path / "unbroken").glob("jobs/*/train/model/model.safetensors"))
    assert len(models) == 3
    for kept in models:
        name = kept.relative_to(tmp_path / "unbroken")
        assert (tmp_path / "out" / name).read_bytes() == kept.read_bytes()
