"""Training with several looks: what each shall bring, and requests that follow from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lessons import lesson, metrics, stage, training
from toys import picture, toy_model

from ipn_core.config import Layout
from ipn_core.hooks import hookimpl
from ipn_core.plugins import Registry
from ipn_core.prompt import Prompt
from ipn_core.tasks import Example, Picture
from ipn_core.training.answers import Answers, targets
from ipn_core.training.features import FeatureCache
from ipn_core.training.requests import RequestCache, backbone_digest


@pytest.mark.parametrize(
    ("layout", "looks", "hops", "expected"),
    [
        ({"rounds": 1}, 0, (), ("c",)),
        ({"rounds": 1}, 1, ("b",), ("c",)),
        ({"rounds": 1, "look_again": 1}, 1, ("b",), ("b", "c")),
        ({"rounds": 1, "look_again": 2}, 1, ("b",), ("b", "c")),
        ({"rounds": 1, "look_again": 2}, 2, ("a", "b"), ("a", "b", "c")),
        ({"rounds": 2}, 2, ("a", "b"), ("b", "c")),
        ({"rounds": 3}, 1, ("b",), ("b", "c", "c")),
        ({"rounds": 0}, 0, ("b",), ()),
    ],
)
def test_what_each_look_shall_bring(
    layout: dict[str, int], looks: int, hops: tuple[str, ...], expected: tuple[str, ...]
) -> None:
    example = Example("?", ("c", "see"), (), looks=looks, hops=hops)
    assert targets(example, Layout(**layout)) == expected


SHOWN = [Picture(f"p{i}", lambda i=i: picture(i)) for i in range(2)]


def hopping() -> list[Example]:
    rows = [
        ("Who?", "yes", ()),
        ("What is it?", "a dog", ("cat",)),
        ("Who?", "no", ("dog",)),
        ("Where is the small dog?", "no", ()),
    ]
    return [
        Example(question, (answer,), tuple(SHOWN[: 1 + row % 2]), looks=len(hops), hops=hops)
        for row, (question, answer, hops) in enumerate(rows)
    ]


def test_a_further_look_is_asked_for_with_what_the_first_should_find(
    tmp_path: Path, registry: Registry
) -> None:
    model = toy_model(registry, "rvii", layout={"look_again": 1}).requires_grad_(False)
    wide = model.backbone.D_in
    assert model.interaction.width == wide, "or the message could not stand for an embedding"
    cache = FeatureCache(model.encoder, tmp_path)
    keys = cache.add(SHOWN)

    def features(some: Any) -> Any:
        return cache.get([[keys[p.name] for p in e.images] for e in some])

    answers = Answers(model, [SimpleNamespace(examples=hopping())])
    digest = backbone_digest(model)
    requests = RequestCache(model, digest, tmp_path / "requests", answers)
    requests.add(hopping(), features)
    first, second = requests.get(hopping())
    assert (len(first), len(second)) == (4, 2)
    for row, hidden in zip((1, 2), second, strict=True):
        example = hopping()[row]
        embedding = answers.of([example], 0)[0]
        told = SimpleNamespace(values=embedding.expand(1, model.interaction.length, wide))

        class Said:
            @hookimpl(tryfirst=True)
            def interact(self, request: Any, features: Any, told: Any = told) -> Any:
                return told

        with model.observing(Said()), torch.no_grad():
            prompt = Prompt.ask(example.question, example.images, answer="x", looks=1)
            plan = model.planner.plan(prompt)
            percept = model.perceive([], [example.question], features([example]))
            records = model.engine.prefix([plan], percept).state.looks
        torch.testing.assert_close(hidden, records[1].request.values[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(second[0], first[1], atol=1e-2)

    again = RequestCache(model, digest, tmp_path / "requests", answers)
    again.add(hopping(), lambda some: pytest.fail("they are kept on disk"))
    with torch.no_grad():
        model.slots.dynamic.add_(1)
    changed = RequestCache(model, digest, tmp_path / "requests", answers)
    changed.add(hopping(), features)
    assert torch.equal(changed.get(hopping())[0], first)
    assert not torch.allclose(changed.get(hopping())[1], second, atol=1e-3)
    model.injector.requires_grad_(True)
    trained = RequestCache(model, digest, tmp_path / "requests", answers)
    trained.add(hopping(), features)
    assert len(trained.get(hopping())) == 1, "what the injector says changes while it trains"


@pytest.mark.slow
@pytest.mark.usefixtures("own_training")
def test_a_strategy_learns_what_each_of_two_looks_shall_bring(llm: Path, tmp_path: Path) -> None:
    told = {"train": ["inject", "slots.dynamic"], "group_by": "question", "lr": 1e-2}
    values = lesson(
        llm,
        stage("answer", "answer-embedding", train=["interact"], steps=60, lr=3e-3),
        stage("verbalise", "verbalise", steps=40, **told),
        stage("instruct", "language", steps=2),
        data=[{"task": "colours", "options": {"looks": 1}}],
        validate_on=[{"task": "colours", "split": "train", "options": {"looks": 1}}],
    )
    values["model"]["layout"] = {"dynamic": 2, "look_again": 1}
    training(values, tmp_path / "run").run()
    logged = metrics(tmp_path / "run")
    for name, ratio in {"answer": 0.6, "verbalise": 0.95}.items():
        losses = [e["loss"] for e in logged if e["stage"] == name and "loss" in e]
        assert sum(losses[-8:]) < ratio * sum(losses[:8]), name
    (validated,) = [e for e in logged if "accuracy" in e]
    # One of four hops and one of two answers would be right by chance.
    assert validated["by_type"]["colours/train/side"] > 0.3
