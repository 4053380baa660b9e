"""The next batch is on its way to the device while the one before it is computed there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lessons import lesson, metrics, stage, training, weights

from ipn_core.features import VisualFeatures
from ipn_core.training.ahead import Ahead
from ipn_core.training.data import Batch
from ipn_core.training.loop import StageRun

PATCHES = 300
"""Of 32 numbers each, so that they are no small transfer."""


def batch(first: float = 0.0) -> Batch:
    values = [torch.randn(PATCHES, 32) + first for _ in range(2)]
    features = VisualFeatures.pack(values, [(15, 20)] * 2, [0, 1], 2, torch.randn(2, 32))
    return Batch([], features)


@pytest.mark.usefixtures("own_training")
def test_each_batch_is_sent_while_the_one_before_it_is_computed(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[tuple[str, int]] = []
    numbers: dict[int, int] = {}
    held: list[Batch] = []
    send, take, losses = Ahead.send, Ahead.take, StageRun._losses

    def number(one: Batch) -> int:
        held.append(one)  # so that no other batch can come to have its id
        return numbers.setdefault(id(one), len(numbers))

    def sent(self: Ahead, one: Batch) -> None:
        happened.append(("sent", number(one)))
        send(self, one)

    def taken(self: Ahead, one: Batch) -> Batch:
        happened.append(("taken", number(one)))
        return take(self, one)

    def computed(self: StageRun, *arguments: Any) -> Any:
        happened.append(("computed", -1))
        return losses(self, *arguments)

    monkeypatch.setattr(Ahead, "send", sent)
    monkeypatch.setattr(Ahead, "take", taken)
    monkeypatch.setattr(StageRun, "_losses", computed)
    values = lesson(llm, stage("s", "language", steps=2, accumulate=2))
    training(values, tmp_path / "run").run()
    kinds = [kind for kind, _ in happened]
    assert kinds[-11:] == [
        *("taken", "computed", "sent"),  # the first part of the first step, and the second goes
        *("taken", "computed", "sent"),
        *("taken", "computed", "sent"),
        *("taken", "computed"),  # nothing comes after the last part of the last step
    ]
    order = [one for kind, one in happened[-11:] if kind == "taken"]
    assert [one for kind, one in happened[-11:] if kind == "sent"] == order[1:]
    assert len(set(order)) == 4


@pytest.mark.slow
@pytest.mark.usefixtures("own_training")
def test_weights_are_those_of_a_training_that_sends_nothing_ahead(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = lesson(llm, stage("s", "language", steps=2, accumulate=2))
    training(values, tmp_path / "ahead").run()
    monkeypatch.setattr(Ahead, "send", lambda self, one: None)
    training(values, tmp_path / "late").run()
    assert weights(tmp_path / "ahead") == weights(tmp_path / "late")
    assert metrics(tmp_path / "ahead") == metrics(tmp_path / "late")


def test_on_a_cpu_a_batch_stays_where_it_is() -> None:
    ahead, one = Ahead(torch.device("cpu")), batch()
    ahead.send(one)
    assert ahead.take(one).features is one.features
    assert ahead.take(one).features is one.features


class Gpu:
    """What a GPU is told, in order, each with the stream that it goes into."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.stream = "computing"
        patch.setattr("torch.cuda.Stream", lambda device: "copying")
        patch.setattr("torch.cuda.stream", self._inside)
        patch.setattr("torch.cuda.current_stream", lambda device: self)
        patch.setattr(torch.Tensor, "pin_memory", self._spy("pin_memory"))
        patch.setattr(torch.Tensor, "record_stream", self._spy("record_stream"))
        plain = torch.Tensor.to

        def to(tensor: torch.Tensor, **how: Any) -> torch.Tensor:
            device = how.get("device")
            if device is None or device.type != "cuda":
                return plain(tensor, **how)
            assert how.pop("non_blocking")
            self.told.append(f"to in {self.stream}")
            return tensor.clone()

        patch.setattr(torch.Tensor, "to", to)

    @contextmanager
    def _inside(self, stream: str) -> Iterator[None]:
        self.stream = stream
        yield
        self.stream = "computing"

    def _spy(self, name: str) -> Any:
        def told(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
            self.told.append(f"{name} in {self.stream}")
            return tensor

        return told

    def wait_stream(self, other: str) -> None:
        self.told.append(f"{self.stream} waits for {other}")


def test_on_a_gpu_it_goes_from_pinned_memory_beside_what_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = batch(), batch(5.0)
    with monkeypatch.context() as patch:
        gpu = Gpu(patch)
        ahead = Ahead(torch.device("cuda", 0))
        ahead.send(one)
        # The patches are pinned; the global tokens are too few to be.
        sent = ["pin_memory in copying", "to in copying", "to in copying"]
        assert gpu.told == sent
        now = ahead.take(other)  # such as one of a validation in between
        assert gpu.told[3:] == [line.replace("copying", "computing") for line in sent]
        there = ahead.take(one)
        assert gpu.told[6:] == ["computing waits for copying"] + ["record_stream in computing"] * 2
    for found, expected in ((now, other), (there, one)):
        assert found.features is not expected.features
        assert torch.equal(found.features.values, expected.features.values)


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for_and_gets_what_was_sent() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda", torch.cuda.current_device())
    ahead, batches = Ahead(device), [batch(float(i)) for i in range(8)]
    ahead.send(batches[0])
    ahead.take(batches[0])  # what is made once
    big = torch.randn(4096, 4096, device=device)
    sums = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        ahead.send(batches[0])
        for one, after in zip(batches, [*batches[1:], None], strict=True):
            there = ahead.take(one).features
            big = (big @ big).clamp(-1, 1)  # work that the next batch goes beside
            sums.append(there.values.sum(0) + big.sum() * 0)
            if after is not None:
                ahead.send(after)
            del there  # its memory is the next one's
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for found, one in zip(sums, batches, strict=True):
        torch.testing.assert_close(found.cpu(), one.features.values.sum(0))
