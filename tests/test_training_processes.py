"""However a step is shared out, over processes or accumulated parts, the weights are the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from lessons import (
    STOPPED,
    four_stages,
    furthest,
    lesson,
    metrics,
    noiseless,
    stage,
    stop_at,
    training,
    weights,
)
from torch import Tensor

from ipn_core.errors import ConfigError
from ipn_core.training import processes
from ipn_core.training.loop import StageRun
from ipn_core.training.run import Training

pytestmark = pytest.mark.usefixtures("own_training")

SCRIPT = Path(__file__).parent / "support" / "lessons.py"
JOINT = {"answer-embedding": 1.0, "request-image": 0.3}
LOOKING = ["interact", "inject", "slots.dynamic", "look_head"]
OBJECTIVES = {
    "request-image": stage("s", "request-image", train=["interact.guide.patch_in"], groups=5),
    "answer-embedding": stage("s", JOINT, train=["interact"], groups=5, per_group=3),
    "verbalise": stage("s", "verbalise", train=["inject"], group_by="question", groups=5),
    "language": stage("s", "language", train=["interact"], groups=5, group_by="question"),
    "look-again": stage("s", {"language": 1.0, "look-again": 0.5}, train=LOOKING, groups=5),
    "image-text": stage("s", "image-text", train=["perceive"], groups=5, group_by="question"),
}


class Share(Accelerator):
    """One of several processes that never meet: what they sum up is what was counted for all."""

    counts: Tensor

    def __init__(self, rank: int, processes: int) -> None:
        super().__init__(cpu=True)
        self._rank, self._processes = rank, processes

    @property
    def num_processes(self) -> int:
        return self._processes

    @property
    def process_index(self) -> int:
        return self._rank

    def reduce(self, tensor: Tensor, reduction: str = "mean", scale: float = 1.0) -> Tensor:
        return self.counts


def prepared(values: dict[str, Any], folder: Path, patch: pytest.MonkeyPatch) -> StageRun:
    """The first stage of a training, before its first step."""
    runs: list[StageRun] = []

    def stop(run: StageRun) -> dict[str, float]:
        runs.append(run)
        raise KeyboardInterrupt

    patch.setattr(StageRun, "advance", stop)
    with pytest.raises(KeyboardInterrupt):
        training(values, folder).run()
    return runs[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_shares_of_a_step_add_up_to_it(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    values = noiseless(llm, OBJECTIVES[name], looks=int(name == "look-again"))
    if name == "image-text":
        model = {k: values["model"][k] for k in ("backbone", "encoder")}
        values["model"] = {"strategy": "static", **model, "layout": {}}
    run = prepared(values, tmp_path / "run", monkeypatch)
    shares = [Share(rank, 3) for rank in range(3)]

    def gradients(batches: list[Any], weights: list[dict[str, float]]) -> dict[str, Tensor]:
        run.optimizer.zero_grad(set_to_none=True)
        for batch, weight in zip(batches, weights, strict=True):
            run._seed()
            total, _ = run.losses(batch, weight)
            (total / len(batches)).backward()
        return {k: p.grad.clone() for k, p in run.trained.items() if p.grad is not None}

    whole = gradients(run._batches(run.step), [{}])
    batches = []
    for run.accelerator in shares:
        batches += run._batches(run.step)
    assert sorted(row for batch in batches for row in batch.mine) == [*range(len(batches[0].step))]
    assert len({len(batch.examples) for batch in batches}) > 1
    counts = [[o.labels(batch) for o in run._terms] for batch in batches]
    Share.counts = torch.tensor(counts).sum(0)
    weights = [run._shares([batch])[0] for batch in batches]
    run.accelerator = Share(0, 1)
    shared = gradients(batches, weights)
    assert whole.keys() == shared.keys()
    largest = max(float(g.abs().max()) for g in whole.values())
    for key, gradient in whole.items():
        torch.testing.assert_close(shared[key], gradient, rtol=1e-4, atol=1e-6 * largest, msg=key)


@pytest.mark.slow
def test_half_as_large_batches_accumulated_give_the_same_weights(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = four_stages(3)
    halves = [{**s, "groups": s["groups"] // 2, "accumulate": 2} for s in stages]
    training(noiseless(llm, *stages), tmp_path / "whole").run()
    training(noiseless(llm, *halves), tmp_path / "halves").run()
    assert furthest(tmp_path / "whole", tmp_path / "halves") <= 1e-5
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "halves"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


# -- real processes --------------------------------------------------------------------------------


def launched(
    values: dict[str, Any], folder: Path, *, stop: int = 0, **more: str
) -> subprocess.CompletedProcess[str]:
    """Train in two processes that meet over gloo, each with one thread on the CPU."""
    config = folder.with_suffix(".json")
    config.write_text(json.dumps(values))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    own = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LESSON_STOP": str(stop)}
    return subprocess.run(
        [*launch, "--nproc-per-node=2", str(SCRIPT), str(config), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **own, **more},
    )


def shared_out(llm: Path) -> dict[str, Any]:
    """Four stages whose batches two processes cannot share out evenly, with a validation."""
    stages = [{**s, "groups": 5, "per_group": 3, "steps": 4} for s in four_stages()]
    stages[3]["accumulate"] = 2
    return noiseless(llm, *stages, validate_on=[{"task": "colours", "split": "val"}])


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one_whoever_resumes(llm: Path, tmp_path: Path) -> None:
    values = shared_out(llm)
    training(values, tmp_path / "one").run()
    done = launched(values, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert furthest(tmp_path / "one", tmp_path / "two") <= 1e-5
    alone, shared = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [e.keys() for e in alone] == [e.keys() for e in shared]
    for one, two in zip(alone, shared, strict=True):
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=1e-5)
        assert two.get("by_type") == one.get("by_type")

    broken = launched(values, tmp_path / "broken", stop=12)
    assert broken.returncode != 0
    assert f"exitcode  : {STOPPED}" in broken.stderr
    shutil.copytree(tmp_path / "broken", tmp_path / "alone")
    done = launched(values, tmp_path / "broken")
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path / "broken") == weights(tmp_path / "two")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "two")

    training(values, tmp_path / "alone", resume=True).run()
    assert furthest(tmp_path / "alone", tmp_path / "two") <= 1e-5


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = shared_out(llm)
    training(values, tmp_path / "one").run()

    def interrupt(_: StageRun) -> None:
        raise KeyboardInterrupt

    stop_at(monkeypatch, 12, interrupt)
    with pytest.raises(KeyboardInterrupt):
        training(values, tmp_path / "broken").run()
    done = launched(values, tmp_path / "broken")
    assert done.returncode == 0, done.stderr
    assert furthest(tmp_path / "broken", tmp_path / "one") <= 1e-5
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "broken"), strict=True):
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [{}, {"LESSON_FSDP": "yes"}], ids=["whole", "parts"])
def test_the_process_that_meets_a_bad_number_tells_all_where(
    llm: Path, tmp_path: Path, parts: dict[str, str]
) -> None:
    values = noiseless(llm, stage("s", "language", train=["interact"], groups=5, steps=9))
    done = launched(values, tmp_path / "run", LESSON_SPOIL="1", **parts)
    assert done.returncode != 0
    where = "stage 's', step 3: the output of interaction.request_mlp, and so the loss 'language'"
    assert done.stderr.count(f"{where}, is not finite") >= 1, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_in_parts_give_the_same_weights(llm: Path, tmp_path: Path, precision: str) -> None:
    """FSDP2: each process holds a part of every weight, and the LLM's layers come one by one."""
    values = {**shared_out(llm), "precision": precision, "save_every": 1}
    values["stages"] = [{**s, "steps": 2} for s in values["stages"]]
    values["stages"][3]["train"].append("slots.request")
    training(values, tmp_path / "one").run()
    broken = launched(values, tmp_path / "parts", stop=4, LESSON_FSDP="yes")
    assert f"exitcode  : {STOPPED}" in broken.stderr
    done = launched(values, tmp_path / "parts", LESSON_FSDP="yes")
    assert done.returncode == 0, done.stderr
    if precision == "fp32":  # in bf16, a step's rounding is as large as what AdamW makes of it
        assert furthest(tmp_path / "one", tmp_path / "parts") <= 1e-5
    close = 1e-5 if precision == "fp32" else 0.02
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "parts"), strict=True):
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=close)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("DEEPSPEED", "DEEPSPEED is not supported. Launch with DDP or FSDP2."),
        ("MEGATRON_LM", "MEGATRON_LM is not supported. Launch with DDP or FSDP2."),
        ("FSDP", "FSDP is supported in version 2. Launch with --fsdp_version 2."),
    ],
)
def test_other_ways_to_share_a_training_are_refused(kind: str, says: str) -> None:
    launched = SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=False)
    with pytest.raises(ConfigError) as raised:
        processes._check_kind(launched)  # type: ignore[arg-type]
    assert str(raised.value) == says


def test_fewer_groups_than_processes_are_refused(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Training, "_accelerator", lambda _: Share(0, 9))
    with pytest.raises(ConfigError) as raised:
        training(lesson(llm, stage("s", "language", groups=8)), tmp_path / "run").run()
    assert str(raised.value) == (
        "stage 's': 'groups' is 8, and 9 processes share each batch out by groups. Make it at "
        "least as many."
    )
