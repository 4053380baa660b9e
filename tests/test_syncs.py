"""Between the prompt and the first token the engine never waits for the device.

On the meta device tensors have no data, so that reading any of it raises: `item`, `tolist`, `bool`,
`nonzero`. On a GPU, torch itself is told to refuse what synchronises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import picture, toy_model

from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.prompt import Prompt

TEXTS = ("What is it?", "And where, if anywhere, is the dog?", "Who?")


def prefix_of(model: IPN, texts: tuple[str, ...], grids: list[tuple[int, int]]) -> Any:
    """Run prompts with a picture each up to their last segment, on the model's device."""
    device = model.backbone.device
    values = [torch.randn(h * w, model.encoder.width) for h, w in grids]
    features = VisualFeatures.pack(values, grids, range(len(grids)), len(grids)).to(device)
    plans = [model.planner.plan(Prompt.user(picture(), text)) for text in texts]
    with torch.no_grad():
        return model.engine.prefix(plans, model.perceive([], list(texts), features))


def built(registry: Registry, strategy: str, guided: bool = False, **more: Any) -> IPN:
    if guided:
        guide = {"width": 8, "tallies": 2}
        interact = {"name": "rvii", "width": 16, "depth": 2, "heads": 2, "guide": guide}
        more["interact"] = interact
    return toy_model(registry, strategy, **more)


CASES = [
    ("tiny-look", {}),
    ("toy-both", {"rounds": 2}),
    ("rvii", {}),
    ("rvii", {"guided": True}),
    ("film", {}),
    ("static", {}),
]


@pytest.mark.parametrize("grids", [[(3, 3)] * 3, [(3, 3), (2, 4), (1, 1)]], ids=["alike", "ragged"])
@pytest.mark.parametrize(("strategy", "more"), CASES, ids=str)
def test_no_data_of_the_device_is_read(
    registry: Registry,
    strategy: str,
    more: dict[str, Any],
    grids: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # transformers asks a padding mask whether it is all True; that is its own.
    monkeypatch.setattr(
        "transformers.masking_utils._ignore_causal_mask_sdpa", lambda *_, **__: False
    )
    # No such thing on this device.
    monkeypatch.setattr("torch.is_autocast_enabled", lambda *_: False)
    model = built(registry, strategy, **more).to("meta")
    texts = TEXTS if len(set(grids)) > 1 else (TEXTS[0],) * 3
    found = prefix_of(model, texts, grids)
    assert found.embeds.device.type == "meta"
    assert found.state.length > 0 or strategy == "static"
    assert len(found.lengths) == 3


def test_what_reads_data_is_noticed(registry: Registry) -> None:
    model = built(registry, "tiny-look").to("meta")
    model.requester.register_forward_hook(lambda *args: bool(args[-1].values.sum() > 0))
    with pytest.raises(Exception, match=r"(?i)meta"):
        prefix_of(model, TEXTS[:1], [(3, 3)])


@pytest.mark.gpu
@pytest.mark.parametrize(("strategy", "more"), CASES, ids=str)
def test_nothing_synchronises_on_a_gpu(
    registry: Registry, strategy: str, more: dict[str, Any]
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = built(registry, strategy, **more).to("cuda")
    texts, grids = (TEXTS[0],) * 3, [(3, 3)] * 3
    prefix_of(model, texts, grids)  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        prefix_of(model, texts, grids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
