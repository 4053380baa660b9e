"""First segments that never change are read once, and nothing else about a step changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import lesson, metrics, stage, stop_at, training, weights
from toys import picture, prompt_of, toy_model
from watching import batch_of, check_loss, gradients, seen_positions

from ipn_core.config import LoraConfig
from ipn_core.model import IPN
from ipn_core.prefixes import PrefixCache
from ipn_core.prompt import Prompt
from ipn_core.testing.tiny import tiny_backbone
from ipn_core.training.loop import StageRun

MUCH = 1 << 30


def asking(registry: Any, *args: Any, **more: Any) -> IPN:
    """A model in which nothing trains that stands before a look."""
    model = toy_model(registry, *args, **more)
    model.slots.request.requires_grad_(False)
    return model


def taught(*rows: int) -> list[Prompt]:
    return [prompt_of(row, 1, answer="ab" * (row + 1)) for row in rows]


@contextmanager
def seen_logits(model: IPN) -> Iterator[list[torch.Tensor]]:
    """What the language head says."""
    seen: list[torch.Tensor] = []
    head = model.backbone.lm.get_output_embeddings()
    handle = head.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    try:
        yield seen
    finally:
        handle.remove()


# -- the same result -------------------------------------------------------------------------------


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("strategy", ["tiny-look", "rvii"])
@pytest.mark.parametrize("family", ["llama", "llama-gqa", "opt", "opt-projected"])
def test_from_the_cache_comes_what_the_llm_would_say(
    registry: Any, family: str, strategy: str, rounds: int
) -> None:
    model = asking(registry, strategy, family, rounds=rounds)
    prompts = batch_of(3, rounds, 2, True, answer="ab")  # ragged, one of them without a picture
    cache = PrefixCache(model, MUCH)
    with seen_logits(model) as logits:
        plain = gradients(model, model(prompts)[0])
        for _ in range(2):  # first read, then kept
            mine = gradients(model, model(prompts, prefixes=cache)[0])
            largest = max(g.abs().max() for g in plain.values())
            for name, gradient in plain.items():
                assert (mine[name] - gradient).abs().max() <= 1e-5 * largest, name
    for other in logits[1:]:
        assert (other - logits[0]).abs().max() <= 1e-4 * logits[0].abs().max()
    assert cache.reads == 3
    check_loss(model, prompts, *model(prompts, prefixes=cache))


@pytest.mark.parametrize("layer", [0, 1, -2])
def test_requests_of_several_tokens_from_an_inner_layer(registry: Any, layer: int) -> None:
    request = {"name": "hidden-state", "layer": layer}
    model = asking(registry, "tiny-look", request=request, layout={"request": 2})
    cache = PrefixCache(model, MUCH)
    for _ in range(2):
        check_loss(model, taught(0, 1, 2), *model(taught(0, 1, 2), prefixes=cache))


def test_a_kept_question_is_not_read_again(registry: Any) -> None:
    model = asking(registry)
    cache = PrefixCache(model, MUCH)
    model(taught(0, 1, 0), prefixes=cache)
    assert cache.reads == 2
    with seen_positions(model) as seen:
        model(taught(1, 1, 0), prefixes=cache)
    assert [rows for rows, _ in seen] == [3]  # what follows the look, and nothing else
    assert cache.reads == 2


def test_without_a_cache_a_frozen_beginning_takes_part_in_no_gradient(registry: Any) -> None:
    model, kept = asking(registry), []
    extend = model.backbone.extend

    def watched(embeds: Any, cache: Any, *args: Any) -> Any:
        out = extend(embeds, cache, *args)
        kept.append((out.last.requires_grad, cache.layers[0].keys.requires_grad))
        return out

    model.backbone.extend = watched
    model(taught(0, 1))
    assert kept == [(False, False), (True, True)]


# -- what a step's bits depend on ------------------------------------------------------------------


def test_bits_do_not_depend_on_what_was_kept_before(registry: Any) -> None:
    model = asking(registry)
    expected = model(taught(0, 1, 2), prefixes=PrefixCache(model, MUCH))[0]
    for before in ([0], [2, 1], [1, 0, 2, 2]):
        for limit in (MUCH, 20_000, 0):
            cache = PrefixCache(model, limit)
            model(taught(*before), prefixes=cache)
            assert torch.equal(model(taught(0, 1, 2), prefixes=cache)[0], expected)


def test_what_was_not_used_for_longest_goes(registry: Any) -> None:
    model = asking(registry)
    sizes = []
    for row in range(3):
        alone = PrefixCache(model, MUCH)
        model(taught(row), prefixes=alone)
        sizes.append(alone.held)
    cache = PrefixCache(model, sizes[0] + max(sizes[1:]))
    for rows, reads in (([0], 1), ([1], 2), ([0], 2), ([2], 3), ([0], 3), ([1], 4)):
        model(taught(*rows), prefixes=cache)
        assert cache.reads == reads
        assert 0 < cache.held <= cache.limit
    small = PrefixCache(model, min(sizes) - 1)
    model(taught(0), prefixes=small)
    assert small.held == 0


# -- where it switches itself off ------------------------------------------------------------------


def adapted(registry: Any) -> IPN:
    backbone = tiny_backbone()
    backbone.adapt(LoraConfig())
    return asking(registry, backbone=backbone)


def with_trained_request(registry: Any) -> IPN:
    model = asking(registry)
    model.slots.request.requires_grad_(True)
    return model


OFF = {
    "<img-q> trains": with_trained_request,
    "weights of the LLM train": adapted,
    "static tokens of pictures stand in it": lambda registry: asking(registry, "toy-both"),
    "its injector acts before any look": lambda registry: asking(registry, "gated-xattn"),
}


@pytest.mark.parametrize("reason", OFF)
def test_what_is_no_constant_is_run_in_its_batch(registry: Any, reason: str) -> None:
    model = OFF[reason](registry)
    cache, said = PrefixCache(model, MUCH), []
    ask = cache.not_supported_reasons
    cache.not_supported_reasons = lambda segment: said.extend(ask(segment)) or ask(segment)
    check_loss(model, taught(0, 1), *model(taught(0, 1), prefixes=cache))
    assert cache.reads == 0
    assert reason in said


def test_answers_to_learn_before_a_look_are_learned(registry: Any) -> None:
    model = asking(registry)
    said = Prompt.user("Who?").then_assistant("no", learn=True)
    dialogue = said.then_user(picture(), "Now?").then_assistant("yes", learn=True)
    cache = PrefixCache(model, MUCH)
    check_loss(model, [dialogue], *model([dialogue], prefixes=cache))
    assert cache.reads == 0


def test_a_frozen_adapter_is_a_constant(registry: Any) -> None:
    backbone = tiny_backbone()
    backbone.adapt(LoraConfig(dropout=0.5))
    model = asking(registry, backbone=backbone)
    backbone.lora.requires_grad_(False)
    model.train()
    cache = PrefixCache(model, MUCH)
    loss = model(taught(0), prefixes=cache)[0]
    assert cache.reads == 1
    torch.testing.assert_close(loss, model(taught(0))[0])


# -- in training -----------------------------------------------------------------------------------


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> list[PrefixCache | None]:
    """What the stages of trainings keep their prefixes in."""
    found: list[PrefixCache | None] = []
    prepare = StageRun.prepare

    def noted(self: StageRun) -> None:
        found.append(self.prefixes)
        prepare(self)

    monkeypatch.setattr(StageRun, "prepare", noted)
    return found


def steps(llm: Path, count: int, **more: Any) -> dict[str, Any]:
    small = {"steps": count, "groups": 1, "per_group": 2}
    told = {"train": ["inject", "slots.dynamic"], "lr": 1e-2}
    stages = [stage("verbalise", "verbalise", **told, **small), stage("join", "language", **small)]
    return lesson(llm, *stages, save_every=1, **more)


@pytest.mark.usefixtures("own_training")
def test_a_training_reads_each_question_once(
    llm: Path, tmp_path: Path, caches: list[PrefixCache | None]
) -> None:
    training(steps(llm, 12), tmp_path / "with").run()
    assert [cache and cache.reads for cache in caches] == [6, 6]
    training(steps(llm, 12, prefix_cache=0), tmp_path / "without").run()
    training(steps(llm, 11), tmp_path / "short").run()  # 22 questions, 6 of them different
    assert caches[2:] == [None] * 4
    for mine, other in zip(metrics(tmp_path / "with"), metrics(tmp_path / "without"), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.usefixtures("own_training")
@pytest.mark.parametrize(("gigabytes", "step"), [(2.0, 18), (5e-5, 5)])
def test_an_interrupted_training_goes_on_to_the_same_bits(
    llm: Path, tmp_path: Path, gigabytes: float, step: int, caches: list[PrefixCache | None]
) -> None:
    values = steps(llm, 12, prefix_cache=gigabytes)
    training(values, tmp_path / "whole").run()
    if gigabytes < 1:
        assert min(cache.reads for cache in caches) > 6  # some had to go
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step, lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            training(values, tmp_path / "broken").run()
    training(values, tmp_path / "broken", resume=True).run()
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "whole")
