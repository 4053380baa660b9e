"""Examples per second of a training with all caches, against the encoder on and no caches.

Both are the trainer's own stages (`StageRun`), on the same weights and the same batches. One kind
of stage does not run the LLM, and needs requests; the other goes through it. What a whole training
gains follows from how many examples each kind has in `examples/compare.yaml`. What a single step
costs is in `ipn bench engine`.

Run `pytest benchmarks/bench_training.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.checking import report
from benchmarks.results import Row
from ipn_core.benchmarking.engine import subjects
from ipn_core.benchmarking.engine.table import Found, against, took
from ipn_core.benchmarking.engine.timing import collected, in_turn, threads
from ipn_core.benchmarking.engine.training import SHARED, setup_prompts
from ipn_core.config import load_yaml
from ipn_core.model import IPN
from ipn_core.plugins import get_registry
from ipn_core.prompt import Prompt
from ipn_core.stages import VisionEncoder
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig
from ipn_core.training.config import DataConfig, StageConfig
from ipn_core.training.data import Data
from ipn_core.training.features import FeatureCache
from ipn_core.training.loop import StageRun

RECIPE = Path(__file__).parents[1] / "examples" / "compare.yaml"
PICTURES = 32
SHARED_OUT = {"groups": 8, "per_group": 3}
"""A batch of 24 questions about 8 pictures, as in the stages of the recipe that run the LLM."""
KINDS: dict[str, dict[str, Any]] = {
    "without the LLM": {"objectives": {"answer-embedding": 1.0}, "train": ("interact",)},
    "through the LLM": {
        "objectives": {"language": 1.0},
        "train": ("interact", "inject", "slots.dynamic"),
    },
}
CACHES, NONE = "all caches", "encoder on, no caches"
BYTES = 1 << 31
GOAL = 3.0
"""How many times as many examples a second a training must do with all caches."""
REPEATS, SHORT = 8, 3
QUESTION = 24
"""Tokens up to and with `<img-q>`."""


@dataclass
class Runs:
    """A stage of training twice.

    Attributes:
        caches: features, requests and prefixes are kept.
        none: the encoder runs in every step, and so does the LLM over every question.
    """

    caches: StageRun
    none: StageRun

    @property
    def steps(self) -> dict[str, Callable[[], Any]]:
        """A training step of each."""
        return {CACHES: self.caches.advance, NONE: self.none.advance}

    def check(self) -> None:
        """Refuse to time runs that do not compute the same.

        Raises:
            AssertionError: losses, or norms of the gradient, differ by more than 1e-3.
        """
        mine, other = self.caches.advance(), self.none.advance()
        for name in ("loss", "grad_norm"):
            if not math.isclose(mine[name], other[name], rel_tol=1e-3):
                raise AssertionError(f"with caches '{name}' is {mine[name]}, without {other[name]}")


def setup_runs(model: IPN, kind: str, task: Path) -> Runs:
    """Get a stage ready twice, with everything read that is read once.

    Args:
        model: asks; its encoder is the real one. It trains where its language model is.
        kind: of stage.
        task: a file of questions; caches lie beside it.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # It keeps the device of the first one in this process, which may have been another kind's.
    AcceleratorState._reset_state(reset_partial_state=True)
    entry = DataConfig(task=str(task))
    # So slow that both runs find the same weights.
    stage = StageConfig(name=kind, steps=1000, warmup=0, lr=1e-12, **SHARED_OUT, **KINDS[kind])

    def run(size: int | None, prefixes: int) -> StageRun:
        data = Data(entry, get_registry(), training=True)
        cache = FeatureCache(model.encoder, task.parent / "features", size)
        data.encode(cache)
        made = StageRun(
            stage,
            model,
            [data],
            cache=cache,
            registry=get_registry(),
            accelerator=Accelerator(cpu=model.backbone.device.type == "cpu"),
            seed=0,
            digest=lambda: "benchmark",
            prefixes=prefixes,
        )
        if not prefixes:
            made.requests = None
        if made.requests is not None:
            made.requests.folder = task.parent / "requests"
            made.read_requests([data])
        made.prepare()
        return made

    runs = Runs(run(None, BYTES), run(0, 0))
    for _ in range(4):  # until each question has come
        runs.caches.advance()
    runs.none.step = runs.caches.step
    return runs


def write_task(folder: Path, prompts: Sequence[Prompt]) -> Path:
    """Write pictures of noise, about each of which all questions are asked; returns the file."""
    from PIL import Image

    lines = []
    for number in range(PICTURES):
        noise = torch.randint(
            0, 256, (256, 256, 3), generator=torch.Generator().manual_seed(number)
        )
        Image.fromarray(noise.to(torch.uint8).numpy()).save(folder / f"{number}.png")
        for prompt in prompts:
            answer = prompt.turns[-1].content[0].text
            row = {"image": f"{number}.png", "question": prompt.question, "answer": answer}
            lines.append(json.dumps(row))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def mix() -> dict[str, float]:
    """Return the share of each kind in the examples of the recipe."""
    found = dict.fromkeys(KINDS, 0.0)
    for stage in load_yaml(RECIPE, ())["stages"]:
        objectives = [get_registry().get("objective", name).load() for name in stage["objectives"]]
        kind = list(KINDS)[any(o.through_llm for o in objectives)]
        found[kind] += stage["steps"] * stage["groups"] * stage["per_group"]
    return {kind: count / sum(found.values()) for kind, count in found.items()}


def encoder() -> tuple[VisionEncoder, str]:
    """Return the starter's encoder, or a toy where its weights cannot be had; and which."""
    try:
        found = get_registry().get("perceiver", "efficientnet-lite0").load()
        return found(found.Config()), "EfficientNet-Lite0 at 256 pixels"
    except Exception as error:  # whatever keeps them away, it is in the report
        return TinyEncoder(TinyEncoderConfig()), f"a toy encoder ({type(error).__name__}: {error})"


def measure(
    llm: Any, prompts: Sequence[Prompt], eyes: tuple[VisionEncoder, str], folder: Path, repeats: int
) -> Found:
    """Measure both kinds of stages, and put a whole training together from them.

    Args:
        llm: the backbone.
        prompts: questions with their answers.
        eyes: the encoder, and what it is.
        folder: for pictures and caches.
        repeats: of each row.
    """
    torch.manual_seed(0)
    config = {**SHARED, "strategy": "rvii", "backbone": "llama", "encoder": "tiny"}
    model = IPN.from_config(
        {**config, "interact": subjects.INTERACT}, backbone=llm, encoder=eyes[0]
    )
    task = write_task(folder, prompts)
    shares = mix()
    rows: list[Row] = []
    whole: dict[str, list[float]] = {name: [0.0] * repeats for name in (CACHES, NONE)}
    for kind in KINDS:
        runs = setup_runs(model, kind, task)
        runs.check()
        found = collected(in_turn(runs.steps, repeats, warm_up=0))  # both have run just now
        rows += [*took(kind, found), against(kind, found, NONE, CACHES, better="higher")]
        for name, taken in found.items():
            more = [shares[kind] * value for value in taken]
            whole[name] = [a + b for a, b in zip(whole[name], more, strict=True)]
    name = "a whole training"
    rows.append(against(name, whole, NONE, CACHES, GOAL, "higher"))
    batch = math.prod(SHARED_OUT.values())
    of = ", ".join(f"{100 * share:.1f} % {kind}" for kind, share in shares.items())
    return Found(
        "training-caches",
        f"a training step, {eyes[1]}, {batch} questions about {SHARED_OUT['groups']} pictures",
        rows,
        notes=[f"of the examples of {RECIPE.name}, {of}; {name} is put together of both"],
    )


def test_training(
    device: torch.device,
    kind: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    option = request.config.getoption
    repeats = SHORT if option("--grid") == "short" else REPEATS
    with threads(option("--threads")):
        llm, name = subjects.backbone(device)
        prompts, _ = setup_prompts(subjects.asking_model(llm, **SHARED), QUESTION)
        found = measure(llm, prompts, encoder(), tmp_path, repeats)
        report("training", name, [found], kind, request, capsys)
