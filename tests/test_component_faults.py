"""Faults stay inside also where no stage runs: backbones, tasks, importers and objectives."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import OddError, fail, install, raises
from toys import picture, toy_config, toy_model, toy_registry
from transformers import PreTrainedModel

from ipn_core.comparison.arms import Arms
from ipn_core.config import IPNConfig
from ipn_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    IPNError,
    PluginError,
    StageError,
)
from ipn_core.faults import ran
from ipn_core.hooks import hookimpl
from ipn_core.importing import Importer, find_import
from ipn_core.model import IPN
from ipn_core.plugins import Registry, discover
from ipn_core.prefixes import PrefixCache
from ipn_core.prompt import Prompt
from ipn_core.tasks import Example, ShardedTask, Task, open_task
from ipn_core.testing.interactions import TinyLook
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone
from ipn_core.training.answers import directions
from ipn_core.training.config import DataConfig
from ipn_core.training.data import Data
from ipn_core.training.objectives import Objective, build_objective
from ipn_core.training.stream import Stream

RUN = ("embed", "new_cache", "extend", "logits", "place_keys")
"""The methods of a backbone that run while a model does."""
SIZES = ("layers", "template", "eos_ids")
"""What a backbone says of itself."""


class Shards(ShardedTask):
    """One shard of one example."""

    splits = ("train", "test")

    def shards(self, split: str) -> Sequence[str]:
        self.check_split(split)
        return ["one"]

    def read(self, shard: str, skip: int = 0) -> Iterator[Example]:
        yield Example("What?", ("dog",), ())


class Halfway(Shards):
    """Raises while it is read."""

    def read(self, shard: str, skip: int = 0) -> Iterator[Example]:
        yield from super().read(shard, skip)
        fail()


@dataclass(frozen=True)
class Still(Task):
    """Cannot be changed."""

    splits = ("train",)

    def examples(self, split: str) -> list[Example]:
        fail()
        return []


class Llama(Importer):
    """Takes a language model for a whole one."""

    MODEL_TYPES = ("llama",)

    def config(self, *arguments: Any) -> dict[str, Any]:
        return {}

    def state(self, *arguments: Any) -> dict[str, torch.Tensor]:
        return {}


class Lacking(Llama):
    def state(self, *arguments: Any) -> dict[str, torch.Tensor]:
        raise KeyError("some.weight")


REASONS = "not_supported_reasons"


def why(cls: type, *arguments: Any) -> str:
    return "it is a full moon"


class Zero(Objective):
    name = "zero"

    def loss(self, batch: Any, request: Any) -> torch.Tensor:
        return torch.zeros(())


class Broken:
    """A plugin whose components raise in the method that stands in their names."""

    @hookimpl
    def register(self, registry: Any) -> None:
        llama = discover().get("backbone", "llama").load()
        for method in RUN:
            registry.backbone(f"broken-{method}", raises(llama, method))
        for name in SIZES:
            registry.backbone(f"broken-{name}", type("Odd", (llama,), {name: property(fail)}))
        for method in ("examples", "shards", "read"):
            registry.task(f"broken-{method}", raises(Shards, method))
        registry.task("broken-halfway", Halfway)
        registry.task("broken-still", Still)
        registry.task("broken-ready", raises(Shards, "examples")())
        registry.task("no-task", lambda: None)
        for method in ("config", "state", "language_model"):
            name = method.replace("_", "-")
            registry.importer(f"broken-{name}", raises(Llama, method))
        registry.importer("lacking", Lacking)
        for method in ("__init__", "loss", "labels", "correct"):
            registry.objective(f"broken-{method.strip('_')}", raises(Zero, method))
        registry.objective("zero", Zero)
        registry.objective("no-objective", lambda model, data: None)
        registry.strategy("no-preset", ["interact"])
        registry.strategy("odd-preset", {"intract": "rvii"})
        registry.interaction("one-reason", type("One", (TinyLook,), {REASONS: classmethod(why)}))


@pytest.fixture(scope="module")
def registry() -> Registry:
    """Everything installed, the toys, and the broken plugin."""
    return install(toy_registry(), Broken())


def said(kind: str, name: str, method: str) -> str:
    """What is said of the method that raised."""
    return (
        f"{kind} 'broken-{name}' of plugin ipn-broken 1.2 failed in {method}: OddError: of its own"
    )


# -- strategies and stages -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no-preset", r"strategy 'no-preset' of ipn-broken 1\.2 is no preset: it is a list"),
        ("odd-preset", r"of ipn-broken 1\.2 is no preset: unknown key 'intract' \(did you mean"),
    ],
)
def test_a_strategy_that_is_no_preset_is_refused_with_its_plugin(
    registry: Registry, name: str, reason: str
) -> None:
    with pytest.raises(PluginError, match=reason):
        IPNConfig.resolve({"strategy": name}, registry, "model")


def test_a_single_reason_is_told_as_one(registry: Registry) -> None:
    config = toy_config(registry, "tiny-look", interact="one-reason")
    parts = {"backbone": tiny_backbone(), "encoder": TinyEncoder(TinyEncoderConfig())}
    with pytest.raises(ConfigError, match=r"does not fit this model: it is a full moon\.$"):
        IPN.from_config(config, registry=registry, **parts)


# -- backbones -------------------------------------------------------------------------------------


@pytest.fixture
def build(registry: Registry, llm: Path) -> Callable[..., IPN]:
    """Makes a toy model on a broken backbone."""

    def built(name: str, strategy: str = "tiny-look", **more: Any) -> IPN:
        config = toy_config(registry, strategy, **more)
        config["backbone"] = {"name": f"broken-{name}", "weights": str(llm)}
        encoder = TinyEncoder(TinyEncoderConfig())
        return IPN.from_config(config, encoder=encoder, registry=registry)

    return built


@pytest.mark.parametrize("method", ["embed", "new_cache", "extend"])
def test_a_backbone_that_raises_while_it_is_asked_is_named(
    build: Callable[..., IPN], registry: Registry, method: str
) -> None:
    model = build(method)
    with pytest.raises(StageError) as caught:
        model.ask(picture(), "What?", max_new_tokens=2)
    assert str(caught.value) == said("backbone", method, method)
    assert isinstance(caught.value.__cause__, OddError)
    assert toy_model(registry).ask(picture(), "What?", max_new_tokens=2).ids


def test_a_backbone_that_raises_in_its_language_head_is_named(build: Callable[..., IPN]) -> None:
    prompt = Prompt.ask("What?", [picture()]).then_assistant("dog", learn=True)
    with pytest.raises(StageError) as caught:
        build("logits")([prompt])
    assert str(caught.value) == said("backbone", "logits", "logits")


def test_a_backbone_that_raises_while_a_question_is_kept_is_named(
    build: Callable[..., IPN],
) -> None:
    model = build("extend")
    model.slots.request.requires_grad_(False)
    prompt = Prompt.ask("What?", [picture()]).then_assistant("dog", learn=True)
    cache = PrefixCache(model, 1 << 20)
    with pytest.raises(StageError) as caught:
        model([prompt], prefixes=cache)
    assert str(caught.value) == said("backbone", "extend", "extend")
    assert ran(cache, caught.value)


def test_a_backbone_that_raises_where_it_places_keys_is_named(build: Callable[..., IPN]) -> None:
    model = build("place_keys", inject="prefix-kv")
    with pytest.raises(StageError) as caught:
        model.ask(picture(), "What?", max_new_tokens=2)
    assert str(caught.value) == said("backbone", "place_keys", "remember")


def test_a_backbone_that_raises_before_a_model_runs_is_named(build: Callable[..., IPN]) -> None:
    with pytest.raises(StageError) as caught:
        build("embed", layout={"request_init": ["a"]})
    assert str(caught.value) == said("backbone", "embed", "embed")
    with pytest.raises(StageError) as caught:
        directions(build("embed"), ["dog", "cat"])
    assert str(caught.value) == said("backbone", "embed", "embed")


@pytest.mark.parametrize("name", SIZES)
def test_a_backbone_that_cannot_say_what_it_is_is_named(
    build: Callable[..., IPN], name: str
) -> None:
    text = f"backbone 'broken-{name}' of ipn-broken 1.2 cannot be built: OddError: of its own"
    with pytest.raises(PluginError, match=text):
        build(name)


@pytest.mark.parametrize("strategy", ["tiny-look", "toy-static"])
def test_a_language_model_that_raises_while_it_answers_is_named(
    build: Callable[..., IPN], strategy: str
) -> None:
    model = build("logits", strategy)  # a method that transformers does not call

    def forward(self: PreTrainedModel, *arguments: Any, **options: Any) -> Any:
        fail()

    model.backbone.lm.__class__ = type("Odd", (type(model.backbone.lm),), {"forward": forward})
    with pytest.raises(StageError) as caught:
        model.ask(picture(), "What?", max_new_tokens=2)
    assert str(caught.value) == said("backbone", "logits", "forward")


class Streamer:
    """Of the user's own, and it raises."""

    def put(self, value: Any) -> None:
        fail()

    def end(self) -> None:
        """Not reached."""


def test_what_the_user_hands_to_generate_is_not_blamed_on_the_backbone(registry: Registry) -> None:
    with pytest.raises(OddError):
        toy_model(registry).ask(picture(), "What?", streamer=Streamer())


@pytest.mark.parametrize(
    "error",
    [
        IPNError("told by itself"),
        torch.OutOfMemoryError("no room"),
        MemoryError(),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_no_fault_of_a_backbone_is_handed_on_as_it_is(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model = toy_model(registry)

    def tell(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr(model.backbone, "extend", tell)
    with pytest.raises(type(error)) as caught:
        model.ask(picture(), "What?")
    assert caught.value is error


def test_a_backbone_that_nothing_registered_is_named_as_well(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = toy_model(registry)
    monkeypatch.setattr(model.backbone, "extend", fail)
    text = "backbone 'tiny' of a local class failed in extend: OddError: of its own"
    with pytest.raises(StageError, match=text):
        model.ask(picture(), "What?")


# -- tasks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("examples", "examples"),
        ("ready", "examples"),
        ("still", "examples"),
        ("shards", "shards"),
        ("read", "read"),
        ("halfway", "read"),
    ],
)
def test_a_task_that_raises_is_named_whoever_reads_it(
    registry: Registry, name: str, method: str
) -> None:
    text = said("task", name, method)
    with pytest.raises(StageError) as caught:
        open_task(f"broken-{name}", registry=registry).examples("train")
    assert str(caught.value) == text
    assert isinstance(caught.value.__cause__, OddError)
    entry = DataConfig(task=f"broken-{name}", split="train")
    with pytest.raises(StageError) as caught:
        Data(entry, registry, training=True)
    assert str(caught.value) == text


@pytest.mark.parametrize(("name", "method"), [("shards", "shards"), ("halfway", "read")])
def test_a_task_that_raises_while_it_is_streamed_is_named(
    registry: Registry, name: str, method: str
) -> None:
    entry = DataConfig(task=f"broken-{name}", split="train", stream=4)
    with pytest.raises(StageError) as caught:
        next(Stream(entry, registry).windows("seed", None))
    assert str(caught.value) == said("task", name, method)


def test_a_tasks_refusal_is_handed_on_as_it_is(registry: Registry) -> None:
    with pytest.raises(DataError, match="unknown split 'no'"):
        open_task("broken-read", registry=registry).examples("no")


def test_a_task_that_no_registry_opened_raises_what_it_raises() -> None:
    with pytest.raises(OddError):
        Halfway().examples("train")
    assert [e.question for e in Shards().examples("train")] == ["What?"]


def test_an_opened_task_can_be_sent_to_another_process(registry: Registry) -> None:
    task = open_task("broken-halfway", registry=registry)
    with pytest.raises(StageError) as caught:
        pickle.loads(pickle.dumps(task)).examples("train")
    assert str(caught.value) == said("task", "halfway", "read")


def test_what_is_no_task_is_refused_by_name(registry: Registry) -> None:
    text = "task 'no-task' of plugin ipn-broken 1.2 must be a subclass of ipn_core.tasks.Task"
    with pytest.raises(PluginError, match=text):
        open_task("no-task", registry=registry)


# -- importers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["config", "state", "language_model"])
def test_an_importer_that_raises_is_named(registry: Registry, llm: Path, method: str) -> None:
    name = method.replace("_", "-")
    imported = find_import(f"broken-{name}:{llm}", registry)
    assert imported is not None
    given = {"config": (), "state": (toy_model(registry),), "language_model": ("auto",)}[method]
    with pytest.raises(StageError) as caught:
        getattr(imported, method)(*given)
    assert str(caught.value) == said("importer", name, method)
    assert isinstance(caught.value.__cause__, OddError)


def test_an_importer_is_named_also_as_a_model_and_as_weights(registry: Registry, llm: Path) -> None:
    with pytest.raises(StageError) as caught:
        IPN.from_pretrained(f"broken-config:{llm}", registry=registry)
    assert str(caught.value) == said("importer", "config", "config")
    config = toy_config(registry, "tiny-look")
    config["backbone"] = {"name": "llama", "weights": f"broken-language-model:{llm}"}
    with pytest.raises(StageError) as caught:
        IPN.from_config(config, registry=registry)
    assert str(caught.value) == said("importer", "language-model", "language_model")


def test_a_tensor_that_a_checkpoint_lacks_is_no_fault_of_the_importer(
    registry: Registry, llm: Path
) -> None:
    imported = find_import(f"lacking:{llm}", registry)
    assert imported is not None
    with pytest.raises(CheckpointError, match=r"have no tensor 'some\.weight'\. Fetch them again"):
        imported.state(toy_model(registry))


# -- objectives ------------------------------------------------------------------------------------


def test_an_objective_that_raises_in_its_constructor_is_named(registry: Registry) -> None:
    text = "objective 'broken-init' of ipn-broken 1.2 cannot be built: OddError: of its own"
    model = toy_model(registry)
    with pytest.raises(PluginError, match=text):
        build_objective("broken-init", model, [], registry)
    arms = Arms.__new__(Arms)
    arms.registry, arms.data = registry, []
    with pytest.raises(PluginError, match=text):
        arms._served(model, {"broken-init": 1.0})


@pytest.mark.parametrize(
    ("method", "given"), [("loss", (None, None)), ("labels", (None,)), ("correct", (None, None))]
)
def test_an_objective_that_raises_while_it_trains_is_named(
    registry: Registry, method: str, given: tuple[Any, ...]
) -> None:
    objective = build_objective(f"broken-{method}", toy_model(registry), [], registry)
    with pytest.raises(StageError) as caught:
        getattr(objective, method)(*given)
    assert str(caught.value) == said("objective", method, method)
    assert isinstance(caught.value.__cause__, OddError)


def test_a_loss_without_room_is_not_blamed_on_its_objective(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    model = toy_model(registry)
    monkeypatch.setattr(torch, "zeros", full)
    objective = build_objective("zero", model, [], registry)
    with pytest.raises(torch.OutOfMemoryError):
        objective.loss(None, None)  # type: ignore[arg-type]


def test_what_is_no_objective_is_refused_by_name(registry: Registry) -> None:
    text = "objective 'no-objective' of plugin ipn-broken 1.2 must be a subclass of"
    with pytest.raises(PluginError, match=text):
        build_objective("no-objective", toy_model(registry), [], registry)
