"""The clock: stages add up to the whole, and a GPU is asked once, when the seconds are wanted."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from toys import picture, toy_model

from ipn_core.clock import STAGES, Clock
from ipn_core.generate import decode
from ipn_core.plugins import Registry
from ipn_core.prompt import Prompt


class Gpu:
    """A queue of work that is done when somebody waits for it; `made` has its events."""

    def __init__(self) -> None:
        self.queued = self.done = 0.0
        self.waited = 0
        self.made: list[Event] = []

    def work(self, milliseconds: float) -> None:
        self.queued += milliseconds

    def event(self, enable_timing: bool = False) -> Event:
        assert enable_timing
        self.made.append(Event(self))
        return self.made[-1]


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, -1.0

    def record(self, stream: Any) -> None:
        assert stream == "the stream of cuda:0"
        assert self.at < 0
        self.at = self.gpu.queued

    def synchronize(self) -> None:
        self.gpu.waited += 1
        self.gpu.done = max(self.gpu.done, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert max(self.at, end.at) <= self.gpu.done, "it is not done yet"
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    def refuse(*_: Any) -> None:
        raise AssertionError("the whole device is waited for")

    gpu = Gpu()
    monkeypatch.setattr("torch.cuda.Event", gpu.event)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr("torch.cuda.synchronize", refuse)
    return gpu


def test_laps_on_a_gpu_wait_for_nothing_and_add_up(gpu: Gpu) -> None:
    clock = Clock(torch.device("cuda", 0))
    lm = torch.nn.Linear(2, 2)
    for stage, milliseconds in (("perceive", 30), ("prefill", 20), ("request", 1), ("interact", 5)):
        gpu.work(milliseconds)
        clock.lap(stage)
    with clock.decoding(lm):
        for _ in range(3):
            gpu.work(100)
            lm(torch.zeros(2))
    assert gpu.waited == 0
    assert len(gpu.made) == 7
    seconds = clock.report()
    assert seconds.pop("total") == pytest.approx(0.356)
    assert seconds.pop("first_token") == pytest.approx(0.156)
    expected = {"perceive": 0.03, "prefill": 0.12, "request": 0.001, "interact": 0.005}
    assert seconds == pytest.approx({**dict.fromkeys(STAGES, 0.0), **expected, "decode": 0.2})
    assert gpu.waited > 0


def test_a_clock_on_a_gpu_may_be_read_and_go_on(gpu: Gpu) -> None:
    clock = Clock(torch.device("cuda", 0))
    assert (clock.seconds, clock.first_token) == (dict.fromkeys(STAGES, 0.0), 0.0)
    gpu.work(10)
    clock.lap("decode")
    assert clock.seconds["decode"] == pytest.approx(0.01)
    gpu.work(5)
    clock.lap("decode")
    assert clock.seconds["decode"] == pytest.approx(0.015)
    assert clock.first_token == 0.0


def test_the_first_token_is_the_first_blocks(gpu: Gpu) -> None:
    clock, lm = Clock(torch.device("cuda", 0)), torch.nn.Linear(2, 2)
    for _ in range(2):
        with clock.decoding(lm):
            gpu.work(10)
            lm(torch.zeros(2))
    assert clock.first_token == pytest.approx(0.01)


def test_laps_on_a_cpu_add_up_to_the_whole() -> None:
    start = time.perf_counter()
    clock, lm = Clock(torch.device("cpu")), torch.nn.Linear(2, 2)
    time.sleep(0.002)
    clock.lap("perceive")
    with clock.decoding(lm):
        lm(torch.zeros(2))
        time.sleep(0.002)
    found = clock.report()
    assert found["total"] <= time.perf_counter() - start
    assert sum(found[stage] for stage in STAGES) == pytest.approx(found["total"])
    assert found["perceive"] >= 0.002
    assert found["decode"] >= 0.002
    assert found["first_token"] == pytest.approx(found["perceive"] + found["prefill"])


@pytest.mark.gpu
def test_stages_on_a_gpu_are_no_longer_than_the_call(registry: Registry) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = toy_model(registry, "rvii").to("cuda")
    prompt = Prompt.user(picture(), "What is it?")
    for _ in range(2):  # what is made once is not counted
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            clock = Clock(model.backbone.device)
            percept = model.perceive([[picture()]], [prompt.question])
            clock.lap("perceive")
            decode(model, [model.planner.plan(prompt)], percept, {"max_new_tokens": 8}, clock)
        found = clock.report()
        took = time.perf_counter() - start
    assert 0.5 * took < found["total"] <= 1.01 * took
    assert sum(found[stage] for stage in STAGES) == pytest.approx(found["total"], rel=1e-2)
    assert 0 < found["first_token"] < found["total"]
