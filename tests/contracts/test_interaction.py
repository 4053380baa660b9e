"""Every clause of a contract bites: a component that breaks it is told which, and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from clauses import check, clauses, contract
from torch import nn

from ipn_core.attention import attend
from ipn_core.config import Config
from ipn_core.hooks import hookimpl
from ipn_core.plugins import add_plugin, get_registry
from ipn_core.stages import VisualMessage
from ipn_core.testing.contracts import ContractError, InteractionContract
from ipn_core.testing.interactions import TinyInteractionConfig, TinyLook


class Good(TinyLook):
    """Keeps the whole contract, through `attend`."""

    class Config(TinyInteractionConfig):
        backend: str = "auto"

    def forward(self, request: Any, features: Any) -> VisualMessage:
        patches, mask = features.padded()
        asked = self.queries + self.ask(request.values.mean(1, keepdim=True))
        heads = [x.unsqueeze(2) for x in (asked, self.key(patches), self.value(patches))]
        message = attend(*heads, mask=mask, backend=self.config.backend).squeeze(2)
        if not request.return_map:
            return VisualMessage(message)
        return VisualMessage(message, attend(*heads, mask=mask, return_map=True)[1].squeeze(1))


class OpenConfig(Config):
    model_config = {"extra": "allow"}  # noqa: RUF012 as a careless author writes it
    width: int = 16


class WrongShape(Good):
    def forward(self, request: Any, features: Any) -> VisualMessage:
        return VisualMessage(super().forward(request, features).values[:, 1:])


class WrongDtype(Good):
    def forward(self, request: Any, features: Any) -> VisualMessage:
        return VisualMessage(super().forward(request, features).values.float())


class Leaks(Good):
    def forward(self, request: Any, features: Any) -> VisualMessage:
        mean = self.value(features.padded()[0]).mean(1, keepdim=True)
        return VisualMessage(super().forward(request, features).values + mean)


class Trusts(Good):
    """Takes for granted what padding holds."""

    def forward(self, request: Any, features: Any) -> VisualMessage:
        patches, mask = features.padded()
        mean = patches.sum(1, keepdim=True) / mask.sum(1)[:, None, None]
        return VisualMessage(super().forward(request, features).values + self.value(mean))


class Splits(Good):
    """Takes for granted that no patch is another sample's."""

    def forward(self, request: Any, features: Any) -> VisualMessage:
        parts = features.values[-sum(features.lengths) :].split(features.lengths)
        mean = torch.stack([self.value(part).mean(0, keepdim=True) for part in parts])
        return VisualMessage(super().forward(request, features).values + mean)


class Mixes(Good):
    def forward(self, request: Any, features: Any) -> VisualMessage:
        values = super().forward(request, features).values
        return VisualMessage(values + values[:1])


class Deaf(Good):
    def forward(self, request: Any, features: Any) -> VisualMessage:
        patches, mask = features.padded()
        mean = (self.value(patches) * mask.unsqueeze(-1)).sum(1, keepdim=True)
        return VisualMessage(self.queries + mean)


class Unused(Good):
    def __init__(self, config: Any, dims: Any) -> None:
        super().__init__(config, dims)
        self.spare = nn.Linear(2, 2)


class Noisy(Good):
    def forward(self, request: Any, features: Any) -> VisualMessage:
        values = super().forward(request, features).values
        return VisualMessage(values + torch.randn_like(values))


class Forgets(Good):
    def __init__(self, config: Any, dims: Any) -> None:
        super().__init__(config, dims)
        self.offset = torch.randn(config.width)

    def forward(self, request: Any, features: Any) -> VisualMessage:
        return VisualMessage(super().forward(request, features).values + self.offset)


class OwnWay(Good):
    def forward(self, request: Any, features: Any) -> VisualMessage:
        scale = 2.0 if self.config.backend == "sdpa" else 1.0
        return VisualMessage(scale * super().forward(request, features).values)


class Compiled(Good):
    def forward(self, request: Any, features: Any) -> VisualMessage:
        values = super().forward(request, features).values
        return VisualMessage(values + 1 if torch.compiler.is_compiling() else values)


class NoMap(Good):
    def forward(self, request: Any, features: Any) -> VisualMessage:
        return VisualMessage(super().forward(request, features).values)


class OpenKeys(Good):
    Config = OpenConfig


BREAKS = {
    WrongShape: ("test_shape_and_dtype", "shape and dtype", r"\(4, 2, 16\), expected"),
    WrongDtype: ("test_shape_and_dtype", "shape and dtype", r"torch.float32, not torch.bfloat16"),
    Leaks: ("test_padding_cannot_leak", "padding cannot leak", "differ by"),
    Trusts: ("test_padding_cannot_leak", "padding cannot leak", "differ by"),
    Splits: ("test_padding_cannot_leak", "padding cannot leak", "differ by"),
    Mixes: ("test_order_of_the_batch", "order of the batch", "differ by"),
    Deaf: ("test_the_request_decides", "the request decides", "both messages are equal"),
    Unused: ("test_every_parameter_learns", "every parameter learns", "'spare.weight' gets no"),
    Noisy: ("test_eval_mode_is_deterministic", "deterministic in eval mode", "two calls"),
    Forgets: ("test_state_dict_round_trip", "state dict round trip", "differ by"),
    OwnWay: ("test_attention_backends_agree", "attention backends agree", "differ by"),
    Compiled: ("test_it_compiles", "it compiles", "differ by"),
    NoMap: ("test_its_map", "its map", "promises a map, and none came"),
    OpenKeys: ("test_config_is_closed", "the config is closed", "'no_such_option' was taken"),
}


# The good one lives in this test module, which no fresh process can import.
@pytest.mark.parametrize(
    "name", [n for n in clauses(InteractionContract) if n != "test_imports_are_cheap"]
)
def test_a_good_interaction_keeps_every_clause(name: str) -> None:
    check(contract(InteractionContract, Good), name)


@pytest.mark.parametrize("target", BREAKS, ids=lambda t: t.__name__)
def test_a_broken_interaction_is_told_the_clause_and_the_mend(target: type) -> None:
    name, title, seen = BREAKS[target]
    with pytest.raises(ContractError, match=rf"(?s)clause '{title}'.*{seen}.*What to do: "):
        check(contract(InteractionContract, target), name)


@pytest.mark.slow
def test_a_plugin_that_imports_torch_at_its_top_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavyplugin.py").write_text("import torch\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    heavy = type("Heavy", (Good,), {"__module__": "heavyplugin"})
    with pytest.raises(
        ContractError, match=r"(?s)imports are cheap.*'import heavyplugin' imports torch"
    ):
        contract(InteractionContract, heavy).test_imports_are_cheap()


def test_a_plugin_that_imports_xformers_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "xformers.py").touch()
    (tmp_path / "eagerplugin").mkdir()
    (tmp_path / "eagerplugin" / "__init__.py").touch()
    (tmp_path / "eagerplugin" / "film.py").write_text("import xformers\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    eager = type("Eager", (Good,), {"__module__": "eagerplugin.film"})
    seen = r"(?s)imports are cheap.*'import eagerplugin.film' imports xformers.*What to do: "
    with pytest.raises(ContractError, match=seen):
        contract(InteractionContract, eager).test_imports_are_cheap()


def test_a_faulty_backend_of_somebody_else_breaks_no_contract() -> None:
    class Gone:
        @hookimpl
        def register(self, registry: Any) -> None:
            registry.attention("gone", "no_such_module:Backend")

    add_plugin(get_registry(), "gone", Gone())
    check(contract(InteractionContract, Good), "test_attention_backends_agree")


def test_every_clause_has_a_plugin_that_breaks_it() -> None:
    broken = {name for name, *_ in BREAKS.values()} | {"test_imports_are_cheap"}
    assert broken == set(clauses(InteractionContract))


def test_an_unregistered_name_says_what_is_installed() -> None:
    one: Any = type("Contract", (InteractionContract,), {"name": "rvi"})()
    with pytest.raises(ContractError, match=re.escape("did you mean 'rvii'?")):
        one.test_config_is_closed()
