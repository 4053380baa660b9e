"""How backends are timed: each held against double precision first, and what is said of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import toy_model

from ipn_core.attention import AttentionBackend, AttentionInputs, timing
from ipn_core.attention import exact as reference
from ipn_core.attention.choice import Case
from ipn_core.attention.drawing import _times, cases_of, default_cases, draw, label
from ipn_core.attention.exact import exact, largest_difference, results
from ipn_core.attention.timing import Trial, measure
from ipn_core.hooks import hookimpl
from ipn_core.model import IPN
from ipn_core.plugins import add_plugin, get_registry

CPU = torch.device("cpu")
PLAIN = Case(2, 3, 5, 4, 2, 16, 16, "float32", "none", False)


pytestmark = pytest.mark.usefixtures("own_table")


# -- what a call must give -------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "masking", ["none", "mask", "bias", "lengths", "packed", "mask+bias+lengths", "bias+packed"]
)
def test_it_is_found_in_pieces_as_all_at_once(
    masking: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = "packed" in masking
    case = Case(3, 9, 17, 4, 2, 8, 6, "float64", masking, grad)
    case = case if packed else case._replace(queries=4)
    monkeypatch.setattr(reference, "PIECE", 2 * 4 * 4 * 17)  # two samples
    inputs = draw(case, CPU)
    whole = results(inputs, "eager")
    assert len(whole) == (4 if grad else 1)
    assert largest_difference(exact(inputs), whole) < 1e-12


def test_a_difference_counts_by_the_largest_value_and_nothing_hides_one() -> None:
    true = [torch.tensor([1.0, -4.0]).double(), torch.ones(3).double()]
    assert largest_difference([t.clone() for t in true], true) == 0
    off = [true[0] + torch.tensor([0.0, 0.4]), true[1]]
    assert largest_difference(off, true) == pytest.approx(0.1)
    assert largest_difference([true[0], true[1] * float("nan")], true) == float("inf")


# -- what a model computes -------------------------------------------------------------------------


def test_a_model_tells_what_it_leaves_to_auto(registry: Any) -> None:
    rvii = {"width": 16, "depth": 2, "heads": 2}  # the last block is asked for its map
    model = toy_model(registry, "rvii", interact=rvii)
    found = cases_of(model)
    own = Case(1, 4, 4, 2, 2, 8, 8, "float32", "none", False)
    patches = own._replace(keys=9)
    assert set(found) == {
        own,
        patches,
        own._replace(batch=32, grad=True),
        patches._replace(batch=32, grad=True),
    }
    assert cases_of(toy_model(registry, "static")) == []


def test_sequences_end_to_end_grow_with_their_number() -> None:
    packed = PLAIN._replace(masking="packed", queries=6, keys=10)
    assert _times(packed, 4) == packed._replace(batch=8, queries=24, keys=40)
    assert _times(PLAIN, 4) == PLAIN._replace(batch=8)


@pytest.mark.weights
def test_the_default_shapes_are_what_the_starter_computes() -> None:
    assert set(cases_of(IPN.from_pretrained("starter"))) == set(default_cases(CPU))


# -- timing ----------------------------------------------------------------------------------------


class Wrong(AttentionBackend):
    """Looks everywhere alike."""

    name = "wrong"
    supports_groups = True

    def forward(self, inputs: AttentionInputs) -> Tensor:
        inputs = inputs.ungrouped()
        return inputs.v.mean(1, keepdim=True).expand(inputs.q.shape)


class Breaks(AttentionBackend):
    """Fails when it runs."""

    name = "breaks"
    supports_groups = True

    def forward(self, inputs: AttentionInputs) -> Tensor:
        raise ValueError("no such luck")


class BadPlugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.attention("wrong", Wrong)
        registry.attention("breaks", Breaks)


@pytest.fixture
def with_bad_ones() -> Iterator[None]:
    registry = get_registry()
    before = dict(registry.entries("attention")), list(registry.plugins)
    add_plugin(registry, "bad", BadPlugin())
    yield
    registry.components["attention"], registry.plugins = before


@pytest.mark.usefixtures("with_bad_ones")
def test_every_backend_has_a_row_checked_before_it_is_timed() -> None:
    told: list[tuple[int, int]] = []
    cases = [PLAIN._replace(grad=True), PLAIN._replace(masking="lengths")]
    rows = measure(cases, CPU, seconds=0, report=lambda *done: told.append(done))
    assert told == [(1, 2), (2, 2)]
    names = sorted(get_registry().entries("attention"))
    assert [(r.case, r.backend) for r in rows] == [(c, name) for c in cases for name in names]
    found = {r.backend: r for r in rows if r.case == cases[0]}
    for name in ("eager", "sdpa", "sdpa-math", "sdpa-flash"):
        good = found[name]
        assert good.reasons == ()
        assert not good.failed
        assert good.error is not None
        assert good.error < 1e-5
        assert len(good.seconds) == timing.SAMPLES[0]
        assert all(seconds > 0 for seconds in good.seconds)
    assert found["wrong"].reasons[0].startswith("is off by ")
    assert "no such luck" in found["breaks"].reasons[0]
    assert "needs a device of cuda, got cpu" in found["xformers"].reasons
    for name in ("wrong", "breaks", "xformers", "flex"):
        assert found[name].seconds == ()
        assert found[name].to_row().reasons == found[name].reasons
        assert found[name].failed is (name in ("wrong", "breaks"))


def test_auto_is_timed_beside_what_it_may_take() -> None:
    trial = Trial(PLAIN, CPU, ["eager", "sdpa", "xformers"])
    timings = {t.backend: t for t in trial.time(0, also=["auto"])}
    assert [len(t.seconds) for t in timings.values()] == [5, 5, 0, 5]
    rows = {name: timing.to_row() for name, timing in timings.items()}
    assert rows["auto"].name == "q3 kv5 d16 h4/2 b2 float32 none forward / auto"
    assert rows["auto"].error is None
    assert rows["sdpa"].case == {**PLAIN._asdict(), "backend": "sdpa"}
    assert rows["sdpa"].samples == 5
    assert rows["xformers"].reasons == ("needs a device of cuda, got cpu",)


def test_what_ran_before_a_short_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"short": timing.WARM_S / 20, "long": timing.WARM_S}
    done: list[str] = []
    tasks = {name: partial(done.append, name) for name in took}

    def seconds_of(task: Any, times: int, device: torch.device) -> float:
        (name,) = task.args
        done.append(f"{name}, timed {times}")
        return took[name]

    monkeypatch.setattr(timing, "seconds_of", seconds_of)
    timing.in_turn(tasks, CPU, 0)
    before = Counter(a for a, b in pairwise(done) if b == "short, timed 4")
    assert before == {"short": timing.SAMPLES[0]}
    assert done.count("short") == timing.SAMPLES[0]
    assert done.count("long") == 0


def test_a_label_has_the_queries_and_keys_of_one_sequence() -> None:
    packed = PLAIN._replace(batch=2, queries=6, keys=10, masking="packed", grad=True)
    assert label(packed) == "q3 kv5 d16 h4/2 b2 float32 packed forward+backward"


def test_a_map_that_does_not_fit_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "MAP_BYTES", 4 * 4 * 6 * 10 - 1)
    case = PLAIN._replace(batch=2, queries=6, keys=10, masking="packed")
    found = Trial(case, CPU).checked
    for name in ("eager", "flex"):
        assert found[name].reasons[0].startswith("holds the whole map, 0.0 GB here, more than 0.0")
        assert found[name].error is None
    for name in ("sdpa", "sdpa-math"):
        assert found[name].reasons == ()
        assert found[name].error is not None
