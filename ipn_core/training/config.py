"""What `ipn train` reads: the model, the data, and the stages with their objectives."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from ipn_core.config import Config

__all__ = ["DataConfig", "Factors", "StageConfig", "TrainConfig"]

Factors: TypeAlias = dict[str, Annotated[float, Field(gt=0)]]
"""A factor by name."""
_Decay: TypeAlias = Annotated[float, Field(ge=0, lt=1)]

_PREFIXES = 2.0
_EPS = 1e-8


def _unset(value: Any) -> bool:
    """Leave an option out of what is written and compared where it changes nothing."""
    return not value


def _usual_prefixes(value: float) -> bool:
    return value == _PREFIXES


def _usual_eps(value: float) -> bool:
    return value == _EPS


class DataConfig(Config):
    """Examples of one task or file.

    Attributes:
        task: a name that `ipn plugins` lists, or a JSONL file.
        split: of the task; None for its `train`, or all of a file.
        options: of the task, such as `{scenes: 2000}`.
        share: how many of a batch's groups come from it, relative to the others.
        limit: use only the first examples; None for all.
        stream: read so many examples at a time instead of all beforehand, 0 for all; for files.
    """

    task: str
    split: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    share: float = Field(default=1.0, gt=0)
    limit: int | None = Field(default=None, ge=1)
    stream: int = Field(default=0, ge=0, exclude_if=_unset)

    @model_validator(mode="after")
    def _stream_is_whole(self) -> Self:
        if self.stream and self.limit is not None:
            raise ValueError("a stream is read in any order of its files: give it no limit")
        return self


class StageConfig(Config):
    """One stage of training, such as `align` or `instruct`.

    Attributes:
        name: for logs.
        objectives: weight by name, such as `{answer-embedding: 1.0}`.
        train: which parameters, by the start of their name (`interact`, `interact.guide`,
            `inject`, `perceive`, `request`, `slots.request`, `slots.dynamic`, `slots.image`,
            `look_head`, `backbone.lora`) or by a glob (`interact.*.bias`).
        freeze: which of these stay as they are, named in the same way.
        rates: what `lr` is multiplied with for some of them, by the same names, such as
            `{backbone.lora: 0.1}`; of several that fit the last counts.
        steps: optimizer steps.
        group_by: whether the questions of a group share their picture or their words, or those of
            a whole batch have about the same length.
        groups: groups a batch.
        per_group: examples a group, at most.
        accumulate: batches a step.
        lr: peak learning rate of AdamW.
        warmup: steps up to it; a cosine leads down from it.
        floor: where the cosine ends, as a fraction of `lr`.
        weight_decay: of matrices.
        betas: of AdamW.
        eps: of AdamW; gradients below it make small steps, whatever their history.
        clip: largest norm of the gradient.
        validate_every: steps between looks at the validation examples, 0 for only at the end.
    """

    name: str
    objectives: Factors = Field(default={"language": 1.0}, min_length=1)
    train: tuple[str, ...] = Field(min_length=1)
    freeze: tuple[str, ...] = Field(default=(), exclude_if=_unset)
    rates: Factors = Field(default={}, exclude_if=_unset)
    steps: int = Field(ge=1)
    group_by: Literal["picture", "question", "length"] = "picture"
    groups: int = Field(default=8, ge=1)
    per_group: int = Field(default=4, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    warmup: int = Field(default=50, ge=0)
    floor: float = Field(default=0.0, ge=0, le=1)
    weight_decay: float = Field(default=0.01, ge=0)
    betas: tuple[_Decay, _Decay] = (0.9, 0.98)
    eps: float = Field(default=_EPS, gt=0, exclude_if=_usual_eps)
    clip: float = Field(default=1.0, gt=0)
    validate_every: int = Field(default=0, ge=0)


class TrainConfig(Config):
    """A whole training.

    Attributes:
        model: as in a checkpoint's config; `strategy` fills in a preset.
        base: a model, such as `llava:ID`, whose LLM, vision encoder and prompt format are taken
            where `model` does not name its own; None for none.
        start_from: a checkpoint whose weights to begin with, None for new ones.
        anew: which weights, by the start of their name as in `train`, begin new all the same.
        data: what to learn from.
        validate_on: what to look at while training; never a test split.
        stages: one after the other.
        seed: of weights, order and noise.
        precision: fp32, or autocast to bf16 or fp16.
        checkpointing: keep of each LLM layer only its inputs, and compute the rest again for the
            gradient: less memory, more time, the same weights.
        prefix_cache: GiB of memory in which each process keeps the LLM's keys and values of
            questions that come again, where nothing before `<img-q>` trains; 0 for none.
        workers: processes that decode the pictures of streams; 0 for the training's own.
        save_every: steps between saved states, from which `--resume` goes on.
        keep: how many saved states to have, the last ones.
        trackers: which of accelerate's trackers follow the training, such as `[tensorboard]`.
        log_every: steps between lines in `metrics.jsonl`.
        save_dtype: of the final weights.
    """

    model: dict[str, Any]
    base: str | None = None
    start_from: str | None = None
    anew: tuple[str, ...] = ()
    data: tuple[DataConfig, ...] = Field(min_length=1)
    validate_on: tuple[DataConfig, ...] = ()
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    checkpointing: bool = Field(default=False, exclude_if=_unset)
    prefix_cache: float = Field(default=_PREFIXES, ge=0, exclude_if=_usual_prefixes)
    workers: int = Field(default=0, ge=0, exclude_if=_unset)
    save_every: int = Field(default=200, ge=1)
    keep: int = Field(default=1, ge=1)
    trackers: tuple[str, ...] = ()
    log_every: int = Field(default=10, ge=1)
    save_dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _validation_is_no_stream(self) -> Self:
        if any(entry.stream for entry in self.validate_on):
            raise ValueError("what is validated on cannot be a stream")
        return self

    @model_validator(mode="after")
    def _anew_instead_of_something(self) -> Self:
        if self.anew and self.start_from is None:
            raise ValueError("anew needs start_from: without it all weights begin new")
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stages must have different names")
        return self

    @model_validator(mode="before")
    @classmethod
    def _model_is_given(cls, values: Any) -> Any:
        if isinstance(values, dict) and not isinstance(values.get("model", {}), dict):
            raise ValueError("'model' must be a mapping")
        return values
