"""A comparison small enough to run in seconds; as a script, one that goes on from its folder."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from kills import PACE
from lessons import lesson, lesson_registry, pace_steps
from rich.console import Console

from ipn_core.comparison.config import CompareConfig
from ipn_core.comparison.executors import Executor
from ipn_core.comparison.job import Job, run_job
from ipn_core.comparison.run import Comparison


class Here(Executor):
    """Runs jobs one after the other in this process."""

    def run(self, jobs: Sequence[Job], ended: Callable[[Job, str | None], object]) -> None:
        for job in jobs:
            run_job(job, lesson_registry())
            ended(job, None)


def comparing(llm: Path, steps: int = 3) -> dict[str, Any]:
    """The config of a comparison of two arms and the control on the task `colours`."""
    model = lesson(llm)["model"]
    shared = {"backbone": model["backbone"], "encoder": model["encoder"], "layout": {"request": 2}}
    step = {"steps": steps, "groups": 4, "lr": 1e-3, "warmup": 0}
    both = ["perceive", "slots.image", "request", "interact", "inject", "slots.dynamic"]
    return {
        "model": shared,
        "dynamic": 2,
        "arms": {
            "rvii": {
                "width": "interact.width",
                "model": {"strategy": "rvii", "interact": model["interact"]},
            },
            "static": {
                "width": "perceive.hidden",
                "tokens": "perceive.tokens",
                "model": {"strategy": "static", "perceive": {"name": "static", "map": "mlp"}},
            },
        },
        "data": [{"task": "colours"}],
        "stages": [
            {
                "name": "answer",
                "objectives": {"answer-embedding": 1.0, "request-image": 0.3},
                "otherwise": {"objectives": {"image-text": 1.0}, "train": ["perceive", "interact"]},
                "train": ["interact"],
                **step,
            },
            {"name": "instruct", "objectives": {"language": 1.0}, "train": both, **step},
        ],
        "evaluate": [{"task": "colours", "split": "test", "shuffled": True}],
        "seeds": 1,
        "batch_size": 4,
        "save_every": 1,
    }


def outcomes(folder: Path) -> list[dict[str, str]]:
    """The rows of `results.csv` without what a clock or the system measured."""
    measured = ("examples_per_s", "cpu_minutes", "first_token_s", "peak_memory")
    with (folder / "results.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in measured} for row in csv.DictReader(file)]


def comparison(values: dict[str, Any], folder: Path, **more: Any) -> Comparison:
    """A comparison that says nothing here; its console keeps what it says."""
    more.setdefault("executor", Here(1))
    more.setdefault("console", Console(file=io.StringIO()))
    config = CompareConfig.parse(values, "comparing")
    more.setdefault("command", ["ipn", "compare", "comparing.yaml"])
    return Comparison(config, folder, registry=lesson_registry(), **more)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pace_steps(float(os.environ.get(PACE, "0")))
    written, where = sys.argv[1:]
    comparison(json.loads(Path(written).read_text()), Path(where), resume=True).run()
