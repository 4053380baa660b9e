"""Configs: frozen, validated and closed; an unknown key is an error that names the near ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ipn_core.errors import ConfigError, PluginError, near
from ipn_core.plugins import Registry

__all__ = [
    "BackboneConfig",
    "ComponentConfig",
    "Config",
    "IPNConfig",
    "Layout",
    "LoraConfig",
    "PromptConfig",
    "lay_over",
    "load_yaml",
    "set_by_path",
]


class Config(BaseModel):
    """Base of all configs; plugin authors subclass it with typed fields and defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Refuse `steps: yes`, which pydantic would read as 1."""
        wrong = [
            name
            for name, field in cls.model_fields.items()
            if isinstance(values, Mapping)
            and isinstance(values.get(name), bool)
            and not {bool, Any} & (kinds := {*get_args(field.annotation), field.annotation})
            and {int, float} & kinds
        ]
        if wrong:
            what = (
                "must be a number, got true"
                if len(wrong) == 1
                else ("must be numbers, got true or false")
            )
            raise ValueError(f"{' and '.join(wrong)} {what}")
        return values

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate a mapping.

        Args:
            values: what the user wrote.
            where: names it in errors, such as "interact" or a file.

        Raises:
            ConfigError: one line for each fault, with near names for unknown keys.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} must be a mapping of keys to values, got {values!r}.")
        try:
            return cls.model_validate(dict(values))
        except pydantic.ValidationError as error:
            found = error.errors()
            faults = [cls._explain(f, where) for f in found if not _follows(f, found)]
            raise ConfigError("\n".join(faults)) from None

    @classmethod
    def _explain(cls, fault: Any, where: str) -> str:
        path = ".".join(str(p) for p in (where, *fault["loc"]) if p != "")
        if fault["type"] == "extra_forbidden":
            known: list[str] = list(cls._model_at(fault["loc"][:-1]).model_fields)
            name = str(fault["loc"][-1])
            return f"unknown key '{path}': allowed are {', '.join(known)}{near(name, known)}."
        if fault["type"] == "missing":
            return f"'{path}' is missing."
        said = fault["msg"]
        if fault["type"] == "value_error":
            # Of a validator of ours or of a plugin's; about a mapping it names the keys itself.
            said = said.removeprefix("Value error, ").rstrip(".") or "wrong value"
            if isinstance(fault["input"], Mapping):
                return f"'{path}': {said}."
        return f"'{path}': {said[0].lower()}{said[1:]}, got {fault['input']!r}."

    @classmethod
    def _model_at(cls, path: tuple[Any, ...]) -> type[BaseModel]:
        model: type[BaseModel] = cls
        for key in path:
            field = model.model_fields.get(str(key))
            inner = field.annotation if field else None
            options = getattr(inner, "__args__", (inner,))
            nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
            if not nested:
                break
            model = nested[0]
        return model


def _follows(fault: Any, found: Sequence[Any]) -> bool:
    """Whether a list is called too short only because an item of it has a fault of its own."""
    at = fault["loc"]
    inside = [f for f in found if len(f["loc"]) > len(at) and f["loc"][: len(at)] == at]
    return fault["type"] == "too_short" and bool(inside)


class ComponentConfig(Config):
    """A component by name; every further key is validated by the component's own config.

    A bare name stands for the component with its defaults: `interact: rvii`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The keys besides the name."""
        return dict(self.model_extra or {})


class LoraConfig(Config):
    """A low-rank adapter on the LLM (LoRA, arXiv 2106.09685).

    Attributes:
        rank: of the matrices that are added.
        alpha: what is added is multiplied with alpha / rank.
        dropout: of what the adapter reads, in training.
        targets: which linear layers, by the last part of their name.
    """

    rank: int = Field(default=8, ge=1, le=65536)
    alpha: int = Field(default=16, ge=1, le=65536)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(default=("q_proj", "v_proj"), min_length=1)


class BackboneConfig(ComponentConfig):
    """Which LLM and how it is held.

    Attributes:
        name: of the adapter for its architecture.
        weights: a name of `ipn models list`, a folder or a hub id.
        dtype: of the weights; with `quantize`, of what is computed with them.
        quantize: hold the linear layers in 8 or 4 bit (CUDA, package bitsandbytes).
        device_map: spread the layers over the GPUs of one process, as transformers does; of the
            machine, so that no checkpoint keeps it.
        lora: an adapter that may train, None for a wholly frozen LLM.
    """

    weights: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    quantize: Literal["none", "8bit", "4bit"] = Field(
        default="none", exclude_if=lambda value: value == "none"
    )
    device_map: Literal["auto", "balanced", "balanced_low_0", "sequential"] | None = Field(
        default=None, exclude=True
    )
    lora: LoraConfig | None = None


class Layout(Config):
    """The order of a turn and the number of tokens in each place.

    Attributes:
        order: where the pictures, the text and the look of `ask(image, question)` stand.
            Interleaved prompts order pictures and text themselves; the look follows them.
        rounds: request rounds a turn, 0 for strategies that need no request at `<img-q>`.
        request: request tokens R a round.
        request_init: words whose embeddings the R slots of `<img-q>` start as, R tokens in all;
            none for the mean word. An LLM goes on from a word such as "row" with what the question
            said after it, so that the hidden state tells it. Prompt tuning starts its tokens at
            words, too (Lester et al. 2021, arXiv 2104.08691, section 2.1).
        dynamic: dynamic tokens K a round.
        look_again: how often the model may look once more by itself while it answers.
        look_threshold: how sure it must be that it wants to; between 0 and 1.
    """

    order: tuple[Literal["images", "text", "look"], ...] = ("images", "text", "look")
    rounds: int = Field(default=1, ge=0, le=16)
    request: int = Field(default=1, ge=1, le=64)
    request_init: tuple[str, ...] = ()
    dynamic: int = Field(default=5, ge=0, le=1024)
    look_again: int = Field(default=0, ge=0, le=16)
    look_threshold: float = Field(default=0.5, gt=0, lt=1)

    @model_validator(mode="after")
    def _all_three(self) -> Self:
        if sorted(self.order) != ["images", "look", "text"]:
            raise ValueError("must name images, text and look, each once")
        if self.look_again and not self.rounds:
            raise ValueError("look_again needs rounds of at least 1: a look to follow")
        return self


class PromptConfig(Config):
    """What stands around the user's words and pictures.

    Attributes:
        system: the system message, None for the chat template's own.
        template: a Jinja chat template over messages of `role`, `content` (a text) and
            `image_first` (whether a picture begins it), which wins over the tokenizer's; None for
            the tokenizer's or the backbone's own.
        before_image: text right before every picture; special tokens in it count as such.
        after_image: text right after every picture, likewise.
        before_next_image: text right before a picture with nothing between it and the one before;
            None for `before_image`.
        images_first: whether all pictures stand before the rendered template, instead of where the
            user showed them in it.
        add_special_tokens: whether the tokenizer puts its own special tokens around the rendered
            template, for one that names none.
    """

    system: str | None = None
    template: str | None = Field(default=None, min_length=1)
    before_image: str = ""
    after_image: str = ""
    before_next_image: str | None = None
    images_first: bool = False
    add_special_tokens: bool = False


class IPNConfig(Config):
    """Everything that makes a model, resolved; saved as `config.json`.

    Attributes:
        strategy: the preset that the stages below started from.
        backbone: the LLM.
        encoder: the vision encoder (a perceiver on its own).
        perceive: a connector over the encoder that fills `<img>` slots; None for no static tokens.
        request, interact, inject: the other three stages. With `layout.rounds` 0, request and
            interact are None, and so is inject unless it works between the LLM's layers.
        layout: order and number of tokens.
        prompt: the system message.
    """

    strategy: str | None = None
    backbone: BackboneConfig
    encoder: ComponentConfig
    perceive: ComponentConfig | None = None
    request: ComponentConfig | None = None
    interact: ComponentConfig | None = None
    inject: ComponentConfig | None = None
    layout: Layout = Layout()
    prompt: PromptConfig = PromptConfig()

    @model_validator(mode="after")
    def _stages_fit(self) -> Self:
        if self.layout.rounds > 0 and None in (self.request, self.interact, self.inject):
            raise ValueError("with layout.rounds > 0, request, interact and inject are all needed")
        if self.layout.rounds == 0 and any((self.request, self.interact)):
            raise ValueError("request and interact need layout.rounds > 0")
        return self

    @classmethod
    def resolve(cls, values: Mapping[str, Any], registry: Registry, where: str) -> Self:
        """Fill in the strategy's preset under what the user wrote, then validate.

        Keys of the user's win; a component that the user names anew replaces the preset's whole.
        """
        merged = dict(values)
        name = merged.get("strategy")
        if name is not None:
            component = registry.get("strategy", str(name))
            preset = component.load()
            if reason := cls._no_preset(preset):
                raise PluginError(
                    f"strategy '{component.name}' of {component.plugin.label} is no preset: "
                    f"{reason}. It must map {', '.join(cls.model_fields)} to components or options."
                )
            for key, default in preset.items():
                merged[key] = lay_over(default, merged[key]) if key in merged else default
        return cls.parse(merged, where)

    @classmethod
    def _no_preset(cls, preset: object) -> str:
        """Say why something that a plugin registered is no preset; empty if it is one."""
        if not isinstance(preset, Mapping):
            return f"it is a {type(preset).__name__}"
        known = list(cls.model_fields)
        odd = next((key for key in preset if key not in known), None)
        return "" if odd is None else f"unknown key '{odd}'{near(str(odd), known)}"


def lay_over(default: Any, given: Any) -> Any:
    """Lay a mapping over another, key by key, unless it names another component.

    Args:
        default: what holds where `given` says nothing.
        given: wins, and replaces a component whole that it names anew.
    """
    if isinstance(default, str) and isinstance(given, Mapping):
        default = {"name": default}
    if not (isinstance(default, Mapping) and isinstance(given, Mapping)):
        return given
    if "name" in default and given.get("name", default["name"]) != default["name"]:
        return given
    merged = dict(default)
    for key, value in given.items():
        merged[key] = lay_over(merged[key], value) if key in merged else value
    return merged


def load_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML mapping.

    Args:
        path: the file.
        overrides: what to set in it, as `set_by_path` takes it.

    Raises:
        ConfigError: the file is missing, no YAML, or no mapping, or an override does not fit; the
            text has the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no such file: '{path}'. Give the path of a YAML config.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"'{path}' is not UTF-8 text ({error}).") from None
    except OSError as error:
        raise ConfigError(f"'{path}' cannot be read ({error.strerror}).") from None
    try:
        values = _read_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"'{path}' is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' must hold a mapping of keys to values.")
    for assignment in overrides:
        set_by_path(values, assignment)
    return values


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which the last would win unsaid."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice", key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, _Loader)


def set_by_path(values: dict[str, Any], assignment: str) -> None:
    """Apply one `key.key=value` from the command line; the value is read as YAML.

    Items of a list are named by index, or by their `name`: `stages.align.steps=10`.

    Raises:
        ConfigError: there is no '=', or a key leads through something that is no mapping.
    """
    path, found, text = assignment.partition("=")
    keys = path.split(".")
    if not found or not all(keys):
        raise ConfigError(f"'{assignment}' must look like key=value or key.key=value.")
    try:
        value = _read_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"'{assignment}': {' '.join(str(error).split())}.") from None
    inner: Any = values
    for index, key in enumerate(keys):
        here = ".".join(keys[:index]) or "the config"
        at: Any = key
        if isinstance(inner, list):
            at = _place(inner, key, path)
        elif not isinstance(inner, dict):
            raise ConfigError(f"'{path}': '{here}' holds {inner!r}, which has no keys.")
        if index == len(keys) - 1:
            inner[at] = value
            return
        step = inner[at] if isinstance(inner, list) else inner.setdefault(at, {})
        if isinstance(step, str):
            # A bare component name stands for a mapping: `interact=rvii interact.width=64`.
            step = inner[at] = {"name": step}
        inner = step


def _place(items: list[Any], key: str, path: str) -> int:
    """Find an item of a list by its index or, where the items have names, by its name."""
    named = [item.get("name") for item in items if isinstance(item, dict)]
    if key in named:
        return next(i for i, x in enumerate(items) if isinstance(x, dict) and x.get("name") == key)
    if key.isdecimal() and int(key) < len(items):
        return int(key)
    known = [n for n in named if isinstance(n, str)] or [f"0 to {len(items) - 1}"]
    raise ConfigError(f"'{path}': no '{key}' in the list: it has {', '.join(known)}.")
