"""The core's own stages: the paper's requester, two that cannot ask, and the injectors."""

from __future__ import annotations

import torch

from ipn_core.builtin.requesters import Constant, HiddenState, HiddenStateConfig, Shuffled
from ipn_core.stages import Dims, RequestContext
from ipn_core.testing.contracts import InjectorContract, RequesterContract


class TestHiddenState(RequesterContract):
    name = "hidden-state"


class TestConstant(RequesterContract):
    name = "constant"


class TestShuffled(RequesterContract):
    name = "shuffled"
    borrows = True


class TestTokenInjector(InjectorContract):
    name = "tokens"


class TestTokenInjectorWithoutNorm(InjectorContract):
    name = "tokens"
    options = {"norm": False}  # noqa: RUF012 as declared


class TestPrefixKV(InjectorContract):
    name = "prefix-kv"
    options = {"hidden": 8}  # noqa: RUF012 as declared


class TestCrossLayers(InjectorContract):
    name = "layers"
    options = {"every": 1, "heads": 2, "head_width": 4}  # noqa: RUF012 as declared


class TestTokenInjectorWithAnMLP(InjectorContract):
    name = "tokens"
    options = {"hidden": 8}  # noqa: RUF012 as declared


DIMS = Dims(Dv=4, D_in=6, D_hidden=(6, 6, 6), D_out=6, R=2, K=3)


def context(*questions: int) -> RequestContext:
    """Requests of questions by number, equal numbers the same but for rounding."""
    torch.manual_seed(0)
    known = torch.randn(10, DIMS.R, 6)
    hidden = known[list(questions)]
    return RequestContext(hidden + 1e-7 * torch.randn_like(hidden), range(len(questions)))


def test_hidden_state_passes_on_what_it_reads() -> None:
    given = context(0, 1)
    assert torch.equal(HiddenState(HiddenStateConfig(), DIMS)(given).values, given.hidden)


def test_constant_asks_the_same_whatever_the_question() -> None:
    requester = Constant(HiddenStateConfig(), DIMS)
    request = requester(context(0, 1, 2)).values
    assert torch.equal(request, requester.value.expand(3, -1, -1))


def test_shuffled_borrows_from_the_next_sample_that_asks_something_else() -> None:
    given = context(0, 0, 1, 2, 2, 0)
    request = Shuffled(HiddenStateConfig(), DIMS)(given).values
    assert torch.equal(request, given.hidden[[2, 2, 3, 5, 5, 2]])


def test_shuffled_keeps_the_request_where_all_ask_the_same() -> None:
    given = context(3, 3, 3)
    assert torch.equal(Shuffled(HiddenStateConfig(), DIMS)(given).values, given.hidden)
    alone = context(4)
    assert torch.equal(Shuffled(HiddenStateConfig(), DIMS)(alone).values, alone.hidden)
