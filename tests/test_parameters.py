"""Which parameters train, by names and globs, and how fast each of them learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lessons import lesson, stage, stop_at, training, weights
from toys import toy_model

from ipn_core.errors import ConfigError
from ipn_core.model import IPN
from ipn_core.training.config import StageConfig, TrainConfig
from ipn_core.training.loop import StageRun
from ipn_core.training.parameters import choose, factors, groups, trainable


def guided(registry: Any) -> IPN:
    guide = {"width": 8, "tallies": 2, "frequencies": 2}
    return toy_model(registry, "rvii", interact={"width": 16, "depth": 2, "guide": guide})


def names(model: Any, *patterns: str, freeze: tuple[str, ...] = ()) -> set[str]:
    return set(trainable(model, patterns, freeze))


def test_a_name_stands_for_all_that_starts_with_it(registry: Any) -> None:
    model = guided(registry)
    every = {n for n, _ in model.named_parameters() if n.startswith("interaction.")}
    assert names(model, "interact") == names(model, "interact.*") == every
    assert names(model, "interact.guide") < every
    with pytest.raises(ConfigError, match=r"'interact\.gui' names nothing"):
        names(model, "interact.gui")


def test_a_glob_stands_for_what_it_matches_and_all_below(registry: Any) -> None:
    model = guided(registry)
    every = names(model, "*")
    assert names(model, "*.bias") == {n for n in every if n.endswith(".bias")}
    assert names(model, "interact.blocks.?") == names(model, "interact.blocks")
    assert not any(n.startswith(("backbone.", "perceiver.encoder.")) for n in every)
    assert names(model, "interact", "slots.d*") == names(model, "interact") | {"slots.dynamic"}


def test_freeze_takes_out_again(registry: Any) -> None:
    model = guided(registry)
    left = names(model, "interact", "inject", freeze=("interact.guide", "*.bias"))
    assert left == {
        n
        for n in names(model, "interact", "inject")
        if not n.startswith("interaction.guide.") and not n.endswith(".bias")
    }
    chosen = choose(model, ["interact"], ["interact.guide"])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(chosen)


@pytest.mark.parametrize(
    ("patterns", "freeze", "reason"),
    [
        (["interakt"], (), r"'train': 'interakt' names .* \(did you mean 'interact'\?\)\. Start"),
        (["interact.giude"], (), r"\(did you mean 'interact\.guide'\?\)"),
        (["interact.*.giude"], (), r"'interact\.\*\.giude' names nothing that can be trained"),
        (["backbone"], (), "'backbone' names nothing that can be trained"),
        (["interact"], ("inject",), "'freeze': 'inject' names nothing that trains in this stage"),
        (["interact"], ("interact.giude",), r"'freeze': .* \(did you mean 'interact\.guide'\?\)"),
        (["interact"], ("*",), "'freeze' leaves nothing of what 'train' names"),
    ],
)
def test_what_matches_nothing_is_refused_with_near_names(
    registry: Any, patterns: list[str], freeze: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        trainable(guided(registry), patterns, freeze)


def test_the_last_rate_that_fits_counts(registry: Any) -> None:
    trained = trainable(guided(registry), ["interact", "inject"])
    found = factors(trained, {"interact": 0.1, "interact.guide": 2.0, "*.bias": 0.5})
    assert found["interaction.guide.patch_in.weight"] == 2.0
    for name, factor in found.items():
        if name.endswith(".bias"):
            assert factor == 0.5
        elif name.startswith("injector."):
            assert factor == 1.0
        elif not name.startswith("interaction.guide."):
            assert factor == 0.1
    with pytest.raises(ConfigError, match=r"'rates': 'slots' names nothing that trains in this"):
        factors(trained, {"slots": 0.1})


def test_without_rates_there_is_one_group_for_matrices_and_one_for_the_rest(registry: Any) -> None:
    trained = trainable(guided(registry), ["interact", "inject"])
    one = StageConfig.parse(stage("s", "language"), "stage")
    matrices, rest = groups(trained, one)
    assert matrices["params"] == [p for p in trained.values() if p.ndim > 1]
    assert rest["params"] == [p for p in trained.values() if p.ndim <= 1]
    assert (matrices["weight_decay"], rest["weight_decay"]) == (one.weight_decay, 0.0)
    assert matrices["factor"] == rest["factor"] == 1.0


@pytest.mark.parametrize("rates", [{"interact": 0.0}, {"interact": -1}, {"interact": "fast"}])
def test_a_rate_is_a_factor_above_zero(rates: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"stage\.rates\.interact"):
        StageConfig.parse(stage("s", "language", rates=rates), "stage")


# -- trainings -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_training")
def test_a_group_learns_at_its_rate_and_what_is_frozen_stays(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[StageRun] = []
    stop_at(monkeypatch, 1, runs.append)
    one = stage("s", "language", steps=1, lr=1e-2, freeze=["interact.guide"], rates={"inject": 0.1})
    run = training(lesson(llm, one), tmp_path / "run")
    run.run()
    rate = {id(p): g["lr"] for g in runs[0].optimizer.param_groups for p in g["params"]}
    for name, parameter in runs[0].trained.items():
        assert not name.startswith("interaction.guide.")
        expected = 1e-3 if name.startswith("injector.") else 1e-2
        assert rate[id(parameter)] == pytest.approx(expected), name
    # AdamW's first step moves each number by its rate at most.
    assert len({rate[id(p)] for p in runs[0].trained.values()}) == 2


@pytest.mark.usefixtures("own_training")
def test_rates_that_name_nothing_are_refused_before_anything_is_written(
    llm: Path, tmp_path: Path
) -> None:
    values = lesson(llm, stage("s", "language", rates={"interakt": 0.1}))
    with pytest.raises(ConfigError, match=r"stage 's': 'rates': 'interakt' .*'interact'\?"):
        training(values, tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("own_training")
def test_a_run_with_groups_resumes_bit_for_bit(llm: Path, tmp_path: Path) -> None:
    one = stage("s", "language", freeze=["*.bias"], rates={"interact.guide": 0.3, "inject": 2})
    values = lesson(llm, one)
    training(values, tmp_path / "whole").run()
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 4, lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            training(values, tmp_path / "broken").run()
    training(values, tmp_path / "broken", resume=True).run()
    assert weights(tmp_path / "broken") == weights(tmp_path / "whole")


def test_a_config_without_the_newer_options_keeps_its_digest() -> None:
    # As version 0.1.0 first wrote it into saved states: trainings of then go on.
    values = {"model": {"strategy": "rvii"}, "data": [{"task": "colours"}]}
    values["stages"] = [{"name": "s", "train": ["interact"], "steps": 4}]
    digest = training(values, Path("nowhere")).digest
    assert digest == "4feeeadf187a0ba123ea1745fd4f94837b6eeb872689b14d411f17de301e4460"


def test_options_that_change_nothing_leave_the_digest_of_a_config(llm: Path) -> None:
    config = TrainConfig.parse(lesson(llm), "config")
    written = config.model_dump(mode="json")
    assert "checkpointing" not in written
    assert not {"freeze", "rates"} & set(written["stages"][0])
    plain = training(lesson(llm), Path("nowhere")).digest
    assert training(lesson(llm, checkpointing=True), Path("nowhere")).digest == plain
    other = [{**s, "rates": {"interact": 0.5}} for s in lesson(llm)["stages"][:1]]
    assert training(lesson(llm, *other), Path("nowhere")).digest != plain
