"""What a model says and learns on a GPU is what it says and learns on the CPU.

The same tests run on the CPU against itself, so that they are known to work before a GPU is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from toys import prompt_of, toy_model

from ipn_core.cli import main
from ipn_core.model import IPN
from ipn_core.testing.tiny import tiny_backbone

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda]))
STRATEGIES = ("static", "rvii", "film", "zoom", "gated-xattn", "toy-both")

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Multiply in float32: convolutions on a GPU round their factors otherwise."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def pair(registry: Any, device: str) -> Callable[..., tuple[IPN, IPN]]:
    """The same model on the CPU and on the device."""

    def build(strategy: str, family: Any = "llama", **more: Any) -> tuple[IPN, IPN]:
        here = toy_model(registry, strategy, family, **more)
        backbone = tiny_backbone(family).to(device)
        there = toy_model(registry, strategy, family, backbone=backbone, **more)
        there.load_state_dict(here.state_dict())
        assert {p.device.type for p in there.parameters()} == {device}
        return here, there

    return build


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_answers_are_those_of_the_cpu(pair: Any, strategy: str) -> None:
    here, there = pair(strategy)
    prompts = [prompt_of(row, 1 + row % 2) for row in range(3)]
    expected, found = (m.generate(prompts, max_new_tokens=4) for m in (here, there))
    assert [a.ids for a in found] == [a.ids for a in expected]
    for mine, other in zip(found, expected, strict=True):
        assert (mine.attention is None) is (other.attention is None)
        if mine.attention is not None and other.attention is not None:
            torch.testing.assert_close(
                torch.as_tensor(mine.attention).cpu(),
                torch.as_tensor(other.attention),
                rtol=1e-4,
                atol=1e-5,
            )


@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_two_looks_of_another_family_answer_as_on_the_cpu(pair: Any, family: str) -> None:
    here, there = pair("rvii", family, rounds=2)
    prompts = [prompt_of(row, 1 + row) for row in range(2)]
    expected, found = (m.generate(prompts, max_new_tokens=4, num_beams=2) for m in (here, there))
    assert [a.ids for a in found] == [a.ids for a in expected]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_losses_and_gradients_are_those_of_the_cpu(pair: Any, strategy: str) -> None:
    taught = [prompt_of(row, 1 + row % 2, answer="ab") for row in range(2)]
    sides = []
    for model in pair(strategy):
        loss, count = model(taught)
        learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss / count, [*learned.values()], allow_unused=True)
        sides.append((loss.item(), dict(zip(learned, grads, strict=True))))
    (loss, expected), (mine, found) = sides
    assert mine == pytest.approx(loss, rel=1e-4)
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        assert (found[name] is None) is (gradient is None)
        if gradient is not None:
            assert float((found[name].cpu() - gradient).abs().max()) <= 1e-4 * largest, name


def test_half_precision_answers(pair: Any, device: str) -> None:
    _, model = pair("rvii")
    with torch.autocast(device, dtype=torch.bfloat16):
        answers = model.generate([prompt_of(0, 1)], max_new_tokens=4)
    assert 1 <= len(answers[0].ids) <= 4


@pytest.mark.usefixtures("own_table")
def test_attention_is_tuned_and_used(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", device, "--seconds", "0", "--shape", "5,64,8,32,2", "--masking", "packed"]
    assert main(["bench", "attention", *words, "--backward", "--tune", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    timed = {row["case"]["backend"] for row in found["rows"] if row["median"] is not None}
    assert {"eager", "sdpa"} <= timed
    assert {case["backend"] for case in found["auto"]} <= timed
    for row in found["rows"]:
        assert row["reasons"] or row["error"] < 5e-2
        assert ("peak_bytes" in row["more"]) is (device == "cuda" and row["median"] is not None)
