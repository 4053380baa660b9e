"""Between the prompt and the first token the engine never waits for the device.

On the meta device tensors have no data, so that reading any of it raises: `item`, `tolist`, `bool`,
`nonzero`; and transfers that would wait are seen. On a GPU, torch itself is told to refuse what
synchronises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import picture, toy_model
from waiting import waiting_transfers

from ipn_core import shared_cache, sharing
from ipn_core.clock import Clock
from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.prompt import Prompt
from ipn_core.stages import Percept
from ipn_core.transfer import SMALL, send, tensor_on

TEXTS = ("What is it?", "And where, if anywhere, is the dog?", "Who?")
GRIDS = [(3, 3), (2, 4), (1, 1)]


def perceived(model: IPN, texts: tuple[str, ...], grids: list[tuple[int, int]]) -> Percept:
    """Pictures of these grids, one a prompt, with a global token each."""
    values = [torch.randn(h * w, model.encoder.width) for h, w in grids]
    tokens = torch.randn(len(grids), model.encoder.width)
    features = VisualFeatures.pack(values, grids, range(len(grids)), len(grids), tokens)
    return model.perceive([], list(texts), features.to(model.backbone.device))


def prefix_of(
    model: IPN, texts: tuple[str, ...], grids: list[tuple[int, int]], clock: Clock | None = None
) -> Any:
    """Run prompts with a picture each up to their last segment, on the model's device."""
    plans = [model.planner.plan(Prompt.user(picture(), text)) for text in texts]
    with torch.no_grad():
        percept = perceived(model, texts, grids)
        return model.engine.prefix(plans, percept, clock=clock, return_map=True)


def built(registry: Registry, strategy: str, guided: bool = False, **more: Any) -> IPN:
    if guided:
        guide = {"width": 8, "tallies": 2}
        interact = {"name": "rvii", "width": 16, "depth": 2, "heads": 2, "guide": guide}
        more["interact"] = interact
    return toy_model(registry, strategy, **more)


CASES = [
    ("tiny-look", {}),
    ("toy-both", {"rounds": 2}),
    ("toy-both", {"inject": "prefix-kv"}),
    ("toy-both", {"inject": "layers"}),
    ("rvii", {}),
    ("rvii", {"guided": True}),
    ("film", {}),
    ("lmeye", {"interact": {"width": 16, "depth": 1, "heads": 2}}),
    ("static", {}),
    ("resampler", {}),
    ("gated-xattn", {"inject": {"every": 1, "heads": 2}}),
]
ALIKE = pytest.mark.parametrize("grids", [GRIDS[:1] * 3, GRIDS], ids=["alike", "ragged"])


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what is not ours to change on the meta device."""
    # transformers asks a padding mask whether it is all True; that is its own.
    monkeypatch.setattr(
        "transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False
    )
    # No such thing on this device.
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)


@pytest.mark.usefixtures("no_data")
@ALIKE
@pytest.mark.parametrize(("strategy", "more"), CASES, ids=str)
def test_no_data_of_the_device_is_read_and_no_transfer_waits(
    registry: Registry, strategy: str, more: dict[str, Any], grids: list[tuple[int, int]]
) -> None:
    model = built(registry, strategy, **more).to("meta")
    texts = TEXTS if len(set(grids)) > 1 else (TEXTS[0],) * 3
    with waiting_transfers() as waiting:
        found = prefix_of(model, texts, grids)
    assert not waiting
    assert found.embeds.device.type == "meta"
    assert found.state.length > 0 or "rounds" in more or not found.state.looks
    assert len(found.lengths) == 3


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("texts", [TEXTS, (TEXTS[0],) * 3], ids=["ragged", "alike"])
def test_nor_where_rows_share_what_lies_in_the_cache(
    registry: Registry, texts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "WORTH_SHARING", 1)
    monkeypatch.setattr(shared_cache, "WORTH_STORING_ONCE", 1)
    model = built(registry, "tiny-look", rounds=2, perceive={"name": "static", "tokens": 4})
    model = model.to("meta")
    values = [torch.randn(9, model.encoder.width) for _ in range(2)]
    shown = [[0], [0], [1], [1], [0]]
    several = (*texts, *texts[:2])
    features = VisualFeatures.share(values, [(3, 3)] * 2, shown, model.encoder.width)
    plans = [model.planner.plan(Prompt.ask(text, [picture()])) for text in several]
    with torch.no_grad(), waiting_transfers() as waiting:
        percept = model.perceive([], list(several), features.to(torch.device("meta")))
        state = model.engine.prefix(plans, percept).state
    assert not waiting
    layer: Any = state.cache.layers[0]
    assert isinstance(layer, shared_cache.SharedLayer)
    assert any(len(one.keys) > 1 for one in layer.beginnings)


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("strategy", ["toy-both", "rvii", "static"])
def test_nor_for_a_loss(registry: Registry, strategy: str) -> None:
    model = built(registry, strategy).to("meta")
    plans = [
        model.planner.plan(Prompt.user(picture(), text).then_assistant("a b", learn=True))
        for text in TEXTS
    ]
    with waiting_transfers() as waiting:
        loss, count, _ = model.engine.loss(plans, perceived(model, TEXTS, GRIDS))
    assert not waiting
    assert loss.device.type == "meta"
    assert count > 3


def test_what_reads_data_is_noticed(registry: Registry) -> None:
    model = built(registry, "tiny-look").to("meta")
    model.requester.register_forward_hook(lambda *args: bool(args[-1].values.sum() > 0))
    with pytest.raises(Exception, match=r"(?i)meta"):
        prefix_of(model, TEXTS[:1], [(3, 3)])


META = torch.device("meta")
THERE = torch.empty(3, 2, device=META)
WAITING = {
    "to": lambda: torch.ones(3).to(META),
    "to, another dtype": lambda: torch.ones(3).to(THERE.bfloat16()),
    "one number": lambda: torch.tensor(1.0).to(META),
    "tensor": lambda: torch.tensor([1, 2], device=META),
    "new_tensor": lambda: THERE.new_tensor([1, 2]),
    "copy_": lambda: torch.empty(3, device=META).copy_(torch.ones(3)),
    "a list as an index": lambda: THERE[:, [1, 0]],
    "an index on the CPU": lambda: THERE[torch.tensor([1, 0])],
    "an assignment by an index": lambda: THERE.clone().__setitem__(tensor_on([1], META), 1),
    "another argument on the CPU": lambda: THERE.index_select(0, torch.tensor([1, 0])),
}
GOING_ALONG = {
    "send": lambda: send(torch.ones(3), META),
    "send, another dtype": lambda: send(torch.ones(3), META, torch.bfloat16),
    "tensor_on": lambda: tensor_on([[1, 2]], META),
    "an index that was sent": lambda: THERE[:, tensor_on([1, 0], META)],
    "one number beside others": lambda: THERE + torch.tensor(1.0),
    "slices": lambda: THERE[1:, 0],
    "nothing": lambda: torch.tensor([], device=META),
    "on the CPU": lambda: torch.ones(3)[[0, 1]].to(torch.bfloat16),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_transfer_that_waits_is_noticed(name: str) -> None:
    with waiting_transfers() as waiting:
        WAITING[name]()
    assert [line.rpartition(":")[0].rpartition("/")[2] for line in waiting] == ["test_syncs.py"]


@pytest.mark.parametrize("name", GOING_ALONG)
def test_one_that_does_not_is_none(name: str) -> None:
    with waiting_transfers() as waiting:
        GOING_ALONG[name]()
    assert not waiting


def test_a_transfer_inside_of_the_engine_is_noticed(registry: Registry) -> None:
    model = built(registry, "tiny-look").to("meta")
    model.requester.register_forward_hook(lambda *_: (torch.ones(3).to(META), None)[1])
    with waiting_transfers() as waiting:
        prefix_of(model, TEXTS[:1], [(3, 3)])
    assert len(waiting) == 1


class Pinned:
    """Stands in for a tensor on the CPU where there is a GPU, and writes down what it is told."""

    def __init__(self, nbytes: int) -> None:
        self.device, self.dtype, self.nbytes = torch.device("cpu"), torch.float32, nbytes
        self.told: list[Any] = []

    def pin_memory(self) -> Pinned:
        self.told.append("pinned")
        return self

    def to(self, **how: Any) -> Pinned:
        self.told.append(how)
        return self


@pytest.mark.parametrize("nbytes", [SMALL, SMALL + 1])
def test_what_is_large_goes_from_pinned_memory(nbytes: int) -> None:
    tensor, gpu = Pinned(nbytes), torch.device("cuda", 0)
    send(tensor, gpu, torch.bfloat16)  # type: ignore[arg-type]
    going = [{"device": gpu, "non_blocking": True}, {"dtype": torch.bfloat16}]
    assert tensor.told == ([] if nbytes == SMALL else ["pinned"]) + going


def test_what_comes_back_is_waited_for() -> None:
    tensor = Pinned(8)
    tensor.device = torch.device("cuda", 0)
    send(tensor, torch.device("cpu"))  # type: ignore[arg-type]
    assert tensor.told == [{"device": torch.device("cpu"), "dtype": None}]


@pytest.mark.gpu
@ALIKE
@pytest.mark.parametrize(("strategy", "more"), CASES, ids=str)
def test_nothing_synchronises_on_a_gpu(
    registry: Registry, strategy: str, more: dict[str, Any], grids: list[tuple[int, int]]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = built(registry, strategy, **more).to("cuda")
    texts = (TEXTS[0],) * 3  # without padding, or transformers asks the mask
    prefix_of(model, texts, grids)  # what is made once
    clock = Clock(model.backbone.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix_of(model, texts, grids, clock)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert clock.report()["total"] > 0
