"""What `ipn compare` reads: arms, what they share, and what they are asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, PrivateAttr, field_validator, model_validator

from ipn_core.config import Config
from ipn_core.errors import ConfigError, near
from ipn_core.training.config import DataConfig, Factors, StageConfig

__all__ = [
    "ArmConfig",
    "CompareConfig",
    "CompareStage",
    "EvaluationConfig",
    "Otherwise",
    "SweepConfig",
]

CONTROL = "-constant"
"""What the name of the control adds to the reference's: equal parameters, but it cannot ask."""
_SHARED = {"backbone", "encoder", "prompt"}
"""Keys of a model that no arm has for itself."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{,99}", re.ASCII)
"""An arm's: it names folders, too."""
_Tokens: TypeAlias = Annotated[int, Field(ge=1, le=1024)]


class ArmConfig(Config):
    """One way to get from a picture to the LLM.

    Attributes:
        model: laid over what all arms share, such as `{strategy: film}`; backbone, encoder and
            prompt are not an arm's.
        width: the setting that decides how many parameters there are, such as `interact.width`; it
            is solved for, so that the arm trains as many as the reference.
        multiple: what the width is a multiple of, such as the number of heads.
        tokens: the setting that takes the number of static tokens, such as `perceive.latents`;
            None for an arm whose tokens are `layout.request` and `layout.dynamic`.
    """

    model: dict[str, Any]
    width: str
    multiple: int = Field(default=1, ge=1)
    tokens: str | None = None

    @field_validator("model")
    @classmethod
    def _is_its_own(cls, model: dict[str, Any]) -> dict[str, Any]:
        shared = sorted(_SHARED & model.keys())
        if shared:
            raise ValueError(
                f"{', '.join(shared)} must be equal for all arms: name it under the comparison's "
                "'model', and here only what makes the arm"
            )
        return model

    @field_validator("width", "tokens")
    @classmethod
    def _is_a_setting(cls, path: str | None) -> str | None:
        if path is not None and not all(path.split(".")):
            raise ValueError(
                f"it must name a setting of the model such as interact.width, got '{path}'"
            )
        return path


class Otherwise(Config):
    """What arms do in a stage of whose objectives they can serve none.

    Attributes:
        objectives: weight by name; an arm that can serve none of these either leaves the stage
            out, and the report says so.
        train: which parameters; those of the stage if there are none here.
    """

    objectives: Factors = Field(min_length=1)
    train: tuple[str, ...] = ()


class CompareStage(StageConfig):
    """A stage of training that every arm goes through as far as its inputs allow.

    Of `objectives`, an arm trains those that its model can serve; of `train`, what it has.

    Attributes:
        otherwise: for arms that can serve none of `objectives`: one way or several, of which an arm
            takes the first that it can; without any it leaves the stage out.
    """

    otherwise: tuple[Otherwise, ...] = ()

    @field_validator("otherwise", mode="before")
    @classmethod
    def _one_or_several(cls, given: object) -> object:
        return (given,) if isinstance(given, Mapping | Otherwise) else given


class EvaluationConfig(Config):
    """Questions that every trained arm answers.

    Attributes:
        task: a name that `ipn plugins` lists, or a JSONL file.
        split: of the task; None for its test split.
        options: of the task.
        limit: ask only so many; None for all.
        per_picture: ask only so many about the same pictures, so that `limit` is of more pictures;
            which ones, `evaluation.choosing` says; None for all.
        shuffled: whether arms that ask are also asked with the requests of other questions.
    """

    task: str
    split: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    limit: int | None = Field(default=None, ge=1)
    per_picture: int | None = Field(default=None, ge=1)
    shuffled: bool = False


class SweepConfig(Config):
    """Further numbers of dynamic tokens for some arms.

    Attributes:
        arms: their names; the control's is the reference's and "-constant".
        dynamic: numbers of tokens K.
        seeds: how many seeds.
    """

    arms: tuple[str, ...] = Field(min_length=1)
    dynamic: tuple[_Tokens, ...] = Field(min_length=1)
    seeds: int = Field(default=1, ge=1)


class CompareConfig(Config):
    """A whole comparison.

    Attributes:
        model: what all arms share: backbone, encoder, prompt, and the layout's request tokens.
        reference: the arm that asks; its control, its budget and its parameters are taken from it.
        dynamic: dynamic tokens K of the main comparison.
        arms: by name.
        within: how far the trained parameters of an arm may be from the reference's, as a share.
        data: what all arms learn from, in the same order.
        stages: one after the other.
        evaluate: what the trained arms are asked.
        seeds: how many seeds of the main comparison: 0, 1, and so on.
        sweep: further numbers of tokens; None for none.
        batch_size: questions at once in evaluation.
        precision: of training.
        save_every: steps between saved states.
    """

    model: dict[str, Any]
    reference: str = "rvii"
    dynamic: _Tokens = 4
    arms: dict[str, ArmConfig] = Field(min_length=1)
    within: float = Field(default=0.05, gt=0, lt=1)
    data: tuple[DataConfig, ...] = Field(min_length=1)
    stages: tuple[CompareStage, ...] = Field(min_length=1)
    evaluate: tuple[EvaluationConfig, ...] = Field(min_length=1)
    seeds: int = Field(default=3, ge=1)
    sweep: SweepConfig | None = None
    batch_size: int = Field(default=32, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    save_every: int = Field(default=25, ge=1)

    _others: dict[str, ArmConfig] = PrivateAttr(default_factory=dict)

    @property
    def others(self) -> dict[str, ArmConfig]:
        """Arms that `only` has left out; what a stage names may be theirs."""
        return self._others

    @property
    def control(self) -> str:
        """The name of the control."""
        return self.reference + CONTROL

    def only(self, names: Sequence[str]) -> CompareConfig:
        """Return the same comparison of some arms; the reference and its control stay.

        Raises:
            ConfigError: a name is no arm's.
        """
        for name in names:
            if name not in (*self.arms, self.control):
                known = ", ".join(self.arms)
                raise ConfigError(f"no arm '{name}': there are {known}{near(name, self.arms)}.")
        arms = {k: arm for k, arm in self.arms.items() if k in names or k == self.reference}
        sweep = self.sweep
        if sweep is not None:
            kept = tuple(name for name in sweep.arms if name in (*arms, self.control))
            sweep = sweep.model_copy(update={"arms": kept}) if kept else None
        part = self.model_copy(update={"arms": arms, "sweep": sweep})
        left = {k: arm for k, arm in self.arms.items() if k not in arms}
        part._others = {**self._others, **left}
        return part

    @model_validator(mode="after")
    def _names_fit(self) -> Self:
        if self.reference not in self.arms:
            raise ValueError(
                f"reference '{self.reference}' is none of arms: {', '.join(self.arms)}"
            )
        for name in self.arms:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"arm '{name}' must be named by letters, digits, '.', '_' and '-', 100 at "
                    "most: its jobs lie in folders of that name"
                )
        if self.control in self.arms:
            raise ValueError(
                f"arm '{self.control}' is made from the reference; take it out of arms"
            )
        known = [*self.arms, self.control]
        strange = [a for a in (self.sweep.arms if self.sweep else ()) if a not in known]
        if strange:
            raise ValueError(
                f"sweep names {', '.join(strange)}, but the arms are {', '.join(known)}"
            )
        for key in ("arms", "dynamic"):
            if self.sweep and (twice := _twice(getattr(self.sweep, key))) is not None:
                raise ValueError(f"sweep.{key} holds {twice} twice")
        if any(entry.stream for entry in self.data):
            raise ValueError("a comparison reads all its data beforehand: take 'stream' out")
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError("stages must have different names")
        if not any(e.shuffled for e in self.evaluate):
            raise ValueError(
                "evaluate must hold an entry with shuffled: true, the control of asking"
            )
        return self


def _twice(values: Sequence[object]) -> object | None:
    return next((value for value in values if values.count(value) > 1), None)
