"""Configs are frozen, closed and explain themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
from toys import toy_config, toy_model

from ipn_core.config import Config, IPNConfig, Layout, load_yaml, set_by_path
from ipn_core.errors import ConfigError, UnknownNameError
from ipn_core.model import IPN

BASE = {"backbone": "llama", "encoder": "tiny", "layout": {"rounds": 0}}
ASKING = {"request": "hidden-state", "interact": "tiny-look", "inject": "tokens"}


class Own(Config):
    width: int = 8
    rate: float = 0.1


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Own().width = 9


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"widht": 3},
            r"unknown key 'x.widht': allowed are width, rate \(did you mean 'width'\?\)",
        ),
        ({"width": "wide"}, r"'x.width': input should be a valid integer.*got 'wide'"),
        ({"rate": float("nan")}, r"'x.rate': input should be a finite number.*got nan"),
        ({"width": True}, "^'x': width must be a number, got true.$"),
        ({"rate": False, "width": True}, "^'x': width and rate must be numbers, got true or false"),
        ([1], r"x must be a mapping of keys to values, got \[1\]"),
    ],
)
def test_faults_name_the_key_what_is_allowed_and_what_was_given(values: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Own.parse(values, "x")


class Even(Config):
    width: int = 8

    @pydantic.field_validator("width")
    @classmethod
    def _even(cls, width: int) -> int:
        if width % 2:
            raise ValueError("must be even" if width > 0 else "")
        return width


@pytest.mark.parametrize(
    ("width", "text"), [(3, "'x.width': must be even, got 3."), (-1, "'x.width': wrong value, got")]
)
def test_a_validators_own_words_stand_alone(width: int, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Even.parse({"width": width}, "x")
    assert str(caught.value).startswith(text)


class Listed(Config):
    items: tuple[Own, ...] = pydantic.Field(min_length=1)


def test_a_list_whose_item_is_wrong_is_not_called_too_short_as_well() -> None:
    with pytest.raises(ConfigError) as caught:
        Listed.parse({"items": [{"widht": 1}]}, "x")
    assert str(caught.value).startswith("unknown key 'x.items.0.widht'")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"'x.items': tuple should have at least 1 item"):
        Listed.parse({"items": []}, "x")


def test_several_faults_are_told_together_a_line_each() -> None:
    with pytest.raises(ConfigError) as caught:
        Own.parse({"width": "a", "heigth": 3}, "x")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"layout": {"rounds": 17}}, r"layout.rounds': .*less than or equal to 16, got 17"),
        ({"layout": {"dynamc": 3}}, r"unknown key 'config.layout.dynamc'.* 'dynamic'"),
        ({"layout": {"order": ["images", "text", "text"]}}, "must name images, text and look"),
        (
            {"layout": {"rounds": 1}},
            "^'config': with layout.rounds > 0, request, interact and inject are all needed.$",
        ),
        (ASKING, "^'config': request and interact need layout.rounds > 0.$"),
        ({"backbone": {"name": "llama", "dtype": "int8"}}, r"backbone.dtype': .*'bfloat16'.*int8"),
        ({"encoder": None}, "config.encoder'"),
        ({"layout": {"dynamic": True}}, "^'config.layout': dynamic must be a number, got true.$"),
        ({"prompt": {"template": ""}}, "config.prompt.template': .*at least 1 character"),
    ],
)
def test_a_model_config_that_makes_no_sense_is_refused(changes: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        IPNConfig.parse({**BASE, **changes}, "config")


def test_a_bare_name_stands_for_a_component_with_its_defaults() -> None:
    config = IPNConfig.parse({**BASE, "perceive": {"name": "toy-linear", "wide": 2}}, "config")
    assert (config.encoder.name, config.encoder.options) == ("tiny", {})
    assert config.perceive.options == {"wide": 2}


def test_a_saved_config_reads_back_as_the_same() -> None:
    config = IPNConfig.parse({**BASE, **ASKING, "layout": {}}, "config")
    assert IPNConfig.parse(config.model_dump(mode="json", exclude_none=True), "again") == config


def test_a_strategy_is_a_preset_under_what_the_user_wrote(registry: Any) -> None:
    written = {
        "strategy": "tiny-look",
        "backbone": "llama",
        "interact": {"width": 7},
        "layout": {"dynamic": 2},
    }
    config = IPNConfig.resolve(written, registry, "config")
    assert config.interact.name == "tiny-look"
    assert config.interact.options == {"width": 7}
    assert (config.layout.dynamic, config.layout.rounds) == (2, 1)
    assert config.encoder.name == "tiny"
    other = IPNConfig.resolve({**written, "interact": {"name": "rvii", "depth": 3}}, registry, "c")
    assert other.interact.options == {"depth": 3}


def test_a_preset_is_not_changed_by_its_users(registry: Any) -> None:
    before = repr(registry.get("strategy", "tiny-look").load())
    toy_model(registry, interact={"width": 4})
    assert repr(registry.get("strategy", "tiny-look").load()) == before


def test_unknown_strategies_components_and_options_are_refused(registry: Any) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown strategy 'tiny-lok'.*'tiny-look'"):
        IPNConfig.resolve({**BASE, "strategy": "tiny-lok"}, registry, "config")
    with pytest.raises(UnknownNameError, match=r"unknown interaction 'tiny-lok'.*'tiny-look'"):
        toy_model(registry, interact="tiny-lok")
    with pytest.raises(ConfigError, match=r"unknown key 'interaction tiny-look.widht'.*'width'"):
        toy_model(registry, interact={"widht": 3})
    with pytest.raises(ConfigError, match=r"unknown key 'model.layot'.*did you mean 'layout'"):
        toy_model(registry, layot={})
    with pytest.raises(ConfigError, match="perceiver 'toy-linear' takes no options, got wide"):
        toy_model(registry, "toy-both", perceive={"name": "toy-linear", "wide": 1})
    with pytest.raises(ConfigError, match=r"unknown key 'backbone.wieghts'.*mean 'weights'"):
        IPN.from_config({**BASE, "backbone": {"name": "llama", "wieghts": "x"}}, registry=registry)
    with pytest.raises(ConfigError, match=r"'request.layer' must be between -3 and 2.* got 3"):
        toy_model(registry, request={"name": "hidden-state", "layer": 3})


def test_a_toy_config_is_a_plain_mapping(registry: Any) -> None:
    assert IPNConfig.resolve(toy_config(registry, "tiny-look"), registry, "c").layout.rounds == 1


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("a=1", {"a": 1}),
        ("a.b=[1, 2]", {"a": {"b": [1, 2]}}),
        ("a=", {"a": None}),
        ("interact.width=4", {"interact": {"name": "rvii", "width": 4}}),
        ("a=b=c", {"a": "b=c"}),
    ],
)
def test_assignments_set_by_path(assignment: str, expected: Any) -> None:
    values: dict[str, Any] = {"interact": "rvii"}
    set_by_path(values, assignment)
    assert values == {"interact": "rvii", **expected}


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ("a", "must look like key=value"),
        ("a..b=1", "must look like key=value"),
        ("=1", "must look like key=value"),
        ("n.x=1", "'n' holds 3, which has no keys"),
        ("l.x=1", "'l.x': no 'x' in the list"),
        ("a=[", "'a=\\['"),
        ("a=" + "9" * 5000, "Exceeds the limit"),
        ("a={b: 1, b: 2}", "'b' stands twice"),
    ],
)
def test_wrong_assignments_are_refused(assignment: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        set_by_path({"n": 3, "l": [1]}, assignment)


def test_yaml_files_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match=r"no such file: .*Give the path of a YAML config"):
        load_yaml(path)
    for content, text in {
        b"a: [": "is not valid YAML: .*line 1",
        b"- a": "must hold a mapping",
        b"": "must hold a mapping",
        b"\xff\xfe\xff": "not UTF-8|not valid",
        b"a: !!python/object/apply:os.system ['true']": "is not valid YAML",
        b"a: 1\nb:\n  c: 1\n  c: 2": "is not valid YAML: the key 'c' stands twice.*line 4",
    }.items():
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=text):
            load_yaml(path)
    path.write_text("a: {b: 1}")
    assert load_yaml(path) == {"a": {"b": 1}}
    path.write_text("a: &a {b: 1, d: 2}\nc: {<<: *a, b: 3}")
    assert load_yaml(path)["c"] == {"b": 3, "d": 2}


def test_layout_defaults_are_the_papers() -> None:
    layout = Layout()
    assert (layout.rounds, layout.request, layout.dynamic) == (1, 1, 5)
    assert layout.order == ("images", "text", "look")
