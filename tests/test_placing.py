"""Where models run, and in which number format."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from toys import picture, toy_model

from ipn_core.errors import UserError
from ipn_core.placing import device_of, dtype_on, place
from ipn_core.plugins import Registry


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def pretend(count: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
        monkeypatch.setattr("torch.cuda.device_count", lambda: count)
        monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
        supported = lambda including_emulation: count > 2  # noqa: E731
        monkeypatch.setattr("torch.cuda.is_bf16_supported", supported)

    return pretend


def test_the_gpu_is_taken_where_there_is_one(gpus: Callable[[int], None]) -> None:
    gpus(0)
    assert device_of() == device_of("cpu") == torch.device("cpu")
    gpus(2)
    assert device_of() == device_of("cuda") == torch.device("cuda", 1)
    assert device_of("cuda:0") == torch.device("cuda", 0)
    assert device_of("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("count", "name", "allowed"),
    [
        (0, "cuda", "cpu here"),
        (0, "cuda:0", "cpu here"),
        (0, "gpu", "cpu here"),
        (0, "meta", "cpu here"),
        (0, "cpu:1", "cpu here"),
        (2, "cuda:2", "cpu or cuda or cuda:0 or cuda:1 here"),
    ],
)
def test_a_device_that_is_not_here_is_refused(
    gpus: Callable[[int], None], count: int, name: str, allowed: str
) -> None:
    gpus(count)
    with pytest.raises(UserError) as refused:
        device_of(name)
    assert str(refused.value) == (f"'--device' must be {allowed}, got '{name}'. See 'ipn doctor'.")


def test_bfloat16_is_usual_on_a_gpu_that_has_it(gpus: Callable[[int], None]) -> None:
    gpus(3)
    assert dtype_on(torch.device("cuda")) is torch.bfloat16
    assert dtype_on(torch.device("cuda"), "float32") is torch.float32
    assert dtype_on(torch.device("cpu")) is None
    gpus(2)
    assert dtype_on(torch.device("cuda")) is None
    with pytest.raises(UserError, match="must be one of float32, bfloat16, float16, got 'int8'"):
        dtype_on(torch.device("cpu"), "int8")


def test_a_placed_model_answers_in_its_format(registry: Registry) -> None:
    model = toy_model(registry)
    held = place(model, "cpu", "bfloat16")
    assert held is model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.ask(picture(), "Is it?", max_new_tokens=2).ids


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_model_answers_in_bfloat16(registry: Registry) -> None:
    model = place(toy_model(registry))
    assert model.backbone.device.type == "cuda"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.ask(picture(), "Is it?", max_new_tokens=2).ids
