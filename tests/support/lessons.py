"""A task small enough to learn in seconds, and trainings on it; run as a script, one of them.

Pictures are two colours side by side. Asked are the colour of a side and the side of a colour.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import PACE
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import ipn_core.testing.plugin
from ipn_core.hooks import hookimpl
from ipn_core.model import IPN
from ipn_core.plugins import Registry, add_plugin, discover
from ipn_core.prompt import Prompt
from ipn_core.tasks import Example, Picture, Task
from ipn_core.testing.tiny import tiny_backbone
from ipn_core.training.config import TrainConfig
from ipn_core.training.data import Batch
from ipn_core.training.loop import StageRun
from ipn_core.training.run import Training

COLOURS = {"red": (220, 20, 30), "tan": (210, 180, 140), "sky": (90, 170, 250), "ink": (20, 20, 60)}
STOPPED = 77
"""How a process ends that was told to stop."""
ALIGNED = ["interact.request_in", "interact.request_mlp", "interact.guide.patch_in"]
ALIGNED += ["interact.guide.patch_out", "interact.guide.named"]


class Colours(Task):
    """Twelve pictures, four questions each; the last three pictures are `val` and `test`.

    Where a colour is may need a second look, after one that finds the colour.
    """

    splits = ("train", "val", "test")

    def __init__(self, named: bool = True, looks: int = 0) -> None:
        self.named = named
        self.looks = looks

    def examples(self, split: str) -> list[Example]:
        self.check_split(split)
        pairs = list(itertools.permutations(COLOURS, 2))
        mine = pairs[:9] if split == "train" else pairs[9:]
        return [example for pair in mine for example in self._about(pair)]

    def _about(self, pair: tuple[str, str]) -> list[Example]:
        picture = Picture("-".join(pair), functools.partial(two_colours, pair))
        sides = dict(zip(("left", "right"), pair, strict=True))
        rows = [(f"Colour {side}?", colour, "colour", ()) for side, colour in sides.items()]
        rows += [(f"Where is {colour}?", side, "side", (colour,)) for side, colour in sides.items()]
        return [
            Example(
                q,
                (a,),
                (picture,),
                kind,
                names if self.named else (),
                pair,
                *((self.looks, names[:1]) if self.looks and names else ()),
            )
            for q, a, kind, names in rows
        ]


def two_colours(pair: tuple[str, str]) -> Image.Image:
    image = Image.new("RGB", (32, 16), COLOURS[pair[0]])
    image.paste(COLOURS[pair[1]], (16, 0, 32, 16))
    return image


class LessonPlugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.task("colours", Colours)


def lesson_registry() -> Registry:
    """Everything installed, the tiny components, and the task `colours`."""
    registry = discover()
    add_plugin(registry, "tiny", ipn_core.testing.plugin)
    add_plugin(registry, "lessons", LessonPlugin())
    return registry


def save_llm(folder: Path) -> Path:
    """Save a tiny language model."""
    backbone = tiny_backbone("llama", positions=128)
    backbone.lm.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


def stage(name: str, objectives: dict[str, float] | str, **more: Any) -> dict[str, Any]:
    """A stage that trains interaction and injection in a few small steps."""
    if isinstance(objectives, str):
        objectives = {objectives: 1.0}
    base = {"train": ["interact", "inject", "slots.dynamic"], "steps": 4, "groups": 4, "lr": 1e-3}
    return {"name": name, "objectives": objectives, **base, "warmup": 0, **more}


def four_stages(steps: int = 4) -> list[dict[str, Any]]:
    """One stage for each objective."""
    joint = {"answer-embedding": 1.0, "request-image": 0.3}
    told = {"train": ["inject", "slots.dynamic"], "group_by": "question", "lr": 1e-2}
    return [
        stage("align", "request-image", train=ALIGNED, steps=steps),
        stage("answer", joint, train=["interact"], steps=steps),
        stage("verbalise", "verbalise", steps=steps, **told),
        stage("instruct", "language", steps=steps),
    ]


def lesson(llm: Path, *stages: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The config of a training, as a YAML file would hold it."""
    guide = {"width": 8, "tallies": 2, "frequencies": 2}
    rvii = {"width": 16, "depth": 1, "heads": 2, "frequencies": 2, "dropout": 0.1, "noise": 0.1}
    model = {
        "strategy": "rvii",
        "backbone": {"name": "llama", "weights": str(llm)},
        "encoder": {"name": "tiny", "grid": 2},
        "interact": {"name": "rvii", **rvii, "guide": guide},
        "layout": {"dynamic": 2},
    }
    return {
        "model": model,
        "data": [{"task": "colours"}],
        "stages": list(stages or four_stages()),
        "log_every": 1,
        "save_every": 2,
        **more,
    }


def noiseless(llm: Path, *stages: dict[str, Any], looks: int = 0, **more: Any) -> dict[str, Any]:
    """A lesson in which nothing that a share of a step draws alone is random, nor a step noise.

    Along some weights a loss is flat, such as the bias of an attention's keys. Rounding differs
    with the order of sums, and with its usual `eps` AdamW makes steps of the full rate of it.
    """
    values = lesson(llm, *({**copy.deepcopy(s), "eps": 1e-5} for s in stages), **more)
    values["model"]["interact"] |= {"dropout": 0.0, "noise": 0.0}
    if looks:
        values["data"] = [{"task": "colours", "options": {"looks": looks}}]
        values["model"]["layout"]["look_again"] = looks
    return values


def furthest(one: Path, other: Path) -> float:
    """The largest difference between the weights of two trainings."""
    first, second = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    return max(float((value - second[key]).abs().max()) for key, value in first.items())


def training(values: dict[str, Any], folder: Path, **more: Any) -> Training:
    """A training that says nothing here; its console keeps what it says."""
    config = TrainConfig.parse(values, "lesson")
    more.setdefault("registry", lesson_registry())
    more.setdefault("console", Console(file=io.StringIO()))
    return Training(config, folder, **more)


def said(run: Training) -> str:
    """Everything that a training has said so far."""
    file = run.console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the machine's speed."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "examples_per_s")
    return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def stop_at(monkeypatch: pytest.MonkeyPatch, calls: int, act: Callable[[StageRun], None]) -> None:
    """Do something before the given optimizer step, counted over all stages."""
    advance, done = StageRun.advance, [0]

    def counted(self: StageRun) -> dict[str, float]:
        done[0] += 1
        if done[0] == calls:
            act(self)
        return advance(self)

    monkeypatch.setattr(StageRun, "advance", counted)


def spoil(run: StageRun) -> None:
    """Let a layer give NaN from here on."""
    assert run.model.interaction is not None
    layer: Any = run.model.interaction.request_mlp
    layer.register_forward_hook(lambda module, inputs, output: output * float("nan"))


def without_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask every answer, so that no token of it is to be learned."""
    prompts = Batch.prompts

    def masked(self: Batch, model: IPN) -> list[Prompt]:
        return [
            Prompt(tuple(dataclasses.replace(turn, learn=False) for turn in prompt.turns))
            for prompt in prompts(self, model)
        ]

    monkeypatch.setattr(Batch, "prompts", masked)


def pace_steps(seconds: float) -> None:
    """Let every optimizer step of this process take some time more."""
    advance = StageRun.advance

    def slowly(run: StageRun) -> dict[str, float]:
        time.sleep(seconds)
        return advance(run)

    StageRun.advance = slowly  # type: ignore[method-assign]


def share_weights_out() -> None:
    """Let accelerate use FSDP2 on the CPU, which it would do on GPUs alone."""
    import accelerate
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    make = accelerate.Accelerator

    def accelerator(**options: Any) -> accelerate.Accelerator:
        made = make(**options)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
        )
        if made.mixed_precision != "no":
            plugin.set_mixed_precision(made.mixed_precision)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        made.state.distributed_type, made.state.fsdp_plugin = DistributedType.FSDP, plugin
        return made

    accelerate.Accelerator = accelerator  # type: ignore[assignment, misc]
    prepare = StageRun.prepare

    def prepared(run: StageRun) -> None:
        prepare(run)
        layers = run.model.backbone.lm.model.layers
        parts = [run.losses, *layers]
        assert all(hasattr(part, "unshard") for part in parts), "not sharded by layers"

    StageRun.prepare = prepared  # type: ignore[method-assign]


def main(config: str, folder: str, rank: str | None = None) -> None:
    """Train in this process, going on from what is there.

    The environment's LESSON_STOP is the step before which the training is interrupted; with
    LESSON_FSDP each process holds a part of every weight, and the process of number LESSON_SPOIL
    meets NaN at step 3.

    Args:
        config: a JSON file.
        folder: of the training.
        rank: where each process of several shall write its own weights in the end; they start
            from different ones.
    """
    torch.set_num_threads(1)
    pace_steps(float(os.environ.get(PACE, "0")))
    values = json.loads(Path(config).read_text())
    if "LESSON_FSDP" in os.environ:
        share_weights_out()
    if stop := int(os.environ.get("LESSON_STOP", "0")):
        stop_at(pytest.MonkeyPatch(), stop, lambda _: sys.exit(STOPPED))
    if os.environ.get("LESSON_SPOIL") == os.environ.get("RANK", "0"):
        stop_at(pytest.MonkeyPatch(), 3, spoil)
    if rank is None:
        training(values, Path(folder), resume=True).run()
        return
    number = int(os.environ["RANK"])
    torch.manual_seed(number)
    model = IPN.from_config(values["model"], registry=lesson_registry())
    training(values, Path(folder), model=model).run()
    save_file(model.trained_state(), f"{rank}{number}.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
